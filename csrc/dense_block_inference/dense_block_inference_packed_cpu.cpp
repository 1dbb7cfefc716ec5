// SPDX-License-Identifier: Apache-2.0
#include "dense_block_inference/dense_block_inference.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <string>

#include "core/checks.h"
#include "cpu/simd/isa.h"

namespace fastdense {
namespace {

// A tensor behind the header: numbers, or the bytes of panels.
struct Part {
  std::string name;
  std::vector<int64_t> shape;
  bool is_panels = false;
};

std::vector<Part> parts_of(const DenseBlockArgs& args, const PanelSizes& sizes) {
  std::vector<Part> parts;
  const int64_t b = args.width;
  for (size_t l = 0; l < args.layers.size(); ++l) {
    const std::string name = "packed layer " + std::to_string(l);
    const int64_t channels = args.layers[l].channels;
    parts.push_back({name + " coefficients", {2, channels}});
    parts.push_back({name + " conv1", {b > 0 ? sizes.conv1x1(channels, b) : 0}, true});
    parts.push_back({name + " bias1", {b}});
    parts.push_back({name + " conv2", {sizes.conv(b > 0 ? b : channels, args.growth)}, true});
  }
  if (args.tail != Tail::kNone) parts.push_back({"packed tail coefficients", {2, args.channels()}});
  if (args.tail == Tail::kTransition)
    parts.push_back({"packed tail conv", {sizes.conv1x1(args.channels(), args.tail_conv.weight.size(0))}, true});
  return parts;
}

void check_on_cpu(const char* op, const char* name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, shape);
  TORCH_CHECK_VALUE(t.device().is_cpu() || t.is_meta(), op, ": expected ", name, " to be on the CPU, got ", t.device());
}

void check_header(const char* op, const at::Tensor& t) {
  check_on_cpu(op, "packed header", t, at::kLong, {1});
  if (t.is_meta()) return;
  const int64_t isa = *t.contiguous().const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(isa == int64_t(current_isa()), op, ": expected packed to be made for ", isa_name(current_isa()),
                    ", got instruction set ", isa, "; pack again");
}

}  // namespace

void check_inference(const char* op, const DenseBlockArgs& args) {
  TORCH_CHECK_VALUE(!args.layers.empty(), op, ": expected num_layers to be at least 1, got 0");
  for (const LayerArgs& layer : args.layers)
    TORCH_CHECK_VALUE(!layer.dropped, op, ": expected weights of every layer, got convolutions without channels");
  TORCH_CHECK_VALUE(!args.has_extras(), op, ": expected weights to be those of norms and convolutions, got more");
  TORCH_CHECK_VALUE(!args.any_batch_statistics(), op,
                    ": expected weights to have running statistics for every norm, got a norm without them");
}

std::vector<at::Tensor> to_list(const PackedBlock& packed, const DenseBlockArgs& args) {
  std::vector<at::Tensor> list{at::full({1}, int64_t(current_isa()), at::kLong)};
  for (const PackedLayer& layer : packed.layers)
    list.insert(list.end(), {layer.coefficients, layer.conv1, layer.bias1, layer.conv2});
  if (args.tail != Tail::kNone) list.push_back(packed.tail_coefficients);
  if (args.tail == Tail::kTransition) list.push_back(packed.tail_conv);
  return list;
}

std::vector<at::Tensor> empty_packed(const DenseBlockArgs& args, const PanelSizes& sizes,
                                     const at::TensorOptions& options) {
  const at::ScalarType numbers = statistics_dtype(options.dtype().toScalarType());
  std::vector<at::Tensor> list{at::empty({1}, options.dtype(at::kLong))};
  for (const Part& part : parts_of(args, sizes))
    list.push_back(at::empty(part.shape, options.dtype(part.is_panels ? at::kByte : numbers)));
  return list;
}

PackedBlock read_packed(const char* op, const DenseBlockArgs& args, at::TensorList list, const PanelSizes& sizes,
                        at::ScalarType dtype) {
  const std::vector<Part> parts = parts_of(args, sizes);
  check_entries(op, "packed", list.size(), 1 + int64_t(parts.size()));
  check_header(op, list[0]);
  std::vector<at::Tensor> tensors;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    check_on_cpu(op, part.name.c_str(), list[i + 1], part.is_panels ? at::kByte : dtype, part.shape);
    tensors.push_back(list[i + 1].contiguous());
  }
  PackedBlock packed;
  auto next = tensors.begin();
  for (size_t l = 0; l < args.layers.size(); ++l, next += 4)
    packed.layers.push_back({next[0], next[1], next[2], next[3]});
  if (args.tail != Tail::kNone) packed.tail_coefficients = next[0];
  if (args.tail == Tail::kTransition) packed.tail_conv = next[1];
  return packed;
}

}  // namespace fastdense
