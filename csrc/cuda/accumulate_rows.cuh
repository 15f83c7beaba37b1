// What is needed of each row: its factor w/ν, and its share of the sums and moments.
#pragma once

#include <cstdint>

#include "accumulate_tile.cuh"
#include "to_float.cuh"

namespace thought_kernels {

__device__ inline double warp_sum(double x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

// factors [rows], sums [blocks, d_out + d_in] (Σ w δ | Σ w a) and moments [blocks, 4]; any of them may be null. Squares
// are float64, which no float32 overflows or underflows. further [rows] completes factors where w / ν, of a tiny or
// huge ‖a‖², is no normal float32: w / ν = factor · further, a power of two near √(w / ν), so that w δ/‖a‖ and a/‖a‖
// are float32s wherever their product is.
template <typename Delta, typename Activation>
__global__ void __launch_bounds__(kThreads, 4)
    row_statistics(Source<Delta> delta, Source<Activation> activation, bool pair, const float* weights,
                   Normalization normalization, int64_t rows, float* factors, float* further, float* sums,
                   double* moments) {
    __shared__ float weight[kStatisticsRows];
    __shared__ double factor[kStatisticsRows], energy[kStatisticsRows];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kStatisticsRows;
    const auto a = [&](int64_t row, int64_t column) {
        return to_float(
            activation.matrix.data[row * activation.matrix.row_stride + column * activation.matrix.column_stride]);
    };
    const auto d = [&](int64_t row, int64_t column) {
        const float x =
            to_float(delta.matrix.data[row * delta.matrix.row_stride + column * delta.matrix.column_stride]);
        return pair ? x - a(row, column) : x;
    };

    const int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < kStatisticsRows; r += kThreads / 32) {
        const int64_t row = first + r;
        const float w = row >= rows ? 0.0f : weights == nullptr ? 1.0f : weights[row];
        double v = w;
        if (w != 0 && normalization != Normalization::kNone) {
            double squares = 0;
#pragma unroll 8
            for (int c = lane; c < activation.width; c += 32) {
                const double x = a(row, c);
                squares = fma(x, x, squares);
            }
            squares = warp_sum(squares);
            const double nu = normalization == Normalization::kNorm ? sqrt(squares) : squares;
            // An infinite ν gives NaN rather than a silently dropped row.
            v = squares == 0 ? 0.0 : isinf(nu) ? nan("") : w / nu;
        }
        double delta_squares = 0;
        if (moments != nullptr && v != 0) {
#pragma unroll 8
            for (int c = lane; c < delta.width; c += 32) {
                const double x = d(row, c);
                delta_squares = fma(x, x, delta_squares);
            }
            delta_squares = warp_sum(delta_squares);
        }
        if (lane == 0) {
            weight[r] = w;
            factor[r] = v;
            energy[r] = v == 0 ? 0.0 : v * delta_squares;
            if (factors != nullptr && row < rows) {
                const double size = fabs(v);
                const bool split = further != nullptr && v != 0 && (size < 1.2e-38 || size > 3.4e38);
                const double root = split ? ldexp(1.0, ilogb(size) / 2) : 1.0;
                factors[row] = static_cast<float>(v / root);
                if (further != nullptr) further[row] = static_cast<float>(root);
            }
        }
    }
    __syncthreads();

    if (sums != nullptr) {
        const int columns = delta.width + activation.width;
        for (int c = threadIdx.x; c < columns; c += kThreads) {
            float total = 0;
#pragma unroll 4
            for (int r = 0; r < kStatisticsRows; ++r) {
                if (weight[r] == 0) continue;  // padding may hold NaN
                total = fmaf(weight[r], c < delta.width ? d(first + r, c) : a(first + r, c - delta.width), total);
            }
            sums[static_cast<int64_t>(blockIdx.x) * columns + c] = total;
        }
    }
    if (moments != nullptr && threadIdx.x < 4) {
        double total = 0;
        for (int r = 0; r < kStatisticsRows; ++r) {
            const double terms[4] = {weight[r], factor[r], energy[r], weight[r] != 0 ? 1.0 : 0.0};
            total += threadIdx.x == 0 ? terms[0] : threadIdx.x == 1 ? terms[1] : threadIdx.x == 2 ? terms[2] : terms[3];
        }
        moments[static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x] = total;
    }
}

}  // namespace thought_kernels
