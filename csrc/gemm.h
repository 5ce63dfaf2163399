// What bindings_sm90.cpp calls of the kernels for Hopper and of experts.cu: plain pointers, as in operands.h.
#pragma once

#include <cuda_runtime_api.h>

#include "operands.h"

namespace fos::cuda {

constexpr int kRowTile = 128;   // weight rows of a tile
constexpr int kStep = 64;       // columns of a step: a tile of codes has kRowTile * kStep / 2 bytes
constexpr int kCodeBytes = kRowTile * kStep / 2;
constexpr int kScaleBytes = kRowTile * kStep / kBlock;

// silu_pinned is the specification's to the bit, for codes that follow; silu is the same to 2^-16 of itself, and 0 for
// gates below -87.
enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2, silu_pinned = 3 };

// What is made of the fp32 sums: y in x's dtype; activation(gate) * up in x's dtype, from weights whose rows alternate
// between 8 of gate and 8 of up; or y in fp32.
enum class Output : int { linear = 0, gated = 1, fp32 = 2 };

// Rows of x that one expert multiplies.
struct Block {
  int32_t expert, begin, end, unused;
};

// Powers of two as arguments, so that no compiler knows them to be such: a multiplication by one is a shift on another
// pipe than logic and shifts, which unpacking has most of.
struct Powers {
  uint32_t two = 2, four = 4, eight = 8, sixteen = 16, sixty_four = 64;
};

// ((x W^T) * token_scale) * decode_scale + bias in fp32, for one weight or for the experts that rows are sorted by.
struct Gemm {
  const void* x;  // [rows, columns], at a multiple of 16 bytes
  Dtype dtype;    // of x and, unless fp32, of out; bf16 or fp16
  Output output;
  Activation activation;
  int rows, columns, outputs;
  int row_tiles, steps;        // of the weight, or of each expert's
  const uint8_t* codes;        // [experts, row_tiles, steps, kCodeBytes]: see tiles_sm90.cu
  const uint8_t* block_scale;  // [experts, row_tiles, steps, kScaleBytes]
  const float* decode_scale;   // [experts, weight rows]
  const float* token_scale;    // or null for 1
  const int32_t* token_of;     // of few rows: row that is multiplied -> row of x and of token_scale; null: the row itself
  const void* bias;            // [outputs] or null
  Dtype bias_dtype;
  void* out;                 // [.., outputs]
  const int32_t* out_row;    // row of x -> row of out; null: the row itself
  const Block* blocks;       // of experts, each of at most `tokens` rows; null: one weight for all rows
  const int32_t* blocks_in_use;  // on the device
  int block_limit;           // blocks there is room for
  // Of experts, where both products run at once: how far rows are. The gated one counts the tiles of weight rows that it has
  // made of a row; the other one waits until it finds `whole`: the number of all, or kQuantized, which also tells the gated
  // one that a quantizer runs beside both (Quantize::progress). Else null, and kernels wait for kernels.
  int32_t* progress;
  int32_t whole;
  Powers powers;
  // How it is launched.
  int tokens;  // rows of x in a tile: 32, 64 or 128; 192 of experts, 256 of one weight; 8, or 16 of one weight, are few
  int strips;  // weight rows that a CTA multiplies with the same x at once: 1 to 8 times 16 of few rows of x; else 1 or 2
               // times 128: 2 of experts, up to 128 tokens (with 192 it is always 192 rows), or of slices
  int split;   // parts of one weight's columns: 1 to kMostSplit CTAs of a cluster, which adds their sums; or, with 2 strips
               // and 64 or 128 tokens, 1 to kMostSlices slices, whose sums another kernel adds
  int split_steps;  // steps of each part, but for the last
  float* sums;      // of slices: [split, rows, outputs]; else null
  int multiprocessors;  // of the device
};

// A packed weight and its tiles.
struct Shuffle {
  uint8_t* packed;  // [experts, rows, columns / 2]
  uint8_t* scales;  // [experts, rows, columns / 16], E4M3
  uint8_t *codes, *block_scale;  // as Gemm has them
  int experts, rows, columns, tiles, steps;
  bool gated;  // rows are gate, then up; in tiles they alternate by 8
};

cudaError_t shuffle(const Shuffle& s, bool back, cudaStream_t stream);

constexpr int kMaxExperts = 4096;
constexpr int kPartOfRows = 16;  // an expert's rows are multiplied in such parts, where tiles have as many

// Slots (token, k) sorted by expert, in blocks of at most `tokens` rows. Ids outside of 0..experts - 1 are left out.
struct Route {
  const void* topk_ids;  // [slots], int32 or (wide_ids) int64
  bool wide_ids;
  int slots, top_k, experts, tokens;
  int32_t* row_of_slot;                 // [slots], -1 where it was left out
  int32_t *slot_of_row, *token_of_row;  // [slots], or null: who gathers rows writes the first, and nobody asks for the other
  Block* blocks;
  int32_t* in_use;  // blocks, rows
  // The kernel before wrote nothing that is read here, and began only after all that did had ended: both may run at once.
  // Then the kernel after waits before it reads anything. Else it may read what was there before this one, without waiting.
  bool beside_kernel_before;
  int32_t* progress;  // [slots], set to 0, or to kQuantized where there is no such row; or null
};

struct Gather {
  const void* x;  // [tokens, columns], a multiple of 8
  Dtype dtype;
  const int32_t* row_of_slot;  // [tokens, top_k], -1: nowhere
  const float* topk_weights;   // [tokens, top_k], or null
  int tokens, top_k, columns;
  void* out;             // [rows, columns]
  int32_t* slot_of_row;  // [rows]
};

struct Combine {
  Route route;         // its ids, and how many
  const float* slots;  // [slots, columns], a multiple of 4
  const float* topk_weights;  // [slots], or null
  int columns;
  Dtype dtype;
  void* out;  // [tokens, columns]
};

cudaError_t route(const Route& r, cudaStream_t stream);
cudaError_t gather(const Gather& g, cudaStream_t stream);
cudaError_t combine(const Combine& c, cudaStream_t stream);

struct Launch {
  int tokens, split, strips;  // as Gemm has them
};

constexpr int kMostSplit = 8, kMostSlices = 16;
constexpr int kMostShared = 3;  // of kMostSplit that are chosen: larger clusters leave multiprocessors idle

struct Chip {
  int multiprocessors;
  int clusters[kMostShared + 1];  // that run at once, by their CTAs: it depends on how multiprocessors are grouped
};

// Of the current device, found out once.
cudaError_t chip(Chip* found);

// How one weight is multiplied fastest. `any_rows`: so that no sum depends on how many rows there are, or on how
// multiprocessors are grouped.
Launch launch_of(int rows, int columns, int outputs, bool any_rows, const Chip& chip);

constexpr int kFewRows = 16, kFewExpertRows = 8;  // of x at most that count as few: of one weight, of an expert
constexpr int kFewWarps = 16;  // that multiply, of a CTA of few rows: a pair of steps each at once

// Whether the kernel for few rows takes x with as many columns: pairs of whole steps, or few enough to come at once.
constexpr bool few_rows_take(int64_t columns) { return columns % (2 * kStep) == 0 || columns <= kFewWarps * 2 * kStep; }

// How many times 16 weight rows a CTA of few rows takes at once, so that all end together: of `strips` of them for each
// of `blocks` blocks of rows of x.
int strips_at_once(int64_t strips, int64_t blocks, int64_t columns, int multiprocessors);

// How many tiles of `tokens` rows of x a CTA takes at once, of `row_tiles` for each of `blocks` blocks.
int tiles_at_once(int64_t row_tiles, int64_t blocks, int tokens, int multiprocessors);

// Whether both products of experts can run at once on tiles of as many rows of x.
constexpr bool run_at_once(int tokens) { return tokens == 32 || tokens == 64; }

// Into how many tiles of weight rows the first product of experts falls if the second runs beside it, and a quantizer where
// rows are `quantized`; or 0 where that is not worth it. For `blocks` of at most `tokens` rows; the first product has
// `columns` and `outputs`, the second as many outputs and columns.
int row_tiles_beside(int64_t blocks, int tokens, int64_t outputs, int64_t columns, bool quantized, int multiprocessors);

cudaError_t multiply(const Gemm& g, cudaStream_t stream);

// gemm_sm90.cu and few_sm90.cu are compiled once for each dtype and output, side by side.
#define FOS_PRODUCTS(dtype, output)                                        \
  cudaError_t multiply_##dtype##_##output(const Gemm&, cudaStream_t);      \
  cudaError_t multiply_few_##dtype##_##output(const Gemm&, cudaStream_t);
FOS_PRODUCTS(bf16, linear)
FOS_PRODUCTS(bf16, gated)
FOS_PRODUCTS(bf16, fp32)
FOS_PRODUCTS(fp16, linear)
FOS_PRODUCTS(fp16, gated)
FOS_PRODUCTS(fp16, fp32)
#undef FOS_PRODUCTS

// And slices_sm90.cu, once for each dtype: what a sliced product ends with.
cudaError_t add_slices_bf16_linear(const Gemm& g, cudaStream_t stream);
cudaError_t add_slices_fp16_linear(const Gemm& g, cudaStream_t stream);

}  // namespace fos::cuda
