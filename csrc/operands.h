// What a quantizer call reads and writes: plain pointers, so that kernels need no torch headers.
#pragma once

#include <cstdint>

#include "nvfp4.cuh"

namespace fos {

enum class Dtype : int { bf16 = 0, fp16 = 1, fp32 = 2 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

// One decode scale for the tensor, one per row, or one per expert (rows sorted by expert).
enum class Scope : int { tensor = 0, token = 1, expert = 2 };

struct Recipe {
  Metric metric;
  Domain domain;
  bool adaptive;
  float encoded_amax;  // scale_max * 6
};

struct Quantize {
  // Input: x [M, K] contiguous, or [M, 2K] where silu(x[:, :K]) * x[:, K:], rounded to dtype, is quantized.
  const void* x;
  Dtype dtype;
  bool gated;
  int64_t rows, columns;
  Recipe recipe;
  Scope scope;
  // amax given: [] for tensor, [M] for token ([] where amax_is_shared), [E] for expert; null to compute it.
  const float* amax;
  bool amax_is_shared;
  // Scope::expert: rows offsets[e] .. offsets[e + 1] - 1 belong to expert e; ascending, within 0..M.
  const int32_t* offsets;
  int64_t experts;
  // Output: either packed [M, K/2] and block_scale, or values [M, K] in dtype.
  uint8_t* packed;
  uint8_t* block_scale;
  Layout layout;
  int64_t scale_rows;  // padded; with experts in tiles, each expert starts at a multiple of the tile's rows
  // CPU: the row each row's scales go to (-1: nowhere), or null for its own; a GPU finds it itself.
  const int64_t* scale_row_of;
  void* values;
  float* decode_scale;  // [], [M] or [E]
  // On Hopper, of values per token: x has been sorted for experts, row_of_slot [M, top_k] says where to (-1: nowhere), and
  // what becomes of row m goes to the rows of all of its slots, in values, decode_scale and slot_of_row. x was there before
  // the kernel that wrote row_of_slot let this one start: only writing waits for that one. Else null.
  const int32_t* row_of_slot;
  int top_k;
  int32_t* slot_of_row;
  // On GPUs, of values per token: how many of the rows are somebody's. The others come last, and what is made of them means
  // nothing. Else null.
  const int32_t* rows_in_use;
  // On Hopper, of values per token that take the place of x: x is a product of experts, rows sorted by them, which is still
  // being made. Row m is there once progress[m] == row_tiles; once it is quantized, kQuantized stands there. That is what
  // rows of nobody, which come last, begin with. Else null.
  int32_t* progress;
  int row_tiles;
};

// What the quantizer that runs beside such products has of a multiprocessor, and they leave it.
constexpr int kBesideThreads = 128, kBesideRegisters = 72;  // a thread's
constexpr int kBesideMemory = 2048;  // bytes of shared memory: what any CTA takes by being there, and as much to spare
constexpr int32_t kQuantized = -1;

struct Dequantize {
  const uint8_t* packed;       // [rows, columns / 2]
  const uint8_t* block_scale;  // [rows, columns / 16], row-major
  const float* decode_scale;   // [rows], or null for 1
  int64_t rows, columns;
  Dtype dtype;
  void* out;  // [rows, columns]
};

// out = (((x W^T) * token_scale) * decode_scale) + bias, each step in fp32.
struct Linear {
  const void* x;  // [.., columns]
  Dtype x_dtype;
  int64_t tokens, columns, outputs;
  const uint8_t* codes;        // [outputs / 16, columns / 16, 8 pairs of columns, 16 rows]: even column in the low nibble
  const uint8_t* block_scale;  // [outputs / 16, columns / 16, 16 rows]; rows that fill up the last strip are 0
  const float* decode_scale;   // [outputs]
  const float* token_scale;    // of the rows of x, or null for 1
  const float* bias;           // [outputs], or null for 0
  void* out;                   // [.., outputs]
  Dtype out_dtype;
  const int32_t* x_row;    // token -> row of x, or null for the token itself
  const int32_t* out_row;  // token -> row of out, or null
};

// out = sum of a token's slots in their order, each times its weight, in fp32.
struct Combine {
  const float* slots;    // [tokens, top_k, columns]
  const float* weights;  // [tokens, top_k], or null for 1
  int64_t tokens, top_k, columns;
  Dtype dtype;
  void* out;  // [tokens, columns]
};

}  // namespace fos
