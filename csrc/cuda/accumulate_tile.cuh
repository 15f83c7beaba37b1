// What the kernels of accumulate share: sizes of tiles, which tile is whose, loads from matrices of any strides.
#pragma once

#include <cstdint>

#include "accumulate.h"
#include "to_float.cuh"

namespace thought_kernels {

constexpr int kTile = 128;           // edge of an output tile
constexpr int kStep = 32;            // rows per shared-memory stage
constexpr int kPitch = kTile + 8;    // of a stage's row: keeps ldmatrix and the TF32 loads free of bank conflicts
constexpr int kThreads = 256;        // eight warps, two down and four across, each with 64 x 32 of the tile
constexpr int kStatisticsRows = 64;  // rows per block of row_statistics
constexpr int kVector = 8;           // elements a thread loads at a time

template <typename T>
struct Source {
    Strided<const T> matrix;
    int width;
    bool vectors;  // rows are contiguous and their vectors of kVector elements aligned to 16 bytes
};

template <typename T>
struct alignas(16) Vector {
    T values[kVector];
};

// matrix[row, column ... column + 7], 0 beyond the width. Never reads a row that is not used: it may hold NaN.
template <typename T>
__device__ inline Vector<T> load_vector(const Source<T>& source, int64_t row, int column, bool used) {
    Vector<T> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) result.values[e] = from_float<T>(0.0f);
    if (!used || column >= source.width) return result;
    const T* first = source.matrix.data + row * source.matrix.row_stride + column * source.matrix.column_stride;
    if (source.vectors && column + kVector <= source.width) {
        result = *reinterpret_cast<const Vector<T>*>(first);
    } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            if (column + e < source.width) result.values[e] = first[e * source.matrix.column_stride];
        }
    }
    return result;
}

struct TileIndex {
    bool is_cross;
    int m, n;
};

// Cross row by row, then gram's lower triangle row by row.
__device__ inline TileIndex locate(int tile, int tiles_out, int tiles_in) {
    const int cross_tiles = tiles_out * tiles_in;
    if (tile < cross_tiles) return {true, tile / tiles_in, tile % tiles_in};
    const int t = tile - cross_tiles;
    // The integer m with m (m + 1) / 2 <= t < (m + 1) (m + 2) / 2; the root may be off by one in float.
    int m = static_cast<int>((sqrtf(8.0f * t + 1.0f) - 1.0f) * 0.5f);
    if (m * (m + 1) / 2 > t) --m;
    if ((m + 1) * (m + 2) / 2 <= t) ++m;
    return {false, m, t - m * (m + 1) / 2};
}

}  // namespace thought_kernels
