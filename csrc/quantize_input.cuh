// What threads of a GPU read of what they quantize: blocks of 16 values of the type FOS_DTYPE.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "operands.h"

// Instructions that only some chips have. The generic code beside each gives the same bits (instead of NaN, a NaN).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
#define FOS_NATIVE_MAGNITUDES 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define FOS_NATIVE_FP8 1
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

}  // namespace
}  // namespace fos::cuda
