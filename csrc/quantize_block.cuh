// How threads of a GPU quantize blocks of 16 values: what quantize.cu and quantize_few_rows.cuh share.
//
// Compiled with FOS_DTYPE = bf16, fp16 or fp32, the type of the input, and -fmad=false: only what is written as fmaf is
// fused, and only where it is exact or where no byte depends on it.
//
// How the choice between 4 and 6 stays byte-exact at a third of the instructions. Errors decide one comparison, so they
// need not be the specification's, only near enough: a block's two errors are first computed with fused operations, in
// any order, in one domain for all three (`Filter`). Where they differ by more than both computations can be off, the
// comparison has the same answer; where they do not (about one block in forty thousand of random ones, ties, and every
// block outside the range that the bound was derived for), they are computed with nvfp4.cuh's operations, in the
// specification's order: by decide, or for the whole block by settle. Rounding itself is exact on all ways.
//
// Values keep their signs on the way: every step is symmetric in them, and taking them off would cost instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include <cstring>
#include <type_traits>

#include "cuda.h"
#include "sm90.cuh"

// Instructions that only some chips have. The generic code beside each gives the same bits (instead of NaN, a NaN).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
#define FOS_NATIVE_MAGNITUDES 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define FOS_NATIVE_FP8 1
#endif
// Thread block clusters, and kernels that start before the one they follow has ended.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FOS_HOPPER_OR_LATER 1
#endif
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define FOS_NATIVE_E2M1 1
#endif

namespace fos::cuda {
namespace {

constexpr Dtype kDtype = Dtype::FOS_DTYPE;
constexpr int kWarp = 32;
constexpr int kUnit = kWarp / 2;  // threads that have one row: groups are made of such
constexpr int64_t kMultiprocessors = 132, kResidentThreads = kMultiprocessors * 32 * kWarp;  // of an H200

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

// As bits(), for CUDA's pairs, which are not trivially copyable by the letter.
template <class To, class From>
__device__ __forceinline__ To pair_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &value, sizeof to);
  return to;
}

// 16 values as they lie in memory: two to a word, even column low, or one.
struct Raw {
  static constexpr int kWords = kDtype == Dtype::fp32 ? 16 : 8;
  uint32_t word[kWords];
};

constexpr uint32_t kSigns = kDtype == Dtype::fp32 ? kSign : 0x80008000u;  // of a word

// `past_l1`: the first-level cache may hold what was there before, until the kernel before is waited for.
template <bool past_l1 = false>
__device__ __forceinline__ Raw load(const void* x, int block) {
  Raw raw;
  const uint4* from = static_cast<const uint4*>(x) + block * (Raw::kWords / 4);
#pragma unroll
  for (int i = 0; i < Raw::kWords / 4; ++i) {
    const uint4 part = past_l1 ? __ldcg(from + i) : from[i];
    raw.word[4 * i] = part.x, raw.word[4 * i + 1] = part.y, raw.word[4 * i + 2] = part.z, raw.word[4 * i + 3] = part.w;
  }
  return raw;
}

__device__ __forceinline__ void store(void* x, int block, const Raw& raw) {
  uint4* to = static_cast<uint4*>(x) + block * (Raw::kWords / 4);
#pragma unroll
  for (int i = 0; i < Raw::kWords / 4; ++i) {
    to[i] = make_uint4(raw.word[4 * i], raw.word[4 * i + 1], raw.word[4 * i + 2], raw.word[4 * i + 3]);
  }
}

__device__ __forceinline__ void unpack(const Raw& raw, float (&x)[kBlock]) {
#pragma unroll
  for (int i = 0; i < Raw::kWords; ++i) {
    if constexpr (kDtype == Dtype::fp32) {
      x[i] = bits<float>(raw.word[i]);
    } else if constexpr (kDtype == Dtype::bf16) {
      x[2 * i] = bits<float>(raw.word[i] << 16), x[2 * i + 1] = bits<float>(raw.word[i] & 0xFFFF0000u);
    } else {
      const float2 pair = __half22float2(pair_bits<__half2>(raw.word[i]));
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}

// Of a word, the even or the odd column's.
__device__ __forceinline__ float value_of(uint32_t word, int odd) {
  if constexpr (kDtype == Dtype::fp32) return bits<float>(word);
  const uint32_t high = odd == 0 ? word << 16 : word & 0xFFFF0000u;
  return kDtype == Dtype::bf16 ? bits<float>(high) : __half2float(__ushort_as_half(static_cast<uint16_t>(high >> 16)));
}

// Rounded to the type, to nearest.
__device__ __forceinline__ Raw pack(const float (&x)[kBlock]) {
  Raw raw;
#pragma unroll
  for (int i = 0; i < Raw::kWords; ++i) {
    if constexpr (kDtype == Dtype::fp32) {
      raw.word[i] = bits<uint32_t>(x[i]);
    } else if constexpr (kDtype == Dtype::bf16) {
      raw.word[i] = pair_bits<uint32_t>(__floats2bfloat162_rn(x[2 * i], x[2 * i + 1]));
    } else {
      raw.word[i] = pair_bits<uint32_t>(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
    }
  }
  return raw;
}

// The larger magnitudes of two words, NaN above all: in each half, or of the whole word. Signs in and out mean nothing.
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
#if defined(FOS_NATIVE_MAGNITUDES)
  uint32_t larger;  // of magnitudes in one instruction, in every type, for a sign that is masked at the end
  if constexpr (kDtype == Dtype::fp32) {
    asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else if constexpr (kDtype == Dtype::bf16) {
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
#else
  a &= ~kSigns, b &= ~kSigns;  // floats without their sign are ordered as integers, NaN above infinity
  return kDtype == Dtype::fp32 ? max(a, b) : __vmaxu2(a, b);
#endif
}

// Of a block.
__device__ __forceinline__ uint32_t larger_magnitudes(const Raw& raw) {
  uint32_t found = raw.word[0];
#pragma unroll
  for (int i = 1; i < Raw::kWords; ++i) found = larger_magnitudes(found, raw.word[i]);
  return found;
}

// The largest of what they found as the bits of a float, in whose order NaN comes above infinity.
__device__ __forceinline__ uint32_t largest_bits(uint32_t found) {
  found &= ~kSigns;
  if constexpr (kDtype == Dtype::fp32) return found;
  found = max(found >> 16, found & 0xFFFFu);
  if constexpr (kDtype == Dtype::bf16) return found << 16;
  return bits<uint32_t>(__half2float(__ushort_as_half(static_cast<unsigned short>(found))));
}

// The bytes with the signs of eight values from `first` on, in the bytes' top bits: even and odd columns.
__device__ __forceinline__ void sign_bytes(const Raw& raw, int first, uint32_t& even, uint32_t& odd) {
  if constexpr (kDtype == Dtype::fp32) {
    const uint32_t* w = raw.word + first;
    even = __byte_perm(__byte_perm(w[0], w[2], 0x0073), __byte_perm(w[4], w[6], 0x0073), 0x5410);
    odd = __byte_perm(__byte_perm(w[1], w[3], 0x0073), __byte_perm(w[5], w[7], 0x0073), 0x5410);
  } else {
    const uint32_t* w = raw.word + first / 2;
    const uint32_t low = __byte_perm(w[0], w[1], 0x7351), high = __byte_perm(w[2], w[3], 0x7351);
    even = __byte_perm(low, high, 0x5410), odd = __byte_perm(low, high, 0x7632);
  }
}

// What is quantized of a row: its values, or silu(gate) * up rounded to their type.
template <bool gated, bool past_l1 = false>
__device__ __forceinline__ Raw read(const void* row, int block, int blocks) {
  if constexpr (!gated) return load<past_l1>(row, block);
  float gate[kBlock], up[kBlock];
  unpack(load(row, block), gate);
  unpack(load(row, blocks + block), up);
#pragma unroll
  for (int i = 0; i < kBlock; ++i) gate[i] = silu_and_mul(gate[i], up[i]);
  return pack(gate);
}

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

template <Result result>
using RoundedFor = std::conditional_t<result == Result::codes, Codes, Numbers>;

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
// One term. Let c be 2^-24, v the block's largest magnitude, in 2^-50 .. 2^50, and both candidates unclipped (y below 7). No
// decoded value p is above 1.2 v: under a block scale that is not 0, v itself becomes a y of 2 or more, and there nothing is
// rounded up by more than a fifth. The specification rounds p twice in the amax domain, less in others; the filter's
// r * (sf * decode), fused with - x, has the roundings of the encode scale, of its inverse and of the product in
// parentheses; and both subtractions round: |d' - d| <= 5 c p + c (|d| + |d'|). ("scaled" errors are those times the
// encode scale: a common factor.)
// Sums of 16. mae: 96 c v + 2 c e, and 32 c e for both summations. abs_max: 6 c v + 2 c |d| <= 8.4 c v. mse: the squares
// differ by 10 c |d| p + 4 c d^2, and sum |d| p <= 4.8 v sqrt(e) <= 9.6 e + 0.6 v^2; squares and summations round by 32 c e.
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

// What the filter found of a block. `near`: it is in the filter's range, but its candidates' errors are too near to tell.
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

// Chooses for the threads of the warp that have a block `near`, by the specification's errors, and has each call `use`:
// all of the warp for one after the other, a lane for each value and candidate. Together because such a block is rare:
// alone, one lane would keep 31 waiting for ten times as long. And in few steps: a kernel ends with the last such block.
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
    const float scale = first == 0 ? scale6.value : scale4.value, r = round_signed(a * reciprocal(scale * its(row.unit)));
    const float term = error_term<metric>(recipe.domain, recipe.encoded_amax, r * (1.0f / kOne), scale, a, its(row.amax),
                                          encode, its(row.decode));
    float error = 0.0f;
#pragma unroll
    for (int j = 0; j < kBlock; ++j) error = add_error<metric>(error, __shfl_sync(~0u, term, first + j));
    const bool four = __shfl_sync(~0u, error, kBlock) < __shfl_sync(~0u, error, 0);
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

// One value of what is quantized.
template <bool gated>
__device__ __forceinline__ float read_one(const void* row, int index, int columns) {
  const auto at = [&](int i) {
    if constexpr (kDtype == Dtype::fp32) return static_cast<const float*>(row)[i];
    const uint16_t h = static_cast<const uint16_t*>(row)[i];
    return kDtype == Dtype::bf16 ? bf16_value(h) : fp16_value(h);
  };
  if constexpr (!gated) return at(index);
  const float value = silu_and_mul(at(index), at(columns + index));
  if constexpr (kDtype == Dtype::bf16) return bf16_value(bf16_bits(value));
  return kDtype == Dtype::fp16 ? fp16_value(fp16_bits(value)) : value;
}

// Where the row's input begins.
template <bool gated>
__device__ __forceinline__ const void* input_row(const Quantize& q, int64_t row) {
  return static_cast<const char*>(q.x) + row * q.columns * ((gated ? 2 : 1) * (kDtype == Dtype::fp32 ? 4 : 2));
}

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
    float error = 0.0f;
#pragma unroll
    for (int j = 0; j < kBlock; ++j) error = add_error<metric>(error, __shfl_sync(~0u, term, (four ? kBlock : 0) + j));
    const bool four_wins = __shfl_sync(~0u, error, kBlock) < __shfl_sync(~0u, error, 0);
    r = __shfl_sync(~0u, r, (four_wins ? kBlock : 0) + i);
    sf = __shfl_sync(~0u, sf, four_wins ? kBlock : 0);
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
