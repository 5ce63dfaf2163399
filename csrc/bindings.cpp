// The quantizers as torch operators, on libtorch's stable ABI: arguments checked, outputs made, no arithmetic.
//
// Compiled once for each device: FOS_LIBRARY names the namespace (fouroversix_cpu, fouroversix_cuda), FOS_KEY the
// dispatch key. What users call is torch.ops.fouroversix (kernels/ops.py), which passes recipes taken apart.

#include <tuple>
#include <vector>

#include "tensors.h"

#if defined(FOS_CUDA)
#include "cuda.h"
#else
#include "cpu.h"
#endif

namespace fos {
namespace {

// --- running ---

#if defined(FOS_CUDA)

void run(Quantize& q, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor workspace;
  if (q.amax == nullptr && q.scope != Scope::token) {
    workspace = torch::stable::new_empty(x, {q.scope == Scope::expert ? q.experts : 1}, ScalarType::Float);
  }
  float* amax = q.amax == nullptr && q.scope != Scope::token ? static_cast<float*>(workspace.data_ptr()) : nullptr;
  check_launch(cuda::quantize(q, amax, current_stream(x)));
}

void run(const Dequantize& d, const Tensor& packed) {
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  check_launch(cuda::dequantize(d, current_stream(packed)));
}

#else

constexpr int64_t kResident = 1 << 15;  // values read twice, for their amax and to be quantized: they stay in L1 or L2

float largest(const std::vector<float>& amax, int64_t begin, int64_t end) {
  uint32_t found = 0;  // as integers: NaN is above infinity
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t u = bits<uint32_t>(amax[row]);
    found = u > found ? u : found;
  }
  return bits<float>(found);
}

// What every row is scaled for and where its scales lie, from the experts' amax; writes the decode scales.
// A row of no expert is scaled for NaN, so that its codes and block scales are 0; in tiles it has no place at all.
void spread_experts(const CpuKernels& kernels, const Quantize& q, std::vector<float>& amax,
                    std::vector<int64_t>& scale_row) {
  std::vector<float> of_row(q.rows, bits<float>(0x7FC00000u));
  for (int64_t row = 0; row < q.rows; ++row) scale_row[row] = q.layout == Layout::row_major ? row : -1;
  int64_t start = 0;
  for (int64_t e = 0; e < q.experts; ++e) {
    const int64_t begin = q.offsets[e], end = q.offsets[e + 1];
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= q.rows, "expert_offsets: got ", begin, " and ", end,
                    " for expert ", e, ", needed ascending numbers within 0..", q.rows);
    const float of_expert = q.amax == nullptr ? largest(amax, begin, end) : q.amax[e];
    for (int64_t row = begin; row < end; ++row) {
      of_row[row] = of_expert;
      if (q.layout != Layout::row_major) scale_row[row] = start + row - begin;
    }
    start += round_up(end - begin, tile_rows(q.layout));
    kernels.decode_scales(q.recipe, &of_expert, 0, 1, q.decode_scale + e);
  }
  amax.swap(of_row);
}

void run(Quantize& q, const Tensor&) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t per_row = q.columns / kBlock, grain = rows_of(kGrain, q.columns);
  std::vector<float> amax(q.amax == nullptr || q.scope == Scope::expert ? q.rows : 0);
  if (q.scope == Scope::token && q.amax == nullptr) {
    torch::stable::parallel_for(0, q.rows, grain, [&](int64_t begin, int64_t end) {
      const int64_t step = rows_of(kResident, q.columns);
      for (int64_t row = begin; row < end; row += step) {
        const int64_t stop = row + step < end ? row + step : end;
        kernels.row_amax(q, row, stop, amax.data());
        kernels.quantize_blocks(q, amax.data(), 1, row * per_row, stop * per_row);
        kernels.decode_scales(q.recipe, amax.data() + row, 1, stop - row, q.decode_scale + row);
      }
    });
    return;
  }
  if (q.amax == nullptr) {
    torch::stable::parallel_for(0, q.rows, grain, [&](int64_t begin, int64_t end) {
      kernels.row_amax(q, begin, end, amax.data());
    });
  }
  const float* scaled_for = q.amax;
  int64_t stride = 0;
  float of_tensor = 0.0f;
  std::vector<int64_t> scale_row(q.scope == Scope::expert ? q.rows : 0);
  if (q.scope == Scope::expert) {
    spread_experts(kernels, q, amax, scale_row);
    scaled_for = amax.data();
    stride = 1;
    q.scale_row_of = scale_row.data();
  } else if (q.scope == Scope::token) {
    stride = q.amax_is_shared ? 0 : 1;
    kernels.decode_scales(q.recipe, scaled_for, stride, q.rows, q.decode_scale);
  } else {
    if (q.amax == nullptr) {
      of_tensor = largest(amax, 0, q.rows);
      scaled_for = &of_tensor;
    }
    kernels.decode_scales(q.recipe, scaled_for, 0, 1, q.decode_scale);
  }
  torch::stable::parallel_for(0, q.rows * per_row, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    kernels.quantize_blocks(q, scaled_for, stride, begin, end);
  });
}

void run(const Dequantize& d, const Tensor&) {
  torch::stable::parallel_for(0, d.rows, rows_of(kGrain, d.columns), [&](int64_t begin, int64_t end) {
    cpu_kernels().dequantize_rows(d, begin, end);
  });
}

#endif

// --- operators ---

// Tensors whose memory a Quantize points into.
struct Inputs {
  Tensor x;
  OptionalTensor amax, offsets;
};

Quantize describe(Inputs& in, bool gated, int64_t scope, int64_t metric, int64_t domain, bool adaptive,
                  double encoded_amax, int64_t layout) {
  STD_TORCH_CHECK(in.x.dim() == 2, "x: got ", in.x.dim(), " dimensions, needed [M, K]");
  in.x = readable(in.x);
  Quantize q = {};
  q.x = in.x.data_ptr();
  q.dtype = dtype_of(in.x.scalar_type());
  q.gated = gated;
  q.rows = in.x.size(0);
  q.columns = in.x.size(1) / (gated ? 2 : 1);
  STD_TORCH_CHECK(q.columns > 0 && in.x.size(1) % (gated ? 2 * kBlock : kBlock) == 0, "x: got ", in.x.size(1),
                  " columns, needed a positive multiple of ", gated ? 2 * kBlock : kBlock);
  q.recipe = {Metric(metric), Domain(domain), adaptive, static_cast<float>(encoded_amax)};
  q.scope = Scope(scope);
  q.layout = Layout(layout);
  STD_TORCH_CHECK((q.scope == Scope::expert) == in.offsets.has_value(), "expert_offsets: needed for experts alone");
  if (in.offsets.has_value()) {
    check(*in.offsets, "expert_offsets", ScalarType::Int, in.x);
    STD_TORCH_CHECK(in.offsets->dim() == 1 && in.offsets->size(0) > 0, "expert_offsets: needed [E + 1]");
    in.offsets = torch::stable::contiguous(*in.offsets);
    q.offsets = static_cast<const int32_t*>(in.offsets->data_ptr());
    q.experts = in.offsets->size(0) - 1;
  }
  if (in.amax.has_value()) {
    check(*in.amax, "amax", ScalarType::Float, in.x);
    q.amax_is_shared = q.scope == Scope::token && in.amax->dim() == 0;
    const int64_t several = q.scope == Scope::token ? q.rows : q.experts;
    const int64_t needed = q.scope == Scope::tensor || q.amax_is_shared ? 1 : several;
    STD_TORCH_CHECK(in.amax->numel() == needed, "amax: got ", in.amax->numel(), " numbers, needed ", needed);
    in.amax = torch::stable::contiguous(*in.amax);
    q.amax = floats(in.amax);
  }
  const int64_t tile = tile_rows(q.layout);
  q.scale_rows = q.scope == Scope::expert ? (q.rows + q.experts * (tile - 1)) / tile * tile : round_up(q.rows, tile);
  return q;
}

Tensor make_decode_scale(Quantize& q, const Tensor& x) {
  std::vector<int64_t> shape;
  if (q.scope != Scope::tensor) shape.push_back(q.scope == Scope::token ? q.rows : q.experts);
  Tensor made = torch::stable::new_empty(x, shape, ScalarType::Float);
  q.decode_scale = static_cast<float*>(made.data_ptr());
  return made;
}

std::tuple<Tensor, Tensor, Tensor> quantize(Tensor x, OptionalTensor amax, OptionalTensor expert_offsets, bool gated,
                                            int64_t scope, int64_t metric, int64_t domain, bool adaptive,
                                            double encoded_amax, int64_t layout) {
  Inputs in = {x, amax, expert_offsets};
  Quantize q = describe(in, gated, scope, metric, domain, adaptive, encoded_amax, layout);
  const int64_t scale_columns = padded_scale_columns(q.layout, q.columns / kBlock);
  Tensor packed = torch::stable::new_empty(in.x, {q.rows, q.columns / 2}, ScalarType::Byte);
  std::vector<int64_t> shape = {q.scale_rows, scale_columns};
  if (q.layout != Layout::row_major) shape = {q.scale_rows * scale_columns};
  // Padding is 0.
  Tensor block_scale = q.layout == Layout::row_major ? torch::stable::new_empty(in.x, shape, ScalarType::Byte)
                                                     : torch::stable::new_zeros(in.x, shape, ScalarType::Byte);
  Tensor decode_scale = make_decode_scale(q, in.x);
  q.packed = static_cast<uint8_t*>(packed.data_ptr());
  q.block_scale = static_cast<uint8_t*>(block_scale.data_ptr());
  run(q, in.x);
  return {packed, block_scale, decode_scale};
}

// Values, in the dtype of x, and decode scales.
std::tuple<Tensor, Tensor> make_values(Quantize& q, const Tensor& x) {
  Tensor values = torch::stable::new_empty(x, {q.rows, q.columns}, x.scalar_type());
  Tensor decode_scale = make_decode_scale(q, x);
  q.values = values.data_ptr();
  run(q, x);
  return {values, decode_scale};
}

std::tuple<Tensor, Tensor> quantize_values(Tensor x, OptionalTensor amax, OptionalTensor expert_offsets, bool gated,
                                           int64_t scope, int64_t metric, int64_t domain, bool adaptive,
                                           double encoded_amax) {
  Inputs in = {x, amax, expert_offsets};
  Quantize q = describe(in, gated, scope, metric, domain, adaptive, encoded_amax, int64_t(Layout::row_major));
  return make_values(q, in.x);
}

#if defined(FOS_CUDA)

// Rows as they are, per token.
Quantize describe_rows(Inputs& in, int64_t metric, int64_t domain, bool adaptive, double encoded_amax) {
  return describe(in, false, int64_t(Scope::token), metric, domain, adaptive, encoded_amax, int64_t(Layout::row_major));
}

// The same, for kernels that run beside others of a product: x is of its dtypes, and read where it is.
Quantize describe_uncopied(Inputs& in, int64_t metric, int64_t domain, bool adaptive, double encoded_amax) {
  STD_TORCH_CHECK(is_readable(in.x), "x: needed contiguous and aligned to 16 bytes, or a copy comes between");
  const Quantize q = describe_rows(in, metric, domain, adaptive, encoded_amax);
  STD_TORCH_CHECK(q.dtype != Dtype::fp32, "x: got float32, needed bfloat16 or float16");
  return q;
}

// As quantize_values, per token, and row m in the rows of all slots of token m: values [P, K], those of slots that count,
// decode scales [P], and whose they are. x was there before the kernel that wrote row_of_slot let this one start.
std::tuple<Tensor, Tensor> gather_quantized(Tensor x, OptionalTensor amax, Tensor row_of_slot, Tensor slot_of_row,
                                            int64_t metric, int64_t domain, bool adaptive, double encoded_amax) {
  Inputs in = {x, amax, std::nullopt};
  Quantize q = describe_uncopied(in, metric, domain, adaptive, encoded_amax);
  check(row_of_slot, "row_of_slot", ScalarType::Int, x);
  check(slot_of_row, "slot_of_row", ScalarType::Int, x);
  STD_TORCH_CHECK(row_of_slot.dim() == 2 && row_of_slot.size(0) == q.rows && row_of_slot.is_contiguous(),
                  "row_of_slot: needed [", q.rows, ", top_k]");
  const int64_t rows = row_of_slot.numel();
  STD_TORCH_CHECK(rows <= INT32_MAX, "row_of_slot: got ", rows, " slots, needed at most ", INT32_MAX);
  STD_TORCH_CHECK(slot_of_row.numel() == rows && slot_of_row.is_contiguous(), "slot_of_row: needed [", rows, "]");
  q.row_of_slot = static_cast<const int32_t*>(row_of_slot.data_ptr());
  q.top_k = static_cast<int>(row_of_slot.size(1));
  q.slot_of_row = static_cast<int32_t*>(slot_of_row.data_ptr());
  Tensor values = torch::stable::new_empty(x, {rows, q.columns}, x.scalar_type());
  Tensor decode_scale = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  q.values = values.data_ptr();
  q.decode_scale = static_cast<float*>(decode_scale.data_ptr());
  if (q.rows > 0) run(q, x);
  return {values, decode_scale};
}

// As quantize_values, per token, of rows sorted by expert. in_use: [2], the second says how many of them are somebody's.
std::tuple<Tensor, Tensor> quantize_sorted(Tensor x, OptionalTensor amax, Tensor in_use, int64_t metric, int64_t domain,
                                           bool adaptive, double encoded_amax) {
  Inputs in = {x, amax, std::nullopt};
  Quantize q = describe_rows(in, metric, domain, adaptive, encoded_amax);
  check(in_use, "in_use", ScalarType::Int, x);
  STD_TORCH_CHECK(in_use.numel() == 2 && in_use.is_contiguous(), "in_use: needed [2]");
  q.rows_in_use = static_cast<const int32_t*>(in_use.data_ptr()) + 1;
  return make_values(q, in.x);
}

// As quantize_values, per token, in the place of x [P, K]: rows sorted by expert that multiply_gated has begun to make,
// with the same progress [P], in `row_tiles` tiles.
Tensor quantize_beside(Tensor x, OptionalTensor amax, Tensor progress, int64_t row_tiles, int64_t metric, int64_t domain,
                       bool adaptive, double encoded_amax) {
  STD_TORCH_CHECK(!amax.has_value() || amax->is_contiguous(), "amax: needed contiguous, or a copy comes between");
  Inputs in = {x, amax, std::nullopt};
  Quantize q = describe_uncopied(in, metric, domain, adaptive, encoded_amax);
  check(progress, "progress", ScalarType::Int, x);
  STD_TORCH_CHECK(progress.numel() == q.rows && progress.is_contiguous(), "progress: got ", progress.numel(),
                  " numbers, needed one for each of ", q.rows, " rows");
  STD_TORCH_CHECK(row_tiles > 0 && row_tiles <= INT32_MAX, "row_tiles: got ", row_tiles, ", needed at least 1");
  q.progress = static_cast<int32_t*>(progress.data_ptr());
  q.row_tiles = static_cast<int>(row_tiles);
  Tensor decode_scale = make_decode_scale(q, x);
  q.values = x.data_ptr();
  run(q, x);
  return decode_scale;
}

#endif

Tensor dequantize(Tensor packed, Tensor block_scale, OptionalTensor decode_scale, ScalarType dtype) {
  check(packed, "packed", ScalarType::Byte, packed);
  check(block_scale, "block_scale", ScalarType::Byte, packed);
  std::vector<int64_t> shape;
  Dequantize d = {};
  d.rows = 1;
  for (int64_t i = 0; i < packed.dim(); ++i) {
    shape.push_back(packed.size(i) * (i == packed.dim() - 1 ? 2 : 1));
    if (i < packed.dim() - 1) d.rows *= packed.size(i);
  }
  STD_TORCH_CHECK(packed.dim() >= 2, "packed: got ", packed.dim(), " dimensions, needed [..., M, K/2]");
  d.columns = shape.back();
  STD_TORCH_CHECK(d.columns > 0 && d.columns % kBlock == 0, "packed: got K = ", d.columns,
                  ", needed a positive multiple of ", kBlock);
  STD_TORCH_CHECK(block_scale.numel() == d.rows * d.columns / kBlock, "block_scale: got ", block_scale.numel(),
                  " scales, needed ", d.rows * d.columns / kBlock);
  packed = readable(packed);
  block_scale = torch::stable::contiguous(block_scale);
  if (decode_scale.has_value()) {
    check(*decode_scale, "decode_scale", ScalarType::Float, packed);
    STD_TORCH_CHECK(decode_scale->numel() == d.rows, "decode_scale: got ", decode_scale->numel(),
                    " scales, needed one for each of ", d.rows, " rows");
    decode_scale = torch::stable::contiguous(*decode_scale);
  }
  Tensor out = torch::stable::new_empty(packed, shape, dtype);
  d.packed = static_cast<const uint8_t*>(packed.data_ptr());
  d.block_scale = static_cast<const uint8_t*>(block_scale.data_ptr());
  d.decode_scale = floats(decode_scale);
  d.dtype = dtype_of(dtype);
  d.out = out.data_ptr();
  run(d, packed);
  return out;
}

}  // namespace
}  // namespace fos

STABLE_TORCH_LIBRARY(FOS_LIBRARY, m) {
  m.def(
      "quantize(Tensor x, Tensor? amax, Tensor? expert_offsets, bool gated, int scope, int metric, int domain, "
      "bool adaptive, float encoded_amax, int layout) -> (Tensor, Tensor, Tensor)");
  m.def(
      "quantize_values(Tensor x, Tensor? amax, Tensor? expert_offsets, bool gated, int scope, int metric, int domain, "
      "bool adaptive, float encoded_amax) -> (Tensor, Tensor)");
#if defined(FOS_CUDA)
  m.def(
      "gather_quantized(Tensor x, Tensor? amax, Tensor row_of_slot, Tensor(a!) slot_of_row, int metric, int domain, "
      "bool adaptive, float encoded_amax) -> (Tensor, Tensor)");
  m.def(
      "quantize_sorted(Tensor x, Tensor? amax, Tensor in_use, int metric, int domain, bool adaptive, "
      "float encoded_amax) -> (Tensor, Tensor)");
  m.def(
      "quantize_beside(Tensor(a!) x, Tensor? amax, Tensor(b!) progress, int row_tiles, int metric, int domain, "
      "bool adaptive, float encoded_amax) -> Tensor");
#endif
  m.def("dequantize(Tensor packed, Tensor block_scale, Tensor? decode_scale, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(FOS_LIBRARY, FOS_KEY, m) {
  m.impl("quantize", TORCH_BOX(&fos::quantize));
  m.impl("quantize_values", TORCH_BOX(&fos::quantize_values));
#if defined(FOS_CUDA)
  m.impl("gather_quantized", TORCH_BOX(&fos::gather_quantized));
  m.impl("quantize_sorted", TORCH_BOX(&fos::quantize_sorted));
  m.impl("quantize_beside", TORCH_BOX(&fos::quantize_beside));
#endif
  m.impl("dequantize", TORCH_BOX(&fos::dequantize));
}
