// What gemm_sm90.cu makes of the sums of a tile, and where it writes that.
#pragma once

#include "shape_sm90.cuh"

namespace fos::cuda {
namespace {

// Sums [64 rows, kTokens] of a warpgroup in wgmma's order, to shared memory as [token][row].
template <int kTokens>
__device__ __forceinline__ void stage(const float (&sums)[kTokens / 2], float* staged, int thread) {
  const int row = thread / kWarp * kWarpRows + thread % kWarp / 4, token = thread % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    float* to = staged + (i * 8 + token) * kTilePitch + row;
    const float* from = sums + i * 4;
    to[0] = from[0];
    to[kTilePitch] = from[1];
    to[8] = from[2];
    to[kTilePitch + 8] = from[3];
  }
}

// A tile whose columns the cluster shared: every CTA adds and writes some of its tokens.
template <class S>
__device__ __forceinline__ void write_shared(const Gemm& g, const Tile& tile, const float* staged, int thread) {
  constexpr int kTokens = S::kTokens, kPieces = kRowTile / kPieceRows;
  constexpr int kAtOnce = 4;  // CTAs whose sums are read before the first is added
  const int row = first_row(thread % kPieces);
  const Piece piece(g, tile.block.expert, tile.row + row);
  const int end = min((tile.part + 1) * kTokens / g.split, tile.block.end - tile.block.begin);
#pragma unroll 1
  for (int token = tile.part * kTokens / g.split + thread / kPieces; token < end; token += S::kTeam / kPieces) {
    const uint32_t at = shared_address(staged + token * kTilePitch + row);
    float sums[kPieceRows] = {};
    for (int first = 0; first < g.split; first += kAtOnce) {
      float4 parts[kAtOnce][2];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= g.split) break;
        const uint32_t there = in_cta(at, first + i);
        parts[i][0] = load_from_cta(there);
        parts[i][1] = load_from_cta(there + kSecondHalf * 4);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= g.split) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 v = parts[i][half];
          float* to = sums + half * 4;
          to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
        }
      }
    }
    if (piece.inside) piece.finish(g, tile.block.begin + token, sums);
  }
}

// A warp's sums of a slice, as they are.
template <int kTokens>
__device__ __forceinline__ void write_sums(const Gemm& g, const Tile& tile, const float (&sums)[kTokens / 2], int warp,
                                           int lane) {
  const int row = tile.row + warp * kWarpRows, count = tile.block.end - tile.block.begin, token = lane % 4 * 2;
  if (row >= g.outputs) return;
  const int64_t first = static_cast<int64_t>(tile.part) * g.rows + tile.block.begin + token;
  float* to = g.sums + first * g.outputs + row + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 2; i += 4) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (i * 2 + token + k >= count) return;
      to[k * g.outputs] = sums[i + k];
      to[k * g.outputs + 8] = sums[i + k + 2];
    }
    to += 8 * g.outputs;
  }
}

// The 16 weight rows of a warp, or 8 of gate and the 8 of up that belong to them.
struct Strip {
  int output;   // the first
  bool inside;  // all are, or none

  __device__ __forceinline__ Strip(const Gemm& g, const Tile& tile, int warp) {
    const int row = tile.row + warp * kWarpRows;
    output = kOutput == Output::gated ? row / 2 : row;
    inside = output < g.outputs;
  }
};

// What is to be known of a tile of one weight to write a warp's strip of it: asked for once its sums are made. A thread
// has rows r and r + 8 of the strip, and knows every 32nd token.
template <int kTokens>
struct Asked {
  static constexpr int kEach = (kTokens + kWarp - 1) / kWarp;
  Strip strip;
  int begin, count;  // tokens
  float decode_scales[2] = {}, bias[2] = {}, token_scales[kEach];

  __device__ __forceinline__ Asked(const Gemm& g, const Tile& tile, int warp, int lane)
      : strip(g, tile, warp), begin(tile.block.begin), count(tile.block.end - tile.block.begin) {
    if (!strip.inside) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = strip.output + lane / 4 + i * 8;
      decode_scales[i] = g.decode_scale[own];
      if (g.bias != nullptr) bias[i] = load_number(g.bias, g.bias_dtype, own);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = i * kWarp + lane;
      token_scales[i] = token < count ? token_scale_of(g, begin + token) : 0.0f;
    }
  }
  __device__ __forceinline__ float decode_scale(int second) const { return decode_scales[second]; }
  // For a token that is the same in every lane, but for what `lane_token` adds; first is a multiple of 8.
  __device__ __forceinline__ float token_scale(const Gemm&, int first, int lane_token) const {
    return __shfl_sync(~0u, token_scales[first / kWarp], first % kWarp + lane_token);
  }
  __device__ __forceinline__ int row_of(int first, int lane_token) const { return begin + first + lane_token; }
};

// The same of a tile of experts, from its note.
template <class S>
struct Noted {
  Strip strip;
  int begin, count;
  Note<S> note;
  uint32_t decode_scales;  // where the thread's first is

  __device__ __forceinline__ Noted(const Gemm& g, const Tile& tile, const Note<S>& its, int warp, int lane)
      : strip(g, tile, warp), begin(tile.block.begin), count(tile.block.end - tile.block.begin), note(its) {
    constexpr int kRows = kOutput == Output::gated ? kWarpRows / 2 : kWarpRows;
    decode_scales = note.decode_scale_at(warp * kRows + lane / 4);
  }
  __device__ __forceinline__ float decode_scale(int second) const {
    return load_shared_float(decode_scales + second * (kOutput == Output::gated ? S::kRows / 2 : 8) * 4);
  }
  __device__ __forceinline__ float token_scale(const Gemm& g, int first, int lane_token) const {
    return g.token_scale == nullptr ? kUnscale : kUnscale * load_shared_float(note.token_scale_at(first + lane_token));
  }
  __device__ __forceinline__ int row_of(int first, int lane_token) const {
    return kOutput == Output::gated ? begin + first + lane_token : load_shared_int(note.out_row_at(first + lane_token));
  }
};

// A warp's rows of `count` tokens, from registers; through shared memory of its own where a row has 16 bits a number.
template <int kTokens, class Known>
__device__ __forceinline__ void write_rows(const Gemm& g, const Known& tile, const float (&sums)[kTokens / 2],
                                           uint32_t staging, int lane) {
  const Strip& strip = tile.strip;
  const int count = tile.count;
  if (!strip.inside) return;
  const int column = lane % 4 * 2;
  // Of rows r and r + 8, two tokens each.
  const auto finished = [&](int token, float (&y)[4]) {
    const float scales[2] = {tile.token_scale(g, token, column), tile.token_scale(g, token, column + 1)};
    const float decode_scales[2] = {tile.decode_scale(0), tile.decode_scale(1)};
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = scaled_back(sums[token / 2 + i], scales[i % 2], decode_scales[i / 2]);
  };
  if constexpr (kOutput == Output::fp32) {
    float* out = static_cast<float*>(g.out) + strip.output + lane / 4;
    keep(out);
    constexpr int kAtOnce = 32;  // tokens whose numbers are on their way together
#pragma unroll
    for (int first = 0; first < kTokens; first += kAtOnce) {
      if (first >= count) break;
#pragma unroll
      for (int token = first; token < first + kAtOnce; token += 8) {
        float y[4];
        finished(token, y);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (token + column + i >= count) continue;
          float* const to = out + static_cast<int64_t>(tile.row_of(token, column + i)) * g.outputs;
          to[0] = y[i];
          to[8] = y[i + 2];
        }
      }
    }
  } else {
    constexpr int kRows = kOutput == Output::gated ? 8 : kWarpRows;
    constexpr int kPieces = kRows / 8;  // of a token: 16 bytes
    const uint32_t to = staging + (kOutput == Output::gated ? lane * kChunkPitch
                                                            : (lane / 16 * 8 + lane % 8) * kChunkPitch + lane / 8 % 2 * 16);
    const uint32_t from = staging + lane / kPieces * kChunkPitch + lane % kPieces * 16;
    Value* const out = static_cast<Value*>(g.out) + strip.output + lane % kPieces * 8;
    // `store` makes two words of what 8 tokens' sums stand for, `finish` four matrices of the words of a chunk.
    const auto write_chunks = [&](auto store, auto finish) {
      static_assert(kTokens % kChunk == 0);
#pragma unroll
      for (int first = 0; first < kTokens; first += kChunk) {
        if (first >= count) break;
        uint32_t words[kChunk / 4], matrices[4];
#pragma unroll
        for (int i = 0; i < kChunk / 8; ++i) {
          float y[4];
          finished(first + i * 8, y);
          store(y, words[2 * i], words[2 * i + 1]);
        }
        finish(words, matrices);
        __syncwarp();
        store_matrices_transposed(to, matrices);
        __syncwarp();
        Value* const to_row = out + static_cast<int64_t>(tile.row_of(first, lane / kPieces)) * g.outputs;
        const uint4 piece = load_shared(from);
        if (first + lane / kPieces < count) *reinterpret_cast<uint4*>(to_row) = piece;
      }
    };
    if constexpr (kOutput == Output::gated) {
      with_activation(g.activation, [&](auto activation) {
        write_chunks(
            [](const float (&y)[4], uint32_t& first, uint32_t& second) {
              first = pack(y[0], y[2]), second = pack(y[1], y[3]);
            },
            [](const uint32_t (&words)[kChunk / 4], uint32_t (&matrices)[4]) {
              activate<decltype(activation)::value, 4>(words, matrices);
            });
      });
    } else {
      write_chunks(
          [&](float (&y)[4], uint32_t& first, uint32_t& second) {
            if (g.bias != nullptr) {
#pragma unroll
              for (int k = 0; k < 4; ++k) y[k] = y[k] + tile.bias[k / 2];
            }
            first = pack(y[0], y[1]), second = pack(y[2], y[3]);
          },
          [](const uint32_t (&words)[kChunk / 4], uint32_t (&matrices)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) matrices[i] = words[i];
          });
    }
  }
}

}  // namespace
}  // namespace fos::cuda
