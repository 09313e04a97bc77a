// One table of kernels per instruction set, the best first.
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

namespace tramontane {

namespace portable {
extern const KernelTable kernel_table;
}
#if TRAMONTANE_X86
namespace avx2 {
extern const KernelTable kernel_table;
}
namespace avx512 {
extern const KernelTable kernel_table;
}
#if TRAMONTANE_AVX512_BF16
namespace avx512_bf16 {
extern const KernelTable kernel_table;
}
#endif
#endif

namespace {

struct Entry {
  const KernelTable* table;
  bool is_supported;
};

}  // namespace

const KernelTable* find_kernels(const char* name) {
#if TRAMONTANE_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni");
#endif
  const Entry entries[] = {
#if TRAMONTANE_X86
#if TRAMONTANE_AVX512_BF16
      {&avx512_bf16::kernel_table, has_avx512 && __builtin_cpu_supports("avx512bf16")},
#endif
      {&avx512::kernel_table, has_avx512},
      {&avx2::kernel_table, has_avx2},
#endif
      {&portable::kernel_table, true},
  };
  for (const Entry& entry : entries) {
    if (!entry.is_supported) continue;
    if (name == nullptr || std::strcmp(name, entry.table->name) == 0) return entry.table;
  }
  return nullptr;
}

Scratch::~Scratch() { std::free(data_); }

void* Scratch::reserve(int64_t size) {
  if (size > size_) {
    std::free(data_);
    data_ = nullptr, size_ = 0;
    const int64_t rounded = (size + size / 4 + 63) / 64 * 64;
    if (posix_memalign(&data_, 64, static_cast<size_t>(rounded)) != 0) throw std::bad_alloc();
    size_ = rounded;
  }
  return data_;
}

}  // namespace tramontane
