// How packed weights lie for products on a CPU, and how they are unpacked: in registers, so that a token costs 4.5 bits
// of memory traffic per weight instead of bf16's 16.
//
// Strips of 16 rows, a lane each (kernels/cpu.py shuffles them once): for a block of 16 columns 8 x 16 bytes, each the
// codes of two columns of a row, and 16 block scales.
#pragma once

#include "cpu.h"

namespace fos::FOS_ISA {
namespace {

constexpr int kStripBytes = kBlock * kBlock / 2;  // of codes, for a block of columns

alignas(64) constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// 16 floats, one for each row of a strip.
#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
  static FOS_FN Lanes zero() { return {_mm512_setzero_ps()}; }
  FOS_FN void store(float* out) const { _mm512_store_ps(out, v); }
  // e2m1 numbers of the low and of the high nibbles: the look-up reads the lowest 4 bits only.
  static FOS_FN void unpack(const uint8_t* codes, Lanes& even, Lanes& odd) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512 table = _mm512_load_ps(kE2m1);
    even.v = _mm512_permutexvar_ps(bytes, table);
    odd.v = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
  }
  // E4M3 numbers. Shifted to where fp16 has its exponent and mantissa they are 2^-8 of themselves, subnormals included.
  static FOS_FN Lanes scales(const uint8_t* e4m3) {
    const __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(e4m3)));
    const __m256i magnitude = _mm256_and_si256(byte, _mm256_set1_epi16(0x7F));
    const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(byte, magnitude), 8);
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(kE4m3Nan)),
                                         _mm256_set1_epi16(0x7E00));
    const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), nan);
    return {_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f))};
  }
  FOS_FN void add_product(Lanes a, float b) { v = _mm512_fmadd_ps(a.v, _mm512_set1_ps(b), v); }
  FOS_FN void add_product(Lanes a, Lanes b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  FOS_FN Lanes plus(Lanes b) const { return {_mm512_add_ps(v, b.v)}; }
};
constexpr int kMostTokens = 8;  // 24 sums of 32 registers

#elif defined(__AVX2__)

struct Lanes {
  __m256 v[2];
  static FOS_FN Lanes zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  FOS_FN void store(float* out) const {
    _mm256_store_ps(out, v[0]);
    _mm256_store_ps(out + 8, v[1]);
  }
  // The look-up reads 3 bits, the magnitude; bit 3 becomes the sign.
  static FOS_FN __m256 numbers(__m256i code) {
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32(static_cast<int>(kSign)));
    const __m256 magnitude = _mm256_permutevar8x32_ps(_mm256_load_ps(kE2m1), code);
    return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
  }
  static FOS_FN void unpack(const uint8_t* codes, Lanes& even, Lanes& odd) {
    for (int half = 0; half < 2; ++half) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * half));
      const __m256i bytes = _mm256_cvtepu8_epi32(eight);
      even.v[half] = numbers(bytes);
      odd.v[half] = numbers(_mm256_srli_epi32(bytes, 4));
    }
  }
  static FOS_FN Lanes scales(const uint8_t* e4m3) {
    alignas(32) float numbers[kBlock];
    for (int r = 0; r < kBlock; ++r) numbers[r] = e4m3_value(e4m3[r]);
    return {{_mm256_load_ps(numbers), _mm256_load_ps(numbers + 8)}};
  }
  FOS_FN void add_product(Lanes a, float b) {
    for (int half = 0; half < 2; ++half) v[half] = _mm256_fmadd_ps(a.v[half], _mm256_set1_ps(b), v[half]);
  }
  FOS_FN void add_product(Lanes a, Lanes b) {
    for (int half = 0; half < 2; ++half) v[half] = _mm256_fmadd_ps(a.v[half], b.v[half], v[half]);
  }
  FOS_FN Lanes plus(Lanes b) const { return {{_mm256_add_ps(v[0], b.v[0]), _mm256_add_ps(v[1], b.v[1])}}; }
};
constexpr int kMostTokens = 2;  // 12 sums of 16 registers

#else

struct Lanes {
  float v[kBlock];
  static FOS_FN Lanes zero() { return {}; }
  FOS_FN void store(float* out) const {
    for (int i = 0; i < kBlock; ++i) out[i] = v[i];
  }
  static FOS_FN void unpack(const uint8_t* codes, Lanes& even, Lanes& odd) {
    for (int i = 0; i < kBlock; ++i) even.v[i] = kE2m1[codes[i] & 15], odd.v[i] = kE2m1[codes[i] >> 4];
  }
  static FOS_FN Lanes scales(const uint8_t* e4m3) {
    Lanes numbers;
    for (int r = 0; r < kBlock; ++r) numbers.v[r] = e4m3_value(e4m3[r]);
    return numbers;
  }
  FOS_FN void add_product(const Lanes& a, float b) {
    for (int i = 0; i < kBlock; ++i) v[i] += a.v[i] * b;
  }
  FOS_FN void add_product(const Lanes& a, const Lanes& b) {
    for (int i = 0; i < kBlock; ++i) v[i] += a.v[i] * b.v[i];
  }
  FOS_FN Lanes plus(const Lanes& b) const {
    Lanes sum;
    for (int i = 0; i < kBlock; ++i) sum.v[i] = v[i] + b.v[i];
    return sum;
  }
};
constexpr int kMostTokens = 4;

#endif

}  // namespace
}  // namespace fos::FOS_ISA
