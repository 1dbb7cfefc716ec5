// SPDX-License-Identifier: Apache-2.0
// The dual path stage in inference on the CPU, by weights that were packed before, or for the call: all norms are
// frozen, and nothing is kept for backward.  pack_dual_path_stage gives a header (cpu/packed.h), then for each norm and
// the convolution behind
//   coefficients [1, 4, channels]  of the norm
//   panels [bytes]                 of a 1x1 convolution; of a grouped one the numbers that our own kernels read, and
//                                  nothing for the library's
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/storage.h"
#include "cpu/packed.h"
#include "dual_path/dual_path_forward_cpu.h"

namespace fastdense {
namespace {

template <typename T>
class PackedStage : BlockForward<T> {
  using Base = BlockForward<T>;
  using Own = typename DualPathBlocks<T>::Own;

 public:
  PackedStage(const DualPathArgs& args, at::ScalarType dtype) : args_(args), blocks_(args, *this, dtype) {}

  // On the meta device without numbers.
  std::vector<at::Tensor> make(const at::TensorOptions& options) const {
    std::vector<at::Tensor> packed{packed_header(options)};
    for_each_pair([&](const Pair& pair) {
      const bool is_meta = options.device().is_meta();
      packed.push_back(is_meta ? at::empty({1, 4, pair.channels}, options.dtype(Base::kAccumulate))
                               : this->coefficients(pair.norm, nullptr, nullptr, pair.channels).tensor);
      if (is_meta || (pair.is_grouped && !pair.own))
        packed.push_back(at::empty(panel_sizes(pair), options.dtype(panel_type(pair))));
      else
        packed.push_back(pair.own ? pair.own->pack_forward(pair.conv.weight) : this->pack_forward(pair.conv.weight));
    });
    return packed;
  }

  void check(const char* op, at::TensorList packed) const {
    check_entries(op, "packed", packed.size(), 1 + 2 * args_.pairs());
    check_packed_header(op, packed[0]);
    size_t at = 1;
    for_each_pair([&](const Pair& pair) {
      check_packed(op, "packed coefficients", packed[at++], Base::kAccumulate, {1, 4, pair.channels});
      check_packed(op, "packed panels", packed[at++], panel_type(pair), panel_sizes(pair));
    });
  }

 private:
  struct Pair {
    const NormArgs& norm;
    int64_t channels;
    const ConvArgs& conv;
    bool is_grouped = false;
    const Own* own = nullptr;  // the kernels of a grouped convolution, where there are some
  };

  template <typename Visit>
  void for_each_pair(const Visit& visit) const {
    if (args_.projection) visit(Pair{args_.norm_w, args_.in_channels, args_.conv_w});
    for (int64_t i = 0; i < args_.num_blocks(); ++i) {
      const DualPathBlockArgs& block = args_.blocks[size_t(i)];
      const auto& own = blocks_.own(i);
      visit(Pair{block.norm_a, block.channels, block.conv_a});
      visit(Pair{block.norm_b, args_.width_a, block.conv_b, true, own ? &*own : nullptr});
      visit(Pair{block.norm_c, args_.width_b, block.conv_c});
    }
  }

  static at::ScalarType panel_type(const Pair& pair) { return pair.own ? Base::kAccumulate : at::kByte; }
  std::vector<int64_t> panel_sizes(const Pair& pair) const {
    if (pair.own) return pair.own->packed_sizes();
    const at::Tensor& weight = pair.conv.weight;
    if (pair.is_grouped) return {0};
    return {this->padded(weight.size(0)) * this->padded_depth(weight.size(1)) * this->kernels.operand_bytes};
  }

  const DualPathArgs& args_;
  const DualPathBlocks<T> blocks_;
};

void check_inference(const char* op, const DualPathArgs& args) {
  TORCH_CHECK_VALUE(!args.any_batch_statistics(), op,
                    ": expected weights to have running statistics for every norm, got a norm without them");
}

std::vector<at::Tensor> pack_dual_path_stage(at::TensorList weights, at::ArrayRef<double> eps, int64_t in_channels,
                                             int64_t num_blocks, bool projection, int64_t residual_channels,
                                             int64_t stride) {
  constexpr const char* kOp = "pack_dual_path_stage";
  check_at_least(kOp, "number of weights", int64_t(weights.size()), 15);
  const at::Tensor& first = weights[4];
  check_floating(kOp, "the first convolution", first);
  check_rank_between(kOp, "the first convolution", first, 3, 5);
  check_at_least(kOp, "in_channels", in_channels, 1);
  std::vector<int64_t> sizes(size_t(first.dim()), 2);  // any image: what is packed does not depend on its size
  sizes[1] = in_channels;
  const DualPathArgs args = parse_dual_path(kOp, sizes, first.options(), weights,
                                            {eps, num_blocks, projection, residual_channels, stride, ""});
  check_inference(kOp, args);
  std::vector<at::Tensor> packed;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, first.scalar_type(), kOp, [&] {
    packed = PackedStage<typename Storage<scalar_t>::type>(args, first.scalar_type()).make(first.options());
  });
  return packed;
}

at::Tensor dual_path_stage_inference(const at::Tensor& input,  // [N, C_in, spatial]
                                     at::TensorList weights, at::ArrayRef<double> eps, int64_t num_blocks,
                                     bool projection, int64_t residual_channels, int64_t stride, at::TensorList packed,
                                     bool contiguous) {
  constexpr const char* kOp = "dual_path_stage_inference";
  check_floating(kOp, "input", input);
  const DualPathArgs args = parse_dual_path(kOp, input.sizes(), input.options(), weights,
                                            {eps, num_blocks, projection, residual_channels, stride, ""});
  check_inference(kOp, args);
  const DualPathKeep nothing{false, false};
  const DualPathOutputs o = allocate_dual_path(args, input.options(), nothing);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
    using T = typename Storage<scalar_t>::type;
    if (!packed.empty()) PackedStage<T>(args, input.scalar_type()).check(kOp, packed);
    if (!input.is_meta() && args.pixels() > 0)
      DualPathForward<T>(args, nothing, o, input.scalar_type(), packed.empty() ? packed : packed.slice(1)).run(input);
  });
  return contiguous ? o.out.contiguous() : o.out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("pack_dual_path_stage", &pack_dual_path_stage);
  m.impl("dual_path_stage_inference", &dual_path_stage_inference);
}
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) {
  m.impl("pack_dual_path_stage", &pack_dual_path_stage);
  m.impl("dual_path_stage_inference", &dual_path_stage_inference);
}

}  // namespace fastdense
