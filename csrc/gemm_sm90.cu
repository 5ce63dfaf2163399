// Products of NVFP4 weights on Hopper: y = x W^T for activations in bf16 or fp16, dense and by experts.
//
// Hopper multiplies no 4-bit numbers, but e2m1 * block_scale is exact in 16 bits: weights travel packed through memory
// and shared memory, become 16-bit numbers in registers, and are there the left operand of wgmma; x is the right one,
// from shared memory (so what is computed is y^T). Sums are fp32; decode scales come after them. Where x is itself
// e2m1 * block_scale (W4A4), every product is exact.
//
// A team of two consumer warpgroups has a tile, each 64 of its 128 weight rows, and two producer threads that keep the
// copy engine `kStages` stages of one or two steps of 64 columns ahead: how many copies there are is what limits it, not
// how much they bring. A warpgroup multiplies with one set of registers while it unpacks into the other. A CTA has two
// teams, so that one multiplies while the other unpacks or writes results; or one, of 256 tokens.
//
// CTAs stay and take tile after tile. Of experts that have enough of them, both teams take tiles of the same tokens and
// read one x: what the second-level cache can give limits tiles that bring an x each. (One weight's many tokens are better
// off in tiles of 256.) Where tiles are few, a cluster shares their columns (`split`) and adds its sums, in the order of
// its ranks.
//
// Compiled with FOS_DTYPE = bf16 or fp16 and FOS_OUTPUT = linear, gated or fp32, and -fmad=false: what is added is
// rounded after it was multiplied.
#include "boxes_sm90.cuh"

namespace fos::cuda {
namespace {

constexpr int kGroup = 128;  // threads
constexpr int kGroups = 2;   // consumer warpgroups of a team
constexpr int kTeam = kGroups * kGroup, kWarps = kTeam / kWarp;
constexpr int kGroupRows = kRowTile / kGroups;
constexpr int kWarpRows = 16;

// Sums of a split tile are staged as [token][row], rows padded so that neither side meets a bank twice.
constexpr int kTilePitch = kRowTile + 4;

// What a warp has finished of a few tokens, as [token][row] in 16 bits: 16 rows of 16 tokens, or 8 gated rows of 32.
constexpr int kChunk = kOutput == Output::gated ? 32 : 16;
constexpr int kChunkPitch = kOutput == Output::gated ? 16 : 48;  // bytes of a token, so that no bank is met twice
constexpr int kChunkBytes = kChunk * kChunkPitch;

// How both teams' tiles lie to each other.
enum class Teams { apart, beside };  // beside: neighbouring rows, the same tokens

template <int kTokensOfTile, Teams teams>
struct Shape {
  static constexpr int kTokens = kTokensOfTile;
  static constexpr int kTeams = kTokens <= 128 ? 2 : 1;
  static constexpr bool kBeside = teams == Teams::beside;
  static_assert(kTeams == 2 || !kBeside);
  // A ring of stages has the weights of as many tiles, and feeds as many teams.
  static constexpr int kTilesBeside = kBeside ? kTeams : 1, kRings = kTeams / kTilesBeside;
  static constexpr int kConsumers = kTeams * kTeam, kThreads = kConsumers + kGroup;
  // Registers move from producers to consumers: a CTA begins with as many for each thread.
  static constexpr int kRegisters = kTeams == 2 ? 96 : 168;
  static constexpr int kConsumerRegisters = kTeams == 2 ? 112 : 232, kProducerRegisters = kTeams == 2 ? 32 : 40;
  static_assert(kTeams * kGroups * kConsumerRegisters + kProducerRegisters <= (kTeams * kGroups + 1) * kRegisters);
  static constexpr int kSteps = kTokens <= 64 ? 2 : 1;  // of a stage
  // Tiles of fewer tokens, where those are worth multiplications of their own. From half of the tokens down, the others
  // are not copied either.
  static constexpr int kHalf = kTokens / 2, kQuarter = kTokens >= 128 ? kTokens / 4 : kHalf;
  static constexpr int kThreeQuarters = kTokens >= 128 ? kTokens * 3 / 4 : kTokens;
  // A ring's memory: its stages, then what its teams' warps write, then two barriers for each stage. In a stage tokens
  // come first, as the swizzle wants them at a multiple of 1024 bytes; then codes and scales, of a tile and the next.
  static constexpr int kCodesOfTile = kSteps * kCodeBytes, kScalesOfTile = kSteps * kScaleBytes;
  static constexpr int kCodesAt = kSteps * kTokens * kRowOfBox;
  static constexpr int kScalesAt = kCodesAt + kTilesBeside * kCodesOfTile;
  static constexpr int kStageBytes = (kScalesAt + kTilesBeside * kScalesOfTile + 1023) / 1024 * 1024;
  static constexpr int kStagingBytes = kOutput == Output::fp32 ? 0 : kTilesBeside * kWarps * kChunkBytes;
  static constexpr int kRingBytes = kSharedMemory / kRings / 1024 * 1024;
  static constexpr int kStages = (kRingBytes - kStagingBytes) / (kStageBytes + 16);
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kStagingAt + kStagingBytes;
  static constexpr int kBytes = kRings * kRingBytes;
  static_assert(kBarriersAt + kStages * 16 <= kRingBytes);
  static_assert(kTokens * kTilePitch * 4 <= kStagingAt, "the sums of a split tile take the place of its stages");
};

// --- which tile ---

// A tile of the product, or two beside each other: weight rows from row_tile * kRowTile on, the tokens of a block.
struct Tile {
  int row_tile;
  Block block;
};

// What rings are filled for, in turn. Of the last two tiles beside each other one may lie beyond the weight's rows.
template <class S>
struct Tiles {
  int rows, count;

  __device__ __forceinline__ explicit Tiles(const Gemm& g) {
    rows = (g.row_tiles + S::kTilesBeside - 1) / S::kTilesBeside;
    count = (g.blocks == nullptr ? g.block_limit : *g.blocks_in_use) * rows;
  }

  __device__ __forceinline__ Tile operator()(const Gemm& g, int index) const {
    if (g.blocks != nullptr) {
      const int4 found = __ldg(reinterpret_cast<const int4*>(g.blocks) + index / rows);
      return {index % rows * S::kTilesBeside, {found.x, found.y, found.z, 0}};
    }
    // Tokens first, 8 blocks of them at a time: tiles that run side by side share weights and x in the cache.
    constexpr int kSideBySide = 8;
    const int first = index / (kSideBySide * rows) * kSideBySide;
    const int side = min(kSideBySide, g.block_limit - first), within = index - first * rows;
    const int begin = (first + within % side) * S::kTokens;
    return {within / side * S::kTilesBeside, {0, begin, min(begin + S::kTokens, g.rows), 0}};
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
template <int kTokens>
__device__ __forceinline__ void write_split(const Gemm& g, const Tile& tile, const float* staged, int rank, int thread) {
  constexpr int kPieces = kRowTile / kPieceRows;
  constexpr int kAtOnce = 4;  // CTAs whose sums are read before the first is added
  const int row = first_row(thread % kPieces);
  const Piece piece(g, tile.block.expert, tile.row_tile * kRowTile + row);
  const int end = min((rank + 1) * kTokens / g.split, tile.block.end - tile.block.begin);
#pragma unroll 1
  for (int token = rank * kTokens / g.split + thread / kPieces; token < end; token += kTeam / kPieces) {
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

// The 16 weight rows of a warp, or 8 of gate and the 8 of up that belong to them. A thread has rows r and r + 8.
struct Strip {
  int output;   // the first
  bool inside;  // all are, or none
  float scale[2] = {}, bias[2] = {};

  __device__ __forceinline__ Strip(const Gemm& g, const Tile& tile, int warp, int lane) {
    const int row = tile.row_tile * kRowTile + warp * kWarpRows;
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
__device__ __forceinline__ void write_rows(const Gemm& g, const Strip& strip, const Block& block,
                                           const float (&sums)[kTokens / 2], uint32_t staging, int lane) {
  if (!strip.inside) return;
  const Tokens<kTokens> tokens(g, block, lane);
  const int count = block.end - block.begin;
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
#pragma unroll
    for (int token = 0; token < kTokens; token += 8) {
      if (token >= count) break;
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
  } else {
    constexpr int kRows = kOutput == Output::gated ? 8 : kWarpRows;
    constexpr int kPieces = kRows / 8;  // of a token: 16 bytes
    const uint32_t to = staging + (kOutput == Output::gated ? lane * kChunkPitch
                                                            : (lane / 16 * 8 + lane % 8) * kChunkPitch + lane / 8 % 2 * 16);
    const uint32_t from = staging + lane / kPieces * kChunkPitch + lane % kPieces * 16;
    Value* const out = static_cast<Value*>(g.out) + strip.output + lane % kPieces * 8;
    // `make` packs what 8 tokens' sums stand for into matrix i of a chunk, or into those from 2 * i on.
    const auto write_chunks = [&](auto make) {
#pragma unroll
      for (int first = 0; first < kTokens; first += kChunk) {
        if (first >= count) break;
        uint32_t matrices[4];
#pragma unroll
        for (int i = 0; i < kChunk / 8; ++i) {
          const int token = first + i * 8;
          if (token >= kTokens) break;
          float y[4];
          finished(token, y);
          make(y, i, matrices);
        }
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
        write_chunks([](const float (&y)[4], int i, uint32_t (&matrices)[4]) {
          constexpr Activation kActivation = decltype(activation)::value;
          matrices[i] = pack(activate<kActivation>(y[0], y[2]), activate<kActivation>(y[1], y[3]));
        });
      });
    } else {
      write_chunks([&](float (&y)[4], int i, uint32_t (&matrices)[4]) {
        if (g.bias != nullptr) {
#pragma unroll
          for (int k = 0; k < 4; ++k) y[k] = y[k] + strip.bias[k / 2];
        }
        matrices[2 * i] = pack(y[0], y[1]);
        matrices[2 * i + 1] = pack(y[2], y[3]);
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

// The steps of a tile that this CTA multiplies.
struct Steps {
  int first, last;
};

// x as boxes of all tokens of a tile, or of half of them.
struct Maps {
  CUtensorMap of[2];
};

// Tokens of a tile that are copied, at least those of its block.
template <class S>
__device__ __forceinline__ int copied(const Block& block) {
  return block.end - block.begin > S::kHalf ? S::kTokens : S::kHalf;
}

// What a ring is filled for: the `first`, and those `apart`.
struct Share {
  int first, apart;
};

// One thread brings all weights of a team's tiles, of which `beside` are before it.
template <class S>
__device__ __forceinline__ void bring_weights(const Gemm& g, Ring<S> ring, Steps steps, Share own, int beside) {
  const uint32_t codes = S::kCodesAt + beside * S::kCodesOfTile, scales = S::kScalesAt + beside * S::kScalesOfTile;
  const auto copy = [&](const Tile& tile, int step) {
    // Beyond the last row of tiles that one is multiplied again, and dropped.
    const int row_tile = S::kBeside ? min(tile.row_tile + beside, g.row_tiles - 1) : tile.row_tile;
    const int64_t from = (static_cast<int64_t>(tile.block.expert) * g.row_tiles + row_tile) * g.steps + step;
    const int count = min(S::kSteps, steps.last - step);
    const int rows = beside == 0 ? copied<S>(tile.block) : 0;  // of x
    expect_bytes(ring.full(), count * (kCodeBytes + kScaleBytes) + S::kSteps * rows * kRowOfBox);
    copy_bulk(ring.at + codes, g.codes + from * kCodeBytes, count * kCodeBytes, ring.full());
    copy_bulk(ring.at + scales, g.block_scale + from * kScaleBytes, count * kScaleBytes, ring.full());
    ring.advance();
  };
  int step = steps.first;
  if (g.blocks == nullptr) {
    // Weights may come before the kernel before this one has ended: it is not the one that made them (tiles_sm90.cu).
    if (own.first < Tiles<S>(g).count) {
      const Tile tile = Tiles<S>(g)(g, own.first);
#pragma unroll 1
      for (int i = 0; i < S::kStages && step < steps.last; ++i, step += S::kSteps) copy(tile, step);
    }
  }
  wait_for_kernel_before();
  const Tiles<S> tiles(g);
  for (int index = own.first; index < tiles.count; index += own.apart) {
    const Tile tile = tiles(g, index);
#pragma unroll 1
    for (; step < steps.last; step += S::kSteps) {
      wait_long(ring.empty(), ring.parity ^ 1);
      copy(tile, step);
    }
    step = steps.first;
  }
  let_kernel_after_start();
}

// And one all rows of x.
template <class S>
__device__ __forceinline__ void bring_tokens(const Gemm& g, const Maps& maps, Ring<S> ring, Steps steps, Share own) {
  wait_for_kernel_before();
  const Tiles<S> tiles(g);
  for (int index = own.first; index < tiles.count; index += own.apart) {
    const Tile tile = tiles(g, index);
    const int rows = copied<S>(tile.block), half = rows < S::kTokens;
#pragma unroll 1
    for (int step = steps.first; step < steps.last; step += S::kSteps, ring.advance()) {
      wait_long(ring.empty(), ring.parity ^ 1);
      copy_steps(g, maps.of[half], ring.at, tile.block.begin, rows, step, S::kSteps, ring.full());
    }
  }
}

// How many tokens a tile multiplies: as few as its block has, in parts of the most.
template <class S>
__device__ __forceinline__ uint32_t parts_of(const Block& block) {
  const int count = block.end - block.begin;
  if (count > S::kThreeQuarters || (S::kTokens == S::kThreeQuarters && count > S::kHalf)) return 4;
  return count > S::kHalf ? 3 : count > S::kQuarter ? 2 : 1;
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
    if (parts == 4) {
      multiply_part<kTokens>(values, tokens);
    } else if (S::kThreeQuarters < kTokens && parts == 3) {
      multiply_part<S::kThreeQuarters>(values, tokens);
    } else if (S::kHalf > S::kQuarter && parts == 2) {
      multiply_part<S::kHalf>(values, tokens);
    } else {
      multiply_part<S::kQuarter>(values, tokens);
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

// `kShared`: a cluster shares the columns of a tile for each of its teams.
template <class S, bool kShared>
__global__ void __launch_bounds__(S::kThreads, 1) gemm(const __grid_constant__ Maps maps, const Gemm g) {
  constexpr int kTokens = S::kTokens;
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warp_of_all = uniform(threadIdx.x / kWarp), lane = threadIdx.x % kWarp;
  const bool consumes = warp_of_all < S::kTeams * kWarps;
  const int producer = warp_of_all - S::kTeams * kWarps;  // two of a team
  const int team = consumes ? warp_of_all / kWarps : producer / 2;
  // First teams have the first tiles, so that every multiprocessor has one before some have two.
  const int split = kShared ? g.split : 1, rank = blockIdx.x % split, clusters = gridDim.x / split;
  const int of_rings = S::kBeside ? 0 : team;
  const Share own = {static_cast<int>(blockIdx.x) / split + of_rings * clusters, clusters * S::kRings};
  const Steps steps = kShared ? Steps{min(g.steps, rank * g.split_steps), min(g.steps, (rank + 1) * g.split_steps)}
                              : Steps{0, g.steps};
  Ring<S> ring{shared_address(memory) + of_rings * S::kRingBytes};

  if (!consumes && producer % 2 == 0 && team < S::kRings && lane == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(ring.full() + i * 16, S::kTilesBeside);
      barrier_init(ring.empty() + i * 16, S::kTilesBeside * kWarps);
    }
    barriers_ready();
  }
  __syncthreads();

  if (!consumes) {
    give_registers<S::kProducerRegisters>();
    if (lane == 0) {
      if (producer % 2 == 0 && team < S::kTeams) {
        bring_weights(g, ring, steps, own, team - of_rings);
      } else if (producer % 2 == 1 && team < S::kRings) {
        bring_tokens(g, maps, ring, steps, own);
      }
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
  // Of the warps that read a ring. Asked for again after each tile: no register would hold it meanwhile.
  const auto warp = [] {
    const unsigned of_all = uniform(threadIdx.x / kWarp);
    return static_cast<int>(S::kBeside ? of_all : of_all % kWarps);
  };
  const int group = warp() * kWarp / kGroup, thread = threadIdx.x % kGroup;
  uint32_t codes = S::kCodesAt + group / kGroups * S::kCodesOfTile + group % kGroups * (kCodeBytes / 2) + thread * 16;
  keep(codes);
  // Four threads read the scales of their 64 bytes of codes.
  const uint32_t scales = S::kScalesAt + (codes - S::kCodesAt) / 64 * 8;
  uint32_t speaks = lane == 0;
  keep(speaks);
  const auto multiply = [&](const Block& block, int steps_of_tile, float (&sums)[kTokens / 2]) {
    Multiply<S>{g.powers, ring,   sums,  parts_of<S>(block), static_cast<uint32_t>(copied<S>(block)),
                codes,    scales, speaks}(steps_of_tile);
  };
  wait_for_kernel_before();
  if constexpr (kShared) {
    // One tile a team: its sums take the place of the stages, once both warpgroups are done with those.
    float* staged = reinterpret_cast<float*>(memory + team * S::kRingBytes);
    const bool has_tile = own.first < Tiles<S>(g).count;
    const Tile tile = Tiles<S>(g)(g, has_tile ? own.first : 0);
    if (has_tile) {
      float sums[kTokens / 2] = {};
      multiply(tile.block, steps.last - steps.first, sums);
      named_barrier(1 + team, kTeam);
      stage<kTokens>(sums, staged + group * kGroupRows, thread);
    }
    cluster_sync();
    if (has_tile) write_split<kTokens>(g, tile, staged, rank, threadIdx.x % kTeam);
    cluster_sync();  // nobody ends while others read its sums
  } else {
    for (int index = own.first; index < Tiles<S>(g).count; index += own.apart) {
      const Tile tile = Tiles<S>(g)(g, index);
      float sums[kTokens / 2] = {};
      multiply(tile.block, g.steps, sums);
      write_rows<kTokens>(g, Strip(g, tile, warp(), lane), tile.block, sums,
                          ring.base + S::kStagingAt + warp() * kChunkBytes, lane);
    }
  }
}

// --- launching ---

template <class S, bool kShared>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared_memory<gemm<S, kShared>>(S::kBytes)) return error;
  Maps maps;
  for (int half = 0; half < 2; ++half) {
    const int rows = half ? S::kHalf : S::kTokens;
    if (!map_of(g, rows, S::kSteps, &maps.of[half])) return cudaErrorInvalidValue;
  }
  const int64_t tiles = g.block_limit * ceil_div(g.row_tiles, S::kTilesBeside);
  // A cluster that shares tiles takes one for each team at most; other CTAs stay for as many as there are.
  const int64_t at_once = g.multiprocessors / g.split, least = kShared ? ceil_div(tiles, S::kTeams) : 1;
  const int64_t clusters = tiles < at_once ? tiles : least > at_once ? least : at_once;
  const dim3 grid(static_cast<unsigned>(g.split * clusters));
  const unsigned cluster = kShared ? static_cast<unsigned>(g.split) : 0;
  return launch_early(gemm<S, kShared>, grid, cluster, S::kThreads, S::kBytes, stream, maps, g);
}

template <int kTokens>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  if constexpr (kOutput == Output::linear) {
    if (g.split > 1) return launch<Shape<kTokens, Teams::apart>, true>(g, stream);
  } else if constexpr (Shape<kTokens, Teams::apart>::kTeams == 2) {
    if (g.strips > 1) return launch<Shape<kTokens, Teams::beside>, false>(g, stream);
  }
  return launch<Shape<kTokens, Teams::apart>, false>(g, stream);
}

}  // namespace

cudaError_t FOS_PRODUCT(multiply_)(const Gemm& g, cudaStream_t stream) {
  switch (g.tokens) {
    case 32: return launch<32>(g, stream);
    case 64: return launch<64>(g, stream);
    case 128: return launch<128>(g, stream);
    case 256: return launch<256>(g, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fos::cuda
