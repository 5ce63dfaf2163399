// Products of NVFP4 weights on Hopper: y = x W^T for activations in bf16 or fp16, dense and by experts.
//
// Hopper multiplies no 4-bit numbers, but e2m1 * block_scale is exact in 16 bits: weights travel packed through memory
// and shared memory, become 16-bit numbers in registers, and are there the left operand of wgmma; x is the right one,
// from shared memory (so what is computed is y^T). Sums are fp32; decode scales come after them. Where x is itself
// e2m1 * block_scale (W4A4), every product is exact.
//
// A team of two to four consumer warpgroups has a tile, each 64 weight rows and all of them the same tokens. Producer
// threads keep the copy engine `kStages` stages of one or two steps of 64 columns ahead: how many copies there are is what
// limits it, not how much they bring. A warpgroup multiplies with one set of registers while it unpacks into the other. A
// CTA has two teams of two, so that one multiplies while the other unpacks or writes results, or one team.
//
// CTAs stay and take tile after tile. Large teams read x less often: what the second-level cache can give limits
// experts. (One weight's many tokens are better off in tiles of 256.) Both products of experts may run at once
// (`progress`): on a multiprocessor the second begins when the first has ended there, with rows that are done. Where
// tiles are few, their columns are shared (`split`): by a cluster, which adds its sums in the order of its ranks; or,
// where there are many columns, in slices, whose sums go through memory to slices_sm90.cu, which adds them in their
// order.
//
// Compiled with FOS_DTYPE = bf16 or fp16 and FOS_OUTPUT = linear, gated or fp32, and -fmad=false: what is added is
// rounded after it was multiplied.
#include "boxes_sm90.cuh"
#include "results_sm90.cuh"
#include "shape_sm90.cuh"

namespace fos::cuda {
namespace {

// --- producers ---

// x as boxes of one part of a tile's tokens, of two, and so on.
template <class S>
struct Maps {
  CUtensorMap of[S::kTokens / S::kCopy];
};

// Tokens of a tile that are copied, at least those of its block.
template <class S>
__device__ __forceinline__ int copied(const Block& block) {
  return max(S::kLeast, (block.end - block.begin + S::kCopy - 1) / S::kCopy * S::kCopy);
}

// A warp has the note of a tile written: by copies of its own threads, which arrive when theirs have come.
template <class S>
__device__ __forceinline__ void write_note(const Gemm& g, const Ring<S>& ring, const Turn<S>& turn, const Tile& tile,
                                           int index_of_block, int lane) {
  wait_long(turn.empty(ring), turn.parity() ^ 1);
  const Note<S> note = turn.note(ring);
  if (lane == 0) copy_16(note.at, g.blocks + index_of_block);
  // Of gate, then of up.
  constexpr int kHalves = kOutput == Output::gated ? 2 : 1, kRows = S::kRows / kHalves;
  const int output = tile.row / kHalves;
  const float* const scales = decode_scales_of(g, tile.block.expert) + output;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    for (int row = lane * 4; row < min(kRows, g.outputs - output); row += kWarp * 4) {
      copy_16(note.decode_scale_at(half * kRows + row), scales + half * g.outputs + row);
    }
  }
#pragma unroll 2
  for (int token = 0; token < S::kTokens; token += kWarp) {
    const int row = tile.block.begin + token + lane;
    const bool inside = row < tile.block.end;
    if (g.token_scale != nullptr) copy_4(note.token_scale_at(token + lane), g.token_scale + (inside ? row : 0), inside);
    if (kOutput == Output::fp32 && inside) copy_4(note.out_row_at(token + lane), g.out_row + row, true);
  }
  arrive_with_copies(turn.full(ring));
}

// One thread brings the weights of a team's tiles: as far as they lie in one stored tile, or, `second`, in the next.
template <class S, Columns columns>
__device__ __forceinline__ void bring_weights(const Gemm& g, Ring<S> ring, Share own, bool second) {
  const auto copy = [&](const Tile& tile, int step) {
    // What of the tile is before, and how many of its groups are here.
    const int in_first = S::kGroups == 3 ? 2 - tile.row / kGroupRows % 2 : 2;
    const int before = second ? in_first : 0, groups = second ? S::kGroups - in_first : in_first;
    const int row = tile.row + before * kGroupRows, within = S::kGroups == 3 ? row / kGroupRows % 2 : 0;
    // Beyond the last of the stored tiles that one is multiplied again, and dropped.
    const int row_tile = S::kGroups == 2 ? row / kRowTile : min(row / kRowTile, g.row_tiles - 1);
    const int64_t from = (static_cast<int64_t>(tile.block.expert) * g.row_tiles + row_tile) * g.steps + step;
    const int pieces = min(S::kSteps, tile.steps(g).last - step) * groups;
    const int rows = second ? 0 : copied<S>(tile.block);  // of x
    expect_bytes(ring.full(), pieces * (kGroupCodes + kGroupScales) + S::kSteps * rows * kRowOfBox);
    copy_bulk(ring.at + S::kCodesAt + S::kSteps * before * kGroupCodes,
              g.codes + from * kCodeBytes + within * kGroupCodes, pieces * kGroupCodes, ring.full());
    copy_bulk(ring.at + S::kScalesAt + S::kSteps * before * kGroupScales,
              g.block_scale + from * kScaleBytes + within * kGroupScales, pieces * kGroupScales, ring.full());
    ring.advance();
  };
  // Weights may come before the kernel before this one has ended: it made neither them (tiles_sm90.cu) nor experts'
  // blocks. (What made those had ended when that kernel let this one start.)
  const Tiles<S, columns> tiles(g);
  int early = 0;  // steps of the first tile
  if (own.first < tiles.count) {
    const Tile tile = tiles(g, own.first);
    const Steps steps = tile.steps(g);
#pragma unroll 1
    for (int i = 0; i < S::kStages && steps.first + early < steps.last; ++i, early += S::kSteps) {
      copy(tile, steps.first + early);
    }
  }
  if constexpr (!S::kAsks) wait_for_kernel_before();
  for (int index = own.first; index < tiles.count; index += own.apart) {
    const Tile tile = tiles(g, index);
    const Steps steps = tile.steps(g);
#pragma unroll 1
    for (int step = steps.first + early; step < steps.last; step += S::kSteps) {
      wait_long(ring.empty(), ring.parity ^ 1);
      copy(tile, step);
    }
    early = 0;
  }
  if constexpr (S::kAsks) wait_for_kernel_before();  // who waits for this one waits for both
  let_kernel_after_start();
}

// And a warp all rows of x, and notes of experts' tiles.
template <class S, Columns columns>
__device__ __forceinline__ void bring_tokens(const Gemm& g, const Maps<S>& maps, Ring<S> ring, Share own, int lane) {
  if constexpr (!S::kAsks) wait_for_kernel_before();
  const Tiles<S, columns> tiles(g);
  [[maybe_unused]] Turn<S> turn;
  for (int index = own.first; index < tiles.count; index += own.apart) {
    const Tile tile = tiles(g, index);
    const Steps steps = tile.steps(g);
    const int rows = copied<S>(tile.block);
    if constexpr (S::kAsks) {
      for (int row = tile.block.begin + lane; row < tile.block.end; row += kWarp) {
        wait_for_number(g.progress + row, g.whole, g.whole);
      }
      let_copies_see();
      __syncwarp();
    }
    if constexpr (kExperts) {
      write_note<S>(g, ring, turn, tile, index / tiles.rows, lane);
      ++turn.tiles;
    }
#pragma unroll 1
    for (int step = steps.first; lane == 0 && step < steps.last; step += S::kSteps, ring.advance()) {
      wait_long(ring.empty(), ring.parity ^ 1);
      copy_steps(g, maps.of[rows / S::kCopy - 1], ring.at, tile.block.begin, rows, step, S::kSteps, ring.full());
    }
    __syncwarp();  // or the others would wait for the next note's place while the first has copies to make
  }
}

// A warp tells of each tile's rows that the tile is written.
template <class S>
__device__ __forceinline__ void tell(const Gemm& g, const Ring<S>& ring, Share own, int lane) {
  wait_for_kernel_before();
  // Not before: it, and the one that it lets start, read what was sorted without waiting for that.
  let_kernel_after_start();
  Turn<S> turn;
  const Tiles<S, Columns::whole> tiles(g);
  for (int index = own.first; index < tiles.count; index += own.apart, ++turn.tiles) {
    wait_long(turn.written(ring), turn.parity());
    const Block block = turn.note(ring).block();
    __threadfence();  // whoever finds a number finds what these warps wrote before
    for (int row = block.begin + lane; row < block.end; row += kWarp) atomicAdd(g.progress + row, 1);
    __syncwarp();
    if (lane == 0) arrive(turn.empty(ring));
  }
}

// --- consumers ---

// How many parts of its tokens a tile multiplies: as few as its block has.
template <class S>
__device__ __forceinline__ uint32_t parts_of(const Block& block) {
  return max(S::kLeast / S::kPart, (block.end - block.begin + S::kPart - 1) / S::kPart);
}

// A warpgroup's sums of a tile by wgmma: 64 weight rows, all tokens of `parts`.
template <class S>
struct Multiply {
  static constexpr int kTokens = S::kTokens;
  // k16 blocks that are multiplied at once, while the next as many are unpacked into other registers: half of a stage.
  static constexpr int kBlocks = S::kSteps * 2;
  using Values = uint32_t[kBlocks][4];

  const Powers& by;
  Ring<S>& ring;
  float (&sums)[kTokens / 2];
  uint32_t parts, rows;    // what is multiplied, and copied, of the tokens
  uint32_t codes, scales;  // of the thread, in a stage
  uint32_t speaks;         // for its warp

  __device__ __forceinline__ void release(uint32_t stage) const {
    if (stage != 0 && speaks) arrive(stage);
  }

  // `tokens`: where the first block's are, in 16 bytes. One loop for all parts: one each would have registers of its own
  // for what is multiplied, and there are not as many.
  __device__ __forceinline__ void multiply(Values& values, uint32_t tokens) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) settle(values[i]);
    if (parts == S::kTokens / S::kPart) {
      multiply_part<S::kTokens>(values, tokens);
    } else {
      multiply_among<S::kLeast, S::kTokens - S::kPart>(values, tokens);
    }
  }
  // It is found by halves.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void multiply_among(const Values& values, uint32_t tokens) {
    constexpr int kMiddle = kFrom + (kTo - kFrom) / S::kPart / 2 * S::kPart;
    if constexpr (kFrom == kTo) {
      multiply_part<kTo>(values, tokens);
    } else if (parts > kMiddle / S::kPart) {
      multiply_among<kMiddle + S::kPart, kTo>(values, tokens);
    } else {
      multiply_among<kFrom, kMiddle>(values, tokens);
    }
  }
  template <int kCount>
  __device__ __forceinline__ void multiply_part(const Values& values, uint32_t tokens) {
    float(&some)[kCount / 2] = reinterpret_cast<float(&)[kCount / 2]>(sums);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      Wgmma<Value, kCount>::multiply(some, values[i], swizzled_operand(tokens + i * kBlock * 2 / 16));
    }
    wgmma_commit();
  }

  // Half of a step's four blocks.
  template <bool second>
  __device__ __forceinline__ void unpack_half(const Packed& w, const uint32_t (&scale)[4], uint32_t (&a)[4],
                                              uint32_t (&b)[4]) const {
    unpack<second>(by, w.q[2 * second], scale[0], scale[1], a);
    unpack<second>(by, w.q[2 * second + 1], scale[2], scale[3], b);
  }
  __device__ __forceinline__ void widen_scales(const Packed& w, uint32_t (&scale)[4]) const {
    scale[0] = two_scales<0>(by, w.scale), scale[1] = two_scales<0>(by, w.scale_8);
    scale[2] = two_scales<1>(by, w.scale), scale[3] = two_scales<1>(by, w.scale_8);
  }

  __device__ __forceinline__ void operator()(uint32_t steps) {
    keep(parts);
    uint32_t held = 0;  // what says that the stage is free which a multiplication under way reads, or 0
    Values even, odd;
    uint32_t scale[4];
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step += S::kSteps) {
      wait(ring.full(), ring.parity);
      const Packed w(ring.at + codes, ring.at + scales);
      if constexpr (S::kSteps == 1) {
        widen_scales(w, scale);
        wgmma_wait<1>();
        unpack_half<false>(w, scale, even[0], even[1]);
        multiply(even, ring.at / 16);
        wgmma_wait<1>();
        release(held);  // what read the stage before has ended
        unpack_half<true>(w, scale, odd[0], odd[1]);
        multiply(odd, ring.at / 16 + 2 * kBlock * 2 / 16);
      } else {
        const Packed next(ring.at + kCodeBytes + codes, ring.at + kScaleBytes + scales);
        widen_scales(w, scale);
        wgmma_wait<1>();
        unpack_half<false>(w, scale, even[0], even[1]);
        unpack_half<true>(w, scale, even[2], even[3]);
        multiply(even, ring.at / 16);
        wgmma_wait<1>();
        release(held);
        if (step + 1 < steps) {
          widen_scales(next, scale);
          unpack_half<false>(next, scale, odd[0], odd[1]);
          unpack_half<true>(next, scale, odd[2], odd[3]);
          multiply(odd, ring.at / 16 + rows * (kRowOfBox / 16));
        }
      }
      held = ring.empty();
      ring.advance();
    }
    wgmma_wait<0>();
    release(held);
  }
};

// --- the kernel ---

template <class S, Columns columns>
__device__ __forceinline__ void run(const Maps<S>& maps, const Gemm& g) {
  constexpr int kTokens = S::kTokens;
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warp_of_all = uniform(threadIdx.x / kWarp), lane = threadIdx.x % kWarp;
  const bool consumes = warp_of_all < S::kTeams * S::kWarps;
  const int producer = warp_of_all - S::kTeams * S::kWarps;  // two to four of a team
  const int team = consumes ? warp_of_all / S::kWarps : producer % S::kTeams;
  constexpr bool kShared = columns == Columns::shared;
  static_assert(S::kTeams == 1 || columns == Columns::whole);
  // First teams have the first tiles, so that every multiprocessor has one before some have two. A cluster has one tile.
  const int clusters = kShared ? gridDim.x / g.split : gridDim.x;
  const Share own = {(kShared ? static_cast<int>(blockIdx.x) / g.split : static_cast<int>(blockIdx.x)) + team * clusters,
                     clusters * S::kTeams};
  Ring<S> ring{shared_address(memory) + team * S::kRingBytes};

  if (!consumes && producer < S::kTeams && lane == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(ring.full() + i * 16, S::kStored);
      barrier_init(ring.empty() + i * 16, S::kWarps);
    }
    if constexpr (kExperts) {
      for (Turn<S> turn; turn.tiles < S::kNotes; ++turn.tiles) {
        barrier_init(turn.full(ring), kWarp);
        barrier_init(turn.empty(ring), S::kTells ? 1 : S::kWarps);
        if (S::kTells) barrier_init(turn.written(ring), S::kWarps);
      }
    }
    barriers_ready();
  }
  __syncthreads();

  if (!consumes) {
    give_registers<S::kProducerRegisters>();
    const int task = producer / S::kTeams;
    if (task == 1) {
      bring_tokens<S, columns>(g, maps, ring, own, lane);
    } else if (S::kTells && task == 3) {
      tell<S>(g, ring, own, lane);
    } else if (lane == 0) {
      if (task == 0) bring_weights<S, columns>(g, ring, own, false);
      if (S::kStored == 2 && task == 2) bring_weights<S, columns>(g, ring, own, true);
    }
    __syncwarp();
    if (kShared) {
      cluster_sync();
      cluster_sync();
    }
    return;
  }

  take_registers<S::kConsumerRegisters>();
  keep(ring.base);
  // Of the team's. Asked for again after each tile: no register would hold it meanwhile.
  const auto warp = [] { return static_cast<int>(static_cast<unsigned>(uniform(threadIdx.x / kWarp)) % S::kWarps); };
  const int group = warp() * kWarp / kGroup, thread = threadIdx.x % kGroup;
  uint32_t codes = S::kCodesAt + (group / 2 * S::kSteps * 2 + group % 2) * kGroupCodes + thread * 16;
  keep(codes);
  // Four threads read the scales of their 64 bytes of codes.
  const uint32_t scales = S::kScalesAt + (codes - S::kCodesAt) / 64 * 8;
  uint32_t speaks = lane == 0;
  keep(speaks);
  const auto multiply = [&](const Tile& tile, float (&sums)[kTokens / 2]) {
    const Steps steps = tile.steps(g);
    Multiply<S>{g.powers, ring,   sums,  parts_of<S>(tile.block), static_cast<uint32_t>(copied<S>(tile.block)),
                codes,    scales, speaks}(steps.last - steps.first);
  };
  if constexpr (!S::kAsks) wait_for_kernel_before();
  if constexpr (kShared) {
    // Sums take the place of the stages, once both warpgroups are done with those.
    float* staged = reinterpret_cast<float*>(memory);
    const Tile tile = Tiles<S, columns>(g)(g, own.first);
    float sums[kTokens / 2] = {};
    multiply(tile, sums);
    named_barrier(1, S::kTeam);
    stage<kTokens>(sums, staged + group * kGroupRows, thread);
    cluster_sync();
    write_shared<S>(g, tile, staged, threadIdx.x);
    cluster_sync();  // nobody ends while others read its sums
  } else {
    const auto staging = [&] { return ring.base + S::kStagingAt + warp() * kChunkBytes; };
    [[maybe_unused]] Turn<S> turn;
    for (int index = own.first; index < Tiles<S, columns>(g).count; index += own.apart) {
      float sums[kTokens / 2] = {};
      if constexpr (kExperts) {
        wait(turn.full(ring), turn.parity());
        const Note<S> note = turn.note(ring);
        const Tile tile = {index % Tiles<S, columns>(g).rows * S::kRows, 0, note.block()};
        multiply(tile, sums);
        write_rows<kTokens>(g, Noted<S>(g, tile, note, warp(), lane), sums, staging(), lane);
        __syncwarp();
        if (speaks) arrive(turn.written(ring));
        ++turn.tiles;
      } else {
        const Tile tile = Tiles<S, columns>(g)(g, index);
        multiply(tile, sums);
        if constexpr (columns == Columns::sliced) {
          write_sums<kTokens>(g, tile, sums, warp(), lane);
        } else {
          write_rows<kTokens>(g, Asked<kTokens>(g, tile, warp(), lane), sums, staging(), lane);
        }
      }
    }
  }
}

template <class S, Columns columns>
__global__ void __launch_bounds__(S::kThreads, 1) gemm(const __grid_constant__ Maps<S> maps, const Gemm g) {
  run<S, columns>(maps, g);
}

// The same with fewer registers than there are for as many threads.
template <class S>
__global__ void __maxnreg__(S::kRegisters) gemm_beside_quantizer(const __grid_constant__ Maps<S> maps, const Gemm g) {
  run<S, Columns::whole>(maps, g);
}

// --- launching ---

template <class S, Columns columns>
constexpr auto kernel_of() {
  if constexpr (S::kLeaves) return gemm_beside_quantizer<S>;
  else return gemm<S, columns>;
}

template <class S, Columns columns>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  constexpr auto kernel = kernel_of<S, columns>();
  if (const cudaError_t error = allow_shared_memory<kernel>(S::kBytes)) return error;
  Maps<S> maps;
  for (int rows = S::kCopy; rows <= S::kTokens; rows += S::kCopy) {
    if (!map_of(g, rows, S::kSteps, &maps.of[rows / S::kCopy - 1])) return cudaErrorInvalidValue;
  }
  constexpr bool kShared = columns == Columns::shared;
  const int64_t tiles = g.block_limit * ceil_div(static_cast<int64_t>(g.row_tiles) * kRowTile, S::kRows) *
                        (columns == Columns::sliced ? g.split : 1);
  // A cluster that shares takes one tile; other CTAs stay for as many as there are.
  const int64_t ctas = kShared ? tiles * g.split : tiles < g.multiprocessors ? tiles : g.multiprocessors;
  const dim3 grid(static_cast<unsigned>(ctas));
  const unsigned cluster = kShared ? static_cast<unsigned>(g.split) : 0;
  return launch_early(kernel, grid, cluster, S::kThreads, S::kBytes, stream, maps, g);
}

// One weight, in tiles of as many tokens.
template <int kTokens>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  if constexpr (kTokens == 64 || kTokens == 128) {
    if (g.sums != nullptr) return launch<Shape<kTokens, 4, 1>, Columns::sliced>(g, stream);
  }
  if (g.split > 1) return launch<Shape<kTokens, 2, 1>, Columns::shared>(g, stream);
  return launch<Shape<kTokens, 2, kTokens <= 128 ? 2 : 1>, Columns::whole>(g, stream);
}

template <int kTokens>
cudaError_t launch_experts(const Gemm& g, cudaStream_t stream) {
  if constexpr (run_at_once(kTokens)) {
    if (g.progress != nullptr) {
      if (g.whole == kQuantized) return launch<Shape<kTokens, 4, 1, Beside::quantizer>, Columns::whole>(g, stream);
      return launch<Shape<kTokens, 4, 1, Beside::product>, Columns::whole>(g, stream);
    }
  }
  if (g.strips > 1) return launch<Shape<kTokens, 4, 1>, Columns::whole>(g, stream);
  return launch<Shape<kTokens, 2, 2>, Columns::whole>(g, stream);
}

}  // namespace

cudaError_t FOS_PRODUCT(multiply_)(const Gemm& g, cudaStream_t stream) {
  if constexpr (kOutput == Output::linear) {
    switch (g.tokens) {
      case 32: return launch<32>(g, stream);
      case 64: return launch<64>(g, stream);
      case 128: return launch<128>(g, stream);
      case 256: return launch<256>(g, stream);
      default: return cudaErrorInvalidValue;
    }
  } else {
    switch (g.tokens) {
      case 32: return launch_experts<32>(g, stream);
      case 64: return launch_experts<64>(g, stream);
      case 128: return launch_experts<128>(g, stream);
      case 192: return launch<Shape<192, 3, 1>, Columns::whole>(g, stream);
      default: return cudaErrorInvalidValue;
    }
  }
}

}  // namespace fos::cuda
