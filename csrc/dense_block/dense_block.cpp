// SPDX-License-Identifier: Apache-2.0
#include "dense_block/dense_block.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "core/checks.h"
#include "core/statistics.h"
#include "core/sync_batch_norm.h"

namespace fastdense {
namespace {

Tail parse_tail(const char* op, std::string_view tail) {
  if (tail == "none") return Tail::kNone;
  if (tail == "transition") return Tail::kTransition;
  if (tail == "norm") return Tail::kNorm;
  if (tail == "norm_relu") return Tail::kNormRelu;
  TORCH_CHECK_VALUE(false, op, ": expected tail to be none, transition, norm or norm_relu, got ", tail);
}

// Whether a convolution is that of a dropped layer.
bool is_dropped(const at::Tensor& conv) { return conv.dim() > 2 && conv.size(1) == 0; }

// The first weight that shows how many channels and dimensions the input is to have.
void check_input(const char* op, at::IntArrayRef sizes, at::TensorList weights, int64_t num_layers, Tail tail) {
  if (num_layers > 0 || tail == Tail::kTransition) {
    const at::Tensor& conv = weights[4];  // behind the four tensors of a norm
    TORCH_CHECK_VALUE(conv.dim() < 3 || size_t(conv.dim()) == sizes.size(), op, ": expected input to have ", conv.dim(),
                      " dimensions, got shape ", sizes);
    TORCH_CHECK_VALUE(conv.dim() < 3 || conv.size(1) == sizes[1] || is_dropped(conv), op, ": expected input to have ",
                      conv.size(1), " channels in dimension 1, got shape ", sizes);
  } else if (tail != Tail::kNone) {
    const int64_t channels = weights[0].numel();
    TORCH_CHECK_VALUE(channels == 0 || channels == sizes[1], op, ": expected input to have ", channels,
                      " channels in dimension 1, got shape ", sizes);
  }
}

void read_layers(const char* op, WeightReader& reader, ActivationReader& activations, DenseBlockArgs& args,
                 int64_t num_layers) {
  const size_t dims = args.spatial.size();
  for (int64_t l = 0; l < num_layers; ++l) {
    const std::string name = "layer " + std::to_string(l);
    LayerArgs layer;
    layer.channels = args.in_channels + l * args.growth;
    layer.dropped = is_dropped(reader.at(args.bottleneck ? 9 : 4));
    layer.z_index = args.active_layers();
    int64_t in = layer.channels;
    layer.norm1 = reader.norm(name + ".norm1", in);
    layer.act1 = activations.next();
    const auto first_of_all = [&](const std::string& conv) -> const at::Tensor& {
      if (!layer.dropped) return reader.peek(0, name + conv, dims + 2);
      check_rank(op, (name + conv + ".weight").c_str(), reader.at(0), int64_t(dims) + 2);
      return reader.at(0);
    };
    if (args.bottleneck) {
      if (l == 0) args.width = first_of_all(".conv1").size(0);
      layer.conv1 = reader.conv(name + ".conv1", conv1x1_shape(args.width, layer.dropped ? 0 : in, dims));
      in = args.width;
      layer.norm2 = reader.norm(name + ".norm2", in);
      layer.act2 = activations.next();
    }
    if (l == 0) {
      const at::Tensor& first = first_of_all(".conv2");
      args.growth = first.size(0);
      fill_three(first.sizes().slice(2), args.conv.kernel);
      for (int64_t size : args.conv.kernel)
        TORCH_CHECK_VALUE(size % 2 == 1, op, ": expected the kernel of ", name, ".conv2 to be odd, got ",
                          first.sizes());
    }
    at::DimVector shape{args.growth, layer.dropped ? 0 : in};
    for (size_t d = 0; d < dims; ++d) shape.push_back(args.conv.kernel[d]);
    layer.conv2 = reader.conv(name + ".conv2", shape);
    args.layers.push_back(std::move(layer));
  }
}

void read_tail(const char* op, WeightReader& reader, ActivationReader& activations, DenseBlockArgs& args) {
  if (args.tail == Tail::kNone) return;
  args.tail_norm = reader.norm("tail.norm", args.channels());
  args.tail_act = activations.next();
  if (args.tail == Tail::kNorm && activations.given())
    TORCH_CHECK_VALUE(args.tail_act.kind == Activation::kIdentity, op,
                      ": expected the activation of a tail that is a norm alone to be identity, got ",
                      activations.name());
  if (args.tail != Tail::kTransition) return;
  const int64_t out = reader.peek(0, "tail.conv", args.spatial.size() + 2).size(0);
  args.tail_conv = reader.conv("tail.conv", conv1x1_shape(out, args.channels(), args.spatial.size()));
  for (size_t d = 0; d < 3; ++d) {
    args.pool.size[d] = args.conv.size[d];
    args.pool.window[d] = args.pool.stride[d] = d < args.spatial.size() ? 2 : 1;
    TORCH_CHECK_VALUE(args.conv.size[d] >= args.pool.window[d], op,
                      ": expected every spatial size to be at least 2 in front of the transition's pooling, got ",
                      at::IntArrayRef(args.spatial));
  }
}

void check_groups(const char* op, const DenseBlockArgs& args, const NormArgs& norm, const std::string& name,
                  int64_t channels, bool dropped) {
  if (norm.frozen() || dropped) {
    TORCH_CHECK_VALUE(norm.groups == 0, op, ": expected groups of ", name,
                      " to be 0, as it is frozen or its layer is dropped, got ", norm.groups);
    return;
  }
  TORCH_CHECK_VALUE(norm.groups > 0, op, ": expected groups of ", name,
                    " to be at least 1 like those of other norms, not statistics of the batch, got ", norm.groups);
  TORCH_CHECK_VALUE(channels % norm.groups == 0, op, ": expected groups of ", name, " to divide its ", channels,
                    " channels, got ", norm.groups);
  TORCH_CHECK_VALUE(args.batch * (channels / norm.groups) * args.conv.pixels() != 1, op,
                    ": expected input to have more than 1 value per channel when training, got shape ",
                    at::IntArrayRef(args.sizes(args.in_channels)));
}

// Of all norms, in order.
void read_groups(const char* op, at::IntArrayRef groups, DenseBlockArgs& args) {
  args.per_sample = !groups.empty();
  if (!args.per_sample) return;
  TORCH_CHECK_VALUE(args.process_group.empty(), op, ": expected process_group to be empty with norms of samples, got ",
                    args.process_group);
  const int64_t* next = groups.begin();
  const auto read = [&](NormArgs& norm, const std::string& name, int64_t channels, bool dropped = false) {
    norm.groups = *next++;
    check_groups(op, args, norm, name, channels, dropped);
  };
  for (size_t l = 0; l < args.layers.size(); ++l) {
    LayerArgs& layer = args.layers[l];
    const std::string name = "layer " + std::to_string(l);
    read(layer.norm1, name + ".norm1", layer.channels, layer.dropped);
    if (args.bottleneck) read(layer.norm2, name + ".norm2", args.width, layer.dropped);
  }
  if (args.tail != Tail::kNone) read(args.tail_norm, "tail.norm", args.channels());
}

// What stands behind all norms and convolutions: PReLU's parameters, and biases.
void read_extras(const char* op, WeightReader& reader, DenseBlockArgs& args) {
  const auto slope = [&](ActivationArgs& act, const std::string& name, int64_t channels) {
    act.slope = reader.one_or(name + ".weight", channels);
    TORCH_CHECK_VALUE(act.is_prelu || !act.slope.weight.defined(), op, ": expected ", name,
                      ".weight to be absent, as the activation is not prelu, got shape ", act.slope.weight.sizes());
  };
  for (size_t l = 0; l < args.layers.size(); ++l) {
    LayerArgs& layer = args.layers[l];
    const std::string name = "layer " + std::to_string(l);
    slope(layer.act1, name + ".act1", layer.channels);
    if (args.bottleneck) {
      layer.bias1 = reader.bias(name + ".conv1", args.width);
      slope(layer.act2, name + ".act2", args.width);
    }
    layer.bias2 = reader.bias(name + ".conv2", args.growth);
  }
  if (args.tail == Tail::kNone) return;
  slope(args.tail_act, "tail.act", args.channels());
  if (args.tail == Tail::kTransition) args.tail_bias = reader.bias("tail.conv", args.tail_conv.weight.size(0));
}

void check_prelus(const char* op, const DenseBlockArgs& args) {
  const auto check = [&](const ActivationArgs& act, const std::string& name) {
    TORCH_CHECK_VALUE(!act.is_prelu || act.slope.weight.defined(), op, ": expected ", name,
                      ".weight to be given, as the activation is prelu, got none");
  };
  for (size_t l = 0; l < args.layers.size(); ++l) {
    if (args.layers[l].dropped) continue;
    const std::string name = "layer " + std::to_string(l);
    check(args.layers[l].act1, name + ".act1");
    check(args.layers[l].act2, name + ".act2");
  }
  check(args.tail_act, "tail.act");
}

std::vector<int64_t> readers_of(const DenseBlockArgs& args, size_t weights) {
  const auto layers = int64_t(args.layers.size());
  std::vector<int64_t> readers;
  const auto add = [&](int64_t count, int64_t reader) { readers.insert(readers.end(), size_t(count), reader); };
  for (int64_t l = 0; l < layers; ++l) add(args.bottleneck ? 10 : 5, l);
  if (args.tail != Tail::kNone) add(args.tail == Tail::kTransition ? 5 : 4, layers);
  if (readers.size() < weights)
    for (int64_t l = 0; l < layers; ++l) add(args.bottleneck ? 4 : 2, l);
  readers.resize(weights, layers);
  return readers;
}

}  // namespace

int64_t DenseBlockArgs::active_layers() const {
  return std::count_if(layers.begin(), layers.end(), [](const LayerArgs& layer) { return !layer.dropped; });
}

bool DenseBlockArgs::any_batch_statistics() const {
  for (const LayerArgs& layer : layers)
    if (!layer.dropped && (!layer.norm1.frozen() || (bottleneck && !layer.norm2.frozen()))) return true;
  return tail != Tail::kNone && !tail_norm.frozen();
}

bool DenseBlockArgs::all_statistics() const {
  if (pixels() == 0 || per_sample || !any_batch_statistics()) return false;
  return std::none_of(layers.begin(), layers.end(),
                      [&](const LayerArgs& layer) { return layer.dropped || (bottleneck && layer.norm2.frozen()); });
}

int64_t DenseBlockArgs::lowest_layer(const std::vector<bool>& needs) const {
  int64_t lowest = needs[0] ? 0 : int64_t(layers.size());
  for (size_t i = 0; i < readers.size(); ++i)
    if (needs[i + 1]) lowest = std::min(lowest, readers[i]);
  return lowest;
}

bool DenseBlockArgs::has_extras() const {
  if (per_sample) return true;
  const auto other = [](const ActivationArgs& act) { return act.kind != Activation::kRelu; };
  for (const LayerArgs& layer : layers)
    if (other(layer.act1) || other(layer.act2) || layer.bias1.weight.defined() || layer.bias2.weight.defined())
      return true;
  return (tail != Tail::kNone && tail != Tail::kNorm && other(tail_act)) || tail_bias.weight.defined();
}

std::vector<int64_t> DenseBlockArgs::statistics_sizes() const {
  return per_sample ? std::vector<int64_t>{batch, statistics()} : std::vector<int64_t>{statistics()};
}

std::vector<int64_t> DenseBlockArgs::sizes(int64_t channels, bool pooled) const {
  std::vector<int64_t> sizes{batch, channels};
  for (size_t d = 0; d < spatial.size(); ++d) sizes.push_back(pooled ? pool.pooled(int(d)) : conv.size[d]);
  return sizes;
}

std::vector<int64_t> DenseBlockArgs::out_sizes() const {
  return tail == Tail::kTransition ? sizes(tail_conv.weight.size(0), true) : sizes(channels());
}

DenseBlockArgs parse_dense_block(const char* op, at::IntArrayRef sizes, const at::TensorOptions& options,
                                 at::TensorList weights, const DenseBlockOptions& how) {
  const auto& [eps, num_layers, bottleneck, tail, drop_rate, seed, process_group, names, numbers, groups] = how;
  TORCH_CHECK_VALUE(3 <= sizes.size() && sizes.size() <= 5, op,
                    ": expected input to have 3 to 5 dimensions [N, C, spatial], got shape ", sizes);
  for (const int64_t size : sizes.slice(1)) check_at_least(op, "every size of input but the batch's", size, 1);
  check_at_least(op, "num_layers", num_layers, 0);
  check_at_most(op, "num_layers", num_layers, int64_t(weights.size()));  // so that no product of it is too large
  check_probability(op, "drop_rate", drop_rate);
  TORCH_CHECK_VALUE(drop_rate == 0 || seed.has_value(), op, ": expected seed to be given when drop_rate is ", drop_rate,
                    ", got None");
  if (seed.has_value()) {
    check_seed(op, *seed);
    TORCH_CHECK_VALUE(seed->device() == options.device(), op, ": expected seed to be on ", options.device(),
                      " like input, got ", seed->device());
  }
  check_process_group(op, process_group);
  DenseBlockArgs args;
  args.tail = parse_tail(op, tail);
  const bool has_tail = args.tail != Tail::kNone;
  const int64_t norms = num_layers * (bottleneck ? 2 : 1) + has_tail;
  const int64_t convs = num_layers * (bottleneck ? 2 : 1) + (args.tail == Tail::kTransition);
  const int64_t expected = 4 * norms + convs;
  const bool has_extras = int64_t(weights.size()) == expected + norms + convs && !weights.empty();
  if (!has_extras) check_entries(op, "weights", weights.size(), expected);
  check_entries(op, "eps", eps.size(), norms);
  if (!groups.empty()) check_entries(op, "groups", groups.size(), norms);
  check_input(op, sizes, weights, num_layers, args.tail);
  args.batch = sizes[0];
  args.in_channels = sizes[1];
  args.spatial.assign(sizes.begin() + 2, sizes.end());
  args.bottleneck = bottleneck;
  args.drop_rate = drop_rate;
  args.process_group = process_group;
  fill_three(args.spatial, args.conv.size);
  WeightReader reader(op, weights, eps, options);
  ActivationReader activations(op, names, numbers, norms);
  read_layers(op, reader, activations, args, num_layers);
  read_tail(op, reader, activations, args);
  if (has_extras) read_extras(op, reader, args);
  check_prelus(op, args);
  read_groups(op, groups, args);
  args.constants = reader.constants();
  args.readers = readers_of(args, weights.size());
  TORCH_CHECK_VALUE(args.pixels() != 1 || args.per_sample || !args.any_batch_statistics() || !process_group.empty(), op,
                    ": expected input to have more than 1 value per channel when training, got shape ", sizes);
  return args;
}

DenseBlockSaved check_dense_block_saved(const char* op, const DenseBlockArgs& args, const at::Tensor& grad_output,
                                        const DenseBlockSaved& given) {
  check_channels(op, "buffer", given.buffer, args.channels());
  check_statistics(op, "mean", given.mean, args.statistics_sizes(), "buffer", given.buffer);
  check_statistics(op, "var", given.var, args.statistics_sizes(), "buffer", given.buffer);
  const at::Tensor z =
      kept_rows(op, "z", given.z, {args.active_layers(), args.pixels(), args.width}, "buffer", given.buffer);
  check_like(op, "grad_output", grad_output, "buffer", given.buffer);
  check_shape(op, "grad_output", grad_output, args.out_sizes());
  return {to_channels_last(given.buffer), given.mean.contiguous(), given.var.contiguous(), z};
}

DenseBlockOutputs allocate_dense_block(const DenseBlockArgs& args, const at::TensorOptions& options,
                                       bool keep_bottleneck) {
  const auto statistics = options.dtype(statistics_dtype(options.dtype().toScalarType()));
  const int64_t saved = keep_bottleneck && args.bottleneck ? args.active_layers() : 0;
  DenseBlockOutputs o;
  o.buffer = empty_channels_last(args.sizes(args.channels()), options);
  for (const LayerArgs& layer : args.layers)
    if (layer.dropped) o.buffer.narrow(1, layer.channels, args.growth).zero_();
  const auto [mean, var] = allocate_statistics(args.statistics_sizes(), statistics, args.all_statistics());
  o.mean = mean;
  o.var = var;
  o.z = at::empty({saved, args.pixels(), args.width}, options);
  if (args.tail != Tail::kNone) o.out = empty_channels_last(args.out_sizes(), options);
  return o;
}

}  // namespace fastdense
