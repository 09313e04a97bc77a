// Linear layers: x (T, M) times one or several matrices (N, M), plain or packed.
#pragma once

#include <new>

#include "packed.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

constexpr int64_t kChunk = 96;          // columns that a thread takes at once: 4 panels, 6 blocks
constexpr int64_t kTokensAtOnce = 512;  // tokens whose inputs are prepared at once
constexpr int64_t kRowsAtOnce = 256;    // rows whose results wait for their conversion
constexpr int64_t kMinWork = 1 << 17;   // multiplications below which one thread is faster

static inline int choose_threads(int64_t work, int num_threads) {
  return work < kMinWork ? 1 : num_threads;
}

// Build a task for `arguments` and run it: `work` multiplications, on one thread if they are few.
template <class SomeTask, class... Arguments>
static void launch(Context& context, int64_t work, const Arguments&... arguments) {
  const int num_threads = choose_threads(work, context.num_threads);
  if (context.team == nullptr) {
    SomeTask task(arguments..., context.scratch, num_threads);
    return run_team(task, num_threads);
  }
  static_assert(sizeof(SomeTask) <= sizeof(Shared::storage));
  Shared& shared = *context.shared;
  if (context.thread == 0 && !shared.has_failed) {
    try {
      if (num_threads == 1) {
        SomeTask task(arguments..., context.scratch, 1);
        run_team(task, 1);
      } else {
        shared.task = new (shared.storage) SomeTask(arguments..., context.scratch, num_threads);
      }
    } catch (const std::bad_alloc&) {
      shared.has_failed = true;  // an exception may not leave a thread; the model throws it later
    }
  }
  context.team->wait();
  if (num_threads == 1 || shared.has_failed) return;
  shared.task->run(*context.team, context.thread);
  context.team->wait();
}

static inline int64_t count_chunks(int64_t num_columns) {
  return (num_columns + kChunk - 1) / kChunk;
}

static inline void widen(const void* from, Type type, int64_t at, int64_t count, float* to) {
  if (type == Type::kFloat) {
    std::memcpy(to, static_cast<const float*>(from) + at, static_cast<size_t>(count) * 4);
    return;
  }
  const auto* bits = static_cast<const uint16_t*>(from) + at;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(bits + i));
  for (; i < count; ++i) {
    uint16_t one;
    std::memcpy(&one, bits + i, sizeof one);  // at any address
    to[i] = bf16_to_float(one);
  }
}

static inline void narrow(const float* from, int64_t count, void* to, Type type, int64_t at) {
  if (type == Type::kFloat) {
    std::memcpy(static_cast<float*>(to) + at, from, static_cast<size_t>(count) * 4);
    return;
  }
  auto* bits = static_cast<uint16_t*>(to) + at;
  for (int64_t i = 0; i < count; ++i) bits[i] = float_to_bf16(from[i]);
}

// As `narrow`, with `residual` added to what has been rounded, and the sum rounded again; it may be
// where the result goes. Without one (null) as `narrow`.
static inline void narrow_and_add(float* from, int64_t count, const void* residual, void* to,
                                  Type type, int64_t at) {
  if (residual != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      if (type == Type::kFloat) {
        from[i] = static_cast<const float*>(residual)[at + i] + from[i];
      } else {
        const float rounded = bf16_to_float(float_to_bf16(from[i]));
        from[i] = bf16_to_float(static_cast<const uint16_t*>(residual)[at + i]) + rounded;
      }
    }
  }
  narrow(from, count, to, type, at);
}

// How a product wants its inputs.
enum class Form { kFloat, kHalf, kPacked };

// For products of values of type `x` with `weight`.
static inline Form choose_form(const Weight& weight, Type x) {
  if (weight.bits != 0) return Form::kPacked;
  const bool are_halves = weight.type == Type::kBfloat16 && x == Type::kBfloat16;
  return kHasHalfDots && are_halves ? Form::kHalf : Form::kFloat;
}

// Inputs of a product: rows of fp32 or bf16, with zeros up to a multiple of 64 bytes, or of 8 bits.
class Inputs {
 public:
  // Bytes of `num_rows` inputs of type `x` for products with `weight`.
  static int64_t count_bytes(int64_t num_rows, const Weight& weight, Type x) {
    return num_rows * count_stride(weight, choose_form(weight, x));
  }

  Inputs(char* memory, const Weight& weight, Type x)
      : data_(memory),
        form_(choose_form(weight, x)),
        stride_(count_stride(weight, form_)),
        length_(weight.num_columns),
        group_(weight.group) {}

  Form form() const { return form_; }

  // Fill row `row` from `x` (M,) of type `type`; `wide` is memory for M numbers.
  void set(int64_t row, const void* x, Type type, int64_t at, float* wide) {
    if (form_ != Form::kPacked) return set_plain(row, x, type, at);
    widen(x, type, at, length_, wide);
    pack_row(wide, length_, group_, data_ + row * stride_);
  }

  // Fill row `row`, which is not to be of 8 bits.
  void set_plain(int64_t row, const void* x, Type type, int64_t at) {
    char* const to = data_ + row * stride_;
    if (form_ == Form::kFloat) {
      widen(x, type, at, length_, reinterpret_cast<float*>(to));
      pad(to, length_ * 4);
    } else {
      std::memcpy(to, static_cast<const uint16_t*>(x) + at, static_cast<size_t>(length_) * 2);
      pad(to, length_ * 2);
    }
  }

  // Fill row `row`, of bf16 or 8 bits, from fp32.
  void round(int64_t row, const float* x) {
    char* const to = data_ + row * stride_;
    if (form_ == Form::kPacked) return pack_row(x, length_, group_, to);
    narrow(x, length_, to, Type::kBfloat16, 0);
    pad(to, length_ * 2);
  }

  template <class Number>
  const Number* plain(int64_t row) const {
    return reinterpret_cast<const Number*>(data_ + row * stride_);
  }
  PackedRow packed(int64_t row) const { return locate_row(data_ + row * stride_, length_, group_); }

 private:
  static int64_t count_stride(const Weight& weight, Form form) {
    if (form == Form::kPacked) return count_row_bytes(weight.num_columns, weight.group);
    return round_up(weight.num_columns * (form == Form::kHalf ? 2 : 4), 64);
  }
  void pad(char* row, int64_t size) const {
    std::memset(row + size, 0, static_cast<size_t>(stride_ - size));
  }

  char* data_;
  Form form_;
  int64_t stride_, length_, group_;
};

// out[i][c - begin] = inputs[which[i]] . column c, for `count` rows; which = null: rows first ...
static inline void multiply(const Inputs& inputs, const int64_t* which, int64_t first,
                            int64_t count, const Weight& weight, int64_t expert, int64_t begin,
                            int64_t end, float* out, int64_t out_stride, float* panel) {
  for (int64_t done = 0; done < count; done += kMaxRows) {
    const int64_t some = count - done < kMaxRows ? count - done : kMaxRows;
    float* const to = out + done * out_stride;
    const auto find_row = [&](int64_t i) {
      return which == nullptr ? first + done + i : which[done + i];
    };
    if (inputs.form() == Form::kPacked) {
      PackedRow rows[kMaxRows];
      for (int64_t i = 0; i < some; ++i) rows[i] = inputs.packed(find_row(i));
      multiply_packed(rows, some, weight, expert, begin, end, to, out_stride);
    } else if (inputs.form() == Form::kFloat) {
      const float* rows[kMaxRows];
      for (int64_t i = 0; i < some; ++i) rows[i] = inputs.plain<float>(find_row(i));
      multiply_plain(rows, some, weight, expert, begin, end, to, out_stride, panel);
    } else {
#if defined(__AVX512BF16__)
      const uint16_t* rows[kMaxRows];
      for (int64_t i = 0; i < some; ++i) rows[i] = inputs.plain<uint16_t>(find_row(i));
      multiply_plain(rows, some, weight, expert, begin, end, to, out_stride, panel);
#endif
    }
  }
}

class LinearTask final : public Task {
 public:
  LinearTask(const LinearArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments), length_(arguments.weights[0].num_columns) {
    const int64_t rows = a_.num_tokens < kRowsAtOnce ? a_.num_tokens : kRowsAtOnce;
    thread_bytes_ =
        round_up(rows * kChunk * 4, 64) + count_panel_bytes(length_) + round_up(length_, 16) * 4;
    const int64_t input_bytes = Inputs::count_bytes(a_.num_tokens, a_.weights[0], a_.x.type);
    memory_ = static_cast<char*>(scratch.reserve(input_bytes + thread_bytes_ * num_threads));
    thread_memory_ = memory_ + input_bytes;
    for (int i = 0; i < a_.num_outputs; ++i) num_items_ += count_chunks(a_.weights[i].num_rows);
  }

  void run(Team& team, int thread) override {
    char* memory = thread_memory_ + thread * thread_bytes_;
    float* const panel = reinterpret_cast<float*>(memory);
    memory += count_panel_bytes(length_);
    float* const wide = reinterpret_cast<float*>(memory);
    float* const results = wide + round_up(length_, 16);
    Inputs inputs(memory_, a_.weights[0], a_.x.type);
    for (int64_t t; (t = team.take(a_.num_tokens)) < a_.num_tokens;)
      inputs.set(t, a_.x.data, a_.x.type, t * length_, wide);
    team.wait();
    for (int64_t item; (item = team.take(num_items_)) < num_items_;)
      run_chunk(inputs, item, results, panel);
  }

 private:
  void run_chunk(const Inputs& inputs, int64_t chunk, float* results, float* panel) {
    int which = 0;
    while (chunk >= count_chunks(a_.weights[which].num_rows))
      chunk -= count_chunks(a_.weights[which++].num_rows);
    const Weight& weight = a_.weights[which];
    const int64_t begin = chunk * kChunk;
    const int64_t end = begin + kChunk < weight.num_rows ? begin + kChunk : weight.num_rows;
    for (int64_t t = 0; t < a_.num_tokens; t += kRowsAtOnce) {
      const int64_t count = a_.num_tokens - t < kRowsAtOnce ? a_.num_tokens - t : kRowsAtOnce;
      multiply(inputs, nullptr, t, count, weight, 0, begin, end, results, kChunk, panel);
      for (int64_t i = 0; i < count; ++i)
        narrow_and_add(results + i * kChunk, end - begin, a_.residual, a_.outs[which], a_.x.type,
                       (t + i) * weight.num_rows + begin);
    }
  }

  const LinearArguments& a_;
  const int64_t length_;
  int64_t thread_bytes_ = 0, num_items_ = 0;
  char *memory_ = nullptr, *thread_memory_ = nullptr;
};

// In parts of kTokensAtOnce tokens, so that the memory for inputs does not grow with their number.
static void linear(const LinearArguments& arguments, Context& context) {
  const int64_t size = arguments.x.type == Type::kFloat ? 4 : 2;
  const int64_t length = arguments.weights[0].num_columns;
  int64_t num_columns = 0;
  for (int i = 0; i < arguments.num_outputs; ++i) num_columns += arguments.weights[i].num_rows;
  for (int64_t t = 0; t < arguments.num_tokens; t += kTokensAtOnce) {
    LinearArguments part = arguments;
    const int64_t rest = arguments.num_tokens - t;
    part.num_tokens = rest < kTokensAtOnce ? rest : kTokensAtOnce;
    part.x.data = static_cast<const char*>(arguments.x.data) + t * length * size;
    for (int i = 0; i < arguments.num_outputs; ++i)
      part.outs[i] =
          static_cast<char*>(arguments.outs[i]) + t * arguments.weights[i].num_rows * size;
    if (arguments.residual != nullptr)
      part.residual =
          static_cast<const char*>(arguments.residual) + t * arguments.weights[0].num_rows * size;
    launch<LinearTask>(context, part.num_tokens * num_columns * length, part);
  }
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
