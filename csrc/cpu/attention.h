// What paired_attention.cpp and shared_prefix_attention.cpp share: views of strided tensors, tiles, segments of keys,
// and the kernels of attention_tile.h compiled for each instruction set.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "checks.h"
#include "instructions.h"

namespace thought_kernels {
namespace attention {

constexpr int64_t kRows = 64;                    // queries of a tile: 4 registers of 16 floats
constexpr int64_t kKeys = 128;                   // keys whose scores are held at a time
constexpr int64_t kNoWindow = int64_t(1) << 40;  // beyond any key, and times a group still far from overflow
template <typename T>
constexpr T kLowest = T(-1e30);  // below any score, and finite: see attend()

// Keys and values of one key head, and which of them a token sees: key j stands at position j − offset.
template <typename T>
struct Segment {
    const T *key, *value;
    int64_t key_stride, value_stride;
    int64_t count, offset, window;
    bool causal;  // the example's own keys: none after the token itself

    int64_t first_key(int64_t token) const { return std::max<int64_t>(0, token + offset - window + 1); }
    int64_t end_key(int64_t token) const { return causal ? token + 1 : count; }
};

// Rows first .. first + count of one key head's queries, token by token, the group's query heads side by side.
struct Tile {
    int64_t first, count, group, head_dim;

    int64_t token(int64_t row) const { return (first + row) / group; }
    template <typename T>
    int64_t first_row(const Segment<T>& segment, int64_t key) const {
        return segment.causal ? std::clamp<int64_t>(key * group - first, 0, count) : 0;
    }
    template <typename T>
    int64_t end_row(const Segment<T>& segment, int64_t key) const {
        return std::clamp<int64_t>((key - segment.offset + segment.window) * group - first, 0, count);
    }
};

// One example's and key head's rows of a [B, Hq, T, D] tensor, in a tile's order.
template <typename T>
struct Rows {
    T* data;
    int64_t head_stride, token_stride, group;

    Rows(T* start, const at::Tensor& x, int64_t example, int64_t key_head, int64_t group_size)
        : data(start + example * x.stride(0) + key_head * group_size * x.stride(1)),
          head_stride(x.stride(1)),
          token_stride(x.stride(2)),
          group(group_size) {}
    T* row(int64_t r) const { return data + r / group * token_stride + r % group * head_stride; }
};
template <typename T>
using QueryRows = Rows<const T>;
template <typename T>
using OutputRows = Rows<T>;

template <typename T>
struct State {
    T maximum[kRows], total[kRows];
    T* output;  // [kRows, head_dim]
};

// One thread's memory: queries [D, kRows], scores [kKeys, kRows], and an output per segment.
template <typename T>
struct Scratch {
    T *queries, *scores;
    State<T> states[3];

    static int64_t size(int64_t head_dim, int64_t segments) { return kRows * (kKeys + (1 + segments) * head_dim); }
    Scratch(T* memory, int64_t head_dim, int64_t segments) : queries(memory), scores(memory + kRows * head_dim) {
        for (int64_t i = 0; i < segments; ++i) states[i].output = scores + kRows * (kKeys + i * head_dim);
    }
};

#define PER_INSTRUCTION_SET "attention_tile.h"
#include "per_instruction_set.h"
using thought_kernels::choose_instructions;
using thought_kernels::Instructions;

// How keys are scored, and which are too far off.
struct Limits {
    int64_t window;
    double scale, softcap;  // softcap 0 for none

    Limits(std::optional<int64_t> window_, double scale_, std::optional<double> softcap_)
        : window(std::min(window_.value_or(kNoWindow), kNoWindow)), scale(scale_), softcap(softcap_.value_or(0)) {}
    // What queries are multiplied with: attend() takes the tanh of their products with keys.
    double query_scale() const { return softcap == 0 ? scale : scale / softcap; }
};

// Keys or values in the arithmetic's dtype with unit stride along head_dim: the tensor itself where it is so already.
inline at::Tensor widen(const at::Tensor& x, at::ScalarType dtype) {
    const at::Tensor wide = x.to(dtype);
    return wide.stride(-1) == 1 ? wide : wide.contiguous();
}

// [B, Hq, T, D] over memory [B, T, Hq, D]: rows of all heads side by side, as o_proj and accumulate read them.
inline at::Tensor empty_output(const at::Tensor& query, at::ScalarType dtype) {
    const auto options = query.options().dtype(dtype);
    return at::empty({query.size(0), query.size(2), query.size(1), query.size(3)}, options).transpose(1, 2);
}

// Own keys of each (example, key head), or a prefix's of each key head, ready for the kernels.
template <typename T>
struct Keys {
    at::Tensor key, value;

    Keys(const at::Tensor& key_, const at::Tensor& value_)
        : key(widen(key_, c10::CppTypeToScalarType<T>::value)),
          value(widen(value_, c10::CppTypeToScalarType<T>::value)) {}

    Segment<T> own(int64_t example, int64_t head, int64_t window) const {
        return {key.const_data_ptr<T>() + example * key.stride(0) + head * key.stride(1),
                value.const_data_ptr<T>() + example * value.stride(0) + head * value.stride(1),
                key.stride(2),
                value.stride(2),
                key.size(2),
                0,
                window,
                true};
    }
    Segment<T> prefix(int64_t head, int64_t window) const {
        return {key.const_data_ptr<T>() + head * key.stride(0),
                value.const_data_ptr<T>() + head * value.stride(0),
                key.stride(1),
                value.stride(1),
                key.size(1),
                key.size(1),
                window,
                false};
    }
};

inline void check_own(const char* function, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const std::optional<at::Tensor>& lengths) {
    TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && key.size(1) > 0 && query.size(1) % key.size(1) == 0,
                      function, ": query and key must be [B, Hq, T, D] and [B, Hkv, T, D], got ", query.sizes(),
                      " and ", key.sizes());
    check_shape(function, "key", key, {query.size(0), key.size(1), query.size(2), query.size(3)});
    check_shape(function, "value", value, key.sizes());
    check_shape(function, "lengths", lengths, {query.size(0)});
    check_dtype(function, "key", key, query.scalar_type());
    check_dtype(function, "value", value, query.scalar_type());
    check_dtype(function, "lengths", lengths, at::kLong);
}

inline void check_prefix(const char* function, const at::Tensor& query, const at::Tensor& key,
                         const at::Tensor& prefix_key, const at::Tensor& prefix_value) {
    TORCH_CHECK_VALUE(prefix_key.dim() == 3, function, ": a prefix must be [Hkv, P, D], got ", prefix_key.sizes());
    check_shape(function, "prefix key", prefix_key, {key.size(1), prefix_key.size(1), key.size(3)});
    check_shape(function, "prefix value", prefix_value, prefix_key.sizes());
    check_dtype(function, "prefix key", prefix_key, query.scalar_type());
    check_dtype(function, "prefix value", prefix_value, query.scalar_type());
}

// Calls run(In{}, T{}) for inputs of a dtype: In is theirs and T that of the arithmetic.
template <typename Run>
void for_dtype(const char* function, at::ScalarType dtype, const Run& run) {
    switch (dtype) {
        case at::kFloat:
            return run(float{}, float{});
        case at::kDouble:
            return run(double{}, double{});
        case at::kBFloat16:
            return run(at::BFloat16{}, float{});
        case at::kHalf:
            return run(at::Half{}, float{});
        default:
            TORCH_CHECK_TYPE(false, function, ": query must be float64, float32, bfloat16 or float16, got ", dtype);
    }
}

// Calls run(tile, example, key head, scratch) for every tile of real queries, on all threads. Which thread takes which
// tile varies; what a tile holds does not, so results are repeatable.
template <typename T, typename Run>
void for_each_tile(const at::Tensor& query, int64_t key_heads, const std::optional<at::Tensor>& lengths,
                   int64_t segments, const Run& run) {
    const int64_t batch = query.size(0), group = query.size(1) / key_heads, head_dim = query.size(3);
    const int64_t tiles = (query.size(2) * group + kRows - 1) / kRows;
    const at::Tensor counts = lengths.has_value() ? lengths->contiguous() : at::Tensor();
    const int64_t total = tiles * batch * key_heads;
    const int64_t workers = std::min<int64_t>(total, at::get_num_threads());
    const int64_t size = Scratch<T>::size(head_dim, segments);
    const at::Tensor memory = at::empty({workers * size}, query.options().dtype(c10::CppTypeToScalarType<T>::value));
    T* const scratch_start = memory.mutable_data_ptr<T>();
    std::atomic<int64_t> next{0};
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
            Scratch<T> scratch(scratch_start + worker * size, head_dim, segments);
            for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
                const int64_t pair = task % (batch * key_heads);
                // The last tiles see the most keys: they go first, so that no thread is left with a long one.
                const int64_t first = (tiles - 1 - task / (batch * key_heads)) * kRows;
                const int64_t example = pair / key_heads, head = pair % key_heads;
                const int64_t length = counts.defined() ? counts.const_data_ptr<int64_t>()[example] : query.size(2);
                const int64_t count = std::min(kRows, length * group - first);
                if (count > 0) run(Tile{first, count, group, head_dim}, example, head, scratch);
            }
        }
    });
}

// Zeroes the rows of a [B, Hq, T, D] output, as made by empty_output, at and beyond each example's length.
inline void zero_padding(const char* function, const at::Tensor& output, const std::optional<at::Tensor>& lengths) {
    if (!lengths.has_value()) return;
    const at::Tensor counts = lengths->contiguous();
    const int64_t row_bytes = output.size(1) * output.size(3) * output.element_size(), tokens = output.size(2);
    char* const data = static_cast<char*>(output.mutable_data_ptr());
    for (int64_t example = 0; example < output.size(0); ++example) {
        const int64_t length = counts.const_data_ptr<int64_t>()[example];
        TORCH_CHECK_VALUE(length >= 0 && length <= tokens, function, ": lengths must be between 0 and ", tokens,
                          ", got ", length);
        std::fill_n(data + (example * tokens + length) * row_bytes, (tokens - length) * row_bytes, 0);
    }
}

}  // namespace attention
}  // namespace thought_kernels

// Calls a kernel of attention_tile.h as compiled for a set of instructions.
#ifdef THOUGHT_KERNELS_X86
#define THOUGHT_KERNELS_CALL(instructions, function, ...)                                        \
    (instructions == attention::Instructions::kAvx512 ? attention::avx512::function(__VA_ARGS__) \
     : instructions == attention::Instructions::kAvx2 ? attention::avx2::function(__VA_ARGS__)   \
                                                      : attention::baseline::function(__VA_ARGS__))
#else
#define THOUGHT_KERNELS_CALL(instructions, function, ...) attention::baseline::function(__VA_ARGS__)
#endif
