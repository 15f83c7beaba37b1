// Launches the kernels of accumulate.cuh. No torch here: any machine with nvcc compiles this file.
#include <cuda_runtime.h>

#include <algorithm>

#include "accumulate.cuh"

namespace thought_kernels {
namespace {

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// How the products of one call are cut into blocks, and where scratch lies in the workspace.
struct Plan {
    int tiles_out, tiles_in, tiles;
    int batch;  // tiles per launch, so that their scratch is bounded
    int splits;
    int64_t rows_per_split;
    int64_t statistics_blocks;
    int64_t factors, further, sums, moments, partials, bytes;  // offsets in bytes, and the end
};

// Into how many parts to cut the rows so that `tiles` keep `processors` busy. Minimises waves · rows per part
// + 6 · tiles · parts, in rows: writing a partial tile and reading it back takes all processors together about as long
// as one processor needs for 6 rows.
int choose_splits(int64_t rows, int64_t tiles, int64_t processors) {
    const int64_t most =
        std::max<int64_t>(1, std::min(divide_up(rows, 8 * kStep), 4 * processors / std::max<int64_t>(1, tiles)));
    int64_t best = 1, best_cost = INT64_MAX;
    for (int64_t parts = 1; parts <= most; ++parts) {
        const int64_t cost = divide_up(tiles * parts, processors) * divide_up(rows, parts) + 6 * tiles * parts;
        if (cost < best_cost) best = parts, best_cost = cost;
    }
    return static_cast<int>(best);
}

Plan make_plan(const AccumulateCall& call, int processors) {
    Plan plan{};
    plan.tiles_out = static_cast<int>(divide_up(call.d_out, kTile));
    plan.tiles_in = static_cast<int>(divide_up(call.d_in, kTile));
    plan.tiles = plan.tiles_out * plan.tiles_in;
    if (call.gram.data != nullptr) plan.tiles += plan.tiles_in * (plan.tiles_in + 1) / 2;
    const int splits = choose_splits(call.rows, plan.tiles, processors);
    plan.rows_per_split = divide_up(divide_up(call.rows, splits), kStep) * kStep;
    plan.splits = static_cast<int>(divide_up(call.rows, plan.rows_per_split));
    plan.batch = std::min(plan.tiles, 4 * processors);
    plan.statistics_blocks = divide_up(call.rows, kStatisticsRows);

    const auto reserve = [&plan](int64_t& offset, bool wanted, int64_t bytes) {
        offset = plan.bytes;
        if (wanted) plan.bytes += divide_up(bytes, 256) * 256;
    };
    const bool wants_sums = call.delta_sum.data != nullptr || call.activation_sum.data != nullptr;
    reserve(plan.factors, call.normalization != Normalization::kNone, call.rows * 4);
    reserve(plan.further, call.normalization == Normalization::kSquaredNorm, call.rows * 4);
    reserve(plan.sums, wants_sums, plan.statistics_blocks * (call.d_out + call.d_in) * 4);
    reserve(plan.moments, call.moments.data != nullptr, plan.statistics_blocks * 4 * 8);
    reserve(plan.partials, true, static_cast<int64_t>(plan.batch) * plan.splits * kTile * kTile * 4);
    return plan;
}

int processor_count() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        return 1;  // the launch that follows reports the error
    }
    return count;
}

template <typename T>
Source<T> source(const Strided<const void>& matrix, int width) {
    const auto address = reinterpret_cast<uintptr_t>(matrix.data);
    const bool aligned = address % 16 == 0 && matrix.row_stride * sizeof(T) % 16 == 0;
    return {{static_cast<const T*>(matrix.data), matrix.row_stride, matrix.column_stride},
            width,
            matrix.column_stride == 1 && aligned};
}

template <typename Delta, typename Activation>
cudaError_t run(const AccumulateCall& call, char* workspace, cudaStream_t stream) {
    const Plan plan = make_plan(call, processor_count());
    const auto delta = source<Delta>(call.delta, call.d_out);
    const auto activation = source<Activation>(call.activation, call.d_in);

    // Whatever may be refused comes before the first kernel that writes to an accumulator.
    const int shared = 4 * kStep * kPitch * sizeof(typename ProductFor<Activation>::type::Element);
    const auto kernel = product<Delta, Activation>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;

    const float* factors = call.weights;
    const bool wants_sums = call.delta_sum.data != nullptr || call.activation_sum.data != nullptr;
    const bool wants_factors = call.normalization != Normalization::kNone;
    const bool wants_moments = call.moments.data != nullptr;
    const bool squared = call.normalization == Normalization::kSquaredNorm;
    auto* further = squared ? reinterpret_cast<float*>(workspace + plan.further) : nullptr;
    auto* sums = wants_sums ? reinterpret_cast<float*>(workspace + plan.sums) : nullptr;
    auto* moments = wants_moments ? reinterpret_cast<double*>(workspace + plan.moments) : nullptr;
    if (wants_factors || wants_sums || wants_moments) {
        auto* new_factors = wants_factors ? reinterpret_cast<float*>(workspace + plan.factors) : nullptr;
        row_statistics<<<static_cast<unsigned>(plan.statistics_blocks), kThreads, 0, stream>>>(
            delta, activation, call.pair, call.weights, call.normalization, call.rows, new_factors, further, sums,
            moments);
        if (wants_factors) factors = new_factors;
    }
    auto* partials = reinterpret_cast<float*>(workspace + plan.partials);
    for (int first = 0; first < plan.tiles; first += plan.batch) {
        const unsigned tiles = std::min(plan.batch, plan.tiles - first);
        kernel<<<dim3(tiles, plan.splits), kThreads, shared, stream>>>(delta, activation, call.pair, factors, further,
                                                                       partials, call.rows, plan.rows_per_split, first,
                                                                       plan.tiles_out, plan.tiles_in);
        error = cudaGetLastError();
        if (error != cudaSuccess) return error;
        reduce_tiles<<<dim3(tiles, 16), kThreads, 0, stream>>>(partials, plan.splits, call.cross, call.gram, call.d_out,
                                                               call.d_in, call.coefficient, first, plan.tiles_out,
                                                               plan.tiles_in);
    }
    if (wants_sums || wants_moments) {
        const auto blocks = static_cast<unsigned>(divide_up(call.d_out + call.d_in, 32) + 1);
        reduce_sums<<<blocks, kThreads, 0, stream>>>(sums, moments, plan.statistics_blocks, call.delta_sum,
                                                     call.activation_sum, call.moments, call.d_out, call.d_in,
                                                     call.coefficient);
    }
    return cudaGetLastError();
}

template <typename Delta>
cudaError_t run(const AccumulateCall& call, char* workspace, cudaStream_t stream) {
    switch (call.activation_dtype) {
        case Dtype::kBFloat16:
            return run<Delta, __nv_bfloat16>(call, workspace, stream);
        case Dtype::kFloat16:
            return run<Delta, __half>(call, workspace, stream);
        case Dtype::kFloat32:
            return run<Delta, float>(call, workspace, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t run(const AccumulateCall& call, char* workspace, cudaStream_t stream) {
    switch (call.delta_dtype) {
        case Dtype::kBFloat16:
            return run<__nv_bfloat16>(call, workspace, stream);
        case Dtype::kFloat16:
            return run<__half>(call, workspace, stream);
        case Dtype::kFloat32:
            return run<float>(call, workspace, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace thought_kernels

extern "C" int64_t thought_kernels_accumulate_workspace(const thought_kernels::AccumulateCall* call) {
    return thought_kernels::make_plan(*call, thought_kernels::processor_count()).bytes;
}

extern "C" const char* thought_kernels_accumulate(const thought_kernels::AccumulateCall* call, void* workspace,
                                                  void* stream) {
    const cudaError_t error =
        thought_kernels::run(*call, static_cast<char*>(workspace), static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
