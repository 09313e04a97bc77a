// Threads from the OpenMP library that torch links, found at run time: `dlsym` searches what the
// library of a handle depends on.
//
// Linking an OpenMP of our own would start a second pool, whose threads would spin against torch's.
#include "team.h"

#include <dlfcn.h>
#include <sched.h>

#include <optional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tramontane {
namespace {

// GNU's entry point for a parallel region; Intel's and LLVM's libraries have it too.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();

ParallelRegion parallel_region = nullptr;
ThreadNumber thread_number = nullptr;
ThreadNumber team_size = nullptr;

constexpr int kSpins = 1000;  // about 50 us; then let somebody else have the core

// Call until something has happened, counting in `spins`.
void pause_briefly(int& spins) {
  if (spins >= kSpins) {
    sched_yield();
    return;
  }
  ++spins;
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Outlives the parallel region, and so the last look of a thread at the team.
struct Call {
  Task& task;
  std::optional<Team> team;
  std::atomic<bool> is_ready{false};
};

void run_member(void* data) {
  auto& call = *static_cast<Call*>(data);
  const int number = thread_number();
  if (number == 0) {
    // The library may give fewer threads than were asked for; inside the region it says how many.
    call.team.emplace(team_size());
    call.is_ready.store(true, std::memory_order_release);
  } else {
    int spins = 0;
    while (!call.is_ready.load(std::memory_order_acquire)) pause_briefly(spins);
  }
  call.task.run(*call.team, number);
}

}  // namespace

void Team::wait_for_others(uint32_t phase) const {
  int spins = 0;
  while (phase_.load(std::memory_order_acquire) == phase) pause_briefly(spins);
}

void run_team(Task& task, int num_threads) {
  if (num_threads > 1 && parallel_region != nullptr) {
    Call call{task, std::nullopt, {}};
    parallel_region(run_member, &call, static_cast<unsigned>(num_threads), 0);
    return;
  }
  Team team(1);
  task.run(team, 0);
}

bool use_openmp(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;
  const auto region = reinterpret_cast<ParallelRegion>(dlsym(library, "GOMP_parallel"));
  const auto number = reinterpret_cast<ThreadNumber>(dlsym(library, "omp_get_thread_num"));
  const auto size = reinterpret_cast<ThreadNumber>(dlsym(library, "omp_get_num_threads"));
  if (region == nullptr || number == nullptr || size == nullptr) return false;
  parallel_region = region;
  thread_number = number;
  team_size = size;
  return true;
}

}  // namespace tramontane
