// shared_prefix_attention on CPUs: the tiles of paired_attention, each attending to the one prefix that its row picks.
#include <torch/library.h>

#include <vector>

#include "cpu/attention.h"

namespace thought_kernels {
namespace {

constexpr const char* kName = "shared_prefix_attention_cpp";

template <typename In, typename T, typename Out>
void run(const at::Tensor& query_, const at::Tensor& key, const at::Tensor& value, at::TensorList prefix_keys,
         at::TensorList prefix_values, const at::Tensor& prefix_index, const std::optional<at::Tensor>& lengths,
         const attention::Limits& limits, attention::Instructions instructions, const at::Tensor& output) {
    using namespace attention;
    const at::Tensor query = query_.stride(3) == 1 ? query_ : query_.contiguous();
    const Keys<T> own(key, value);
    std::vector<Keys<T>> prefixes;
    for (size_t i = 0; i < prefix_keys.size(); ++i) prefixes.emplace_back(prefix_keys[i], prefix_values[i]);
    const In* const queries = query.const_data_ptr<In>();
    Out* const outputs = output.mutable_data_ptr<Out>();
    const int64_t* const chosen = prefix_index.const_data_ptr<int64_t>();
    for_each_tile<T>(
        query, key.size(1), lengths, 2, [&](const Tile& tile, int64_t example, int64_t head, Scratch<T>& scratch) {
            const bool any = chosen[example] >= 0;
            const Segment<T> own_keys = own.own(example, head, limits.window);
            const Segment<T> seen = any ? prefixes[chosen[example]].prefix(head, limits.window) : Segment<T>{};
            THOUGHT_KERNELS_CALL(
                instructions, shared_tile, tile, QueryRows<In>(queries, query, example, head, tile.group), own_keys,
                any ? &seen : nullptr, static_cast<T>(limits.query_scale()), static_cast<T>(limits.softcap), scratch,
                OutputRows<Out>(outputs, output, example, head, tile.group));
        });
}

at::Tensor shared_prefix_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   at::TensorList prefix_keys, at::TensorList prefix_values,
                                   const at::Tensor& prefix_index, const std::optional<at::Tensor>& lengths,
                                   std::optional<int64_t> window, double scale, std::optional<double> softcap,
                                   at::ScalarType output_dtype, const std::optional<std::string>& instructions) {
    attention::check_own(kName, query, key, value, lengths);
    check_dtype(kName, "prefix_index", prefix_index, at::kLong);
    check_shape(kName, "prefix_index", prefix_index, {query.size(0)});
    TORCH_CHECK_VALUE(prefix_keys.size() == prefix_values.size(), kName,
                      ": prefix_values must have prefix_keys' length ", prefix_keys.size(), ", got ",
                      prefix_values.size());
    for (size_t i = 0; i < prefix_keys.size(); ++i) {
        attention::check_prefix(kName, query, key, prefix_keys[i], prefix_values[i]);
    }
    const at::Tensor index = prefix_index.contiguous();
    for (int64_t i = 0; i < index.numel(); ++i) {
        const int64_t one = index.const_data_ptr<int64_t>()[i], count = static_cast<int64_t>(prefix_keys.size());
        TORCH_CHECK_VALUE(one >= -1 && one < count, kName, ": prefix_index must be between -1 and ", count - 1,
                          ", got ", one);
    }
    const at::ScalarType dtype = query.scalar_type();
    TORCH_CHECK_TYPE(output_dtype == dtype || (output_dtype == at::kFloat && dtype != at::kDouble), kName,
                     ": output_dtype must be query's dtype ", dtype, " or float32 beside a narrower one, got ",
                     output_dtype);
    const at::Tensor output = attention::empty_output(query, output_dtype);
    attention::zero_padding(kName, output, lengths);
    if (output.numel() == 0) return output;
    const attention::Limits limits(window, scale, softcap);
    const attention::Instructions set = attention::choose_instructions(kName, instructions);
    attention::for_dtype(kName, dtype, [&](auto in, auto wide) {
        using In = decltype(in);
        using T = decltype(wide);
        const auto call = output_dtype == dtype ? run<In, T, In> : run<In, T, T>;
        call(query, key, value, prefix_keys, prefix_values, index, lengths, limits, set, output);
    });
    return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(thought_kernels, CPU, library) {
    library.impl("shared_prefix_attention_cpp", &shared_prefix_attention);
}

}  // namespace thought_kernels
