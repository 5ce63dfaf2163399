// The quantizer for experts' intermediate results on Hopper: per token, while the product that makes them still runs.
//
// Between two products nothing is read that only memory could hold, and hardly anything computed: a kernel of its own
// would take as long as starting it, a trip to memory, one thread's work and ending it do. So a CTA sits on each
// multiprocessor beside one of the product (shape_sm90.cuh: in the registers and the shared memory which that leaves),
// and quantizes each row in place as soon as its last tile is written. The second product starts on a multiprocessor when
// the first has ended there, with rows that are done; only the last few are to be waited for, and those it comes to last.
//
// Nobody waits for what has not started: a kernel may start once all of the one before it runs.
#pragma once

#include "quantize_group.cuh"

namespace fos::cuda {
namespace {

// A warp a row. Rows are taken in the order in which the product makes them.
template <Metric metric, bool adaptive>
__global__ void __maxnreg__(kBesideRegisters) quantize_beside(const __grid_constant__ Quantize q) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900  // the products are Hopper's
  let_kernel_after_start();
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), lane = thread % kWarp;
  const int blocks = static_cast<int>(q.columns / kBlock);
  const Group group = {kWarp, lane, 0};
  for (int row = thread / kWarp; row < static_cast<int>(q.rows);
       row += static_cast<int>(gridDim.x) * (kBesideThreads / kWarp)) {
    const int32_t found = lane == 0 ? sm90::wait_for_number(q.progress + row, q.row_tiles, kQuantized) : 0;
    if (sm90::uniform(found) == kQuantized) break;  // nobody's, as all that follow
    __syncwarp();
    const uint32_t amax = q.amax == nullptr ? largest_of(kWarp, own_largest<false>(q, row, group, nullptr))
                                            : bits<uint32_t>(q.amax[q.amax_is_shared ? 0 : row]);
    const GlobalScales global = global_scales(bits<float>(amax), q.recipe.encoded_amax);
    write_decode_scale<Result::values>(q, row, stored_decode_scale(global), lane, kWarp);
    Target to = {};
    to.values = static_cast<Raw*>(q.values) + static_cast<int64_t>(row) * blocks;
    quantize_part<metric, adaptive, false, Result::values>(q, row_of(global), to.values, nullptr, to,
                                                           {0, blocks, blocks}, group);
    __syncwarp();
    if (lane == 0) sm90::store_number(q.progress + row, kQuantized);
  }
  wait_for_kernel_before();  // who waits for this one waits for both
#endif
}

}  // namespace
}  // namespace fos::cuda
