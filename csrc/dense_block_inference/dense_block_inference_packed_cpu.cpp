// SPDX-License-Identifier: Apache-2.0
#include "dense_block_inference/dense_block_inference.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <string>

#include "core/checks.h"
#include "cpu/simd/isa.h"

namespace fastdense {
namespace {

// Takes the tensors in order.
class Reader {
 public:
  Reader(const char* op, at::TensorList packed, at::ScalarType dtype) : op_(op), packed_(packed), dtype_(dtype) {}

  void header() {
    const at::Tensor& t = take("packed header", at::kLong);
    check_shape(op_, "packed header", t, {1});
    if (t.is_meta()) return;
    const int64_t isa = *t.contiguous().const_data_ptr<int64_t>();
    TORCH_CHECK_VALUE(isa == int64_t(current_isa()), op_, ": expected packed to be made for ", isa_name(current_isa()),
                      ", got instruction set ", isa, "; pack again");
  }

  at::Tensor numbers(const std::string& name, at::IntArrayRef shape) {
    const at::Tensor& t = take(name, dtype_);
    check_shape(op_, name.c_str(), t, shape);
    return t.contiguous();
  }

  at::Tensor panels(const std::string& name, int64_t bytes) {
    const at::Tensor& t = take(name, at::kByte);
    check_shape(op_, name.c_str(), t, {bytes});
    return t.contiguous();
  }

 private:
  const at::Tensor& take(const std::string& name, at::ScalarType dtype) {
    const at::Tensor& t = packed_[next_++];
    check_dtype(op_, name.c_str(), t, dtype);
    TORCH_CHECK_VALUE(t.device().is_cpu() || t.is_meta(), op_, ": expected ", name, " to be on the CPU, got ",
                      t.device());
    return t;
  }

  const char* op_;
  at::TensorList packed_;
  const at::ScalarType dtype_;
  size_t next_ = 0;
};

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
  const auto numbers = options.dtype(statistics_dtype(options.dtype().toScalarType()));
  const auto panels = [&](int64_t bytes) { return at::empty({bytes}, options.dtype(at::kByte)); };
  std::vector<at::Tensor> list{at::empty({1}, options.dtype(at::kLong))};
  const int64_t b = args.width;
  for (const LayerArgs& layer : args.layers) {
    const int64_t channels = layer.channels;
    list.insert(list.end(), {at::empty({2, channels}, numbers), panels(b > 0 ? sizes.conv1x1(channels, b) : 0),
                             at::empty({b}, numbers), panels(sizes.conv(b > 0 ? b : channels, args.growth))});
  }
  if (args.tail != Tail::kNone) list.push_back(at::empty({2, args.channels()}, numbers));
  if (args.tail == Tail::kTransition)
    list.push_back(panels(sizes.conv1x1(args.channels(), args.tail_conv.weight.size(0))));
  return list;
}

PackedBlock read_packed(const char* op, const DenseBlockArgs& args, at::TensorList list, const PanelSizes& sizes,
                        at::ScalarType dtype) {
  const int64_t of_tail = args.tail == Tail::kNone ? 0 : args.tail == Tail::kTransition ? 2 : 1;
  check_entries(op, "packed", list.size(), 1 + 4 * int64_t(args.layers.size()) + of_tail);
  Reader reader(op, list, dtype);
  reader.header();
  PackedBlock packed;
  for (size_t l = 0; l < args.layers.size(); ++l) {
    const std::string name = "packed layer " + std::to_string(l);
    const int64_t channels = args.layers[l].channels, b = args.width;
    PackedLayer layer;
    layer.coefficients = reader.numbers(name + " coefficients", {2, channels});
    layer.conv1 = reader.panels(name + " conv1", b > 0 ? sizes.conv1x1(channels, b) : 0);
    layer.bias1 = reader.numbers(name + " bias1", {b});
    layer.conv2 = reader.panels(name + " conv2", sizes.conv(b > 0 ? b : channels, args.growth));
    packed.layers.push_back(std::move(layer));
  }
  if (args.tail != Tail::kNone)
    packed.tail_coefficients = reader.numbers("packed tail coefficients", {2, args.channels()});
  if (args.tail == Tail::kTransition)
    packed.tail_conv = reader.panels("packed tail conv", sizes.conv1x1(args.channels(), args.tail_conv.weight.size(0)));
  return packed;
}

}  // namespace fastdense
