// Which kernel multiplies, and how its work is cut.
#include <limits>

#include "gemm.h"

namespace fos::cuda {
namespace {

using Multiply = cudaError_t (*)(const Gemm&, cudaStream_t);

// By dtype and output.
constexpr Multiply kMany[2][3] = {{multiply_bf16_linear, multiply_bf16_gated, multiply_bf16_fp32},
                                  {multiply_fp16_linear, multiply_fp16_gated, multiply_fp16_fp32}};
constexpr Multiply kFew[2][3] = {{multiply_few_bf16_linear, multiply_few_bf16_gated, multiply_few_bf16_fp32},
                                 {multiply_few_fp16_linear, multiply_few_fp16_gated, multiply_few_fp16_fp32}};

}  // namespace

int strips_at_once(int64_t strips, int64_t blocks, int64_t columns, int multiprocessors) {
  constexpr double kUnit = 0.5;  // pairs of steps that a warp could multiply while a unit begins and ends, on an H200
  const int64_t pairs = ceil_div(columns, 2 * kStep);
  int best = 1;
  double least = 0;
  for (int at_once = 1; at_once <= 8; ++at_once) {
    const int64_t units = ceil_div(blocks * ceil_div(strips, at_once), multiprocessors);
    const int64_t warps = kFewWarps / at_once < pairs ? kFewWarps / at_once : pairs;
    if (columns % (2 * kStep) != 0 && warps < pairs) break;  // x has to come at once
    const double cost = static_cast<double>(units) * (static_cast<double>(ceil_div(pairs, warps)) + kUnit);
    if (at_once == 1 || cost < least) {
      best = at_once;
      least = cost;
    }
  }
  return best;
}

int tiles_at_once(int64_t row_tiles, int64_t blocks, int tokens, int multiprocessors) {
  return tokens <= 128 && blocks * (row_tiles / 2) >= multiprocessors ? 2 : 1;
}

int row_tiles_beside(int64_t blocks, int tokens, int64_t outputs, int64_t columns, bool quantized, int multiprocessors) {
  // A multiprocessor's four warps quantize a row's 512 columns in about 0.8 microseconds, in which a product goes on by two
  // steps of a tile: a block's rows have to be quantized while their tiles are multiplied.
  const bool keeps_up = !quantized || columns >= 32 * tokens;
  const int64_t first = ceil_div(outputs, kRowTile / 2), second = ceil_div(columns, kRowTile);
  if (!run_at_once(tokens) || !keeps_up || tiles_at_once(first, blocks, tokens, multiprocessors) != 2 ||
      tiles_at_once(second, blocks, tokens, multiprocessors) != 2) {
    return 0;
  }
  return static_cast<int>(ceil_div(first, 2));
}

Launch launch_of(int rows, int columns, int outputs, bool any_rows, const Chip& chip) {
  const int64_t row_tiles = ceil_div(outputs, kRowTile), steps = ceil_div(columns, kStep);
  // Where two tiles of 32 rows at a time keep nearly the whole chip busy, they take less time than the kernel for few rows
  // with 16: 0.87 of it for 28672 rows of a weight on an H200.
  const int64_t at_a_time = 2 * chip.multiprocessors;
  const bool full = rows > 8 && 5 * row_tiles >= 4 * at_a_time * ceil_div(row_tiles, at_a_time);
  if (rows <= kFewRows && !any_rows && !full && few_rows_take(columns)) {
    return {rows <= 8 ? 8 : 16, 1, strips_at_once(ceil_div(outputs, 16), 1, columns, chip.multiprocessors)};
  }
  // What a step takes on a multiprocessor with one tile, or with two at once (of 256 tokens: one after the other), and
  // what it takes to add the sums of a cluster; in microseconds on an H200.
  constexpr struct {
    int tokens;
    double one, two, add;
  } kTiles[] = {{32, 0.24, 0.47, 1.2}, {64, 0.28, 0.54, 3.0}, {128, 0.37, 0.71, 4.0}, {256, 0.65, 1.30, 5.5}};
  const auto cost = [&](const auto& tile, int split, int64_t tokens) {
    const int64_t tiles = row_tiles * ceil_div(tokens, tile.tokens);
    // Clusters beyond those that run at once wait until another one has ended.
    if (split > 1 && tiles > (any_rows ? chip.multiprocessors / split : chip.clusters[split])) {
      return std::numeric_limits<double>::infinity();
    }
    const int64_t each = ceil_div(tiles * split, chip.multiprocessors);
    const double step = static_cast<double>(each / 2) * tile.two + static_cast<double>(each % 2) * tile.one;
    return static_cast<double>(ceil_div(steps, split)) * step + (split > 1 ? tile.add : 0.0);
  };
  Launch best = {0, 1, 1};
  double least = 0;
  for (const auto& tile : kTiles) {
    for (int split = 1; split <= kMostShared && split <= steps; ++split) {
      const double taken = cost(tile, split, rows);
      if (best.tokens == 0 || taken < least) {
        best = {tile.tokens, split, 1};
        least = taken;
      }
    }
  }
  if (any_rows) {
    // The order of additions is the same for any number of rows: split as is best for 64.
    best.split = 1;
    for (int split = 2; split <= kMostShared && split <= steps; ++split) {
      if (cost(kTiles[1], split, 64) < cost(kTiles[1], best.split, 64)) best.split = split;
    }
    return best;
  }
  // Slices of two tiles at once; and what it takes to write, read and add their sums.
  constexpr struct {
    int tokens;
    double step, add;
  } kSliced[] = {{64, 0.42, 4.3}, {128, 0.60, 2.3}};
  constexpr double kByte = 0.6e-6;
  constexpr int kLeastSteps = 4;  // of a slice
  for (const auto& tile : kSliced) {
    const int64_t tiles = ceil_div(row_tiles, 2) * ceil_div(rows, tile.tokens);
    for (int split = 2; split <= kMostSlices && tiles * split <= chip.multiprocessors; ++split) {
      if (steps / split < kLeastSteps) break;
      const double bytes = static_cast<double>(split) * static_cast<double>(rows) * static_cast<double>(outputs) * 4.0;
      const double taken = static_cast<double>(ceil_div(steps, split)) * tile.step + tile.add + bytes * kByte;
      if (taken < least) {
        best = {tile.tokens, split, 2};
        least = taken;
      }
    }
  }
  return best;
}

cudaError_t multiply(const Gemm& g, cudaStream_t stream) {
  if (g.rows == 0 || g.block_limit == 0) return cudaSuccess;
  const auto& kernels = g.tokens <= kFewRows ? kFew : kMany;
  const cudaError_t error = kernels[static_cast<int>(g.dtype)][static_cast<int>(g.output)](g, stream);
  if (error != cudaSuccess || g.sums == nullptr) return error;
  return g.dtype == Dtype::bf16 ? add_slices_bf16_linear(g, stream) : add_slices_fp16_linear(g, stream);
}

}  // namespace fos::cuda
