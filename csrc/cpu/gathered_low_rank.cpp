// gathered_low_rank on CPUs. The rows of a patch are brought together by their addresses alone, and its factors are
// read where they lie, once for every kRows tokens: what a step of decoding takes is the time to read the factors of
// the patches in the batch, (d_in + d_out) r numbers each. Every sum has one owner and a fixed order of additions, so a
// row's result depends neither on the number of threads nor on the other rows.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "instructions.h"
#include "tasks.h"

namespace thought_kernels {
namespace gathered {

// out [height, width] = rows of `left`, wherever they lie, from `first` on, times right [depth, width], whose rows are
// `stride` apart; added to what is there if it resumes a product.
template <typename T>
struct Product {
    const T* const* left;
    int64_t height, first;
    const T* right;
    int64_t stride, depth, width;
    T* out;
    int64_t pitch;
    bool resume = false;
};

#define PER_INSTRUCTION_SET "cpu/gathered_low_rank_tile.h"
#include "per_instruction_set.h"

namespace {

constexpr const char* kName = "gathered_low_rank_cpp";
constexpr int64_t kRows = 64;            // tokens for which a part of a factor is read from memory once
constexpr int64_t kDepth = 128;          // features of x that are summed at a time, and whose sums are then added
constexpr int64_t kColumns = 256;        // of the output of kRows tokens that a task has
constexpr int64_t kBlocksPerThread = 4;  // enough of them to keep threads busy without cutting the sums of V too

template <typename T>
using Multiply = void (*)(const Product<T>&);

template <typename T>
Multiply<T> choose_multiply(Instructions instructions) {
#ifdef THOUGHT_KERNELS_X86
    if (instructions == Instructions::kAvx512) return avx512::multiply<T>;
    if (instructions == Instructions::kAvx2) return avx2::multiply<T>;
#endif
    return baseline::multiply<T>;
}

// Calls run(a null pointer to the dtype's type).
template <typename Run>
void for_dtype(const char* argument, at::ScalarType dtype, const Run& run) {
    switch (dtype) {
        case at::kFloat:
            return run(static_cast<float*>(nullptr));
        case at::kDouble:
            return run(static_cast<double*>(nullptr));
        case at::kBFloat16:
            return run(static_cast<at::BFloat16*>(nullptr));
        case at::kHalf:
            return run(static_cast<at::Half*>(nullptr));
        default:
            TORCH_CHECK_TYPE(false, kName, ": ", argument, " must be float64, float32, bfloat16 or float16, got ",
                             dtype);
    }
}

struct Token {
    int64_t row, token;
};

// Some tokens, `first` and following, of one patch's rows.
struct Block {
    int64_t patch, first, count;
};

// What a call is given, with unit stride along last dimensions.
struct Call {
    at::Tensor x, right, left, vector, residual, output;  // vector and residual may be undefined
    std::vector<Token> tokens;
    std::vector<Block> blocks;

    // Tokens in the order of their patches, those of rows without one left out.
    void gather(const at::Tensor& index) {
        const int64_t* const patch = index.const_data_ptr<int64_t>();
        std::vector<std::vector<int64_t>> rows(right.size(0));
        for (int64_t b = 0; b < index.size(0); ++b) {
            if (patch[b] >= 0) rows[patch[b]].push_back(b);
        }
        for (int64_t p = 0; p < right.size(0); ++p) {
            int64_t first = tokens.size();
            for (const int64_t b : rows[p]) {
                for (int64_t t = 0; t < x.size(1); ++t) tokens.push_back({b, t});
            }
            const int64_t end = tokens.size();
            for (; first < end; first += kRows) blocks.push_back({p, first, std::min(kRows, end - first)});
        }
    }
};

// Addresses of a block's rows of x from `column` on: in x itself, or widened in `buffer`.
template <typename T>
void read(const Call& call, const Block& block, int64_t column, int64_t count, T* buffer, const T** rows) {
    for_dtype("x", call.x.scalar_type(), [&](auto* type) {
        using In = std::remove_pointer_t<decltype(type)>;
        const In* const data = call.x.const_data_ptr<In>() + column;
        for (int64_t i = 0; i < block.count; ++i) {
            const Token& at = call.tokens[block.first + i];
            const In* const row = data + at.row * call.x.stride(0) + at.token * call.x.stride(1);
            if constexpr (std::is_same_v<In, T>) {
                rows[i] = row;
            } else {
                T* const wide = buffer + i * kDepth;
                for (int64_t j = 0; j < count; ++j) wide[j] = static_cast<T>(row[j]);
                rows[i] = wide;
            }
        }
    });
}

template <typename T, typename In>
void add(T* __restrict y, const In* __restrict x, int64_t n) {
    for (int64_t j = 0; j < n; ++j) y[j] += static_cast<T>(x[j]);
}

template <typename T, typename Out>
void narrow(const T* __restrict y, Out* __restrict out, int64_t n) {
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<Out>(y[j]);
}

// output = residual + (product + vector), in T and rounded once; product [count, pitch] begins at `column`.
template <typename T>
void write(const Call& call, const Block& block, int64_t column, int64_t width, T* product, int64_t pitch) {
    for_dtype("residual", call.output.scalar_type(), [&](auto* type) {
        using Out = std::remove_pointer_t<decltype(type)>;
        const auto place = [&](const at::Tensor& x, int64_t i) {
            const Token& at = call.tokens[block.first + i];
            return at.row * x.stride(0) + at.token * x.stride(1) + column;
        };
        for (int64_t i = 0; i < block.count; ++i) {
            T* const y = product + i * pitch;
            if (call.vector.defined()) {
                add(y, call.vector.const_data_ptr<T>() + block.patch * call.vector.stride(0) + column, width);
            }
            if (call.residual.defined()) {
                add(y, call.residual.const_data_ptr<Out>() + place(call.residual, i), width);
            }
            narrow(y, call.output.mutable_data_ptr<Out>() + place(call.output, i), width);
        }
    });
}

template <typename T>
void run(const Call& call, Instructions instructions) {
    const Multiply<T> multiply = choose_multiply<T>(instructions);
    const int64_t d_in = call.right.size(1), rank = call.right.size(2), d_out = call.left.size(2);
    const int64_t tokens = call.tokens.size(), blocks = call.blocks.size(), threads = at::get_num_threads();
    const int64_t steps = std::max<int64_t>(1, (d_in + kDepth - 1) / kDepth);
    // Sums over kDepth features each, of all tokens. Where there are few blocks, several threads share one, and the
    // sums are added later, in the same order.
    const int64_t parts = threads == 1 || blocks >= kBlocksPerThread * threads ? 1 : steps, steps_each = steps / parts;
    const int64_t room = kRows * std::max(kDepth + rank, kColumns);
    const at::Tensor memory = at::empty({parts * tokens * rank + threads * room}, call.right.options());
    T* const sums = memory.mutable_data_ptr<T>();
    T* const scratch = sums + parts * tokens * rank;

    for_each_task(blocks * parts, [&](int64_t task, int64_t worker) {
        const Block& block = call.blocks[task / parts];
        const int64_t part = task % parts;
        const T* rows[kRows];
        T* const out = sums + (part * tokens + block.first) * rank;
        for (int64_t step = part * steps_each; step < (part + 1) * steps_each; ++step) {
            const int64_t k = step * kDepth, depth = std::min(kDepth, d_in - k);
            read(call, block, k, depth, scratch + worker * room, rows);
            const T* const v = call.right.const_data_ptr<T>() + block.patch * call.right.stride(0);
            const bool first = step == part * steps_each;
            T* const sum = first ? out : scratch + worker * room + kRows * kDepth;
            multiply(
                {rows, block.count, 0, v + k * call.right.stride(1), call.right.stride(1), depth, rank, sum, rank});
            for (int64_t j = 0; j < block.count * rank && !first; ++j) out[j] += sum[j];
        }
    });

    if (parts > 1) {
        for_each_task(blocks, [&](int64_t task, int64_t) {
            const Block& block = call.blocks[task];
            T* const total = sums + block.first * rank;
            for (int64_t part = 1; part < parts; ++part) {
                const T* const sum = total + part * tokens * rank;
                for (int64_t j = 0; j < block.count * rank; ++j) total[j] += sum[j];
            }
        });
    }

    // Few tokens take the matrix from end to end, unless threads would have nothing to do.
    int64_t tallest = 1;
    for (const Block& block : call.blocks) tallest = std::max(tallest, block.count);
    const int64_t columns = blocks >= threads ? kRows / tallest * kColumns : kColumns;
    const int64_t strips = (d_out + columns - 1) / columns;
    for_each_task(blocks * strips, [&](int64_t task, int64_t worker) {
        const Block& block = call.blocks[task / strips];
        const int64_t column = task % strips * columns, width = std::min(columns, d_out - column);
        T* const product = scratch + worker * room;
        const T* rows[kRows];
        for (int64_t i = 0; i < block.count; ++i) rows[i] = sums + (block.first + i) * rank;
        const T* const u = call.left.const_data_ptr<T>() + block.patch * call.left.stride(0) + column;
        multiply({rows, block.count, 0, u, call.left.stride(1), rank, width, product, columns});
        write(call, block, column, width, product, columns);
    });
}

at::Tensor unit_stride(const at::Tensor& x) {
    return x.stride(-1) == 1 ? x : x.contiguous();
}

at::Tensor gathered_low_rank(const at::Tensor& x, const at::Tensor& right, const at::Tensor& left,
                             const at::Tensor& index, const std::optional<at::Tensor>& vector,
                             const std::optional<at::Tensor>& residual,
                             const std::optional<std::string>& instructions) {
    TORCH_CHECK_VALUE(x.dim() == 3, kName, ": x must be [B, T, d_in], got ", x.sizes());
    TORCH_CHECK_VALUE(right.dim() == 3, kName, ": right must be [P, d_in, r], got ", right.sizes());
    TORCH_CHECK_VALUE(left.dim() == 3, kName, ": left must be [P, r, d_out], got ", left.sizes());
    const int64_t patches = right.size(0), d_out = left.size(2);
    check_shape(kName, "right", right, {patches, x.size(2), right.size(2)});
    check_shape(kName, "left", left, {patches, right.size(2), d_out});
    check_shape(kName, "index", index, {x.size(0)});
    check_shape(kName, "vector", vector, {patches, d_out});
    check_shape(kName, "residual", residual, {x.size(0), x.size(1), d_out});
    const at::ScalarType dtype = right.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, kName, ": right must be float32 or float64, got ",
                     dtype);
    check_dtype(kName, "left", left, dtype);
    check_dtype(kName, "index", index, at::kLong);
    check_dtype(kName, "vector", vector, dtype);
    const at::Tensor chosen = index.contiguous();
    for (int64_t b = 0; b < chosen.numel(); ++b) {
        const int64_t patch = chosen.const_data_ptr<int64_t>()[b];
        TORCH_CHECK_VALUE(patch >= -1 && patch < patches, kName, ": index must be between -1 and ", patches - 1,
                          ", got ", patch);
    }
    const at::Tensor output = at::empty({x.size(0), x.size(1), d_out},
                                        x.options().dtype(residual ? residual->scalar_type() : x.scalar_type()));
    if (output.numel() == 0) return output;
    Call call{unit_stride(x),
              unit_stride(right),
              unit_stride(left),
              vector ? unit_stride(*vector) : at::Tensor(),
              residual ? unit_stride(*residual) : at::Tensor(),
              output,
              {},
              {}};
    call.gather(chosen);
    for (int64_t b = 0; b < chosen.numel(); ++b) {
        if (chosen.const_data_ptr<int64_t>()[b] >= 0) continue;
        const at::Tensor row = output.select(0, b);
        residual ? row.copy_(residual->select(0, b)) : row.zero_();
    }
    const Instructions set = choose_instructions(kName, instructions);
    if (dtype == at::kFloat) {
        run<float>(call, set);
    } else {
        run<double>(call, set);
    }
    return output;
}

}  // namespace
}  // namespace gathered

TORCH_LIBRARY_IMPL(thought_kernels, CPU, library) {
    library.impl("gathered_low_rank_cpp", &gathered::gathered_low_rank);
}

}  // namespace thought_kernels
