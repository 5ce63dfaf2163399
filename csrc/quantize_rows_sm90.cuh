// The quantizer as an end of experts' first product: whoever writes the last results of a block of rows quantizes them, in
// place, while they are in the second-level cache. Another kernel for it would have to wait for the whole product, and the
// second product for that.
#pragma once

#include "quantize_block.cuh"

namespace fos::cuda {
namespace {
namespace quantizer {

// Rows `first`, `first` + `apart` and so on, each by the warp that calls.
template <Metric metric, bool adaptive>
__device__ __forceinline__ void quantize_rows_in_place(const Quantize& q, int first, int end, int apart, int lane) {
  const Group warp = {kWarp, lane, 0};
  const int blocks = static_cast<int>(q.columns / kBlock);
#pragma unroll 1
  for (int row = first; row < end; row += apart) {
    const uint32_t amax = q.amax != nullptr ? bits<uint32_t>(q.amax[q.amax_is_shared ? 0 : row])
                                            : __reduce_max_sync(~0u, own_largest<false>(q, row, warp, nullptr));
    const GlobalScales global = global_scales(bits<float>(amax), q.recipe.encoded_amax);
    if (lane == 0) q.decode_scale[row] = stored_decode_scale(global);
    quantize_part<metric, adaptive, false, true, Pairs>(q, row, row_of(global), nullptr,
                                                        target_of(q, row, -1, blocks, 0), 0, blocks, blocks, warp);
  }
}

}  // namespace quantizer

__device__ __forceinline__ void quantize_in_place(const Quantize& q, int first, int end, int apart, int lane) {
  if (!q.recipe.adaptive) {
    quantizer::quantize_rows_in_place<Metric::mse, false>(q, first, end, apart, lane);
  } else if (q.recipe.metric == Metric::mse) {
    quantizer::quantize_rows_in_place<Metric::mse, true>(q, first, end, apart, lane);
  } else if (q.recipe.metric == Metric::mae) {
    quantizer::quantize_rows_in_place<Metric::mae, true>(q, first, end, apart, lane);
  } else {
    quantizer::quantize_rows_in_place<Metric::abs_max, true>(q, first, end, apart, lane);
  }
}

}  // namespace
}  // namespace fos::cuda
