// The NVFP4 format and the choice between 4 and 6, once for CPU and GPU.
//
// Semantics: fouroversix_plugin/reference.py, operation by operation, byte for byte. All arithmetic is fp32, round to
// nearest, in the order written. Compile with contraction off (-ffp-contract=off, -fmad=false) and without fast-math:
// a fused or reordered operation is another byte somewhere.
//
// choose_scales works on W blocks at a time, an element index first and the lane last: the CPU takes W = 16 and lets
// the compiler vectorise the loops over lanes, so that the sequential sum over a block's elements costs nothing. A GPU
// spreads one block's elements over its threads and calls the pieces. Magnitudes are used throughout: every step is
// symmetric in the sign of x.
#pragma once

#include <cfloat>
#include <cstdint>

#if defined(__CUDACC__)
#define FOS_FN __host__ __device__ __forceinline__
#else
#define FOS_FN inline __attribute__((always_inline))
#endif

namespace fos {

constexpr int kBlock = 16;             // values that share a block scale
constexpr float kE2m1Max = 6.0f;       // largest e2m1 number
constexpr float kE4m3Max = 448.0f;     // largest E4M3 number
constexpr uint8_t kE4m3Nan = 0x7F;     // the scale of a block that is not finite
constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kExponent = 0x7F800000u;

// The numbering is that of fouroversix_plugin/recipe.py's literals.
enum class Metric : int { mse = 0, mae = 1, abs_max = 2 };
enum class Domain : int { amax = 0, decode_scale = 1, scaled = 2 };

// Where the byte of a block scale lies.
enum class Layout : int { row_major = 0, tiles_128x4 = 1, tiles_8x4 = 2 };

template <class To, class From>
FOS_FN To bits(From value) {
  return __builtin_bit_cast(To, value);
}

FOS_FN float magnitude(float x) { return bits<float>(bits<uint32_t>(x) & ~kSign); }
FOS_FN bool is_finite(float x) { return (bits<uint32_t>(x) & kExponent) != kExponent; }
FOS_FN float smaller(float a, float b) { return a < b ? a : b; }
FOS_FN float larger(float a, float b) { return a > b ? a : b; }

// --- number formats ---

// The nearest e2m1 magnitude to a >= 0, ties to the even code, saturating at 6.
// Adding 2^22 * 2^e to a number in [2^e, 2^(e+1)) leaves it one mantissa bit: the hardware's own rounding. Below 2 the
// grid is that of [1, 2).
FOS_FN float round_e2m1(float a) {
  a = smaller(a, kE2m1Max);
  const float magic = bits<float>((bits<uint32_t>(larger(a, 1.0f)) & kExponent) + (22u << 23));
  return (a + magic) - magic;
}

// Code 0..7 of an e2m1 magnitude. From 1 on the code is the number's exponent and its one mantissa bit; 0 and 0.5 are
// the two numbers below.
FOS_FN uint32_t e2m1_code(float r) {
  const uint32_t normal = (bits<uint32_t>(r) >> 22) - 252u;
  return r < 1.0f ? (r > 0.0f ? 1u : 0u) : normal;
}

// Magnitude of code 0..7.
FOS_FN float e2m1_value(uint32_t code) {
  return code < 2 ? (code ? 0.5f : 0.0f) : bits<float>((code + 252u) << 22);
}

// The nearest E4M3 number to 0 <= b <= 448, ties to even; as above with three mantissa bits, and the grid of
// [2^-6, 2^-5) below 2^-6.
FOS_FN float round_e4m3(float b) {
  const float magic = bits<float>((bits<uint32_t>(larger(b, 0x1p-6f)) & kExponent) + (20u << 23));
  return (b + magic) - magic;
}

// The byte of a non-negative E4M3 number or NaN.
FOS_FN uint8_t e4m3_byte(float sf) {
  const uint32_t normal = (bits<uint32_t>(sf) >> 20) - (120u << 3);
  const uint32_t subnormal = bits<uint32_t>(sf * 0x1p9f + 0x1p23f);  // the integer in the last mantissa bits
  return static_cast<uint8_t>(is_finite(sf) ? (sf < 0x1p-6f ? subnormal : normal) : kE4m3Nan);
}

FOS_FN float e4m3_value(uint8_t byte) {
  const uint32_t m = byte & 0x7Fu;
  const float subnormal = static_cast<float>(static_cast<int>(m)) * 0x1p-9f;
  float value = m < 8 ? subnormal : bits<float>((m << 20) + (120u << 23));
  value = m == kE4m3Nan ? bits<float>(0x7FC00000u) : value;
  return bits<float>(bits<uint32_t>(value) | (byte & 0x80u) << 24);
}

// Integers only, so that neither a compiler without the types nor a flush-to-zero mode matters.
FOS_FN float bf16_value(uint16_t h) { return bits<float>(static_cast<uint32_t>(h) << 16); }

FOS_FN uint16_t bf16_bits(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & ~kSign) > kExponent ? (u >> 16 | 0x40u) : rounded);
}

FOS_FN float fp16_value(uint16_t h) {
  const uint32_t m = h & 0x7FFFu;
  const float subnormal = static_cast<float>(static_cast<int>(m)) * 0x1p-24f;
  const uint32_t rebased = (m << 13) + (112u << 23);
  uint32_t u = m < 0x0400u ? bits<uint32_t>(subnormal) : rebased;
  u = m >= 0x7C00u ? (rebased | kExponent) : u;
  return bits<float>(u | static_cast<uint32_t>(h & 0x8000u) << 16);
}

FOS_FN uint16_t fp16_bits(float x) {
  const uint32_t u = bits<uint32_t>(x) & ~kSign;
  const uint32_t normal = (u + 0xFFFu + ((u >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(u) + 0.5f) - 0x3F000000u;  // 0.5 has units of 2^-24
  uint32_t h = u < 0x38800000u ? subnormal : normal;
  h = u >= 0x477FF000u ? 0x7C00u : h;  // 65520 and above round to infinity
  h = u > kExponent ? 0x7E00u : h;
  return static_cast<uint16_t>(h | (bits<uint32_t>(x) >> 16 & 0x8000u));
}

// --- the gated activation, pinned: the same bits on every device ---

// e^x as p * 2^n for x in [-104, 89], within 2 units in the last place: p = e^r with |r| <= ln(2)/2, no fused operation.
// Coefficients are the Taylor series'; ln(2) is split so that n * high is exact.
struct Exponential {
  float p;
  int n;  // -150 to 128
};

FOS_FN Exponential exp_pinned(float x) {
  const float shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // n in the last mantissa bits
  const float n = shifted - 0x1.8p23f;
  const float r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  float p = 0x1.a01a02p-13f;
  p = p * r + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return {p, static_cast<int>(bits<uint32_t>(shifted) - bits<uint32_t>(0x1.8p23f))};
}

// 2^n, for a normal result.
FOS_FN float power_of_two(int n) { return bits<float>(static_cast<uint32_t>(n + 127) << 23); }

// silu(gate) * up. Below -104, e^-gate is infinite and the product 0; NaN stays NaN.
FOS_FN float silu_and_mul(float gate, float up) {
  const float t = -gate;
  const Exponential power = exp_pinned(t < -104.0f ? -104.0f : (t > 89.0f ? 89.0f : t));
  const int half = power.n >> 1;  // two factors: 2^-150 and 2^128 are no normal numbers
  float e = power.p * power_of_two(half) * power_of_two(power.n - half);
  e = t > 89.0f ? bits<float>(kExponent) : e;
  return (gate / (1.0f + e)) * up;
}

// --- scales ---

struct GlobalScales {
  float amax;    // 0 where the amax given was not finite
  float encode;  // what values are multiplied by going in
  float decode;  // and coming out; not NaN here, whatever the amax
  bool finite;
};

FOS_FN GlobalScales global_scales(float amax, float encoded_amax) {
  GlobalScales g;
  g.finite = is_finite(amax);
  g.amax = g.finite ? amax : 0.0f;
  const float encode = smaller(encoded_amax / g.amax, FLT_MAX);
  g.encode = (g.amax == 0.0f || encode == 0.0f) ? 1.0f : encode;
  g.decode = 1.0f / g.encode;
  return g;
}

// What is stored as the decode scale.
FOS_FN float stored_decode_scale(const GlobalScales& g) { return g.finite ? g.decode : bits<float>(0x7FC00000u); }

// Candidate 6's block scale before rounding, of a block with the largest magnitude v. Candidate 4's is 1.5 times it.
template <bool adaptive>
FOS_FN float unrounded_scale(float v, float encode) {
  return adaptive ? (v / kE2m1Max) * encode : v * (encode * (1.0f / kE2m1Max));
}

FOS_FN float block_scale(float unrounded) { return round_e4m3(smaller(unrounded, kE4m3Max)); }

// What values are multiplied by to be encoded under the block scale sf.
FOS_FN float inverse_scale(float sf, float decode) {
  const float inverse = smaller(1.0f / (sf * decode), FLT_MAX);
  return sf == 0.0f ? FLT_MAX : inverse;
}

// --- the choice ---

// A processor that has a faster way to the same number names it by a type of its own for the domain.
FOS_FN float over_encoded_amax(Domain, float number, float encoded_amax) { return number / encoded_amax; }

// One term of a candidate's error: q is the rounded magnitude, a that of x.
template <Metric metric, class DomainT>
FOS_FN float error_term(DomainT domain, float encoded_amax, float q, float sf, float a, float amax, float encode,
                        float decode) {
  float d;
  if (Domain(domain) == Domain::amax) {
    d = over_encoded_amax(domain, (q * sf) * amax, encoded_amax) - a;
  } else if (Domain(domain) == Domain::decode_scale) {
    d = (q * sf) * decode - a;
  } else {
    d = (q * sf) - a * encode;
  }
  return metric == Metric::mse ? d * d : magnitude(d);
}

template <Metric metric>
FOS_FN float add_error(float error, float term) {
  return metric == Metric::abs_max ? larger(error, term) : error + term;
}

// The winning candidate of W blocks.
//
// a: magnitudes; amax, encode, decode: the global scales of each block; out: r, the e2m1 magnitudes, and sf, the block
// scale (NaN for a block that is not finite). The caller restores signs, drops those of blocks with sf or v of 0, and
// answers for an amax that is not finite.
template <Metric metric, bool adaptive, class DomainT, int W>
FOS_FN void choose_scales(DomainT domain, float encoded_amax, const float (&a)[kBlock][W], const float (&amax)[W],
                            const float (&encode)[W], const float (&decode)[W], float (&r)[kBlock][W], float (&sf)[W],
                            float (&v)[W]) {
  float sf4[W], inverse6[W], inverse4[W], error6[W], error4[W];
  for (int w = 0; w < W; ++w) {
    uint32_t largest = 0;  // as integers: NaN is above infinity, and both are seen
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t u = bits<uint32_t>(a[i][w]);
      largest = u > largest ? u : largest;
    }
    v[w] = bits<float>(largest);
  }
  for (int w = 0; w < W; ++w) {
    const float b = unrounded_scale<adaptive>(v[w], encode[w]);
    sf[w] = block_scale(b);
    inverse6[w] = inverse_scale(sf[w], decode[w]);
    if (adaptive) {
      sf4[w] = block_scale(b * 1.5f);
      inverse4[w] = inverse_scale(sf4[w], decode[w]);
      error6[w] = error4[w] = 0.0f;
    }
  }
  if (adaptive) {
    // Sequentially from element 0 to 15, as the specification sums.
    for (int i = 0; i < kBlock; ++i) {
      for (int w = 0; w < W; ++w) {
        const float t6 = error_term<metric>(domain, encoded_amax, round_e2m1(a[i][w] * inverse6[w]), sf[w], a[i][w],
                                            amax[w], encode[w], decode[w]);
        const float t4 = error_term<metric>(domain, encoded_amax, round_e2m1(a[i][w] * inverse4[w]), sf4[w], a[i][w],
                                            amax[w], encode[w], decode[w]);
        error6[w] = add_error<metric>(error6[w], t6);
        error4[w] = add_error<metric>(error4[w], t4);
      }
    }
    for (int w = 0; w < W; ++w) {
      const bool four = error4[w] < error6[w];
      sf[w] = four ? sf4[w] : sf[w];
      inverse6[w] = four ? inverse4[w] : inverse6[w];
    }
  }
  for (int i = 0; i < kBlock; ++i) {
    for (int w = 0; w < W; ++w) r[i][w] = round_e2m1(a[i][w] * inverse6[w]);
  }
  for (int w = 0; w < W; ++w) {
    sf[w] = is_finite(v[w]) ? (v[w] == 0.0f ? 0.0f : sf[w]) : bits<float>(0x7FC00000u);
  }
}

// --- where a block scale lies ---

FOS_FN int64_t tile_rows(Layout layout) {
  return layout == Layout::row_major ? 1 : (layout == Layout::tiles_128x4 ? 128 : 8);
}

FOS_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FOS_FN int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

FOS_FN int64_t padded_scale_columns(Layout layout, int64_t columns) {
  return layout == Layout::row_major ? columns : round_up(columns, 4);
}

// Byte of the scale of row r, block c; columns are the padded ones.
FOS_FN int64_t scale_offset(Layout layout, int64_t r, int64_t c, int64_t columns) {
  if (layout == Layout::row_major) return r * columns + c;
  if (layout == Layout::tiles_128x4) {
    return ((r / 128) * (columns / 4) + c / 4) * 512 + (r % 32) * 16 + (r % 128) / 32 * 4 + c % 4;
  }
  return ((r / 8) * (columns / 4) + c / 4) * 32 + (r % 8) * 4 + c % 4;
}

}  // namespace fos
