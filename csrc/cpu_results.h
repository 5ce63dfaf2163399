// What the products on a CPU make of their sums, and which rows they read and write.
#pragma once

#include "cpu.h"

namespace fos::FOS_ISA {
namespace {

FOS_FN int64_t x_row_of(const Linear& l, int64_t token) { return l.x_row == nullptr ? token : l.x_row[token]; }
FOS_FN int64_t out_row_of(const Linear& l, int64_t token) { return l.out_row == nullptr ? token : l.out_row[token]; }
FOS_FN float token_scale_of(const Linear& l, int64_t token) {
  return l.token_scale == nullptr ? 1.0f : l.token_scale[x_row_of(l, token)];
}

template <Dtype dtype>
FOS_FN void write(const float* y, int count, void* out, int64_t at) {
  if (dtype == Dtype::fp32) {
    float* to = static_cast<float*>(out) + at;
    for (int i = 0; i < count; ++i) to[i] = y[i];
  } else {
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    for (int i = 0; i < count; ++i) to[i] = dtype == Dtype::bf16 ? bf16_bits(y[i]) : fp16_bits(y[i]);
  }
}

// The last steps for `count` rows of a token, in the order of the specification.
template <Dtype dtype>
FOS_FN void finish_rows(const Linear& l, int64_t token, int64_t row, const float* sums, int count) {
  const float* decode_scale = l.decode_scale + row;
  const float* bias = l.bias + row;
  float y[kBlock];
  const float token_scale = token_scale_of(l, token);
  for (int r = 0; r < count; ++r) y[r] = (sums[r] * token_scale) * decode_scale[r];
  if (l.bias != nullptr) {
    for (int r = 0; r < count; ++r) y[r] = y[r] + bias[r];
  }
  write<dtype>(y, count, l.out, out_row_of(l, token) * l.outputs + row);
}

#if defined(__AVX512F__)

// What the rows of a strip that is there are finished with, for token after token.
struct StripScales {
  __m512 decode_scale, bias;

  FOS_FN StripScales(const Linear& l, int64_t row)
      : decode_scale(_mm512_loadu_ps(l.decode_scale + row)),
        bias(l.bias != nullptr ? _mm512_loadu_ps(l.bias + row) : _mm512_setzero_ps()) {}

  FOS_FN __m512 finished(const Linear& l, const float* sums, __m512 token_scale) const {
    const __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(sums), token_scale), decode_scale);
    return l.bias != nullptr ? _mm512_add_ps(y, bias) : y;
  }
};

// Rounded to bf16, in the upper halves.
FOS_FN __m512i rounded_to_bf16(__m512 y) {
  const __m512i u = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
  return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
}

FOS_FN __m256i rounded_to_fp16(__m512 y) { return _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// finish_rows for all 16 at once, which the compiler does not find.
template <Dtype dtype>
FOS_FN void finish_strip(const Linear& l, int64_t token, int64_t row, const float* sums) {
  const __m512 y = StripScales(l, row).finished(l, sums, _mm512_set1_ps(token_scale_of(l, token)));
  const int64_t at = out_row_of(l, token) * l.outputs + row;
  if (dtype == Dtype::fp32) return _mm512_storeu_ps(static_cast<float*>(l.out) + at, y);
  const __m256i halves =
      dtype == Dtype::fp16 ? rounded_to_fp16(y) : _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bf16(y), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(l.out) + at), halves);
}

// finish_strip for two strips beside each other, of `count` tokens.
template <Dtype dtype>
FOS_FN void finish_pair(const Linear& l, int64_t first, int64_t count, int64_t row,
                        const float (&sums0)[kTileTokens][kBlock], const float (&sums1)[kTileTokens][kBlock]) {
  const StripScales scales0(l, row), scales1(l, row + kBlock);
  alignas(64) static constexpr uint16_t kUpperHalves[2 * kBlock] = {
      1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper_halves = _mm512_load_si512(kUpperHalves);
  for (int64_t t = 0; t < count; ++t) {
    const __m512 token_scale = _mm512_set1_ps(token_scale_of(l, first + t));
    const __m512 y0 = scales0.finished(l, sums0[t], token_scale), y1 = scales1.finished(l, sums1[t], token_scale);
    const int64_t at = out_row_of(l, first + t) * l.outputs + row;
    if constexpr (dtype == Dtype::fp32) {
      _mm512_storeu_ps(static_cast<float*>(l.out) + at, y0);
      _mm512_storeu_ps(static_cast<float*>(l.out) + at + kBlock, y1);
    } else {
      const __m512i both =
          dtype == Dtype::fp16
              ? _mm512_inserti64x4(_mm512_castsi256_si512(rounded_to_fp16(y0)), rounded_to_fp16(y1), 1)
              : _mm512_permutex2var_epi16(rounded_to_bf16(y0), upper_halves, rounded_to_bf16(y1));
      _mm512_storeu_si512(static_cast<uint16_t*>(l.out) + at, both);
    }
  }
}

#else

template <Dtype dtype>
FOS_FN void finish_strip(const Linear& l, int64_t token, int64_t row, const float* sums) {
  finish_rows<dtype>(l, token, row, sums, kBlock);
}

#endif

template <Dtype dtype>
FOS_FN void finish_as(const Linear& l, int64_t token, int64_t row, const float* sums) {
  if (l.outputs - row >= kBlock) {
    finish_strip<dtype>(l, token, row, sums);
  } else {
    finish_rows<dtype>(l, token, row, sums, static_cast<int>(l.outputs - row));
  }
}

// Rows from l.outputs on fill up the last strip and do not exist.
FOS_FN void finish(const Linear& l, int64_t token, int64_t row, const float* sums) {
  if (l.out_dtype == Dtype::bf16) return finish_as<Dtype::bf16>(l, token, row, sums);
  if (l.out_dtype == Dtype::fp16) return finish_as<Dtype::fp16>(l, token, row, sums);
  finish_as<Dtype::fp32>(l, token, row, sums);
}

}  // namespace
}  // namespace fos::FOS_ISA
