// Products of NVFP4 weights and few rows of x (at most 16 of one weight, 8 of an expert) on Hopper.
//
// There are hardly any sums to make: what counts is that weights arrive as fast as memory gives them, on all
// multiprocessors until the end. A CTA stays on its multiprocessor for units that follow one another: `strips` times 16
// weight rows, for a block of rows of x. A strip's columns are dealt to its warps in pairs of steps. Each warp reads its
// own weights from global memory into registers, in the order that its mma.sync wants them, `kAhead` pairs before their
// use and on into the next unit: no barrier stands between a load and its use, and none at the end of a unit, where a
// warp leaves its sums in shared memory and goes on. Beside these warps one has the copy engine bring x, which stays
// where there is room for it, and two add up what was left of a unit, in the order of the warps.
//
// What limits how fast x comes is how many copies there are: rows of experts, which lie anywhere, and the fewest are a copy
// each; others are a box, a copy for a whole chunk of columns.
//
// Results of one weight are `linear`, those of experts `gated` or `fp32`. How weights become 16-bit numbers, and sums
// results, is in gemm_parts.cuh.
#include "boxes_sm90.cuh"

namespace fos::cuda {
namespace {

constexpr int kWarps = kFewWarps;
constexpr int kFinishers = 2;
constexpr int kThreads = (kWarps + 1 + kFinishers) * kWarp;
constexpr int kStrip = 16;  // weight rows of a warp
constexpr int kTileStrips = kRowTile / kStrip;
constexpr int kAhead = 3;  // pairs of steps that weights are asked for before their use
constexpr int kStripCodes = kStrip * kStep / 2, kStripScales = kStrip * kStep / kBlock;  // bytes of a step
constexpr int kStepBytes = kStep * 2, kPairBytes = 2 * kStepBytes;                       // of a row of x
constexpr int kSumPitch = kStrip + 4;  // sums of a token; neither side meets a bank twice
constexpr int kPlaces = 2;             // for the sums of units
constexpr int kMostSlots = 128;

// How the strips of a weight, or of an expert's, and their columns are dealt.
struct Plan {
  int strips;
  int row_units;               // of each block of rows of x: g.strips strips each, but for the last
  int units_each, units_more;  // of one weight: a CTA has units_each, the first units_more of them one more
  int pairs;                   // of steps
  int warps, warps_inverse;    // of a strip; warp / warps is warp * warps_inverse >> 8
  int pieces_inverse;          // item / pieces of a unit is item * pieces_inverse >> 16
  // x comes in chunks: a pair for each of a strip's warps.
  int chunks, slots;     // of a block, and what there is room for
  int slot_bytes;
  int slot_rows, pitch;  // rows of x that a slot holds, and their bytes, where no boxes do; ldmatrix meets no bank twice
};

// The units of a CTA, one after the other.
struct Units {
  int left;   // with this one
  int block;  // of rows of x
  int rows;   // which unit of that block

  __device__ __forceinline__ bool ends_block(const Plan& plan) const {
    return kExperts && (left == 1 || rows + 1 == plan.row_units);
  }
  __device__ __forceinline__ void advance(const Plan& plan) {
    --left;
    if (++rows < plan.row_units || !kExperts) return;
    rows = 0;
    ++block;
  }
};

__device__ __forceinline__ Block block_of(const Gemm& g, int index) {
  if constexpr (!kExperts) return {0, 0, g.rows, 0};
  const int4 found = __ldg(reinterpret_cast<const int4*>(g.blocks) + index);
  return {found.x, found.y, found.z, 0};
}

// The units that this CTA has of all: as many as any other, or one more.
__device__ __forceinline__ Units units_of_cta(const Gemm& g, const Plan& plan) {
  const int cta = blockIdx.x;
  if constexpr (!kExperts) {
    return {plan.units_each + (cta < plan.units_more), 0, cta * plan.units_each + min(cta, plan.units_more)};
  }
  const int units = *g.blocks_in_use * plan.row_units, ctas = gridDim.x;
  const int each = units / ctas, more = units % ctas, first = cta * each + min(cta, more);
  return {each + (cta < more), first / plan.row_units, first % plan.row_units};
}

// A value that stays in its register: ptxas cannot know that it might as well compute it again.
__device__ __forceinline__ int held(int value) {
  asm volatile("shfl.sync.idx.b32 %0, %0, %1, 31, -1;" : "+r"(value) : "r"(static_cast<int>(threadIdx.x % kWarp)));
  return value;
}

// `kBoxes`: of x, whose rows lie together.
template <int kTokens, bool kBoxes>
__global__ void __launch_bounds__(kThreads, 1)
    few(const __grid_constant__ CUtensorMap boxes, const Gemm g, const Plan plan) {
  constexpr int kUnitSums = kWarps * kTokens * kSumPitch;
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int busy_warps = g.strips * plan.warps;
  const uint32_t x_at = shared_address(memory);
  float* sums_at = reinterpret_cast<float*>(memory + plan.slots * plan.slot_bytes);
  const uint32_t full = shared_address(sums_at + kPlaces * kUnitSums), empty = full + plan.slots * 8;
  const uint32_t left_sums = empty + plan.slots * 8, free_sums = left_sums + kPlaces * 8;
  // x stays for all units of a block.
  const bool stays = plan.chunks <= plan.slots;

  // Of a warp that multiplies: weights, a pair of steps after the other, whatever unit they are of.
  const int strip = warp * plan.warps_inverse >> 8, group = warp - strip * plan.warps;
  Units unit = {}, asked = {};
  int asked_pair = group;
  const uint8_t *codes = nullptr, *scales = nullptr;  // of this lane, in that pair
  int lone = 0, next_codes = 0, next_scales = 0;
  const auto find_weights = [&] {
    if (asked.left <= 0) return;
    // Beyond the last strip the last is multiplied again, and dropped.
    const int own = min(asked.rows * g.strips + strip, plan.strips - 1), expert = block_of(g, asked.block).expert;
    const int64_t tile = static_cast<int64_t>(expert * g.row_tiles + own / kTileStrips) * g.steps + 2 * group;
    codes = g.codes + tile * kCodeBytes + own % kTileStrips * kStripCodes + lane * 16;
    scales = g.block_scale + tile * kScaleBytes + own % kTileStrips * kStripScales + lane / 4 * 8;
  };
  const auto ask = [&](Packed (&w)[2]) {
    if (asked.left <= 0) return;
    w[0].load(codes, scales);
    if (asked_pair != lone) w[1].load(codes + kCodeBytes, scales + kScaleBytes);
    else w[1] = Packed{};
    codes += next_codes;
    scales += next_scales;
    asked_pair += plan.warps;
    if (asked_pair < plan.pairs) return;
    asked.advance(plan);
    asked_pair = group;
    find_weights();
  };
  Packed weights[kAhead][2];

  if (warp < kWarps) {
    // Those of one matrix may come before the kernel before this one has ended: it is not the one that made them. Which
    // experts there are it may have said.
    if constexpr (kExperts) wait_for_kernel_before();
    unit = units_of_cta(g, plan);
    if (warp >= busy_warps) unit.left = 0;
    asked = unit;
    find_weights();
    lone = held(g.steps % 2 == 0 ? -1 : plan.pairs - 1);  // the pair that lacks its second step
    next_codes = held(plan.warps * 2 * kCodeBytes), next_scales = held(plan.warps * 2 * kScaleBytes);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ask(weights[i]);
  } else if (warp == kWarps) {
    for (int i = lane; i < plan.slots; i += kWarp) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, busy_warps);
    }
    if (lane == 0) {
      for (int i = 0; i < kPlaces; ++i) {
        barrier_init(left_sums + i * 8, busy_warps);
        barrier_init(free_sums + i * 8, kFinishers);
      }
    }
    barriers_ready();
  } else if (!kBoxes) {
    // What the last pair has beyond the columns of x counts as 0. There is but one chunk then: it stays so.
    const int row_bytes = g.columns * 2, words = (plan.pairs * kPairBytes - row_bytes) / 16;
    for (int i = threadIdx.x - (kWarps + 1) * kWarp; i < words * plan.slots * plan.slot_rows; i += kFinishers * kWarp) {
      *reinterpret_cast<uint4*>(memory + i / words * plan.pitch + row_bytes + i % words * 16) = make_uint4(0, 0, 0, 0);
    }
  }
  __syncthreads();

  if (warp < kWarps) {
    // For ldmatrix, lane l says where row l % 8 of matrix l / 8 is: 8 columns of a token. Of tokens that there are not,
    // a sum is made of any, and dropped. In a box a step's rows lie together, swizzled: its second half of columns may
    // come first.
    constexpr int kNextStep = kBoxes ? kTokens * kRowOfBox : kStepBytes;
    const int piece = lane / 8 ^ lane % 8, row = lane % 8;
    const int half_step = kBoxes ? held(piece < 4 ? kStepBytes / 2 : -kStepBytes / 2) : kStepBytes / 2;
    uint32_t of_lane[kTokens / 8];
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      of_lane[n] = kBoxes
                       ? held(x_at + 2 * group * kNextStep + (n * 8 + row) * kRowOfBox + piece * 16)
                       : held(x_at + min(n * 8 + row, plan.slot_rows - 1) * plan.pitch + lane / 8 * 16 + group * kPairBytes);
    }
    const Powers& by = g.powers;
    // Of few tokens each step of a pair has sums of its own, that a multiplication need not wait for the one before.
    constexpr int kChains = kTokens == 8 ? 2 : 1, kSets = kTokens / 8 * kChains;
    float sums[kSets][4] = {};
    const auto load_x = [&](uint32_t from, uint32_t (&x)[kTokens / 8][2][4]) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        load_matrices(of_lane[n] + from, x[n][0]);
        load_matrices(of_lane[n] + from + half_step, x[n][1]);
      }
    };
    const auto multiply = [&](const Packed& w, const uint32_t (&x)[kTokens / 8][2][4], int chain) {
      uint32_t values[4];
      const auto add = [&](int block) {
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
          Mma<Value>::multiply(sums[n * kChains + chain], values, x[n][block / 2] + block % 2 * 2);
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
    const auto leave_sums = [&](float* of_unit) {
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
#pragma unroll
      for (int n = 0; n < kSets; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    };

    // A chunk of x after the other; a warp may have no pair of the last one.
    const int own_chunks = (plan.pairs - group + plan.warps - 1) / plan.warps;
    int left = own_chunks, slot = 0, place = 0;
    uint32_t parity = 0, free_parity = 0;
    int first_slot = 0;  // of the unit
    uint32_t first_parity = 0;
    bool gives = !stays || unit.ends_block(plan);
    const auto give = [&] {
      __syncwarp();
      if (lane == 0) arrive(empty + slot * 8);
    };
    const auto advance = [&] {
      if (++slot < plan.slots) return;
      slot = 0;
      parity ^= 1;
    };
    const auto end_unit = [&] {
      wait(free_sums + place * 8, free_parity);
      leave_sums(sums_at + place * kUnitSums);
      __syncwarp();
      if (lane == 0) arrive(left_sums + place * 8);
      place ^= 1;
      if (place == 0) free_parity ^= 1;
      if (gives) {
        if (own_chunks < plan.chunks) {
          give();
          advance();
        }
        if constexpr (kExperts) first_slot = slot, first_parity = parity;
      } else {
        slot = first_slot, parity = first_parity;
      }
      left = own_chunks;
      unit.advance(plan);
      gives = !stays || unit.ends_block(plan);
    };
    while (unit.left > 0) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (unit.left <= 0) break;
        wait(full + slot * 8, parity);
        const uint32_t from = slot * plan.slot_bytes;
        uint32_t x[2][kTokens / 8][2][4];
        load_x(from, x[0]);
        load_x(from + kNextStep, x[1]);
        multiply(weights[i][0], x[0], 0);
        multiply(weights[i][1], x[1], kChains - 1);
        ask(weights[i]);
        if (gives) give();
        advance();
        if (--left == 0) end_unit();
      }
    }
    return;
  }

  let_kernel_after_start();
  wait_for_kernel_before();

  unit = units_of_cta(g, plan);

  if (warp == kWarps) {
    const int64_t row_bytes = g.columns * 2;
    int slot = 0;
    uint32_t parity = 1;
    for (bool fresh = true; unit.left > 0; unit.advance(plan)) {
      const bool needed = fresh || !stays;
      fresh = unit.ends_block(plan);
      if (!needed) continue;
      const Block block = block_of(g, unit.block);
      const int rows = min(block.end - block.begin, plan.slot_rows);
      const uint8_t* from = static_cast<const uint8_t*>(g.x);
      if (lane < rows) {
        const int row = block.begin + lane;
        from += row_bytes * (!kExperts || g.token_of == nullptr ? row : g.token_of[row]);
      }
      for (int chunk = 0; chunk < plan.chunks; ++chunk) {
        if constexpr (kBoxes) {
          if (lane == 0) {
            const int steps = 2 * plan.warps;
            wait(empty + slot * 8, parity);
            expect_bytes(full + slot * 8, plan.slot_bytes);
            copy_steps(g, boxes, x_at + slot * plan.slot_bytes, 0, kTokens, chunk * steps, steps, full + slot * 8);
          }
          if (++slot == plan.slots) slot = 0, parity ^= 1;
          continue;
        }
        const int whole = plan.warps * kPairBytes, first = chunk * whole;
        const int bytes = min(whole, static_cast<int>(row_bytes) - first);
        if (lane == 0) {
          wait(empty + slot * 8, parity);
          expect_bytes(full + slot * 8, rows * bytes);
        }
        __syncwarp();
        if (lane < rows) copy_bulk(x_at + slot * plan.slot_bytes + lane * plan.pitch, from + first, bytes, full + slot * 8);
        if (++slot == plan.slots) slot = 0, parity ^= 1;
      }
    }
    return;
  }

  const int thread = threadIdx.x - (kWarps + 1) * kWarp, pieces = g.strips * (kStrip / kPieceRows);
  // What these threads make of a unit's sums. A first round, of which nothing is kept, brings code and scales; the places
  // for sums are free after it.
  const auto finish = [&](const float* sums, bool keep) {
    const Block block = block_of(g, unit.block);
    const int first_strip = unit.rows * g.strips;
    for (int item = thread; item < (block.end - block.begin) * pieces; item += kFinishers * kWarp) {
      const int token = item * plan.pieces_inverse >> 16, piece = item - token * pieces, row = first_row(piece);
      if (first_strip + piece / 2 >= plan.strips) continue;
      const Piece finished(g, block.expert, first_strip * kStrip + row);
      const float* from = sums + (piece / 2 * plan.warps * kTokens + token) * kSumPitch + row % kStrip;
      float total[kPieceRows], part[kPieceRows];
      load_sums(from, total);
      for (int other = 1; other < plan.warps; ++other) {
        load_sums(from + other * (kTokens * kSumPitch), part);
#pragma unroll
        for (int i = 0; i < kPieceRows; ++i) total[i] += part[i];
      }
      if (finished.inside && keep) finished.finish(g, block.begin + token, total);
    }
  };
  if (unit.left > 0) finish(sums_at, false);
  __syncwarp();
  for (int i = 0; lane == 0 && i < kPlaces; ++i) arrive(free_sums + i * 8);
  int place = 0;
  uint32_t parity = 0;
  for (; unit.left > 0; unit.advance(plan)) {
    wait(left_sums + place * 8, parity);
    finish(sums_at + place * kUnitSums, true);
    __syncwarp();
    if (lane == 0) arrive(free_sums + place * 8);
    place ^= 1;
    if (place == 0) parity ^= 1;
  }
}

constexpr int fixed_bytes(int tokens) {
  return kPlaces * kWarps * tokens * kSumPitch * 4 + (kMostSlots + kPlaces) * 2 * 8;
}

template <int kTokens, bool kBoxes>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared_memory<few<kTokens, kBoxes>>(kSharedMemory)) return error;
  Plan plan;
  plan.strips = (kOutput == Output::gated ? 2 * g.outputs : g.outputs) / kStrip;
  plan.row_units = (plan.strips + g.strips - 1) / g.strips;
  plan.pairs = (g.steps + 1) / 2;
  plan.warps = kWarps / g.strips < plan.pairs ? kWarps / g.strips : plan.pairs;
  plan.warps_inverse = (256 + plan.warps - 1) / plan.warps;
  const int pieces = g.strips * (kStrip / kPieceRows);
  plan.pieces_inverse = (65536 + pieces - 1) / pieces;
  plan.slot_rows = kExperts ? kTokens : g.rows;
  plan.pitch = plan.warps * kPairBytes + 16;
  plan.slot_bytes = kBoxes ? kTokens * plan.warps * kPairBytes : plan.slot_rows * plan.pitch;
  const int room = (kSharedMemory - fixed_bytes(kTokens)) / plan.slot_bytes;
  plan.chunks = (plan.pairs + plan.warps - 1) / plan.warps;
  const int most = room < kMostSlots ? room : kMostSlots;
  // Of experts, blocks that follow are brought while one is in use.
  plan.slots = !kExperts && plan.chunks < most ? plan.chunks : most;
  if (g.columns % (2 * kStep) != 0 && plan.chunks > 1) return cudaErrorInvalidValue;
  const int64_t units = static_cast<int64_t>(g.block_limit) * plan.row_units;
  const int ctas = static_cast<int>(units < g.multiprocessors ? units : g.multiprocessors);
  plan.units_each = plan.row_units / ctas;
  plan.units_more = plan.row_units % ctas;
  const dim3 grid(static_cast<unsigned>(ctas));
  const int bytes = fixed_bytes(kTokens) + plan.slots * plan.slot_bytes;
  CUtensorMap boxes{};
  if (kBoxes && !map_of(g, kTokens, 2 * plan.warps, &boxes)) return cudaErrorInvalidValue;
  return launch_early(few<kTokens, kBoxes>, grid, 0, kThreads, bytes, stream, boxes, g, plan);
}

}  // namespace

cudaError_t FOS_PRODUCT(multiply_few_)(const Gemm& g, cudaStream_t stream) {
  if constexpr (kExperts) {
    if (g.tokens == 8) return launch<8, false>(g, stream);
  } else {
    constexpr int kRowsOneByOne = 4;  // up to which copies are faster than a box of 8, on an H200
    if (g.tokens == 8 && g.rows <= kRowsOneByOne) return launch<8, false>(g, stream);
    if (g.tokens == 8) return launch<8, true>(g, stream);
    if (g.tokens == 16) return launch<16, true>(g, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fos::cuda
