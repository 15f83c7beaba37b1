// Launches the kernel of rms_norm_pair.cuh. No torch here: any machine with nvcc compiles this file.
#include <cuda_runtime.h>

#include "rms_norm_pair.cuh"

namespace thought_kernels {
namespace {

template <typename T>
Rows<T> source(const void* data, int64_t row_stride, int64_t column_stride, int d, const void* output) {
    const auto addresses = reinterpret_cast<uintptr_t>(data) | reinterpret_cast<uintptr_t>(output);
    const bool aligned = addresses % 16 == 0 && row_stride * sizeof(T) % 16 == 0 && d % kVector == 0;
    return {static_cast<const T*>(data), row_stride, column_stride, column_stride == 1 && aligned};
}

template <typename X, typename Delta>
cudaError_t run(const RmsNormPairCall& call, cudaStream_t stream) {
    const auto x = source<X>(call.x, call.x_row, call.x_column, call.d, call.norm);
    const auto delta = source<Delta>(call.delta, call.delta_row, call.delta_column, call.d, call.difference);
    const auto residual = source<X>(call.residual, call.residual_row, call.residual_column, call.d, nullptr);
    auto* norm = static_cast<X*>(call.norm);
    auto* difference = static_cast<Delta*>(call.difference);
    const bool block = call.d > kWarpRow;
    const auto blocks = static_cast<unsigned>(block ? call.rows : (call.rows + kWarps - 1) / kWarps);
    const auto kernel = block ? rms_norm_pair<X, Delta, true> : rms_norm_pair<X, Delta, false>;
    kernel<<<dim3(blocks), kThreads, 0, stream>>>(x, delta, call.gain, residual, norm, difference, call.rows, call.d,
                                                  call.eps);
    return cudaGetLastError();
}

template <typename X>
cudaError_t run(const RmsNormPairCall& call, cudaStream_t stream) {
    switch (call.delta_dtype) {
        case Dtype::kBFloat16:
            return run<X, __nv_bfloat16>(call, stream);
        case Dtype::kFloat16:
            return run<X, __half>(call, stream);
        case Dtype::kFloat32:
            return run<X, float>(call, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t run(const RmsNormPairCall& call, cudaStream_t stream) {
    switch (call.x_dtype) {
        case Dtype::kBFloat16:
            return run<__nv_bfloat16>(call, stream);
        case Dtype::kFloat16:
            return run<__half>(call, stream);
        case Dtype::kFloat32:
            return run<float>(call, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace thought_kernels

extern "C" const char* thought_kernels_rms_norm_pair(const thought_kernels::RmsNormPairCall* call, void* stream) {
    const cudaError_t error = thought_kernels::run(*call, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
