// What the products of gemm_sm90.cu and few_sm90.cu share: how weights are unpacked, and what is made of their sums.
//
// Unpacking takes 2.4 instructions a weight. A word holds 8 weights as four pairs; the 3 magnitude bits of e2m1 at bits
// 8..6 of a bf16 are value * 2^-126. A block scale s = 2^e * (1 + m/8), e in -9..8, is stored as the byte (e + 21, m):
// shifted left by 4 and with 0x7000 set, that is s * 2^118 in bf16; the product is value * s * 2^-8, exactly. In fp16
// the bits are 11..9 (value * 2^-14), the scale is shifted left by 7 (s * 2^6), and the product is the same.
//
// Compiled with FOS_DTYPE = bf16 or fp16 and FOS_OUTPUT = linear, gated or fp32, and -fmad=false: what is added is
// rounded after it was multiplied.
#pragma once

#include <cfloat>

#include "gemm.h"
#include "sm90.cuh"
#include "values.cuh"

// PREFIX_DTYPE_OUTPUT, as gemm.h declares what is compiled.
#define FOS_PASTE_(a, b, c, d) a##b##c##d
#define FOS_PASTE(a, b, c, d) FOS_PASTE_(a, b, c, d)
#define FOS_PRODUCT(prefix) FOS_PASTE(prefix, FOS_DTYPE, _, FOS_OUTPUT)

namespace fos::cuda {
namespace {

using namespace sm90;

constexpr Dtype kDtype = Dtype::FOS_DTYPE;
constexpr Output kOutput = Output::FOS_OUTPUT;
constexpr bool kExperts = kOutput != Output::linear;  // rows of x lie in blocks by expert; else one weight has all rows
static_assert(kDtype != Dtype::fp32);
using Value = std::conditional_t<kDtype == Dtype::bf16, __nv_bfloat16, __half>;

constexpr float kUnscale = 256.0f;

// What a thread finishes at once, of a token: 8 neighbouring sums, or 4 of gate and the 4 of up that lie 8 rows on.
constexpr int kPieceRows = 8;
constexpr int kOutputs = kOutput == Output::gated ? 4 : 8;
constexpr int kSecondHalf = kOutput == Output::gated ? 8 : 4;

__device__ __forceinline__ int first_row(int piece) {
  return kOutput == Output::gated ? piece / 2 * 16 + piece % 2 * 4 : piece * kPieceRows;
}

// --- unpacking ---

// The scales of two blocks, `first` and the one two on, in the halves of a word.
template <int first>
__device__ __forceinline__ uint32_t two_scales(const Powers& by, uint32_t word) {
  const uint32_t apart = __byte_perm(word, 0, 0x4240 + 0x0101 * first);
  return kDtype == Dtype::bf16 ? apart * by.sixteen + 0x70007000u : apart << 7;
}

// Both values of a pair times the low or the high half of `scales`, in a way that lets one instruction pick the half.
#define FOS_SCALED(type, half)                                                                    \
  asm("{\n.reg .b16 low, high;\n.reg .b32 twice;\nmov.b32 {low, high}, %2;\n"                     \
      "mov.b32 twice, {" half ", " half "};\nmul.rn." type " %0, %1, twice;\n}"                   \
      : "=r"(product)                                                                             \
      : "r"(pair), "r"(scales))

template <bool high>
__device__ __forceinline__ uint32_t scaled(uint32_t pair, uint32_t scales) {
  uint32_t product;
  if constexpr (kDtype == Dtype::bf16) {
    if constexpr (high) FOS_SCALED("bf16x2", "high");
    else FOS_SCALED("bf16x2", "low");
  } else {
    if constexpr (high) FOS_SCALED("f16x2", "high");
    else FOS_SCALED("f16x2", "low");
  }
  return product;
}

#undef FOS_SCALED

// The four pairs of a word: (row, columns c and c + 1), (row + 8, the same), (row, c + 8 and c + 9), (row + 8, ...), in
// the order of wgmma's left operand. Each half of the word has, from bit 15 down, the signs of pairs 0, 3, 2 and 1, and
// the magnitudes of pairs 3, 0, 1 and 2: as many as can be are where one shift and one mask bring both to their place.
template <bool high>
__device__ __forceinline__ void unpack(const Powers& by, uint32_t q, uint32_t scales, uint32_t scales_8,
                                       uint32_t (&pairs)[4]) {
  constexpr uint32_t kSigns = 0x80008000u;
  if constexpr (kDtype == Dtype::bf16) {
    constexpr uint32_t kMagnitudes = 0x01C001C0u;
    pairs[0] = q & (kSigns | kMagnitudes);
    pairs[1] = (q * by.eight) & (kSigns | kMagnitudes);
    pairs[2] = ((q * by.four) & kSigns) | ((q * by.sixty_four) & kMagnitudes);
    pairs[3] = ((q * by.two) & kSigns) | ((q >> 3) & kMagnitudes);
  } else {
    constexpr uint32_t kMagnitudes = 0x0E000E00u;
    const uint32_t by_8 = q * by.eight, by_64 = q * by.sixty_four;
    pairs[0] = (q & kSigns) | (by_8 & kMagnitudes);
    pairs[1] = (by_8 & kSigns) | (by_64 & kMagnitudes);
    pairs[2] = ((q * by.four) & kSigns) | ((by_64 * by.eight) & kMagnitudes);
    pairs[3] = ((q * by.two) & kSigns) | (q & kMagnitudes);
  }
  pairs[0] = scaled<high>(pairs[0], scales);
  pairs[1] = scaled<high>(pairs[1], scales_8);
  pairs[2] = scaled<high>(pairs[2], scales);
  pairs[3] = scaled<high>(pairs[3], scales_8);
}

// What a thread has of a step: for rows r and r + 8, a word and a scale for each of the four blocks.
struct Packed {
  uint32_t q[4], scale, scale_8;

  Packed() = default;

  // From shared memory.
  __device__ __forceinline__ Packed(uint32_t codes, uint32_t scales) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3])
                 : "r"(codes));
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(scale), "=r"(scale_8) : "r"(scales));
  }

  // From global memory, past the first-level cache: nobody reads a weight twice.
  __device__ __forceinline__ void load(const uint8_t* codes, const uint8_t* scales) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3])
                 : "l"(codes));
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(scale), "=r"(scale_8) : "l"(scales));
  }
};

// --- from sums to results ---

// Two numbers, rounded. As one instruction it runs at full speed; that for a number alone does not.
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t both;
  if constexpr (kDtype == Dtype::bf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

// As the chip has them, to about 2^-22; what is subnormal becomes 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float load_number(const void* from, Dtype dtype, int index) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(from)[index];
  if (dtype == Dtype::bf16) return widen(static_cast<const __nv_bfloat16*>(from)[index]);
  return widen(static_cast<const __half*>(from)[index]);
}

// What sums of a row are to be multiplied by first. `row`: of x.
__device__ __forceinline__ float token_scale_of(const Gemm& g, int row) {
  const float scale = g.token_scale == nullptr ? 1.0f : g.token_scale[g.token_of == nullptr ? row : g.token_of[row]];
  return kUnscale * scale;  // a power of two: the products are rounded as they would be without it
}
__device__ __forceinline__ int out_row_of(const Gemm& g, int row) { return g.out_row == nullptr ? row : g.out_row[row]; }

__device__ __forceinline__ const float* decode_scales_of(const Gemm& g, int expert) {
  return g.decode_scale + static_cast<int64_t>(expert) * (kOutput == Output::gated ? 2 * g.outputs : g.outputs);
}

// What a sum stands for.
__device__ __forceinline__ float scaled_back(float sum, float token_scale, float decode_scale) {
  return (sum * token_scale) * decode_scale;
}

constexpr float kLog2OfE = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f, kLn2Rest = -0x1.05c610p-29f;

// silu_and_mul of nvfp4.cuh by the chip's own functions, to about 2^-21: what rounding takes from gate * log2(e) comes
// back as a factor. Divided by four, 1 + e^-gate has a normal inverse, or one of 0 where e^-gate is infinite.
__device__ __forceinline__ float silu_and_mul_near(float gate, float up) {
  const float power = gate * -kLog2OfE, quarter = gate * 0.25f;
  const float factor = __fmaf_rn(-power, kLn2 / 4, -quarter) + __fmaf_rn(-power, kLn2Rest / 4, 0.25f);  // a quarter
  return quarter * inverse_fast(__fmaf_rn(exp2_fast(power), factor, 0.25f)) * up;
}

// silu_and_mul of nvfp4.cuh to the bit, for gates of 16 bits (tests ask for all of them). A division's call would cost
// registers, so it is spelled out: a quotient and what it lacks, without its special cases.
__device__ __forceinline__ float silu_and_mul_exact(float gate, float up) {
  // Beyond these limits 1 + e^-gate is 1, or infinite, all the same. e^-gate may be a little more than 2^127.
  const Exponential power = exp_pinned(fminf(fmaxf(-gate, -30.0f), 89.0f));
  const float divisor = 1.0f + (power.p + power.p) * power_of_two(power.n - 1);
  const float unit = divisor > 0x1p64f ? 0x1p-64f : 1.0f, d = divisor * unit;  // inverses are normal numbers
  float inverse = inverse_fast(d);
  inverse = __fmaf_rn(__fmaf_rn(-d, inverse, 1.0f), inverse, inverse);
  // Newton's step does not find the number nearest to the inverse of the largest mantissa.
  inverse = d == 0x1.fffffep+0f ? 0x1.000002p-1f : inverse;
  float quotient = gate * inverse;
  const float lacks = __fmaf_rn(-d, quotient, gate);  // NaN where the quotient is infinite
  quotient = fabsf(lacks) > 0.0f ? __fmaf_rn(lacks, inverse, quotient) : quotient;
  quotient = divisor > FLT_MAX ? gate * 0.0f : quotient * unit;
  return quotient * up;
}

// Whether silu_and_mul of nvfp4.cuh is rounded to the type of x as `near` is, which is silu_and_mul_near(gate, up): they
// differ by less than kMargin units in the last place, for gates that rounding takes little from, and no tie is that
// close. (A test asks for every gate times every up.)
__device__ __forceinline__ bool rounds_as_pinned(float gate, float near) {
  constexpr uint32_t kLost = kDtype == Dtype::bf16 ? 16 : 13;  // bits
  constexpr uint32_t kMargin = 8, kTie = 1u << (kLost - 1), kFar = (1u << kLost) - 2 * kMargin;
  const bool far = ((bits<uint32_t>(near) + kTie + kMargin) & kFar) != 0;
  if constexpr (kDtype == Dtype::bf16) return far & (fabsf(gate) <= 0x1p20f);
  // Numbers that are subnormal in fp16 lose more bits. Gates of 0 are those of tokens that a tile has room for.
  return far & ((fabsf(near) >= 0x1p-14f) | (near == 0.0f));
}

struct GateAndUp {
  float gate, up;

  // `stored`: both, as they would be stored in the type of x.
  __device__ __forceinline__ explicit GateAndUp(uint32_t stored)
      : gate(widen(reinterpret_cast<const Value*>(&stored)[0])), up(widen(reinterpret_cast<const Value*>(&stored)[1])) {}
};

// But for the pinned one.
template <Activation activation>
__device__ __forceinline__ float activate(const GateAndUp& x) {
  if constexpr (activation == Activation::silu) {
    return x.gate * inverse_fast(1.0f + exp2_fast(x.gate * -kLog2OfE)) * x.up;
  }
  if constexpr (activation == Activation::gelu) {
    return 0.5f * x.gate * (1.0f + erff(x.gate * 0.70710678118654752f)) * x.up;
  }
  const float inner = 0.79788456080286536f * (x.gate + 0.044715f * x.gate * x.gate * x.gate);
  return 0.5f * x.gate * (1.0f + tanhf(inner)) * x.up;
}

// Of gates and ups as they are stored in the type of x, in pairs of results.
template <Activation activation, int kPairs>
__device__ __forceinline__ void activate(const uint32_t (&stored)[2 * kPairs], uint32_t (&results)[kPairs]) {
  if constexpr (activation != Activation::silu_pinned) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const GateAndUp a(stored[2 * i]), b(stored[2 * i + 1]);
      results[i] = pack(activate<activation>(a), activate<activation>(b));
    }
    return;
  }
  unsigned open = 0;  // a bit for each result that only the specification's operations tell
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const GateAndUp a(stored[2 * i]), b(stored[2 * i + 1]);
    const float first = silu_and_mul_near(a.gate, a.up), second = silu_and_mul_near(b.gate, b.up);
    if (!rounds_as_pinned(a.gate, first)) open |= 1u << (2 * i);
    if (!rounds_as_pinned(b.gate, second)) open |= 2u << (2 * i);
    results[i] = pack(first, second);
  }
  // One after the other: a copy of this for each would hardly ever be in the cache of instructions.
#pragma unroll 1
  for (; open != 0; open &= open - 1) {
    const int at = __ffs(open) - 1;
    uint32_t own = stored[0];
#pragma unroll
    for (int i = 1; i < 2 * kPairs; ++i) own = at == i ? stored[i] : own;
    const GateAndUp x(own);
    const float result = silu_and_mul_exact(x.gate, x.up);
    const uint32_t both = pack(result, result);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      results[i] = __byte_perm(results[i], both, at == 2 * i ? 0x3254 : at == 2 * i + 1 ? 0x5410 : 0x3210);
    }
  }
}

// Calls `use` with the activation as a constant: to ask for each number which it is would keep numbers from being computed
// side by side.
template <class Use>
__device__ __forceinline__ void with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::silu: return use(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu: return use(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh: return use(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu_pinned: return use(std::integral_constant<Activation, Activation::silu_pinned>{});
  }
}

// Neighbouring outputs, for token after token.
struct Piece {
  int output;  // the first of them
  bool inside;
  float scale[kPieceRows];

  // `row`: of the tiles, where the piece begins.
  __device__ __forceinline__ Piece(const Gemm& g, int expert, int row) {
    output = kOutput == Output::gated ? row / 16 * 8 + row % 8 : row;
    inside = output < g.outputs;
    if (!inside) return;
    const float* of_expert = decode_scales_of(g, expert);
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) scale[i] = of_expert[output + i % kOutputs + i / kOutputs * g.outputs];
  }

  // `row`: of x.
  __device__ __forceinline__ void finish(const Gemm& g, int row, const float (&sums)[kPieceRows]) const {
    const float token_scale = token_scale_of(g, row);
    const int64_t to = static_cast<int64_t>(out_row_of(g, row)) * g.outputs + output;
    float y[kPieceRows];
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) y[i] = scaled_back(sums[i], token_scale, scale[i]);
    if constexpr (kOutput == Output::fp32) {
      float4* out = reinterpret_cast<float4*>(static_cast<float*>(g.out) + to);
      out[0] = make_float4(y[0], y[1], y[2], y[3]);
      out[1] = make_float4(y[4], y[5], y[6], y[7]);
    } else {
      alignas(16) uint32_t packed[kOutputs / 2];
      if constexpr (kOutput == Output::gated) {
        uint32_t stored[kOutputs];
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) stored[i] = pack(y[i], y[i + kOutputs]);
        with_activation(g.activation, [&](auto activation) {
          activate<decltype(activation)::value, kOutputs / 2>(stored, packed);
        });
      } else {
        if (g.bias != nullptr) {
#pragma unroll
          for (int i = 0; i < kOutputs; ++i) y[i] = y[i] + load_number(g.bias, g.bias_dtype, output + i);
        }
#pragma unroll
        for (int i = 0; i < kOutputs; i += 2) packed[i / 2] = pack(y[i], y[i + 1]);
      }
      using Word = std::conditional_t<kOutputs == 8, uint4, uint2>;
      *reinterpret_cast<Word*>(static_cast<Value*>(g.out) + to) = *reinterpret_cast<const Word*>(packed);
    }
  }
};

__device__ __forceinline__ void load_sums(const float* from, float (&sums)[kPieceRows]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 v = *reinterpret_cast<const float4*>(from + i * kSecondHalf);
    float* to = sums + i * 4;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
}

// --- launching ---

// Lets a kernel take that much shared memory, once for each device. A thread's first call also gives it the device's
// context, which the map of x needs.
template <auto kernel>
cudaError_t allow_shared_memory(int bytes) {
  static thread_local uint64_t allowed = 0;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed & bit) != 0) return cudaSuccess;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
    return error;
  }
  allowed |= bit;
  return cudaSuccess;
}

}  // namespace
}  // namespace fos::cuda
