// The one-time shuffle of a packed weight into the tiles that gemm_sm90.cu reads, and back.
//
// A tile has 128 rows and 64 columns. Its codes are 256 pieces of 16 bytes, one for each thread of the two consumer
// warpgroups: a word for each of the 4 blocks of 16 columns, with the 8 weights of wgmma's left operand that the thread
// holds. Its scales are, for each warp and each of its first 8 rows, the 4 bytes of that row and the 4 of the row 8 on.
#include "gemm.h"

namespace fos::cuda {
namespace {

constexpr int kThreads = 256;  // a tile's pieces

// The row of a weight that lies at `row` of the tiles, or -1 for padding. Gate and up: 8 of each in turn.
__device__ __forceinline__ int source_row(const Shuffle& s, int row) {
  if (!s.gated) return row < s.rows ? row : -1;
  const int half = s.rows / 2, within = row / 16 * 8 + row % 8;
  if (within >= half) return -1;
  return row % 16 < 8 ? within : half + within;
}

// E4M3's exponent is kept as e + 21, of subnormal numbers too. Codes 1..126, positive; 0 stays 0.
__device__ __forceinline__ uint32_t stored_scale(uint32_t e4m3) {
  if (e4m3 == 0x7F) return 0xFF;  // NaN, which this unpacks to
  const uint32_t exponent = e4m3 >> 3 & 15, mantissa = e4m3 & 7;
  if (exponent > 0) return (exponent + 14) << 3 | mantissa;
  if (mantissa == 0) return 0;
  const int shift = __clz(mantissa) - 28;  // until bit 3 is set
  return (15 - shift) << 3 | ((mantissa << shift) & 7);
}

__device__ __forceinline__ uint32_t e4m3_of(uint32_t stored) {
  const int exponent = static_cast<int>(stored >> 3), mantissa = static_cast<int>(stored & 7);
  if (stored == 0) return 0;
  if (stored == 0xFF) return 0x7F;
  if (exponent >= 15) return static_cast<uint32_t>((exponent - 14) << 3 | mantissa);
  return static_cast<uint32_t>((8 | mantissa) >> (15 - exponent));
}

// Where sign and magnitude of each pair lie in a half of a word, see unpack() in gemm_parts.cuh.
__device__ constexpr int kSignAt[4] = {15, 12, 13, 14}, kMagnitudeAt[4] = {6, 3, 0, 9};

// A pair of codes (a packed byte) as pair `index` of a word.
__device__ __forceinline__ uint32_t spread(uint32_t byte, int index) {
  uint32_t word = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t code = byte >> (4 * i) & 15;
    word |= ((code >> 3) << kSignAt[index] | (code & 7) << kMagnitudeAt[index]) << (16 * i);
  }
  return word;
}

__device__ __forceinline__ uint32_t gathered(uint32_t word, int index) {
  uint32_t byte = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t half = word >> (16 * i);
    byte |= ((half >> kSignAt[index] & 1) << 3 | (half >> kMagnitudeAt[index] & 7)) << (4 * i);
  }
  return byte;
}

struct Place {
  int row, row_8, step, first_byte;  // of the weight; the byte within a row of codes
};

__device__ __forceinline__ Place place(const Shuffle& s) {
  const int tile = blockIdx.x / s.steps, step = blockIdx.x % s.steps;
  const int lane = threadIdx.x % 32, row = tile * kRowTile + threadIdx.x / 32 * 16 + lane / 4;
  return {source_row(s, row), source_row(s, row + 8), step, step * (kStep / 2) + lane % 4};
}

__global__ void to_tiles(const Shuffle s) {
  const int64_t expert = blockIdx.y, tile = expert * gridDim.x + blockIdx.x;
  const Place at = place(s);
  const int code_bytes = s.columns / 2, blocks = s.columns / kBlock;
  const uint8_t* packed = s.packed + expert * s.rows * code_bytes;
  const uint8_t* scales = s.scales + expert * s.rows * blocks;
  uint32_t words[4] = {}, own_scales[2] = {};
  for (int block = 0; block < 4; ++block) {
    const int column = at.step * 4 + block;
    if (column >= blocks) break;
    for (int pair = 0; pair < 4; ++pair) {
      const int row = pair % 2 == 0 ? at.row : at.row_8;
      if (row < 0) continue;
      const uint32_t scale = stored_scale(scales[static_cast<int64_t>(row) * blocks + column] & 0x7F);
      uint32_t byte = packed[static_cast<int64_t>(row) * code_bytes + at.first_byte + block * 8 + pair / 2 * 4];
      // The scale 0 has no place among the stored numbers: its codes lose their magnitudes.
      if (scale == 0) byte &= 0x88;
      words[block] |= spread(byte, pair);
      own_scales[pair % 2] = (own_scales[pair % 2] & ~(0xFFu << 8 * block)) | scale << 8 * block;
    }
  }
  uint4* codes = reinterpret_cast<uint4*>(s.codes + tile * kCodeBytes);
  codes[threadIdx.x] = make_uint4(words[0], words[1], words[2], words[3]);
  if (threadIdx.x % 4 != 0) return;
  uint2* stored = reinterpret_cast<uint2*>(s.block_scale + tile * kScaleBytes);
  stored[threadIdx.x / 4] = make_uint2(own_scales[0], own_scales[1]);
}

__global__ void from_tiles(const Shuffle s) {
  const int64_t expert = blockIdx.y, tile = expert * gridDim.x + blockIdx.x;
  const Place at = place(s);
  const int code_bytes = s.columns / 2, blocks = s.columns / kBlock;
  uint8_t* packed = s.packed + expert * s.rows * code_bytes;
  uint8_t* scales = s.scales + expert * s.rows * blocks;
  const uint4 q = reinterpret_cast<const uint4*>(s.codes + tile * kCodeBytes)[threadIdx.x];
  const uint2 own = reinterpret_cast<const uint2*>(s.block_scale + tile * kScaleBytes)[threadIdx.x / 4];
  const uint32_t words[4] = {q.x, q.y, q.z, q.w};
  for (int block = 0; block < 4; ++block) {
    const int column = at.step * 4 + block;
    if (column >= blocks) break;
    for (int pair = 0; pair < 4; ++pair) {
      const int row = pair % 2 == 0 ? at.row : at.row_8;
      if (row < 0) continue;
      packed[static_cast<int64_t>(row) * code_bytes + at.first_byte + block * 8 + pair / 2 * 4] =
          static_cast<uint8_t>(gathered(words[block], pair));
      if (threadIdx.x % 4 != 0 || pair >= 2) continue;
      const uint32_t scale = (pair == 0 ? own.x : own.y) >> 8 * block & 0xFF;
      scales[static_cast<int64_t>(row) * blocks + column] = static_cast<uint8_t>(e4m3_of(scale));
    }
  }
}

// Products ask for weights before the kernel before them has ended: let that be another one than to_tiles.
__global__ void nothing() {}

}  // namespace

cudaError_t shuffle(const Shuffle& s, bool back, cudaStream_t stream) {
  if (s.experts * s.tiles * s.steps == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(s.tiles * s.steps), static_cast<unsigned>(s.experts));
  if (back) from_tiles<<<grid, kThreads, 0, stream>>>(s);
  else to_tiles<<<grid, kThreads, 0, stream>>>(s);
  nothing<<<1, 1, 0, stream>>>();
  return cudaGetLastError();
}

}  // namespace fos::cuda
