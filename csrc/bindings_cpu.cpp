// The products on a CPU as torch operators (torch.ops.fouroversix_cpu), beside the quantizers of bindings.cpp.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu.h"
#include "tensors.h"

namespace fos {
namespace {

// --- running: products of the same columns and outputs, whose work all threads share ---

// Memory that starts at a cache line, with whatever was in it.
class Lines {
 public:
  explicit Lines(int64_t bytes) : memory_(new uint8_t[bytes + 63]) {}
  uint8_t* data() { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64); }

 private:
  std::unique_ptr<uint8_t[]> memory_;
};

struct Product {
  const Linear& l;
  bool by_bf16;
  int64_t tokens_at;  // where its tokens are, as the kernels read them, among those of all products
};

// Some of the tokens or of the strips of a product.
struct Part {
  int64_t product, begin, end;
};

void cut(std::vector<Part>& parts, int64_t product, int64_t count, int64_t at_once) {
  for (int64_t begin = 0; begin < count; begin += at_once) {
    parts.push_back({product, begin, begin + at_once < count ? begin + at_once : count});
  }
}

// On as many threads as `values` are worth. Each takes the next part that nobody has: parts take unlike times.
template <class Work>
void share(const std::vector<Part>& parts, int64_t values, const Work& work) {
  const int64_t count = static_cast<int64_t>(parts.size()), threads = values / kGrain + 1;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, (count + threads - 1) / threads, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) work(parts[i]);
  });
}

int64_t strips_of(const Linear& l) { return (l.outputs + kBlock - 1) / kBlock; }

#if defined(__x86_64__)

constexpr int64_t kTokensForTiles = 8, kTokensForPairs = 5;  // from which on they win
constexpr int64_t kPanelBytes = 3 << 18;                     // of unpacked weights: well within a second-level cache

bool by_bf16(const Linear& l) {
  if (l.x_dtype != Dtype::bf16 || &cpu_kernels() != &avx512::kernels) return false;
  switch (avx512::bf16_products()) {
    case avx512::Bf16Products::tiles: return l.tokens >= kTokensForTiles;
    case avx512::Bf16Products::pairs: return l.tokens >= kTokensForPairs;
    default: return false;
  }
}

int64_t panel_bytes_of_strip(const Linear& l) { return 2 * kBlock * round_up(l.columns, kTileStep); }

int64_t strips_of_panel(const Linear& l) {
  const int64_t fitting = kPanelBytes / panel_bytes_of_strip(l);
  return fitting < 2 ? 2 : fitting < 8 ? fitting / 2 * 2 : 8;
}

int64_t tile_bytes(const Linear& l) { return round_up(l.tokens, kTileTokens) * round_up(l.columns, kTileStep) * 2; }

void make_tiles(const Linear& l, int64_t begin, int64_t end, uint8_t* to) {
  avx512::tile_tokens(l, begin / kTileTokens, (end + kTileTokens - 1) / kTileTokens, reinterpret_cast<uint16_t*>(to));
}

void multiply_panel(const Linear& l, const uint8_t* tokens, int64_t begin, int64_t end) {
  Lines scratch((end - begin) * panel_bytes_of_strip(l));
  avx512::linear_panel(l, reinterpret_cast<const uint16_t*>(tokens), begin, end,
                       reinterpret_cast<uint16_t*>(scratch.data()));
}

constexpr int64_t kTokensOfTile = kTileTokens;

#else

bool by_bf16(const Linear&) { return false; }
int64_t strips_of_panel(const Linear&) { return 1; }
int64_t tile_bytes(const Linear&) { return 0; }
void make_tiles(const Linear&, int64_t, int64_t, uint8_t*) {}
void multiply_panel(const Linear&, const uint8_t*, int64_t, int64_t) {}
constexpr int64_t kTokensOfTile = 1;

#endif

// Into how many parts the strips of a product are cut: one for each thread or, where products are of unlike numbers of
// tokens, some more of all, so that no thread waits long for another.
int64_t parts_of_product(int64_t products) {
  constexpr int64_t kPartsOfThread = 4;
  const int64_t threads = torch::stable::get_num_threads();
  return products == 1 ? threads : (kPartsOfThread * threads + products - 1) / products;
}

void run(const std::vector<Linear>& linears) {
  const CpuKernels& kernels = cpu_kernels();
  std::vector<Product> products;
  std::vector<Part> tokens, strips;
  const int64_t count = static_cast<int64_t>(linears.size()), parts = parts_of_product(count);
  int64_t bytes = 0, x_values = 0, w_values = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Linear& l = linears[i];
    const Product& p = products.emplace_back(Product{l, by_bf16(l), bytes});
    bytes += p.by_bf16 ? tile_bytes(l) : l.tokens * l.columns * static_cast<int64_t>(sizeof(float));
    x_values += l.tokens * l.columns;
    w_values += strips_of(l) * kBlock * l.columns;
    cut(tokens, i, l.tokens, round_up(rows_of(kGrain, l.columns), kTokensOfTile));
    const int64_t of_part = (strips_of(l) + parts - 1) / parts;
    cut(strips, i, strips_of(l), p.by_bf16 ? std::min(strips_of_panel(l), round_up(of_part, 2)) : of_part);
  }
  Lines memory(bytes);
  uint8_t* const all = memory.data();
  share(tokens, x_values, [&](const Part& part) {
    const Product& p = products[part.product];
    if (p.by_bf16) make_tiles(p.l, part.begin, part.end, all + p.tokens_at);
    else kernels.tokens_in_fp32(p.l, part.begin, part.end, reinterpret_cast<float*>(all + p.tokens_at));
  });
  share(strips, w_values, [&](const Part& part) {
    const Product& p = products[part.product];
    if (p.by_bf16) multiply_panel(p.l, all + p.tokens_at, part.begin, part.end);
    else kernels.linear_strips(p.l, reinterpret_cast<const float*>(all + p.tokens_at), part.begin, part.end);
  });
}

// --- operators ---

// What both operators say of x and weights; tensors are made contiguous in place, to live as long as the caller's.
Linear describe(Tensor& x, Tensor& codes, Tensor& block_scale, Tensor& decode_scale, OptionalTensor& token_scale,
                int64_t experts, ScalarType dtype) {
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
  l.outputs = experts > 0 ? decode_scale.numel() / experts : 0;
  const int64_t numbers = experts * strips_of(l) * kBlock * l.columns;
  STD_TORCH_CHECK(codes.numel() == numbers / 2 && block_scale.numel() == numbers / kBlock &&
                      decode_scale.numel() == experts * l.outputs,
                  "codes and block_scale: got ", codes.numel(), " and ", block_scale.numel(), " bytes, needed ",
                  numbers / 2, " and ", numbers / kBlock, " for ", l.outputs, " outputs of ", l.columns, " columns");
  if (token_scale.has_value()) {
    check(*token_scale, "token_scale", ScalarType::Float, x);
    STD_TORCH_CHECK(token_scale->numel() == x.size(0), "token_scale: got ", token_scale->numel(), ", needed ", x.size(0));
    token_scale = torch::stable::contiguous(*token_scale);
  }
  l.token_scale = floats(token_scale);
  l.codes = static_cast<const uint8_t*>(codes.data_ptr());
  l.block_scale = static_cast<const uint8_t*>(block_scale.data_ptr());
  l.decode_scale = static_cast<const float*>(decode_scale.data_ptr());
  l.out_dtype = dtype_of(dtype);
  return l;
}

// codes [strips, K/16, 8, 16] and block_scale [strips, K/16, 16], as operands.h has them.
Tensor linear(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, OptionalTensor token_scale,
              OptionalTensor bias, ScalarType dtype) {
  Linear l = describe(x, codes, block_scale, decode_scale, token_scale, 1, dtype);
  if (bias.has_value()) {
    check(*bias, "bias", ScalarType::Float, x);
    STD_TORCH_CHECK(bias->numel() == l.outputs, "bias: got ", bias->numel(), ", needed ", l.outputs);
    bias = torch::stable::contiguous(*bias);
  }
  l.bias = floats(bias);
  Tensor out = torch::stable::new_empty(x, {l.tokens, l.outputs}, dtype);
  l.out = out.data_ptr();
  if (l.tokens > 0 && l.outputs > 0) run({l});
  return out;
}

// -1 for one that there is not.
int64_t expert_of(const Tensor& topk_ids, int64_t slot, int64_t experts) {
  const int64_t id = topk_ids.scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(topk_ids.data_ptr())[slot]
                                                                : static_cast<const int32_t*>(topk_ids.data_ptr())[slot];
  return 0 <= id && id < experts ? id : -1;
}

// For each slot of topk_ids [M, top_k] the product with its expert's weights, of row `slot` of x, or of its token's where x
// has but M rows: [M * top_k, N]. Slots of experts that there are not are 0.
Tensor linear_experts(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, OptionalTensor token_scale,
                      Tensor topk_ids, ScalarType dtype) {
  STD_TORCH_CHECK(decode_scale.dim() == 2 && decode_scale.size(0) > 0, "decode_scale: needed [E, N]");
  const int64_t experts = decode_scale.size(0);
  Linear l = describe(x, codes, block_scale, decode_scale, token_scale, experts, dtype);
  STD_TORCH_CHECK(topk_ids.scalar_type() == ScalarType::Long || topk_ids.scalar_type() == ScalarType::Int,
                  "topk_ids: needed int32 or int64");
  topk_ids = torch::stable::contiguous(topk_ids);
  const int64_t slots = topk_ids.numel();
  STD_TORCH_CHECK(topk_ids.dim() == 2 && (x.size(0) == slots || x.size(0) == topk_ids.size(0)), "x: got ", x.size(0),
                  " rows, needed one for each token or each slot of topk_ids");
  STD_TORCH_CHECK(slots <= INT32_MAX, "topk_ids: got ", slots, " slots, needed at most ", INT32_MAX);
  const int64_t slots_of_row = x.size(0) > 0 ? slots / x.size(0) : 1;
  Tensor out = torch::stable::new_empty(x, {slots, l.outputs}, dtype);
  l.out = out.data_ptr();

  std::vector<int64_t> end(experts + 1);  // of each expert's slots, once they are sorted
  const int64_t row_bytes = l.outputs * size_of(l.out_dtype);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t e = expert_of(topk_ids, slot, experts);
    if (e >= 0) ++end[e + 1];
    else std::memset(static_cast<uint8_t*>(l.out) + slot * row_bytes, 0, row_bytes);
  }
  for (int64_t e = 0; e < experts; ++e) end[e + 1] += end[e];
  std::vector<int32_t> x_row(slots), out_row(slots);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t e = expert_of(topk_ids, slot, experts);
    if (e < 0) continue;
    x_row[end[e]] = static_cast<int32_t>(slot / slots_of_row);
    out_row[end[e]++] = static_cast<int32_t>(slot);
  }
  std::vector<Linear> products;
  const int64_t scales = strips_of(l) * l.columns;  // of an expert
  for (int64_t e = 0, begin = 0; e < experts; begin = end[e++]) {
    if (end[e] == begin) continue;
    Linear of_expert = l;
    of_expert.tokens = end[e] - begin;
    of_expert.x_row = x_row.data() + begin;
    of_expert.out_row = out_row.data() + begin;
    of_expert.codes += e * scales * (kBlock / 2);
    of_expert.block_scale += e * scales;
    of_expert.decode_scale += e * l.outputs;
    products.push_back(of_expert);
  }
  if (!products.empty() && l.outputs > 0) run(products);
  return out;
}

Tensor combine(Tensor slots, OptionalTensor topk_weights, ScalarType dtype) {
  check(slots, "slots", ScalarType::Float, slots);
  STD_TORCH_CHECK(slots.dim() == 3, "slots: needed [M, top_k, N]");
  slots = torch::stable::contiguous(slots);
  Combine c = {};
  c.slots = static_cast<const float*>(slots.data_ptr());
  c.tokens = slots.size(0);
  c.top_k = slots.size(1);
  c.columns = slots.size(2);
  c.dtype = dtype_of(dtype);
  if (topk_weights.has_value()) {
    check(*topk_weights, "topk_weights", ScalarType::Float, slots);
    STD_TORCH_CHECK(topk_weights->numel() == c.tokens * c.top_k, "topk_weights: got ", topk_weights->numel(),
                    " numbers, needed ", c.tokens * c.top_k);
    topk_weights = torch::stable::contiguous(*topk_weights);
  }
  c.weights = floats(topk_weights);
  Tensor out = torch::stable::new_empty(slots, {c.tokens, c.columns}, dtype);
  c.out = out.data_ptr();
  const int64_t values = c.top_k * c.columns;
  torch::stable::parallel_for(0, c.tokens, rows_of(kGrain, values > 0 ? values : 1), [&](int64_t begin, int64_t end) {
    cpu_kernels().combine_tokens(c, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace fos

STABLE_TORCH_LIBRARY_FRAGMENT(FOS_LIBRARY, m) {
  m.def(
      "linear(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, Tensor? token_scale, Tensor? bias, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "linear_experts(Tensor x, Tensor codes, Tensor block_scale, Tensor decode_scale, Tensor? token_scale, "
      "Tensor topk_ids, ScalarType dtype) -> Tensor");
  m.def("combine(Tensor slots, Tensor? topk_weights, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(FOS_LIBRARY, FOS_KEY, m) {
  m.impl("linear", TORCH_BOX(&fos::linear));
  m.impl("linear_experts", TORCH_BOX(&fos::linear_experts));
  m.impl("combine", TORCH_BOX(&fos::combine));
}
