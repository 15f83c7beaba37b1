// rms_norm_pair: a row is read once, stays in the registers of one warp, or of one block where it is long, and leaves
// as both outputs. The formulas are in thought_kernels/ops/rms_norm_pair.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "rms_norm_pair.h"
#include "to_float.cuh"

namespace thought_kernels {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;                         // elements a thread loads at a time
constexpr int kVectors = 4;                        // how often it does
constexpr int kWarpRow = 32 * kVector * kVectors;  // the longest row that one warp holds
static_assert(kThreads * kVector * kVectors == kLargestRow);

template <typename T>
struct alignas(16) Vector {
    T values[kVector];
};

template <typename T>
struct Rows {
    const T* data;
    int64_t row_stride, column_stride;
    bool vectors;  // whole Vectors may be loaded and stored: unit stride, rows aligned, d a multiple of kVector
};

template <typename T>
__device__ void load(const Rows<T>& rows, int64_t row, int column, int d, float (&values)[kVector]) {
    const T* source = rows.data + row * rows.row_stride + column * rows.column_stride;
    if (rows.vectors && column < d) {
        const auto vector = *reinterpret_cast<const Vector<T>*>(source);
#pragma unroll
        for (int e = 0; e < kVector; ++e) values[e] = to_float(vector.values[e]);
    } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            values[e] = column + e < d ? to_float(source[e * rows.column_stride]) : 0.0f;
        }
    }
}

template <typename T>
__device__ void store(T* target, bool vectors, int column, int d, const float (&values)[kVector]) {
    if (vectors && column < d) {
        Vector<T> vector;
#pragma unroll
        for (int e = 0; e < kVector; ++e) vector.values[e] = from_float<T>(values[e]);
        *reinterpret_cast<Vector<T>*>(target + column) = vector;
    } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            if (column + e < d) target[column + e] = from_float<T>(values[e]);
        }
    }
}

// The sum over a warp, or over the block where it shares one row; every thread gets it, always added in one order.
template <bool kBlock>
__device__ float sum(float x, float (&partials)[kWarps]) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (!kBlock) return x;
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x += partials[warp];
    return x;
}

// With kBlock a block has one row, otherwise each of its warps has one.
template <typename X, typename Delta, bool kBlock>
__global__ void __launch_bounds__(kThreads)
    rms_norm_pair(Rows<X> x, Rows<Delta> delta, const float* gain, Rows<X> residual, X* norm, Delta* difference,
                  int64_t rows, int d, float eps) {
    __shared__ float partials[3][kWarps];
    constexpr int kStride = (kBlock ? kThreads : 32) * kVector;
    const int64_t row = kBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    const int first = (kBlock ? threadIdx.x : threadIdx.x % 32) * kVector;
    if (row >= rows) return;  // a whole warp, which no barrier waits for

    float z[kVectors][kVector], shift[kVectors][kVector];
    float square = 0.0f, shifted_square = 0.0f, change = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        load(x, row, first + v * kStride, d, z[v]);
        load(delta, row, first + v * kStride, d, shift[v]);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const float shifted = z[v][e] + shift[v][e];
            square += z[v][e] * z[v][e];
            shifted_square += shifted * shifted;
            change += shift[v][e] * (2.0f * z[v][e] + shift[v][e]);
        }
    }
    const float scale = 1.0f / sqrtf(sum<kBlock>(square, partials[0]) / d + eps);
    const float shifted_scale = 1.0f / sqrtf(sum<kBlock>(shifted_square, partials[1]) / d + eps);
    // r' − r without subtracting two nearly equal roots.
    const float scale_change = -(sum<kBlock>(change, partials[2]) / d) * (scale * scale) *
                               (shifted_scale * shifted_scale) / (scale + shifted_scale);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int column = first + v * kStride;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const float g = column + e < d ? gain[column + e] : 0.0f;
            shift[v][e] = g * (shifted_scale * shift[v][e] + scale_change * z[v][e]);
            z[v][e] = g * (z[v][e] * scale);
        }
        if (residual.data != nullptr) {
            float stream[kVector];
            load(residual, row, column, d, stream);
            // The rounded norm, as if it had been stored, and never fused into one multiplication and addition.
#pragma unroll
            for (int e = 0; e < kVector; ++e) z[v][e] = __fadd_rn(stream[e], to_float(from_float<X>(z[v][e])));
        }
        store(norm + row * d, x.vectors, column, d, z[v]);
        store(difference + row * d, delta.vectors, column, d, shift[v]);
    }
}

}  // namespace thought_kernels
