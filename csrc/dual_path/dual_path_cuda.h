// SPDX-License-Identifier: Apache-2.0
// The dual path stage on a CUDA device: the loop over blocks between the kernels of cuda/norm_relu/norm_relu_launch.h
// and the library's matrix products and convolutions.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "cuda/conv1x1/conv1x1.h"
#include "cuda/grouped_conv/grouped_conv.h"
#include "dual_path/dual_path_ops.h"

namespace fastdense {

template <typename T>
void dual_path_forward_cuda(const DualPathArgs& args, DualPathKeep keep, const at::Tensor& input,
                            const DualPathOutputs& o, const CudaContext& cuda);

template <typename T>
std::vector<at::Tensor> dual_path_backward_cuda(const DualPathArgs& args, const DualPathSaved& saved,
                                                const at::Tensor& grad_output, const std::vector<bool>& needs,
                                                at::TensorList weights, const CudaContext& cuda);

// What forward and backward share.
template <typename T>
class CudaStage : public CudaBlockForward<T> {
 public:
  using A = accumulate_t<T>;

  CudaStage(const DualPathArgs& args, const at::TensorOptions& options, const CudaContext& cuda)
      : CudaBlockForward<T>(options, cuda, args.process_group),
        args(args),
        pixels(args.pixels()),
        ld(args.channels()),
        r(args.residual),
        first_stride_(args.sampled.stride, args.sampled.stride + spatial_dims()),
        ones_(spatial_dims(), 1),
        zeros_(spatial_dims(), 0) {
    check_image_pixels("dual_path_stage", args.in_pixels() / std::max<int64_t>(1, args.batch));
    fill_three(args.kernel, kernel_);
    for (size_t d = 0; d < spatial_dims(); ++d) half_kernel_.push_back(kernel_[d] / 2);
    if (args.spatial.size() != 2 || kernel_[0] != 3 || kernel_[1] != 3 || args.width_a != args.width_b) return;
    first_plans_ = GroupedPlans<T>(conv_b_shape(0), cuda);
    other_plans_ = args.strided() && args.num_blocks() > 1 ? GroupedPlans<T>(conv_b_shape(1), cuda) : first_plans_;
  }

  // Weights of the projection and of the blocks from `first` on.
  void pack_weights(int64_t first) {
    conv_a_.resize(args.blocks.size());
    conv_b_.resize(args.blocks.size());
    conv_c_.resize(args.blocks.size());
    const std::vector<int64_t> sizes =
        this->with_spatial({args.width_b, args.width_a / args.groups}, kernel_, args.spatial.size());
    for (size_t i = size_t(first); i < args.blocks.size(); ++i) {
      conv_a_[i] = this->pack1x1(args.blocks[i].conv_a.weight);
      conv_b_[i] = this->pack(args.blocks[i].conv_b.weight, sizes);
      conv_c_[i] = this->pack1x1(args.blocks[i].conv_c.weight);
    }
    if (args.projection) conv_w_ = this->pack1x1(args.conv_w.weight);
    this->launch_packs();
  }
  const at::Tensor& conv_a(int64_t i) const { return conv_a_[size_t(i)]; }  // [ra, C_i]
  const at::Tensor& conv_b(int64_t i) const { return conv_b_[size_t(i)]; }  // [rb, ra / groups, kernel]
  const at::Tensor& conv_c(int64_t i) const { return conv_c_[size_t(i)]; }  // [R + K, rb]
  const at::Tensor& conv_w() const { return conv_w_; }                      // [R + D0, C_in]

  // A run of the columns that conv_a reads.
  struct Source {
    Matrix<const T> x;
    int64_t first, columns;  // of the norm's channels
  };
  std::vector<Source> sources(int64_t i, const Matrix<const T>& residual, const T* out) const {
    if (i == 0) return {{residual, 0, args.in_channels}};
    return {{residual, 0, r}, {{out + r, ld}, r, args.dense(i)}};
  }

  // a [pixels of block i, ra] = conv_a(relu(norm_a(sources))); the same in forward and, when a was not saved, backward.
  void make_a(int64_t i, const std::vector<Source>& sources, const NormParams<A>& norm, const at::Tensor& a) const {
    const int64_t rows = args.a_pixels(i);
    if (sources.size() == 1 && fuses_conv1x1<T>(this->cuda, sources[0].x, conv_a(i), this->matrix(a), rows))
      return conv1x1<T>(*this, sources[0].x, norm, conv_a(i), this->matrix(a), rows, {});
    const int64_t c = args.blocks[size_t(i)].channels, step = this->chunk_rows(rows, c);
    const at::Tensor y = this->workspace(std::min(step, rows), c);
    this->for_each_chunk(rows, step, [&](int64_t row, int64_t count, int64_t) {
      for (const Source& s : sources)
        this->reduction(launch_activate<T>,
                        {s.x.from_row(row), this->matrix(y).from_column(s.first), norm.from_channel(s.first), true},
                        count, s.columns);
      at::Tensor to = a.narrow(0, row, count);
      at::mm_out(to, y.narrow(0, 0, count), conv_a(i).t());
    });
  }

  // Of our own kernels for conv_b of block i; none where the library has it.
  const GroupedPlans<T>& plans(int64_t i) const { return i == 0 ? first_plans_ : other_plans_; }
  GroupedShape conv_b_shape(int64_t i) const {
    const PoolGeometry& g = args.sampled;
    const bool first = i == 0;
    return {args.batch,  first ? g.size[0] : g.pooled(0), first ? g.size[1] : g.pooled(1), first ? g.stride[0] : 1,
            args.groups, args.width_a / args.groups};
  }

  // b [pixels, rb] = conv_b(relu(norm(a))) of block i, into `b` if it is defined, and mean and variance of its columns
  // where wanted; the same in forward and, when b was not saved, backward.
  at::Tensor make_b(int64_t i, const at::Tensor& a, const NormParams<A>& norm, at::Tensor b,
                    const BatchStatistics<A>& statistics) const {
    if (const GroupedPlans<T>& own = plans(i)) {
      if (!b.defined()) b = at::empty({pixels, args.width_b}, this->options);
      grouped_conv<T>(*this, own.forward, this->const_data(a), norm, conv_b(i), this->matrix(b), pixels, statistics);
      return b;
    }
    const at::Tensor image = convolution(i, activated_image(i, a, norm));
    if (b.defined()) {
      b.view(image.movedim(1, -1).sizes()).copy_(image.movedim(1, -1));
    } else {
      b = rows_of(to_channels_last(image));
    }
    if (statistics.mean) this->statistics(this->matrix(b), pixels, args.width_b, statistics);
    return b;
  }

  // The input of conv_b of block i, relu(norm_b(a)), as a packed image.
  at::Tensor activated_image(int64_t i, const at::Tensor& a, const NormParams<A>& norm) const {
    const at::Tensor u = empty_channels_last(image_sizes(args.width_a, i == 0), this->options);
    this->reduction(launch_activate<T>,
                    {{this->const_data(a), args.width_a}, {this->data(u), args.width_a}, norm, true}, args.a_pixels(i),
                    args.width_a);
    return u;
  }
  at::Tensor convolution(int64_t i, const at::Tensor& u) const {
    return at::convolution(u, conv_b(i), {}, stride(i), half_kernel_, ones_, false, zeros_, args.groups);
  }

  // Sizes of an image as the library's convolutions take it, in front of or behind the stride.
  std::vector<int64_t> image_sizes(int64_t channels, bool in_front) const {
    const PoolGeometry& g = args.sampled;
    const int64_t behind[3] = {g.pooled(0), g.pooled(1), g.pooled(2)};
    return this->with_spatial({args.batch, channels}, in_front ? g.size : behind, args.spatial.size());
  }
  // Pixels by channels, of a tensor with the channels innermost.
  static at::Tensor rows_of(const at::Tensor& image) {
    return image.movedim(1, -1).reshape({image.numel() / image.size(1), image.size(1)});
  }

  const std::vector<int64_t>& stride(int64_t i) const { return i == 0 ? first_stride_ : ones_; }
  const std::vector<int64_t>& half_kernel() const { return half_kernel_; }
  const std::vector<int64_t>& ones() const { return ones_; }
  const std::vector<int64_t>& zeros() const { return zeros_; }

  const DualPathArgs& args;
  const int64_t pixels, ld, r;

 private:
  size_t spatial_dims() const { return std::max<size_t>(2, args.spatial.size()); }

  int64_t kernel_[3];
  std::vector<int64_t> first_stride_, ones_, zeros_, half_kernel_;
  std::vector<at::Tensor> conv_a_, conv_b_, conv_c_;
  at::Tensor conv_w_;
  GroupedPlans<T> first_plans_, other_plans_;  // of the first block, which may have a stride, and of those behind it
};

}  // namespace fastdense
