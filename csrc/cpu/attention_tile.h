// Attention of one tile of queries over segments of keys. Deliberately without an include guard: attention.h includes
// it once per instruction set, inside a namespace of its own, with VECTOR_BYTES set to the width of that set's
// registers.
//
// A tile is kRows consecutive rows of one key head's queries, row r being token r / group, query head r % group. Its
// scores are kept transposed, [keys, kRows], for three reasons: a softmax over keys is then plain vector arithmetic on
// rows; the rows that see a key are a contiguous range, whatever causality and window say; and both products read keys
// and values where they lie, since one operand's elements are broadcast and the other's rows are vectors:
//
//     scores[key, rows] += key[key, d] · queries[d, rows]          output[row, d's] += scores[key, row] · value[key,
//     d's]

template <typename T>
struct Simd {
    static constexpr int64_t kLanes = VECTOR_BYTES / sizeof(T);
    typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef T Memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));

    static Vector load(const T* x) { return *reinterpret_cast<const Memory*>(x); }
    static void store(T* x, Vector v) { *reinterpret_cast<Memory*>(x) = v; }
    static Vector fill(T x) { return Vector{} + x; }
    static Vector max(Vector a, Vector b) { return a > b ? a : b; }
};

using Floats = Simd<float>::Vector;
using Doubles = Simd<double>::Vector;

// e^x for x ≤ 0 to 2 ulp (the Cephes polynomial), 0 below e^-87, NaN kept.
inline Floats exponential(Floats x) {
    typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    Floats n = x * 1.44269504088896341f + kRound;
    n -= kRound;
    Floats r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    y *= (Floats)power;  // the bits, not the values
    return x < -87.0f ? Floats{} : y;
}

inline Doubles exponential(Doubles x) {
    for (int64_t i = 0; i < Simd<double>::kLanes; ++i) x[i] = std::exp(x[i]);
    return x;
}

inline Floats hyperbolic_tangent(Floats x) {
    const Floats size = x < 0.0f ? -x : x;
    const Floats e = exponential(-2.0f * size);
    const Floats far = (1.0f - e) / (1.0f + e);
    const Floats x2 = x * x;  // the series, since 1 − e cancels near 0
    const Floats near = x * (1.0f + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835)))));
    return size < 0.3f ? near : (x < 0.0f ? -far : far);
}

inline Doubles hyperbolic_tangent(Doubles x) {
    for (int64_t i = 0; i < Simd<double>::kLanes; ++i) x[i] = std::tanh(x[i]);
    return x;
}

// c[i, :] = keep[i] c[i, :] + Σ_k a[i, k] b[k, :] for M rows and N vectors of columns, all in registers. keep may be
// null for 0. a's element (i, k) is at a[i * a_row + k * a_step], b's row k at b + k * b_step.
template <int M, int N, typename T>
void multiply(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t depth, const T* keep, T* c,
              int64_t c_row) {
    using S = Simd<T>;
    typename S::Vector sum[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) {
            sum[i][v] = keep == nullptr ? typename S::Vector{} : keep[i] * S::load(c + i * c_row + v * S::kLanes);
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        typename S::Vector row[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) row[v] = S::load(b + k * b_step + v * S::kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const typename S::Vector x = S::fill(a[i * a_row + k * a_step]);
#pragma GCC unroll 8
            for (int v = 0; v < N; ++v) sum[i][v] += x * row[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) S::store(c + i * c_row + v * S::kLanes, sum[i][v]);
    }
}

// 6 rows of 4 vectors leave 8 of 32 registers for operands, 6 of 2 leave 4 of 16.
constexpr int64_t kBlock = 6;
constexpr int64_t kVectors = VECTOR_BYTES == 64 ? 4 : 2;

// The same for any number of rows up to kBlock and of vectors up to kVectors; both are what is done, in steps.
template <typename T>
void multiply_block(int64_t rows, int64_t vectors, const T* a, int64_t a_row, int64_t a_step, const T* b,
                    int64_t b_step, int64_t depth, const T* keep, T* c, int64_t c_row) {
    using Kernel = decltype(&multiply<1, 1, T>);
    static constexpr Kernel kKernels[4][3] = {
        {multiply<1, 1, T>, multiply<1, 2, T>, multiply<1, kVectors, T>},
        {multiply<2, 1, T>, multiply<2, 2, T>, multiply<2, kVectors, T>},
        {multiply<4, 1, T>, multiply<4, 2, T>, multiply<4, kVectors, T>},
        {multiply<6, 1, T>, multiply<6, 2, T>, multiply<6, kVectors, T>},
    };
    for (int64_t i = 0; i < rows;) {
        const int64_t left = rows - i, height = left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int64_t v = 0; v < vectors;) {
            const int64_t width = vectors - v >= kVectors ? kVectors : vectors - v >= 2 ? 2 : 1;
            const Kernel kernel = kKernels[height == 6 ? 3 : height / 2][width == kVectors ? 2 : width - 1];
            const int64_t column = v * Simd<T>::kLanes;
            kernel(a + i * a_row, a_row, a_step, b + column, b_step, depth, keep == nullptr ? nullptr : keep + i,
                   c + i * c_row + column, c_row);
            v += width;
        }
        i += height;
    }
}

// queries [head_dim, kRows] from rows of a strided tensor, scaled; rows beyond count are 0.
template <typename In, typename T>
void gather_queries(const Tile& tile, const QueryRows<In>& rows, T scale, T* queries) {
    constexpr int64_t kLine = 16;
    for (int64_t d0 = 0; d0 < tile.head_dim; d0 += kLine) {
        const int64_t d1 = std::min(tile.head_dim, d0 + kLine);
        for (int64_t r = 0; r < kRows; ++r) {
            if (r < tile.count) {
                const In* x = rows.row(tile.first + r);
                for (int64_t d = d0; d < d1; ++d) queries[d * kRows + r] = scale * static_cast<T>(x[d]);
            } else {
                for (int64_t d = d0; d < d1; ++d) queries[d * kRows + r] = 0;
            }
        }
    }
}

// Turns scores [keys, kRows] into weights e^(score − maximum), and moves maximum and total on; keep is what rows
// accumulated under the old maximum must be multiplied with.
template <typename T>
void soften(int64_t keys, int64_t vectors, T* scores, State<T>& state, T* keep) {
    using S = Simd<T>;
    for (int64_t v = 0; v < vectors; ++v) {
        T* column = scores + v * S::kLanes;
        const typename S::Vector old = S::load(state.maximum + v * S::kLanes);
        typename S::Vector top = old, top2 = old;
        int64_t j = 0;
        for (; j + 1 < keys; j += 2) {
            top = S::max(S::load(column + j * kRows), top);
            top2 = S::max(S::load(column + (j + 1) * kRows), top2);
        }
        if (j < keys) top = S::max(S::load(column + j * kRows), top);
        top = S::max(top2, top);
        typename S::Vector sum{};
        for (j = 0; j < keys; ++j) {
            const typename S::Vector weight = exponential(S::load(column + j * kRows) - top);
            S::store(column + j * kRows, weight);
            sum += weight;
        }
        const typename S::Vector factor = exponential(old - top);
        S::store(keep + v * S::kLanes, factor);
        S::store(state.maximum + v * S::kLanes, top);
        S::store(state.total + v * S::kLanes, factor * S::load(state.total + v * S::kLanes) + sum);
    }
}

// The softmax state of a tile over one segment of keys, its output already divided by total. Rows that see no key get
// total 0 and output 0.
template <typename T>
void attend(const Tile& tile, const Segment<T>& segment, T softcap, const T* queries, T* scores, State<T>& state) {
    using S = Simd<T>;
    constexpr int64_t kBlocks = (kRows + kBlock - 1) / kBlock;
    bool started[kBlocks] = {};
    T keep[kRows];
    std::fill(state.maximum, state.maximum + kRows, kLowest<T>);
    std::fill(state.total, state.total + kRows, T(0));
    const int64_t vectors = (tile.count + S::kLanes - 1) / S::kLanes;
    const int64_t columns = tile.head_dim / S::kLanes;  // whole vectors; the rest goes one by one
    const int64_t begin = segment.first_key(tile.token(0)), end = segment.end_key(tile.token(tile.count - 1));

    for (int64_t start = begin; start < end; start += kKeys) {
        const int64_t keys = std::min(kKeys, end - start);
        for (int64_t j = 0; j < keys; j += kBlock) {
            const int64_t some = std::min(kBlock, keys - j);
            const int64_t low = tile.first_row(segment, start + j) / S::kLanes;
            const int64_t high = (tile.end_row(segment, start + j + some - 1) + S::kLanes - 1) / S::kLanes;
            multiply_block<T>(some, high - low, segment.key + (start + j) * segment.key_stride, segment.key_stride, 1,
                              queries + low * S::kLanes, kRows, tile.head_dim, nullptr,
                              scores + j * kRows + low * S::kLanes, kRows);
        }
        for (int64_t j = 0; j < keys; ++j) {
            T* row = scores + j * kRows;
            if (softcap != 0) {
                for (int64_t v = 0; v < vectors; ++v) {
                    T* x = row + v * S::kLanes;
                    S::store(x, softcap * hyperbolic_tangent(S::load(x)));
                }
            }
            // −∞ where maximum starts finite, so that a row which sees no key yet gives e^−∞ = 0 and not NaN.
            std::fill(row, row + tile.first_row(segment, start + j), -std::numeric_limits<T>::infinity());
            std::fill(row + tile.end_row(segment, start + j), row + kRows, -std::numeric_limits<T>::infinity());
        }
        soften<T>(keys, vectors, scores, state, keep);
        for (int64_t r = 0; r < tile.count; r += kBlock) {
            const int64_t some = std::min(kBlock, tile.count - r);
            const int64_t low = std::max(start, segment.first_key(tile.token(r)));
            const int64_t depth = std::min(start + keys, segment.end_key(tile.token(r + some - 1))) - low;
            if (depth <= 0) continue;  // keep is 1 for rows that see none of these keys
            const T* factor = started[r / kBlock] ? keep + r : nullptr;
            const T *weight = scores + (low - start) * kRows + r, *value = segment.value + low * segment.value_stride;
            T* output = state.output + r * tile.head_dim;
            for (int64_t v = 0; v < columns; v += kVectors) {
                const int64_t d = v * S::kLanes;
                multiply_block<T>(some, std::min(kVectors, columns - v), weight, 1, kRows, value + d,
                                  segment.value_stride, depth, factor, output + d, tile.head_dim);
            }
            for (int64_t d = columns * S::kLanes; d < tile.head_dim; ++d) {
                for (int64_t i = 0; i < some; ++i) {
                    T sum = factor == nullptr ? 0 : factor[i] * output[i * tile.head_dim + d];
                    for (int64_t k = 0; k < depth; ++k) {
                        sum += weight[k * kRows + i] * value[k * segment.value_stride + d];
                    }
                    output[i * tile.head_dim + d] = sum;
                }
            }
            started[r / kBlock] = true;
        }
    }
    for (int64_t r = 0; r < tile.count; ++r) {
        T* output = state.output + r * tile.head_dim;
        if (!started[r / kBlock]) {
            std::fill(output, output + tile.head_dim, T(0));
        } else {
            const T inverse = state.total[r] == 0 ? T(0) : 1 / state.total[r];
            for (int64_t d = 0; d < tile.head_dim; ++d) output[d] *= inverse;
        }
    }
}

// share = b / (a + b) and rest = a / (a + b) of the softmax masses of two states.
template <typename T>
void split_mass(const State<T>& a, const State<T>& b, T* rest, T* share) {
    using S = Simd<T>;
    for (int64_t r = 0; r < kRows; r += S::kLanes) {
        const typename S::Vector top = S::max(S::load(a.maximum + r), S::load(b.maximum + r));
        const typename S::Vector mass_a = S::load(a.total + r) * exponential(S::load(a.maximum + r) - top);
        const typename S::Vector mass_b = S::load(b.total + r) * exponential(S::load(b.maximum + r) - top);
        S::store(rest + r, mass_a / (mass_a + mass_b));
        S::store(share + r, mass_b / (mass_a + mass_b));
    }
}

// p − h from p, 1 − p, h, 1 − h: the larger times the other's rest times 1 − the ratio of the two prefixes' masses.
template <typename T>
void subtract_shares(const State<T>& with, const State<T>& without, const T* p, const T* not_p, const T* h,
                     const T* not_h, T* difference) {
    using S = Simd<T>;
    for (int64_t r = 0; r < kRows; r += S::kLanes) {
        const typename S::Vector top = S::max(S::load(with.maximum + r), S::load(without.maximum + r));
        const typename S::Vector mass_p = S::load(with.total + r) * exponential(S::load(with.maximum + r) - top);
        const typename S::Vector mass_h = S::load(without.total + r) * exponential(S::load(without.maximum + r) - top);
        const typename S::Vector larger =
            S::max(S::max(mass_p, mass_h), S::fill(std::numeric_limits<T>::min()));  // 0 where neither is seen
        const typename S::Vector product =
            mass_p > mass_h ? S::load(p + r) * S::load(not_h + r) : S::load(h + r) * S::load(not_p + r);
        S::store(difference + r, product * ((mass_p - mass_h) / larger));
    }
}

// One tile of paired_attention: attends to own keys and prefixes and writes both outputs.
template <typename In, typename T>
void paired_tile(const Tile& tile, const QueryRows<In>& rows, const Segment<T>& own, const Segment<T>& with,
                 const Segment<T>* without, T scale, T softcap, Scratch<T>& scratch, const OutputRows<In>& output,
                 const OutputRows<T>& delta) {
    gather_queries<In, T>(tile, rows, scale, scratch.queries);
    attend(tile, own, softcap, scratch.queries, scratch.scores, scratch.states[0]);
    attend(tile, with, softcap, scratch.queries, scratch.scores, scratch.states[1]);
    T p[kRows], not_p[kRows], h[kRows], not_h[kRows], difference[kRows];
    split_mass(scratch.states[0], scratch.states[1], not_p, p);
    if (without != nullptr) {
        attend(tile, *without, softcap, scratch.queries, scratch.scores, scratch.states[2]);
        split_mass(scratch.states[0], scratch.states[2], not_h, h);
        subtract_shares(scratch.states[1], scratch.states[2], p, not_p, h, not_h, difference);
    }
    for (int64_t r = 0; r < tile.count; ++r) {
        const T* __restrict o_s = scratch.states[0].output + r * tile.head_dim;
        const T* __restrict o_p = scratch.states[1].output + r * tile.head_dim;
        In* __restrict out = output.row(tile.first + r);
        T* __restrict change = delta.row(tile.first + r);
        if (without == nullptr) {
            for (int64_t d = 0; d < tile.head_dim; ++d) {
                out[d] = static_cast<In>(o_s[d]);
                change[d] = p[r] * (o_p[d] - o_s[d]);
            }
        } else {
            const T* __restrict o_h = scratch.states[2].output + r * tile.head_dim;
            for (int64_t d = 0; d < tile.head_dim; ++d) {
                out[d] = static_cast<In>(not_h[r] * o_s[d] + h[r] * o_h[d]);
                change[d] = p[r] * (o_p[d] - o_h[d]) + difference[r] * (o_h[d] - o_s[d]);
            }
        }
    }
}

// One tile of shared_prefix_attention; prefix is null for rows that see none.
template <typename In, typename T, typename Out>
void shared_tile(const Tile& tile, const QueryRows<In>& rows, const Segment<T>& own, const Segment<T>* prefix, T scale,
                 T softcap, Scratch<T>& scratch, const OutputRows<Out>& output) {
    gather_queries<In, T>(tile, rows, scale, scratch.queries);
    attend(tile, own, softcap, scratch.queries, scratch.scores, scratch.states[0]);
    T p[kRows], not_p[kRows];
    if (prefix != nullptr) {
        attend(tile, *prefix, softcap, scratch.queries, scratch.scores, scratch.states[1]);
        split_mass(scratch.states[0], scratch.states[1], not_p, p);
    }
    for (int64_t r = 0; r < tile.count; ++r) {
        const T* __restrict o_s = scratch.states[0].output + r * tile.head_dim;
        Out* __restrict out = output.row(tile.first + r);
        if (prefix == nullptr) {
            for (int64_t d = 0; d < tile.head_dim; ++d) out[d] = static_cast<Out>(o_s[d]);
        } else {
            const T* __restrict o_p = scratch.states[1].output + r * tile.head_dim;
            for (int64_t d = 0; d < tile.head_dim; ++d) out[d] = static_cast<Out>(not_p[r] * o_s[d] + p[r] * o_p[d]);
        }
    }
}
