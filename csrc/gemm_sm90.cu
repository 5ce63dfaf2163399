// Products of NVFP4 weights on Hopper: y = x W^T for activations in bf16 or fp16, dense and by experts.
//
// Hopper multiplies no 4-bit numbers, but e2m1 * block_scale is exact in 16 bits: weights travel packed through memory
// and shared memory, become 16-bit numbers in registers, and are there the left operand of wgmma; x is the right one,
// from shared memory (so what is computed is y^T). Sums are fp32; decode scales come after them. Where x is itself
// e2m1 * block_scale (W4A4), every product is exact.
//
// A CTA has two consumer warpgroups, each with 64 of the 128 weight rows of a tile, and two producer threads that keep
// the copy engine `kStages` steps of 64 columns ahead. A warpgroup multiplies with one set of registers while it
// unpacks into the other.
//
// Where tiles are few, a cluster shares the columns of one (`split`) and adds its sums, in the order of its ranks.
// Otherwise CTAs stay and take tile after tile.
//
// Compiled with FOS_DTYPE = bf16 or fp16 and FOS_OUTPUT = linear, gated or fp32, and -fmad=false: what is added is
// rounded after it was multiplied.
#include <cuda.h>

#include "gemm_parts.cuh"


namespace fos::cuda {
namespace {

constexpr int kGroup = 128;  // threads
constexpr int kGroups = 2;               // consumer warpgroups
constexpr int kConsumers = kGroups * kGroup;
constexpr int kThreads = kConsumers + kGroup;
constexpr int kGroupRows = kRowTile / kGroups;
constexpr int kAtOnce = 4;        // CTAs whose sums are read before the first is added
constexpr int kStagedTokens = 32;  // of a warpgroup, at once

// Sums are staged as [token][row], rows padded so that neither side meets a bank twice.
constexpr int kGroupPitch = kGroupRows + 4, kTilePitch = kRowTile + 4;

// Registers move from producers to consumers: a CTA begins with 168 for each thread of its three warpgroups.
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
static_assert(kGroups * kConsumerRegisters + kProducerRegisters <= (kGroups + 1) * 168);

template <int kTokens>
struct Shape {
  static constexpr int kTokenBytes = kTokens * kStep * 2;  // of a step
  static constexpr int kStageBytes = kTokenBytes + kCodeBytes + kScaleBytes;
  static constexpr int kStagingBytes = kGroups * kStagedTokens * kGroupPitch * 4;
  static constexpr int kRoom = (kSharedMemory - kStagingBytes) / (kStageBytes + 16);
  static constexpr int kStages = kRoom < 16 ? kRoom : 16;
  // Tokens first, as the swizzle wants them at a multiple of 1024 bytes.
  static constexpr int kCodesAt = kStages * kTokenBytes;
  static constexpr int kScalesAt = kCodesAt + kStages * kCodeBytes;
  static constexpr int kStagingAt = kScalesAt + kStages * kScaleBytes;
  static constexpr int kBarriersAt = kStagingAt + kStagingBytes;
  static constexpr int kBytes = kBarriersAt + kStages * 16;
  static_assert(kTokens * kTilePitch * 4 <= kStagingAt, "the sums of a split tile take the place of its stages");
};

// --- which tile ---

// A tile of the product: weight rows from row_tile * kRowTile on, the tokens of a block.
struct Tile {
  int row_tile;
  Block block;
};

struct Tiles {
  int count;

  __device__ __forceinline__ explicit Tiles(const Gemm& g) {
    count = (g.blocks == nullptr ? g.block_limit : *g.blocks_in_use) * g.row_tiles;
  }

  // Tokens first, 8 blocks of them at a time: tiles that run side by side share weights and x in the cache.
  __device__ __forceinline__ Tile operator()(const Gemm& g, int index) const {
    constexpr int kSideBySide = 8;
    const int blocks = count / g.row_tiles, first = index / (kSideBySide * g.row_tiles) * kSideBySide;
    const int side = min(kSideBySide, blocks - first), within = index - first * g.row_tiles;
    const int block = first + within % side, row_tile = within / side;
    if (g.blocks == nullptr) return {row_tile, {0, block * g.tokens, g.rows, 0}};
    const int4 found = __ldg(reinterpret_cast<const int4*>(g.blocks) + block);
    return {row_tile, {found.x, found.y, found.z, 0}};
  }
};

// --- from sums to results ---

// Sums [64 rows, kTokens] of a warpgroup in wgmma's order, to shared memory as [token][row], `tokens` from `first` on.
template <int kTokens, int kCount, int kPitch>
__device__ __forceinline__ void stage(const float (&sums)[kTokens / 2], int first, float* staged, int thread) {
  const int row = thread / kWarp * 16 + thread % kWarp / 4, token = thread % 4 * 2;
#pragma unroll
  for (int i = 0; i < kCount / 8; ++i) {
    float* to = staged + (i * 8 + token) * kPitch + row;
    const float* from = sums + (first / 8 + i) * 4;
    to[0] = from[0];
    to[kPitch] = from[1];
    to[8] = from[2];
    to[kPitch + 8] = from[3];
  }
}

// A warpgroup's half of a tile, through shared memory of its own.
template <int kTokens>
__device__ __forceinline__ void write_group(const Gemm& g, const Tile& tile, const float (&sums)[kTokens / 2],
                                            float* staging, int group, int thread) {
  using S = Shape<kTokens>;
  constexpr int kPieces = kGroupRows / kPieceRows;  // of a token
  float* staged = staging + group * kStagedTokens * kGroupPitch;
  const int row = first_row(thread % kPieces);
  const Piece piece(g, tile.block.expert, tile.row_tile * kRowTile + group * kGroupRows + row);
#pragma unroll
  for (int first = 0; first < kTokens; first += kStagedTokens) {
    if (tile.block.begin + first >= tile.block.end) break;
    named_barrier(1 + group, kGroup);
    stage<kTokens, kStagedTokens, kGroupPitch>(sums, first, staged, thread);
    named_barrier(1 + group, kGroup);
    if (!piece.inside) continue;
#pragma unroll 1
    for (int token = thread / kPieces; token < kStagedTokens; token += kGroup / kPieces) {
      const int x_row = tile.block.begin + first + token;
      if (x_row >= tile.block.end) break;
      float own[kPieceRows];
      load_sums(staged + token * kGroupPitch + row, own);
      piece.finish(g, x_row, own);
    }
  }
}

// A tile whose columns the cluster shared: every CTA adds and writes some of its tokens.
template <int kTokens>
__device__ __forceinline__ void write_split(const Gemm& g, const Tile& tile, float* staged, int rank, int thread) {
  constexpr int kPieces = kRowTile / kPieceRows;
  const int row = first_row(thread % kPieces);
  const Piece piece(g, tile.block.expert, tile.row_tile * kRowTile + row);
  const int end = min((rank + 1) * kTokens / g.split, tile.block.end - tile.block.begin);
#pragma unroll 1
  for (int token = rank * kTokens / g.split + thread / kPieces; token < end; token += kConsumers / kPieces) {
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

// --- the kernel ---

// Where a thread is in the ring of stages.
template <int kTokens>
struct Ring {
  using S = Shape<kTokens>;
  uint32_t base;  // of the CTA's shared memory
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t full() const { return base + S::kBarriersAt + stage * 8; }
  __device__ __forceinline__ uint32_t empty() const { return full() + S::kStages * 8; }
  __device__ __forceinline__ uint32_t tokens() const { return base + stage * S::kTokenBytes; }
  __device__ __forceinline__ uint32_t codes() const { return base + S::kCodesAt + stage * kCodeBytes; }
  __device__ __forceinline__ uint32_t scales() const { return base + S::kScalesAt + stage * kScaleBytes; }
  __device__ __forceinline__ void advance() {
    if (++stage < S::kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The steps of a tile that this CTA multiplies.
struct Steps {
  int first, last;
};

// One thread brings all weights of the CTA's tiles.
template <int kTokens>
__device__ __forceinline__ void bring_weights(const Gemm& g, Ring<kTokens> ring, Steps steps, int cluster, int clusters) {
  using S = Shape<kTokens>;
  const auto copy = [&](const Tile& tile, int step) {
    const int64_t at = (static_cast<int64_t>(tile.block.expert) * g.row_tiles + tile.row_tile) * g.steps + step;
    expect_bytes(ring.full(), S::kStageBytes);
    copy_bulk(ring.codes(), g.codes + at * kCodeBytes, kCodeBytes, ring.full());
    copy_bulk(ring.scales(), g.block_scale + at * kScaleBytes, kScaleBytes, ring.full());
    ring.advance();
  };
  int step = steps.first;
  if (g.blocks == nullptr) {
    // Weights may come before the kernel before this one has ended: it is not the one that made them (tiles_sm90.cu).
    const Tiles tiles(g);
    if (cluster < tiles.count) {
      const Tile tile = tiles(g, cluster);
      for (int i = 0; i < S::kStages && step < steps.last; ++i, ++step) copy(tile, step);
    }
  }
  wait_for_kernel_before();
  const Tiles tiles(g);
  for (int index = cluster; index < tiles.count; index += clusters) {
    const Tile tile = tiles(g, index);
    for (; step < steps.last; ++step) {
      wait(ring.empty(), ring.parity ^ 1);
      copy(tile, step);
    }
    step = steps.first;
  }
  let_kernel_after_start();
}

// And one all rows of x: asking for copies is what limits a thread.
template <int kTokens>
__device__ __forceinline__ void bring_tokens(const Gemm& g, const CUtensorMap* map, Ring<kTokens> ring, Steps steps,
                                             int cluster, int clusters) {
  wait_for_kernel_before();
  const Tiles tiles(g);
  for (int index = cluster; index < tiles.count; index += clusters) {
    const Tile tile = tiles(g, index);
    for (int step = steps.first; step < steps.last; ++step, ring.advance()) {
      wait(ring.empty(), ring.parity ^ 1);
      copy_box(ring.tokens(), map, step * kStep, tile.block.begin, 0, ring.full());
    }
  }
}

// A warpgroup's sums of a tile by wgmma: 64 weight rows, all tokens.
template <int kTokens>
__device__ __forceinline__ void multiply_by_group(const Gemm& g, Ring<kTokens>& ring, int steps, int group, int thread,
                                                  float (&sums)[kTokens / 2]) {
  using S = Shape<kTokens>;
  uint32_t codes = group * (kCodeBytes / 2) + thread * 16, scales = group * (kScaleBytes / 2) + thread / 4 * 8;
  keep(codes);
  keep(scales);
  const Powers& by = g.powers;
  const bool speaks = thread % kWarp == 0;
  uint32_t held = 0;  // what says that the stage is free which a multiplication under way reads
  uint32_t even[2][4], odd[2][4];
  // Two k16 steps: while they are multiplied, the other registers are filled with the next two.
  const auto multiply = [&](uint32_t (&values)[2][4], uint64_t tokens, bool more) {
    settle(values[0]);
    settle(values[1]);
    wgmma_fence();
    Wgmma<Value, kTokens>::multiply(sums, values[0], tokens, more);
    Wgmma<Value, kTokens>::multiply(sums, values[1], tokens + (kBlock * 2 >> 4), 1);
    wgmma_commit();
  };
  for (int step = 0; step < steps; ++step) {
    wait(ring.full(), ring.parity);
    const Packed w(ring.codes() + codes, ring.scales() + scales);
    const uint64_t tokens = swizzled_operand(ring.tokens());
    const uint32_t scale = two_scales<0>(by, w.scale), scale_8 = two_scales<0>(by, w.scale_8);
    const uint32_t next = two_scales<1>(by, w.scale), next_8 = two_scales<1>(by, w.scale_8);
    wgmma_wait<1>();
    unpack<false>(by, w.q[0], scale, scale_8, even[0]);
    unpack<false>(by, w.q[1], next, next_8, even[1]);
    multiply(even, tokens, step > 0);
    wgmma_wait<1>();
    if (step > 0 && speaks) arrive(held);  // what read the stage before has ended
    unpack<true>(by, w.q[2], scale, scale_8, odd[0]);
    unpack<true>(by, w.q[3], next, next_8, odd[1]);
    multiply(odd, tokens + (2 * kBlock * 2 >> 4), true);
    held = ring.empty();
    ring.advance();
  }
  wgmma_wait<0>();
  if (steps > 0 && speaks) arrive(held);
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    gemm(const __grid_constant__ CUtensorMap map, const Gemm g) {
  using S = Shape<kTokens>;
  extern __shared__ __align__(1024) uint8_t memory[];
  Ring<kTokens> ring{shared_address(memory)};
  const int warp = threadIdx.x / kWarp, thread = threadIdx.x % kGroup;
  const int rank = blockIdx.x % g.split;
  const int cluster = blockIdx.x / g.split, clusters = gridDim.x / g.split;
  const Steps steps = {min(g.steps, rank * g.split_steps), min(g.steps, (rank + 1) * g.split_steps)};

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(ring.full() + i * 8, 1);
      barrier_init(ring.empty() + i * 8, kConsumers / kWarp);
    }
    barriers_ready();
    prefetch_map(&map);
  }
  __syncthreads();

  if (warp >= kConsumers / kWarp) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers) {
      bring_weights(g, ring, steps, cluster, clusters);
    } else if (threadIdx.x == kConsumers + kWarp) {
      bring_tokens(g, &map, ring, steps, cluster, clusters);
    }
    __syncwarp();
    if (g.split > 1) {
      cluster_sync();
      cluster_sync();
    }
    return;
  }

  take_registers<kConsumerRegisters>();
  keep(ring.base);
  const int group = threadIdx.x / kGroup;
  wait_for_kernel_before();
  const Tiles tiles(g);
  for (int index = cluster; index < tiles.count; index += clusters) {
    const Tile tile = tiles(g, index);
    float sums[kTokens / 2];
    multiply_by_group(g, ring, steps.last - steps.first, group, thread, sums);
    if (g.split == 1) {
      write_group<kTokens>(g, tile, sums, reinterpret_cast<float*>(memory + S::kStagingAt), group, thread);
    } else {
      // One tile a cluster: its sums take the place of the stages, once both warpgroups are done with those.
      named_barrier(1 + kGroups, kConsumers);
      float* staged = reinterpret_cast<float*>(memory);
      stage<kTokens, kTokens, kTilePitch>(sums, 0, staged + group * kGroupRows, thread);
      cluster_sync();
      write_split<kTokens>(g, tile, staged, rank, threadIdx.x);
      cluster_sync();  // nobody ends while others read its sums
    }
  }
}

// --- launching ---

template <int kTokens>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  using S = Shape<kTokens>;
  if (const cudaError_t error = allow_shared_memory<gemm<kTokens>>(S::kBytes)) return error;
  CUtensorMap map;
  if (!map_of(g, kTokens, 1, &map)) return cudaErrorInvalidValue;
  const int64_t tiles = static_cast<int64_t>(g.block_limit) * g.row_tiles;
  // A cluster that shares a tile takes one; the others stay for as many as there are.
  const int64_t clusters = g.split > 1 || tiles < g.multiprocessors ? tiles : g.multiprocessors;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(g.split), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(g.split * clusters));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = S::kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = g.split > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, gemm<kTokens>, map, g);
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
