// The tiles of cross and of gram's lower triangle, each summed over one split of the rows. The inputs stream through
// registers, where δ is formed and scaled, into two shared-memory stages.
#pragma once

#include <cstdint>

#include "accumulate_multiply.cuh"
#include "accumulate_tile.cuh"
#include "to_float.cuh"

namespace thought_kernels {

__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}

// Adds Σ factor (left - minus)[row, m] further right[row, n] over rows [first, last) to this thread's part of one tile.
template <typename Product, typename Left, typename Right>
__device__ void multiply_tile(Source<Left> left, Source<Right> minus, Source<Right> right, const float* factors,
                              const float* further, int64_t first, int64_t last, int m, int n,
                              float (&total)[4][4][4]) {
    using Element = typename Product::Element;
    using Stage = Element[kStep][kPitch];
    auto* left_stages = reinterpret_cast<Stage*>(dynamic_shared());
    auto* right_stages = left_stages + 2;

    // Each thread moves two vectors of each operand per step: the same columns of rows k and k + 16.
    constexpr int kRows = kStep * kTile / kVector / kThreads;
    const int column = threadIdx.x % (kTile / kVector) * kVector;
    const int k = threadIdx.x / (kTile / kVector);
    Vector<Left> x[kRows];
    Vector<Right> z[kRows], y[kRows];
    float factor[kRows], further_factor[kRows], next_factor[kRows];

    const auto load_factors = [&](int64_t start) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t row = start + k + r * (kStep / kRows);
            next_factor[r] = row >= last ? 0.0f : factors == nullptr ? 1.0f : factors[row];
        }
    };
    const auto load = [&](int64_t start) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t row = start + k + r * (kStep / kRows);
            factor[r] = next_factor[r];
            const bool used = factor[r] != 0.0f;
            further_factor[r] = used && further != nullptr ? further[row] : 1.0f;
            x[r] = load_vector(left, row, m + column, used);
            y[r] = load_vector(right, row, n + column, used);
            if (minus.matrix.data != nullptr) z[r] = load_vector(minus, row, m + column, used);
        }
    };
    const auto store = [&](int stage) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            Vector<Element> scaled, plain;
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                float value = to_float(x[r].values[e]);
                if (minus.matrix.data != nullptr) value -= to_float(z[r].values[e]);
                scaled.values[e] = Product::round(value * factor[r]);
                plain.values[e] = Product::round(to_float(y[r].values[e]) * further_factor[r]);  // exact
            }
            *reinterpret_cast<Vector<Element>*>(&left_stages[stage][k + r * (kStep / kRows)][column]) = scaled;
            *reinterpret_cast<Vector<Element>*>(&right_stages[stage][k + r * (kStep / kRows)][column]) = plain;
        }
    };

    const int warp = threadIdx.x / 32, down = warp % 2 * 64, across = warp / 2 * 32;
    load_factors(first);
    load(first);
    load_factors(first + kStep);  // one step ahead, since they decide which rows are read
    store(0);
    __syncthreads();
    int stage = 0;
    for (int64_t start = first; start < last; start += kStep) {
        const bool more = start + kStep < last;
        if (more) {
            load(start + kStep);
            load_factors(start + 2 * kStep);
        }
        const auto shift = [](Stage& rows, int columns) {
            return reinterpret_cast<const Element(*)[kPitch]>(&rows[0][columns]);
        };
        Product::step(shift(left_stages[stage], down), shift(right_stages[stage], across), total);
        stage ^= 1;
        if (more) store(stage);  // nobody reads this stage any more since the last barrier
        __syncthreads();
    }
}

// Block (tile, split) writes one tile, summed over the rows of one split, to partials[tile, split].
template <typename Delta, typename Activation>
__global__ void __launch_bounds__(kThreads)
    product(Source<Delta> delta, Source<Activation> activation, bool pair, const float* factors, const float* further,
            float* partials, int64_t rows, int64_t rows_per_split, int first_tile, int tiles_out, int tiles_in) {
    using Product = typename ProductFor<Activation>::type;
    const TileIndex tile = locate(first_tile + blockIdx.x, tiles_out, tiles_in);
    const int64_t first = blockIdx.y * rows_per_split;
    const int64_t last = min(first + rows_per_split, rows);
    float total[4][4][4] = {};
    const Source<Activation> none{};
    if (tile.is_cross) {
        multiply_tile<Product>(delta, pair ? activation : none, activation, factors, further, first, last,
                               tile.m * kTile, tile.n * kTile, total);
    } else {
        multiply_tile<Product>(activation, none, activation, factors, further, first, last, tile.m * kTile,
                               tile.n * kTile, total);
    }

    float* target = partials + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kTile * kTile;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp % 2 * 64 + lane / 4, column = warp / 2 * 32 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float2 pair_of_columns = {total[i][j][2 * h], total[i][j][2 * h + 1]};
                *reinterpret_cast<float2*>(target + (row + 16 * i + 8 * h) * kTile + column + 8 * j) = pair_of_columns;
            }
        }
    }
}

}  // namespace thought_kernels
