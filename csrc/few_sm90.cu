// Products of NVFP4 weights and few rows of x (16 at most, of one weight or of an expert) on Hopper.
//
// There are hardly any sums to make: what counts is that weights arrive as fast as memory gives them, on all
// multiprocessors until the end. Each of a CTA's 16 warps reads its own weights, in the order that its mma.sync wants
// them, from global memory into registers, `kAhead` steps before their use; no barrier stands between a load and its
// use. A CTA takes `strips` times 16 weight rows at once; the warps of a strip share its columns, and what they add up
// meets in shared memory, in the order of the warps. The warps that have the same columns form a group, whose first one
// has the copy engine bring x: all of it, where there is room for it, else some steps ahead. CTAs stay, one to a
// multiprocessor, for units (strips of a block of rows) that follow one another.
//
// How weights become 16-bit numbers, and sums results, is in gemm_parts.cuh.
#include <cuda.h>

#include "gemm_parts.cuh"

#define FOS_PASTE_(a, b, c, d) a##b##c##d
#define FOS_PASTE(a, b, c, d) FOS_PASTE_(a, b, c, d)
#define FOS_MULTIPLY FOS_PASTE(multiply_few_, FOS_DTYPE, _, FOS_OUTPUT)

namespace fos::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 16, kThreads = kWarp * kWarps;
constexpr int kStrip = 16;  // weight rows of a warp
constexpr int kTileStrips = kRowTile / kStrip;
constexpr int kAhead = 6;  // steps that weights are asked for before their use; a whole number of rounds
constexpr int kRound = 3;  // steps whose tokens come together
constexpr int kStripCodes = kStrip * kStep / 2, kStripScales = kStrip * kStep / kBlock;  // bytes of a step
constexpr int kHalfStepBytes = kStep / 2 * 2;  // 32 columns of a token
constexpr int kSumPitch = kStrip + 4;  // sums of a token; neither side meets a bank twice
constexpr int kMostSlots = 16;
constexpr int kSharedMemory = 227 * 1024;

template <int kTokens>
struct Shape {
  static constexpr int kTokenBytes = kTokens * kStep * 2;  // of a step
  static constexpr int kSlotBytes = kRound * kTokenBytes;
  static constexpr int kUnitSums = kWarps * kTokens * kSumPitch;  // of two units in turn
  static constexpr int kBarrierBytes = kWarps * kMostSlots * 16;
  static constexpr int kFixed = 2 * kUnitSums * 4 + kBarrierBytes;

  // Rounds of a group, at most.
  static __host__ __device__ int rounds(int steps, int groups) {
    const int of_group = (steps + groups - 1) / groups;
    return (of_group + kRound - 1) / kRound;
  }
  // Slots of each group's ring of tokens.
  static __host__ __device__ int slots(int steps, int groups) {
    const int fitting = min((kSharedMemory - kFixed) / (groups * kSlotBytes), kMostSlots);
    return min(fitting, max(rounds(steps, groups), 2));
  }
};

// The steps of a strip that a warp adds up for a unit.
struct Range {
  int unit, first, steps;
  uint32_t piece;  // of the weight: kStripCodes and kStripScales bytes each
};

template <int kTokens>
struct Work {
  const Gemm& g;
  int strips, row_units, last_unit;
  int strip, group, groups;  // of this warp

  __device__ __forceinline__ Block block(int unit) const {
    const int index = unit / row_units;
    if (g.blocks == nullptr) return {0, index * kTokens, g.rows, 0};
    const int4 found = __ldg(reinterpret_cast<const int4*>(g.blocks) + index);
    return {found.x, found.y, found.z, 0};
  }

  __device__ __forceinline__ Range range(int unit) const {
    if (unit >= last_unit) return {unit, 0, 0, 0};
    const int first = g.steps * group / groups, last = g.steps * (group + 1) / groups;
    // Beyond the last strip the last is multiplied again, and dropped: all warps of a group keep step.
    const int own = min(unit % row_units * g.strips + strip, strips - 1);
    const int expert = g.blocks == nullptr ? 0 : block(unit).expert;
    const uint32_t tile = (expert * g.row_tiles + own / kTileStrips) * g.steps + first;
    return {unit, first, last - first, tile * kTileStrips + own % kTileStrips};
  }
};

// A group's ring of tokens, as its warps and as its first one, who fills it, see it.
template <int kTokens>
struct Ring {
  using S = Shape<kTokens>;
  uint32_t tokens, full;  // of the group's first slot
  int slots;
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t at() const { return tokens + slot * S::kSlotBytes; }
  __device__ __forceinline__ uint32_t full_at() const { return full + slot * 8; }
  __device__ __forceinline__ uint32_t empty_at() const { return full_at() + kMostSlots * 8; }
  __device__ __forceinline__ void advance() {
    if (++slot < slots) return;
    slot = 0;
    parity ^= 1;
  }
};

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 1) few(const __grid_constant__ CUtensorMap map, const Gemm g) {
  using S = Shape<kTokens>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  Work<kTokens> work{g};
  work.strips = (kOutput == Output::gated ? 2 * g.outputs : g.outputs) / kStrip;
  work.row_units = (work.strips + g.strips - 1) / g.strips;
  work.groups = kWarps / g.strips;
  work.strip = warp / work.groups;
  work.group = warp % work.groups;
  const bool busy = work.strip < g.strips;
  const int slots = S::slots(g.steps, work.groups);
  // With all tokens in place from the first unit on, nothing has to be given free.
  const bool resident = g.block_limit == 1 && S::rounds(g.steps, work.groups) <= slots;
  float* sums_at = reinterpret_cast<float*>(memory + work.groups * slots * S::kSlotBytes);
  const uint32_t barriers = shared_address(sums_at + 2 * S::kUnitSums);
  Ring<kTokens> ring{shared_address(memory) + work.group * slots * S::kSlotBytes,
                     barriers + work.group * kMostSlots * 16, slots};

  if (threadIdx.x < work.groups) {
    for (int i = 0; i < slots; ++i) {
      const uint32_t barrier = barriers + (threadIdx.x * kMostSlots * 2 + i) * 8;
      barrier_init(barrier, 1);
      barrier_init(barrier + kMostSlots * 8, g.strips);
    }
    barriers_ready();
  }
  if (threadIdx.x == 0) prefetch_map(&map);

  const auto codes_of = [&](uint32_t piece) {
    return g.codes + lane * 16 + static_cast<uint64_t>(piece) * kStripCodes;
  };
  const auto scales_of = [&](uint32_t piece) {
    return g.block_scale + lane / 4 * 8 + static_cast<uint64_t>(piece) * kStripScales;
  };
  const auto load = [&](Packed& w, uint32_t piece, int step) {
    w.load(codes_of(piece) + step * kCodeBytes, scales_of(piece) + step * kScaleBytes);
  };

  // Weights of one matrix may come before the kernel before this one has ended: it is not the one that made them.
  if (g.blocks != nullptr) wait_for_kernel_before();
  const int units = (g.blocks == nullptr ? g.block_limit : *g.blocks_in_use) * work.row_units;
  const int first_unit = static_cast<int>(static_cast<int64_t>(units) * blockIdx.x / gridDim.x);
  work.last_unit = static_cast<int>(static_cast<int64_t>(units) * (blockIdx.x + 1) / gridDim.x);
  Range range = work.range(first_unit);
  Packed weights[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (busy && i < range.steps) load(weights[i], range.piece, i);
  }
  if (g.blocks == nullptr) wait_for_kernel_before();
  __syncthreads();

  // The first warp of a group brings x, one round after the other, whatever unit they are of.
  Ring<kTokens> filled = ring;
  const bool fills = work.strip == 0 && lane == 0 && range.steps > 0;
  int fill_unit = first_unit, fill_step = 0, fill_row = fills ? work.block(first_unit).begin : 0;
  const auto fill = [&] {
    if (fill_unit >= work.last_unit) return;
    wait(filled.empty_at(), filled.parity ^ 1);
    const int count = min(kRound, range.steps - fill_step);
    expect_bytes(filled.full_at(), count * S::kTokenBytes);
    for (int i = 0; i < count; ++i) {
      const int column = (range.first + fill_step + i) * kStep;
      copy_box(filled.at() + i * S::kTokenBytes, &map, column, fill_row, filled.full_at());
    }
    filled.advance();
    fill_step += kRound;
    if (fill_step < range.steps) return;
    fill_step = 0;
    fill_unit = resident ? work.last_unit : fill_unit + 1;
    if (fill_unit < work.last_unit) fill_row = work.block(fill_unit).begin;
  };
  // Two rounds before each, until all slots are full: so many copies take longer to ask for than the first to come.
  int room = resident ? slots : max(1, slots - 1);
  const auto fill_some = [&] {
    for (int i = 0; i < 2 && room > 0; ++i, --room) fill();
  };
  if (fills) fill_some();

  // For ldmatrix, lane l says where row l % 8 of matrix l / 8 is: 8 columns of a token, swizzled by 128 bytes.
  uint32_t of_lane = lane % 8 * (2 * kHalfStepBytes) + ((lane / 8 ^ lane % 8) << 4);
  keep(of_lane);
  const Powers& by = g.powers;
  // Two sums of each, that a multiplication need not wait for the one before.
  constexpr int kChains = kTokens == 8 ? 2 : 1;
  float sums[kTokens / 8 * kChains][4];
  const auto multiply = [&](const Packed& w, uint32_t tokens) {
    uint32_t x[kTokens / 8][2][4], values[4];
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      const uint32_t from = tokens + n * (8 * 2 * kHalfStepBytes) + of_lane;
      load_matrices(from, x[n][0]);
      load_matrices(from ^ kHalfStepBytes, x[n][1]);
    }
    const auto add = [&](int block) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        Mma<Value>::multiply(sums[n * kChains + block % kChains], values, x[n][block / 2] + block % 2 * 2);
      }
    };
    const uint32_t scale = two_scales<0>(by, w.scale), scale_8 = two_scales<0>(by, w.scale_8);
    const uint32_t odd = two_scales<1>(by, w.scale), odd_8 = two_scales<1>(by, w.scale_8);
    unpack<false>(by, w.q[0], scale, scale_8, values);
    add(0);
    unpack<false>(by, w.q[1], odd, odd_8, values);
    add(1);
    unpack<true>(by, w.q[2], scale, scale_8, values);
    add(2);
    unpack<true>(by, w.q[3], odd, odd_8, values);
    add(3);
  };
  const auto begin_round = [&] {
    if (fills) fill_some();
    __syncwarp();
    wait(ring.full_at(), ring.parity);
  };
  const auto end_round = [&] {
    if (resident) {
      ++ring.slot;
      return;
    }
    ++room;
    __syncwarp();
    if (lane == 0) arrive(ring.empty_at());
    ring.advance();
  };

  while (range.unit < work.last_unit) {
#pragma unroll
    for (int n = 0; n < kTokens / 8 * kChains; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    const Range next = work.range(range.unit + 1);
    if (resident) ring.slot = 0;
    if (busy) {
      int first = 0;
      const uint8_t* codes = codes_of(range.piece) + kAhead * kCodeBytes;
      const uint8_t* scales = scales_of(range.piece) + kAhead * kScaleBytes;
      for (; first + 2 * kAhead <= range.steps; first += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (i % kRound == 0) begin_round();
          multiply(weights[i], ring.at() + i % kRound * S::kTokenBytes);
          weights[i].load(codes + i * kCodeBytes, scales + i * kScaleBytes);
          if (i % kRound + 1 == kRound) end_round();
        }
        codes += kAhead * kCodeBytes;
        scales += kAhead * kScaleBytes;
      }
      // The last steps, while places that are free take those of the next unit.
      for (; first < range.steps; first += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (first + i >= range.steps) break;
          if (i % kRound == 0) begin_round();
          multiply(weights[i], ring.at() + i % kRound * S::kTokenBytes);
          if (first + i + kAhead < range.steps) {
            weights[i].load(codes + i * kCodeBytes, scales + i * kScaleBytes);
          } else if (i < next.steps) {
            load(weights[i], next.piece, i);
          }
          if (i % kRound + 1 == kRound || first + i + 1 == range.steps) end_round();
        }
        codes += kAhead * kCodeBytes;
        scales += kAhead * kScaleBytes;
      }
    }
    if (next.unit >= work.last_unit) let_kernel_after_start();

    // Two places in turn: whoever writes one has met all who read the other.
    float* of_unit = sums_at + range.unit % 2 * S::kUnitSums;
    float* own = of_unit + warp * (kTokens * kSumPitch);
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      if constexpr (kChains == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n * 2][i] += sums[n * 2 + 1][i];
      }
      float* to = own + (n * 8 + lane % 4 * 2) * kSumPitch + lane / 4;
      to[0] = sums[n * kChains][0];
      to[kSumPitch] = sums[n * kChains][1];
      to[8] = sums[n * kChains][2];
      to[kSumPitch + 8] = sums[n * kChains][3];
    }
    __syncthreads();
    const int pieces = g.strips * (kStrip / kPieceRows);
    const int piece = threadIdx.x % pieces, token = threadIdx.x / pieces, row = first_row(piece);
    const int first_strip = range.unit % work.row_units * g.strips;
    const Block block = work.block(range.unit);
    if (token < min(block.end - block.begin, kTokens) && first_strip + piece / 2 < work.strips) {
      const Piece finished(g, block.expert, first_strip * kStrip + row);
      const float* from = of_unit + (piece / 2 * work.groups * kTokens + token) * kSumPitch + row % kStrip;
      float total[kPieceRows], part[kPieceRows];
      load_sums(from, total);
      for (int other = 1; other < work.groups; ++other) {
        load_sums(from + other * (kTokens * kSumPitch), part);
#pragma unroll
        for (int i = 0; i < kPieceRows; ++i) total[i] += part[i];
      }
      if (finished.inside) finished.finish(g, block.begin + token, total);
    }
    range = next;
  }
}

template <int kTokens>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  using S = Shape<kTokens>;
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
    return error;
  }
  if (const cudaError_t error =
          cudaFuncSetAttribute(few<kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedMemory)) {
    return error;
  }
  CUtensorMap map;
  if (!map_of(g, kTokens, &map)) return cudaErrorInvalidValue;
  const int strips = (kOutput == Output::gated ? 2 * g.outputs : g.outputs) / kStrip, groups = kWarps / g.strips;
  const int64_t units = static_cast<int64_t>(g.block_limit) * ((strips + g.strips - 1) / g.strips);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(units < multiprocessors ? units : multiprocessors));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = S::kFixed + groups * S::slots(g.steps, groups) * S::kSlotBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, few<kTokens>, map, g);
}

}  // namespace

cudaError_t FOS_MULTIPLY(const Gemm& g, cudaStream_t stream) {
  return g.tokens == 8 ? launch<8>(g, stream) : launch<16>(g, stream);
}

}  // namespace fos::cuda
