// What a mixture of experts needs around its two products: rows sorted by expert, and the sum over a token's slots.
#include "gemm.h"
#include "sm90.cuh"
#include "values.cuh"

namespace fos::cuda {
namespace {

using namespace sm90;

constexpr int kRouteThreads = 1024;
constexpr int kCopyThreads = 128;
constexpr int kSumThreads = 128;
constexpr int kAtOnce = 4;  // reads that are under way before the first is used

// Past the first-level cache, which may hold older ids until the kernel before is waited for.
__device__ __forceinline__ int expert_of(const Route& r, int slot) {
  const int64_t id = r.wide_ids ? __ldcg(static_cast<const long long*>(r.topk_ids) + slot)
                                : __ldcg(static_cast<const int32_t*>(r.topk_ids) + slot);
  return id >= 0 && id < r.experts ? static_cast<int>(id) : -1;
}

__device__ __forceinline__ int warp_sum_up_to(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// Slots by expert, and the experts' rows in blocks. The CTAs of a cluster, which is all of the grid, share the slots:
// counting takes as long as additions in one multiprocessor's shared memory do. Where a slot lies among those of its
// expert depends on which thread came first; what is computed of it does not.
__global__ void __launch_bounds__(kRouteThreads) sort_slots(const Route r) {
  __shared__ int next[kMaxExperts], all[kMaxExperts], before[kMaxExperts];
  const int thread = threadIdx.x, lane = thread % kWarp;
  const int rank = blockIdx.x, ctas = gridDim.x, first_slot = rank * kRouteThreads + thread;
  let_kernel_after_start();
  for (int e = thread; e < r.experts; e += kRouteThreads) next[e] = 0;
  if (!r.beside_kernel_before) wait_for_kernel_before();
  __syncthreads();
  for (int slot = first_slot; slot < r.slots; slot += ctas * kRouteThreads) {
    const int expert = expert_of(r, slot);
    if (expert >= 0) atomicAdd(&next[expert], 1);
  }
  cluster_sync();
  for (int e = thread; e < r.experts; e += kRouteThreads) {
    all[e] = before[e] = 0;
    for (int other = 0; other < ctas; ++other) {
      const int count = load_int_from_cta(in_cta(shared_address(&next[e]), other));
      all[e] += count;
      before[e] += other < rank ? count : 0;
    }
  }
  cluster_sync();  // nobody changes what others still read
  if (thread < kWarp) {
    int rows = 0, blocks = 0;
    for (int first = 0; first < r.experts; first += kWarp) {
      const int expert = first + lane, own = expert < r.experts ? all[expert] : 0;
      // Blocks of an expert are about as large as each other: for a block of few rows weights are unpacked, too.
      const int own_blocks = (own + r.tokens - 1) / r.tokens, eights = 8 * own_blocks;
      const int own_rows = own == 0 ? 0 : (own + eights - 1) / eights * 8;
      const int rows_to = warp_sum_up_to(own, lane), blocks_to = warp_sum_up_to(own_blocks, lane);
      const int begin = rows + rows_to - own, end = rows + rows_to;
      for (int i = 0; rank == 0 && i < own_blocks; ++i) {
        const int from = begin + i * own_rows;
        r.blocks[blocks + blocks_to - own_blocks + i] = {expert, from, min(end, from + own_rows), 0};
      }
      if (expert < r.experts) next[expert] = begin + before[expert];
      rows += __shfl_sync(~0u, rows_to, kWarp - 1);
      blocks += __shfl_sync(~0u, blocks_to, kWarp - 1);
    }
    if (rank == 0 && lane == 0) r.in_use[0] = blocks, r.in_use[1] = rows;
  }
  __syncthreads();
  for (int slot = first_slot; slot < r.slots; slot += ctas * kRouteThreads) {
    const int expert = expert_of(r, slot);
    if (expert < 0) continue;
    const int row = atomicAdd(&next[expert], 1);
    r.slot_of_row[row] = slot;
    r.token_of_row[row] = slot / r.top_k;
  }
  if (r.beside_kernel_before) wait_for_kernel_before();  // who waits for this one waits for both
}

// A CTA a row of the result: the row of its token, times the weight of its slot where weights are given.
template <class Value>
__global__ void __launch_bounds__(kCopyThreads) gather_rows(const Gather g) {
  const int row = blockIdx.x;
  wait_for_kernel_before();
  let_kernel_after_start();  // not before: the product reads the blocks as it begins
  if (row >= g.in_use[1]) return;
  constexpr int kEach = 8;
  const int64_t token = g.token_of_row[row];
  const uint4* from = reinterpret_cast<const uint4*>(g.x) + token * (g.columns / kEach);
  uint4* to = reinterpret_cast<uint4*>(g.out) + static_cast<int64_t>(row) * (g.columns / kEach);
  const float weight = g.topk_weights == nullptr ? 1.0f : g.topk_weights[g.slot_of_row[row]];
  for (int i = threadIdx.x; i < g.columns / kEach; i += kCopyThreads) {
    uint4 word = from[i];
    if (g.topk_weights != nullptr) {
      Value* values = reinterpret_cast<Value*>(&word);
#pragma unroll
      for (int k = 0; k < kEach; ++k) round_to(widen(values[k]) * weight, values[k]);
    }
    to[i] = word;
  }
}

// The slots of a token in their order, each times its weight where weights are given, in fp32.
template <class Value>
__global__ void __launch_bounds__(kSumThreads) sum_slots(const Combine c) {
  const int token = blockIdx.x, column = (blockIdx.y * kSumThreads + threadIdx.x) * 4;
  let_kernel_after_start();
  wait_for_kernel_before();
  if (column >= c.columns) return;
  float sum[4] = {};
  for (int first = 0; first < c.route.top_k; first += kAtOnce) {
    int slot[kAtOnce];
    float weight[kAtOnce];
    bool counts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      slot[i] = token * c.route.top_k + min(first + i, c.route.top_k - 1);
      weight[i] = c.topk_weights == nullptr ? 1.0f : c.topk_weights[slot[i]];
      counts[i] = expert_of(c.route, slot[i]) >= 0 && first + i < c.route.top_k;
    }
    float4 read[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float* from = c.slots + static_cast<int64_t>(slot[i]) * c.columns + column;
      if (counts[i]) read[i] = *reinterpret_cast<const float4*>(from);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!counts[i]) continue;
      const float4 v = read[i];
      sum[0] += v.x * weight[i], sum[1] += v.y * weight[i], sum[2] += v.z * weight[i], sum[3] += v.w * weight[i];
    }
  }
  alignas(8) Value rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) round_to(sum[i], rounded[i]);
  *reinterpret_cast<uint2*>(static_cast<Value*>(c.out) + static_cast<int64_t>(token) * c.columns + column) =
      *reinterpret_cast<const uint2*>(rounded);
}

}  // namespace

cudaError_t route(const Route& r, cudaStream_t stream) {
  constexpr int64_t kMostCtas = 8;  // that any cluster may have
  const int64_t wanted = ceil_div(r.slots, 2 * kRouteThreads);
  const auto ctas = static_cast<unsigned>(wanted < 1 ? 1 : wanted < kMostCtas ? wanted : kMostCtas);
  return launch_early(sort_slots, dim3(ctas), ctas, kRouteThreads, 0, stream, r);
}

cudaError_t gather(const Gather& g, cudaStream_t stream) {
  if (g.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(g.rows));
  const auto kernel = g.dtype == Dtype::bf16 ? gather_rows<__nv_bfloat16> : gather_rows<__half>;
  return launch_early(kernel, grid, 0, kCopyThreads, 0, stream, g);
}

cudaError_t combine(const Combine& c, cudaStream_t stream) {
  const int tokens = c.route.slots / c.route.top_k;
  if (tokens == 0) return cudaSuccess;
  const int parts = (c.columns / 4 + kSumThreads - 1) / kSumThreads;
  const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(parts));
  const auto kernel = c.dtype == Dtype::bf16 ? sum_slots<__nv_bfloat16> : sum_slots<__half>;
  return launch_early(kernel, grid, 0, kSumThreads, 0, stream, c);
}

}  // namespace fos::cuda
