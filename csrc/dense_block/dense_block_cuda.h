// SPDX-License-Identifier: Apache-2.0
// The dense block on a CUDA device: the loop over layers between the kernels of cuda/norm_relu/norm_relu_launch.h and
// the library's matrix products and convolutions.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <utility>

#include "cuda/conv1x1/conv1x1.h"
#include "dense_block/dense_block_conv_cuda.h"
#include "dense_block/dense_block_ops.h"

namespace fastdense {

template <typename T>
void dense_block_forward_cuda(const DenseBlockArgs& args, const at::Tensor& input,
                              const std::optional<at::Tensor>& seed, const DenseBlockOutputs& o,
                              const CudaContext& cuda);

template <typename T>
std::vector<at::Tensor> dense_block_backward_cuda(const DenseBlockArgs& args, const DenseBlockSaved& saved,
                                                  const at::Tensor& grad_output, const std::optional<at::Tensor>& seed,
                                                  const std::vector<bool>& needs, at::TensorList weights,
                                                  const CudaContext& cuda);

// What forward and backward share.
template <typename T>
class CudaBlock : public CudaBlockForward<T> {
 public:
  using A = accumulate_t<T>;

  CudaBlock(const DenseBlockArgs& args, const at::TensorOptions& options, const std::optional<at::Tensor>& seed,
            const CudaContext& cuda)
      : CudaBlockForward<T>(options, cuda, args.process_group),
        args(args),
        pixels(args.pixels()),
        ld(args.channels()),
        plans(args, cuda),
        seed_(args.drop_rate > 0 ? seed->const_data_ptr<int64_t>() : nullptr) {
    check_image_pixels("dense_block", args.conv.pixels());
  }

  // Sizes of an image as the library's convolutions take it: at least two spatial dimensions.
  std::vector<int64_t> image_sizes(int64_t channels) const {
    return with_spatial({args.batch, channels}, args.conv.size);
  }
  at::Tensor packed_image(int64_t channels) const { return empty_channels_last(image_sizes(channels), this->options); }

  DropoutParams dropout(int64_t layer) const {
    return {seed_, uint32_t(layer), dropout_threshold(args.drop_rate),
            args.drop_rate < 1 ? 1 / (1 - args.drop_rate) : 0.0};
  }

  // Weights of the layers from `first` on and of the tail, in the storage type with the channels innermost; those of
  // fused convolutions for one direction.
  void pack_weights(int64_t first, bool backward) {
    conv1_.resize(args.layers.size());
    conv2_.resize(args.layers.size());
    const std::vector<int64_t> kernel = with_spatial({}, args.conv.kernel);
    for (size_t l = size_t(first); l < args.layers.size(); ++l) {
      if (args.layers[l].dropped) continue;
      if (args.bottleneck) conv1_[l] = this->pack1x1(args.layers[l].conv1.weight);
      if (plans && backward) {
        conv2_[l] = this->pack_exchanged(args.layers[l].conv2.weight);
        continue;
      }
      at::DimVector sizes{args.growth, args.layers[l].conv2.weight.size(1)};
      sizes.append(kernel.begin(), kernel.end());
      conv2_[l] = this->pack(args.layers[l].conv2.weight, sizes);
    }
    if (args.tail == Tail::kTransition) tail_conv_ = this->pack1x1(args.tail_conv.weight);
    this->launch_packs();
  }
  const at::Tensor& conv1(int64_t l) const { return conv1_[size_t(l)]; }  // [b, c]
  const at::Tensor& conv2(int64_t l) const { return conv2_[size_t(l)]; }  // [k, b or c, kernel], or fused [b * 9, k]
  const at::Tensor& tail_conv() const { return tail_conv_; }              // [co, C]

  // The result z [pixels, b] of a 1x1: one of all that are saved [.., pixels, b], or memory for one at a time.
  struct Bottleneck {
    at::Tensor memory;
    int64_t index = -1;
    at::Tensor tensor() const { return index < 0 ? memory : memory[index]; }
  };
  Matrix<T> rows_of(const Bottleneck& z) const {
    return {this->data(z.memory) + std::max<int64_t>(0, z.index) * pixels * args.width, args.width};
  }

  // z = relu(norm(prefix)) * conv1^T, the same in forward and, when z was not saved, in backward; and mean and variance
  // of its columns where wanted.
  void make_bottleneck(int64_t l, const T* x, const NormParams<A>& norm1, const Bottleneck& to,
                       const BatchStatistics<A>& statistics = {}) const {
    if (fuses_conv1x1<T>(this->cuda, {x, ld}, conv1(l), rows_of(to), pixels))
      return conv1x1<T>(*this, {x, ld}, norm1, conv1(l), rows_of(to), pixels, statistics);
    const int64_t c = args.layers[size_t(l)].channels, step = this->chunk_rows(pixels, c);
    const at::Tensor y = this->workspace(std::min(step, pixels), c), z = to.tensor();
    this->for_each_chunk(pixels, step, [&](int64_t row, int64_t rows, int64_t) {
      this->reduction(launch_activate<T>, {{x + row * ld, ld}, this->matrix(y), norm1, true}, rows, c);
      at::Tensor out = z.narrow(0, row, rows);
      at::mm_out(out, y.narrow(0, 0, rows), conv1(l).t());
    });
    if (statistics.mean) this->statistics(rows_of(to), pixels, args.width, statistics);
  }

  // relu(norm(x)) of a matrix as a packed image.
  at::Tensor activated_image(const Matrix<const T>& x, const NormParams<A>& norm, int64_t channels) const {
    const at::Tensor y = packed_image(channels);
    this->reduction(launch_activate<T>, {x, {this->data(y), channels}, norm, true}, pixels, channels);
    return y;
  }

  // conv2(u) of layer l as a packed image.
  at::Tensor convolved(int64_t l, const at::Tensor& u) const {
    const std::vector<int64_t> padding = half_kernel(), ones(padding.size(), 1), zeros(padding.size(), 0);
    return to_channels_last(at::convolution(u, conv2(l), {}, ones, padding, ones, false, zeros, 1));
  }
  // Gradients of u as a packed image, and of the weight where it is wanted, from that of conv2(u).
  std::pair<at::Tensor, at::Tensor> convolution_gradients(int64_t l, const at::Tensor& d, const at::Tensor& u,
                                                          bool needs_weight) const {
    const std::vector<int64_t> padding = half_kernel(), ones(padding.size(), 1), zeros(padding.size(), 0);
    const auto [du, dweight, none] = at::convolution_backward(d, u, conv2(l), c10::nullopt, ones, padding, ones, false,
                                                              zeros, 1, {true, needs_weight, false});
    return {to_channels_last(du), dweight};
  }

  const DenseBlockArgs& args;
  const int64_t pixels, ld;
  const ConvPlans<T> plans;  // of fused convolutions

 private:
  // Padding of the convolution.
  std::vector<int64_t> half_kernel() const {
    std::vector<int64_t> padding = with_spatial({}, args.conv.kernel);
    for (int64_t& size : padding) size /= 2;
    return padding;
  }
  std::vector<int64_t> with_spatial(std::vector<int64_t> sizes, const int64_t (&spatial)[3]) const {
    return CudaBlockForward<T>::with_spatial(std::move(sizes), spatial, args.spatial.size());
  }

  const int64_t* seed_;
  std::vector<at::Tensor> conv1_, conv2_;
  at::Tensor tail_conv_;
};

}  // namespace fastdense
