// The CPU kernels, one namespace for each instruction set that kernels/build.py compiles them for.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "operands.h"

namespace fos {

// Each works on a range, so that the caller can spread it over threads.
struct CpuKernels {
  void (*row_amax)(const Quantize&, int64_t row_begin, int64_t row_end, float* amax);
  // amax[row * stride] is what each row is scaled for; blocks are counted along the rows.
  void (*quantize_blocks)(const Quantize&, const float* amax, int64_t stride, int64_t block_begin, int64_t block_end);
  void (*decode_scales)(const Recipe&, const float* amax, int64_t stride, int64_t count, float* out);
  void (*dequantize_rows)(const Dequantize&, int64_t row_begin, int64_t row_end);
  void (*tokens_in_fp32)(const Linear&, int64_t token_begin, int64_t token_end, float* out);
  void (*linear_strips)(const Linear&, const float* tokens, int64_t strip_begin, int64_t strip_end);
  void (*combine_tokens)(const Combine&, int64_t token_begin, int64_t token_end);
};

#define FOS_DECLARE_ISA(isa)                                                              \
  namespace isa {                                                                         \
  void row_amax(const Quantize&, int64_t, int64_t, float*);                               \
  void quantize_blocks(const Quantize&, const float*, int64_t, int64_t, int64_t);         \
  void decode_scales(const Recipe&, const float*, int64_t, int64_t, float*);              \
  void dequantize_rows(const Dequantize&, int64_t, int64_t);                              \
  void tokens_in_fp32(const Linear&, int64_t, int64_t, float*);                           \
  void linear_strips(const Linear&, const float*, int64_t, int64_t);                      \
  void combine_tokens(const Combine&, int64_t, int64_t);                                  \
  inline constexpr CpuKernels kernels = {row_amax,        quantize_blocks, decode_scales, \
                                         dequantize_rows, tokens_in_fp32,  linear_strips, \
                                         combine_tokens};                                 \
  }

FOS_DECLARE_ISA(baseline)
#if defined(__x86_64__)
FOS_DECLARE_ISA(avx2)
FOS_DECLARE_ISA(avx512)

// cpu_bf16.cpp: instructions that multiply bf16 numbers, from a few tokens of these on: matrix tiles (AMX) or pairs
// (AVX512_BF16). Tokens go in groups of kTileTokens, columns in steps of kTileStep.
constexpr int64_t kTileTokens = 16, kTileStep = 32;
namespace avx512 {
enum class Bf16Products { none, pairs, tiles };
Bf16Products bf16_products();
void tile_tokens(const Linear&, int64_t group_begin, int64_t group_end, uint16_t* out);
// scratch holds the panel as bf16 (unless it goes through registers), columns rounded up to 32; it and tokens start at
// cache lines.
void linear_panel(const Linear&, const uint16_t* tokens, int64_t strip_begin, int64_t strip_end, uint16_t* scratch);
}  // namespace avx512
#endif

// Subnormals as IEEE 754 has them, whatever the caller's thread is set to (torch.set_flush_denormal).
class StrictSubnormals {
#if defined(__x86_64__)
 public:
  StrictSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~StrictSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  StrictSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~StrictSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
 public:
  StrictSubnormals() {}
  ~StrictSubnormals() {}
#endif
};

// Values below which a thread costs more than it saves, and the rows that have as many.
constexpr int64_t kGrain = 1 << 14;
inline int64_t rows_of(int64_t values, int64_t columns) { return values / columns > 1 ? values / columns : 1; }

inline const CpuKernels& cpu_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512::kernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace fos
