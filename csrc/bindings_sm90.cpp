// The products on Hopper as torch operators (torch.ops.fouroversix_cuda), beside those of bindings.cpp.
#include <tuple>
#include <vector>

#include "gemm.h"
#include "tensors.h"

namespace fos {
namespace {

int int_of(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, "got a size of ", value, ", needed 0 to ", INT32_MAX);
  return static_cast<int>(value);
}

int row_tiles_of(int rows, bool gated) {
  // Gate and up are padded apart.
  return int_of(ceil_div(gated ? rows / 2 : rows, gated ? cuda::kRowTile / 2 : cuda::kRowTile));
}

cuda::Chip chip() {
  cuda::Chip found;
  check_launch(cuda::chip(&found));
  return found;
}

// --- weights ---

std::tuple<Tensor, Tensor> to_tiles(Tensor packed, Tensor block_scale, bool gated) {
  check(packed, "packed", ScalarType::Byte, packed);
  check(block_scale, "block_scale", ScalarType::Byte, packed);
  STD_TORCH_CHECK(packed.dim() >= 2 && block_scale.dim() == packed.dim(), "packed: needed [..., N, K/2]");
  packed = torch::stable::contiguous(packed);
  block_scale = torch::stable::contiguous(block_scale);
  std::vector<int64_t> shape;
  cuda::Shuffle s = {};
  s.experts = 1;
  const int64_t dims = packed.dim();
  for (int64_t i = 0; i + 2 < dims; ++i) {
    shape.push_back(packed.size(i));
    s.experts = int_of(s.experts * packed.size(i));
  }
  s.rows = int_of(packed.size(dims - 2));
  s.columns = int_of(packed.size(dims - 1) * 2);
  STD_TORCH_CHECK(s.columns % kBlock == 0 && block_scale.numel() * 8 == packed.numel(), "packed: got ", s.columns,
                  " columns and ", block_scale.numel(), " block scales, needed one for each 16");
  s.gated = gated;
  s.tiles = row_tiles_of(s.rows, gated);
  s.steps = int_of(ceil_div(s.columns, cuda::kStep));
  shape.insert(shape.end(), {s.tiles, s.steps, cuda::kCodeBytes});
  Tensor codes = torch::stable::new_empty(packed, shape, ScalarType::Byte);
  shape.back() = cuda::kScaleBytes;
  Tensor scales = torch::stable::new_empty(packed, shape, ScalarType::Byte);
  s.packed = static_cast<uint8_t*>(packed.data_ptr());
  s.scales = static_cast<uint8_t*>(block_scale.data_ptr());
  s.codes = static_cast<uint8_t*>(codes.data_ptr());
  s.block_scale = static_cast<uint8_t*>(scales.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  check_launch(cuda::shuffle(s, false, current_stream(packed)));
  return {codes, scales};
}

std::tuple<Tensor, Tensor> from_tiles(Tensor codes, Tensor block_scale, int64_t rows, int64_t columns, bool gated) {
  std::vector<int64_t> shape;
  cuda::Shuffle s = {};
  s.experts = 1;
  for (int64_t i = 0; i + 3 < codes.dim(); ++i) {
    shape.push_back(codes.size(i));
    s.experts = int_of(s.experts * codes.size(i));
  }
  s.rows = int_of(rows);
  s.columns = int_of(columns);
  s.gated = gated;
  s.tiles = row_tiles_of(s.rows, gated);
  s.steps = int_of(ceil_div(s.columns, cuda::kStep));
  const int64_t pieces = static_cast<int64_t>(s.experts) * s.tiles * s.steps;
  STD_TORCH_CHECK(codes.numel() == pieces * cuda::kCodeBytes && block_scale.numel() == pieces * cuda::kScaleBytes,
                  "codes: got ", codes.numel(), " bytes, needed ", pieces * cuda::kCodeBytes);
  check(codes, "codes", ScalarType::Byte, codes);
  check(block_scale, "block_scale", ScalarType::Byte, codes);
  codes = readable(codes);
  block_scale = readable(block_scale);
  shape.insert(shape.end(), {rows, columns / 2});
  Tensor packed = torch::stable::new_empty(codes, shape, ScalarType::Byte);
  shape.back() = columns / kBlock;
  Tensor scales = torch::stable::new_empty(codes, shape, ScalarType::Byte);
  s.packed = static_cast<uint8_t*>(packed.data_ptr());
  s.scales = static_cast<uint8_t*>(scales.data_ptr());
  s.codes = static_cast<uint8_t*>(codes.data_ptr());
  s.block_scale = static_cast<uint8_t*>(block_scale.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  check_launch(cuda::shuffle(s, true, current_stream(codes)));
  return {packed, scales};
}

// --- products ---

// What both products say of x and the weight; tensors are made readable in place, to live as long as the caller's.
cuda::Gemm describe(Tensor& x, Tensor& codes, Tensor& block_scale, Tensor& decode_scale, OptionalTensor& token_scale,
                    int64_t outputs, cuda::Output output) {
  STD_TORCH_CHECK(x.dim() == 2, "x: got ", x.dim(), " dimensions, needed [M, K]");
  x = readable(x);
  cuda::Gemm g{};
  g.dtype = dtype_of(x.scalar_type());
  STD_TORCH_CHECK(g.dtype != Dtype::fp32, "x: got float32, needed bfloat16 or float16");
  g.output = output;
  g.x = x.data_ptr();
  g.rows = int_of(x.size(0));
  g.columns = int_of(x.size(1));
  g.outputs = int_of(outputs);
  STD_TORCH_CHECK(g.columns > 0 && g.columns % kBlock == 0 && g.outputs > 0 && g.outputs % kBlock == 0, "x: got ",
                  g.columns, " columns for ", g.outputs, " outputs, needed positive multiples of ", kBlock);
  check(codes, "codes", ScalarType::Byte, x);
  check(block_scale, "block_scale", ScalarType::Byte, x);
  check(decode_scale, "decode_scale", ScalarType::Float, x);
  // No copies: kernels read weights before they wait for the kernel before.
  STD_TORCH_CHECK(is_readable(codes) && is_readable(block_scale), "codes: needed a prepared weight as it is");
  decode_scale = readable(decode_scale);
  const bool gated = output == cuda::Output::gated;
  const int64_t weight_rows = gated ? 2 * outputs : outputs, experts = decode_scale.numel() / weight_rows;
  g.row_tiles = row_tiles_of(int_of(weight_rows), gated);
  g.steps = int_of(ceil_div(g.columns, cuda::kStep));
  const int64_t pieces = experts * g.row_tiles * g.steps;
  STD_TORCH_CHECK(decode_scale.numel() == experts * weight_rows && codes.numel() == pieces * cuda::kCodeBytes &&
                      block_scale.numel() == pieces * cuda::kScaleBytes,
                  "codes: got ", codes.numel(), " bytes, needed ", pieces * cuda::kCodeBytes, " for ", weight_rows,
                  " rows and ", g.columns, " columns");
  g.codes = static_cast<const uint8_t*>(codes.data_ptr());
  g.block_scale = static_cast<const uint8_t*>(block_scale.data_ptr());
  g.decode_scale = static_cast<const float*>(decode_scale.data_ptr());
  if (token_scale.has_value()) {
    check(*token_scale, "token_scale", ScalarType::Float, x);
    token_scale = torch::stable::contiguous(*token_scale);
    g.token_scale = static_cast<const float*>(token_scale->data_ptr());
  }
  g.split = 1;
  g.split_steps = g.steps;
  return g;
}

// `tokens` 0: as launch_of() says, with `any_rows`.
Tensor linear(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, OptionalTensor token_scale,
              OptionalTensor bias, bool any_rows, int64_t tokens, int64_t split, int64_t strips) {
  const int64_t outputs = decode_scale.numel();
  cuda::Gemm g =
      describe(x, codes, block_scale, decode_scale, token_scale, outputs, cuda::Output::linear);
  STD_TORCH_CHECK(!token_scale.has_value() || token_scale->numel() == g.rows, "token_scale: needed one for each of ",
                  g.rows, " rows");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->numel() == outputs && bias->device() == x.device(), "bias: got ", bias->numel(),
                    " numbers, needed ", outputs, " on the device of x");
    bias = torch::stable::contiguous(*bias);
    g.bias = bias->data_ptr();
    g.bias_dtype = dtype_of(bias->scalar_type());
  }
  Tensor out = torch::stable::new_empty(x, {g.rows, outputs}, x.scalar_type());
  g.out = out.data_ptr();
  cuda::Launch launch = {int_of(tokens), int_of(split), int_of(strips)};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cuda::Chip on = chip();
  g.multiprocessors = on.multiprocessors;
  if (tokens == 0) launch = cuda::launch_of(g.rows, g.columns, g.outputs, any_rows, on);
  const bool few = launch.tokens <= cuda::kFewRows, sliced = !few && launch.strips > 1;
  const int most_strips = few ? 8 : launch.tokens == 64 || launch.tokens == 128 ? 2 : 1;
  const int most_split = few ? 1 : sliced ? cuda::kMostSlices : cuda::kMostSplit;
  STD_TORCH_CHECK(!few || g.rows <= launch.tokens, "tokens: got ", launch.tokens, " for ", g.rows, " rows");
  STD_TORCH_CHECK(launch.strips >= 1 && launch.strips <= most_strips, "strips: got ", launch.strips, ", needed 1 to ",
                  most_strips, " with ", launch.tokens, " tokens a tile");
  STD_TORCH_CHECK(launch.split >= 1 && launch.split <= most_split, "split: got ", launch.split, ", needed 1 to ",
                  most_split, " with ", launch.tokens, " tokens a tile and ", launch.strips, " strips");
  g.tokens = launch.tokens;
  g.strips = launch.strips;
  g.split_steps = int_of(ceil_div(g.steps, launch.split));
  g.split = int_of(ceil_div(g.steps, g.split_steps));  // nobody without a step
  g.block_limit = int_of(ceil_div(g.rows, g.tokens));
  std::optional<Tensor> sums;
  if (sliced) {
    sums = torch::stable::new_empty(x, {g.split, g.rows, outputs}, ScalarType::Float);
    g.sums = static_cast<float*>(sums->data_ptr());
  }
  check_launch(cuda::multiply(g, current_stream(x)));
  return out;
}

int32_t* ints(const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); }

cuda::Route ids_of(Tensor& topk_ids, int64_t experts) {
  STD_TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.size(1) > 0, "topk_ids: needed [M, top_k]");
  STD_TORCH_CHECK(experts > 0 && experts <= cuda::kMaxExperts, "got ", experts, " experts, needed 1 to ",
                  cuda::kMaxExperts);
  topk_ids = torch::stable::contiguous(topk_ids);
  cuda::Route r = {};
  r.wide_ids = topk_ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(r.wide_ids || topk_ids.scalar_type() == ScalarType::Int, "topk_ids: needed int32 or int64");
  r.topk_ids = topk_ids.data_ptr();
  r.slots = int_of(topk_ids.numel());
  r.top_k = int_of(topk_ids.size(1));
  r.experts = static_cast<int>(experts);
  return r;
}

// How many blocks there may be.
int64_t most_blocks(int64_t slots, int64_t experts, int64_t tokens) {
  return slots / tokens + (slots < experts ? slots : experts);
}

// Whether both products run at once, and the quantizer of intermediate results [P, inner] where they are `quantized`: into
// how many tiles of weight rows a row of these falls, or 0.
int64_t row_tiles_beside(Tensor topk_ids, int64_t experts, int64_t tokens, int64_t inner, int64_t hidden,
                         bool quantized) {
  STD_TORCH_CHECK(tokens > 0, "tokens: got 0, needed the rows of a block");
  const torch::stable::accelerator::DeviceGuard guard(topk_ids.get_device_index());
  return cuda::row_tiles_beside(most_blocks(topk_ids.numel(), experts, tokens), int_of(tokens), inner, hidden,
                                quantized, chip().multiprocessors);
}

// (row_of_slot [M, top_k], slot_of_row [P], token_of_row [P], blocks [.., 4], in_use [2], progress [P]): slots by expert, in
// blocks of at most `tokens` rows. Where rows are to be gathered, that says whose they are, and token_of_row stays empty;
// so does progress unless it is `followed`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(Tensor topk_ids, int64_t experts, int64_t tokens,
                                                                 bool beside_kernel_before, bool gathered,
                                                                 bool followed) {
  STD_TORCH_CHECK(!beside_kernel_before || topk_ids.is_contiguous(), "topk_ids: needed contiguous, or a copy comes between");
  STD_TORCH_CHECK(!beside_kernel_before || !gathered, "gathered: what gathers reads x and blocks before it waits for this");
  cuda::Route r = ids_of(topk_ids, experts);
  r.beside_kernel_before = beside_kernel_before;
  r.tokens = int_of(tokens);
  STD_TORCH_CHECK(r.tokens > 0, "tokens: got 0, needed the rows of a block");
  const int64_t most = most_blocks(r.slots, experts, r.tokens);
  Tensor slot_of_row = torch::stable::new_empty(topk_ids, {r.slots}, ScalarType::Int);
  Tensor token_of_row = torch::stable::new_empty(topk_ids, {gathered ? 0 : r.slots}, ScalarType::Int);
  Tensor row_of_slot = torch::stable::new_empty(topk_ids, {topk_ids.size(0), r.top_k}, ScalarType::Int);
  Tensor blocks = torch::stable::new_empty(topk_ids, {most, 4}, ScalarType::Int);
  Tensor in_use = torch::stable::new_empty(topk_ids, {2}, ScalarType::Int);
  Tensor progress = torch::stable::new_empty(topk_ids, {followed ? r.slots : 0}, ScalarType::Int);
  r.row_of_slot = ints(row_of_slot);
  if (!gathered) r.slot_of_row = ints(slot_of_row), r.token_of_row = ints(token_of_row);
  r.blocks = reinterpret_cast<cuda::Block*>(blocks.data_ptr());
  r.in_use = ints(in_use);
  if (followed) r.progress = ints(progress);
  const torch::stable::accelerator::DeviceGuard guard(topk_ids.get_device_index());
  check_launch(cuda::route(r, current_stream(topk_ids)));
  return {row_of_slot, slot_of_row, token_of_row, blocks, in_use, progress};
}

// Rows of x [M, K] sorted by expert: [P, K], those of slots that count; and whose they are.
Tensor gather(Tensor x, Tensor row_of_slot, Tensor slot_of_row, OptionalTensor topk_weights) {
  x = readable(x);
  cuda::Gather g = {};
  g.x = x.data_ptr();
  g.dtype = dtype_of(x.scalar_type());
  STD_TORCH_CHECK(g.dtype != Dtype::fp32 && x.dim() == 2 && x.size(1) % kBlock == 0, "x: needed [M, K] in 16 bits");
  STD_TORCH_CHECK(row_of_slot.dim() == 2 && row_of_slot.size(0) == x.size(0), "row_of_slot: needed [", x.size(0), ", top_k]");
  g.row_of_slot = ints(row_of_slot);
  g.slot_of_row = ints(slot_of_row);
  g.tokens = int_of(x.size(0));
  g.top_k = int_of(row_of_slot.size(1));
  g.columns = int_of(x.size(1));
  if (topk_weights.has_value()) {
    check(*topk_weights, "topk_weights", ScalarType::Float, x);
    topk_weights = torch::stable::contiguous(*topk_weights);
    g.topk_weights = static_cast<const float*>(topk_weights->data_ptr());
  }
  const int64_t rows = row_of_slot.numel();
  Tensor out = torch::stable::new_empty(x, {rows, g.columns}, x.scalar_type());
  g.out = out.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(cuda::gather(g, current_stream(x)));
  return out;
}

// Either product of P rows sorted by expert, row i of x and of token_scale or row token_of_row[i].
Tensor run_experts(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, OptionalTensor token_scale,
                   const OptionalTensor& token_of_row, const OptionalTensor& out_row, const Tensor& blocks,
                   const Tensor& in_use, const OptionalTensor& progress, int64_t whole, int64_t outputs,
                   cuda::Output output, int64_t activation, int64_t tokens) {
  // A copy of one of these would be freed, and written to by whoever gets its memory, while kernels still read it.
  const bool as_they_are =
      is_readable(x) && is_readable(decode_scale) && (!token_scale.has_value() || token_scale->is_contiguous());
  STD_TORCH_CHECK(!progress.has_value() || as_they_are,
                  "x, decode_scale, token_scale: needed contiguous and aligned to 16 bytes beside another product");
  cuda::Gemm g = describe(x, codes, block_scale, decode_scale, token_scale, outputs, output);
  const bool gated = output == cuda::Output::gated;
  g.activation = cuda::Activation(activation);
  if (token_of_row.has_value()) g.token_of = ints(*token_of_row);
  if (out_row.has_value()) g.out_row = ints(*out_row);
  g.blocks = reinterpret_cast<const cuda::Block*>(blocks.data_ptr());
  g.blocks_in_use = ints(in_use);
  g.block_limit = int_of(blocks.size(0));
  g.tokens = int_of(tokens);
  const bool few = g.tokens <= cuda::kFewExpertRows;
  STD_TORCH_CHECK(few || g.token_of == nullptr, "token_of_row: needed None with more than ", cuda::kFewExpertRows,
                  " rows in a block");
  STD_TORCH_CHECK(few || gated || g.out_row != nullptr, "out_row: needed with more than ", cuda::kFewExpertRows,
                  " rows in a block");
  const int64_t rows = token_of_row.has_value() ? token_of_row->numel() : x.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, outputs}, gated ? x.scalar_type() : ScalarType::Float);
  g.out = out.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  g.multiprocessors = chip().multiprocessors;
  const int64_t weight_rows = gated ? 2 * outputs : outputs;
  g.strips = few ? cuda::strips_at_once(ceil_div(weight_rows, 16), g.block_limit, g.columns, g.multiprocessors)
                 : cuda::tiles_at_once(g.row_tiles, g.block_limit, g.tokens, g.multiprocessors);
  if (progress.has_value()) {
    check(*progress, "progress", ScalarType::Int, x);
    STD_TORCH_CHECK(progress->numel() == rows && progress->is_contiguous(), "progress: got ", progress->numel(),
                    " numbers, needed one for each of ", rows, " rows");
    STD_TORCH_CHECK(cuda::run_at_once(g.tokens) && g.strips == 2, "progress: needed None for blocks of ", g.tokens,
                    " rows, ", g.strips, " tiles at once");
    // With another number the second product would wait for ever.
    STD_TORCH_CHECK(whole == kQuantized || (gated ? whole == ceil_div(g.row_tiles, 2) : whole > 0), "whole: got ", whole,
                    ", needed ", kQuantized, " or the gated product's tiles of a row");
    g.progress = ints(*progress);
    g.whole = static_cast<int32_t>(whole);
  }
  check_launch(cuda::multiply(g, current_stream(x)));
  return out;
}

// activation(gate) * up of all rows [P, N], in the dtype of x.
Tensor multiply_gated(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, OptionalTensor token_scale,
                      OptionalTensor token_of_row, Tensor blocks, Tensor in_use, OptionalTensor progress,
                      int64_t whole, int64_t outputs, int64_t activation, int64_t tokens) {
  return run_experts(x, codes, block_scale, decode_scale, token_scale, token_of_row, std::nullopt, blocks, in_use,
                     progress, whole, outputs, cuda::Output::gated, activation, tokens);
}

// Row i in out_row[i] of fp32 [P, N].
Tensor multiply_experts(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, OptionalTensor token_scale,
                        Tensor out_row, Tensor blocks, Tensor in_use, OptionalTensor progress, int64_t whole,
                        int64_t outputs, int64_t tokens) {
  return run_experts(x, codes, block_scale, decode_scale, token_scale, std::nullopt, out_row, blocks, in_use, progress,
                     whole, outputs, cuda::Output::fp32, 0, tokens);
}

Tensor combine(Tensor slots, OptionalTensor topk_weights, Tensor topk_ids, int64_t experts, ScalarType dtype) {
  check(slots, "slots", ScalarType::Float, slots);
  cuda::Combine c = {};
  c.route = ids_of(topk_ids, experts);
  c.slots = static_cast<const float*>(slots.data_ptr());
  c.columns = int_of(slots.size(1));
  c.dtype = dtype_of(dtype);
  STD_TORCH_CHECK(slots.dim() == 2 && slots.size(0) == c.route.slots && c.columns % 4 == 0 && c.dtype != Dtype::fp32,
                  "slots: needed [", c.route.slots, ", N], summed to 16 bits");
  if (topk_weights.has_value()) {
    check(*topk_weights, "topk_weights", ScalarType::Float, slots);
    topk_weights = torch::stable::contiguous(*topk_weights);
    c.topk_weights = static_cast<const float*>(topk_weights->data_ptr());
  }
  Tensor out = torch::stable::new_empty(slots, {topk_ids.size(0), slots.size(1)}, dtype);
  c.out = out.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(slots.get_device_index());
  check_launch(cuda::combine(c, current_stream(slots)));
  return out;
}

}  // namespace
}  // namespace fos

STABLE_TORCH_LIBRARY_FRAGMENT(fouroversix_cuda, m) {
  m.def("to_tiles(Tensor packed, Tensor block_scale, bool gated) -> (Tensor, Tensor)");
  m.def("from_tiles(Tensor codes, Tensor block_scale, int rows, int columns, bool gated) -> (Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, Tensor? token_scale, Tensor? bias, "
      "bool any_rows, int tokens, int split, int strips) -> Tensor");
  m.def(
      "route(Tensor topk_ids, int experts, int tokens, bool beside_kernel_before, bool gathered, bool followed) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("row_tiles_beside(Tensor topk_ids, int experts, int tokens, int inner, int hidden, bool quantized) -> int");
  m.def("gather(Tensor x, Tensor row_of_slot, Tensor(a!) slot_of_row, Tensor? topk_weights) -> Tensor");
  m.def(
      "multiply_gated(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, Tensor? token_scale, "
      "Tensor? token_of_row, Tensor blocks, Tensor in_use, Tensor(a!)? progress, int whole, int outputs, int activation, "
      "int tokens) -> Tensor");
  m.def(
      "multiply_experts(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, Tensor? token_scale, "
      "Tensor out_row, Tensor blocks, Tensor in_use, Tensor? progress, int whole, int outputs, int tokens) -> "
      "Tensor");
  m.def("combine(Tensor slots, Tensor? topk_weights, Tensor topk_ids, int experts, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fouroversix_cuda, CUDA, m) {
  m.impl("to_tiles", TORCH_BOX(&fos::to_tiles));
  m.impl("from_tiles", TORCH_BOX(&fos::from_tiles));
  m.impl("linear", TORCH_BOX(&fos::linear));
  m.impl("route", TORCH_BOX(&fos::route));
  m.impl("row_tiles_beside", TORCH_BOX(&fos::row_tiles_beside));
  m.impl("gather", TORCH_BOX(&fos::gather));
  m.impl("multiply_gated", TORCH_BOX(&fos::multiply_gated));
  m.impl("multiply_experts", TORCH_BOX(&fos::multiply_experts));
  m.impl("combine", TORCH_BOX(&fos::combine));
}
