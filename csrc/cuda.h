// What bindings.cpp calls of quantize.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "operands.h"

namespace fos::cuda {

// amax: room for one number, or one an expert, where the call has to find it (scope tensor or expert, none given).
cudaError_t quantize(const Quantize& q, float* amax, cudaStream_t stream);
cudaError_t dequantize(const Dequantize& d, cudaStream_t stream);

// quantize.cu is compiled once for each dtype of the input, side by side.
cudaError_t quantize_bf16(const Quantize& q, float* amax, cudaStream_t stream);
cudaError_t quantize_fp16(const Quantize& q, float* amax, cudaStream_t stream);
cudaError_t quantize_fp32(const Quantize& q, float* amax, cudaStream_t stream);
cudaError_t dequantize_bf16(const Dequantize& d, cudaStream_t stream);
cudaError_t dequantize_fp16(const Dequantize& d, cudaStream_t stream);
cudaError_t dequantize_fp32(const Dequantize& d, cudaStream_t stream);

inline cudaError_t quantize(const Quantize& q, float* amax, cudaStream_t stream) {
  if (q.dtype == Dtype::bf16) return quantize_bf16(q, amax, stream);
  return q.dtype == Dtype::fp16 ? quantize_fp16(q, amax, stream) : quantize_fp32(q, amax, stream);
}

inline cudaError_t dequantize(const Dequantize& d, cudaStream_t stream) {
  if (d.dtype == Dtype::bf16) return dequantize_bf16(d, stream);
  return d.dtype == Dtype::fp16 ? dequantize_fp16(d, stream) : dequantize_fp32(d, stream);
}

}  // namespace fos::cuda
