// The quantizer for few rows, per token, on GPUs from sm_90 on: a row is spread over a cluster of CTAs.
#pragma once

#include "quantize_block.cuh"

namespace fos::cuda {
namespace {

constexpr int kMaxRowWarps = 32;  // of all CTAs of a cluster: a lane reads what each found
constexpr int kMaxCluster = 8;    // CTAs that every chip with clusters takes

// What each warp of a row's CTAs finds goes to all of these CTAs, through shared memory: the writes themselves count in
// the receiver's barrier, where a barrier of the cluster would have every thread wait until its writes are everywhere.
struct Exchange {
  uint64_t arrived;
  uint32_t largest[kMaxRowWarps];
};

#if defined(FOS_HOPPER_OR_LATER)
using sm90::shared_address;

// All CTAs of the cluster run once this returns, and their barriers wait for `warps` numbers.
__device__ __forceinline__ void open_exchange(Exchange& exchange, int warps) {
  const uint32_t barrier = shared_address(&exchange.arrived);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();  // compute-sanitizer takes the first for all threads of the warp, as it is one instruction for them
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(warps * 4) : "memory");
  }
  __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
}

// The largest of what the threads of the cluster found. Nothing is written to a CTA that has all numbers: it may end.
__device__ __forceinline__ uint32_t largest_of_cluster(Exchange& exchange, int warps, uint32_t own) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  const uint32_t found = __reduce_max_sync(~0u, own), barrier = shared_address(&exchange.arrived);
  if (lane < static_cast<int>(gridDim.x)) {
    uint32_t its_slot, its_barrier;
    const uint32_t slot = shared_address(&exchange.largest[warp]);
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(its_slot) : "r"(slot), "r"(lane));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(its_barrier) : "r"(barrier), "r"(lane));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(its_slot), "r"(found),
        "r"(its_barrier)
        : "memory");
  }
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier)
        : "memory");
  }
  return __reduce_max_sync(~0u, lane < warps ? exchange.largest[lane] : 0u);
}
#endif

// Per token, one block a thread, in registers while a cluster of CTAs finds the amax of its row: with too few rows to
// fill the chip, a call takes as long as one thread does. (gridDim.x is the cluster, blockIdx.y the row.)
template <Metric metric, bool adaptive, bool gated, Result result>
__global__ void __maxnreg__((registers<gated, result>()))
    quantize_few_rows(const __grid_constant__ Quantize q, const int scale_stride) {
#if defined(FOS_HOPPER_OR_LATER)
  __shared__ Exchange exchange;
  const int warps = static_cast<int>(gridDim.x * blockDim.x) / kWarp;
  open_exchange(exchange, warps);
  const int64_t row = blockIdx.y;
  const int blocks = static_cast<int>(q.columns / kBlock);
  const int block = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const void* x = input_row<gated>(q, row);
  const Target to = target_of<result>(q, row, row, blocks, scale_stride);
  if constexpr (!kOfSlots<result>) take_turn();
  const bool used = in_use(q, row);
  Raw raw = read<gated, kOfSlots<result>>(x, min(block, blocks - 1), blocks);  // the last one again does no harm
  const uint32_t amax = largest_of_cluster(exchange, warps, largest_bits(larger_magnitudes(raw)));
  const GlobalScales global = global_scales(bits<float>(amax), q.recipe.encoded_amax);
  const Row shared = row_of(global);
  using Rounded = RoundedFor<result>;
  Chosen<Rounded> chosen = {};
  const bool inside = block < blocks && used;
  const Found found = inside ? choose<metric, adaptive>(shared, raw, chosen) : Found::chosen;
  if constexpr (adaptive) {  // for slots while the kernel before still sorts them
    decide<metric, Rounded>(q.recipe, shared, raw, found == Found::near,
                            [&](const Chosen<Rounded>& decided) { chosen = decided; });
  }
  if constexpr (kOfSlots<result>) take_turn();
  write_decode_scale<result>(q, row, stored_decode_scale(global), block, static_cast<int>(gridDim.x * blockDim.x));
  if constexpr (kOfSlots<result>) {
    write_to_slots(to, block, blocks, chosen, raw);
  } else if (inside && found != Found::unknown) {
    write(to, block, chosen, raw);
  }
  for (uint32_t left = __ballot_sync(~0u, found == Found::unknown); left != 0; left &= left - 1) {
    settle<metric, adaptive, gated, result>(q, shared, x, nullptr, block / kWarp * kWarp + __ffs(left) - 1, to);
  }
#endif
}

// --- launching ---

// How quantize_few_rows spreads a row; without CTAs where it does not serve.
struct Cluster {
  int ctas, threads;
};

// As many CTAs a row as there are multiprocessors for, while all blocks find room on the chip at once (gated: while it
// is faster on an H200). Powers of two, as they never round a row up to more warps than can exchange what they find;
// and at least two, as outside of a cluster there is no exchange.
Cluster cluster_of(const Quantize& q) {
  constexpr int64_t kFewRows = 2 * kMultiprocessors;
  const int64_t blocks = q.columns / kBlock, warps = ceil_div(blocks, kWarp);
  if (q.scope != Scope::token || q.amax != nullptr || q.rows == 0 || q.rows > kFewRows) return {};
  const int64_t room = q.gated ? kMultiprocessors * 14 * kWarp : kResidentThreads;
  if (warps > kMaxRowWarps || q.rows * blocks > room) return {};
  const int64_t spare = kMultiprocessors / q.rows;
  const int64_t most = spare >= kMaxCluster ? kMaxCluster : (spare >= 4 ? 4 : 2);
  const int64_t each = ceil_div(warps, most), ctas = ceil_div(warps, each);
  return {static_cast<int>(ctas < 2 ? 2 : ctas), static_cast<int>(each) * kWarp};
}

}  // namespace
}  // namespace fos::cuda
