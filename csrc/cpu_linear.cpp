// y = x W^T on packed weights, for CPUs: weights are unpacked in registers, so that a token costs 4.5 bits of memory
// traffic per weight instead of bf16's 16.
//
// Compiled once for each instruction set like cpu.cpp (see there what that forbids). Weights lie in strips of 16 rows, a
// lane each (kernels/cpu.py shuffles them once): for a block of 16 columns 8 x 16 bytes, each the codes of two columns
// of a row, and 16 block scales. Two ways:
//
// - A few tokens: within a block, x times e2m1 is summed for even and for odd columns; the sum of the two is multiplied
//   by the block scale into the total. The products are exact for bf16 and fp16 (at most 13 significant bits).
// - More bf16 tokens on a processor that multiplies bf16 (AMX, AVX512_BF16): a panel of rows is unpacked to bf16 (exact:
//   e2m1 * E4M3 has 6 significant bits) into the second-level cache, where it is multiplied with all tokens,
//   accumulating in fp32. AVX512_BF16 multiplies at most 16 tokens in registers, as weights are unpacked. These
//   instructions read subnormal bf16 numbers as 0.
//
// What a number of y is summed from, and in which order, does not depend on how rows and tokens share the work.
#include "cpu.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fos::FOS_ISA {
namespace {

constexpr int kStripBytes = kBlock * kBlock / 2;  // of codes, for a block of columns

alignas(64) constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

template <Dtype dtype>
void to_fp32(const void* x, int64_t from, int64_t count, float* out) {
  if (dtype == Dtype::fp32) {
    const float* values = static_cast<const float*>(x) + from;
    for (int64_t i = 0; i < count; ++i) out[i] = values[i];
  } else {
    const uint16_t* values = static_cast<const uint16_t*>(x) + from;
    for (int64_t i = 0; i < count; ++i) out[i] = dtype == Dtype::bf16 ? bf16_value(values[i]) : fp16_value(values[i]);
  }
}

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

// `strips` x 16 rows for `tokens` tokens; x is fp32 [tokens, K].
template <int strips, int tokens>
void unit(const Linear& l, const float* x, int64_t strip, int64_t token) {
  const int64_t blocks = l.columns / kBlock;
  Lanes sums[strips][tokens];
  for (int s = 0; s < strips; ++s) {
    for (int t = 0; t < tokens; ++t) sums[s][t] = Lanes::zero();
  }
  for (int64_t block = 0; block < blocks; ++block) {
    Lanes even_sums[strips][tokens], odd_sums[strips][tokens];
    for (int s = 0; s < strips; ++s) {
      for (int t = 0; t < tokens; ++t) even_sums[s][t] = odd_sums[s][t] = Lanes::zero();
    }
    const float* of_block = x + block * kBlock;
#pragma GCC unroll 8
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      for (int s = 0; s < strips; ++s) {
        Lanes even, odd;
        Lanes::unpack(l.codes + ((strip + s) * blocks + block) * kStripBytes + pair * kBlock, even, odd);
        for (int t = 0; t < tokens; ++t) {
          even_sums[s][t].add_product(even, of_block[t * l.columns + 2 * pair]);
          odd_sums[s][t].add_product(odd, of_block[t * l.columns + 2 * pair + 1]);
        }
      }
    }
    for (int s = 0; s < strips; ++s) {
      const Lanes scale = Lanes::scales(l.block_scale + ((strip + s) * blocks + block) * kBlock);
      for (int t = 0; t < tokens; ++t) sums[s][t].add_product(even_sums[s][t].plus(odd_sums[s][t]), scale);
    }
  }
  for (int s = 0; s < strips; ++s) {
    for (int t = 0; t < tokens; ++t) {
      alignas(64) float y[kBlock];
      sums[s][t].store(y);
      finish(l, token + t, (strip + s) * kBlock, y);
    }
  }
}

// Strips [begin, end) for a number of tokens known to the compiler: as many strips at once as keep the multipliers busy.
template <int tokens>
void units(const Linear& l, const float* x, int64_t token, int64_t begin, int64_t end) {
  constexpr int together = kMostTokens / tokens < 4 ? kMostTokens / tokens : 4;
  int64_t strip = begin;
  for (; strip + together <= end; strip += together) unit<together, tokens>(l, x, strip, token);
  for (; strip < end; ++strip) unit<1, tokens>(l, x, strip, token);
}

}  // namespace

void tokens_in_fp32(const Linear& l, int64_t begin, int64_t end, float* out) {
  const auto convert = l.x_dtype == Dtype::fp32   ? to_fp32<Dtype::fp32>
                       : l.x_dtype == Dtype::bf16 ? to_fp32<Dtype::bf16>
                                                  : to_fp32<Dtype::fp16>;
  for (int64_t token = begin; token < end; ++token) {
    convert(l.x, x_row_of(l, token) * l.columns, l.columns, out + token * l.columns);
  }
}

void linear_strips(const Linear& l, const float* x, int64_t begin, int64_t end) {
  const StrictSubnormals strict;
  int64_t token = 0;
  for (; token + kMostTokens <= l.tokens; token += kMostTokens) {
    units<kMostTokens>(l, x + token * l.columns, token, begin, end);
  }
  const float* rest = x + token * l.columns;
  switch (l.tokens - token) {
    case 1: return units<1>(l, rest, token, begin, end);
#if !defined(__AVX2__) || defined(__AVX512F__)
    case 2: return units<2>(l, rest, token, begin, end);
    case 3: return units<3>(l, rest, token, begin, end);
#endif
#if defined(__AVX512F__)
    case 4: return units<4>(l, rest, token, begin, end);
    case 5: return units<5>(l, rest, token, begin, end);
    case 6: return units<6>(l, rest, token, begin, end);
    case 7: return units<7>(l, rest, token, begin, end);
#endif
  }
}

void combine_tokens(const Combine& c, int64_t begin, int64_t end) {
  const StrictSubnormals strict;
  constexpr int64_t kAtOnce = 64;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t first = 0; first < c.columns; first += kAtOnce) {
      const int count = static_cast<int>(c.columns - first < kAtOnce ? c.columns - first : kAtOnce);
      float total[kAtOnce] = {};
      for (int64_t k = token * c.top_k; k < (token + 1) * c.top_k; ++k) {
        const float* slot = c.slots + k * c.columns + first;
        const float weight = c.weights == nullptr ? 1.0f : c.weights[k];
        for (int i = 0; i < count; ++i) total[i] = total[i] + slot[i] * weight;
      }
      const int64_t at = token * c.columns + first;
      if (c.dtype == Dtype::bf16) write<Dtype::bf16>(total, count, c.out, at);
      else if (c.dtype == Dtype::fp16) write<Dtype::fp16>(total, count, c.out, at);
      else write<Dtype::fp32>(total, count, c.out, at);
    }
  }
}

// --- more bf16 tokens ---

#if defined(__AVX512F__) && defined(__AMX_BF16__)

namespace {

constexpr int kTile = kTileTokens * kTileStep;  // bf16 numbers: 16 rows of 64 bytes
constexpr int kNextRow = 64;                    // bytes between rows of a tile in memory

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Two columns of a strip as bf16 [16 rows][2].
FOS_FN __m512i unpacked(const uint8_t* codes, Lanes scale) {
  Lanes even, odd;
  Lanes::unpack(codes, even, odd);
  // The products are bf16 numbers already: their upper halves, side by side.
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_mul_ps(even.v, scale.v)), 16);
  return _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(_mm512_mul_ps(odd.v, scale.v)), high));
}

// A strip as tiles [columns / 32][16 pairs of columns][16 rows][2] of bf16; columns that do not exist are 0.
void unpack_strip(const Linear& l, int64_t strip, uint16_t* out) {
  const int64_t blocks = l.columns / kBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const Lanes scale = Lanes::scales(l.block_scale + (strip * blocks + block) * kBlock);
    const uint8_t* codes = l.codes + (strip * blocks + block) * kStripBytes;
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      _mm512_store_si512(out + (block * (kBlock / 2) + pair) * 2 * kBlock, unpacked(codes + pair * kBlock, scale));
    }
  }
  if (blocks % 2 != 0) {
    for (int64_t i = blocks * kTile / 2; i < (blocks + 1) * kTile / 2; i += 32) {
      _mm512_store_si512(out + i, _mm512_setzero_si512());
    }
  }
}

}  // namespace

Bf16Products bf16_products() {
  static const Bf16Products found = [] {
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux hands out the registers on request
    const bool amx = (d & kAmxBf16) && (d & kAmxTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    if (amx) return Bf16Products::tiles;
    return __builtin_cpu_supports("avx512bf16") ? Bf16Products::pairs : Bf16Products::none;
  }();
  return found;
}

// Groups of 16 tokens as tiles [columns / 32][16 tokens][32]; what does not exist is 0.
void tile_tokens(const Linear& l, int64_t begin, int64_t end, uint16_t* out) {
  const int64_t steps = (l.columns + kTileStep - 1) / kTileStep;
  const uint16_t* x = static_cast<const uint16_t*>(l.x);
  for (int64_t group = begin; group < end; ++group) {
    for (int64_t t = 0; t < kTileTokens; ++t) {
      const int64_t token = group * kTileTokens + t;
      const uint16_t* from = token < l.tokens ? x + x_row_of(l, token) * l.columns : x;
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t column = step * kTileStep, left = token < l.tokens ? l.columns - column : 0;
        const __mmask32 exist = left >= kTileStep ? 0xFFFFFFFFu : left > 0 ? 0x0000FFFFu : 0u;
        const __m512i numbers = _mm512_maskz_loadu_epi16(exist, from + column);
        _mm512_store_si512(out + ((group * steps + step) * kTileTokens + t) * kTileStep, numbers);
      }
    }
  }
}

namespace {

// finish_strip for two strips beside each other, of `count` tokens.
template <Dtype dtype>
FOS_FN void finish_pair(const Linear& l, int64_t first, int64_t count, int64_t row, const float (&sums0)[kTileTokens][kBlock],
                        const float (&sums1)[kTileTokens][kBlock]) {
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

// Two bf16 numbers beside each other.
FOS_FN int two_numbers(const uint16_t* x) {
  int both;
  std::memcpy(&both, x, sizeof both);
  return both;
}

// Sums of two groups of tokens, for two strips each.
using Sums = float[2][2][kTileTokens][kBlock];

// By AMX. All four are summed: where there is no second group or strip, the first one twice.
struct ByTiles {
  ByTiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~ByTiles() { _tile_release(); }

  static void multiply(const uint16_t* const (&x)[2], const uint16_t* const (&w)[2], int64_t, int64_t steps, Sums& sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, x[0] + step * kTile, kNextRow);
      _tile_loadd(5, x[1] + step * kTile, kNextRow);
      _tile_loadd(6, w[0] + step * kTile, kNextRow);
      _tile_loadd(7, w[1] + step * kTile, kNextRow);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0][0], kNextRow);
    _tile_stored(1, sums[0][1], kNextRow);
    _tile_stored(2, sums[1][0], kNextRow);
    _tile_stored(3, sums[1][1], kNextRow);
  }
};

// By AVX512_BF16, whose sums are of two columns: eight tokens at a time, of those that exist.
struct ByPairs {
  static constexpr int kTogether = 8;  // with two strips 16 sums of 32 registers

  __attribute__((target("avx512bf16"))) static void multiply(const uint16_t* const (&x)[2],
                                                             const uint16_t* const (&w)[2], int64_t tokens,
                                                             int64_t steps, Sums& sums) {
    for (int64_t token = 0; token < tokens; token += kTogether) {
      const int64_t group = token / kTileTokens, first = token % kTileTokens;
      const uint16_t* of_tokens = x[group] + first * kTileStep;
      __m512 total[2][kTogether];
      for (int t = 0; t < kTogether; ++t) total[0][t] = total[1][t] = _mm512_setzero_ps();
      for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
        for (int64_t pair = 0; pair < kTileStep / 2; ++pair) {
          const __m512bh w0 = (__m512bh)_mm512_load_si512(w[0] + step * kTile + pair * kTileStep);
          const __m512bh w1 = (__m512bh)_mm512_load_si512(w[1] + step * kTile + pair * kTileStep);
#pragma GCC unroll 8
          for (int t = 0; t < kTogether; ++t) {
            const uint16_t* both = of_tokens + step * kTile + t * kTileStep + 2 * pair;
            const __m512bh numbers = (__m512bh)_mm512_set1_epi32(two_numbers(both));
            total[0][t] = _mm512_dpbf16_ps(total[0][t], numbers, w0);
            total[1][t] = _mm512_dpbf16_ps(total[1][t], numbers, w1);
          }
        }
      }
      for (int t = 0; t < kTogether; ++t) {
        _mm512_store_ps(sums[group][0][first + t], total[0][t]);
        _mm512_store_ps(sums[group][1][first + t], total[1][t]);
      }
    }
  }
};

// What ByPairs sums for one group of tokens, of weights that are unpacked where they are multiplied.
template <int strips, int tokens>
__attribute__((target("avx512bf16"))) void sum_few(const Linear& l, const uint16_t* x, int64_t strip,
                                                   float (&sums)[strips][tokens][kBlock]) {
  const int64_t blocks = l.columns / kBlock;
  __m512 total[strips][tokens];
  for (int s = 0; s < strips; ++s) {
    for (int t = 0; t < tokens; ++t) total[s][t] = _mm512_setzero_ps();
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const uint16_t* of_block = x + block / 2 * kTile + block % 2 * kBlock;
    Lanes scale[strips];
    const uint8_t* codes[strips];
    for (int s = 0; s < strips; ++s) {
      scale[s] = Lanes::scales(l.block_scale + ((strip + s) * blocks + block) * kBlock);
      codes[s] = l.codes + ((strip + s) * blocks + block) * kStripBytes;
    }
#pragma GCC unroll 8
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      __m512bh w[strips];
      for (int s = 0; s < strips; ++s) w[s] = (__m512bh)unpacked(codes[s] + pair * kBlock, scale[s]);
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) {
        const __m512bh numbers = (__m512bh)_mm512_set1_epi32(two_numbers(of_block + t * kTileStep + 2 * pair));
        for (int s = 0; s < strips; ++s) total[s][t] = _mm512_dpbf16_ps(total[s][t], numbers, w[s]);
      }
    }
  }
  for (int s = 0; s < strips; ++s) {
    for (int t = 0; t < tokens; ++t) _mm512_store_ps(sums[s][t], total[s][t]);
  }
}

template <int strips, int tokens>
void few(const Linear& l, const uint16_t* x, int64_t strip) {
  alignas(64) float sums[strips][tokens][kBlock];
  sum_few<strips, tokens>(l, x, strip, sums);
  for (int s = 0; s < strips; ++s) {
    for (int64_t t = 0; t < l.tokens; ++t) finish(l, t, (strip + s) * kBlock, sums[s][t]);
  }
}

// Strips [begin, end) for at most 16 tokens: as many at once as make 16 sums, but for a last one.
void few_by_pairs(const Linear& l, const uint16_t* x, int64_t begin, int64_t end) {
  const StrictSubnormals strict;
  constexpr int kHalf = kTileTokens / 2;
  int64_t strip = begin;
  if (l.tokens <= kHalf) {
    for (; strip + 2 <= end; strip += 2) few<2, kHalf>(l, x, strip);
    if (strip < end) few<1, kHalf>(l, x, strip);
  } else {
    for (; strip < end; ++strip) few<1, kTileTokens>(l, x, strip);
  }
}

template <Dtype dtype, class Products>
void panel_as(const Linear& l, const uint16_t* tokens, int64_t begin, int64_t end, uint16_t* scratch) {
  const int64_t steps = (l.columns + kTileStep - 1) / kTileStep, strip = steps * kTile;
  const int64_t strips = end - begin, groups = (l.tokens + kTileTokens - 1) / kTileTokens;
  for (int64_t s = 0; s < strips; ++s) unpack_strip(l, begin + s, scratch + s * strip);
  const Products products;
  alignas(64) Sums sums;
  for (int64_t group = 0; group < groups; group += 2) {
    const uint16_t* from = tokens + group * strip;
    const uint16_t* x[] = {from, group + 1 < groups ? from + strip : from};
    const int64_t left = l.tokens - group * kTileTokens;
    for (int64_t s = 0; s < strips; s += 2) {
      const uint16_t* w[] = {scratch + s * strip, scratch + (s + 1 < strips ? s + 1 : s) * strip};
      products.multiply(x, w, left < 2 * kTileTokens ? left : 2 * kTileTokens, steps, sums);
      const int64_t row = (begin + s) * kBlock;
      for (int64_t g = 0; g < 2; ++g) {
        const int64_t first = (group + g) * kTileTokens;
        const int64_t count = l.tokens - first < kTileTokens ? l.tokens - first : kTileTokens;
        if (s + 1 < strips && row + 2 * kBlock <= l.outputs) {
          finish_pair<dtype>(l, first, count, row, sums[g][0], sums[g][1]);
          continue;
        }
        for (int64_t t = 0; t < count; ++t) {
          finish_as<dtype>(l, first + t, row, sums[g][0][t]);
          if (s + 1 < strips) finish_as<dtype>(l, first + t, row + kBlock, sums[g][1][t]);
        }
      }
    }
  }
}

template <class Products>
void panel_by(const Linear& l, const uint16_t* tokens, int64_t begin, int64_t end, uint16_t* scratch) {
  const StrictSubnormals strict;
  if (l.out_dtype == Dtype::bf16) panel_as<Dtype::bf16, Products>(l, tokens, begin, end, scratch);
  else if (l.out_dtype == Dtype::fp16) panel_as<Dtype::fp16, Products>(l, tokens, begin, end, scratch);
  else panel_as<Dtype::fp32, Products>(l, tokens, begin, end, scratch);
}

}  // namespace

void linear_panel(const Linear& l, const uint16_t* tokens, int64_t begin, int64_t end, uint16_t* scratch) {
  if (bf16_products() == Bf16Products::tiles) return panel_by<ByTiles>(l, tokens, begin, end, scratch);
  if (l.tokens <= kTileTokens) return few_by_pairs(l, tokens, begin, end);
  panel_by<ByPairs>(l, tokens, begin, end, scratch);
}

#endif

}  // namespace fos::FOS_ISA
