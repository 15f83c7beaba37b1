// paired_attention on CPUs: one tile of queries attends to its own keys and to both prefixes, and writes attention
// without context and the difference that the prefix makes, from the softmax states (reference/paired_attention.py:
// fork).
#include <torch/library.h>

#include <tuple>

#include "cpu/attention.h"

namespace thought_kernels {
namespace {

constexpr const char* kName = "paired_attention_cpp";

template <typename In, typename T>
void run(const at::Tensor& query_, const at::Tensor& key, const at::Tensor& value, const at::Tensor& with_key,
         const at::Tensor& with_value, const std::optional<at::Tensor>& without_key,
         const std::optional<at::Tensor>& without_value, const std::optional<at::Tensor>& lengths,
         const attention::Limits& limits, attention::Instructions instructions, const at::Tensor& output,
         const at::Tensor& delta) {
    using namespace attention;
    const at::Tensor query = query_.stride(3) == 1 ? query_ : query_.contiguous();
    const Keys<T> own(key, value), with(with_key, with_value);
    std::optional<Keys<T>> without;
    if (without_key.has_value() && without_key->size(1) > 0) without.emplace(*without_key, *without_value);
    const In* const queries = query.const_data_ptr<In>();
    In* const outputs = output.mutable_data_ptr<In>();
    T* const deltas = delta.mutable_data_ptr<T>();
    for_each_tile<T>(query, key.size(1), lengths, without ? 3 : 2,
                     [&](const Tile& tile, int64_t example, int64_t head, Scratch<T>& scratch) {
                         const Segment<T> own_keys = own.own(example, head, limits.window),
                                          with_keys = with.prefix(head, limits.window);
                         const Segment<T> without_keys = without ? without->prefix(head, limits.window) : Segment<T>{};
                         THOUGHT_KERNELS_CALL(instructions, paired_tile, tile,
                                              QueryRows<In>(queries, query, example, head, tile.group), own_keys,
                                              with_keys, without ? &without_keys : nullptr,
                                              static_cast<T>(limits.query_scale()), static_cast<T>(limits.softcap),
                                              scratch, OutputRows<In>(outputs, output, example, head, tile.group),
                                              OutputRows<T>(deltas, delta, example, head, tile.group));
                     });
}

std::tuple<at::Tensor, at::Tensor> paired_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& with_key,
    const at::Tensor& with_value, const std::optional<at::Tensor>& without_key,
    const std::optional<at::Tensor>& without_value, const std::optional<at::Tensor>& lengths,
    std::optional<int64_t> window, double scale, std::optional<double> softcap,
    const std::optional<std::string>& instructions) {
    attention::check_own(kName, query, key, value, lengths);
    attention::check_prefix(kName, query, key, with_key, with_value);
    if (without_key.has_value()) {
        TORCH_CHECK_VALUE(without_value.has_value(), kName, ": without_value must be given with without_key, got None");
        attention::check_prefix(kName, query, key, *without_key, *without_value);
    }
    const at::ScalarType dtype = query.scalar_type();
    const at::Tensor output = attention::empty_output(query, dtype);
    const at::Tensor delta = attention::empty_output(query, dtype == at::kDouble ? at::kDouble : at::kFloat);
    attention::zero_padding(kName, output, lengths);
    attention::zero_padding(kName, delta, lengths);
    if (output.numel() == 0) return {output, delta};
    const attention::Limits limits(window, scale, softcap);
    const attention::Instructions set = attention::choose_instructions(kName, instructions);
    attention::for_dtype(kName, dtype, [&](auto in, auto wide) {
        run<decltype(in), decltype(wide)>(query, key, value, with_key, with_value, without_key, without_value, lengths,
                                          limits, set, output, delta);
    });
    return {output, delta};
}

}  // namespace

TORCH_LIBRARY_IMPL(thought_kernels, CPU, library) {
    library.impl("paired_attention_cpp", &paired_attention);
}

}  // namespace thought_kernels
