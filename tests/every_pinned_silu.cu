// Every gate times every up of a type of 16 bits: what the gated products make of them (gemm_parts.cuh) beside the
// specification's operations. Prints how many results differ, how many were not sure, and by how much what is computed
// fast lies from the specification at most, in units in the last place, where it counts as sure.
//
// Compiled with FOS_DTYPE = bf16 or fp16, FOS_OUTPUT = gated and -fmad=false.
#include <cstdio>

#include "../csrc/gemm_parts.cuh"

namespace fos::cuda {
namespace {

struct Found {
  unsigned long long different, unsure;
  unsigned units;
};

__global__ void compare(Found* found) {
  Found own = {};
  for (uint32_t up = threadIdx.x; up < 1u << 16; up += blockDim.x) {
    const uint32_t stored[2] = {up << 16 | blockIdx.x, up << 16 | blockIdx.x};
    const GateAndUp x(stored[0]);
    const float expected = silu_and_mul(x.gate, x.up), near = silu_and_mul_near(x.gate, x.up);
    uint32_t result[1];
    activate<Activation::silu_pinned>(stored, result);
    own.different += result[0] != pack(expected, expected);
    if (!rounds_as_pinned(x.gate, near)) {
      ++own.unsure;
    } else if (is_finite(expected) && is_finite(near)) {
      const uint32_t a = bits<uint32_t>(expected), b = bits<uint32_t>(near);
      own.units = max(own.units, a > b ? a - b : b - a);
    }
  }
  atomicAdd(&found->different, own.different);
  atomicAdd(&found->unsure, own.unsure);
  atomicMax(&found->units, own.units);
}

}  // namespace
}  // namespace fos::cuda

int main() {
  fos::cuda::Found* found = nullptr;
  if (cudaMallocManaged(&found, sizeof *found) != cudaSuccess) return 1;
  *found = {};
  fos::cuda::compare<<<1 << 16, 256>>>(found);
  if (cudaDeviceSynchronize() != cudaSuccess) return 1;
  std::printf("%llu %llu %u\n", found->different, found->unsure, found->units);
}
