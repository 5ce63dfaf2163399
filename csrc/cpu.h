// The CPU kernels, one namespace for each instruction set that kernels/build.py compiles cpu.cpp for.
#pragma once

#include "operands.h"

namespace fos {

// Each works on a range, so that the caller can spread it over threads.
struct CpuKernels {
  void (*row_amax)(const Quantize&, int64_t row_begin, int64_t row_end, float* amax);
  // amax[row * stride] is what each row is scaled for; blocks are counted along the rows.
  void (*quantize_blocks)(const Quantize&, const float* amax, int64_t stride, int64_t block_begin, int64_t block_end);
  void (*decode_scales)(const Recipe&, const float* amax, int64_t stride, int64_t count, float* out);
  void (*dequantize_rows)(const Dequantize&, int64_t row_begin, int64_t row_end);
};

#define FOS_DECLARE_ISA(isa)                                                                      \
  namespace isa {                                                                                 \
  void row_amax(const Quantize&, int64_t, int64_t, float*);                                       \
  void quantize_blocks(const Quantize&, const float*, int64_t, int64_t, int64_t);                 \
  void decode_scales(const Recipe&, const float*, int64_t, int64_t, float*);                      \
  void dequantize_rows(const Dequantize&, int64_t, int64_t);                                      \
  constexpr CpuKernels kernels = {row_amax, quantize_blocks, decode_scales, dequantize_rows};     \
  }

FOS_DECLARE_ISA(baseline)
#if defined(__x86_64__)
FOS_DECLARE_ISA(avx2)
FOS_DECLARE_ISA(avx512)
#endif

inline const CpuKernels& cpu_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512::kernels;
  }
  if (__builtin_cpu_supports("avx2")) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace fos
