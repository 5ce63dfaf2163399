// What becomes of the blocks that threads of a GPU quantize: what quantize.cu and quantize_few_rows.cuh share.
#pragma once

#include <type_traits>

#include "cuda.h"
#include "quantize_choice.cuh"
#include "sm90.cuh"

// Thread block clusters, and kernels that start before the one they follow has ended.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FOS_HOPPER_OR_LATER 1
#endif

namespace fos::cuda {
namespace {

// What is written: codes and block scales; their products; or those, to the rows of all of a token's slots.
enum class Result { codes, values, values_of_slots };
template <Result result>
constexpr bool kOfSlots = result == Result::values_of_slots;

// Registers of a thread: as few as nothing is spilled with. 64 make room for 32 warps on a multiprocessor, 80 for 24.
template <bool gated, Result result>
__host__ __device__ constexpr int registers() {
#if defined(FOS_NATIVE_E2M1)
  if (kDtype != Dtype::fp32 && !gated && result == Result::codes) return 64;
#elif defined(FOS_NATIVE_FP8)
  if (kDtype != Dtype::fp32 && !gated) return result == Result::codes ? 64 : 80;
#endif
  return 96;
}

// The kernel before and the kernel after, where chips let them overlap.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(FOS_HOPPER_OR_LATER)
  sm90::wait_for_kernel_before();
#endif
}
__device__ __forceinline__ void let_kernel_after_start() {
#if defined(FOS_HOPPER_OR_LATER)
  sm90::let_kernel_after_start();
#endif
}

// Up to here the kernel before may still run, and from here on the one after: CTAs of three calls would crowd on some
// multiprocessors.
__device__ __forceinline__ void take_turn() {
  wait_for_kernel_before();
  let_kernel_after_start();
}

// Whether a row is somebody's.
__device__ __forceinline__ bool in_use(const Quantize& q, int64_t row) {
  return q.rows_in_use == nullptr || row < __ldcg(q.rows_in_use);
}

template <Result result>
using RoundedFor = std::conditional_t<result == Result::codes, Codes, Numbers>;

// --- writing ---

// e2m1 * block_scale, exact in every type.
__device__ __forceinline__ Raw values_of(const Chosen<Numbers>& chosen, const Raw& raw) {
  float value[kBlock];
  const float scale = chosen.scale.value * (1.0f / kOne);
#pragma unroll
  for (int i = 0; i < kBlock; ++i) value[i] = chosen.rounded.part[i] * scale;
  Raw out = pack(value);
#pragma unroll
  for (int i = 0; i < Raw::kWords; ++i) out.word[i] |= raw.word[i] & kSigns;
  return out;
}

__device__ __forceinline__ uint2 codes_of(const Chosen<Codes>& chosen, const Raw& raw) {
  uint32_t word[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t even, odd;
    sign_bytes(raw, 8 * i, even, odd);
    word[i] = chosen.rounded.word(i) | (even >> 4 & 0x08080808u) | (odd & 0x80808080u);
  }
  return make_uint2(word[0], word[1]);
}

// Where a row's results go.
struct Target {
  uint2* packed;       // a block each
  uint8_t* scales;     // in every layout four lie together, and the next four at a fixed distance; null: nowhere
  int scale_stride;    // that distance
  Raw* values;         // a block each; of slots, those of the first row
  const int32_t* row_of_slot;  // of the slots that get it
  int slots, blocks;           // how many; of a row
};

// From the scales of four blocks to those of the next four.
int scale_stride(const Quantize& q) { return 4 * static_cast<int>(tile_rows(q.layout)); }

template <Result result>
__device__ __forceinline__ Target target_of(const Quantize& q, int64_t row, int64_t scale_row, int blocks,
                                            int scale_stride) {
  Target to = {reinterpret_cast<uint2*>(q.packed) + row * blocks, nullptr, scale_stride,
               static_cast<Raw*>(q.values) + (kOfSlots<result> ? 0 : row * blocks), q.row_of_slot + row * q.top_k,
               q.top_k, blocks};
  if (scale_row >= 0) {
    to.scales = q.block_scale + scale_offset(q.layout, scale_row, 0, padded_scale_columns(q.layout, blocks));
  }
  return to;
}

// Calls `use` with the row of each slot that has one; several are read before the first is used.
template <class Use>
__device__ __forceinline__ void for_rows(const Target& to, Use use) {
  constexpr int kAtOnce = 8;
  for (int first = 0; first < to.slots; first += kAtOnce) {
    int row[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) row[i] = first + i < to.slots ? to.row_of_slot[first + i] : -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row[i] >= 0) use(row[i]);
    }
  }
}

__device__ __forceinline__ void write_scale(const Target& to, int block, uint32_t byte) {
  if (to.scales != nullptr) to.scales[(block >> 2) * to.scale_stride + (block & 3)] = static_cast<uint8_t>(byte);
}

__device__ __forceinline__ void write(const Target& to, int block, const Chosen<Codes>& chosen, const Raw& raw) {
  to.packed[block] = codes_of(chosen, raw);
  write_scale(to, block, chosen.scale.byte);
}

__device__ __forceinline__ void write(const Target& to, int block, const Chosen<Numbers>& chosen, const Raw& raw) {
  store(to.values, block, values_of(chosen, raw));
}

// To the rows of slots, of 16 bits a value, by the whole warp, each half of which has blocks that lie together in
// memory: those below `end` are written. A store has 16 bytes a thread, in the order of memory: so many stores are slow
// if each fills half of a sector.
__device__ __forceinline__ void write_to_slots(const Target& to, int block, int end, const Chosen<Numbers>& chosen,
                                               const Raw& raw) {
  const Raw values = values_of(chosen, raw);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, of_half = lane % kUnit;
  uint4 part[2];
  int unit[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int from = i * kUnit / 2 + of_half / 2;  // of the half, whose block the part is of
    uint32_t word[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t low = __shfl_sync(~0u, values.word[w], from, kUnit);
      const uint32_t high = __shfl_sync(~0u, values.word[4 + w], from, kUnit);
      word[w] = lane % 2 == 0 ? low : high;
    }
    part[i] = make_uint4(word[0], word[1], word[2], word[3]);
    unit[i] = block - of_half + from < end ? 2 * (block - of_half + from) + lane % 2 : -1;
  }
  for_rows(to, [&](int row) {
    uint4* values_of_row = reinterpret_cast<uint4*>(to.values + static_cast<int64_t>(row) * to.blocks);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (unit[i] >= 0) values_of_row[unit[i]] = part[i];
    }
  });
  __syncwarp();  // before some are settled
}

// The scale of a row for all that read it, by the threads that have the row.
template <Result result>
__device__ __forceinline__ void write_decode_scale(const Quantize& q, int64_t row, float scale, int thread,
                                                   int threads) {
  if constexpr (!kOfSlots<result>) {
    if (thread == 0) q.decode_scale[row] = scale;
  } else {
    for (int k = thread; k < q.top_k; k += threads) {
      const int64_t slot = row * q.top_k + k;
      const int to = q.row_of_slot[slot];
      if (to < 0) continue;
      q.decode_scale[to] = scale;
      q.slot_of_row[to] = static_cast<int32_t>(slot);
    }
  }
}

// A block that nothing is known of, by the specification: by the whole warp as in decide, and written by it.
template <Metric metric, bool adaptive, bool gated, Result result>
__device__ __forceinline__ void settle(const Quantize& q, const Row& row, const void* x, const Raw* stash, int block,
                                       const Target& to) {
  const int lane = threadIdx.x % kWarp, i = lane % kBlock, at = block * kBlock + i;
  const float value = gated && stash != nullptr ? read_one<false>(stash, at, 0)
                                                : read_one<gated>(x, at, static_cast<int>(q.columns));
  const float a = magnitude(value);
  const float v = bits<float>(__reduce_max_sync(~0u, bits<uint32_t>(a)));
  const float b = unrounded_scale<adaptive>(v, row.encode);
  const bool four = adaptive && lane >= kBlock;
  float sf = block_scale(four ? b * 1.5f : b);
  float r = round_e2m1(a * inverse_scale(sf, row.decode));
  if constexpr (adaptive) {
    const float term = error_term<metric>(q.recipe.domain, q.recipe.encoded_amax, r, sf, a, row.amax, row.encode,
                                          row.decode);
    const int winner = four_wins<metric>(term, four ? kBlock : 0) ? kBlock : 0;
    r = __shfl_sync(~0u, r, winner + i);
    sf = __shfl_sync(~0u, sf, winner);
  }
  const bool whole = is_finite(v);
  if constexpr (result != Result::codes) {
    const float product = bits<float>(bits<uint32_t>(r * sf) | (bits<uint32_t>(value) & kSign));
    const float number = whole ? product : bits<float>(0x7FC00000u);
    if (lane >= kBlock) return;
    const auto put = [&](int64_t index) {
      if constexpr (kDtype == Dtype::fp32) {
        reinterpret_cast<float*>(to.values)[index] = number;
      } else {
        reinterpret_cast<uint16_t*>(to.values)[index] = kDtype == Dtype::bf16 ? bf16_bits(number) : fp16_bits(number);
      }
    };
    if constexpr (!kOfSlots<result>) {
      put(at);
    } else {
      for_rows(to, [&](int to_row) { put(static_cast<int64_t>(to_row) * to.blocks * kBlock + at); });
    }
  } else {
    const uint32_t code = whole ? (e2m1_code(r) | bits<uint32_t>(value) >> 31 << 3) << 4 * (i % 8) : 0u;
    const uint32_t low = __reduce_or_sync(~0u, i < 8 ? code : 0u), high = __reduce_or_sync(~0u, i < 8 ? 0u : code);
    if (lane != 0) return;
    to.packed[block] = make_uint2(low, high);
    write_scale(to, block, whole ? e4m3_byte(sf) : kE4m3Nan);
  }
}

}  // namespace
}  // namespace fos::cuda
