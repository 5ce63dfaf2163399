// Numbers of 16 bits as fp32, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fos::cuda {

__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ void round_to(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void round_to(float v, __half& to) { to = __float2half_rn(v); }

}  // namespace fos::cuda
