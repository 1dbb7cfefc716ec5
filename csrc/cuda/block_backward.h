// SPDX-License-Identifier: Apache-2.0
// What the backward passes of blocks share on CUDA: which gradients are wanted, norms, 1x1 convolutions.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>

#include <utility>
#include <vector>

#include "cuda/conv1x1/conv1x1.h"

namespace fastdense {

// Where the deferred corrections of a run of channels are added up; nowhere if nullptr.
struct CudaCorrections {
  double *shift_sum = nullptr, *slope_sum = nullptr;
};

template <typename T>
class CudaBlockBackward {
 public:
  using A = accumulate_t<T>;
  using Partials = typename CudaBlockForward<T>::Partials;

  // needs: whether the gradients of the input and of each weight are wanted.
  CudaBlockBackward(const CudaBlockForward<T>& block, const std::vector<bool>& needs, at::TensorList weights)
      : block_(block), needs_(needs), weights_(weights), grads_(needs.size()) {}

  bool needs(int64_t weight) const { return needs_[size_t(weight) + 1]; }
  bool needs_input() const { return needs_[0]; }
  void set_input(const at::Tensor& value) { grads_[0] = value; }
  void set(int64_t weight, const at::Tensor& value) {
    if (needs(weight)) grads_[size_t(weight) + 1] = laid_out_like(value, weights_[size_t(weight)]);
  }
  // All of them, empty where none is wanted.
  std::vector<at::Tensor> take() {
    for (at::Tensor& grad : grads_)
      if (!grad.defined()) grad = at::empty({0}, block_.options);  // results do not share memory
    return std::move(grads_);
  }

  struct Sums {
    at::Tensor dweight, dbias;  // [channels] of a norm
  };
  Sums sums(int64_t channels) const { return {block_.numbers({channels}), block_.numbers({channels})}; }

  // Adds up partial sums of channels [first, ...) of a norm over `count` values; `norm` starts there, too.
  // And what a weight's gradient still needs.
  void finalise(const NormArgs& args, const NormParams<A>& norm, const PartialSums<A>& partial, int64_t count,
                const CudaCorrections& corrections, const Sums& s, int64_t first = 0,
                const SumPartialsParams<A>& weight = {}) const {
    const CudaCorrections to = args.frozen() ? CudaCorrections{} : corrections;
    check_launch(
        launch_finalise_sums<A>({partial.data, partial.splits, norm, block_.sums(s.dweight) + first,
                                 block_.sums(s.dbias) + first, to.shift_sum, to.slope_sum, 1.0 / double(count)},
                                partial.columns, weight, block_.cuda.stream));
  }
  void set_norm(const NormArgs& args, const Sums& s) {
    if (args.weight.defined()) set(args.at, s.dweight);
    if (args.bias.defined()) set(args.at + 1, s.dbias);
  }

  // du, the gradient of relu(norm(z)), becomes that of z.
  void norm_backward(const NormArgs& args, const NormParams<A>& norm, const Matrix<T>& du, const Matrix<const T>& z,
                     int64_t rows, int64_t columns) {
    const Partials partial = block_.partials(rows, columns);
    block_.reduction(launch_mask_reduce<T>, {du, z, norm, block_.sums(partial.tensor)}, rows, columns);
    norm_backward(args, norm, partial.all(), du, z, rows, columns);
  }
  // From partial sums, as launch_mask_reduce takes them; adds up a weight's gradient in passing.
  void norm_backward(const NormArgs& args, const NormParams<A>& norm, const PartialSums<A>& partial,
                     const Matrix<T>& du, const Matrix<const T>& z, int64_t rows, int64_t columns,
                     const SumPartialsParams<A>& weight = {}) {
    const Sums s = sums(columns);
    finalise(args, norm, partial, rows, {}, s, 0, weight);
    set_norm(args, s);
    const A inv_count = args.frozen() ? A(0) : A(1.0 / double(rows));
    const bool shared = block_.sync.enabled() && !args.frozen();
    const at::Tensor terms = shared ? at::stack({s.dbias, s.dweight}) : at::Tensor();
    if (shared) block_.sync.sums(terms, rows);
    block_.reduction(
        launch_input_gradient<T>,
        {du, z, norm, block_.sums(shared ? terms[0] : s.dbias), block_.sums(shared ? terms[1] : s.dweight), inv_count},
        rows, columns);
  }

  // left^T * right over pixels, in the type of sums: the library may add partial sums of 16-bit results in 16 bits.
  at::Tensor over_pixels(const at::Tensor& left, const at::Tensor& right) const {
    const at::ScalarType type = block_.accumulate();
    if (left.scalar_type() == type) return at::mm(left.t(), right);
    if (left.is_cuda()) return at::mm(left.t(), right, type);
    return at::mm(left.t().to(type), right.to(type));  // hosts know no such product
  }
  static void add(at::Tensor& total, const at::Tensor& part) { total = total.defined() ? total.add_(part) : part; }

  // A run of the columns that a 1x1 reads through a norm and ReLU, and the gradient that they add to.
  struct Segment {
    Matrix<const T> x;
    Matrix<T> gradient;
    int64_t first, columns;  // of the norm's channels
    CudaCorrections corrections;
    bool add = true;  // else the gradient is written
  };

  // Backward of a 1x1 with the gradient dz [pixels, n] of its output, and of the norm and ReLU in front of it.
  void conv1x1_backward(const ConvArgs& conv, const at::Tensor& packed, const NormArgs& args, const NormParams<A>& norm,
                        const at::Tensor& dz, const std::vector<Segment>& segments) {
    if (segments.size() == 1 &&
        fuses_conv1x1<T>(block_.cuda, segments[0].x, packed, block_.const_matrix(dz), dz.size(0)) &&
        has_rows_of(4, segments[0].gradient, segments[0].columns))
      return fused_conv1x1_backward(conv, packed, args, norm, dz, segments[0]);
    const int64_t pixels = dz.size(0), c = packed.size(1), step = block_.chunk_rows(pixels, c);
    std::vector<Partials> partial;
    for (const Segment& s : segments) partial.push_back(block_.partials(pixels, step, s.columns));
    const at::Tensor y = block_.workspace(std::min(step, pixels), c);
    const Matrix<T> dy = block_.matrix(y);
    at::Tensor dweight;
    block_.for_each_chunk(pixels, step, [&](int64_t row, int64_t count, int64_t chunk) {
      const at::Tensor left = dz.narrow(0, row, count);
      at::Tensor right = y.narrow(0, 0, count);
      at::mm_out(right, left, packed);
      for (size_t i = 0; i < segments.size(); ++i) {
        const Segment& s = segments[i];
        check_launch(
            launch_accumulate<T>({s.x.from_row(row), dy.from_column(s.first), s.gradient.from_row(row),
                                  norm.from_channel(s.first), partial[i].of_chunk(chunk), true, needs(conv.at), s.add},
                                 count, s.columns, partial[i].splits, block_.cuda.stream));
      }
      if (needs(conv.at)) add(dweight, over_pixels(left, right));
    });
    if (dweight.defined()) set(conv.at, dweight);
    const Sums total = sums(c);
    for (size_t i = 0; i < segments.size(); ++i)
      finalise(args, norm.from_channel(segments[i].first), partial[i].all(), pixels, segments[i].corrections, total,
               segments[i].first);
    set_norm(args, total);
  }

  // The same for a 1x1 that reads means over windows of `images` images: dz [pooled pixels, n].
  void pooled_conv1x1_backward(const ConvArgs& conv, const at::Tensor& packed, const NormArgs& args,
                               const NormParams<A>& norm, const PoolGeometry& pool, int64_t images,
                               const at::Tensor& dz, const Segment& s) {
    const int64_t area = pool.size[0] * pool.size[1] * pool.size[2], pooled = pool.pixels(), c = s.columns;
    // Whole images, so that no window is cut.
    const int64_t step = std::max<int64_t>(1, block_.chunk_rows(images * pooled, c) / pooled);
    const Partials partial = block_.partials(images * pooled, step * pooled, c);
    const at::Tensor y = block_.workspace(std::min(step, images) * pooled, c);
    at::Tensor dweight;
    block_.for_each_chunk(images, step, [&](int64_t image, int64_t count, int64_t chunk) {
      const at::Tensor left = dz.narrow(0, image * pooled, count * pooled);
      at::Tensor right = y.narrow(0, 0, count * pooled);
      at::mm_out(right, left, packed);
      check_launch(
          launch_accumulate_pooled<T>({s.x.from_row(image * area), block_.matrix(y), s.gradient.from_row(image * area),
                                       norm, partial.of_chunk(chunk), true, needs(conv.at), s.add},
                                      pool, count * pooled, c, partial.splits, block_.cuda.stream));
      if (needs(conv.at)) add(dweight, over_pixels(left, right));
    });
    if (dweight.defined()) set(conv.at, dweight);
    const Sums total = sums(c);
    finalise(args, norm, partial.all(), images * area, s.corrections, total);
    set_norm(args, total);
  }

 private:
  void fused_conv1x1_backward(const ConvArgs& conv, const at::Tensor& packed, const NormArgs& args,
                              const NormParams<A>& norm, const at::Tensor& dz, const Segment& s) {
    const Conv1x1Backward<A> g = fastdense::conv1x1_backward<T>(block_, s.x, norm, packed, dz, s.gradient, s.add,
                                                                needs(conv.at) ? &conv.weight : nullptr);
    const Sums total = sums(s.columns);
    finalise(args, norm, g.partial, dz.size(0), s.corrections, total, 0, g.dweight.params);
    if (needs(conv.at)) set(conv.at, g.dweight.to);
    set_norm(args, total);
  }

  const CudaBlockForward<T>& block_;
  const std::vector<bool>& needs_;
  const at::TensorList weights_;
  std::vector<at::Tensor> grads_;
};

}  // namespace fastdense
