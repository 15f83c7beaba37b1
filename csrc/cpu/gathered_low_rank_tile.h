// The arithmetic of gathered_low_rank.cpp: few rows times a matrix that is read once, where it lies.
// Deliberately without an include guard: per_instruction_set.h includes it once per instruction set.

constexpr int kHeight = VECTOR_BYTES == 64 ? 8 : 6;  // with two vectors, sums in 16 of 32 registers or 12 of 16
constexpr int64_t kAhead = 8;                        // rows of the matrix that are fetched before they are needed

template <typename T, int kLanes>
struct Lanes {
    typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
    typedef T Memory __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// H rows times V · L columns, whose sums stay in registers. Each is formed in the order of k, so that a row's result is
// the same beside whatever other rows.
template <typename T, int H, int V, int L>
void multiply_tile(const T* const* left, const T* right, int64_t stride, int64_t depth, bool add, T* out,
                   int64_t pitch) {
    using Vector = typename Lanes<T, L>::Vector;
    using Memory = typename Lanes<T, L>::Memory;
    const T* x[H];
    for (int i = 0; i < H; ++i) x[i] = left[i];
    Vector sum[H][V] = {};
    for (int64_t k = 0; k < depth; ++k, right += stride) {
        Vector row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            __builtin_prefetch(right + kAhead * stride + v * L);  // beyond the end it does nothing
            row[v] = *reinterpret_cast<const Memory*>(right + v * L);
        }
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) {
            const Vector factor = x[i][k] - Vector{};  // + would turn -0 into 0
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[i][v] += factor * row[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            Memory* const target = reinterpret_cast<Memory*>(out + i * pitch + v * L);
            *target = add ? *target + sum[i][v] : sum[i][v];
        }
    }
}

// All columns of H rows: the last ones, fewer than a tile has, by ever narrower tiles.
template <typename T, int H, int V, int L>
void multiply_columns(const T* const* left, const T* right, int64_t stride, int64_t depth, int64_t width, bool add,
                      T* out, int64_t pitch) {
    for (; width >= V * L; width -= V * L, right += V * L, out += V * L) {
        multiply_tile<T, H, V, L>(left, right, stride, depth, add, out, pitch);
    }
    if constexpr (V > 1) {
        multiply_columns<T, H, V / 2, L>(left, right, stride, depth, width, add, out, pitch);
    } else if constexpr (L > 1) {
        multiply_columns<T, H, 1, L / 2>(left, right, stride, depth, width, add, out, pitch);
    }
}

// All rows of some columns. One row alone keeps eight sums going, so that no addition waits for the last one.
template <typename T>
void multiply_rows(const T* const* left, int64_t height, const T* right, int64_t stride, int64_t depth, int64_t width,
                   bool add, T* out, int64_t pitch) {
    constexpr int kLanes = VECTOR_BYTES / sizeof(T);
    int64_t i = 0;
    for (; i + kHeight <= height; i += kHeight) {
        multiply_columns<T, kHeight, 2, kLanes>(left + i, right, stride, depth, width, add, out + i * pitch, pitch);
    }
    if (i + 4 <= height) {
        multiply_columns<T, 4, 2, kLanes>(left + i, right, stride, depth, width, add, out + i * pitch, pitch);
        i += 4;
    }
    if (i + 2 <= height) {
        multiply_columns<T, 2, 4, kLanes>(left + i, right, stride, depth, width, add, out + i * pitch, pitch);
        i += 2;
    }
    if (i < height) {
        multiply_columns<T, 1, 8, kLanes>(left + i, right, stride, depth, width, add, out + i * pitch, pitch);
    }
}

// out [height, width] = (add ? out : 0) + left right, with left's rows anywhere and right's `stride` apart. Many rows
// take a few columns at a time, which then stay in the L1 cache for all of them.
template <typename T>
void multiply(const T* const* left, int64_t height, const T* right, int64_t stride, int64_t depth, int64_t width,
              bool add, T* out, int64_t pitch) {
    constexpr int64_t kWidth = 2 * VECTOR_BYTES / sizeof(T);
    const int64_t step = height > kHeight ? kWidth : std::max<int64_t>(1, width);
    for (int64_t j = 0; j < width; j += step) {
        multiply_rows(left, height, right + j, stride, depth, std::min(step, width - j), add, out + j, pitch);
    }
}
