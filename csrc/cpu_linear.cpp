// y = x W^T on packed weights, for any CPU and dtype, and the sums over a token's experts. More bf16 tokens are for
// cpu_bf16.cpp, where a processor multiplies bf16.
//
// Compiled once for each instruction set like cpu.cpp (see there what that forbids). Weights lie in strips
// (cpu_strips.h). Within a block, x times e2m1 is summed for even and for odd columns; the sum of the two is multiplied
// by the block scale into the total. The products are exact for bf16 and fp16 (at most 13 significant bits).
//
// What a number of y is summed from, and in which order, does not depend on how rows and tokens share the work.
#include "cpu_results.h"
#include "cpu_strips.h"

namespace fos::FOS_ISA {
namespace {

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

// Strips [begin, end) for a number of tokens known to the compiler: as many at once as keep the multipliers busy.
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

}  // namespace fos::FOS_ISA
