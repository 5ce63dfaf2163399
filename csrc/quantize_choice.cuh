// How threads of a GPU choose between 4 and 6, and round.
//
// Compiled with FOS_DTYPE = bf16, fp16 or fp32, the type of the input, and -fmad=false: only what is written as fmaf is
// fused, and only where it is exact or where no byte depends on it.
//
// How the choice between 4 and 6 stays byte-exact at a third of the instructions. Errors decide one comparison, so
// they need not be the specification's, only near enough: a block's two errors are first computed with fused
// operations, in any order, in one domain for all three (`Filter`). Where they differ by more than both computations
// can be off, the comparison has the same answer; where they do not (of random blocks in bf16 about one in five
// thousand with mse, one in thirty with abs_max, most of them ties; and every block outside the range that the bound
// was derived for), they are computed with nvfp4.cuh's operations, in the specification's order: by decide, or for the
// whole block by settle. Rounding itself is exact on all ways.
//
// Values keep their signs on the way: every step is symmetric in them, and taking them off would cost instructions.
#pragma once

#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include "quantize_input.cuh"

namespace fos::cuda {
namespace {

// --- the exact pieces, without the cases that the filter's range leaves out ---

// v / 6, correctly rounded for normal v far from the ends of fp32: a product corrected by its exact remainder.
__device__ __forceinline__ float sixth(float v) {
  const float q = v * (1.0f / 6.0f);
  return fmaf(fmaf(-6.0f, q, v), 1.0f / 6.0f, q);
}

// 1 / b, correctly rounded likewise: one Newton step from the hardware's approximation, as CUDA's own reciprocal, whose
// checks of the range are left out (seen to agree for every mantissa in 140 binades on an H200). NaN for 0.
__device__ __forceinline__ float reciprocal(float b) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  return fmaf(y, fmaf(-b, y, 1.0f), y);
}

// What 1 is while e2m1 numbers are rounded and packed. As e5m2's smallest normal number, so that 0.5 is subnormal there
// as it is in e2m1, one conversion packs two of them.
#if defined(FOS_NATIVE_FP8) && !defined(FOS_NATIVE_E2M1)
constexpr float kOne = 0x1p-14f;
#else
constexpr float kOne = 1.0f;
#endif

// The e2m1 number, times kOne, nearest to y, for magnitudes below 7 * kOne; without the sign where it is 0.
// As round_e2m1, but 1.5 * 2^22 * e is added, e being the power of two of y's binade: with y of either sign, the sum
// lies between 2^22 * e and 2^23 * e, where a unit is e / 2, as the grid's. The addend is an even number of units: ties
// go to even codes. It is exact as a product: fusing it with the sum changes nothing. (Seen to agree for every such y.)
__device__ __forceinline__ float round_signed(float y) {
  const float e = bits<float>(bits<uint32_t>(fmaxf(fabsf(y), kOne)) & kExponent);
  return fmaf(e, -0x1.8p22f, fmaf(e, 0x1.8p22f, y));
}

// Of two; here zeros may keep their sign.
__device__ __forceinline__ void round_pair(float y0, float y1, float& r0, float& r1) {
#if defined(FOS_NATIVE_E2M1)
  const __nv_fp4x2_storage_t pair = __nv_cvt_float2_to_fp4x2(make_float2(y0, y1), __NV_E2M1, cudaRoundNearest);
  const float2 r = __half22float2(__half2(__nv_cvt_fp4x2_to_halfraw2(pair, __NV_E2M1)));
  r0 = r.x, r1 = r.y;
#else
  r0 = round_signed(y0), r1 = round_signed(y1);
#endif
}

// A block scale: the E4M3 number and its byte.
struct Scale {
  float value;
  uint32_t byte;
};

// The E4M3 numbers nearest to a and b >= 0, saturating.
__device__ __forceinline__ void round_scales(float a, float b, Scale& rounded_a, Scale& rounded_b) {
#if defined(FOS_NATIVE_FP8)
  const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const float2 rounded = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
  rounded_a = {rounded.x, pair & 0xFFu}, rounded_b = {rounded.y, uint32_t(pair) >> 8};
#else
  rounded_a.value = round_e4m3(smaller(a, kE4m3Max)), rounded_b.value = round_e4m3(smaller(b, kE4m3Max));
  rounded_a.byte = e4m3_byte(rounded_a.value), rounded_b.byte = e4m3_byte(rounded_b.value);
#endif
}

// Codes of a block from e2m1 numbers times kOne, eight at a time. Signs may be there or not: zeros may have lost their
// own, and codes_of takes all from the input.
struct Codes {
#if defined(FOS_NATIVE_FP8) && !defined(FOS_NATIVE_E2M1)
  uint32_t part[4];  // e5m2 bytes s000ccc0, the code in bits 3..1: even columns, odd columns, and so again

  __device__ __forceinline__ void set(int half, const float* r) {
    part[2 * half] = four(r), part[2 * half + 1] = four(r + 1);
  }

  __device__ __forceinline__ uint32_t word(int half) const {
    return (part[2 * half] >> 1 & 0x07070707u) | (part[2 * half + 1] << 3 & 0x70707070u);
  }

 private:
  static __device__ __forceinline__ uint32_t four(const float* r) {
    const __nv_fp8x2_storage_t low = __nv_cvt_float2_to_fp8x2(make_float2(r[0], r[2]), __NV_SATFINITE, __NV_E5M2);
    const __nv_fp8x2_storage_t high = __nv_cvt_float2_to_fp8x2(make_float2(r[4], r[6]), __NV_SATFINITE, __NV_E5M2);
    uint32_t both;  // a C++ expression of the same clears what the permutation does not read
    asm("mov.b32 %0, {%1, %2};" : "=r"(both) : "h"(low), "h"(high));
    return both;
  }
#else
  uint32_t part[2];

  __device__ __forceinline__ void set(int half, const float* r) {
    part[half] = 0;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
#if defined(FOS_NATIVE_E2M1)
      const uint32_t byte = __nv_cvt_float2_to_fp4x2(make_float2(r[i], r[i + 1]), __NV_E2M1, cudaRoundNearest);
#else
      const uint32_t byte = e2m1_code(magnitude(r[i])) | e2m1_code(magnitude(r[i + 1])) << 4;
#endif
      part[half] |= byte << 4 * i;
    }
  }

  __device__ __forceinline__ uint32_t word(int half) const { return part[half]; }
#endif
};

// The same, kept as numbers.
struct Numbers {
  float part[kBlock];

  __device__ __forceinline__ void set(int half, const float* r) {
#pragma unroll
    for (int i = 0; i < 8; ++i) part[8 * half + i] = r[i];
  }
};

// One of two.
template <class Rounded>
__device__ __forceinline__ Rounded select(bool first, const Rounded& a, const Rounded& b) {
  Rounded chosen;
#pragma unroll
  for (int i = 0; i < int(sizeof(a.part) / sizeof(a.part[0])); ++i) chosen.part[i] = first ? a.part[i] : b.part[i];
  return chosen;
}

// --- the filter ---

// How far apart two errors must be for the comparison to be the specification's: relative * (e4 + e6) + absolute * v^n.
//
// One term. Let c be 2^-24 and v the block's largest magnitude, in 2^-50 .. 2^50. Both candidates are unclipped (y
// below 7) and no block scale is 0. So, whatever amax a caller gives, all that follows are normal numbers; and v
// itself becomes a y of 2 or more, where nothing is rounded up by more than a fifth: no decoded value p is above 1.2
// v. The specification rounds p twice in the amax domain, once in that of the decode scale. The filter's r * (sf *
// decode), fused with - x, has the roundings of the encode scale, of its inverse and of the product in parentheses.
// Both subtractions round: |d' - d| <= 5 c p + c (|d| + |d'|). Of "scaled" errors, those times the encode scale, x
// times that is rounded, not p.
//
// Sums of 16. mae: 96 c v + 2 c e, and 32 c e for both summations. abs_max: 6 c v + 2 c |d| <= 8.4 c v. mse: squares
// differ by 10 c |d| p + 4 c d^2, and sum |d| p <= 4.8 v sqrt(e) <= 9.6 e + 0.6 v^2; squares and sums round by 32 c e.
// For two candidates, with a quarter or more to spare:
template <Metric metric>
struct Filter {
  static constexpr float kRelative =
      metric == Metric::mse ? 1.3125f * 0x1p-17f : (metric == Metric::mae ? 1.5f * 0x1p-19f : 0.0f);
  static constexpr float kAbsolute =
      metric == Metric::mse ? 0x1p-20f : (metric == Metric::mae ? 0x1p-16f : 1.5f * 0x1p-20f);

  static __device__ __forceinline__ void add(float& error, float d) {
    if constexpr (metric == Metric::mse) error = fmaf(d, d, error);
    if constexpr (metric == Metric::mae) error += fabsf(d);
    if constexpr (metric == Metric::abs_max) error = fmaxf(error, fabsf(d));
  }

  static __device__ __forceinline__ float margin(float error6, float error4, float v) {
    return fmaf(kRelative, error6 + error4, (metric == Metric::mse ? v * v : v) * kAbsolute);
  }
};

constexpr float kSmallest = 0x1p-50f, kLargest = 0x1p50f;

// What a row's blocks share.
struct Row {
  float amax, encode, decode;  // GlobalScales
  float unit;     // decode / kOne, or 0 for an amax of 0: dividing by it, the filter leaves all to the specification
  float largest;  // kLargest, or 0 for a row without a finite amax: none of its blocks is in the filter's range
};

__device__ __forceinline__ Row row_of(const GlobalScales& global) {
  return {global.amax, global.encode, global.decode, global.amax == 0.0f ? 0.0f : global.decode * (1.0f / kOne),
          global.finite ? kLargest : 0.0f};
}

// What the filter found of a block. `near`: it is in the filter's range, but its errors are too near to tell.
enum class Found { chosen, near, unknown };

// A quantized block. What is to be written of its numbers decides how they are kept: few registers, many warps.
template <class Rounded>
struct Chosen {
  Rounded rounded;
  Scale scale;
};

// A block in the filter's range, or one that becomes zeros (then without the signs in `raw`).
template <Metric metric, bool adaptive, class Rounded>
__device__ __forceinline__ Found choose(const Row& row, Raw& raw, Chosen<Rounded>& out) {
  const float v = bits<float>(largest_bits(larger_magnitudes(raw)));
  if (v >= kSmallest && v <= row.largest) {
    float values[kBlock];
    unpack(raw, values);
    if constexpr (adaptive) {
      const float b = sixth(v) * row.encode;
      Scale scale6, scale4;
      round_scales(b, b * 1.5f, scale6, scale4);
      // kOne is a power of two and moves no rounding: where a unit leaves fp32's normal range, v / unit is not below 7.
      const float unit6 = scale6.value * row.unit, unit4 = scale4.value * row.unit;
      const float inverse6 = reciprocal(unit6), inverse4 = reciprocal(unit4);
      float error6 = 0.0f, error4 = 0.0f;
      Rounded rounded6, rounded4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* x = values + 8 * half;
        float r6[8], r4[8];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          round_pair(x[i] * inverse6, x[i + 1] * inverse6, r6[i], r6[i + 1]);
          round_pair(x[i] * inverse4, x[i + 1] * inverse4, r4[i], r4[i + 1]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          Filter<metric>::add(error6, fmaf(r6[i], unit6, -x[i]));
          Filter<metric>::add(error4, fmaf(r4[i], unit4, -x[i]));
        }
        rounded6.set(half, r6);
        rounded4.set(half, r4);
      }
      const bool four = error4 < error6;
      out.scale.value = four ? scale4.value : scale6.value;
      out.scale.byte = four ? scale4.byte : scale6.byte;
      out.rounded = select(four, rounded4, rounded6);
      // Candidate 4 clips only where 6 does; a block scale of 0 makes the product infinite, or NaN. Where both scales
      // saturate, the candidates are one.
      if (!(v * inverse6 < 7.0f * kOne)) return Found::unknown;
      const bool apart = fabsf(error4 - error6) > Filter<metric>::margin(error6, error4, v);
      return apart || scale4.value == scale6.value ? Found::chosen : Found::near;
    } else {
      Scale unused;
      const float b = unrounded_scale<false>(v, row.encode);
      round_scales(b, b, out.scale, unused);
      const float inverse = reciprocal(out.scale.value * row.unit);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* x = values + 8 * half;
        float r[8];
#pragma unroll
        for (int i = 0; i < 8; i += 2) round_pair(x[i] * inverse, x[i + 1] * inverse, r[i], r[i + 1]);
        out.rounded.set(half, r);
      }
      return v * inverse < 7.0f * kOne ? Found::chosen : Found::unknown;
    }
  }
  // A block of zeros, and every block of a row without a finite amax.
  if (v != 0.0f && row.largest != 0.0f) return Found::unknown;
  out = {};
#pragma unroll
  for (int i = 0; i < Raw::kWords; ++i) raw.word[i] = 0;
  return Found::chosen;
}

// Whether candidate 4 wins, by terms added in the specification's order: each lane has a value's, and those of its own
// candidate begin at lane `first`: 0 for candidate 6, kBlock for 4.
template <Metric metric>
__device__ __forceinline__ bool four_wins(float term, int first) {
  float error = 0.0f;
#pragma unroll
  for (int j = 0; j < kBlock; ++j) error = add_error<metric>(error, __shfl_sync(~0u, term, first + j));
  return __shfl_sync(~0u, error, kBlock) < __shfl_sync(~0u, error, 0);
}

// Chooses for the threads of the warp that have a block `near`, by the specification's errors, and has each call `use`:
// all of the warp for one after the other, a lane for each value and candidate. Together because few threads have one:
// alone, a lane would keep 31 waiting for ten times as long. And in few steps: a kernel ends with the last such block.
template <Metric metric, class Rounded, class Use>
__device__ __forceinline__ void decide(const Recipe& recipe, const Row& row, const Raw& raw, bool near, Use use) {
  constexpr int kEach = kBlock / Raw::kWords;
  const int lane = threadIdx.x % kWarp, i = lane % kBlock, first = lane - i;
  for (uint32_t left = __ballot_sync(~0u, near); left != 0; left &= left - 1) {
    const int owner = __ffs(left) - 1;
    const auto its = [&](auto own) { return __shfl_sync(~0u, own, owner); };
    uint32_t word = 0;
#pragma unroll
    for (int w = 0; w < Raw::kWords; ++w) {
      const uint32_t one = its(raw.word[w]);
      word = i / kEach == w ? one : word;
    }
    const float a = magnitude(value_of(word, i % kEach)), encode = its(row.encode);
    const float v = bits<float>(__reduce_max_sync(~0u, bits<uint32_t>(a))), b = sixth(v) * encode;
    Scale scale6, scale4;
    round_scales(b, b * 1.5f, scale6, scale4);
    const float scale = first == 0 ? scale6.value : scale4.value;
    const float r = round_signed(a * reciprocal(scale * its(row.unit)));
    const float term = error_term<metric>(recipe.domain, recipe.encoded_amax, r * (1.0f / kOne), scale, a,
                                          its(row.amax), encode, its(row.decode));
    const bool four = four_wins<metric>(term, first);
    Chosen<Rounded> chosen;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float numbers[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) numbers[j] = __shfl_sync(~0u, r, (four ? kBlock : 0) + 8 * half + j);
      chosen.rounded.set(half, numbers);
    }
    chosen.scale.value = four ? scale4.value : scale6.value;
    chosen.scale.byte = four ? scale4.byte : scale6.byte;
    if (lane == owner) use(chosen);
  }
}

}  // namespace
}  // namespace fos::cuda
