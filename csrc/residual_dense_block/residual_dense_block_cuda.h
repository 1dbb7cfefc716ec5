// SPDX-License-Identifier: Apache-2.0
// The residual dense block on a CUDA device, between the checks and the kernels.  Knows a stream, but not where it
// comes from: built under FASTDENSE_EMULATE, the same code runs on CPU tensors.
//
// The library's convolutions would copy channels that are a part of the buffer's; so these are packed here, stripe by
// stripe of lines, each with the lines that the kernel sees around it, so small that what is packed and what the
// convolution makes of it stay in the L2 cache.  From device memory the buffer is read once a layer, as if there were
// no copy.  A layer that reads all channels of whole images gets them where they lie.
#pragma once

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/sum.h>

#include <vector>

#include "cuda/block_backward.h"
#include "residual_dense_block/residual_dense_block_launch.h"
#include "residual_dense_block/residual_dense_block_ops.h"

namespace fastdense {

template <typename T>
class ResidualDenseBlockCuda : CudaBlockForward<T> {
  using Base = CudaBlockForward<T>;
  using Base::cuda;
  using typename Base::A;

 public:
  ResidualDenseBlockCuda(const ResidualDenseBlockArgs& args, const at::Tensor& buffer, const CudaContext& cuda)
      : Base(buffer.options(), cuda, {}), args_(args), ld_(args.channels()), buffer_(rows_of(buffer)) {}

  // The input is in the buffer already.  out, outer: packed.
  void forward(const at::Tensor& outer, const at::Tensor& out) {
    pack_weights(0);
    T* x = this->data(buffer_);
    for (size_t l = 0; l < args_.layers.size(); ++l) {
      const ResidualLayerArgs& layer = args_.layers[l];
      const A* b = this->vector(layer.bias.weight);
      for (const Stripe& s : stripes(layer)) {
        const at::Tensor sums = rows_of(
            at::convolution(image(layer, s), weights_[l], {}, kOnes, padding(layer, s), kOnes, false, kZeros, 1));
        const Matrix<const T> from{this->const_data(sums), layer.out};
        if (args_.is_fusion(l))
          this->reduction(launch_residual<T>,
                          {from, Matrix<T>{this->data(out), layer.out}.from_row(s.first), b,
                           Matrix<const T>{x, ld_}.from_row(s.first),
                           outer.defined() ? Matrix<const T>{this->const_data(outer), layer.out}.from_row(s.first)
                                           : Matrix<const T>{},
                           A(args_.scale), A(args_.outer_scale)},
                          s.rows, layer.out);
        else
          this->reduction(launch_append<T>,
                          {from, Matrix<T>{x + layer.end(), ld_}.from_row(s.first), b, A(args_.negative_slope)}, s.rows,
                          layer.out);
      }
    }
  }

  // grad_output: packed.
  std::vector<at::Tensor> backward(const at::Tensor& grad_output, const std::vector<bool>& needs,
                                   at::TensorList weights) {
    CudaBlockBackward<T> grads(*this, needs, weights);
    const int64_t lowest = args_.lowest_layer(needs);
    if (lowest == int64_t(args_.layers.size())) return grads.take();
    pack_weights(size_t(lowest));
    const at::Tensor gradient = at::empty({args_.pixels(), ld_}, this->options);
    if (!args_.fusion) gradient.copy_(rows_of(grad_output));
    g_ = this->data(gradient);
    for (int64_t l = int64_t(args_.layers.size()) - 1; l >= lowest; --l)
      layer_backward(grads, size_t(l), this->const_data(grad_output), l > lowest || needs[0]);
    if (needs[0]) grads.set_input(input_gradient(gradient, this->const_data(grad_output)));
    return grads.take();
  }

 private:
  // Whole images, or lines of one, that go through the convolution together; rows are pixels.
  struct Stripe {
    int64_t images, lines;
    int64_t first, rows;
    int64_t begin, end;  // rows of the images
    int64_t halo;        // lines around it that it sees
  };

  std::vector<Stripe> stripes(const ResidualLayerArgs& layer) const {
    const int64_t line = args_.width, area = std::max<int64_t>(1, args_.height * line),
                  reach = layer.geometry.kernel[0] / 2;
    const int64_t most = whole_waves(cuda.workspace_bytes / (layer.channels * int64_t(sizeof(T))));
    std::vector<Stripe> all;
    if (area <= most) {
      const int64_t step = even_step(args_.batch, most / area);
      this->for_each_chunk(args_.batch, step, [&](int64_t image, int64_t images, int64_t) {
        all.push_back({images, args_.height, image * area, images * area, 0, args_.pixels(), 0});
      });
      return all;
    }
    const int64_t step = even_step(args_.height, std::max<int64_t>(1, most / line - 2 * reach));
    for (int64_t image = 0; image < args_.batch; ++image)
      this->for_each_chunk(args_.height, step, [&](int64_t at, int64_t lines, int64_t) {
        all.push_back({1, lines, image * area + at * line, lines * line, image * area, (image + 1) * area, reach});
      });
    return all;
  }
  // The most pixels up to `most` that the library's tiles, of 128 as a rule, share out evenly among multiprocessors.
  int64_t whole_waves(int64_t most) const {
    constexpr int64_t kTile = 128;
    const int64_t wave = kTile * cuda.multiprocessors();
    return std::max<int64_t>(1, most < wave ? most : most / wave * wave);
  }
  // The largest of even parts of `count` of which none is larger than `most`.
  static int64_t even_step(int64_t count, int64_t most) {
    const int64_t parts = std::max<int64_t>(1, (count + most - 1) / most);
    return std::max<int64_t>(1, (count + parts - 1) / parts);
  }

  std::vector<int64_t> padding(const ResidualLayerArgs& layer, const Stripe& s) const {
    const int64_t half = layer.geometry.kernel[0] / 2;
    return {half - s.halo, half};
  }

  // [pixels, channels]
  static at::Tensor rows_of(const at::Tensor& image) {
    return to_channels_last(image).movedim(1, -1).reshape({-1, image.size(1)});
  }
  at::Tensor image_of(const at::Tensor& rows, const Stripe& s) const {
    return rows.view({s.images, rows.size(0) / (s.images * args_.width), args_.width, rows.size(1)}).movedim(-1, 1);
  }

  // What a layer reads, a packed image.
  at::Tensor image(const ResidualLayerArgs& layer, const Stripe& s) const {
    if (layer.channels == ld_ && s.halo == 0) return image_of(buffer_.narrow(0, s.first, s.rows), s);
    const int64_t around = s.halo * args_.width, rows = s.rows + 2 * around;
    const at::Tensor packed = at::empty({rows, layer.channels}, this->options);
    this->reduction(launch_pack_rows<T>,
                    {{this->const_data(buffer_) + layer.first, ld_},
                     {this->data(packed), layer.channels},
                     s.first - around,
                     s.begin,
                     s.end},
                    rows, layer.channels);
    return image_of(packed, s);
  }

  void pack_weights(size_t first) {
    weights_.resize(args_.layers.size());
    for (size_t l = first; l < weights_.size(); ++l) {
      const at::Tensor& weight = args_.layers[l].conv.weight;
      weights_[l] = this->pack(weight, weight.sizes());
    }
    this->launch_packs();
  }

  void layer_backward(CudaBlockBackward<T>& grads, size_t l, const T* grad_output, bool wants_prefix) {
    const ResidualLayerArgs& layer = args_.layers[l];
    const bool fusion = args_.is_fusion(l), needs_weight = grads.needs(layer.conv.at),
               needs_bias = grads.needs(layer.bias.at);
    const std::vector<Stripe> all = stripes(layer);
    const int64_t splits = this->splits(all.front().rows, layer.out);  // the first is the largest
    const at::Tensor partial = this->numbers({needs_bias ? int64_t(all.size()) * splits : 0, 2, layer.out});
    at::Tensor dweight;
    for (size_t i = 0; i < all.size(); ++i) {
      const Stripe& s = all[i];
      const at::Tensor d = at::empty({s.rows, layer.out}, this->options);
      A* sums = needs_bias ? this->sums(partial) + int64_t(i) * splits * 2 * layer.out : nullptr;
      // the fusion's sums from the block's gradient, those of others from their slice
      const SumsGradientParams<T> params =
          fusion
              ? SumsGradientParams<T>{Matrix<const T>{grad_output, layer.out}.from_row(s.first),
                                      {},
                                      {this->data(d), layer.out},
                                      A(args_.scale * args_.outer_scale),
                                      sums}
              : SumsGradientParams<T>{Matrix<const T>{g_ + layer.end(), ld_}.from_row(s.first),
                                      Matrix<const T>{this->const_data(buffer_) + layer.end(), ld_}.from_row(s.first),
                                      {this->data(d), layer.out},
                                      A(args_.negative_slope),
                                      sums};
      check_launch(launch_sums_gradient<T>(params, s.rows, layer.out, splits, cuda.stream));
      if (!wants_prefix && !needs_weight) continue;
      const auto [dx, part, none] =
          at::convolution_backward(image_of(d, s), image(layer, s), weights_[l], c10::nullopt, kOnes, padding(layer, s),
                                   kOnes, false, kZeros, 1, {wants_prefix, needs_weight, false});
      if (needs_weight) CudaBlockBackward<T>::add(dweight, part.to(this->accumulate()));
      if (wants_prefix) add_prefix(layer, s, rows_of(dx), !fusion);
    }
    if (needs_weight) grads.set(layer.conv.at, dweight);
    if (needs_bias) grads.set(layer.bias.at, at::sum(partial.select(1, 0), {0}, false, at::kDouble));
  }

  // Adds the gradient of what a layer reads, or writes it where nobody did before; neighbouring stripes share the lines
  // around their border, which the upper one was the first to write.
  void add_prefix(const ResidualLayerArgs& layer, const Stripe& s, const at::Tensor& dx, bool add) const {
    const int64_t around = s.halo * args_.width, top = s.first - around;
    const int64_t first = std::max(top, s.begin), end = std::min(s.first + s.rows + around, s.end);
    const int64_t shared = s.first > s.begin ? s.first + around - first : 0;
    this->reduction(launch_add_rows<T>,
                    {Matrix<const T>{this->const_data(dx), layer.channels}.from_row(first - top),
                     Matrix<T>{g_ + layer.first, ld_}.from_row(first), add ? end - first : shared},
                    end - first, layer.channels);
  }

  at::Tensor input_gradient(const at::Tensor& gradient, const T* grad_output) const {
    const int64_t n = args_.in_channels;
    const at::Tensor dx = empty_channels_last(args_.sizes(n), this->options);
    if (!args_.fusion) return rows_of(dx).copy_(gradient.narrow(1, 0, n)), dx;
    this->reduction(launch_residual<T>,
                    {{grad_output, n}, {this->data(dx), n}, nullptr, {g_, ld_}, {}, A(args_.outer_scale), A(1)},
                    args_.pixels(), n);
    return dx;
  }

  static inline const std::vector<int64_t> kOnes{1, 1}, kZeros{0, 0};

  const ResidualDenseBlockArgs& args_;
  const int64_t ld_;
  const at::Tensor buffer_;  // [pixels, C]
  std::vector<at::Tensor> weights_;
  T* g_ = nullptr;  // [pixels, C]
};

}  // namespace fastdense
