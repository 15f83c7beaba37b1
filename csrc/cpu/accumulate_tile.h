// The arithmetic of accumulate.cpp: rows are widened, measured and packed into panels, and panels multiplied.
// Deliberately without an include guard: per_instruction_set.h includes it once per instruction set.
//
// A panel is [depth, W]: W neighbouring columns of consecutive rows, one row after the other, so that a product reads
// memory in order. It keeps kHeight x kWidth sums in registers; left panels are kHeight wide, right ones kWidth.

constexpr int kHeight = VECTOR_BYTES == 64 ? 8 : 6;  // with kVectors, sums in 16 of 32 registers or 12 of 16
constexpr int kVectors = 2;

template <typename T>
struct Simd {
    static constexpr int kLanes = VECTOR_BYTES / sizeof(T);
    static constexpr int kWidth = kVectors * kLanes;
    typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef T Memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));

    static Vector load(const T* x) { return *reinterpret_cast<const Memory*>(x); }
    static void store(T* x, Vector v) { *reinterpret_cast<Memory*>(x) = v; }
};

// One row of `In` in the accumulators' dtype.
template <typename In, typename T>
void load(const void* row, int64_t stride, int64_t n, T* __restrict out) {
    const In* __restrict x = static_cast<const In*>(row);
    if (stride == 1) {
        for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(x[j]);
    } else {
        for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(x[j * stride]);
    }
}

template <typename In>
double sum_of_squares(const void* row, int64_t n) {
    constexpr int kSums = VECTOR_BYTES / 2;  // four registers of float64, so that no addition waits for the last one
    const In* x = static_cast<const In*>(row);
    double sums[kSums] = {}, total = 0;
    int64_t j = 0;
    for (; j + kSums <= n; j += kSums) {
        for (int i = 0; i < kSums; ++i) sums[i] += static_cast<double>(x[j + i]) * static_cast<double>(x[j + i]);
    }
    for (; j < n; ++j) total += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    for (int i = 0; i < kSums; ++i) total += sums[i];
    return total;
}

template <typename T>
void subtract(const T* __restrict x, T* __restrict out, int64_t n) {
    for (int64_t j = 0; j < n; ++j) out[j] -= x[j];
}

// sum += Σ_r weight_r rows_r
template <typename In>
void add_weighted(const void* const* rows, const double* weight, int64_t count, int64_t n, double* __restrict sum) {
    const auto row = [rows](int64_t r) { return static_cast<const In*>(rows[r]); };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {  // four rows for each time that the sum is read and written
        const In *x0 = row(r), *x1 = row(r + 1), *x2 = row(r + 2), *x3 = row(r + 3);
        const double w0 = weight[r], w1 = weight[r + 1], w2 = weight[r + 2], w3 = weight[r + 3];
        for (int64_t j = 0; j < n; ++j) sum[j] += (w0 * x0[j] + w1 * x1[j]) + (w2 * x2[j] + w3 * x3[j]);
    }
    for (; r < count; ++r) {
        const In* x = row(r);
        for (int64_t j = 0; j < n; ++j) sum[j] += weight[r] * x[j];
    }
}

// factor_r · row_r into neighbouring rows of the panels, which are `stride` elements apart; zeros beyond column n.
// Panels lie too far apart for the processor to foresee what is written next, so their next rows are fetched meanwhile,
// and so are the inputs `ahead` bytes further on (a fetch beyond their end does nothing).
template <typename In, typename T, int W>
void pack(const void* const* rows, const T* factors, int64_t count, int64_t n, T* __restrict panels, int64_t stride,
          int64_t ahead) {
    constexpr int kLine = 64;
    int64_t j = 0;
    for (; j + W <= n; j += W, panels += stride) {
        for (int i = 0; i < kGroup * W; i += kLine / sizeof(T)) __builtin_prefetch(panels + kGroup * W + i, 1);
        for (int64_t r = 0; r < count; ++r) {
            const In* x = static_cast<const In*>(rows[r]) + j;
            const char* next = reinterpret_cast<const char*>(x) + ahead;
            for (size_t byte = 0; byte < W * sizeof(In); byte += kLine) __builtin_prefetch(next + byte);
            for (int i = 0; i < W; ++i) panels[r * W + i] = factors[r] * static_cast<T>(x[i]);
        }
    }
    for (int64_t r = 0; r < count && j < n; ++r) {
        const In* x = static_cast<const In*>(rows[r]);
        for (int i = 0; i < W; ++i) panels[r * W + i] = j + i < n ? factors[r] * static_cast<T>(x[j + i]) : 0;
    }
}

// out [kHeight, kWidth] = (add ? out : 0) + leftᵀ right
template <typename T>
void multiply_panels(const T* left, const T* right, int64_t depth, bool add, T* out) {
    using S = Simd<T>;
    // Sums that stay from block to block leave the cache: fetched now, they are there when the last row is through.
    for (int i = 0; add && i < kHeight * S::kWidth; i += 64 / sizeof(T)) __builtin_prefetch(out + i, 1);
    typename S::Vector sum[kHeight][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        typename S::Vector row[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) row[v] = S::load(right + k * S::kWidth + v * S::kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kHeight; ++i) {
            const typename S::Vector x = left[k * kHeight + i] - typename S::Vector{};  // + would turn -0 into 0
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[i][v] += x * row[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            T* target = out + i * S::kWidth + v * S::kLanes;
            S::store(target, add ? S::load(target) + sum[i][v] : sum[i][v]);
        }
    }
}

// The same for a tile of whole panels, `pitch` rows of memory each, into panels [height, kWidth], one for each right
// panel. Element (i, j) is wanted where i ≥ j + diagonal.
template <typename T>
void multiply_tile(const T* left, int64_t height, const T* right, int64_t width, int64_t pitch, int64_t depth,
                   int64_t diagonal, const Soon (&soon)[2], bool add, T* out) {
    constexpr int64_t kWidth = Simd<T>::kWidth;
    int64_t part = 0;
    for (int64_t j = 0; j < width; j += kWidth, out += height * kWidth) {
        const int64_t first = j + diagonal > 0 ? (j + diagonal) / kHeight * kHeight : 0;
        for (int64_t i = first; i < height; i += kHeight) {
            for (const Soon& memory : soon) memory.fetch(part);
            ++part;
            multiply_panels(left + i * pitch, right + j * pitch, depth, add, out + i * kWidth);
        }
    }
}

template <typename In, typename T>
constexpr Reader<T> reader = {
    load<In, T>, sum_of_squares<In>, add_weighted<In>, pack<In, T, kHeight>, pack<In, T, Simd<T>::kWidth>,
};

template <typename T>
constexpr Kernels<T> kernels = {
    kHeight,     Simd<T>::kWidth,  {reader<at::Half, T>, reader<at::BFloat16, T>, reader<float, T>, reader<double, T>},
    subtract<T>, multiply_tile<T>,
};
