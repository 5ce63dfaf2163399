// Products of NVFP4 weights on Hopper: y = x W^T for activations in bf16 or fp16, dense and by experts.
//
// Hopper multiplies no 4-bit numbers, but e2m1 * block_scale is exact in 16 bits: weights travel packed through memory
// and shared memory, become 16-bit numbers in registers, and are there the left operand of wgmma; x is the right one,
// from shared memory (so what is computed is y^T). Sums are fp32; decode scales come after them. Where x is itself
// e2m1 * block_scale (W4A4), every product is exact.
//
// A team of two to four consumer warpgroups has a tile, each 64 weight rows and all of them the same tokens. Producer
// threads keep the copy engine `kStages` stages of one or two steps of 64 columns ahead: how many copies there are is what
// limits it, not how much they bring. A warpgroup multiplies with one set of registers while it unpacks into the other. A
// CTA has two teams of two, so that one multiplies while the other unpacks or writes results, or one team.
//
// CTAs stay and take tile after tile. Large teams read x less often: what the second-level cache can give limits experts.
// (One weight's many tokens are better off in tiles of 256.) Where tiles are few, their columns are shared (`split`): by a
// cluster, which adds its sums in the order of its ranks; or, where there are many columns, in slices, whose sums go
// through memory to slices_sm90.cu, which adds them in their order.
//
// Compiled with FOS_DTYPE = bf16 or fp16 and FOS_OUTPUT = linear, gated or fp32, and -fmad=false: what is added is
// rounded after it was multiplied.
#include "boxes_sm90.cuh"

namespace fos::cuda {
namespace {

constexpr int kGroup = 128;     // threads of a warpgroup
constexpr int kGroupRows = 64;  // of the weight
constexpr int kWarpRows = 16;
constexpr int kGroupCodes = kCodeBytes / 2, kGroupScales = kScaleBytes / 2;  // of a step
static_assert(2 * kGroupRows == kRowTile);

// Sums of a shared tile are staged as [token][row], rows padded so that neither side meets a bank twice.
constexpr int kTilePitch = kRowTile + 4;

// What a warp has finished of a few tokens, as [token][row] in 16 bits: 16 rows of 16 tokens, or 8 gated rows of 32.
constexpr int kChunk = kOutput == Output::gated ? 32 : 16;
constexpr int kChunkPitch = kOutput == Output::gated ? 16 : 48;  // bytes of a token, so that no bank is met twice
constexpr int kChunkBytes = kChunk * kChunkPitch;

// Who multiplies a tile's columns: one CTA all of them, a cluster together, or one CTA a slice.
enum class Columns { whole, shared, sliced };

template <int kTokensOfTile, int kGroupsOfTeam, int kTeamsOfCta>
struct Shape {
  static constexpr int kTokens = kTokensOfTile, kGroups = kGroupsOfTeam, kTeams = kTeamsOfCta;
  static constexpr int kRows = kGroups * kGroupRows;  // of a tile
  static constexpr int kTeam = kGroups * kGroup, kWarps = kTeam / kWarp;
  static constexpr int kConsumers = kTeams * kTeam, kThreads = kConsumers + kGroup;
  static constexpr int kStored = (kGroups + 1) / 2;  // tiles of the stored weight that the rows lie in
  // Registers move from producers to consumers, in eights: a CTA begins with as many for each thread.
  static constexpr int kRegisters = kAllRegisters / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 2 * kGroup ? 40 : 32;
  static constexpr int kConsumerRegisters =
      (kThreads * kRegisters - kGroup * kProducerRegisters) / kConsumers / 8 * 8;
  static constexpr int kSteps = kTokens <= 64 ? 2 : 1;  // of a stage
  static_assert(kSteps == 1 || kGroups % 2 == 0, "steps of a stored tile come at once");
  // Of a block with fewer tokens than a tile can have, some parts are multiplied, and some copied: at least the least.
  static constexpr int kHalf = kTokens / 2, kLeast = kTokens >= 128 ? kTokens / 4 : kHalf;
  static constexpr int kPart = kExperts ? kPartOfRows : kLeast, kCopy = kExperts ? kPartOfRows : kHalf;
  // A team's memory: its stages, then what its warps write, then two barriers for each stage. In a stage tokens come
  // first, as the swizzle wants them at a multiple of 1024 bytes; then codes and scales, of two groups after two others.
  static constexpr int kCodesAt = kSteps * kTokens * kRowOfBox;
  static constexpr int kScalesAt = kCodesAt + kSteps * kGroups * kGroupCodes;
  static constexpr int kStageBytes = (kScalesAt + kSteps * kGroups * kGroupScales + 1023) / 1024 * 1024;
  static constexpr int kStagingBytes = kOutput == Output::fp32 ? 0 : kWarps * kChunkBytes;
  static constexpr int kRingBytes = kSharedMemory / kTeams / 1024 * 1024;
  static constexpr int kStages = (kRingBytes - kStagingBytes) / (kStageBytes + 16);
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kStagingAt + kStagingBytes;
  static constexpr int kBytes = kTeams * kRingBytes;
  static_assert(kBarriersAt + kStages * 16 <= kRingBytes);
  static_assert(kGroups != 2 || kTokens * kTilePitch * 4 <= kStagingAt, "a shared tile's sums take the place of stages");
};

// --- which tile ---

// The steps of a tile that a CTA multiplies.
struct Steps {
  int first, last;
};

// A tile of the product: weight rows from `row` on, the tokens of a block, a part of the columns.
struct Tile {
  int row, part;
  Block block;

  __device__ __forceinline__ Steps steps(const Gemm& g) const {
    return {part * g.split_steps, min(g.steps, (part + 1) * g.split_steps)};
  }
};

// What rings are filled for, in turn. Some of the last tile may lie beyond the weight's rows. Experts' blocks are read past
// the first-level cache: the kernel before may still run, which could have older ones there.
template <class S, Columns columns>
struct Tiles {
  int rows, count;

  __device__ __forceinline__ explicit Tiles(const Gemm& g) {
    rows = (g.row_tiles * kRowTile + S::kRows - 1) / S::kRows;
    const int blocks = kExperts ? __ldcg(g.blocks_in_use) : g.block_limit;
    count = blocks * rows * (columns == Columns::sliced ? g.split : 1);
  }

  __device__ __forceinline__ Tile operator()(const Gemm& g, int index) const {
    if constexpr (kExperts) {
      const int4 found = __ldcg(reinterpret_cast<const int4*>(g.blocks) + index / rows);
      return {index % rows * S::kRows, 0, {found.x, found.y, found.z, 0}};
    }
    int part = columns == Columns::shared ? static_cast<int>(blockIdx.x) % g.split : 0;
    if constexpr (columns == Columns::sliced) {
      const int of_part = g.block_limit * rows;
      part = index / of_part;
      index -= part * of_part;
    }
    // Tokens first, 8 blocks of them at a time: tiles that run side by side share weights and x in the cache.
    constexpr int kSideBySide = 8;
    const int first = index / (kSideBySide * rows) * kSideBySide;
    const int side = min(kSideBySide, g.block_limit - first), within = index - first * rows;
    const int begin = (first + within % side) * S::kTokens;
    return {within / side * S::kRows, part, {0, begin, min(begin + S::kTokens, g.rows), 0}};
  }
};

// --- from sums to results ---

// Sums [64 rows, kTokens] of a warpgroup in wgmma's order, to shared memory as [token][row].
template <int kTokens>
__device__ __forceinline__ void stage(const float (&sums)[kTokens / 2], float* staged, int thread) {
  const int row = thread / kWarp * kWarpRows + thread % kWarp / 4, token = thread % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    float* to = staged + (i * 8 + token) * kTilePitch + row;
    const float* from = sums + i * 4;
    to[0] = from[0];
    to[kTilePitch] = from[1];
    to[8] = from[2];
    to[kTilePitch + 8] = from[3];
  }
}

// A tile whose columns the cluster shared: every CTA adds and writes some of its tokens.
template <class S>
__device__ __forceinline__ void write_shared(const Gemm& g, const Tile& tile, const float* staged, int thread) {
  constexpr int kTokens = S::kTokens, kPieces = kRowTile / kPieceRows;
  constexpr int kAtOnce = 4;  // CTAs whose sums are read before the first is added
  const int row = first_row(thread % kPieces);
  const Piece piece(g, tile.block.expert, tile.row + row);
  const int end = min((tile.part + 1) * kTokens / g.split, tile.block.end - tile.block.begin);
#pragma unroll 1
  for (int token = tile.part * kTokens / g.split + thread / kPieces; token < end; token += S::kTeam / kPieces) {
    const uint32_t at = shared_address(staged + token * kTilePitch + row);
    float sums[kPieceRows] = {};
    for (int first = 0; first < g.split; first += kAtOnce) {
      float4 parts[kAtOnce][2];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= g.split) break;
        const uint32_t there = in_cta(at, first + i);
        parts[i][0] = load_from_cta(there);
        parts[i][1] = load_from_cta(there + kSecondHalf * 4);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= g.split) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 v = parts[i][half];
          float* to = sums + half * 4;
          to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
        }
      }
    }
    if (piece.inside) piece.finish(g, tile.block.begin + token, sums);
  }
}

// A warp's sums of a slice, as they are.
template <int kTokens>
__device__ __forceinline__ void write_sums(const Gemm& g, const Tile& tile, const float (&sums)[kTokens / 2], int warp,
                                           int lane) {
  const int row = tile.row + warp * kWarpRows, count = tile.block.end - tile.block.begin, token = lane % 4 * 2;
  if (row >= g.outputs) return;
  const int64_t first = static_cast<int64_t>(tile.part) * g.rows + tile.block.begin + token;
  float* to = g.sums + first * g.outputs + row + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 2; i += 4) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (i * 2 + token + k >= count) return;
      to[k * g.outputs] = sums[i + k];
      to[k * g.outputs + 8] = sums[i + k + 2];
    }
    to += 8 * g.outputs;
  }
}

// The 16 weight rows of a warp, or 8 of gate and the 8 of up that belong to them. A thread has rows r and r + 8.
struct Strip {
  int output;   // the first
  bool inside;  // all are, or none
  float scale[2] = {}, bias[2] = {};

  __device__ __forceinline__ Strip(const Gemm& g, const Tile& tile, int warp, int lane) {
    const int row = tile.row + warp * kWarpRows;
    output = kOutput == Output::gated ? row / 2 : row;
    inside = output < g.outputs;
    if (!inside) return;
    const float* of_expert = decode_scales_of(g, tile.block.expert);
    const int own = output + lane / 4, on = kOutput == Output::gated ? g.outputs : 8;
    scale[0] = of_expert[own];
    scale[1] = of_expert[own + on];
    if (kOutput == Output::linear && g.bias != nullptr) {
      bias[0] = load_number(g.bias, g.bias_dtype, own);
      bias[1] = load_number(g.bias, g.bias_dtype, own + on);
    }
  }
};

// Of the tokens that a warp writes, a lane knows every 32nd.
template <int kTokens>
struct Tokens {
  static constexpr int kEach = (kTokens + kWarp - 1) / kWarp;
  static constexpr int kNumbers = kBlock / 2;
  float scale[kEach];
  uint32_t row[kEach];  // where that of out begins, in kNumbers of its numbers

  __device__ __forceinline__ Tokens(const Gemm& g, const Block& block, int lane) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int x_row = block.begin + i * kWarp + lane;
      scale[i] = 0.0f;
      row[i] = 0;
      if (x_row >= block.end) continue;
      scale[i] = token_scale_of(g, x_row);
      row[i] = static_cast<uint32_t>(out_row_of(g, x_row)) * static_cast<uint32_t>(g.outputs / kNumbers);
    }
  }
  // For a token that is the same in every lane, but for what `lane_token` adds; first is a multiple of 8.
  __device__ __forceinline__ float scale_of(int first, int lane_token) const {
    return __shfl_sync(~0u, scale[first / kWarp], first % kWarp + lane_token);
  }
  template <class T>
  __device__ __forceinline__ T* row_of(T* out, int first, int lane_token) const {
    return out + static_cast<uint64_t>(__shfl_sync(~0u, row[first / kWarp], first % kWarp + lane_token)) * kNumbers;
  }
};

// A warp's rows of `count` tokens, from registers; through shared memory of its own where a row has 16 bits a number.
template <int kTokens>
__device__ __forceinline__ void write_rows(const Gemm& g, const Strip& strip, const Tokens<kTokens>& tokens, int count,
                                           const float (&sums)[kTokens / 2], uint32_t staging, int lane) {
  if (!strip.inside) return;
  const int column = lane % 4 * 2;
  // Of rows r and r + 8, two tokens each.
  const auto finished = [&](int token, float (&y)[4]) {
    const float scales[2] = {tokens.scale_of(token, column), tokens.scale_of(token, column + 1)};
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = scaled_back(sums[token / 2 + i], scales[i % 2], strip.scale[i / 2]);
  };
  if constexpr (kOutput == Output::fp32) {
    float* out = static_cast<float*>(g.out) + strip.output + lane / 4;
    keep(out);
    constexpr int kAtOnce = 32;  // tokens whose numbers are on their way together
#pragma unroll
    for (int first = 0; first < kTokens; first += kAtOnce) {
      if (first >= count) break;
#pragma unroll
      for (int token = first; token < first + kAtOnce; token += 8) {
        float y[4];
        finished(token, y);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float* const to = tokens.row_of(out, token, column + i);
          if (token + column + i >= count) continue;
          to[0] = y[i];
          to[8] = y[i + 2];
        }
      }
    }
  } else {
    constexpr int kRows = kOutput == Output::gated ? 8 : kWarpRows;
    constexpr int kPieces = kRows / 8;  // of a token: 16 bytes
    const uint32_t to = staging + (kOutput == Output::gated ? lane * kChunkPitch
                                                            : (lane / 16 * 8 + lane % 8) * kChunkPitch + lane / 8 % 2 * 16);
    const uint32_t from = staging + lane / kPieces * kChunkPitch + lane % kPieces * 16;
    Value* const out = static_cast<Value*>(g.out) + strip.output + lane % kPieces * 8;
    // `store` makes two words of what 8 tokens' sums stand for, `finish` four matrices of the words of a chunk.
    const auto write_chunks = [&](auto store, auto finish) {
      static_assert(kTokens % kChunk == 0);
#pragma unroll
      for (int first = 0; first < kTokens; first += kChunk) {
        if (first >= count) break;
        uint32_t words[kChunk / 4], matrices[4];
#pragma unroll
        for (int i = 0; i < kChunk / 8; ++i) {
          float y[4];
          finished(first + i * 8, y);
          store(y, words[2 * i], words[2 * i + 1]);
        }
        finish(words, matrices);
        __syncwarp();
        store_matrices_transposed(to, matrices);
        __syncwarp();
        Value* const to_row = tokens.row_of(out, first, lane / kPieces);
        const uint4 piece = load_shared(from);
        if (first + lane / kPieces < count) *reinterpret_cast<uint4*>(to_row) = piece;
      }
    };
    if constexpr (kOutput == Output::gated) {
      with_activation(g.activation, [&](auto activation) {
        write_chunks(
            [](const float (&y)[4], uint32_t& first, uint32_t& second) {
              first = pack(y[0], y[2]), second = pack(y[1], y[3]);
            },
            [](const uint32_t (&words)[kChunk / 4], uint32_t (&matrices)[4]) {
              activate<decltype(activation)::value, 4>(words, matrices);
            });
      });
    } else {
      write_chunks(
          [&](float (&y)[4], uint32_t& first, uint32_t& second) {
            if (g.bias != nullptr) {
#pragma unroll
              for (int k = 0; k < 4; ++k) y[k] = y[k] + strip.bias[k / 2];
            }
            first = pack(y[0], y[1]), second = pack(y[2], y[3]);
          },
          [](const uint32_t (&words)[kChunk / 4], uint32_t (&matrices)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) matrices[i] = words[i];
          });
    }
  }
}

// --- the kernel ---

// Where a thread is in the ring of stages.
template <class S>
struct Ring {
  uint32_t base;       // of the ring's shared memory
  uint32_t at = base;  // of the stage
  uint32_t barrier = base + S::kBarriersAt;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t full() const { return barrier; }
  __device__ __forceinline__ uint32_t empty() const { return barrier + 8; }
  __device__ __forceinline__ void advance() {
    at += S::kStageBytes;
    barrier += 16;
    if (barrier != base + S::kBarriersAt + S::kStages * 16) return;
    at = base;
    barrier = base + S::kBarriersAt;
    parity ^= 1;
  }
};

// x as boxes of one part of a tile's tokens, of two, and so on.
template <class S>
struct Maps {
  CUtensorMap of[S::kTokens / S::kCopy];
};

// Tokens of a tile that are copied, at least those of its block.
template <class S>
__device__ __forceinline__ int copied(const Block& block) {
  return max(S::kLeast, (block.end - block.begin + S::kCopy - 1) / S::kCopy * S::kCopy);
}

// What a ring is filled for: the `first`, and those `apart`.
struct Share {
  int first, apart;
};

// One thread brings the weights of a team's tiles: as far as they lie in one stored tile, or, `second`, in the next.
template <class S, Columns columns>
__device__ __forceinline__ void bring_weights(const Gemm& g, Ring<S> ring, Share own, bool second) {
  const auto copy = [&](const Tile& tile, int step) {
    // What of the tile is before, and how many of its groups are here.
    const int in_first = S::kGroups == 3 ? 2 - tile.row / kGroupRows % 2 : 2;
    const int before = second ? in_first : 0, groups = second ? S::kGroups - in_first : in_first;
    const int row = tile.row + before * kGroupRows, within = S::kGroups == 3 ? row / kGroupRows % 2 : 0;
    // Beyond the last of the stored tiles that one is multiplied again, and dropped.
    const int row_tile = S::kGroups == 2 ? row / kRowTile : min(row / kRowTile, g.row_tiles - 1);
    const int64_t from = (static_cast<int64_t>(tile.block.expert) * g.row_tiles + row_tile) * g.steps + step;
    const int pieces = min(S::kSteps, tile.steps(g).last - step) * groups;
    const int rows = second ? 0 : copied<S>(tile.block);  // of x
    expect_bytes(ring.full(), pieces * (kGroupCodes + kGroupScales) + S::kSteps * rows * kRowOfBox);
    copy_bulk(ring.at + S::kCodesAt + S::kSteps * before * kGroupCodes,
              g.codes + from * kCodeBytes + within * kGroupCodes, pieces * kGroupCodes, ring.full());
    copy_bulk(ring.at + S::kScalesAt + S::kSteps * before * kGroupScales,
              g.block_scale + from * kScaleBytes + within * kGroupScales, pieces * kGroupScales, ring.full());
    ring.advance();
  };
  // Weights may come before the kernel before this one has ended: it made neither them (tiles_sm90.cu) nor experts'
  // blocks. (What made those had ended when that kernel let this one start.)
  const Tiles<S, columns> tiles(g);
  int early = 0;  // steps of the first tile
  if (own.first < tiles.count) {
    const Tile tile = tiles(g, own.first);
    const Steps steps = tile.steps(g);
#pragma unroll 1
    for (int i = 0; i < S::kStages && steps.first + early < steps.last; ++i, early += S::kSteps) {
      copy(tile, steps.first + early);
    }
  }
  wait_for_kernel_before();
  for (int index = own.first; index < tiles.count; index += own.apart) {
    const Tile tile = tiles(g, index);
    const Steps steps = tile.steps(g);
#pragma unroll 1
    for (int step = steps.first + early; step < steps.last; step += S::kSteps) {
      wait_long(ring.empty(), ring.parity ^ 1);
      copy(tile, step);
    }
    early = 0;
  }
  let_kernel_after_start();
}

// And one all rows of x.
template <class S, Columns columns>
__device__ __forceinline__ void bring_tokens(const Gemm& g, const Maps<S>& maps, Ring<S> ring, Share own) {
  wait_for_kernel_before();
  const Tiles<S, columns> tiles(g);
  for (int index = own.first; index < tiles.count; index += own.apart) {
    const Tile tile = tiles(g, index);
    const Steps steps = tile.steps(g);
    const int rows = copied<S>(tile.block);
#pragma unroll 1
    for (int step = steps.first; step < steps.last; step += S::kSteps, ring.advance()) {
      wait_long(ring.empty(), ring.parity ^ 1);
      copy_steps(g, maps.of[rows / S::kCopy - 1], ring.at, tile.block.begin, rows, step, S::kSteps, ring.full());
    }
  }
}

// How many parts of its tokens a tile multiplies: as few as its block has.
template <class S>
__device__ __forceinline__ uint32_t parts_of(const Block& block) {
  return max(S::kLeast / S::kPart, (block.end - block.begin + S::kPart - 1) / S::kPart);
}

// A warpgroup's sums of a tile by wgmma: 64 weight rows, all tokens of `parts`.
template <class S>
struct Multiply {
  static constexpr int kTokens = S::kTokens;
  // k16 blocks that are multiplied at once, while the next as many are unpacked into other registers: half of a stage.
  static constexpr int kBlocks = S::kSteps * 2;
  using Values = uint32_t[kBlocks][4];

  const Powers& by;
  Ring<S>& ring;
  float (&sums)[kTokens / 2];
  uint32_t parts, rows;    // what is multiplied, and copied, of the tokens
  uint32_t codes, scales;  // of the thread, in a stage
  uint32_t speaks;         // for its warp

  __device__ __forceinline__ void release(uint32_t stage) const {
    if (stage != 0 && speaks) arrive(stage);
  }

  // `tokens`: where the first block's are, in 16 bytes. One loop for all parts: one each would have registers of its own
  // for what is multiplied, and there are not as many.
  __device__ __forceinline__ void multiply(Values& values, uint32_t tokens) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) settle(values[i]);
    if (parts == S::kTokens / S::kPart) {
      multiply_part<S::kTokens>(values, tokens);
    } else {
      multiply_among<S::kLeast, S::kTokens - S::kPart>(values, tokens);
    }
  }
  // It is found by halves.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void multiply_among(const Values& values, uint32_t tokens) {
    constexpr int kMiddle = kFrom + (kTo - kFrom) / S::kPart / 2 * S::kPart;
    if constexpr (kFrom == kTo) {
      multiply_part<kTo>(values, tokens);
    } else if (parts > kMiddle / S::kPart) {
      multiply_among<kMiddle + S::kPart, kTo>(values, tokens);
    } else {
      multiply_among<kFrom, kMiddle>(values, tokens);
    }
  }
  template <int kCount>
  __device__ __forceinline__ void multiply_part(const Values& values, uint32_t tokens) {
    float(&some)[kCount / 2] = reinterpret_cast<float(&)[kCount / 2]>(sums);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      Wgmma<Value, kCount>::multiply(some, values[i], swizzled_operand(tokens + i * kBlock * 2 / 16));
    }
    wgmma_commit();
  }

  // Half of a step's four blocks.
  template <bool second>
  __device__ __forceinline__ void unpack_half(const Packed& w, const uint32_t (&scale)[4], uint32_t (&a)[4],
                                              uint32_t (&b)[4]) const {
    unpack<second>(by, w.q[2 * second], scale[0], scale[1], a);
    unpack<second>(by, w.q[2 * second + 1], scale[2], scale[3], b);
  }
  __device__ __forceinline__ void widen_scales(const Packed& w, uint32_t (&scale)[4]) const {
    scale[0] = two_scales<0>(by, w.scale), scale[1] = two_scales<0>(by, w.scale_8);
    scale[2] = two_scales<1>(by, w.scale), scale[3] = two_scales<1>(by, w.scale_8);
  }

  __device__ __forceinline__ void operator()(uint32_t steps) {
    keep(parts);
    uint32_t held = 0;  // what says that the stage is free which a multiplication under way reads, or 0
    Values even, odd;
    uint32_t scale[4];
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step += S::kSteps) {
      wait(ring.full(), ring.parity);
      const Packed w(ring.at + codes, ring.at + scales);
      if constexpr (S::kSteps == 1) {
        widen_scales(w, scale);
        wgmma_wait<1>();
        unpack_half<false>(w, scale, even[0], even[1]);
        multiply(even, ring.at / 16);
        wgmma_wait<1>();
        release(held);  // what read the stage before has ended
        unpack_half<true>(w, scale, odd[0], odd[1]);
        multiply(odd, ring.at / 16 + 2 * kBlock * 2 / 16);
      } else {
        const Packed next(ring.at + kCodeBytes + codes, ring.at + kScaleBytes + scales);
        widen_scales(w, scale);
        wgmma_wait<1>();
        unpack_half<false>(w, scale, even[0], even[1]);
        unpack_half<true>(w, scale, even[2], even[3]);
        multiply(even, ring.at / 16);
        wgmma_wait<1>();
        release(held);
        if (step + 1 < steps) {
          widen_scales(next, scale);
          unpack_half<false>(next, scale, odd[0], odd[1]);
          unpack_half<true>(next, scale, odd[2], odd[3]);
          multiply(odd, ring.at / 16 + rows * (kRowOfBox / 16));
        }
      }
      held = ring.empty();
      ring.advance();
    }
    wgmma_wait<0>();
    release(held);
  }
};

template <class S, Columns columns>
__global__ void __launch_bounds__(S::kThreads, 1) gemm(const __grid_constant__ Maps<S> maps, const Gemm g) {
  constexpr int kTokens = S::kTokens;
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warp_of_all = uniform(threadIdx.x / kWarp), lane = threadIdx.x % kWarp;
  const bool consumes = warp_of_all < S::kTeams * S::kWarps;
  const int producer = warp_of_all - S::kTeams * S::kWarps;  // two or three of a team
  const int team = consumes ? warp_of_all / S::kWarps : producer % S::kTeams;
  constexpr bool kShared = columns == Columns::shared;
  static_assert(S::kTeams == 1 || columns == Columns::whole);
  // First teams have the first tiles, so that every multiprocessor has one before some have two. A cluster has one tile.
  const int clusters = kShared ? gridDim.x / g.split : gridDim.x;
  const Share own = {(kShared ? static_cast<int>(blockIdx.x) / g.split : static_cast<int>(blockIdx.x)) + team * clusters,
                     clusters * S::kTeams};
  Ring<S> ring{shared_address(memory) + team * S::kRingBytes};

  if (!consumes && producer < S::kTeams && lane == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(ring.full() + i * 16, S::kStored);
      barrier_init(ring.empty() + i * 16, S::kWarps);
    }
    barriers_ready();
  }
  __syncthreads();

  if (!consumes) {
    give_registers<S::kProducerRegisters>();
    if (lane == 0) {
      const int task = producer / S::kTeams;
      if (task == 0) bring_weights<S, columns>(g, ring, own, false);
      if (task == 1) bring_tokens<S, columns>(g, maps, ring, own);
      if (S::kStored == 2 && task == 2) bring_weights<S, columns>(g, ring, own, true);
    }
    __syncwarp();
    if (kShared) {
      cluster_sync();
      cluster_sync();
    }
    return;
  }

  take_registers<S::kConsumerRegisters>();
  keep(ring.base);
  // Of the team's. Asked for again after each tile: no register would hold it meanwhile.
  const auto warp = [] { return static_cast<int>(static_cast<unsigned>(uniform(threadIdx.x / kWarp)) % S::kWarps); };
  const int group = warp() * kWarp / kGroup, thread = threadIdx.x % kGroup;
  uint32_t codes = S::kCodesAt + (group / 2 * S::kSteps * 2 + group % 2) * kGroupCodes + thread * 16;
  keep(codes);
  // Four threads read the scales of their 64 bytes of codes.
  const uint32_t scales = S::kScalesAt + (codes - S::kCodesAt) / 64 * 8;
  uint32_t speaks = lane == 0;
  keep(speaks);
  const auto multiply = [&](const Tile& tile, float (&sums)[kTokens / 2]) {
    const Steps steps = tile.steps(g);
    Multiply<S>{g.powers, ring,   sums,  parts_of<S>(tile.block), static_cast<uint32_t>(copied<S>(tile.block)),
                codes,    scales, speaks}(steps.last - steps.first);
  };
  wait_for_kernel_before();
  if constexpr (kShared) {
    // Sums take the place of the stages, once both warpgroups are done with those.
    float* staged = reinterpret_cast<float*>(memory);
    const Tile tile = Tiles<S, columns>(g)(g, own.first);
    float sums[kTokens / 2] = {};
    multiply(tile, sums);
    named_barrier(1, S::kTeam);
    stage<kTokens>(sums, staged + group * kGroupRows, thread);
    cluster_sync();
    write_shared<S>(g, tile, staged, threadIdx.x);
    cluster_sync();  // nobody ends while others read its sums
  } else {
    for (int index = own.first; index < Tiles<S, columns>(g).count; index += own.apart) {
      const Tile tile = Tiles<S, columns>(g)(g, index);
      float sums[kTokens / 2] = {};
      const auto write = [&](const Strip& strip, const Tokens<kTokens>& tokens) {
        write_rows<kTokens>(g, strip, tokens, tile.block.end - tile.block.begin, sums,
                            ring.base + S::kStagingAt + warp() * kChunkBytes, lane);
      };
      if constexpr (columns == Columns::sliced) {
        multiply(tile, sums);
        write_sums<kTokens>(g, tile, sums, warp(), lane);
      } else if constexpr (!kExperts) {
        multiply(tile, sums);
        write(Strip(g, tile, warp(), lane), Tokens<kTokens>(g, tile.block, lane));
      } else {
        // Experts' tiles are many: their scales are asked for before the sums are made.
        const Strip strip(g, tile, warp(), lane);
        const Tokens<kTokens> tokens(g, tile.block, lane);
        multiply(tile, sums);
        write(strip, tokens);
      }
    }
  }
}

// --- launching ---

template <class S, Columns columns>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared_memory<gemm<S, columns>>(S::kBytes)) return error;
  Maps<S> maps;
  for (int rows = S::kCopy; rows <= S::kTokens; rows += S::kCopy) {
    if (!map_of(g, rows, S::kSteps, &maps.of[rows / S::kCopy - 1])) return cudaErrorInvalidValue;
  }
  constexpr bool kShared = columns == Columns::shared;
  const int64_t tiles = g.block_limit * ceil_div(static_cast<int64_t>(g.row_tiles) * kRowTile, S::kRows) *
                        (columns == Columns::sliced ? g.split : 1);
  // A cluster that shares takes one tile; other CTAs stay for as many as there are.
  const int64_t ctas = kShared ? tiles * g.split : tiles < g.multiprocessors ? tiles : g.multiprocessors;
  const dim3 grid(static_cast<unsigned>(ctas));
  const unsigned cluster = kShared ? static_cast<unsigned>(g.split) : 0;
  return launch_early(gemm<S, columns>, grid, cluster, S::kThreads, S::kBytes, stream, maps, g);
}

// One weight, in tiles of as many tokens.
template <int kTokens>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  if constexpr (kTokens == 64 || kTokens == 128) {
    if (g.sums != nullptr) return launch<Shape<kTokens, 4, 1>, Columns::sliced>(g, stream);
  }
  if (g.split > 1) return launch<Shape<kTokens, 2, 1>, Columns::shared>(g, stream);
  return launch<Shape<kTokens, 2, kTokens <= 128 ? 2 : 1>, Columns::whole>(g, stream);
}

template <int kTokens>
cudaError_t launch_experts(const Gemm& g, cudaStream_t stream) {
  if (g.strips > 1) return launch<Shape<kTokens, 4, 1>, Columns::whole>(g, stream);
  return launch<Shape<kTokens, 2, 2>, Columns::whole>(g, stream);
}

}  // namespace

cudaError_t FOS_PRODUCT(multiply_)(const Gemm& g, cudaStream_t stream) {
  if constexpr (kOutput == Output::linear) {
    switch (g.tokens) {
      case 32: return launch<32>(g, stream);
      case 64: return launch<64>(g, stream);
      case 128: return launch<128>(g, stream);
      case 256: return launch<256>(g, stream);
      default: return cudaErrorInvalidValue;
    }
  } else {
    switch (g.tokens) {
      case 32: return launch_experts<32>(g, stream);
      case 64: return launch_experts<64>(g, stream);
      case 128: return launch_experts<128>(g, stream);
      case 192: return launch<Shape<192, 3, 1>, Columns::whole>(g, stream);
      default: return cudaErrorInvalidValue;
    }
  }
}

}  // namespace fos::cuda
