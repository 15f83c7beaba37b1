// An element of any dtype as float32, exactly, and back, rounded. Named conversions: torch compiles CUDA sources with
// those of the types themselves switched off.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace thought_kernels {

__device__ inline float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ inline float to_float(__half x) {
    return __half2float(x);
}
__device__ inline float to_float(float x) {
    return x;
}

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
    return __float2bfloat16(x);
}
template <>
__device__ inline __half from_float(float x) {
    return __float2half(x);
}
template <>
__device__ inline float from_float(float x) {
    return x;
}

}  // namespace thought_kernels
