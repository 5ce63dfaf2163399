// What a chip runs at once, found out once for each device.
#include <map>
#include <mutex>

#include "gemm.h"
#include "sm90.cuh"

namespace fos::cuda {
namespace {

// Stands for the products: what counts of them is that a CTA takes a multiprocessor's shared memory.
__global__ void nothing() {}

// How many clusters of as many CTAs run at once.
cudaError_t clusters_at_once(int ctas, int* clusters) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, sm90::kSharedMemory)) {
    return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(1);
  config.dynamicSmemBytes = sm90::kSharedMemory;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, nothing, &config);
}

}  // namespace

cudaError_t chip(Chip* found) {
  static std::mutex mutex;
  static std::map<int, Chip> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = known.try_emplace(device);
  if (is_new) {
    cudaError_t error =
        cudaDeviceGetAttribute(&place->second.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    for (int ctas = 2; ctas <= kMostShared && error == cudaSuccess; ++ctas) {
      error = clusters_at_once(ctas, &place->second.clusters[ctas]);
    }
    if (error != cudaSuccess) {
      known.erase(place);
      return error;
    }
  }
  *found = place->second;
  return cudaSuccess;
}

}  // namespace fos::cuda
