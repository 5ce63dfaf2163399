// The quantizer for GPUs (sm_80 and up): a thread takes a block of 16 values, a group of threads a row; where there are
// few rows, and sm_90 and up, a cluster of CTAs.
//
// Compiled with FOS_DTYPE = bf16, fp16 or fp32, the type of the input, and -fmad=false.
#include "quantize_beside.cuh"
#include "quantize_few_rows.cuh"
#include "quantize_group.cuh"

#define FOS_PASTE_(a, b) a##b
#define FOS_PASTE(a, b) FOS_PASTE_(a, b)
#define FOS_ENTRY(name) FOS_PASTE(FOS_PASTE(name, _), FOS_DTYPE)

namespace fos::cuda {
namespace {

constexpr int kThreads = 128;     // of a CTA, unless a row has more
constexpr int kMaxThreads = 512;  // of a CTA
constexpr int kDequantizeThreads = 256;

// --- rows ---

// Whose a row is, and the row that its scales go to; -1: nobody's, nowhere. Every warp looks for itself: as the offsets
// ascend, the expert's number is that of the experts that end at or before the row.
struct Place {
  int expert;
  int64_t scale_row;
};

__device__ __forceinline__ Place find_expert(const Quantize& q, int64_t row) {
  const int tile = static_cast<int>(tile_rows(q.layout)), experts = static_cast<int>(q.experts);
  int before = 0;
  uint32_t start = 0;
  for (int first = 0; first < experts; first += kWarp) {
    const int e = first + static_cast<int>(threadIdx.x) % kWarp;
    const int begin = e < experts ? q.offsets[e] : 0, end = e < experts ? q.offsets[e + 1] : 0;
    const bool ended = e < experts && end <= row;
    const int found = __popc(__ballot_sync(~0u, ended));
    before += found;
    start += __reduce_add_sync(~0u, ended ? static_cast<uint32_t>((end - begin + tile - 1) / tile) : 0u);
    if (found < kWarp) break;
  }
  if (before == experts || q.offsets[before] > row) return {-1, q.layout == Layout::row_major ? row : -1};
  return {before, q.layout == Layout::row_major ? row : int64_t(start) * tile + row - q.offsets[before]};
}

template <bool gated, bool past_l1>
__device__ __forceinline__ uint32_t find_amax(const Quantize& q, int64_t row, const Group& group, Raw* stash) {
  __shared__ uint32_t largest[kMaxThreads / kUnit];
  const int part = group.threads % kWarp == 0 ? kWarp : kUnit;
  const uint32_t found = largest_of(part, own_largest<gated, past_l1>(q, row, group, stash));
  if (group.threads == part) {
    __syncwarp();  // for the stash
    return found;
  }
  const int parts = group.threads / part, first = group.slot * parts, lane = group.lane % part;
  if (lane == 0) largest[first + group.lane / part] = found;
  __syncthreads();  // of all groups of the CTA: a barrier for each would leave room for four CTAs on a multiprocessor
  uint32_t all = 0;
  for (int i = lane; i < parts; i += part) all = max(all, largest[first + i]);
  return largest_of(part, all);
}

// How rows are spread over threads.
struct Shape {
  int group;          // threads that share a row
  int groups;         // of a CTA
  int parts;          // CTAs that share a row (the grid's y): each finds the amax for itself and quantizes its part
  int scale_stride;   // from the scales of four blocks to those of the next four
  bool backwards;     // the last row first: the pass before read it last, and it is still in the L2
  unsigned stash;     // bytes of shared memory for a row of silu(gate) * up, or 0: then it is computed twice
};

// One row a group, or a part of it. `amax` is q.amax, or what the pass before found.
template <Metric metric, bool adaptive, bool gated, Result result>
__global__ void __maxnreg__((registers<gated, result>()))
    quantize_rows(const __grid_constant__ Quantize q, const float* amax, const Shape shape) {
  extern __shared__ uint4 stashes[];
  const Group group = group_of_thread(shape.group);
  const int64_t index = int64_t(blockIdx.x) * shape.groups + group.slot;
  bool inside = index < q.rows;  // of whole groups
  const int64_t taken = inside ? index : q.rows - 1;  // a warp's other half may be inside: then these look at a row, too
  const int64_t row = shape.backwards ? q.rows - 1 - taken : taken;
  Raw* stash = nullptr;
  if (gated && shape.stash != 0) {
    stash = reinterpret_cast<Raw*>(reinterpret_cast<char*>(stashes) + group.slot * shape.stash);
  }
  if (!kOfSlots<result> || amax != nullptr) take_turn();
  const bool used = in_use(q, row);  // asked with the row's first values, not before them

  Place place = {0, row};
  uint32_t row_amax = 0;
  if (q.scope == Scope::token) {
    if (!__any_sync(~0u, inside)) return;
    row_amax = amax == nullptr ? find_amax<gated, kOfSlots<result>>(q, row, group, stash)
                               : bits<uint32_t>(amax[q.amax_is_shared ? 0 : row]);
  } else if (q.scope == Scope::expert) {
    place = find_expert(q, inside ? row : -1);
    row_amax = place.expert < 0 ? 0x7FC00000u : bits<uint32_t>(amax[place.expert]);
    if (blockIdx.x == 0 && blockIdx.y == 0) {
      for (int64_t e = threadIdx.x; e < q.experts; e += blockDim.x) {
        q.decode_scale[e] = stored_decode_scale(global_scales(amax[e], q.recipe.encoded_amax));
      }
    }
  } else {
    row_amax = bits<uint32_t>(amax[0]);
  }
  inside = inside && used;
  const GlobalScales global = global_scales(bits<float>(row_amax), q.recipe.encoded_amax);
  const Row shared = row_of(global);
  if constexpr (kOfSlots<result>) take_turn();
  if (q.scope == Scope::token && inside && blockIdx.y == 0) {
    write_decode_scale<result>(q, row, stored_decode_scale(global), group.lane, group.threads);
  }
  if (q.scope == Scope::tensor && index == 0 && group.lane == 0 && blockIdx.y == 0) {
    q.decode_scale[0] = stored_decode_scale(global);
  }
  if (!__any_sync(~0u, inside)) return;

  const int blocks = static_cast<int>(q.columns / kBlock);
  const void* x = input_row<gated>(q, row);
  const Target to = target_of<result>(q, row, place.scale_row, blocks, shape.scale_stride);
  const int part = (blocks + shape.parts - 1) / shape.parts, begin = static_cast<int>(blockIdx.y) * part;
  const int end = inside ? min(blocks, begin + part) : 0;
  quantize_part<metric, adaptive, gated, result>(q, shared, x, stash, to, {begin, part, end}, group);
}

// The largest magnitude of the tensor, or of each expert's rows, into zeroed memory.
template <bool gated>
__global__ void __launch_bounds__(kMaxThreads, 2)
    find_largest(const __grid_constant__ Quantize q, uint32_t* amax, int group_threads) {
  const Group group = group_of_thread(group_threads);
  const int64_t groups = blockDim.x / group_threads;
  uint32_t found = 0;
  for (int64_t row = int64_t(blockIdx.x) * groups + group.slot; row < q.rows; row += int64_t(gridDim.x) * groups) {
    if (q.scope == Scope::expert) {
      const int expert = find_expert(q, row).expert;
      if (expert < 0) continue;
      found = __reduce_max_sync(~0u, own_largest<gated>(q, row, group, nullptr));
      if (group.lane % kWarp == 0) atomicMax(&amax[expert], found);
    } else {
      found = max(found, own_largest<gated>(q, row, group, nullptr));
    }
  }
  if (q.scope != Scope::expert) {
    found = __reduce_max_sync(~0u, found);
    if (group.lane % kWarp == 0) atomicMax(amax, found);
  }
}

__global__ void __launch_bounds__(kDequantizeThreads) dequantize_blocks(const __grid_constant__ Dequantize d) {
  const int64_t at = int64_t(blockIdx.x) * kDequantizeThreads + threadIdx.x, per_row = d.columns / kBlock;
  if (at >= d.rows * per_row) return;
  const uint2 packed = reinterpret_cast<const uint2*>(d.packed)[at];
  const float sf = e4m3_value(d.block_scale[at]);
  const float decode = d.decode_scale == nullptr ? 1.0f : d.decode_scale[at / per_row];
  float x[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t code = (i < 8 ? packed.x : packed.y) >> 4 * (i % 8);
    x[i] = (bits<float>(bits<uint32_t>(e2m1_value(code & 7u)) | (code << 28 & kSign)) * sf) * decode;
  }
  store(static_cast<Raw*>(d.out) + at, 0, pack(x));
}

// --- launching ---

struct Kernels {
  void (*rows)(Quantize, const float*, Shape);
  void (*few_rows)(Quantize, int);
  void (*beside)(Quantize);  // or null: of what no product makes
};

template <Metric metric, bool adaptive, bool gated, Result result>
constexpr Kernels make_kernels() {
  Kernels made = {quantize_rows<metric, adaptive, gated, result>, quantize_few_rows<metric, adaptive, gated, result>,
                  nullptr};
  if constexpr (result == Result::values && !gated && kDtype != Dtype::fp32) {
    made.beside = quantize_beside<metric, adaptive>;
  }
  return made;
}
template <Metric metric, bool adaptive, bool gated, Result result>
constexpr Kernels kKernels = make_kernels<metric, adaptive, gated, result>();

template <bool gated, Result result>
Kernels kernels_of(const Recipe& recipe) {
  if (!recipe.adaptive) return kKernels<Metric::mse, false, gated, result>;
  if (recipe.metric == Metric::mse) return kKernels<Metric::mse, true, gated, result>;
  if (recipe.metric == Metric::mae) return kKernels<Metric::mae, true, gated, result>;
  return kKernels<Metric::abs_max, true, gated, result>;
}

Kernels kernels_of(const Quantize& q) {
  if (q.values == nullptr) {
    return q.gated ? kernels_of<true, Result::codes>(q.recipe) : kernels_of<false, Result::codes>(q.recipe);
  }
  if constexpr (kDtype != Dtype::fp32) {  // which no product takes
    if (q.row_of_slot != nullptr) return kernels_of<false, Result::values_of_slots>(q.recipe);
  }
  return q.gated ? kernels_of<true, Result::values>(q.recipe) : kernels_of<false, Result::values>(q.recipe);
}

// With many rows a thread takes as many blocks as leave the rows in flight in the L1 (of slots: in the L2) between
// finding their amax and reading them again, so that what is computed once a row and warp weighs little. With fewer rows
// it takes fewer, until a row has a thread for every block, and then several CTAs.
Shape shape_of(const Quantize& q) {
  constexpr int64_t kBytesInL1 = 128;  // a thread
  const int64_t blocks = q.columns / kBlock, rows = q.rows > 0 ? q.rows : 1;
  const int64_t bytes = kBlock * size_of(kDtype) * (q.gated ? 2 : 1);
  const int64_t least = ceil_div(blocks * bytes, kBytesInL1), wanted = kResidentThreads / rows;
  int64_t threads = least > wanted ? least : wanted;
  threads = threads < blocks ? threads : blocks;
  // A CTA is of whole warps: where a row ends within one, it has more than a row.
  const int64_t unit = q.scope == Scope::expert || threads > kMaxThreads / 2 ? kWarp : kUnit;
  threads = ceil_div(threads, unit) * unit;
  Shape shape = {};
  shape.group = static_cast<int>(threads < kMaxThreads ? threads : kMaxThreads);
  shape.groups = shape.group < kThreads ? kThreads / shape.group : 1;
  if (shape.group * shape.groups % kWarp != 0) ++shape.groups;
  const int64_t most = ceil_div(blocks, kThreads), spare = kMultiprocessors / rows;
  shape.parts = static_cast<int>(most < spare ? most : spare);
  shape.parts = shape.parts > 1 ? shape.parts : 1;
  shape.scale_stride = scale_stride(q);
  // What a launch has without asking, but for `largest`.
  constexpr int64_t kSharedMemory = (48 << 10) - kMaxThreads / kUnit * sizeof(uint32_t);
  const int64_t stash = q.columns * size_of(kDtype);
  const bool twice = q.gated && q.scope == Scope::token && q.amax == nullptr;
  if (twice && stash * shape.groups <= kSharedMemory) shape.stash = static_cast<unsigned>(stash);
  return shape;
}

// Of the current device, or 0.
int attribute(cudaDeviceAttr which) {
  int device = 0, found = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&found, which, device) == cudaSuccess;
  return known ? found : 0;
}

bool is_hopper_or_later() { return attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

}  // namespace

cudaError_t FOS_ENTRY(quantize)(const Quantize& q, float* workspace, cudaStream_t stream) {
  const Kernels kernels = kernels_of(q);
  if (q.progress != nullptr) {
    const dim3 grid(static_cast<unsigned>(attribute(cudaDevAttrMultiProcessorCount)));
    return sm90::launch_early(kernels.beside, grid, 0, kBesideThreads, 0, stream, q);
  }
  const Cluster cluster = cluster_of(q);
  if (cluster.ctas > 0 && is_hopper_or_later()) {
    const dim3 grid(static_cast<unsigned>(cluster.ctas), static_cast<unsigned>(q.rows));
    return sm90::launch_early(kernels.few_rows, grid, grid.x, cluster.threads, 0, stream, q, scale_stride(q));
  }
  Shape shape = shape_of(q);
  const int threads = shape.group * shape.groups;
  const float* amax = q.amax;
  if (workspace != nullptr) {
    const int64_t numbers = q.scope == Scope::expert ? q.experts : 1;
    if (const cudaError_t error = cudaMemsetAsync(workspace, 0, numbers * sizeof(float), stream)) return error;
    constexpr int64_t kResident = 132 * 16;  // CTAs that fill any chip; each then takes several rows
    const int64_t grid = ceil_div(q.rows, shape.groups);
    if (q.rows > 0) {
      (q.gated ? find_largest<true> : find_largest<false>)<<<static_cast<unsigned>(grid < kResident ? grid : kResident),
                                                             threads, 0, stream>>>(
          q, reinterpret_cast<uint32_t*>(workspace), shape.group);
    }
    amax = workspace;
    shape.backwards = true;
  }
  // Without rows one CTA still writes the decode scales.
  const dim3 grid(static_cast<unsigned>(ceil_div(q.rows > 0 ? q.rows : 1, shape.groups)), shape.parts);
  const unsigned bytes = shape.stash * static_cast<unsigned>(shape.groups);
  if (is_hopper_or_later()) {
    return sm90::launch_early(kernels.rows, grid, 0, threads, static_cast<int>(bytes), stream, q, amax, shape);
  }
  kernels.rows<<<grid, threads, bytes, stream>>>(q, amax, shape);
  return cudaGetLastError();
}

cudaError_t FOS_ENTRY(dequantize)(const Dequantize& d, cudaStream_t stream) {
  const int64_t blocks = d.rows * (d.columns / kBlock);
  if (blocks > 0) {
    const int64_t grid = ceil_div(blocks, kDequantizeThreads);
    dequantize_blocks<<<static_cast<unsigned>(grid), kDequantizeThreads, 0, stream>>>(d);
  }
  return cudaGetLastError();
}

}  // namespace fos::cuda
