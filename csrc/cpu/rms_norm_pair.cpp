// rms_norm_pair on CPUs: one pass over each row for its sums, one for both outputs (reference/rms_norm_pair.py has the
// formulas). Rows of any float dtypes are widened to float32, or float64 where x or delta is.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

// One binary for every x86-64: the loader picks the widest version that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

namespace thought_kernels {
namespace {

constexpr const char* kName = "rms_norm_pair_cpp";
constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

template <typename T>
struct Sums {
    T square, shifted_square, change;
};

template <typename T>
[[gnu::always_inline]] inline Sums<T> sums_of(const T* x, const T* delta, int64_t n) {
    T square = 0, shifted_square = 0, change = 0;
#pragma omp simd reduction(+ : square, shifted_square, change)
    for (int64_t j = 0; j < n; ++j) {
        const T shifted = x[j] + delta[j];
        square += x[j] * x[j];
        shifted_square += shifted * shifted;
        change += delta[j] * (2 * x[j] + delta[j]);
    }
    return {square, shifted_square, change};
}
VECTORIZED Sums<float> sums(const float* x, const float* delta, int64_t n) {
    return sums_of(x, delta, n);
}
VECTORIZED Sums<double> sums(const double* x, const double* delta, int64_t n) {
    return sums_of(x, delta, n);
}

// norm = gain · (scale · x), difference = gain · (shifted_scale · delta + scale_change · x)
template <typename T>
[[gnu::always_inline]] inline void outputs_of(const T* x, const T* delta, const T* gain, T scale, T shifted_scale,
                                              T scale_change, T* __restrict norm, T* __restrict difference, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
        norm[j] = gain[j] * (x[j] * scale);
        difference[j] = gain[j] * (shifted_scale * delta[j] + scale_change * x[j]);
    }
}
VECTORIZED void outputs(const float* x, const float* delta, const float* gain, float scale, float shifted_scale,
                        float scale_change, float* norm, float* difference, int64_t n) {
    outputs_of(x, delta, gain, scale, shifted_scale, scale_change, norm, difference, n);
}
VECTORIZED void outputs(const double* x, const double* delta, const double* gain, double scale, double shifted_scale,
                        double scale_change, double* norm, double* difference, int64_t n) {
    outputs_of(x, delta, gain, scale, shifted_scale, scale_change, norm, difference, n);
}

// Rows of a tensor of its own dtype, with unit stride along the last dimension.
template <typename T>
const T* widen(const at::Tensor& x, int64_t row, int64_t n, std::vector<T>& buffer) {
    const auto copy = [&](const auto* data) {
        data += row * x.stride(0);
        for (int64_t j = 0; j < n; ++j) buffer[j] = static_cast<T>(data[j]);
        return static_cast<const T*>(buffer.data());
    };
    if (x.scalar_type() == c10::CppTypeToScalarType<T>::value) return x.const_data_ptr<T>() + row * x.stride(0);
    switch (x.scalar_type()) {
        case at::kFloat:
            return copy(x.const_data_ptr<float>());
        case at::kDouble:
            return copy(x.const_data_ptr<double>());
        case at::kBFloat16:
            return copy(x.const_data_ptr<at::BFloat16>());
        case at::kHalf:
            return copy(x.const_data_ptr<at::Half>());
        default:
            TORCH_CHECK_TYPE(false, kName, ": inputs must be float64, float32, bfloat16 or float16, got ",
                             x.scalar_type());
    }
}

// out = residual + row, with row rounded to out's dtype first.
template <typename T, typename Out>
[[gnu::always_inline]] inline void sum_of(const T* row, const Out* residual, Out* __restrict out, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
        const T rounded = static_cast<T>(static_cast<Out>(row[j]));
        out[j] = static_cast<Out>(static_cast<T>(residual[j]) + rounded);
    }
}
VECTORIZED void sum(const float* row, const float* residual, float* out, int64_t n) {
    sum_of(row, residual, out, n);
}
VECTORIZED void sum(const float* row, const at::BFloat16* residual, at::BFloat16* out, int64_t n) {
    sum_of(row, residual, out, n);
}
template <typename T, typename Out>
void sum(const T* row, const Out* residual, Out* out, int64_t n) {
    sum_of(row, residual, out, n);
}

// Rounds a row to out's dtype, and adds to it that of residual, of the same dtype and with unit stride, if there is
// one.
template <typename T>
void narrow(const T* row, const at::Tensor& residual, const at::Tensor& out, int64_t index, int64_t n) {
    const auto write = [&](auto* data) {
        using Out = std::remove_reference_t<decltype(*data)>;
        data += index * n;
        if (residual.defined()) {
            sum(row, residual.const_data_ptr<Out>() + index * residual.stride(0), data, n);
        } else {
            for (int64_t j = 0; j < n; ++j) data[j] = static_cast<Out>(row[j]);
        }
    };
    switch (out.scalar_type()) {
        case at::kFloat:
            return write(out.mutable_data_ptr<float>());
        case at::kDouble:
            return write(out.mutable_data_ptr<double>());
        case at::kBFloat16:
            return write(out.mutable_data_ptr<at::BFloat16>());
        default:
            return write(out.mutable_data_ptr<at::Half>());
    }
}

at::Tensor rows_of(const at::Tensor& x, int64_t n) {
    const at::Tensor rows = x.reshape({-1, n});
    return rows.stride(1) == 1 ? rows : rows.contiguous();
}

template <typename T>
void run(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& gain, const at::Tensor& residual, double eps,
         const at::Tensor& norm, const at::Tensor& difference) {
    const int64_t n = x.size(1);
    at::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
        std::vector<T> x_buffer(n), delta_buffer(n), norm_buffer(n), difference_buffer(n);
        for (int64_t i = begin; i < end; ++i) {
            const T* row = widen<T>(x, i, n, x_buffer);
            const T* shift = widen<T>(delta, i, n, delta_buffer);
            const Sums<T> sum = sums(row, shift, n);
            const T count = static_cast<T>(n), small = static_cast<T>(eps);
            const T scale = 1 / std::sqrt(sum.square / count + small);
            const T shifted_scale = 1 / std::sqrt(sum.shifted_square / count + small);
            // r' − r without subtracting two nearly equal roots.
            const T scale_change =
                -(sum.change / count) * (scale * scale) * (shifted_scale * shifted_scale) / (scale + shifted_scale);
            outputs(row, shift, gain.const_data_ptr<T>(), scale, shifted_scale, scale_change, norm_buffer.data(),
                    difference_buffer.data(), n);
            narrow(norm_buffer.data(), residual, norm, i, n);
            narrow(difference_buffer.data(), {}, difference, i, n);
        }
    });
}

std::tuple<at::Tensor, at::Tensor> rms_norm_pair(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& residual, double eps,
                                                 double weight_offset) {
    TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) > 0, kName, ": x must be [..., d] with d >= 1, got ", x.sizes());
    check_shape(kName, "delta", delta, x.sizes());
    check_shape(kName, "weight", weight, {x.size(-1)});
    check_shape(kName, "residual", residual, x.sizes());
    check_dtype(kName, "residual", residual, x.scalar_type());
    const at::Tensor norm = at::empty_like(x, at::MemoryFormat::Contiguous);
    const at::Tensor difference = at::empty_like(delta, at::MemoryFormat::Contiguous);
    if (x.numel() == 0) return {norm, difference};
    const int64_t n = x.size(-1);
    const bool wide = x.scalar_type() == at::kDouble || delta.scalar_type() == at::kDouble;
    const at::Tensor gain = weight.to(wide ? at::kDouble : at::kFloat).add(weight_offset).contiguous();
    const at::Tensor rows = rows_of(x, n), shifts = rows_of(delta, n);
    const at::Tensor streams = residual.has_value() ? rows_of(*residual, n) : at::Tensor();
    if (wide) {
        run<double>(rows, shifts, gain, streams, eps, norm, difference);
    } else {
        run<float>(rows, shifts, gain, streams, eps, norm, difference);
    }
    return {norm, difference};
}

}  // namespace

TORCH_LIBRARY_IMPL(thought_kernels, CPU, library) {
    library.impl("rms_norm_pair_cpp", &rms_norm_pair);
}

}  // namespace thought_kernels
