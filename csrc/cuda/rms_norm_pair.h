// The C interface between bindings.cpp, which knows torch, and rms_norm_pair.cu, which knows CUDA.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace thought_kernels {

constexpr int kLargestRow = 8192;  // elements; a row lives in the registers of one block

// One call of rms_norm_pair, on the current device. Strides are in elements; outputs are contiguous [rows, d].
struct RmsNormPairCall {
    const void* x;         // [rows, d]
    const void* delta;     // [rows, d]
    const float* gain;     // [d], contiguous: weight + weight_offset
    const void* residual;  // [rows, d] in x's dtype, or null: what norm is added to
    void* norm;            // x's dtype
    void* difference;      // delta's dtype
    int64_t x_row, x_column, delta_row, delta_column, residual_row, residual_column;
    int64_t rows;  // > 0
    int d;         // 1 .. kLargestRow
    Dtype x_dtype, delta_dtype;
    float eps;
};

}  // namespace thought_kernels

// Enqueues the kernel on a cudaStream_t. Returns null, or why the launch failed.
extern "C" const char* thought_kernels_rms_norm_pair(const thought_kernels::RmsNormPairCall* call, void* stream);
