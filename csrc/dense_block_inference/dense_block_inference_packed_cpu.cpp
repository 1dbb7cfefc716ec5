// SPDX-License-Identifier: Apache-2.0
#include "dense_block_inference/dense_block_inference.h"

#include <ATen/ops/empty.h>

#include <utility>

#include "core/checks.h"
#include "core/huge_pages.h"
#include "cpu/packed.h"

namespace fastdense {
void check_inference(const char* op, const DenseBlockArgs& args) {
  TORCH_CHECK_VALUE(!args.layers.empty(), op, ": expected num_layers to be at least 1, got 0");
  for (const LayerArgs& layer : args.layers)
    TORCH_CHECK_VALUE(!layer.dropped, op, ": expected weights of every layer, got convolutions without channels");
  TORCH_CHECK_VALUE(!args.has_extras(), op, ": expected weights to be those of norms and convolutions, got more");
  TORCH_CHECK_VALUE(!args.any_batch_statistics(), op,
                    ": expected weights to have running statistics for every norm, got a norm without them");
}

PackedLayout::PackedLayout(const DenseBlockArgs& args, const PanelSizes& sizes, const ConvForms& forms) {
  constexpr int64_t kLine = 64;
  const auto take = [](int64_t& at, int64_t size) { return std::exchange(at, at + size); };
  const auto take_panels = [&](int64_t size) { return take(bytes, (size + kLine - 1) / kLine * kLine); };
  const int64_t b = args.width, k = args.growth;
  for (const LayerArgs& layer : args.layers) {
    const int64_t channels = layer.channels, depth = b > 0 ? b : channels;
    Layer at;
    at.coefficients = take(numbers, 2 * channels);
    at.bias1 = take(numbers, b);
    at.conv1 = take_panels(b > 0 ? sizes.conv1x1(channels, b) : 0);
    at.taps = take_panels(forms.taps ? sizes.conv_taps(depth, k) : 0);
    at.squares = take_panels(forms.squares ? sizes.conv_squares(depth, k) : 0);
    layers.push_back(at);
  }
  if (args.tail != Tail::kNone) tail_coefficients = take(numbers, 2 * args.channels());
  if (args.tail == Tail::kTransition)
    tail_conv = take_panels(sizes.conv1x1(args.channels(), args.tail_conv.weight.size(0)));
}

PackedBlock empty_packed(const PackedLayout& layout, const at::TensorOptions& options) {
  const at::ScalarType numbers = statistics_dtype(options.dtype().toScalarType());
  return {layout, at::empty({layout.numbers}, options.dtype(numbers)),
          with_huge_pages(at::empty({layout.bytes}, options.dtype(at::kByte)))};
}

std::vector<at::Tensor> to_list(const PackedBlock& packed) {
  return {packed_header(packed.numbers.options()), packed.numbers, packed.panels};
}

PackedBlock read_packed(const char* op, const PackedLayout& layout, at::TensorList list, at::ScalarType dtype) {
  check_entries(op, "packed", list.size(), 3);
  check_packed_header(op, list[0]);
  check_packed(op, "packed numbers", list[1], dtype, {layout.numbers});
  check_packed(op, "packed panels", list[2], at::kByte, {layout.bytes});
  return {layout, list[1].contiguous(), list[2].contiguous()};
}

}  // namespace fastdense
