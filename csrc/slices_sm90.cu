// The sums of one weight's columns in slices, as gemm_sm90.cu leaves them, to results.
//
// Compiled with FOS_DTYPE = bf16 or fp16 and FOS_OUTPUT = linear, and -fmad=false: what is added is rounded after it was
// multiplied.
#include "gemm_parts.cuh"

namespace fos::cuda {
namespace {

constexpr int kThreads = 128;

// Slices are added in their order. A thread has neighbouring numbers of a row.
__global__ void __launch_bounds__(kThreads) add_slices(const Gemm g) {
  constexpr int kAtOnce = 4;  // slices that are read before the first is added
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int pieces = g.outputs / kPieceRows, row = static_cast<int>(index / pieces);
  let_kernel_after_start();
  if (row >= g.rows) return;
  const Piece piece(g, 0, static_cast<int>(index % pieces) * kPieceRows);
  wait_for_kernel_before();
  const float* from = g.sums + index * kPieceRows;
  const int64_t apart = static_cast<int64_t>(g.rows) * g.outputs;
  float sums[kPieceRows] = {};
  for (int first = 0; first < g.split; first += kAtOnce, from += kAtOnce * apart) {
    float parts[kAtOnce][kPieceRows];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < g.split) load_sums(from + i * apart, parts[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= g.split) break;
#pragma unroll
      for (int k = 0; k < kPieceRows; ++k) sums[k] += parts[i][k];
    }
  }
  piece.finish(g, row, sums);
}

}  // namespace

cudaError_t FOS_PRODUCT(add_slices_)(const Gemm& g, cudaStream_t stream) {
  const int64_t pieces = static_cast<int64_t>(g.rows) * (g.outputs / kPieceRows);
  return launch_early(add_slices, dim3(static_cast<unsigned>(ceil_div(pieces, kThreads))), 0, kThreads, 0, stream, g);
}

}  // namespace fos::cuda
