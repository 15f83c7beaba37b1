// A block of rows on its way to the products of accumulate.cpp: read in any dtype and strides, measured, scaled and
// packed into panels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "instructions.h"

namespace thought_kernels {
namespace accumulation {

// The arithmetic that accumulate_tile.h compiles for each instruction set.
template <typename T>
struct Kernels {
    int64_t height, width;                                                // columns of a left and of a right panel
    void (*load[4])(const void* row, int64_t stride, int64_t n, T* out);  // of float16, bfloat16, float32, float64
    double (*sum_of_squares)(const T* x, int64_t n);
    void (*subtract)(const T* x, T* out, int64_t n);
    void (*add_weighted)(const T* const* rows, const double* weight, int64_t count, int64_t n, double* sum);
    void (*pack_left)(const T* const* rows, const T* factor, int64_t count, int64_t n, T* panels, int64_t stride);
    void (*pack_right)(const T* const* rows, const T* factor, int64_t count, int64_t n, T* panels, int64_t stride);
    void (*multiply_tile)(const T* left, int64_t height, const T* right, int64_t width, int64_t pitch, int64_t depth,
                          int64_t diagonal, bool add, T* out);
};

#define PER_INSTRUCTION_SET "accumulate_tile.h"
#include "per_instruction_set.h"

namespace {

template <typename T>
const Kernels<T>& choose_kernels(Instructions instructions) {
#ifdef THOUGHT_KERNELS_X86
    if (instructions == Instructions::kAvx512) return avx512::kernels<T>;
    if (instructions == Instructions::kAvx2) return avx2::kernels<T>;
#endif
    return baseline::kernels<T>;
}

constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kGroup = 8;  // rows packed together
enum Normalization : int64_t { kNone = 0, kNorm = 1, kSquaredNorm = 2 };

int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

struct Arguments {
    at::Tensor cross;
    const at::Tensor& delta;
    const at::Tensor& activation;
    bool pair;
    const std::optional<at::Tensor>& weights;
    int64_t normalization;
    double coefficient;
    std::optional<at::Tensor> gram, delta_sum, activation_sum, moments;
};

// An input matrix [rows, columns] of any float dtype and any strides.
template <typename T>
struct Rows {
    const char* data;
    int64_t columns, row_bytes, stride;
    void (*load)(const void*, int64_t, int64_t, T*);
    bool direct;  // rows are read where they lie

    Rows(const at::Tensor& x, const Kernels<T>& kernels)
        : data(static_cast<const char*>(x.const_data_ptr())),
          columns(x.size(1)),
          row_bytes(x.stride(0) * x.element_size()),
          stride(x.stride(1)),
          direct(x.scalar_type() == c10::CppTypeToScalarType<T>::value && x.stride(1) == 1) {
        switch (x.scalar_type()) {
            case at::kHalf:
                load = kernels.load[0];
                break;
            case at::kBFloat16:
                load = kernels.load[1];
                break;
            case at::kFloat:
                load = kernels.load[2];
                break;
            case at::kDouble:
                load = kernels.load[3];
                break;
            default:
                TORCH_CHECK_TYPE(false, "inputs must be float16, bfloat16, float32 or float64, got ", x.scalar_type());
        }
    }

    // The row itself, or its copy in the accumulators' dtype.
    const T* row(int64_t index, bool may_be_direct, T* copy) const {
        const char* const x = data + index * row_bytes;
        if (direct && may_be_direct) return reinterpret_cast<const T*>(x);
        load(x, stride, columns, copy);
        return copy;
    }
};

// Panels of a block's rows, allocated when first needed: in steps of `depth` rows, panel by panel. A panel takes the
// memory of two rows more, since writing one row of all panels would else meet one set of the cache again and again.
template <typename T>
struct Panels {
    int64_t columns, width, depth, pitch, size;
    at::Tensor memory;
    T* data = nullptr;

    Panels(int64_t columns, int64_t width, int64_t rows, int64_t depth)
        : columns(round_up(columns, width)), width(width), depth(depth), pitch(depth + 2) {
        size = round_up(rows, depth) / depth * pitch * this->columns;
    }
    void allocate(const at::TensorOptions& options) {
        if (data != nullptr) return;
        memory = at::empty({size}, options);
        data = memory.mutable_data_ptr<T>();
    }
    // Of the step that row k is in, from panel column `column` on; and k's own row of the first panel.
    T* step(int64_t k, int64_t column) const { return data + (k / depth * columns + column) * pitch; }
    T* row(int64_t k) const { return step(k, 0) + k % depth * width; }
    int64_t stride() const { return pitch * width; }
};

// A block of rows of nonzero weight: which they are, and what the products need of them.
template <typename T>
struct Block {
    const Arguments& call;
    const Kernels<T>& kernels;
    const Rows<T>&delta, &activation;
    const int64_t sum_columns;
    Panels<T> d, a, s;  // δ, a for gram, and w a / ν
    std::vector<int64_t> index;
    std::vector<double> weight, factor, energy;
    std::vector<double> sums;  // of each task: Σ w δ | Σ w a
    int64_t n = 0;

    Block(const Arguments& call, const Kernels<T>& kernels, const Rows<T>& delta, const Rows<T>& activation,
          int64_t rows, int64_t depth)
        : call(call),
          kernels(kernels),
          delta(delta),
          activation(activation),
          sum_columns((call.delta_sum ? delta.columns : 0) + (call.activation_sum ? activation.columns : 0)),
          d(delta.columns, kernels.height, rows, depth),
          a(activation.columns, kernels.height, rows, depth),
          s(activation.columns, kernels.width, rows, depth),
          index(rows),
          weight(rows, 1.0),
          factor(rows),
          energy(rows),
          sums(tasks(rows) * sum_columns) {}

    static int64_t tasks(int64_t rows) { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

    // Takes the next rows from `cursor` on. Those of weight 0 are never read: padding may hold anything.
    void take(int64_t& cursor) {
        const int64_t rows = call.activation.size(0), most = static_cast<int64_t>(index.size());
        for (n = 0; n < most && cursor < rows;) {
            const int64_t count = std::min(most - n, rows - cursor);
            if (call.weights.has_value()) {
                const at::Tensor wide = call.weights->narrow(0, cursor, count).to(at::kDouble).contiguous();
                const double* w = wide.const_data_ptr<double>();
                for (int64_t k = 0; k < count; ++k) {
                    if (w[k] == 0) continue;
                    index[n] = cursor + k;
                    weight[n++] = w[k];
                }
            } else {
                for (int64_t k = 0; k < count; ++k) index[n++] = cursor + k;
            }
            cursor += count;
        }
        if (n == 0) return;
        d.allocate(call.cross.options());
        if (call.gram) a.allocate(call.cross.options());
        s.allocate(call.cross.options());
    }

    // Widens, measures, scales and packs the rows of one task.
    void prepare(int64_t task) {
        const int64_t d_out = delta.columns, d_in = activation.columns;
        static constexpr T kOnes[kGroup] = {1, 1, 1, 1, 1, 1, 1, 1};
        const auto copies = std::make_unique_for_overwrite<T[]>(kGroup * (d_out + 2 * d_in));
        double* const sum = sums.data() + task * sum_columns;
        std::fill(sum, sum + sum_columns, 0.0);
        const int64_t end = std::min(n, (task + 1) * kRowsPerTask);
        for (int64_t k = task * kRowsPerTask; k < end; k += kGroup) {
            const int64_t count = std::min(kGroup, end - k);
            const T *d_rows[kGroup], *a_rows[kGroup], *s_rows[kGroup];
            T scale[kGroup];
            for (int64_t r = 0; r < count; ++r) {
                T* const d_copy = copies.get() + r * d_out;
                T* const a_copy = copies.get() + kGroup * d_out + r * d_in;
                a_rows[r] = s_rows[r] = activation.row(index[k + r], true, a_copy);
                d_rows[r] = delta.row(index[k + r], !call.pair, d_copy);
                if (call.pair) kernels.subtract(a_rows[r], d_copy, d_out);
                double v = weight[k + r];
                if (call.normalization != kNone) {
                    double divisor = kernels.sum_of_squares(a_rows[r], d_in);
                    if (call.normalization == kNorm) divisor = std::sqrt(divisor);
                    v = divisor == 0 ? 0 : v / divisor;
                }
                factor[k + r] = v;
                if (call.moments) energy[k + r] = v == 0 ? 0 : v * kernels.sum_of_squares(d_rows[r], d_out);
                scale[r] = static_cast<T>(v);
                const double size = std::abs(v);
                if (size == 0 || (size >= std::numeric_limits<T>::min() && size <= std::numeric_limits<T>::max())) {
                    continue;
                }
                // The factor (1/‖a‖² of a tiny row) has no normal value in T, but its products may have.
                T* const scaled = a_copy + kGroup * d_in;
                for (int64_t j = 0; j < d_in; ++j) scaled[j] = static_cast<T>(v * static_cast<double>(a_rows[r][j]));
                s_rows[r] = scaled;
                scale[r] = 1;
            }
            kernels.pack_left(d_rows, kOnes, count, d_out, d.row(k), d.stride());
            if (call.gram) kernels.pack_left(a_rows, kOnes, count, d_in, a.row(k), a.stride());
            kernels.pack_right(s_rows, scale, count, d_in, s.row(k), s.stride());
            double* next_sum = sum;
            if (call.delta_sum) {
                kernels.add_weighted(d_rows, weight.data() + k, count, d_out, next_sum);
                next_sum += d_out;
            }
            if (call.activation_sum) kernels.add_weighted(a_rows, weight.data() + k, count, d_in, next_sum);
        }
    }
};

}  // namespace
}  // namespace accumulation
}  // namespace thought_kernels
