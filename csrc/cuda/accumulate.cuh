// Kernels of streaming rank-one accumulation (theory in thought_kernels/ops/accumulate.py), in two pairs:
//
//   row_statistics, reduce_sums    row factors w/ν, sums and moments; only where a norm, a sum or the moments are
//   wanted product, reduce_tiles          tiles of cross and of gram's lower triangle, one grid, rows split where tiles
//   are few
//
// The second of each pair adds what the first left in scratch in a fixed order; there are no atomics.
// product streams its inputs through registers, where δ is formed and scaled, into two shared-memory stages.
#pragma once

#include <cstdint>

#include "accumulate.h"
#include "tensor_core.cuh"
#include "to_float.cuh"

namespace thought_kernels {

constexpr int kTile = 128;           // edge of an output tile
constexpr int kStep = 32;            // rows per shared-memory stage
constexpr int kPitch = kTile + 8;    // of a stage's row: keeps ldmatrix and the TF32 loads free of bank conflicts
constexpr int kThreads = 256;        // eight warps, two down and four across, each with 64 x 32 of the tile
constexpr int kStatisticsRows = 64;  // rows per block of row_statistics
constexpr int kVector = 8;           // elements a thread loads at a time

// ---- The three ways to multiply. Shared memory holds Element; accumulators are the m16n8 fragments of mma.sync:
// ---- total[i][j][2h + c] is row 16 i + 8 h + lane / 4 and column 8 j + 2 (lane % 4) + c of the warp's 64 x 32.

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

// ---- Loading

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

// ---- product

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

// ---- row_statistics and reduce_sums

__device__ inline double warp_sum(double x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

// factors [rows], sums [blocks, d_out + d_in] (Σ w δ | Σ w a) and moments [blocks, 4]; any of them may be null. Squares
// are float64, which no float32 overflows or underflows. further [rows] completes factors where w / ν, of a tiny or
// huge ‖a‖², is no normal float32: w / ν = factor · further, a power of two near √(w / ν), so that w δ/‖a‖ and a/‖a‖
// are float32s wherever their product is.
template <typename Delta, typename Activation>
__global__ void __launch_bounds__(kThreads, 4)
    row_statistics(Source<Delta> delta, Source<Activation> activation, bool pair, const float* weights,
                   Normalization normalization, int64_t rows, float* factors, float* further, float* sums,
                   double* moments) {
    __shared__ float weight[kStatisticsRows];
    __shared__ double factor[kStatisticsRows], energy[kStatisticsRows];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kStatisticsRows;
    const auto a = [&](int64_t row, int64_t column) {
        return to_float(
            activation.matrix.data[row * activation.matrix.row_stride + column * activation.matrix.column_stride]);
    };
    const auto d = [&](int64_t row, int64_t column) {
        const float x =
            to_float(delta.matrix.data[row * delta.matrix.row_stride + column * delta.matrix.column_stride]);
        return pair ? x - a(row, column) : x;
    };

    const int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < kStatisticsRows; r += kThreads / 32) {
        const int64_t row = first + r;
        const float w = row >= rows ? 0.0f : weights == nullptr ? 1.0f : weights[row];
        double v = w;
        if (w != 0 && normalization != Normalization::kNone) {
            double squares = 0;
#pragma unroll 8
            for (int c = lane; c < activation.width; c += 32) {
                const double x = a(row, c);
                squares = fma(x, x, squares);
            }
            squares = warp_sum(squares);
            const double nu = normalization == Normalization::kNorm ? sqrt(squares) : squares;
            // An infinite ν gives NaN rather than a silently dropped row.
            v = squares == 0 ? 0.0 : isinf(nu) ? nan("") : w / nu;
        }
        double delta_squares = 0;
        if (moments != nullptr && v != 0) {
#pragma unroll 8
            for (int c = lane; c < delta.width; c += 32) {
                const double x = d(row, c);
                delta_squares = fma(x, x, delta_squares);
            }
            delta_squares = warp_sum(delta_squares);
        }
        if (lane == 0) {
            weight[r] = w;
            factor[r] = v;
            energy[r] = v == 0 ? 0.0 : v * delta_squares;
            if (factors != nullptr && row < rows) {
                const double size = fabs(v);
                const bool split = further != nullptr && v != 0 && (size < 1.2e-38 || size > 3.4e38);
                const double root = split ? ldexp(1.0, ilogb(size) / 2) : 1.0;
                factors[row] = static_cast<float>(v / root);
                if (further != nullptr) further[row] = static_cast<float>(root);
            }
        }
    }
    __syncthreads();

    if (sums != nullptr) {
        const int columns = delta.width + activation.width;
        for (int c = threadIdx.x; c < columns; c += kThreads) {
            float total = 0;
#pragma unroll 4
            for (int r = 0; r < kStatisticsRows; ++r) {
                if (weight[r] == 0) continue;  // padding may hold NaN
                total = fmaf(weight[r], c < delta.width ? d(first + r, c) : a(first + r, c - delta.width), total);
            }
            sums[static_cast<int64_t>(blockIdx.x) * columns + c] = total;
        }
    }
    if (moments != nullptr && threadIdx.x < 4) {
        double total = 0;
        for (int r = 0; r < kStatisticsRows; ++r) {
            const double terms[4] = {weight[r], factor[r], energy[r], weight[r] != 0 ? 1.0 : 0.0};
            total += threadIdx.x == 0 ? terms[0] : threadIdx.x == 1 ? terms[1] : threadIdx.x == 2 ? terms[2] : terms[3];
        }
        moments[static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x] = total;
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
