// Hopper's asynchronous instructions as functions: barriers in shared memory, bulk copies, clusters, wgmma.
//
// After NVIDIA's PTX ISA, chapters on mbarrier, cp.async.bulk, barrier.cluster, griddepcontrol and wgmma. Addresses of
// shared memory are 32 bits wide, as those instructions want them.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fos::cuda::sm90 {

constexpr int kWarp = 32;                  // threads
constexpr int kSharedMemory = 227 * 1024;  // bytes that a CTA can have
constexpr int kAllRegisters = 64 * 1024;   // of a multiprocessor

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What is the same in a warp's threads, so that the compiler knows it to be, and holds it once for all of them.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// The same place in another CTA of the cluster.
__device__ __forceinline__ uint32_t in_cta(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ __forceinline__ float4 load_from_cta(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address));
  return v;
}

__device__ __forceinline__ int load_int_from_cta(uint32_t address) {
  int v;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- barriers ---

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers are seen by the copy engine and by the other CTAs of the cluster from here on.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (done == 0);
}

// For a thread that has nothing to do for long: asked again and again, the barrier would take turns from other warps.
__device__ __forceinline__ void wait_long(uint32_t barrier, uint32_t parity) {
  constexpr uint32_t kNanoseconds = 100000;
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity), "r"(kNanoseconds)
        : "memory");
  } while (done == 0);
}

// Of as many threads as `threads` says: ids from 1 on (0 is __syncthreads).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- copies into shared memory, counted by a barrier ---

__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// The box of the map that begins at (column, row, step).
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, int step,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(step), "r"(barrier)
      : "memory");
}

// By a thread itself. Once those before it have come, arrive_with_copies() counts as an arrival.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_4(uint32_t to, const void* from, bool inside) {  // or 0
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(inside ? 4 : 0) : "memory");
}
__device__ __forceinline__ void arrive_with_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// --- between kernels that run at once ---

// The number, once it is one of two. What was written before it was stored (release) can be read from here on.
__device__ __forceinline__ int32_t wait_for_number(const int32_t* at, int32_t one, int32_t other) {
  constexpr uint32_t kNanoseconds = 200;
  while (true) {
    int32_t found;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(at) : "memory");
    if (found == one || found == other) return found;
    __nanosleep(kNanoseconds);
  }
}

// All that the warp's threads wrote before __syncwarp() is there for who finds the number.
__device__ __forceinline__ void store_number(int32_t* at, int32_t number) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(number) : "memory");
}

// The copy engine, too, sees what this thread can read.
__device__ __forceinline__ void let_copies_see() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- registers, of all warps of a warpgroup ---

template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// --- the kernel before and the kernel after ---

__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_kernel_after_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Launches a kernel whose CTAs may start before the kernel before it has ended: it says itself what waits. `cluster`: CTAs
// of a cluster along x, or 0 for none.
template <class... Arguments>
cudaError_t launch_early(void (*kernel)(Arguments...), dim3 grid, unsigned cluster, int threads, int shared_bytes,
                         cudaStream_t stream, const std::type_identity_t<Arguments>&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 0 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// --- mma.sync: D [16, 8] += A [16, 16] * B [16, 8], of a warp, all in registers, fp32 sums ---

template <class T>
struct Mma;

#define FOS_MMA(T, type)                                                                                             \
  template <>                                                                                                        \
  struct Mma<T> {                                                                                                    \
    static __device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], const uint32_t* b) {           \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
                   "{%8, %9}, {%0, %1, %2, %3};"                                                                     \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
    }                                                                                                                \
  };

FOS_MMA(__nv_bfloat16, "bf16")
FOS_MMA(__half, "f16")
#undef FOS_MMA

// Four matrices of 8 rows of 16 bytes: lane l says where row l % 8 of matrix l / 8 is.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// Four 8x8 matrices as mma holds them, their columns as rows of 16 bytes: lane l says where column l % 8 of matrix l / 8
// goes.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m[0]),
               "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ float load_shared_float(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ int load_shared_int(uint32_t address) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// --- wgmma: D [64, N] += A [64, 16] (registers) * B [16, N] (shared memory), fp32 sums ---

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// A value to be held in a register: computing it again wherever it is used would cost more than the register.
__device__ __forceinline__ void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
template <class T>
__device__ __forceinline__ void keep(T*& of_global_memory) {
  asm volatile("" : "+l"(of_global_memory));
  __builtin_assume(__isGlobal(of_global_memory));
}

// Registers have their values from here on: nothing that computes them moves in among the multiplications, which ptxas
// would then run one after the other.
__device__ __forceinline__ void settle(uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

// B as rows of 64 two-byte values, 128-byte swizzle, 8 rows a kilobyte; `start`, in 16 bytes, at a kilobyte, plus 2 a k16
// step.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t start) {
  constexpr uint32_t kStride = 1024 >> 4, kSwizzle128 = 1u << 30;
  return static_cast<uint64_t>(kStride | kSwizzle128) << 32 | start;
}

// The operands %0, %1, ... of so many sums, in text and in C++, eight more at a time.
#define FOS_NEXT(a, b, c, d, e, f, g, h) ", %" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define FOS_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FOS_R16 FOS_R8 FOS_NEXT(8, 9, 10, 11, 12, 13, 14, 15)
#define FOS_R24 FOS_R16 FOS_NEXT(16, 17, 18, 19, 20, 21, 22, 23)
#define FOS_R32 FOS_R24 FOS_NEXT(24, 25, 26, 27, 28, 29, 30, 31)
#define FOS_R40 FOS_R32 FOS_NEXT(32, 33, 34, 35, 36, 37, 38, 39)
#define FOS_R48 FOS_R40 FOS_NEXT(40, 41, 42, 43, 44, 45, 46, 47)
#define FOS_R56 FOS_R48 FOS_NEXT(48, 49, 50, 51, 52, 53, 54, 55)
#define FOS_R64 FOS_R56 FOS_NEXT(56, 57, 58, 59, 60, 61, 62, 63)
#define FOS_R72 FOS_R64 FOS_NEXT(64, 65, 66, 67, 68, 69, 70, 71)
#define FOS_R80 FOS_R72 FOS_NEXT(72, 73, 74, 75, 76, 77, 78, 79)
#define FOS_R88 FOS_R80 FOS_NEXT(80, 81, 82, 83, 84, 85, 86, 87)
#define FOS_R96 FOS_R88 FOS_NEXT(88, 89, 90, 91, 92, 93, 94, 95)
#define FOS_R104 FOS_R96 FOS_NEXT(96, 97, 98, 99, 100, 101, 102, 103)
#define FOS_R112 FOS_R104 FOS_NEXT(104, 105, 106, 107, 108, 109, 110, 111)
#define FOS_R120 FOS_R112 FOS_NEXT(112, 113, 114, 115, 116, 117, 118, 119)
#define FOS_R128 FOS_R120 FOS_NEXT(120, 121, 122, 123, 124, 125, 126, 127)
#define FOS_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FOS_D8(i) FOS_D4(i), FOS_D4(i + 4)
#define FOS_D16(i) FOS_D8(i), FOS_D8(i + 8)
#define FOS_D24(i) FOS_D16(i), FOS_D8(i + 16)
#define FOS_D32(i) FOS_D24(i), FOS_D8(i + 24)
#define FOS_D40(i) FOS_D32(i), FOS_D8(i + 32)
#define FOS_D48(i) FOS_D40(i), FOS_D8(i + 40)
#define FOS_D56(i) FOS_D48(i), FOS_D8(i + 48)
#define FOS_D64(i) FOS_D56(i), FOS_D8(i + 56)
#define FOS_D72(i) FOS_D64(i), FOS_D8(i + 64)
#define FOS_D80(i) FOS_D72(i), FOS_D8(i + 72)
#define FOS_D88(i) FOS_D80(i), FOS_D8(i + 80)
#define FOS_D96(i) FOS_D88(i), FOS_D8(i + 88)
#define FOS_D104(i) FOS_D96(i), FOS_D8(i + 96)
#define FOS_D112(i) FOS_D104(i), FOS_D8(i + 104)
#define FOS_D120(i) FOS_D112(i), FOS_D8(i + 112)
#define FOS_D128(i) FOS_D120(i), FOS_D8(i + 120)

template <class T, int N>
struct Wgmma;

#define FOS_WGMMA(T, type, N, sums, a0, a1, a2, a3, b)                                                                \
  template <>                                                                                                         \
  struct Wgmma<T, N> {                                                                                                \
    static __device__ __forceinline__ void multiply(float (&d)[sums], const uint32_t (&a)[4], uint64_t operand) {     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" FOS_R##sums "}, {" a0 ", " a1 \
                   ", " a2 ", " a3 "}, " b ", 1, 1, 1, 0;"                                                            \
                   : FOS_D##sums(0)                                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand));                                       \
    }                                                                                                                 \
  };
#define FOS_WGMMA_OF(T, type)                                          \
  FOS_WGMMA(T, type, 16, 8, "%8", "%9", "%10", "%11", "%12")           \
  FOS_WGMMA(T, type, 32, 16, "%16", "%17", "%18", "%19", "%20")        \
  FOS_WGMMA(T, type, 48, 24, "%24", "%25", "%26", "%27", "%28")        \
  FOS_WGMMA(T, type, 64, 32, "%32", "%33", "%34", "%35", "%36")        \
  FOS_WGMMA(T, type, 80, 40, "%40", "%41", "%42", "%43", "%44")        \
  FOS_WGMMA(T, type, 96, 48, "%48", "%49", "%50", "%51", "%52")        \
  FOS_WGMMA(T, type, 112, 56, "%56", "%57", "%58", "%59", "%60")       \
  FOS_WGMMA(T, type, 128, 64, "%64", "%65", "%66", "%67", "%68")       \
  FOS_WGMMA(T, type, 144, 72, "%72", "%73", "%74", "%75", "%76")       \
  FOS_WGMMA(T, type, 160, 80, "%80", "%81", "%82", "%83", "%84")       \
  FOS_WGMMA(T, type, 176, 88, "%88", "%89", "%90", "%91", "%92")       \
  FOS_WGMMA(T, type, 192, 96, "%96", "%97", "%98", "%99", "%100")      \
  FOS_WGMMA(T, type, 256, 128, "%128", "%129", "%130", "%131", "%132")

FOS_WGMMA_OF(__nv_bfloat16, "bf16")
FOS_WGMMA_OF(__half, "f16")

#undef FOS_WGMMA_OF
#undef FOS_WGMMA
#undef FOS_D128
#undef FOS_D120
#undef FOS_D112
#undef FOS_D104
#undef FOS_D96
#undef FOS_D88
#undef FOS_D80
#undef FOS_D72
#undef FOS_D64
#undef FOS_D56
#undef FOS_D48
#undef FOS_D40
#undef FOS_D32
#undef FOS_D24
#undef FOS_D16
#undef FOS_D8
#undef FOS_D4
#undef FOS_R128
#undef FOS_R120
#undef FOS_R112
#undef FOS_R104
#undef FOS_R96
#undef FOS_R88
#undef FOS_R80
#undef FOS_R72
#undef FOS_R64
#undef FOS_R56
#undef FOS_R48
#undef FOS_R40
#undef FOS_R32
#undef FOS_R24
#undef FOS_R16
#undef FOS_R8
#undef FOS_NEXT

}  // namespace fos::cuda::sm90
