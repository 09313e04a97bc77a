// The Python module `tramontane.kernels._native`: addresses and sizes in, nothing but numbers out.
//
// Python has checked shapes and types (tramontane/kernels/native.py); here they are believed. Ids
// of experts and tokens are looked at here, blocks of a cache nowhere.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <vector>

#include "decoder.h"
#include "kernels.h"

namespace nb = nanobind;
using namespace tramontane;

namespace {

const KernelTable* kernels = nullptr;
thread_local Scratch scratch;
constexpr int64_t kFirstBlock[] = {0};

template <class Pointee>
Pointee* at(uintptr_t address) {
  return reinterpret_cast<Pointee*>(address);
}

Type to_type(int type) { return static_cast<Type>(type); }

void build_weight(Weight* self, uintptr_t data, int type, int bits, uintptr_t scales,
                  uintptr_t zeros, int64_t num_rows, int64_t num_columns, int64_t group,
                  int64_t expert_stride) {
  new (self) Weight{at<const void>(data),
                    to_type(type),
                    bits,
                    at<const uint16_t>(scales),
                    at<const uint8_t>(zeros),
                    num_rows,
                    num_columns,
                    group,
                    expert_stride};
}

void run_linear(uintptr_t x, int type, int64_t num_tokens, nb::tuple weights, nb::tuple outs,
                int num_threads) {
  LinearArguments arguments{{at<const void>(x), to_type(type)}, num_tokens, 0, {}, {}, nullptr};
  if (weights.size() > kMaxOutputs || outs.size() != weights.size())
    throw std::invalid_argument("linear: 1 to 3 weights, and as many outputs");
  for (size_t i = 0; i < weights.size(); ++i) {
    arguments.weights[i] = nb::cast<const Weight&>(weights[i]);
    arguments.outs[i] = at<void>(nb::cast<uintptr_t>(outs[i]));
  }
  arguments.num_outputs = static_cast<int>(weights.size());
  nb::gil_scoped_release release;
  Context context{scratch, num_threads};
  kernels->linear(arguments, context);
}

void run_experts(uintptr_t x, int type, int64_t num_tokens, int64_t num_experts, int64_t num_slots,
                 uintptr_t slot_weights, uintptr_t experts, const Weight& w1, const Weight& w2,
                 const Weight& w3, uintptr_t out, int num_threads) {
  const auto* ids = at<const int64_t>(experts);
  for (int64_t i = 0; i < num_tokens * num_slots; ++i)
    if (ids[i] != kNoExpert && (ids[i] < 0 || ids[i] >= num_experts))
      throw std::out_of_range("there is no such expert");
  Context context{scratch, num_threads};
  kernels->experts({{at<const void>(x), to_type(type)},
                    num_tokens,
                    num_experts,
                    num_slots,
                    at<const float>(slot_weights),
                    at<const int64_t>(experts),
                    w1,
                    w2,
                    w3,
                    at<void>(out),
                    nullptr},
                   context);
}

void run_norm(uintptr_t x, int type, uintptr_t weight, int weight_type, int64_t num_tokens,
              int64_t dim, float eps, uintptr_t out, int num_threads) {
  Context context{scratch, num_threads};
  kernels->norm({{at<const void>(x), to_type(type)},
                 {at<const void>(weight), to_type(weight_type)},
                 num_tokens,
                 dim,
                 eps,
                 at<void>(out)},
                context);
}

void run_norm_grad(uintptr_t x, int type, uintptr_t weight, int weight_type, uintptr_t grad,
                   int64_t num_tokens, int64_t dim, float eps, uintptr_t grad_x,
                   uintptr_t grad_weight, int num_threads) {
  Context context{scratch, num_threads};
  kernels->norm_grad({{at<const void>(x), to_type(type)},
                      {at<const void>(weight), to_type(weight_type)},
                      {at<const void>(grad), to_type(type)},
                      num_tokens,
                      dim,
                      eps,
                      at<void>(grad_x),
                      at<void>(grad_weight)},
                     context);
}

void run_swiglu(uintptr_t gate, uintptr_t up, int type, int64_t count, uintptr_t out,
                int num_threads) {
  const Type common = to_type(type);
  Context context{scratch, num_threads};
  const Values both[] = {{at<const void>(gate), common}, {at<const void>(up), common}};
  kernels->swiglu({both[0], both[1], count, at<void>(out)}, context);
}

void run_swiglu_grad(uintptr_t gate, uintptr_t up, uintptr_t grad, int type, int64_t count,
                     uintptr_t out, uintptr_t grad_gate, uintptr_t grad_up, int num_threads) {
  const Type common = to_type(type);
  Context context{scratch, num_threads};
  kernels->swiglu_grad({{at<const void>(gate), common},
                        {at<const void>(up), common},
                        {at<const void>(grad), common},
                        count,
                        at<void>(out),
                        at<void>(grad_gate),
                        at<void>(grad_up)},
                       context);
}

void run_rotate(uintptr_t x, int type, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
                int64_t stride, uintptr_t cos, uintptr_t sin, uintptr_t out, int num_threads) {
  Context context{scratch, num_threads};
  kernels->rotate({{at<const void>(x), to_type(type)},
                   num_tokens,
                   num_heads,
                   head_dim,
                   stride,
                   at<const float>(cos),
                   at<const float>(sin),
                   at<void>(out)},
                  context);
}

// Keys and values whose heads lie `head_slots` tokens apart: a cache of one block.
void run_attention(uintptr_t q, int type, uintptr_t k, uintptr_t v, int cache_type,
                   int64_t num_queries, int64_t num_keys, int64_t num_heads, int64_t num_kv_heads,
                   int64_t head_dim, int64_t head_slots, int64_t window, uintptr_t out,
                   int num_threads) {
  const Cache cache{at<void>(k), at<void>(v), to_type(cache_type), head_slots};
  const Sequence sequence{num_queries, num_keys, cache, kFirstBlock};
  Context context{scratch, num_threads};
  kernels->attention({{at<const void>(q), to_type(type)},
                      &sequence,
                      1,
                      num_heads,
                      num_kv_heads,
                      head_dim,
                      window,
                      at<void>(out)},
                     context);
}

void run_paged_attention(uintptr_t q, int type, int64_t num_tokens, uintptr_t keys,
                         uintptr_t values, int cache_type, int64_t block_size,
                         int64_t num_sequences, uintptr_t num_queries, uintptr_t num_keys,
                         uintptr_t block_tables, int64_t max_blocks, int64_t num_heads,
                         int64_t num_kv_heads, int64_t head_dim, int64_t window, uintptr_t out,
                         int num_threads) {
  const SequenceTable table{num_sequences, max_blocks, at<const int64_t>(num_queries),
                            at<const int64_t>(num_keys), at<const int64_t>(block_tables)};
  check_sequences(table, num_tokens, block_size);
  std::vector<Sequence> sequences;
  add_sequences(table, {at<void>(keys), at<void>(values), to_type(cache_type), block_size},
                sequences);
  Context context{scratch, num_threads};
  kernels->attention({{at<const void>(q), to_type(type)},
                      sequences.data(),
                      num_sequences,
                      num_heads,
                      num_kv_heads,
                      head_dim,
                      window,
                      at<void>(out)},
                     context);
}

void run_router(uintptr_t x, int type, uintptr_t weight, int weight_type, int64_t num_tokens,
                int64_t dim, int64_t num_experts, int64_t num_slots, uintptr_t counts,
                uintptr_t slot_weights, uintptr_t experts, uintptr_t logits, int num_threads) {
  Context context{scratch, num_threads};
  kernels->router({{at<const void>(x), to_type(type)},
                   {at<const void>(weight), to_type(weight_type)},
                   num_tokens,
                   dim,
                   num_experts,
                   num_slots,
                   at<const int64_t>(counts),
                   at<float>(slot_weights),
                   at<int64_t>(experts),
                   at<float>(logits)},
                  context);
}

void run_sample(uintptr_t logits, int64_t num_rows, int64_t num_columns, int64_t stride,
                uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
                uintptr_t numbers, uintptr_t tokens, int num_threads) {
  Context context{scratch, num_threads};
  kernels->sample({at<const float>(logits), num_rows, num_columns, stride,
                   at<const float>(temperature), at<const int64_t>(top_k), at<const float>(top_p),
                   at<const float>(min_p), at<const double>(numbers), at<int64_t>(tokens)},
                  context);
}

// Sizes: those of DecoderShape, in its order.
bool run_is_finite(uintptr_t x, int64_t count, int size, uint32_t infinity, int num_threads) {
  return kernels->is_finite({at<const void>(x), count, size, infinity}, num_threads);
}

void build_decoder(Decoder* self, nb::tuple sizes, float eps, int type, uintptr_t embeddings,
                   uintptr_t norm, const Weight& output) {
  const auto size = [&](size_t i) { return nb::cast<int64_t>(sizes[i]); };
  const DecoderShape shape{size(0), size(1), size(2), size(3), size(4),
                           size(5), size(6), size(7), eps,     to_type(type)};
  new (self) Decoder(shape, {at<const void>(embeddings), to_type(type)},
                     {at<const void>(norm), to_type(type)}, output);
}

void add_layer(Decoder& decoder, int type, uintptr_t attention_norm, uintptr_t ffn_norm,
               nb::tuple attention, uintptr_t gate, nb::tuple experts) {
  const auto values = [&](uintptr_t address) {
    return Values{at<const void>(address), to_type(type)};
  };
  const auto weight = [](nb::tuple weights, size_t i) -> const Weight& {
    return nb::cast<const Weight&>(weights[i]);
  };
  decoder.add_layer({values(attention_norm), values(ffn_norm), weight(attention, 0),
                     weight(attention, 1), weight(attention, 2), weight(attention, 3), values(gate),
                     weight(experts, 0), weight(experts, 1), weight(experts, 2)});
}

int64_t run_decoder(Decoder& decoder, uintptr_t tokens, int64_t num_tokens, uintptr_t keys,
                    int64_t values_offset, int64_t layer_offset, int cache_type, int64_t block_size,
                    int64_t num_sequences, uintptr_t num_queries, uintptr_t num_keys,
                    uintptr_t block_tables, int64_t max_blocks, uintptr_t cos, uintptr_t sin,
                    int64_t num_positions, uintptr_t rows, int64_t num_rows, uintptr_t counts,
                    int64_t num_slots, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p,
                    uintptr_t min_p, uintptr_t numbers, uintptr_t hidden, uintptr_t slot_weights,
                    uintptr_t experts, uintptr_t router_logits, uintptr_t logits,
                    uintptr_t next_tokens, uintptr_t is_finite, int64_t num_steps, double seconds,
                    uintptr_t ends, int64_t num_ends, int num_threads) {
  const Batch batch{at<const int64_t>(tokens),
                    num_tokens,
                    {at<char>(keys), values_offset, layer_offset, to_type(cache_type), block_size},
                    {num_sequences, max_blocks, at<const int64_t>(num_queries),
                     at<const int64_t>(num_keys), at<const int64_t>(block_tables)},
                    at<const float>(cos),
                    at<const float>(sin),
                    num_positions,
                    at<const int64_t>(rows),
                    num_rows,
                    at<const int64_t>(counts),
                    num_slots,
                    {at<const float>(temperature), at<const int64_t>(top_k), at<const float>(top_p),
                     at<const float>(min_p), at<const double>(numbers)}};
  return decoder.run(
      *kernels, batch,
      {at<void>(hidden), at<float>(slot_weights), at<int64_t>(experts), at<float>(router_logits),
       at<float>(logits), at<int64_t>(next_tokens), at<uint8_t>(is_finite)},
      {num_steps, seconds, at<const int64_t>(ends), num_ends}, num_threads);
}

nb::dict list_seconds(const Decoder& decoder) {
  const char* const names[] = {"embeddings", "norms", "attention's products", "attention", "router",
                               "experts",    "head"};
  static_assert(sizeof names / sizeof names[0] == kNumParts);
  nb::dict seconds;
  for (int i = 0; i < kNumParts; ++i) seconds[names[i]] = decoder.seconds()[i];
  return seconds;
}

bool choose_kernels(const std::string& name) {
  const KernelTable* found = find_kernels(name.empty() ? nullptr : name.c_str());
  if (found != nullptr) kernels = found;
  return found != nullptr;
}

}  // namespace

NB_MODULE(_native, module) {
  kernels = find_kernels(nullptr);
  const auto without_gil = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<Weight>(module, "Weight").def("__init__", build_weight);
  nb::class_<Decoder>(module, "Decoder")
      .def("__init__", build_decoder)
      .def("add_layer", add_layer)
      .def("run", run_decoder, without_gil)
      .def("list_seconds", list_seconds);
  module.def("linear", run_linear);
  module.def("experts", run_experts, without_gil);
  module.def("norm", run_norm, without_gil);
  module.def("norm_grad", run_norm_grad, without_gil);
  module.def("swiglu", run_swiglu, without_gil);
  module.def("swiglu_grad", run_swiglu_grad, without_gil);
  module.def("rotate", run_rotate, without_gil);
  module.def("attention", run_attention, without_gil);
  module.def("paged_attention", run_paged_attention, without_gil);
  module.def("router", run_router, without_gil);
  module.def("sample", run_sample, without_gil);
  module.def("is_finite", run_is_finite, without_gil);
  module.def("use_openmp", [](const std::string& path) { return use_openmp(path.c_str()); });
  module.def("choose_kernels", choose_kernels);
  module.def("get_name", [] { return std::string(kernels->name); });
}
