// A row by a group of threads: a thread has a block of 16 values, and then one as many blocks on as the group has threads.
#pragma once

#include <type_traits>

#include "quantize_block.cuh"

namespace fos::cuda {
namespace {

// The group of threads that a row belongs to.
struct Group {
  int threads;  // a multiple of kUnit; of the warp for Scope::expert
  int lane;     // within the group
  int slot;     // the group's number within the CTA
};

__device__ __forceinline__ Group group_of_thread(int threads) {
  const int slot = blockDim.x == threads ? 0 : static_cast<int>(threadIdx.x) / threads;
  return {threads, static_cast<int>(threadIdx.x) - slot * threads, slot};
}

// Largest magnitude, as bits, of the blocks of a row that this thread takes. With a stash, what was read is kept there.
template <bool gated, bool past_l1 = false>
__device__ __forceinline__ uint32_t own_largest(const Quantize& q, int64_t row, const Group& group, Raw* stash) {
  const void* x = input_row<gated>(q, row);
  const int blocks = static_cast<int>(q.columns / kBlock);
  // Several loads on their way before the first is looked at: this pass waits for memory, not for arithmetic.
  constexpr int kAhead = gated ? 1 : 128 / static_cast<int>(sizeof(Raw));
  uint32_t found = 0;
  for (int first = group.lane; first < blocks; first += kAhead * group.threads) {
    Raw raw[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      raw[j] = read<gated, past_l1>(x, min(first + j * group.threads, blocks - 1), blocks);  // the last one again does no harm
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (gated && stash != nullptr) store(stash, first + j * group.threads, raw[j]);
      found = larger_magnitudes(found, larger_magnitudes(raw[j]));
    }
  }
  return largest_bits(found);
}

// Of the `threads` that lie beside each other: a warp, or kUnit.
__device__ __forceinline__ uint32_t largest_of(int threads, uint32_t found) {
  if (threads == kWarp) return __reduce_max_sync(~0u, found);
#pragma unroll
  for (int apart = kUnit / 2; apart > 0; apart /= 2) found = max(found, __shfl_xor_sync(~0u, found, apart));
  return found;
}

// What a thread of the warp has.
template <class T>
__device__ __forceinline__ T of_thread(int lane, T own) {
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(of_thread(lane, reinterpret_cast<uintptr_t>(own)));
  else return __shfl_sync(~0u, own, lane);
}

// Blocks of a row: `count` of them from `begin` on, those below `end`; to the warp's other rows the same `count`.
struct Part {
  int begin, count, end;
};

// Chooses, rounds and writes the blocks. Whole warps call it, for decide and settle.
template <Metric metric, bool adaptive, bool gated, Result result>
__device__ __forceinline__ void quantize_part(const Quantize& q, const Row& shared, const void* x, const Raw* stash,
                                              const Target& to, const Part& of, const Group& group) {
  for (int first = 0; first < of.count; first += group.threads) {
    const int block = of.begin + first + group.lane;
    Found found = Found::chosen;
    Raw raw = {};
    using Rounded = RoundedFor<result>;
    constexpr bool kDecides = adaptive && result != Result::codes;  // of codes settle does: registers would be spilled
    Chosen<Rounded> chosen = {};
    if (block < of.end) {
      raw = gated && stash != nullptr ? load(stash, block) : read<gated>(x, block, to.blocks);
      found = choose<metric, adaptive>(shared, raw, chosen);
      if (!kOfSlots<result> && found == Found::chosen) write(to, block, chosen, raw);
    }
    if constexpr (kDecides) {
      decide<metric, Rounded>(q.recipe, shared, raw, found == Found::near, [&](const Chosen<Rounded>& decided) {
        if constexpr (kOfSlots<result>) {
          chosen = decided;
        } else {
          write(to, block, decided, raw);
        }
      });
    }
    if constexpr (kOfSlots<result>) write_to_slots(to, block, of.end, chosen, raw);
    const bool open = found == Found::unknown || (!kDecides && found == Found::near);
    for (uint32_t left = __ballot_sync(~0u, open); left != 0; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      Row its = shared;
      its.amax = of_thread(lane, shared.amax);
      its.encode = of_thread(lane, shared.encode);
      its.decode = of_thread(lane, shared.decode);
      Target its_target = to;
      if constexpr (result == Result::values) {
        its_target.values = of_thread(lane, to.values);
      } else if constexpr (kOfSlots<result>) {
        its_target.row_of_slot = of_thread(lane, to.row_of_slot);
      } else {
        its_target.packed = of_thread(lane, to.packed);
        its_target.scales = of_thread(lane, to.scales);
      }
      settle<metric, adaptive, gated, result>(q, its, of_thread(lane, x), gated ? of_thread(lane, stash) : nullptr,
                                              of_thread(lane, block), its_target);
    }
  }
}

}  // namespace
}  // namespace fos::cuda
