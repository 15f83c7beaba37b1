// The CUDA operators as torch sees them: checks, device and stream, workspace, launch. Compiled by the C++ compiler;
// the kernels behind the C interface know nothing of torch.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "accumulate.h"
#include "checks.h"
#include "rms_norm_pair.h"

namespace thought_kernels {
namespace {

constexpr const char* kAccumulate = "accumulate_cuda";
constexpr const char* kRmsNormPair = "rms_norm_pair_cuda";

Strided<const void> input(const at::Tensor& tensor) {
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

template <typename T>
Strided<T> accumulator(const std::optional<at::Tensor>& tensor) {
    if (!tensor.has_value()) return {};
    return {tensor->mutable_data_ptr<T>(), tensor->stride(0), tensor->dim() == 2 ? tensor->stride(1) : 0};
}

Dtype dtype_of(const char* function, const char* argument, const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kBFloat16:
            return Dtype::kBFloat16;
        case at::kHalf:
            return Dtype::kFloat16;
        case at::kFloat:
            return Dtype::kFloat32;
        default:
            TORCH_CHECK_TYPE(false, function, ": ", argument, " must be bfloat16, float16 or float32, got ",
                             tensor.scalar_type());
    }
}

void check_accumulator(const char* argument, const std::optional<at::Tensor>& tensor, at::IntArrayRef shape,
                       at::ScalarType dtype, at::Device device) {
    if (!tensor.has_value()) return;
    check_shape(kAccumulate, argument, *tensor, shape);
    check_dtype(kAccumulate, argument, *tensor, dtype);
    check_device(kAccumulate, argument, *tensor, device);
}

void accumulate(const at::Tensor& cross, const at::Tensor& delta, const at::Tensor& activation, bool pair,
                const std::optional<at::Tensor>& weights, int64_t normalization, double coefficient,
                const std::optional<at::Tensor>& gram, const std::optional<at::Tensor>& delta_sum,
                const std::optional<at::Tensor>& activation_sum, const std::optional<at::Tensor>& moments) {
    TORCH_CHECK_VALUE(delta.dim() == 2, kAccumulate, ": delta must be [rows, d_out], got ", delta.sizes());
    TORCH_CHECK_VALUE(activation.dim() == 2, kAccumulate, ": activation must be [rows, d_in], got ",
                      activation.sizes());
    TORCH_CHECK_VALUE(normalization >= 0 && normalization <= 2, kAccumulate, ": normalization must be 0, 1 or 2, got ",
                      normalization);
    const int64_t rows = activation.size(0), d_out = delta.size(1), d_in = activation.size(1);
    TORCH_CHECK_VALUE(d_out + d_in <= std::numeric_limits<int>::max() / 2, kAccumulate,
                      ": d_out + d_in must be less than 2^30, got ", d_out + d_in);
    const at::Device device = cross.device();
    check_shape(kAccumulate, "delta", delta, {rows, pair ? d_in : d_out});
    check_device(kAccumulate, "delta", delta, device);
    check_device(kAccumulate, "activation", activation, device);
    check_shape(kAccumulate, "weights", weights, {rows});
    if (weights.has_value()) check_device(kAccumulate, "weights", *weights, device);
    check_accumulator("cross", cross, {d_out, d_in}, at::kFloat, device);
    check_accumulator("gram", gram, {d_in, d_in}, at::kFloat, device);
    check_accumulator("delta_sum", delta_sum, {d_out}, at::kFloat, device);
    check_accumulator("activation_sum", activation_sum, {d_in}, at::kFloat, device);
    check_accumulator("moments", moments, {4}, at::kDouble, device);

    at::AutoDispatchBelowADInplaceOrView no_autograd;
    const c10::cuda::CUDAGuard guard(device);
    // Float64 inputs beside float32 accumulators are converted beforehand: nothing in this package makes such a call.
    const at::Tensor d = delta.scalar_type() == at::kDouble ? delta.to(at::kFloat) : delta;
    const at::Tensor a = activation.scalar_type() == at::kDouble ? activation.to(at::kFloat) : activation;
    at::Tensor w;
    if (weights.has_value()) w = weights->to(at::kFloat).contiguous();

    AccumulateCall call{};
    call.delta = input(d);
    call.activation = input(a);
    call.delta_dtype = dtype_of(kAccumulate, "delta", d);
    call.activation_dtype = dtype_of(kAccumulate, "activation", a);
    call.weights = w.defined() ? w.const_data_ptr<float>() : nullptr;
    call.rows = rows;
    call.d_out = static_cast<int>(d_out);
    call.d_in = static_cast<int>(d_in);
    call.pair = pair;
    call.normalization = static_cast<Normalization>(normalization);
    call.coefficient = static_cast<float>(coefficient);
    call.cross = accumulator<float>(cross);
    call.gram = accumulator<float>(gram);
    call.delta_sum = accumulator<float>(delta_sum);
    call.activation_sum = accumulator<float>(activation_sum);
    call.moments = accumulator<double>(moments);
    if (rows == 0) return;

    // Freed into this stream's pool on return, and reused only after the kernels that are enqueued here.
    const int64_t bytes = thought_kernels_accumulate_workspace(&call);
    const at::Tensor workspace = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    const char* error = thought_kernels_accumulate(&call, workspace.mutable_data_ptr(), stream.stream());
    TORCH_CHECK(error == nullptr, kAccumulate, ": the kernels must launch, got the CUDA error \"", error, "\"");
}

std::tuple<at::Tensor, at::Tensor> rms_norm_pair(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& residual, double eps,
                                                 double weight_offset) {
    TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) > 0 && x.size(-1) <= kLargestRow, kRmsNormPair,
                      ": x must be [..., d] with 1 <= d <= ", kLargestRow, ", got ", x.sizes());
    const int64_t d = x.size(-1);
    check_shape(kRmsNormPair, "delta", delta, x.sizes());
    check_shape(kRmsNormPair, "weight", weight, {d});
    check_shape(kRmsNormPair, "residual", residual, x.sizes());
    check_dtype(kRmsNormPair, "residual", residual, x.scalar_type());
    for (const at::Tensor& other : {delta, weight, residual.value_or(x)}) {
        TORCH_CHECK_VALUE(other.device() == x.device(), kRmsNormPair,
                          ": delta, weight and residual must be on x's device ", x.device(), ", got ", other.device());
    }

    at::AutoDispatchBelowADInplaceOrView no_autograd;
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor norm = at::empty(x.sizes(), x.options());
    const at::Tensor difference = at::empty(x.sizes(), delta.options());
    if (x.numel() == 0) return {norm, difference};
    const at::Tensor rows = x.reshape({-1, d}), shifts = delta.reshape({-1, d});
    const at::Tensor gain = weight.to(at::kFloat).add(weight_offset).contiguous();

    RmsNormPairCall call{};
    call.x = rows.const_data_ptr();
    call.delta = shifts.const_data_ptr();
    call.gain = gain.const_data_ptr<float>();
    const at::Tensor streams = residual.has_value() ? residual->reshape({-1, d}) : at::Tensor();
    if (streams.defined()) {
        call.residual = streams.const_data_ptr();
        call.residual_row = streams.stride(0);
        call.residual_column = streams.stride(1);
    }
    call.norm = norm.mutable_data_ptr();
    call.difference = difference.mutable_data_ptr();
    call.x_row = rows.stride(0);
    call.x_column = rows.stride(1);
    call.delta_row = shifts.stride(0);
    call.delta_column = shifts.stride(1);
    call.rows = rows.size(0);
    call.d = static_cast<int>(d);
    call.x_dtype = dtype_of(kRmsNormPair, "x", rows);
    call.delta_dtype = dtype_of(kRmsNormPair, "delta", shifts);
    call.eps = static_cast<float>(eps);
    const auto stream = c10::cuda::getCurrentCUDAStream(x.device().index());
    const char* error = thought_kernels_rms_norm_pair(&call, stream.stream());
    TORCH_CHECK(error == nullptr, kRmsNormPair, ": the kernel must launch, got the CUDA error \"", error, "\"");
    return {norm, difference};
}

}  // namespace

TORCH_LIBRARY_IMPL(thought_kernels, CUDA, m) {
    m.impl("accumulate_cuda", &accumulate);
    m.impl("rms_norm_pair_cuda", &rms_norm_pair);
}

}  // namespace thought_kernels
