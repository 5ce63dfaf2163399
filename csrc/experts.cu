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
constexpr int kAtOnce = 8;  // reads that are under way before the first is used

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
  constexpr int kWarps = kRouteThreads / kWarp, kHeld = 4;  // slots that a thread reads at once
  static_assert(kWarps == kWarp);                           // a lane for each
  __shared__ int counts[kMaxExperts], next[kMaxExperts], rows_of_warp[kWarps], blocks_of_warp[kWarps];
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, rank = blockIdx.x, ctas = gridDim.x;
  const auto sync = [&] { ctas == 1 ? __syncthreads() : cluster_sync(); };
  int expert[kHeld];
  bool read = false;
  // Calls `use` with each of the thread's slots. If they are few, ids are read once.
  const auto for_slots = [&](auto use) {
    const int apart = ctas * kRouteThreads;
    for (int first = rank * kRouteThreads + thread; first < r.slots; first += kHeld * apart) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (!read && first + i * apart < r.slots) expert[i] = expert_of(r, first + i * apart);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (first + i * apart < r.slots) use(first + i * apart, expert[i]);
      }
    }
    read = r.slots <= kHeld * apart;
  };
  for (int e = thread; e < r.experts; e += kRouteThreads) counts[e] = 0;
  if (!r.beside_kernel_before) wait_for_kernel_before();
  let_kernel_after_start();  // not before, but for `beside`: that may read what the kernel before wrote without waiting
  __syncthreads();
  for_slots([&](int, int of) {
    if (of >= 0) atomicAdd(&counts[of], 1);
  });
  sync();
  int rows = 0, blocks = 0;
  for (int first = 0; first < r.experts; first += kRouteThreads) {
    const int e = first + thread;
    int own = 0, before = 0;  // rows: of all CTAs, of those before this one
    for (int other = 0; e < r.experts && other < ctas; ++other) {
      const int count = other == rank ? counts[e] : load_int_from_cta(in_cta(shared_address(&counts[e]), other));
      own += count;
      before += other < rank ? count : 0;
    }
    // Blocks of an expert are about as large as each other: for a block of few rows weights are unpacked, too.
    const int own_blocks = (own + r.tokens - 1) / r.tokens, unit = min(r.tokens, kPartOfRows) * own_blocks;
    const int own_rows = own == 0 ? 0 : (own + unit - 1) / unit * min(r.tokens, kPartOfRows);
    const int rows_to = warp_sum_up_to(own, lane), blocks_to = warp_sum_up_to(own_blocks, lane);
    if (lane == kWarp - 1) rows_of_warp[warp] = rows_to, blocks_of_warp[warp] = blocks_to;
    __syncthreads();
    const int rows_there = rows_of_warp[lane], blocks_there = blocks_of_warp[lane];
    const int end = rows + rows_to + __reduce_add_sync(~0u, lane < warp ? rows_there : 0), begin = end - own;
    const int block = blocks + blocks_to - own_blocks + __reduce_add_sync(~0u, lane < warp ? blocks_there : 0);
    for (int i = 0; rank == 0 && i < own_blocks; ++i) {
      const int from = begin + i * own_rows;
      r.blocks[block + i] = {e, from, min(end, from + own_rows), 0};
    }
    if (e < r.experts) next[e] = begin + before;
    rows += __reduce_add_sync(~0u, rows_there);
    blocks += __reduce_add_sync(~0u, blocks_there);
    __syncthreads();  // before the next experts' numbers come
  }
  if (rank == 0 && thread == 0) r.in_use[0] = blocks, r.in_use[1] = rows;
  for (int row = rank * kRouteThreads + thread; r.progress != nullptr && row < r.slots; row += ctas * kRouteThreads) {
    r.progress[row] = row < rows ? 0 : kQuantized;
  }
  for_slots([&](int slot, int of) {
    const int row = of < 0 ? -1 : atomicAdd(&next[of], 1);
    r.row_of_slot[slot] = row;
    if (row < 0 || r.slot_of_row == nullptr) return;
    r.slot_of_row[row] = slot;
    r.token_of_row[row] = slot / r.top_k;
  });
  if (ctas > 1) cluster_sync();                         // nobody ends while others read its counts
  if (r.beside_kernel_before) wait_for_kernel_before();  // who waits for this one waits for both
}

// 16 bytes of a token's row of x a thread, to the rows of all of its slots, or (z) of some: times their weights, where
// weights are given. And whose rows those are: so many places are faster written by all multiprocessors.
template <class Value>
__global__ void __launch_bounds__(kCopyThreads) gather_rows(const Gather g) {
  constexpr int kEach = 8;
  const int token = blockIdx.x, words = g.columns / kEach, word = blockIdx.y * kCopyThreads + threadIdx.x;
  wait_for_kernel_before();
  let_kernel_after_start();  // not before: the product reads the blocks as it begins
  const int each = (g.top_k + gridDim.z - 1) / gridDim.z, begin = blockIdx.z * each, end = min(g.top_k, begin + each);
  for (int k = begin + threadIdx.x; blockIdx.y == 0 && k < end; k += kCopyThreads) {
    const int slot = token * g.top_k + k, row = g.row_of_slot[slot];
    if (row < 0) continue;
    g.slot_of_row[row] = slot;
  }
  if (word >= words) return;
  const uint4 own = reinterpret_cast<const uint4*>(g.x)[static_cast<int64_t>(token) * words + word];
  for (int first = begin; first < end; first += kAtOnce) {
    const int count = min(kAtOnce, end - first), slot = token * g.top_k + first;
    int row[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) row[i] = g.row_of_slot[slot + min(i, count - 1)];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i >= count || row[i] < 0) continue;
      uint4 its = own;
      if (g.topk_weights != nullptr) {
        const float weight = g.topk_weights[slot + i];
        Value* values = reinterpret_cast<Value*>(&its);
#pragma unroll
        for (int k = 0; k < kEach; ++k) round_to(widen(values[k]) * weight, values[k]);
      }
      reinterpret_cast<uint4*>(g.out)[static_cast<int64_t>(row[i]) * words + word] = its;
    }
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
  if (g.tokens == 0) return cudaSuccess;
  constexpr int kCtas = 2048;  // that fill a chip
  const int parts = (g.columns / 8 + kCopyThreads - 1) / kCopyThreads, spare = kCtas / g.tokens / parts;
  const int of_slots = spare < 1 ? 1 : spare < g.top_k ? spare : g.top_k;
  const dim3 grid(static_cast<unsigned>(g.tokens), static_cast<unsigned>(parts), static_cast<unsigned>(of_slots));
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
