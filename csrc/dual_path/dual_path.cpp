// SPDX-License-Identifier: Apache-2.0
#include "dual_path/dual_path.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "core/checks.h"
#include "core/sync_batch_norm.h"

namespace fastdense {
namespace {

// `count` statistics more; returns where they start.
int64_t add_statistics(DualPathArgs& args, int64_t count) {
  const int64_t start = args.statistics;
  args.statistics += count;
  return start;
}

void read_projection(const char* op, WeightReader& reader, DualPathArgs& args) {
  args.norm_w = reader.norm("projection.norm", args.in_channels);
  args.stats_w = add_statistics(args, args.in_channels);
  const int64_t out = reader.peek(0, "projection.conv", args.spatial.size() + 2).size(0);
  args.conv_w = reader.conv("projection.conv", conv1x1_shape(out, args.in_channels, args.spatial.size()));
  TORCH_CHECK_VALUE(out >= args.residual, op,
                    ": expected projection.conv to have at least residual_channels = ", args.residual,
                    " output channels, got ", out);
  args.first_dense = out - args.residual;
}

// Widths, kernel and groups, from the first block's convolutions.
void read_widths(const char* op, const WeightReader& reader, DualPathArgs& args) {
  const size_t dims = args.spatial.size();
  args.width_a = reader.peek(4, "block 0.conv_a", dims + 2).size(0);
  const at::Tensor& conv_b = reader.peek(9, "block 0.conv_b", dims + 2);
  args.width_b = conv_b.size(0);
  TORCH_CHECK_VALUE(args.width_a % conv_b.size(1) == 0 && args.width_b % (args.width_a / conv_b.size(1)) == 0, op,
                    ": expected block 0.conv_b to divide ", args.width_a, " input and ", args.width_b,
                    " output channels into groups, got shape ", conv_b.sizes());
  args.groups = args.width_a / conv_b.size(1);
  args.kernel.assign(conv_b.sizes().begin() + 2, conv_b.sizes().end());
  for (const int64_t size : args.kernel)
    TORCH_CHECK_VALUE(size % 2 == 1, op, ": expected the kernel of block 0.conv_b to be odd, got ", conv_b.sizes());
  const int64_t out = reader.peek(14, "block 0.conv_c", dims + 2).size(0);
  TORCH_CHECK_VALUE(out >= args.residual, op,
                    ": expected block 0.conv_c to have at least residual_channels = ", args.residual,
                    " output channels, got ", out);
  args.growth = out - args.residual;
}

DualPathBlockArgs read_block(WeightReader& reader, DualPathArgs& args, int64_t index) {
  const std::string name = "block " + std::to_string(index);
  const size_t dims = args.spatial.size();
  DualPathBlockArgs block;
  block.channels = index == 0 ? args.in_channels : args.residual + args.dense(index);
  block.norm_a = reader.norm(name + ".norm_a", block.channels);
  block.stats_a = add_statistics(args, block.channels);
  block.conv_a = reader.conv(name + ".conv_a", conv1x1_shape(args.width_a, block.channels, dims));
  block.norm_b = reader.norm(name + ".norm_b", args.width_a);
  block.stats_b = add_statistics(args, args.width_a);
  std::vector<int64_t> shape{args.width_b, args.width_a / args.groups};
  shape.insert(shape.end(), args.kernel.begin(), args.kernel.end());
  block.conv_b = reader.conv(name + ".conv_b", shape);
  block.norm_c = reader.norm(name + ".norm_c", args.width_b);
  block.stats_c = add_statistics(args, args.width_b);
  block.conv_c = reader.conv(name + ".conv_c", conv1x1_shape(args.residual + args.growth, args.width_b, dims));
  return block;
}

void check_counts(const char* op, at::TensorList weights, at::ArrayRef<double> eps, int64_t num_blocks,
                  bool projection) {
  const int64_t expected = 15 * num_blocks + 5 * projection, norms = 3 * num_blocks + projection;
  check_entries(op, "weights", weights.size(), expected);
  check_entries(op, "eps", eps.size(), norms);
}

// The first convolution shows how many channels and dimensions the input is to have.
void check_input(const char* op, at::IntArrayRef sizes, const at::Tensor& conv) {
  TORCH_CHECK_VALUE(conv.dim() < 3 || size_t(conv.dim()) == sizes.size(), op, ": expected input to have ", conv.dim(),
                    " dimensions, got shape ", sizes);
  TORCH_CHECK_VALUE(conv.dim() < 3 || conv.size(1) == sizes[1], op, ": expected input to have ", conv.size(1),
                    " channels in dimension 1, got shape ", sizes);
}

}  // namespace

bool DualPathArgs::any_batch_statistics() const {
  for (const DualPathBlockArgs& block : blocks)
    if (!block.norm_a.frozen() || !block.norm_b.frozen() || !block.norm_c.frozen()) return true;
  return projection && !norm_w.frozen();
}

int64_t DualPathArgs::lowest_block(const std::vector<bool>& needs) const {
  const int64_t first = std::find(needs.begin(), needs.end(), true) - needs.begin();
  const int64_t before = 1 + 5 * projection;  // the input, and the projection
  return first < before ? 0 : std::min((first - before) / 15, num_blocks());
}

std::vector<int64_t> DualPathArgs::sizes(int64_t channels, bool of_input) const {
  std::vector<int64_t> sizes{batch, channels};
  for (size_t d = 0; d < spatial.size(); ++d) sizes.push_back(of_input ? spatial[d] : sampled.pooled(int(d)));
  return sizes;
}

DualPathArgs parse_dual_path(const char* op, at::IntArrayRef sizes, const at::TensorOptions& options,
                             at::TensorList weights, const DualPathOptions& how) {
  const auto& [eps, num_blocks, projection, residual_channels, given_stride, process_group] = how;
  TORCH_CHECK_VALUE(3 <= sizes.size() && sizes.size() <= 5, op,
                    ": expected input to have 3 to 5 dimensions [N, C, spatial], got shape ", sizes);
  for (const int64_t size : sizes.slice(1)) check_at_least(op, "every size of input but the batch's", size, 1);
  check_at_least(op, "num_blocks", num_blocks, 1);
  check_at_most(op, "num_blocks", num_blocks, int64_t(weights.size()));  // so that no product of it is too large
  check_at_least(op, "residual_channels", residual_channels, 0);
  check_at_least(op, "stride", given_stride, 1);
  TORCH_CHECK_VALUE(projection || given_stride == 1, op, ": expected stride to be 1 without a projection, got ",
                    given_stride);
  check_counts(op, weights, eps, num_blocks, projection);
  check_input(op, sizes, weights[4]);
  check_process_group(op, process_group);
  DualPathArgs args;
  args.batch = sizes[0];
  args.in_channels = sizes[1];
  args.residual = residual_channels;
  args.projection = projection;
  args.process_group = process_group;
  args.spatial.assign(sizes.begin() + 2, sizes.end());
  fill_three(args.spatial, args.sampled.size);
  const int64_t stride =
      std::min(given_stride, std::max<int64_t>(1, *std::max_element(args.spatial.begin(), args.spatial.end())));
  for (size_t d = 0; d < 3; ++d) {
    args.sampled.window[d] = 1;
    args.sampled.stride[d] = d < args.spatial.size() ? stride : 1;
  }
  WeightReader reader(op, weights, eps, options);
  if (projection) {
    read_projection(op, reader, args);
  } else {
    TORCH_CHECK_VALUE(args.in_channels >= args.residual, op,
                      ": expected input to have at least residual_channels = ", args.residual,
                      " channels in dimension 1, got shape ", sizes);
    args.first_dense = args.in_channels - args.residual;
  }
  read_widths(op, reader, args);
  for (int64_t i = 0; i < num_blocks; ++i) args.blocks.push_back(read_block(reader, args, i));
  args.constants = reader.constants();
  TORCH_CHECK_VALUE(args.pixels() != 1 || !args.any_batch_statistics() || !process_group.empty(), op,
                    ": expected input to have more than 1 value per channel when training, got shape ", sizes);
  return args;
}

DualPathKeep parse_dual_path_memory(const char* op, std::string_view memory) {
  if (memory == "balanced") return {true, true};
  if (memory == "min") return {true, false};
  if (memory == "reversible") return {false, true};
  if (memory == "recompute" || memory == "nothing") return {false, false};
  TORCH_CHECK_VALUE(false, op, ": expected memory to be balanced, min, reversible, recompute or nothing, got ", memory);
}

DualPathSaved check_dual_path_saved(const char* op, const DualPathArgs& args, const at::Tensor& grad_output,
                                    const DualPathSaved& given) {
  const int64_t n = args.num_blocks();
  const auto& [input, out, residuals, a, b, mean, var] = given;
  check_like(op, "out", out, "input", input);
  check_shape(op, "out", out, args.sizes(args.channels()));
  check_statistics(op, "mean", mean, args.statistics, "input", input);
  check_statistics(op, "var", var, args.statistics, "input", input);
  check_like(op, "grad_output", grad_output, "input", input);
  check_shape(op, "grad_output", grad_output, out.sizes());
  DualPathSaved saved{to_channels_last(input),
                      to_channels_last(out),
                      kept_rows(op, "residuals", residuals, {n - 1, args.pixels(), args.residual}, "input", input),
                      kept_rows(op, "a", a, {args.a_row(n), args.width_a}, "input", input),
                      kept_rows(op, "b", b, {n * args.pixels(), args.width_b}, "input", input),
                      mean.contiguous(),
                      var.contiguous()};
  TORCH_CHECK_VALUE(is_absent(a) == is_absent(b), op, ": expected a and b to be given together, got one of them");
  if (n > 1 && is_absent(residuals)) {  // they are made again
    TORCH_CHECK_VALUE(!is_absent(a) || args.pixels() == 0, op, ": expected residuals or a to be given, got neither");
    TORCH_CHECK_TYPE(input.element_size() > 2, op, ": expected input to be float32 or float64 without residuals, got ",
                     dtype_name(input.scalar_type()));
  }
  return saved;
}

DualPathOutputs allocate_dual_path(const DualPathArgs& args, const at::TensorOptions& options, DualPathKeep keep) {
  const auto statistics = options.dtype(statistics_dtype(options.dtype().toScalarType()));
  const int64_t n = args.num_blocks();
  DualPathOutputs o;
  o.out = empty_channels_last(args.sizes(args.channels()), options);
  o.residuals = at::empty({keep.residuals ? n - 1 : 0, args.pixels(), args.residual}, options);
  o.a = at::empty({keep.bottlenecks ? args.a_row(n) : 0, args.width_a}, options);
  o.b = at::empty({keep.bottlenecks ? n * args.pixels() : 0, args.width_b}, options);
  o.mean = at::zeros({args.statistics}, statistics);
  o.var = at::zeros({args.statistics}, statistics);
  return o;
}

}  // namespace fastdense
