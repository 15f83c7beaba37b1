// The arithmetic of gathered_low_rank.cpp: rows times a matrix that lies in memory once for all of them.
// Deliberately without an include guard: per_instruction_set.h includes it once per instruction set.

constexpr int kHeight = VECTOR_BYTES == 64 ? 8 : 6;  // with two vectors, sums in 16 of 32 registers or 12 of 16
constexpr int64_t kAhead = 8;                        // rows of the matrix that are fetched before they are needed

template <typename T, int kLanes>
struct Lanes {
    typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
    typedef T Memory __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// H rows from i times V · L columns from j, whose sums stay in registers. Each is formed in the order of the depth, so
// that a row's result is the same beside whatever other rows.
template <typename T, int H, int V, int L>
void multiply_tile(const Product<T>& product, int64_t i, int64_t j) {
    using Vector = typename Lanes<T, L>::Vector;
    using Memory = typename Lanes<T, L>::Memory;
    const T *x[H], *right = product.right + j;
    T* const out = product.out + i * product.pitch + j;
    const int64_t stride = product.stride, pitch = product.pitch;
    Vector sum[H][V] = {};
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) x[h] = product.left[i + h] + product.first;
    if (product.resume) {
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[h][v] = *reinterpret_cast<const Memory*>(out + h * pitch + v * L);
        }
    }
    for (int64_t k = 0; k < product.depth; ++k, right += stride) {
        Vector row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            __builtin_prefetch(right + kAhead * stride + v * L);  // beyond the end it does nothing
            row[v] = *reinterpret_cast<const Memory*>(right + v * L);
        }
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            const Vector factor = x[h][k] - Vector{};  // + would turn -0 into 0
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[h][v] += factor * row[v];
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) *reinterpret_cast<Memory*>(out + h * pitch + v * L) = sum[h][v];
    }
}

// All columns of H rows: the last ones, fewer than a tile has, by ever narrower tiles.
template <typename T, int H, int V, int L>
void multiply_columns(const Product<T>& product, int64_t i, int64_t j) {
    for (; product.width - j >= V * L; j += V * L) multiply_tile<T, H, V, L>(product, i, j);
    if constexpr (V > 1) {
        multiply_columns<T, H, V / 2, L>(product, i, j);
    } else if constexpr (L > 1) {
        multiply_columns<T, H, 1, L / 2>(product, i, j);
    }
}

// All rows. One alone keeps eight sums going, so that no addition waits for the last one.
template <typename T>
void multiply_rows(const Product<T>& product) {
    constexpr int kLanes = VECTOR_BYTES / sizeof(T);
    int64_t i = 0;
    for (; i + kHeight <= product.height; i += kHeight) multiply_columns<T, kHeight, 2, kLanes>(product, i, 0);
    if (i + 4 <= product.height) {
        multiply_columns<T, 4, 2, kLanes>(product, i, 0);
        i += 4;
    }
    if (i + 2 <= product.height) {
        multiply_columns<T, 2, 4, kLanes>(product, i, 0);
        i += 2;
    }
    if (i < product.height) multiply_columns<T, 1, 8, kLanes>(product, i, 0);
}

// out = left right. Few rows take a few rows of the matrix at a time, from end to end, as memory likes to be read. Many
// take a few columns, which are packed to stay in the L1 cache for all of them, whatever the stride.
template <typename T>
void multiply(const Product<T>& product) {
    constexpr int64_t kPiece = 8192, kDeep = 128, kWidth = 2 * VECTOR_BYTES / sizeof(T);
    const bool few = product.height <= kHeight;
    T packed[kDeep * kWidth];
    Product<T> part = product;
    const int64_t deep = few ? std::max<int64_t>(8, kPiece / std::max<int64_t>(1, product.width)) : kDeep;
    // A product without depth is zero, and is written too.
    for (int64_t k = 0; k < product.depth || k == 0; k += deep) {
        part.first = product.first + k;
        part.depth = std::min(deep, product.depth - k);
        part.resume = k > 0;
        part.right = product.right + k * product.stride;
        if (few) {
            multiply_rows(part);
            continue;
        }
        for (int64_t j = 0; j < product.width; j += kWidth) {
            const T* const right = product.right + k * product.stride + j;
            part.width = std::min(kWidth, product.width - j);
            for (int64_t row = 0; row < part.depth; ++row) {
                for (int64_t c = 0; c < part.width; ++c) packed[row * kWidth + c] = right[row * product.stride + c];
            }
            part.right = packed;
            part.stride = kWidth;
            part.out = product.out + j;
            multiply_rows(part);
        }
    }
}
