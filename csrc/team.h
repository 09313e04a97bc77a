// The threads that share the work of one kernel: torch's own OpenMP pool, not a second one.
#pragma once

#include <atomic>
#include <cstdint>

namespace tramontane {

// What the threads of one kernel call have in common.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }

  // All threads have to arrive before any goes on.
  void wait() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    wait_for_others(phase);
  }

  // The next of `count` pieces of work, or `count` if none is left. `wait` starts over.
  int64_t take(int64_t count) {
    const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < count ? item : count;
  }

 private:
  void wait_for_others(uint32_t phase) const;

  const int size_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// One call of a kernel: `run` is executed by every thread of the team, with its number.
class Task {
 public:
  virtual void run(Team& team, int thread) = 0;

 protected:
  ~Task() = default;
};

class Scratch;

// Where a kernel runs: outside of a team, on threads of its own; or as one member of a team that
// all call the same kernels one after another with the same arguments, as a whole model does.
struct Context {
  Scratch& scratch;
  int num_threads;
  Team* team = nullptr;
  int thread = 0;
  struct Shared* shared = nullptr;
};

// What the members of a team have in common: the task at hand, and whether memory ran out.
struct Shared {
  alignas(64) unsigned char storage[512];
  Task* task = nullptr;
  std::atomic<bool> has_failed{false};
};

// Run `task` on up to `num_threads` threads, this one included, and return when all are done.
void run_team(Task& task, int num_threads);

// Use the OpenMP that the loaded library at `path` links. False if it cannot be used.
bool use_openmp(const char* path);

}  // namespace tramontane
