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

constexpr int kGroup = 4;  // rows that are summed and packed together

// Memory that is read after a product, fetched part by part while the product is formed and memory would else be idle.
struct Soon {
    const char* data;
    int64_t bytes, step;  // a part has `step` bytes

    void fetch(int64_t part) const {
        constexpr int64_t kLine = 64;
        const int64_t end = std::min(bytes, (part + 1) * step);
        for (int64_t byte = part * step; byte < end; byte += kLine) __builtin_prefetch(data + byte);
    }
};

// How rows of one dtype are read by the arithmetic that accumulate_tile.h compiles for each instruction set.
template <typename T>
struct Reader {
    void (*load)(const void* row, int64_t stride, int64_t n, T* out);
    double (*sum_of_squares)(const void* row, int64_t n);
    void (*add_weighted)(const void* const* rows, const double* weight, int64_t count, int64_t n, double* sum);
    using Pack = void(const void* const* rows, const T* factors, int64_t count, int64_t n, T* panels, int64_t stride,
                      int64_t ahead);
    Pack *pack_left, *pack_right;
};

template <typename T>
struct Kernels {
    int64_t height, width;  // columns of a left and of a right panel
    Reader<T> readers[4];   // of float16, bfloat16, float32, float64
    void (*subtract)(const T* x, T* out, int64_t n);
    void (*multiply_tile)(const T* left, int64_t height, const T* right, int64_t width, int64_t pitch, int64_t depth,
                          int64_t diagonal, const Soon (&soon)[2], bool add, T* out);
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
enum Normalization : int64_t { kNone = 0, kNorm = 1, kSquaredNorm = 2 };

int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

struct Arguments {
    at::Tensor cross;
    const at::Tensor& delta;
    const at::Tensor& activation;
    bool pair;
    const std::optional<at::Tensor>& weights;  // float64, contiguous
    int64_t normalization;
    double coefficient;
    std::optional<at::Tensor> gram, delta_sum, activation_sum, moments;
};

template <typename T>
const Reader<T>& reader_of(const Kernels<T>& kernels, at::ScalarType dtype) {
    switch (dtype) {
        case at::kHalf:
            return kernels.readers[0];
        case at::kBFloat16:
            return kernels.readers[1];
        case at::kFloat:
            return kernels.readers[2];
        case at::kDouble:
            return kernels.readers[3];
        default:
            TORCH_CHECK_TYPE(false, "inputs must be float16, bfloat16, float32 or float64, got ", dtype);
    }
}

// An input matrix [rows, columns] of any float dtype and any strides.
template <typename T>
struct Rows {
    const char* data;
    int64_t columns, row_bytes, stride;
    const Reader<T>&memory, &copies;
    // Rows are read where they lie, several times. Not float16, which takes a dozen instructions to widen.
    bool direct;
    const Reader<T>& reader;  // of what row() returns

    Rows(const at::Tensor& x, const Kernels<T>& kernels, bool copied)
        : data(static_cast<const char*>(x.const_data_ptr())),
          columns(x.size(1)),
          row_bytes(x.stride(0) * x.element_size()),
          stride(x.stride(1)),
          memory(reader_of(kernels, x.scalar_type())),
          copies(reader_of(kernels, c10::CppTypeToScalarType<T>::value)),
          direct(!copied && x.stride(1) == 1 && x.scalar_type() != at::kHalf),
          reader(direct ? memory : copies) {}

    // About a given row and those after it, to be fetched in some number of parts.
    Soon soon(int64_t index, int64_t rows, int64_t parts) const {
        const int64_t bytes = rows * row_bytes;
        return {data + index * row_bytes, bytes, round_up((bytes + parts - 1) / parts, 64)};
    }

    // The row itself, or its copy in the accumulators' dtype.
    const void* row(int64_t index, T* copy) const {
        const char* const x = data + index * row_bytes;
        if (direct) return x;
        memory.load(x, stride, columns, copy);
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
    std::vector<double> sums;         // of each task: Σ w δ | Σ w a
    const std::vector<double> zeros;  // a row of δ, in whichever dtype
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
          sums(tasks(rows) * sum_columns),
          zeros(delta.columns) {}

    // Numbers that prepare needs room for: copies of a group's rows, and a row of pack_scaled's.
    static int64_t copies(int64_t d_out, int64_t d_in) { return kGroup * (d_out + d_in) + d_in; }
    static int64_t tasks(int64_t rows) { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

    // Takes the next rows from `cursor` on. Those of weight 0 are never read: padding may hold anything.
    void take(int64_t& cursor) {
        const int64_t rows = call.activation.size(0), most = static_cast<int64_t>(index.size());
        for (n = 0; n < most && cursor < rows;) {
            const int64_t count = std::min(most - n, rows - cursor);
            if (call.weights.has_value()) {
                const double* w = call.weights->const_data_ptr<double>() + cursor;
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
    void prepare(int64_t task, T* copies) {
        const int64_t d_out = delta.columns, d_in = activation.columns;
        double* const sum = sums.data() + task * sum_columns;
        std::fill(sum, sum + sum_columns, 0.0);
        const int64_t end = std::min(n, (task + 1) * kRowsPerTask);
        for (int64_t k = task * kRowsPerTask; k < end; k += kGroup) {
            const int64_t count = std::min<int64_t>(kGroup, end - k);
            const void *d_rows[kGroup], *a_rows[kGroup];
            for (int64_t r = 0; r < count; ++r) {
                T* const d_copy = copies + r * d_out;
                T* const a_copy = copies + kGroup * d_out + r * d_in;
                d_rows[r] = delta.row(index[k + r], d_copy);
                a_rows[r] = activation.row(index[k + r], a_copy);
                if (call.pair) kernels.subtract(a_copy, d_copy, d_out);
                double v = weight[k + r];
                if (call.normalization != kNone) {
                    double divisor = activation.reader.sum_of_squares(a_rows[r], d_in);
                    if (call.normalization == kNorm) divisor = std::sqrt(divisor);
                    v = divisor == 0 ? 0 : v / divisor;
                }
                factor[k + r] = v;
                if (call.moments) energy[k + r] = v == 0 ? 0 : v * delta.reader.sum_of_squares(d_rows[r], d_out);
            }
            pack_group(k, count, d_rows, a_rows, copies + kGroup * (d_out + d_in));
            double* next_sum = sum;
            if (call.delta_sum) {
                delta.reader.add_weighted(d_rows, weight.data() + k, count, d_out, next_sum);
                next_sum += d_out;
            }
            if (call.activation_sum) {
                activation.reader.add_weighted(a_rows, weight.data() + k, count, d_in, next_sum);
            }
        }
    }

  private:
    // Rows k, k + 1, ... into all panels. The group after them is fetched meanwhile, supposing that no row is left out.
    void pack_group(int64_t k, int64_t count, const void* const* d_rows, const void* const* a_rows, T* scaled) {
        const T ones[kGroup] = {1, 1, 1, 1};
        T factors[kGroup];
        const void* products[kGroup];  // a row of factor 0 adds nothing, whatever its δ: 0 · NaN would be NaN
        for (int64_t r = 0; r < count; ++r) {
            factors[r] = static_cast<T>(factor[k + r]);
            products[r] = factor[k + r] == 0 ? zeros.data() : d_rows[r];
        }
        const int64_t d_ahead = kGroup * delta.row_bytes, a_ahead = kGroup * activation.row_bytes;
        delta.reader.pack_left(products, ones, count, delta.columns, d.row(k), d.stride(), d_ahead);
        const int64_t d_in = activation.columns;
        if (call.gram) activation.reader.pack_left(a_rows, ones, count, d_in, a.row(k), a.stride(), a_ahead);
        activation.reader.pack_right(a_rows, factors, count, d_in, s.row(k), s.stride(), a_ahead);
        for (int64_t r = 0; r < count; ++r) {
            const double size = std::abs(factor[k + r]);
            const bool normal = size >= std::numeric_limits<T>::min() && size <= std::numeric_limits<T>::max();
            if (size != 0 && !normal) pack_scaled(index[k + r], factor[k + r], scaled, s.row(k + r));
        }
    }

    void pack_scaled(int64_t index, double v, T* scaled, T* panels) const {
        // The factor (1/‖a‖² of a tiny row) has no normal value in T, but its products may have.
        activation.memory.load(activation.data + index * activation.row_bytes, activation.stride, activation.columns,
                               scaled);
        for (int64_t c = 0; c < activation.columns; ++c) scaled[c] = static_cast<T>(v * static_cast<double>(scaled[c]));
        const void* const row = scaled;
        const T one = 1;
        activation.copies.pack_right(&row, &one, 1, activation.columns, panels, s.stride(), 0);
    }
};

}  // namespace
}  // namespace accumulation
}  // namespace thought_kernels
