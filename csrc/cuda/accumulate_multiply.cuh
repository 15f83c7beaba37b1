// The three ways to multiply two stages. Shared memory holds Element; accumulators are the m16n8 fragments of mma.sync:
// total[i][j][2h + c] is row 16 i + 8 h + lane / 4 and column 8 j + 2 (lane % 4) + c of the warp's 64 x 32.
#pragma once

#include <cstdint>

#include "accumulate_tile.cuh"
#include "tensor_core.cuh"

namespace thought_kernels {

// bfloat16 inputs on tensor cores; the scaled operand is rounded once to bfloat16.
struct BFloat16Product {
    using Element = __nv_bfloat16;

    __device__ static Element round(float x) { return __float2bfloat16(x); }

    __device__ static void step(const Element (*left)[kPitch], const Element (*right)[kPitch],
                                float (&total)[4][4][4]) {
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int k = 0; k < kStep; k += 16) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                load_transposed(a[i], &left[k + lane % 8 + lane / 16 * 8][16 * i + lane / 8 % 2 * 8]);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                load_transposed(b[j], &right[k + lane % 8 + lane / 8 % 2 * 8][16 * j + lane / 16 * 8]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    multiply_bf16(total[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                }
            }
        }
    }
};

// float16 inputs on tensor cores as TF32: the same 11 significant bits, but w δ / ‖a‖² leaves float16's range.
struct Tf32Product {
    using Element = float;

    __device__ static Element round(float x) { return round_to_tf32(x); }

    __device__ static void step(const Element (*left)[kPitch], const Element (*right)[kPitch],
                                float (&total)[4][4][4]) {
        const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll 2
        for (int k = 0; k < kStep; k += 8) {
            uint32_t a[4][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    a[i][e] = __float_as_uint(left[k + member + e / 2 * 4][16 * i + group + e % 2 * 8]);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                b[j][0] = __float_as_uint(right[k + member][8 * j + group]);
                b[j][1] = __float_as_uint(right[k + member + 4][8 * j + group]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    multiply_tf32(total[i][j], a[i], b[j][0], b[j][1]);
                }
            }
        }
    }
};

// float32 inputs on ordinary multiply-adds: tensor cores truncate as they accumulate, which such sums would show.
// Each stage is summed by itself before it is added, which keeps thousands of rows as exact as a few dozen.
struct Float32Product {
    using Element = float;

    __device__ static Element round(float x) { return x; }

    __device__ static void step(const Element (*left)[kPitch], const Element (*right)[kPitch],
                                float (&total)[4][4][4]) {
        const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {  // half of the fragments at a time: stage holds 32 registers, not 64
            float stage[2][4][4] = {};
#pragma unroll 2
            for (int k = 0; k < kStep; ++k) {
                float a[2][2];
                float2 b[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) a[e / 2][e % 2] = left[k][16 * (i + e / 2) + group + e % 2 * 8];
#pragma unroll
                for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const float2*>(&right[k][8 * j + 2 * member]);
#pragma unroll
                for (int e = 0; e < 32; ++e) {
                    float& sum = stage[e / 16][e / 4 % 4][e % 4];
                    sum = fmaf(a[e / 16][e % 4 / 2], e % 2 ? b[e / 4 % 4].y : b[e / 4 % 4].x, sum);
                }
            }
#pragma unroll
            for (int e = 0; e < 32; ++e) total[i + e / 16][e / 4 % 4][e % 4] += stage[e / 16][e / 4 % 4][e % 4];
        }
    }
};

template <typename Activation>
struct ProductFor;
template <>
struct ProductFor<__nv_bfloat16> {
    using type = BFloat16Product;
};
template <>
struct ProductFor<__half> {
    using type = Tf32Product;
};
template <>
struct ProductFor<float> {
    using type = Float32Product;
};

}  // namespace thought_kernels
