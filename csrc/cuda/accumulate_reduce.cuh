// Adds up in a fixed order what the other kernels left in scratch.
#pragma once

#include <cstdint>

#include "accumulate_tile.cuh"

namespace thought_kernels {

// Block (tile, part) adds the splits of a 32 x 32 part of one tile to cross, or to gram and its mirror image.
static __global__ void __launch_bounds__(kThreads)
    reduce_tiles(const float* partials, int splits, Strided<float> cross, Strided<float> gram, int d_out, int d_in,
                 float coefficient, int first_tile, int tiles_out, int tiles_in) {
    constexpr int kPart = 32;
    __shared__ float block[kPart][kPart + 1];
    const TileIndex tile = locate(first_tile + blockIdx.x, tiles_out, tiles_in);
    const int top = blockIdx.y / (kTile / kPart) * kPart, left = blockIdx.y % (kTile / kPart) * kPart;
    const int lane = threadIdx.x % kPart, warp = threadIdx.x / kPart;
    for (int r = warp; r < kPart; r += kThreads / kPart) {
        const float* source = partials + static_cast<int64_t>(blockIdx.x) * splits * kTile * kTile;
        float total = 0;
        for (int split = 0; split < splits; ++split) {
            total += source[(static_cast<int64_t>(split) * kTile + top + r) * kTile + left + lane];
        }
        total *= coefficient;
        const int64_t i = tile.m * kTile + top + r, j = tile.n * kTile + left + lane;
        if (tile.is_cross) {
            if (i < d_out && j < d_in) cross.data[i * cross.row_stride + j * cross.column_stride] += total;
        } else {
            block[r][lane] = total;
            if (i < d_in && j <= i) gram.data[i * gram.row_stride + j * gram.column_stride] += total;
        }
    }
    if (tile.is_cross) return;
    __syncthreads();
    for (int r = warp; r < kPart; r += kThreads / kPart) {
        const int64_t i = tile.m * kTile + top + lane, j = tile.n * kTile + left + r;
        if (i < d_in && j < i) gram.data[j * gram.row_stride + i * gram.column_stride] += block[lane][r];
    }
}

// Blocks 0 ... add 32 columns of the partial sums each; the block after them adds the moments.
static __global__ void __launch_bounds__(kThreads)
    reduce_sums(const float* sums, const double* parts, int64_t blocks, Strided<float> delta_sum,
                Strided<float> activation_sum, Strided<double> moments, int d_out, int d_in, float coefficient) {
    __shared__ double shares[kThreads];
    const int columns = d_out + d_in;
    const bool is_moments = blockIdx.x * 32 >= columns;
    const int width = is_moments ? 4 : 32;
    const int lane = threadIdx.x % width, group = threadIdx.x / width;
    const int column = blockIdx.x * 32 + lane;
    double share = 0;
    if (is_moments ? parts != nullptr : sums != nullptr && column < columns) {
#pragma unroll 8
        for (int64_t block = group; block < blocks; block += kThreads / width) {
            share += is_moments ? parts[block * 4 + lane] : sums[block * columns + column];
        }
    }
    shares[threadIdx.x] = share;
    __syncthreads();
    if (group != 0) return;
    double total = 0;
    for (int g = 0; g < kThreads / width; ++g) total += shares[g * width + lane];
    if (is_moments) {
        if (moments.data != nullptr) moments.data[lane * moments.row_stride] += total;
    } else if (column < d_out) {
        if (delta_sum.data != nullptr) {
            delta_sum.data[column * delta_sum.row_stride] += static_cast<float>(coefficient * total);
        }
    } else if (column < columns && activation_sum.data != nullptr) {
        activation_sum.data[(column - d_out) * activation_sum.row_stride] += static_cast<float>(coefficient * total);
    }
}

}  // namespace thought_kernels
