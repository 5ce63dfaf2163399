// x in boxes, as the copy engine brings it and wgmma reads it: rows of 128 bytes, swizzled.
#pragma once

#include <cuda.h>

#include "gemm_parts.cuh"

namespace fos::cuda {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, through the runtime: nothing links libcuda.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

constexpr int kRowOfBox = kStep * 2;  // bytes of a row in a step's box

// Whether columns come to an end with a step: several steps are a box then.
__host__ __device__ __forceinline__ bool whole_steps(const Gemm& g) { return g.columns % kStep == 0; }

// x as [columns of a step, rows, steps], or, without whole steps, as [columns, rows, 1]; in boxes of a step's columns and
// `rows` rows, of `steps` or one. What lies outside of x reads as 0.
bool map_of(const Gemm& g, int rows, int steps, CUtensorMap* map) {
  const bool whole = whole_steps(g);
  const cuuint64_t shape[3] = {static_cast<cuuint64_t>(whole ? kStep : g.columns), static_cast<cuuint64_t>(g.rows),
                               static_cast<cuuint64_t>(whole ? g.steps : 1)};
  const cuuint64_t pitch[2] = {static_cast<cuuint64_t>(g.columns) * 2, kRowOfBox};
  const cuuint32_t box[3] = {kStep, static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(whole ? steps : 1)};
  const cuuint32_t stride[3] = {1, 1, 1};
  const auto type = kDtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const EncodeTiled encode = encode_tiled();
  return encode != nullptr &&
         encode(map, type, 3, const_cast<void*>(g.x), shape, pitch, box, stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// `rows` rows and `steps` steps of x as that map has them, each step's rows after the one's before; those beyond the last
// as 0.
__device__ __forceinline__ void copy_steps(const Gemm& g, const CUtensorMap& map, uint32_t to, int row, int rows,
                                           int step, int steps, uint32_t barrier) {
  if (whole_steps(g)) {
    copy_box(to, &map, 0, row, step, barrier);
  } else {
    for (int i = 0; i < steps; ++i) {
      copy_box(to + i * rows * kRowOfBox, &map, (step + i) * kStep, row, 0, barrier);
    }
  }
}

}  // namespace
}  // namespace fos::cuda
