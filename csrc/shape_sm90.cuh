// What a CTA of gemm_sm90.cu has in shared memory, and which tile is whose.
#pragma once

#include "boxes_sm90.cuh"

namespace fos::cuda {
namespace {

constexpr int kGroup = 128;     // threads of a warpgroup
constexpr int kGroupRows = 64;  // of the weight
constexpr int kWarpRows = 16;
constexpr int kGroupCodes = kCodeBytes / 2, kGroupScales = kScaleBytes / 2;  // of a step
static_assert(2 * kGroupRows == kRowTile);

// Sums of a shared tile are staged as [token][row], rows padded so that neither side meets a bank twice.
constexpr int kTilePitch = kRowTile + 4;

// What a warp has finished of a few tokens, as [token][row] in 16 bits: 16 rows of 16 tokens, or 8 gated rows of 32.
constexpr int kChunk = kOutput == Output::gated ? 32 : 16;
constexpr int kChunkPitch = kOutput == Output::gated ? 16 : 48;  // bytes of a token, so that no bank is met twice
constexpr int kChunkBytes = kChunk * kChunkPitch;

// Who multiplies a tile's columns: one CTA all of them, a cluster together, or one CTA a slice.
enum class Columns { whole, shared, sliced };

// What runs beside a product of experts, so that it tells or asks how far rows are: nothing; the other product, where this
// one has ended on a multiprocessor or not begun; and the quantizer of what lies between them, which every CTA leaves
// registers and memory.
enum class Beside { nothing, product, quantizer };

template <int kTokensOfTile, int kGroupsOfTeam, int kTeamsOfCta, Beside kBesideIt = Beside::nothing>
struct Shape {
  static constexpr bool kFollowed = kBesideIt != Beside::nothing, kLeaves = kBesideIt == Beside::quantizer;
  static_assert(!kFollowed || kTeamsOfCta == 1, "two teams leave no warp that tells");
  static constexpr bool kTells = kFollowed && kOutput == Output::gated, kAsks = kFollowed && !kTells;
  static constexpr int kTokens = kTokensOfTile, kGroups = kGroupsOfTeam, kTeams = kTeamsOfCta;
  static constexpr int kRows = kGroups * kGroupRows;  // of a tile
  static constexpr int kTeam = kGroups * kGroup, kWarps = kTeam / kWarp;
  static constexpr int kConsumers = kTeams * kTeam, kThreads = kConsumers + kGroup;
  static constexpr int kStored = (kGroups + 1) / 2;  // tiles of the stored weight that the rows lie in
  // Registers move from producers to consumers, in eights: a CTA begins with as many for each thread.
  static constexpr int kLeftRegisters = kLeaves ? kBesideThreads * kBesideRegisters : 0;
  static constexpr int kRegisters = (kAllRegisters - kLeftRegisters) / kThreads / 8 * 8;
  // Each of the four schedulers has a quarter of the registers, and of a CTA's warps.
  static_assert(!kLeaves || (kThreads % (4 * kWarp) == 0 && kBesideThreads == 4 * kWarp));
  static constexpr int kProducerRegisters = kConsumers == 2 * kGroup ? 40 : 32;
  static constexpr int kConsumerRegisters =
      (kThreads * kRegisters - kGroup * kProducerRegisters) / kConsumers / 8 * 8;
  static constexpr int kSteps = kTokens <= 64 ? 2 : 1;  // of a stage
  static_assert(kSteps == 1 || kGroups % 2 == 0, "steps of a stored tile come at once");
  // Of a block with fewer tokens than a tile can have, some parts are multiplied, and some copied: at least the least.
  static constexpr int kHalf = kTokens / 2, kLeast = kTokens >= 128 ? kTokens / 4 : kHalf;
  static constexpr int kPart = kExperts ? kPartOfRows : kLeast, kCopy = kExperts ? kPartOfRows : kHalf;
  // A team's memory: its stages, then what its warps write, then two barriers for each stage. In a stage tokens come
  // first, as the swizzle wants them at a multiple of 1024 bytes; then codes and scales, of two groups after two others.
  static constexpr int kCodesAt = kSteps * kTokens * kRowOfBox;
  static constexpr int kScalesAt = kCodesAt + kSteps * kGroups * kGroupCodes;
  static constexpr int kStageBytes = (kScalesAt + kSteps * kGroups * kGroupScales + 1023) / 1024 * 1024;
  static constexpr int kStagingBytes = kOutput == Output::fp32 ? 0 : kWarps * kChunkBytes;
  // And of experts' tiles notes, one while a tile is multiplied, one for the next (see Note), each with two barriers, or a
  // third for who tells that the tile's results are written.
  static constexpr int kNotes = kExperts ? 2 : 0, kNoteBarriers = kTells ? 3 : 2;
  static constexpr int kDecodeAt = 16, kTokensAt = kDecodeAt + kRows * 4, kRowsAt = kTokensAt + kTokens * 4;
  static constexpr int kNoteBytes = kRowsAt + (kOutput == Output::fp32 ? kTokens * 4 : 0);
  static_assert(kTokensAt % 16 == 0 && kRowsAt % 16 == 0 && kNoteBytes % 16 == 0);
  static constexpr int kRingBytes = (kSharedMemory - (kLeaves ? kBesideMemory : 0)) / kTeams / 1024 * 1024;
  static constexpr int kStages =
      (kRingBytes - kStagingBytes - kNotes * (kNoteBytes + kNoteBarriers * 8)) / (kStageBytes + 16);
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kNotesAt = kStagingAt + kStagingBytes;
  static constexpr int kBarriersAt = kNotesAt + kNotes * kNoteBytes;
  static constexpr int kNoteBarriersAt = kBarriersAt + kStages * 16;
  static constexpr int kBytes = kTeams * kRingBytes;
  static_assert(kNoteBarriersAt + kNotes * kNoteBarriers * 8 <= kRingBytes);
  static_assert(kGroups != 2 || kTokens * kTilePitch * 4 <= kStagingAt, "a shared tile's sums take the place of stages");
};

// --- which tile ---

// The steps of a tile that a CTA multiplies.
struct Steps {
  int first, last;
};

// A tile of the product: weight rows from `row` on, the tokens of a block, a part of the columns.
struct Tile {
  int row, part;
  Block block;

  __device__ __forceinline__ Steps steps(const Gemm& g) const {
    return {part * g.split_steps, min(g.steps, (part + 1) * g.split_steps)};
  }
};

// What rings are filled for, in turn. Some of the last tile may lie beyond the weight's rows. Experts' blocks are read past
// the first-level cache: the kernel before may still run, which could have older ones there.
template <class S, Columns columns>
struct Tiles {
  int rows, count;

  __device__ __forceinline__ explicit Tiles(const Gemm& g) {
    rows = (g.row_tiles * kRowTile + S::kRows - 1) / S::kRows;
    const int blocks = kExperts ? __ldcg(g.blocks_in_use) : g.block_limit;
    count = blocks * rows * (columns == Columns::sliced ? g.split : 1);
  }

  __device__ __forceinline__ Tile operator()(const Gemm& g, int index) const {
    if constexpr (kExperts) {
      const int4 found = __ldcg(reinterpret_cast<const int4*>(g.blocks) + index / rows);
      return {index % rows * S::kRows, 0, {found.x, found.y, found.z, 0}};
    }
    int part = columns == Columns::shared ? static_cast<int>(blockIdx.x) % g.split : 0;
    if constexpr (columns == Columns::sliced) {
      const int of_part = g.block_limit * rows;
      part = index / of_part;
      index -= part * of_part;
    }
    // Tokens first, 8 blocks of them at a time: tiles that run side by side share weights and x in the cache.
    constexpr int kSideBySide = 8;
    const int first = index / (kSideBySide * rows) * kSideBySide;
    const int side = min(kSideBySide, g.block_limit - first), within = index - first * rows;
    const int begin = (first + within % side) * S::kTokens;
    return {within / side * S::kRows, part, {0, begin, min(begin + S::kTokens, g.rows), 0}};
  }
};

// Which tiles, by their numbers, a team takes: the `first`, and those `apart`.
struct Share {
  int first, apart;
};

// --- rings of stages, and notes ---

// Where a thread is in the ring of stages.
template <class S>
struct Ring {
  uint32_t base;       // of the ring's shared memory
  uint32_t at = base;  // of the stage
  uint32_t barrier = base + S::kBarriersAt;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t full() const { return barrier; }
  __device__ __forceinline__ uint32_t empty() const { return barrier + 8; }
  __device__ __forceinline__ void advance() {
    at += S::kStageBytes;
    barrier += 16;
    if (barrier != base + S::kBarriersAt + S::kStages * 16) return;
    at = base;
    barrier = base + S::kBarriersAt;
    parity ^= 1;
  }
};

// What is to be known of a tile of experts to write its results. Such tiles are many, and to ask for it takes as long as
// some of their steps: so it lies in shared memory before the tile's sums are made. There is the block; the decode scales
// of the tile's rows, of gate before those of up; of its tokens the scales, if there are any, and the rows of out, unless
// they are those of x.
template <class S>
struct Note {
  uint32_t at;

  __device__ __forceinline__ Block block() const {
    const uint4 v = load_shared(at);
    return {static_cast<int>(v.x), static_cast<int>(v.y), static_cast<int>(v.z), 0};
  }
  __device__ __forceinline__ uint32_t decode_scale_at(int row) const { return at + S::kDecodeAt + row * 4; }
  __device__ __forceinline__ uint32_t token_scale_at(int token) const { return at + S::kTokensAt + token * 4; }
  __device__ __forceinline__ uint32_t out_row_at(int token) const { return at + S::kRowsAt + token * 4; }
};

// Which of a team's notes is meant: of one tile after the other.
template <class S>
struct Turn {
  uint32_t tiles = 0;  // before

  __device__ __forceinline__ uint32_t parity() const { return tiles / S::kNotes % 2; }
  __device__ __forceinline__ Note<S> note(const Ring<S>& ring) const {
    return {ring.base + S::kNotesAt + tiles % S::kNotes * S::kNoteBytes};
  }
  __device__ __forceinline__ uint32_t full(const Ring<S>& ring) const {
    return ring.base + S::kNoteBarriersAt + tiles % S::kNotes * S::kNoteBarriers * 8;
  }
  __device__ __forceinline__ uint32_t empty(const Ring<S>& ring) const { return full(ring) + 8; }
  // Where the warps that multiply say that a tile's results are written: to who tells others, or that the note is free.
  __device__ __forceinline__ uint32_t written(const Ring<S>& ring) const { return full(ring) + (S::kTells ? 16 : 8); }
};

}  // namespace
}  // namespace fos::cuda
