// Streaming rank-one accumulation on CPUs. The rows are taken in blocks; each block is widened, scaled and packed once
// into scratch that stays in cache, whatever the inputs' dtype, and multiplied there by kernels of accumulate_tile.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "accumulate_block.h"
#include "checks.h"
#include "instructions.h"
#include "tasks.h"

namespace thought_kernels {
namespace accumulation {

namespace {

constexpr const char* kName = "accumulate_cpp";
constexpr int64_t kDepth = 192;              // rows that are multiplied before sums leave the registers
constexpr int64_t kMaxRows = 960;            // per block: with more it leaves the cache
constexpr int64_t kScratchBytes = 32 << 20;  // for all panels together, unless kDepth rows need more
constexpr int64_t kSumBytes = 50 << 20;      // cross and gram up to here are summed over all blocks before they change
constexpr int64_t kTile = 320;          // edge: a tile's sums and its panels of kDepth rows fit into a core's L2 cache
constexpr int64_t kTasksPerThread = 5;  // enough that a thread which lost its processor holds up little

// A rectangle of cross, or one of gram that touches or lies below the diagonal, with all its sums over some rows. It
// consists of whole panels: its last rows and columns may lie outside of the matrix.
struct Tile {
    bool of_gram;
    int64_t row, height, column, width;
    int64_t offset = 0;  // among the sums of all tiles
};

// About `edge` and a multiple of `unit`, such that equal steps of it cover n.
int64_t even_step(int64_t n, int64_t edge, int64_t unit) {
    const int64_t parts = std::max<int64_t>(1, (n + edge - 1) / edge);
    return round_up((n + parts - 1) / parts, unit);
}

template <typename T>
std::vector<Tile> tiles_of_edge(const Kernels<T>& kernels, int64_t d_out, int64_t d_in, bool gram, int64_t edge) {
    std::vector<Tile> tiles;
    const auto add_row = [&](bool of_gram, int64_t row, int64_t height, int64_t columns) {
        const int64_t step = even_step(columns, edge, kernels.width);
        for (int64_t column = 0; column < columns; column += step) {
            const int64_t width = std::min(step, round_up(columns - column, kernels.width));
            tiles.push_back({of_gram, row, height, column, width});
        }
    };
    const int64_t height = even_step(d_out, edge, kernels.height);
    for (int64_t row = 0; row < d_out; row += height) {
        add_row(false, row, std::min(height, round_up(d_out - row, kernels.height)), d_in);
    }
    const int64_t panel = even_step(d_in, edge, kernels.height);
    for (int64_t row = 0; gram && row < d_in; row += panel) {
        const int64_t end = std::min(d_in, row + panel);
        add_row(true, row, round_up(end - row, kernels.height), end);
    }
    return tiles;
}

// The largest tiles of which there are enough for the threads; the biggest first, so that the last ones are short.
template <typename T>
std::vector<Tile> plan_tiles(const Kernels<T>& kernels, int64_t d_out, int64_t d_in, bool gram) {
    std::vector<Tile> tiles;
    for (int64_t edge : {kTile, 3 * kTile / 4, kTile / 2, 3 * kTile / 8}) {
        tiles = tiles_of_edge(kernels, d_out, d_in, gram, edge);
        if (static_cast<int64_t>(tiles.size()) >= kTasksPerThread * at::get_num_threads()) break;
    }
    std::stable_sort(tiles.begin(), tiles.end(),
                     [](const Tile& a, const Tile& b) { return a.height * a.width > b.height * b.width; });
    int64_t offset = 0;
    for (Tile& tile : tiles) {
        tile.offset = offset;
        offset += tile.height * tile.width;
    }
    return tiles;
}

// A tile's sums, column panel by column panel as multiply_tile leaves them: neighbours of element (i, j) of the matrix
// up to the panel's end.
template <typename T>
struct Product {
    const T* data;
    int64_t panel;
    const Tile& tile;

    const T* from(int64_t i, int64_t j) const {
        const int64_t row = i - tile.row, column = j - tile.column;
        return data + (column / panel * tile.height + row) * panel + column % panel;
    }
};

// The tile's part of cross += coefficient · product.
template <typename T>
void add_product(const at::Tensor& cross, const Product<T>& product, T coefficient) {
    constexpr int64_t kRows = 8;  // of each panel at a time: both sides are read in long pieces
    const Tile& tile = product.tile;
    const int64_t row_stride = cross.stride(0), column_stride = cross.stride(1);
    const int64_t row_end = std::min(cross.size(0), tile.row + tile.height);
    const int64_t column_end = std::min(cross.size(1), tile.column + tile.width);
    T* const out = cross.mutable_data_ptr<T>();
    for (int64_t row = tile.row; row < row_end; row += kRows) {
        for (int64_t j = tile.column; j < column_end; j += product.panel) {
            const int64_t width = std::min(product.panel, column_end - j);
            const T* x = product.from(row, j);
            for (int64_t i = row; i < std::min(row + kRows, row_end); ++i, x += product.panel) {
                T* const y = out + i * row_stride + j * column_stride;
                if (column_stride == 1) {
                    for (int64_t c = 0; c < width; ++c) y[c] += coefficient * x[c];
                } else {
                    for (int64_t c = 0; c < width; ++c) y[c * column_stride] += coefficient * x[c];
                }
            }
        }
    }
}

// The tile's part of gram += coefficient · product: what lies below the diagonal is added on both sides, so that both
// halves receive the same numbers. Square by square, since a whole column would meet a new cache line at every element.
template <typename T>
void add_symmetric(const at::Tensor& gram, const Product<T>& product, T coefficient) {
    constexpr int64_t kEdge = 16;  // divides every panel or is divided by it
    const Tile& tile = product.tile;
    const int64_t row_stride = gram.stride(0), column_stride = gram.stride(1), n = gram.size(0);
    const int64_t row_end = std::min(n, tile.row + tile.height), column_end = std::min(n, tile.column + tile.width);
    const int64_t edge = std::min(kEdge, product.panel);
    T* const out = gram.mutable_data_ptr<T>();
    T transposed[kEdge][kEdge];
    for (int64_t j = tile.column; j < column_end; j += edge) {
        for (int64_t i = tile.row; i < row_end; i += edge) {
            const int64_t rows = std::min(edge, row_end - i), columns = std::min(edge, column_end - j);
            if (i + rows <= j) continue;
            const T* x = product.from(i, j);
            for (int64_t r = 0; r < rows; ++r, x += product.panel) {
                T* const y = out + (i + r) * row_stride + j * column_stride;
                for (int64_t c = 0; c < columns; ++c) transposed[c][r] = x[c];
                for (int64_t c = 0; c < std::min(columns, i + r - j + 1); ++c) {
                    y[c * column_stride] += coefficient * x[c];
                }
            }
            for (int64_t c = 0; c < columns; ++c) {
                T* const y = out + (j + c) * row_stride + i * column_stride;
                for (int64_t r = std::max<int64_t>(0, j + c + 1 - i); r < rows; ++r) {
                    y[r * column_stride] += coefficient * transposed[c][r];
                }
            }
        }
    }
}

// One tile's sums over the block's rows: on top of those of all blocks before it if they are `kept`, and added to cross
// or gram after the last block; formed in `scratch` and added at once if they are not kept (null).
template <typename T>
void multiply(const Block<T>& block, const Block<T>& next, const std::vector<Tile>& tiles, int64_t index, T* kept,
              T* scratch, bool first) {
    const Tile& tile = tiles[index];
    const bool last = next.n == 0;
    const Arguments& call = block.call;
    const Panels<T>&left = tile.of_gram ? block.a : block.d, &right = block.s;
    T* const sums = kept == nullptr ? scratch : kept + tile.offset;
    const bool resume = kept != nullptr && !first;
    const int64_t diagonal = tile.of_gram ? tile.column - tile.row : -tile.width;
    // Every tile fetches its share of the rows that the next block is made from, supposing that none is left out.
    const int64_t count = tiles.size(), parts = tile.height / left.width * (tile.width / right.width);
    const int64_t begin = next.n * index / count, rows = next.n * (index + 1) / count - begin;
    const int64_t row = rows > 0 ? next.index[begin] : 0;
    const Soon soon[2] = {next.delta.soon(row, rows, parts), next.activation.soon(row, rows, parts)};
    for (int64_t k = 0; k < block.n; k += right.depth) {
        const int64_t depth = std::min(right.depth, block.n - k);
        block.kernels.multiply_tile(left.step(k, tile.row), tile.height, right.step(k, tile.column), tile.width,
                                    right.pitch, depth, diagonal, soon, resume || k > 0, sums);
    }
    if (kept != nullptr && !last) return;
    const Product<T> product{sums, right.width, tile};
    if (tile.of_gram) {
        add_symmetric<T>(*call.gram, product, static_cast<T>(call.coefficient));
    } else {
        add_product<T>(call.cross, product, static_cast<T>(call.coefficient));
    }
}

template <typename T>
void add_sums(const at::Tensor& target, const std::vector<double>& sums, double coefficient) {
    T* const out = target.mutable_data_ptr<T>();
    for (size_t k = 0; k < sums.size(); ++k) {
        T& y = out[static_cast<int64_t>(k) * target.stride(0)];
        y = static_cast<T>(static_cast<double>(y) + coefficient * sums[k]);
    }
}

template <typename T>
void run(Arguments& call, Instructions instructions) {
    const Kernels<T>& kernels = choose_kernels<T>(instructions);
    const Rows<T> delta(call.delta, kernels, call.pair), activation(call.activation, kernels, call.pair);
    const int64_t rows = call.activation.size(0), d_out = delta.columns, d_in = activation.columns;
    const int64_t row_bytes = std::max<int64_t>(1, 2 * (2 * d_in + d_out) * sizeof(T));  // of both blocks
    // Few rows are enough for a block, and stay in cache, where cross and gram need not change after each of them. Not
    // a question of the tiles, which depend on the threads: the order of additions must not. A few hundred rows are one
    // block anyway, and need no memory for sums.
    const int64_t sum_bytes = d_in * (d_out + (call.gram ? d_in : 0)) * static_cast<int64_t>(sizeof(T));
    const int64_t affordable = std::clamp(kScratchBytes / row_bytes / kDepth * kDepth, kDepth, kMaxRows);
    const bool keep = rows > 3 * kDepth && sum_bytes <= kSumBytes;
    const int64_t size = std::min(rows, keep ? kDepth : affordable);
    const int64_t depth = std::min(kDepth, round_up(size, kRowsPerTask));
    const std::vector<Tile> tiles = plan_tiles(kernels, d_out, d_in, call.gram.has_value());
    const int64_t kept_size = keep ? tiles.back().offset + tiles.back().height * tiles.back().width : 0;
    const at::Tensor kept_memory = at::empty({kept_size}, call.cross.options());
    T* const kept = keep ? kept_memory.mutable_data_ptr<T>() : nullptr;
    // Every thread's room for a tile's sums and for copies of rows: nothing is allocated once an accumulator changes.
    const int64_t sums_size = keep ? 0 : tiles.front().height * tiles.front().width;
    const int64_t room = round_up(sums_size + Block<T>::copies(d_out, d_in), 64);
    const at::Tensor scratch_memory = at::empty({at::get_num_threads() * room}, call.cross.options());
    T* const scratch = scratch_memory.mutable_data_ptr<T>();
    std::vector<double> delta_sum(call.delta_sum ? d_out : 0), activation_sum(call.activation_sum ? d_in : 0);
    std::vector<double> moments(4);

    // While the products of one block are formed, idle threads prepare the next: one wait for all threads per block.
    Block<T> first(call, kernels, delta, activation, size, depth);
    Block<T> second(call, kernels, delta, activation, rows > size ? size : 0, depth);
    Block<T>*block = &first, *next = &second;
    int64_t cursor = 0;
    block->take(cursor);
    for_each_task(block->tasks(block->n),
                  [&](int64_t task, int64_t worker) { block->prepare(task, scratch + worker * room + sums_size); });
    for (bool started = false; block->n > 0; started = true, std::swap(block, next)) {
        next->take(cursor);
        const int64_t tile_count = tiles.size();
        for_each_task(tile_count + next->tasks(next->n), [&](int64_t task, int64_t worker) {
            T* const mine = scratch + worker * room;
            if (task < tile_count) {
                multiply(*block, *next, tiles, task, kept, mine, !started);
            } else {
                next->prepare(task - tile_count, mine + sums_size);
            }
        });
        const double* sum = block->sums.data();
        for (int64_t task = 0; task < block->tasks(block->n); ++task) {
            for (double& total : delta_sum) total += *sum++;
            for (double& total : activation_sum) total += *sum++;
        }
        if (call.moments) {
            for (int64_t k = 0; k < block->n; ++k) {
                moments[0] += block->weight[k];
                moments[1] += block->factor[k];
                moments[2] += block->energy[k];
            }
            moments[3] += static_cast<double>(block->n);
        }
    }

    if (call.delta_sum) add_sums<T>(*call.delta_sum, delta_sum, call.coefficient);
    if (call.activation_sum) add_sums<T>(*call.activation_sum, activation_sum, call.coefficient);
    if (call.moments) add_sums<double>(*call.moments, moments, 1.0);
}

void accumulate(at::Tensor cross, const at::Tensor& delta, const at::Tensor& activation, bool pair,
                const std::optional<at::Tensor>& weights, int64_t normalization, double coefficient,
                std::optional<at::Tensor> gram, std::optional<at::Tensor> delta_sum,
                std::optional<at::Tensor> activation_sum, std::optional<at::Tensor> moments,
                const std::optional<std::string>& instructions) {
    TORCH_CHECK_VALUE(delta.dim() == 2, kName, ": delta must be [rows, d_out], got ", delta.sizes());
    TORCH_CHECK_VALUE(activation.dim() == 2, kName, ": activation must be [rows, d_in], got ", activation.sizes());
    TORCH_CHECK_VALUE(normalization >= kNone && normalization <= kSquaredNorm, kName,
                      ": normalization must be 0, 1 or 2, got ", normalization);
    const int64_t rows = activation.size(0), d_out = delta.size(1), d_in = activation.size(1);
    check_shape(kName, "delta", delta, {rows, pair ? d_in : d_out});
    check_shape(kName, "weights", weights, {rows});
    check_shape(kName, "cross", cross, {d_out, d_in});
    check_shape(kName, "gram", gram, {d_in, d_in});
    check_shape(kName, "delta_sum", delta_sum, {d_out});
    check_shape(kName, "activation_sum", activation_sum, {d_in});
    check_shape(kName, "moments", moments, {4});
    const at::ScalarType dtype = cross.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, kName, ": cross must be float32 or float64, got ",
                     dtype);
    check_dtype(kName, "gram", gram, dtype);
    check_dtype(kName, "delta_sum", delta_sum, dtype);
    check_dtype(kName, "activation_sum", activation_sum, dtype);
    check_dtype(kName, "moments", moments, at::kDouble);
    if (rows == 0) return;

    at::AutoDispatchBelowADInplaceOrView no_autograd;
    std::optional<at::Tensor> wide;
    if (weights.has_value()) wide = weights->to(at::kDouble).contiguous();
    Arguments call{cross,       delta, activation, pair,           wide,   normalization,
                   coefficient, gram,  delta_sum,  activation_sum, moments};
    const Instructions set = choose_instructions(kName, instructions);
    if (dtype == at::kFloat) {
        run<float>(call, set);
    } else {
        run<double>(call, set);
    }
}

}  // namespace
}  // namespace accumulation

TORCH_LIBRARY_IMPL(thought_kernels, CPU, m) {
    m.impl("accumulate_cpp", &accumulation::accumulate);
}

}  // namespace thought_kernels
