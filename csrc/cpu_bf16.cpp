// y = x W^T on packed weights, for more bf16 tokens on a processor that multiplies bf16: matrix tiles (AMX) or pairs
// (AVX512_BF16).
//
// A panel of rows is unpacked to bf16 (exact: e2m1 * E4M3 has 6 significant bits) into the second-level cache, where it
// is multiplied with all tokens, accumulating in fp32. AVX512_BF16 multiplies at most 16 tokens in registers, as weights
// are unpacked. These instructions read subnormal bf16 numbers as 0.
//
// What a number of y is summed from, and in which order, does not depend on how rows and tokens share the work.
//
// Compiled like cpu.cpp (see there what that forbids); only the build for AVX-512 has anything of it.
#if defined(__AVX512F__) && defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "cpu_results.h"
#include "cpu_strips.h"

namespace fos::FOS_ISA {

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

constexpr int kTile = kTileTokens * kTileStep;  // bf16 numbers: 16 rows of 64 bytes
constexpr int kNextRow = 64;                    // bytes between rows of a tile in memory

// Two columns of a strip as bf16 [16 rows][2].
FOS_FN __m512i unpacked(const uint8_t* codes, Lanes scale) {
  Lanes even, odd;
  Lanes::unpack(codes, even, odd);
  // The products are bf16 numbers already: their upper halves, side by side.
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_mul_ps(even.v, scale.v)), 16);
  return _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(_mm512_mul_ps(odd.v, scale.v)), high));
}

// Two bf16 numbers beside each other.
FOS_FN int two_numbers(const uint16_t* x) {
  int both;
  std::memcpy(&both, x, sizeof both);
  return both;
}

// --- a panel of strips, unpacked into scratch ---

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

// Sums of two groups of tokens, for two strips each.
using Sums = float[2][2][kTileTokens][kBlock];

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// By AMX. All four are summed: where there is no second group or strip, the first one twice.
struct ByTiles {
  ByTiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~ByTiles() { _tile_release(); }

  static void multiply(const uint16_t* const (&x)[2], const uint16_t* const (&w)[2], int64_t, int64_t steps,
                       Sums& sums) {
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

// --- at most 16 tokens, in registers ---

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

}  // namespace

void linear_panel(const Linear& l, const uint16_t* tokens, int64_t begin, int64_t end, uint16_t* scratch) {
  if (bf16_products() == Bf16Products::tiles) return panel_by<ByTiles>(l, tokens, begin, end, scratch);
  if (l.tokens <= kTileTokens) return few_by_pairs(l, tokens, begin, end);
  panel_by<ByPairs>(l, tokens, begin, end, scratch);
}

}  // namespace fos::FOS_ISA

#endif
