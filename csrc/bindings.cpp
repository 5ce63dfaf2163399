// The kernels as torch operators, on libtorch's stable ABI: arguments checked, outputs made, no arithmetic.
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

constexpr int64_t kGrain = 1 << 14;  // values below which a thread costs more than it saves
constexpr int64_t kResident = 1 << 15;  // values read twice, for their amax and to be quantized: they stay in L1 or L2

int64_t rows_of(int64_t values, int64_t columns) { return values / columns > 1 ? values / columns : 1; }

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

// Memory that starts at a cache line.
template <class T>
class Lines {
 public:
  explicit Lines(int64_t count) : memory_(count * sizeof(T) + 63) {}
  T* data() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64); }

 private:
  std::vector<uint8_t> memory_;
};

int64_t strips_of(const Linear& l) { return (l.outputs + kBlock - 1) / kBlock; }

#if defined(__x86_64__)

constexpr int64_t kTokensForTiles = 8;        // from which on tiles win
constexpr int64_t kPanelBytes = 3 << 18;      // of unpacked weights: well within a second-level cache

void run_tiles(const Linear& l) {
  const int64_t columns = round_up(l.columns, kTileStep), groups = (l.tokens + kTileTokens - 1) / kTileTokens;
  Lines<uint16_t> tokens(groups * kTileTokens * columns);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    avx512::tile_tokens(l, begin, end, tokens.data());
  });
  const int64_t fitting = kPanelBytes / (2 * kBlock * columns), strips = fitting < 2 ? 2 : fitting < 8 ? fitting / 2 * 2 : 8;
  const int64_t all = strips_of(l);
  torch::stable::parallel_for(0, (all + strips - 1) / strips, 1, [&](int64_t begin, int64_t end) {
    Lines<uint16_t> scratch(strips * kBlock * columns);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * strips, last = first + strips < all ? first + strips : all;
      avx512::linear_panel(l, tokens.data(), first, last, scratch.data());
    }
  });
}

bool by_tiles(const Linear& l) {
  static const bool usable = &cpu_kernels() == &avx512::kernels && avx512::tiles_usable();
  return usable && l.x_dtype == Dtype::bf16 && l.tokens >= kTokensForTiles;
}

#else

void run_tiles(const Linear&) {}
bool by_tiles(const Linear&) { return false; }

#endif

void run(const Linear& l) {
  if (l.tokens == 0 || l.outputs == 0) return;
  if (by_tiles(l)) return run_tiles(l);
  const CpuKernels& kernels = cpu_kernels();
  Lines<float> tokens(l.tokens * l.columns);
  torch::stable::parallel_for(0, l.tokens, rows_of(kGrain, l.columns), [&](int64_t begin, int64_t end) {
    kernels.tokens_in_fp32(l, begin, end, tokens.data());
  });
  torch::stable::parallel_for(0, strips_of(l), rows_of(kGrain, kBlock * l.columns), [&](int64_t begin, int64_t end) {
    kernels.linear_strips(l, tokens.data(), begin, end);
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

const float* floats(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

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

std::tuple<Tensor, Tensor> quantize_values(Tensor x, OptionalTensor amax, OptionalTensor expert_offsets, bool gated,
                                           int64_t scope, int64_t metric, int64_t domain, bool adaptive,
                                           double encoded_amax) {
  Inputs in = {x, amax, expert_offsets};
  Quantize q = describe(in, gated, scope, metric, domain, adaptive, encoded_amax, int64_t(Layout::row_major));
  Tensor values = torch::stable::new_empty(in.x, {q.rows, q.columns}, in.x.scalar_type());
  Tensor decode_scale = make_decode_scale(q, in.x);
  q.values = values.data_ptr();
  run(q, in.x);
  return {values, decode_scale};
}

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

#if !defined(FOS_CUDA)

// codes [strips, K/16, 8, 16] and block_scale [strips, K/16, 16], as operands.h has them.
Tensor linear(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, OptionalTensor token_scale,
              OptionalTensor bias, ScalarType dtype) {
  check(codes, "codes", ScalarType::Byte, x);
  check(block_scale, "block_scale", ScalarType::Byte, x);
  check(decode_scale, "decode_scale", ScalarType::Float, x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.size(1) % kBlock == 0,
                  "x: needed [M, K] with K a positive multiple of ", kBlock);
  x = torch::stable::contiguous(x);
  codes = torch::stable::contiguous(codes);
  block_scale = torch::stable::contiguous(block_scale);
  decode_scale = torch::stable::contiguous(decode_scale);
  Linear l = {};
  l.x = x.data_ptr();
  l.x_dtype = dtype_of(x.scalar_type());
  l.tokens = x.size(0);
  l.columns = x.size(1);
  l.outputs = decode_scale.numel();
  const int64_t numbers = strips_of(l) * kBlock * l.columns;
  STD_TORCH_CHECK(codes.numel() == numbers / 2 && block_scale.numel() == numbers / kBlock, "codes and block_scale: got ",
                  codes.numel(), " and ", block_scale.numel(), " bytes, needed ", numbers / 2, " and ", numbers / kBlock,
                  " for ", l.outputs, " outputs of ", l.columns, " columns");
  if (token_scale.has_value()) {
    check(*token_scale, "token_scale", ScalarType::Float, x);
    STD_TORCH_CHECK(token_scale->numel() == l.tokens, "token_scale: got ", token_scale->numel(), ", needed ", l.tokens);
    token_scale = torch::stable::contiguous(*token_scale);
  }
  if (bias.has_value()) {
    check(*bias, "bias", ScalarType::Float, x);
    STD_TORCH_CHECK(bias->numel() == l.outputs, "bias: got ", bias->numel(), ", needed ", l.outputs);
    bias = torch::stable::contiguous(*bias);
  }
  l.codes = static_cast<const uint8_t*>(codes.data_ptr());
  l.block_scale = static_cast<const uint8_t*>(block_scale.data_ptr());
  l.decode_scale = static_cast<const float*>(decode_scale.data_ptr());
  l.token_scale = floats(token_scale);
  l.bias = floats(bias);
  l.out_dtype = dtype_of(dtype);
  Tensor out = torch::stable::new_empty(x, {l.tokens, l.outputs}, dtype);
  l.out = out.data_ptr();
  run(l);
  return out;
}

#endif

}  // namespace
}  // namespace fos

STABLE_TORCH_LIBRARY(FOS_LIBRARY, m) {
  m.def(
      "quantize(Tensor x, Tensor? amax, Tensor? expert_offsets, bool gated, int scope, int metric, int domain, "
      "bool adaptive, float encoded_amax, int layout) -> (Tensor, Tensor, Tensor)");
  m.def(
      "quantize_values(Tensor x, Tensor? amax, Tensor? expert_offsets, bool gated, int scope, int metric, int domain, "
      "bool adaptive, float encoded_amax) -> (Tensor, Tensor)");
  m.def("dequantize(Tensor packed, Tensor block_scale, Tensor? decode_scale, ScalarType dtype) -> Tensor");
#if !defined(FOS_CUDA)
  m.def(
      "linear(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, Tensor? token_scale, Tensor? bias, "
      "ScalarType dtype) -> Tensor");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(FOS_LIBRARY, FOS_KEY, m) {
  m.impl("quantize", TORCH_BOX(&fos::quantize));
  m.impl("quantize_values", TORCH_BOX(&fos::quantize_values));
  m.impl("dequantize", TORCH_BOX(&fos::dequantize));
#if !defined(FOS_CUDA)
  m.impl("linear", TORCH_BOX(&fos::linear));
#endif
}
