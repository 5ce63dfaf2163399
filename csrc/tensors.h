// What every file of operators does with torch's tensors before kernels get their pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "operands.h"

#if defined(FOS_CUDA)
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace fos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    case ScalarType::Float: return Dtype::fp32;
    default: STD_TORCH_CHECK(false, "got dtype ", static_cast<int>(type), ", needed bfloat16, float16 or float32");
  }
}

inline void check(const Tensor& tensor, const char* name, ScalarType type, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": got dtype ", static_cast<int>(tensor.scalar_type()),
                  ", needed ", static_cast<int>(type));
  STD_TORCH_CHECK(tensor.device() == beside.device(), name, ": on another device than the input");
}

inline const float* floats(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

// Contiguous, and where vectors of 16 bytes can be read: a view may begin anywhere.
inline bool is_readable(const Tensor& tensor) {
#if defined(FOS_CUDA)
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 != 0) return false;
#endif
  return tensor.is_contiguous();
}

inline Tensor readable(Tensor tensor) {
  tensor = torch::stable::contiguous(tensor);
  return is_readable(tensor) ? tensor : torch::stable::clone(tensor);
}

#if defined(FOS_CUDA)

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would be told of it, too
  STD_TORCH_CHECK(error == cudaSuccess, "fouroversix: ", cudaGetErrorString(error));
}

#endif

}  // namespace fos
