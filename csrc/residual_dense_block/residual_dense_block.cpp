// SPDX-License-Identifier: Apache-2.0
#include "residual_dense_block/residual_dense_block.h"

#include <cmath>

#include "core/checks.h"

namespace fastdense {
namespace {

// The layer reads channels [first, end).
void read_layer(WeightReader& reader, ResidualDenseBlockArgs& args, const std::string& name, int64_t first, int64_t end,
                int64_t out, int64_t kernel) {
  ResidualLayerArgs layer;
  layer.first = first;
  const int64_t channels = layer.channels = end - first;
  layer.out = out;
  fill_three({args.height, args.width}, layer.geometry.size);
  fill_three({kernel, kernel}, layer.geometry.kernel);
  layer.conv = reader.conv(name, {out, channels, kernel, kernel});
  layer.bias = reader.bias(name, out);
  args.layers.push_back(layer);
}

}  // namespace

ResidualDenseBlockArgs parse_residual_dense_block(const char* op, at::IntArrayRef sizes,
                                                  const at::TensorOptions& options, at::TensorList weights,
                                                  const ResidualDenseBlockOptions& how) {
  TORCH_CHECK_VALUE(sizes.size() == 4, op, ": expected input to have 4 dimensions [N, C, H, W], got shape ", sizes);
  const int64_t convs = int64_t(weights.size()) / 2, layers = convs - how.fusion;
  TORCH_CHECK_VALUE(layers >= 1 && weights.size() % 2 == 0, op,
                    ": expected weights to be weight and bias of one layer or more",
                    how.fusion ? " and of the fusion" : "", ", got ", weights.size(), " tensors");
  TORCH_CHECK_VALUE(int64_t(how.first_channels.size()) == layers, op, ": expected first_channels to have ", layers,
                    " numbers, one for each layer, got ", how.first_channels.size());
  TORCH_CHECK_VALUE(std::isfinite(how.negative_slope) && how.negative_slope >= 0, op,
                    ": expected negative_slope to be finite and at least 0, got ", how.negative_slope);
  check_finite(op, "scale", how.scale);
  check_finite(op, "outer_scale", how.outer_scale);
  ResidualDenseBlockArgs args;
  args.batch = sizes[0];
  args.in_channels = sizes[1];
  args.height = sizes[2];
  args.width = sizes[3];
  args.fusion = how.fusion;
  args.negative_slope = how.negative_slope;
  args.scale = how.scale;
  args.outer_scale = how.outer_scale;
  const at::Tensor& first = weights[0];
  check_rank(op, "layer 0.weight", first, 4);
  const int64_t growth = first.size(0);
  check_at_least(op, "the growth rate", growth, 1);
  for (int64_t l = 0; l < layers; ++l)
    TORCH_CHECK_VALUE(0 <= how.first_channels[l] && how.first_channels[l] < args.in_channels + l * growth, op,
                      ": expected first_channels[", l, "] to be at least 0 and below ", args.in_channels + l * growth,
                      ", got ", how.first_channels[l]);
  TORCH_CHECK_VALUE(first.size(1) + how.first_channels[0] == sizes[1], op, ": expected input to have ",
                    first.size(1) + how.first_channels[0], " channels in dimension 1, got shape ", sizes);
  WeightReader reader(op, weights, {}, options);
  for (int64_t l = 0; l < layers; ++l)
    read_layer(reader, args, "layer " + std::to_string(l), how.first_channels[l], args.in_channels + l * growth, growth,
               3);
  if (!how.fusion) return args;
  const at::Tensor& fusion = reader.peek(0, "fusion", 4);
  TORCH_CHECK_VALUE(fusion.size(2) == 1 || fusion.size(2) == 3, op,
                    ": expected the kernel of the fusion to be 1x1 or 3x3, got shape ", fusion.sizes());
  read_layer(reader, args, "fusion", 0, args.in_channels + layers * growth, args.in_channels, fusion.size(2));
  return args;
}

int64_t ResidualDenseBlockArgs::lowest_layer(const std::vector<bool>& needs) const {
  size_t l = 0;
  while (!needs[0] && l < layers.size() && !needs[2 * l + 1] && !needs[2 * l + 2]) ++l;
  return int64_t(l);
}

void check_outer(const char* op, const ResidualDenseBlockArgs& args, const at::Tensor& input,
                 const std::optional<at::Tensor>& outer) {
  if (!outer.has_value()) return;
  TORCH_CHECK_VALUE(args.fusion, op, ": expected outer to be None without a fusion, got a tensor");
  check_shape(op, "outer", *outer, input.sizes());
  check_like(op, "outer", *outer, "input", input);
}

}  // namespace fastdense
