// The quantizer for CPUs: 16 blocks at a time, a lane each, so that nvfp4.cuh's loops vectorise.
//
// Compiled once for each instruction set, FOS_ISA naming the namespace; cpu.h says which there are and takes the best
// one the processor has. Nothing here may be shared between those builds (no inline library function of C++), or the
// linker could keep the copy with instructions that a smaller processor lacks.
#include "cpu.h"

namespace fos::FOS_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int kTile = kLanes * kBlock;

template <Dtype dtype>
FOS_FN float load(const void* x, int64_t i) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(x)[i];
  const uint16_t h = static_cast<const uint16_t*>(x)[i];
  return dtype == Dtype::bf16 ? bf16_value(h) : fp16_value(h);
}

template <Dtype dtype>
FOS_FN void store(void* out, int64_t i, float value) {
  if (dtype == Dtype::fp32) {
    static_cast<float*>(out)[i] = value;
  } else {
    static_cast<uint16_t*>(out)[i] = dtype == Dtype::bf16 ? bf16_bits(value) : fp16_bits(value);
  }
}

template <Dtype dtype>
FOS_FN float round_to(float value) {
  if (dtype == Dtype::bf16) return bf16_value(bf16_bits(value));
  return dtype == Dtype::fp16 ? fp16_value(fp16_bits(value)) : value;
}

// count values of row `row` from column `column` on, as what is quantized.
template <Dtype dtype, bool gated>
FOS_FN void read(const Quantize& q, int64_t row, int64_t column, int64_t count, float* out) {
  const int64_t start = row * q.columns * (gated ? 2 : 1) + column;
  for (int64_t i = 0; i < count; ++i) {
    const float value = load<dtype>(q.x, start + i);
    out[i] = gated ? round_to<dtype>(silu_and_mul(value, load<dtype>(q.x, start + q.columns + i))) : value;
  }
}

template <Dtype dtype, bool gated>
float largest_magnitude(const Quantize& q, int64_t row) {
  uint32_t lanes[kTile] = {};
  float x[kTile];
  for (int64_t column = 0; column < q.columns; column += kTile) {
    const int64_t count = q.columns - column < kTile ? q.columns - column : kTile;
    read<dtype, gated>(q, row, column, count, x);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t u = bits<uint32_t>(magnitude(x[i]));
      lanes[i] = u > lanes[i] ? u : lanes[i];
    }
  }
  uint32_t largest = 0;
  for (int i = 0; i < kTile; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return bits<float>(largest);
}

template <Domain domain>
struct Fixed {
  FOS_FN constexpr operator Domain() const { return domain; }
};

// Domain::amax without a division, where numbers are 0 or far from the ends of fp32 and encoded_amax is 1536 or 2688, which
// are 3 * 2^9 and 21 * 2^7. The remainder of a quotient that is off by two units is exact, as a product with so few bits
// is; and a true quotient lies at least 1/42 of a unit from where rounding changes, which the correction is far nearer to.
struct AmaxByInverse {
  FOS_FN constexpr operator Domain() const { return Domain::amax; }
};

#if defined(__FMA__) || defined(__AVX512F__)
FOS_FN float over_encoded_amax(AmaxByInverse, float number, float encoded_amax) {
  const float inverse = 1.0f / encoded_amax, quotient = number * inverse;
  return __builtin_fmaf(__builtin_fmaf(-encoded_amax, quotient, number), inverse, quotient);
}
FOS_FN bool divides_by_inverse(const float (&amax)[kLanes], float encoded_amax) {
  bool all = encoded_amax == 1536.0f || encoded_amax == 2688.0f;
  for (int w = 0; w < kLanes; ++w) all &= amax[w] == 0.0f || (amax[w] >= 0x1p-80f && amax[w] <= 0x1p100f);
  return all;
}
#else
bool divides_by_inverse(const float (&)[kLanes], float) { return false; }
#endif

template <Metric metric, class DomainT, bool adaptive>
struct Choose {
  static void run(float encoded_amax, const float (&a)[kBlock][kLanes], const float (&amax)[kLanes],
                  const float (&encode)[kLanes], const float (&decode)[kLanes], float (&r)[kBlock][kLanes],
                  float (&sf)[kLanes], float (&v)[kLanes]) {
    choose_scales<metric, adaptive>(DomainT{}, encoded_amax, a, amax, encode, decode, r, sf, v);
  }
};

using Chooser = decltype(&Choose<Metric::mse, Fixed<Domain::amax>, true>::run);

template <Metric metric>
Chooser chooser_of(Domain domain, bool by_inverse) {
  if (domain == Domain::amax && by_inverse) return Choose<metric, AmaxByInverse, true>::run;
  if (domain == Domain::amax) return Choose<metric, Fixed<Domain::amax>, true>::run;
  if (domain == Domain::decode_scale) return Choose<metric, Fixed<Domain::decode_scale>, true>::run;
  return Choose<metric, Fixed<Domain::scaled>, true>::run;
}

Chooser chooser(const Recipe& recipe, bool by_inverse) {
  if (!recipe.adaptive) return Choose<Metric::mse, Fixed<Domain::amax>, false>::run;
  if (recipe.metric == Metric::mse) return chooser_of<Metric::mse>(recipe.domain, by_inverse);
  return recipe.metric == Metric::mae ? chooser_of<Metric::mae>(recipe.domain, by_inverse)
                                      : chooser_of<Metric::abs_max>(recipe.domain, by_inverse);
}

// Blocks as rows become lanes as columns, and back.
static_assert(kLanes == kBlock);
using Tile = float[kBlock][kLanes];

#if defined(__AVX512F__)
FOS_FN void transpose(Tile& tile) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_ps(tile[i]);
  // Pairs of rows, then fours: r[4 * i + k] has, for each j, column 4 * j + k of rows 4 * i to 4 * i + 3.
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d upper = _mm512_castps_pd(t[i + k]), lower = _mm512_castps_pd(t[i + k + 2]);
      r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper, lower));
      r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper, lower));
    }
  }
  constexpr int kEven = 0x88, kOdd = 0xDD;  // of the fours of two registers
  for (int k = 0; k < 4; ++k) {
    const __m512 even0 = _mm512_shuffle_f32x4(r[k], r[4 + k], kEven), odd0 = _mm512_shuffle_f32x4(r[k], r[4 + k], kOdd);
    const __m512 even1 = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], kEven);
    const __m512 odd1 = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], kOdd);
    _mm512_store_ps(tile[k], _mm512_shuffle_f32x4(even0, even1, kEven));
    _mm512_store_ps(tile[4 + k], _mm512_shuffle_f32x4(odd0, odd1, kEven));
    _mm512_store_ps(tile[8 + k], _mm512_shuffle_f32x4(even0, even1, kOdd));
    _mm512_store_ps(tile[12 + k], _mm512_shuffle_f32x4(odd0, odd1, kOdd));
  }
}
#else
FOS_FN void transpose(Tile& tile) {
  for (int i = 0; i < kBlock; ++i) {
    for (int w = 0; w < i; ++w) {
      const float other = tile[i][w];
      tile[i][w] = tile[w][i];
      tile[w][i] = other;
    }
  }
}
#endif

// Blocks [begin, end) of the matrix, counted along its rows. amax[row * stride] is what each row is scaled for.
template <Dtype dtype, bool gated>
void blocks(const Quantize& q, const float* amax, int64_t stride, int64_t begin, int64_t end) {
  const StrictSubnormals strict;
  const Chooser choosers[2] = {chooser(q.recipe, false), chooser(q.recipe, true)};
  const int64_t per_row = q.columns / kBlock, scale_columns = padded_scale_columns(q.layout, per_row);
  int64_t row = begin / per_row, block = begin % per_row, scaled_row = -1;
  GlobalScales global = {};
  alignas(64) Tile x = {}, a, r;  // what lanes without a block had before does no harm
  alignas(64) float g_amax[kLanes] = {}, encode[kLanes], decode[kLanes], sf[kLanes], v[kLanes];
  uint32_t finite[kLanes] = {};  // all bits, or none
  int64_t rows[kLanes], columns[kLanes];
  for (int w = 0; w < kLanes; ++w) encode[w] = decode[w] = 1.0f;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int count = static_cast<int>(end - first < kLanes ? end - first : kLanes);
    for (int w = 0; w < count;) {  // from row to row
      const int of_row = static_cast<int>(per_row - block < count - w ? per_row - block : count - w);
      if (scaled_row != row) {
        global = global_scales(amax[row * stride], q.recipe.encoded_amax);
        scaled_row = row;
      }
      const int64_t scale_row = q.scale_row_of == nullptr ? row : q.scale_row_of[row];
      for (int to = w + of_row; w < to; ++w, ++block) {
        read<dtype, gated>(q, row, block * kBlock, kBlock, x[w]);
        g_amax[w] = global.amax, encode[w] = global.encode, decode[w] = global.decode;
        finite[w] = global.finite ? ~0u : 0u;
        rows[w] = scale_row, columns[w] = block;
      }
      if (block == per_row) block = 0, ++row;
    }
    transpose(x);
    for (int i = 0; i < kBlock; ++i) {
      for (int w = 0; w < kLanes; ++w) a[i][w] = magnitude(x[i][w]);
    }
    const Chooser choose = choosers[divides_by_inverse(g_amax, q.recipe.encoded_amax)];
    choose(q.recipe.encoded_amax, a, g_amax, encode, decode, r, sf, v);

    // The sign of a block of zeros, and everything of a row without a finite amax, is dropped.
    uint32_t keep[kLanes], sign[kLanes];
    for (int w = 0; w < kLanes; ++w) {
      keep[w] = finite[w] & (is_finite(v[w]) ? ~0u : 0u);
      sign[w] = keep[w] & (v[w] > 0.0f ? kSign : 0u);
      sf[w] = bits<float>(bits<uint32_t>(sf[w]) & finite[w]);
    }
    if (q.values == nullptr) {
      uint32_t code[kBlock][kLanes], words[2][kLanes], scale_byte[kLanes];
      for (int i = 0; i < kBlock; ++i) {
        for (int w = 0; w < kLanes; ++w) {
          code[i][w] = (e2m1_code(r[i][w]) & keep[w]) | (bits<uint32_t>(x[i][w]) & sign[w]) >> 28;
        }
      }
      for (int half = 0; half < 2; ++half) {
        for (int w = 0; w < kLanes; ++w) {
          uint32_t word = 0;
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) word |= code[8 * half + i][w] << 4 * i;
          words[half][w] = word;
        }
      }
      for (int w = 0; w < kLanes; ++w) scale_byte[w] = e4m3_byte(sf[w]);
      for (int w = 0; w < count; ++w) {
        uint8_t* out = q.packed + (first + w) * (kBlock / 2);
        for (int half = 0; half < 2; ++half) __builtin_memcpy(out + half * 4, &words[half][w], 4);
        if (rows[w] < 0) continue;
        q.block_scale[scale_offset(q.layout, rows[w], columns[w], scale_columns)] = static_cast<uint8_t>(scale_byte[w]);
      }
    } else {
      for (int i = 0; i < kBlock; ++i) {
        for (int w = 0; w < kLanes; ++w) {
          const float value = bits<float>(bits<uint32_t>(r[i][w]) & keep[w]) * sf[w];
          a[i][w] = bits<float>(bits<uint32_t>(value) | (bits<uint32_t>(x[i][w]) & sign[w]));
        }
      }
      transpose(a);
      for (int w = 0; w < count; ++w) {
        for (int i = 0; i < kBlock; ++i) store<dtype>(q.values, (first + w) * kBlock + i, a[w][i]);
      }
    }
  }
}

template <Dtype dtype, bool gated>
void rows_of(const Quantize& q, int64_t begin, int64_t end, float* amax) {
  const StrictSubnormals strict;
  for (int64_t row = begin; row < end; ++row) amax[row] = largest_magnitude<dtype, gated>(q, row);
}

template <Dtype dtype>
void dequantize_rows_as(const Dequantize& d, int64_t begin, int64_t end) {
  const StrictSubnormals strict;
  const int64_t per_row = d.columns / kBlock;
  for (int64_t row = begin; row < end; ++row) {
    const float decode = d.decode_scale == nullptr ? 1.0f : d.decode_scale[row];
    for (int64_t block = 0; block < per_row; ++block) {
      const int64_t at = row * per_row + block;
      const uint8_t* packed = d.packed + at * (kBlock / 2);
      const float sf = e4m3_value(d.block_scale[at]);
      float value[kBlock];
      for (int j = 0; j < kBlock / 2; ++j) {
        value[2 * j] = bits<float>(bits<uint32_t>(e2m1_value(packed[j] & 7u)) | (packed[j] & 0x08u) << 28);
        value[2 * j + 1] = bits<float>(bits<uint32_t>(e2m1_value(packed[j] >> 4 & 7u)) | (packed[j] & 0x80u) << 24);
      }
      for (int i = 0; i < kBlock; ++i) store<dtype>(d.out, at * kBlock + i, (value[i] * sf) * decode);
    }
  }
}

}  // namespace

void row_amax(const Quantize& q, int64_t begin, int64_t end, float* amax) {
  if (q.dtype == Dtype::bf16) {
    q.gated ? rows_of<Dtype::bf16, true>(q, begin, end, amax) : rows_of<Dtype::bf16, false>(q, begin, end, amax);
  } else if (q.dtype == Dtype::fp16) {
    q.gated ? rows_of<Dtype::fp16, true>(q, begin, end, amax) : rows_of<Dtype::fp16, false>(q, begin, end, amax);
  } else {
    q.gated ? rows_of<Dtype::fp32, true>(q, begin, end, amax) : rows_of<Dtype::fp32, false>(q, begin, end, amax);
  }
}

void quantize_blocks(const Quantize& q, const float* amax, int64_t stride, int64_t begin, int64_t end) {
  if (q.dtype == Dtype::bf16) {
    (q.gated ? blocks<Dtype::bf16, true> : blocks<Dtype::bf16, false>)(q, amax, stride, begin, end);
  } else if (q.dtype == Dtype::fp16) {
    (q.gated ? blocks<Dtype::fp16, true> : blocks<Dtype::fp16, false>)(q, amax, stride, begin, end);
  } else {
    (q.gated ? blocks<Dtype::fp32, true> : blocks<Dtype::fp32, false>)(q, amax, stride, begin, end);
  }
}

void decode_scales(const Recipe& recipe, const float* amax, int64_t stride, int64_t count, float* out) {
  const StrictSubnormals strict;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = stored_decode_scale(global_scales(amax[i * stride], recipe.encoded_amax));
  }
}

void dequantize_rows(const Dequantize& d, int64_t begin, int64_t end) {
  if (d.dtype == Dtype::bf16) return dequantize_rows_as<Dtype::bf16>(d, begin, end);
  if (d.dtype == Dtype::fp16) return dequantize_rows_as<Dtype::fp16>(d, begin, end);
  dequantize_rows_as<Dtype::fp32>(d, begin, end);
}

}  // namespace fos::FOS_ISA
