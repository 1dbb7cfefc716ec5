// SPDX-License-Identifier: Apache-2.0
// Backward of the dual path stage on a CUDA device.  Blocks in reverse; `gradient_`, laid out as the output, holds the
// gradient of the residual path, which every block corrects and adds to in place, and collects those of the dense
// channels until their block takes them.
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros.h>

#include "cuda/block_backward.h"
#include "dual_path/dual_path_cuda.h"

namespace fastdense {
namespace {

template <typename T>
class Backward : CudaStage<T> {
  using Base = CudaStage<T>;
  using Base::args, Base::cuda, Base::ld, Base::pixels, Base::r;
  using typename Base::A;
  using Gradients = CudaBlockBackward<T>;
  using Segment = typename Gradients::Segment;

 public:
  Backward(const DualPathArgs& args, const DualPathSaved& saved, const std::vector<bool>& needs, at::TensorList weights,
           const CudaContext& cuda)
      : Base(args, saved.out.options(), cuda),
        saved_(saved),
        lowest_block_(args.lowest_block(needs)),
        grads_(*this, needs, weights),
        input_(to_channels_last(saved.input)),
        x_(this->const_data(input_)),
        out_(this->const_data(saved.out)),
        mean_(saved.mean.const_data_ptr<A>()),
        var_(saved.var.const_data_ptr<A>()),
        channels_(args.num_blocks() * r + args.dense(args.num_blocks())) {
    if (saved.a.size(0) == 0) a_again_ = at::empty({std::max(args.in_pixels(), pixels), args.width_a}, this->options);
    if (is_reversible()) residual_ = this->rows_of(saved.out).narrow(1, 0, r).clone(at::MemoryFormat::Contiguous);
  }

  std::vector<at::Tensor> run(const at::Tensor& grad_output) {
    this->pack_weights(lowest_block_);
    const at::Tensor gradient = empty_channels_last(args.sizes(ld), this->options);
    gradient.copy_(grad_output);
    gradient_ = this->rows_of(gradient);
    g_ = this->data(gradient);
    corrections_ = at::zeros({2, channels_ + args.in_channels}, this->options.dtype(at::kDouble));
    for (int64_t i = args.num_blocks() - 1; i >= lowest_block_; --i) block(i);
    if (lowest_block_ > 0) return grads_.take();
    if (args.projection) projection();
    if (grads_.needs_input()) input();
    return grads_.take();
  }

 private:
  bool is_reversible() const { return saved_.residuals.size(0) == 0 && args.num_blocks() > 1; }

  // Every block's corrections of the residual path have a place of their own, so that none is to be cleared; those of
  // the first block and of the dense channels lie as they do in an input without a projection.
  CudaCorrections corrections(int64_t at) const {
    double* shift_sum = corrections_.template mutable_data_ptr<double>() + at;
    return {shift_sum, shift_sum + corrections_.size(1)};
  }
  int64_t of_residual(int64_t i) const { return (args.num_blocks() - 1 - i) * r; }
  int64_t of_dense(int64_t channel) const { return args.num_blocks() * r + channel; }
  int64_t of_input() const { return args.projection ? channels_ : of_residual(0); }

  // The consumers of `n` channels are done: their corrections, which stand for `count` values of this process.
  void share_corrections(int64_t at, int64_t n, int64_t count) const {
    this->sync.means(corrections_, 1, at, n, count);
  }

  // The residual path in front of block i; recomputed block by block in reversible mode.
  Matrix<const T> residual_before(int64_t i) const {
    if (i == 0) return {x_, args.in_channels};
    return {this->const_data(is_reversible() ? residual_ : saved_.residuals[i - 1]), r};
  }

  NormParams<A> norm_of(const NormArgs& norm, int64_t at) { return this->norm_params(norm, mean_ + at, var_ + at); }

  // to = `columns` columns of the gradient with their corrections; the same matrix, or another.
  void corrected(const Matrix<const T>& gradient, const Matrix<const T>& x, const Matrix<T>& to, const A* mean,
                 const CudaCorrections& c, int64_t rows, int64_t columns) const {
    this->reduction(launch_slice_gradient<T>, {gradient, x, to, mean, c.shift_sum, c.slope_sum, {}}, rows, columns);
  }

  void block(int64_t i) {
    const DualPathBlockArgs& block = args.blocks[size_t(i)];
    const NormParams<A> norm_a = norm_of(block.norm_a, block.stats_a), norm_b = norm_of(block.norm_b, block.stats_b);
    const at::Tensor a = bottleneck_a(i, norm_a), da = conv_b_backward(i, a, norm_b);
    grads_.conv1x1_backward(block.conv_a, this->conv_a(i), block.norm_a, norm_a, da, segments(i));
  }

  // The saved output of conv_a, or the same recomputed.
  at::Tensor bottleneck_a(int64_t i, const NormParams<A>& norm) const {
    if (saved_.a.size(0) > 0) {
      const at::Tensor a = saved_.a.narrow(0, args.a_row(i), args.a_pixels(i));
      // Our own kernels read 16 bytes at once; what hooks on saved tensors give may lie anywhere.
      return this->plans(i) && !has_rows_of(16, this->const_matrix(a), args.width_a) ? a.clone() : a;
    }
    const at::Tensor a = a_again_.narrow(0, 0, args.a_pixels(i));
    this->make_a(i, this->sources(i, residual_before(i), out_), norm, a);
    return a;
  }

  // conv_c, norm_c, conv_b and norm_b; returns the gradient [rows, ra] of a.
  at::Tensor conv_b_backward(int64_t i, const at::Tensor& a, const NormParams<A>& norm_b) {
    const DualPathBlockArgs& block = args.blocks[size_t(i)];
    const NormParams<A> norm_c = norm_of(block.norm_c, block.stats_c);
    const bool is_own = bool(this->plans(i));
    const at::Tensor u = is_own ? at::Tensor() : this->activated_image(i, a, norm_b);
    const at::Tensor b = saved_.b.size(0) > 0 ? saved_.b.narrow(0, i * pixels, pixels)
                         : is_own             ? this->make_b(i, a, norm_b, {}, {})
                                              : this->rows_of(to_channels_last(this->convolution(i, u)));
    const at::Tensor dv = empty_channels_last(this->image_sizes(args.width_b, false), this->options);
    const Matrix<const T> from{this->const_data(b), args.width_b};
    merge_backward(i, from, norm_c, this->rows_of(dv));
    grads_.norm_backward(block.norm_c, norm_c, {this->data(dv), args.width_b}, from, pixels, args.width_b);
    return is_own ? own_gradients(i, a, norm_b, this->rows_of(dv)) : library_gradients(i, a, norm_b, dv, u);
  }

  // conv_b and norm_b by our own kernels, from the gradient of b.
  at::Tensor own_gradients(int64_t i, const at::Tensor& a, const NormParams<A>& norm, const at::Tensor& d) {
    const DualPathBlockArgs& block = args.blocks[size_t(i)];
    const GroupedPlans<T>& own = this->plans(i);
    const at::Tensor da = at::empty({args.a_pixels(i), args.width_a}, this->options);
    const T *of_b = this->const_data(d), *from = this->const_data(a);
    const PartialSums<A> partial = grouped_conv_input_gradient<T>(*this, own.input_gradient, this->conv_b_shape(i),
                                                                  of_b, this->conv_b(i), from, norm, this->data(da));
    WeightSum<A> sum;
    const bool needed = grads_.needs(block.conv_b.at);
    if (needed)
      sum = grouped_conv_weight_gradient<T>(*this, own.weight_gradient, of_b, from, norm, block.conv_b.weight);
    grads_.norm_backward(block.norm_b, norm, partial, {this->data(da), args.width_a}, {from, args.width_a},
                         args.a_pixels(i), args.width_a, sum.params);
    if (needed) grads_.set(block.conv_b.at, sum.to);
    return da;
  }

  at::Tensor library_gradients(int64_t i, const at::Tensor& a, const NormParams<A>& norm, const at::Tensor& d,
                               const at::Tensor& u) {
    const DualPathBlockArgs& block = args.blocks[size_t(i)];
    const bool needed = grads_.needs(block.conv_b.at);
    const auto [du, dweight, none] =
        at::convolution_backward(d, u, this->conv_b(i), at::OptionalIntArrayRef(), this->stride(i), this->half_kernel(),
                                 this->ones(), false, this->zeros(), args.groups, {true, needed, false});
    if (needed) grads_.set(block.conv_b.at, dweight);
    const at::Tensor da = this->rows_of(to_channels_last(du));
    grads_.norm_backward(block.norm_b, norm, {this->data(da), args.width_a}, {this->const_data(a), args.width_a},
                         args.a_pixels(i), args.width_a);
    return da;
  }

  // conv_c, chunk by chunk: dv = gradient of relu(norm_c(b)).  In reversible mode the residual path steps back.
  void merge_backward(int64_t i, const Matrix<const T>& b, const NormParams<A>& norm, const at::Tensor& dv) {
    const ConvArgs& conv = args.blocks[size_t(i)].conv_c;
    const int64_t n = args.width_b, step = this->chunk_rows(pixels, n + r + args.growth);
    if (i < args.num_blocks() - 1) {
      share_corrections(of_residual(i + 1), r, pixels);
      share_corrections(of_dense(args.dense(i)), args.growth, pixels);
    }
    const bool needed = grads_.needs(conv.at), reverses = is_reversible() && i > 0;
    const at::Tensor y = this->workspace(std::min(step, pixels), n);
    at::Tensor dweight;
    this->for_each_chunk(pixels, step, [&](int64_t row, int64_t count, int64_t) {
      const at::Tensor dz = merge_gradient(i, row, count), right = y.narrow(0, 0, count);
      at::Tensor to = dv.narrow(0, row, count);
      at::mm_out(to, dz, this->conv_c(i));
      if (needed || reverses)
        this->reduction(launch_activate<T>, {b.from_row(row), this->matrix(y), norm, true}, count, n);
      if (needed) grads_.add(dweight, grads_.over_pixels(dz, right));
      if (!reverses) return;
      at::Tensor residual = residual_.narrow(0, row, count);
      at::addmm_out(residual, residual, right, this->conv_c(i).narrow(0, 0, r).t(), 1, -1);
    });
    if (needed) grads_.set(conv.at, dweight);
  }

  // Gradient [rows, R + K] of what block i merges: of the residual path behind it, and of its dense channels.  Behind
  // the last block nothing in this stage has read them.
  at::Tensor merge_gradient(int64_t i, int64_t row, int64_t rows) const {
    const int64_t dense = args.dense(i), first = r + dense;
    if (i < args.num_blocks() - 1) {
      const A* mean = mean_ + args.blocks[size_t(i) + 1].stats_a;
      const Matrix<T> g = Matrix<T>{g_, ld}.from_row(row);
      corrected(g, residual_before(i + 1).from_row(row), g, mean, corrections(of_residual(i + 1)), rows, r);
      const Matrix<T> slot = g.from_column(first);
      corrected(slot, {out_ + row * ld + first, ld}, slot, mean + first, corrections(of_dense(dense)), rows,
                args.growth);
    }
    const at::Tensor g = gradient_.narrow(0, row, rows);
    return at::cat({g.narrow(1, 0, r), g.narrow(1, first, args.growth)}, 1);
  }

  // What conv_a reads, and where its gradient goes.
  std::vector<Segment> segments(int64_t i) {
    if (i == 0 && args.projection) {
      input_gradient_ = empty_channels_last(args.sizes(args.in_channels, true), this->options);
      return {input_segment(false)};
    }
    std::vector<Segment> segments;
    for (const typename Base::Source& s : this->sources(i, residual_before(i), out_))
      segments.push_back(
          {s.x, {g_ + s.first, ld}, s.first, s.columns, corrections(s.first == 0 ? of_residual(i) : of_dense(0))});
    return segments;
  }
  Segment input_segment(bool add) const {
    return {{x_, args.in_channels},
            {this->data(input_gradient_), args.in_channels},
            0,
            args.in_channels,
            corrections(of_input()),
            add};
  }

  // The split.
  void projection() {
    // The dense channels were read by all blocks but the first.
    const Matrix<T> dense{g_ + r, ld};
    if (args.num_blocks() > 1) {
      share_corrections(of_dense(0), args.first_dense, pixels);
      corrected(dense, {out_ + r, ld}, dense, mean_ + args.blocks.back().stats_a + r, corrections(of_dense(0)), pixels,
                args.first_dense);
    }
    grads_.pooled_conv1x1_backward(args.conv_w, this->conv_w(), args.norm_w, norm_of(args.norm_w, args.stats_w),
                                   args.sampled, args.batch, gradient_.narrow(1, 0, r + args.first_dense),
                                   input_segment(true));
  }

  void input() {
    const int64_t n = args.in_channels;
    // In place where the gradient has a tensor of its own.
    const at::Tensor to = args.projection ? input_gradient_ : empty_channels_last(args.sizes(n, true), this->options);
    const Matrix<T> to_rows{this->data(to), n}, from = args.projection ? to_rows : Matrix<T>{g_, ld};
    share_corrections(of_input(), n, args.in_pixels());
    corrected(from, {x_, n}, to_rows, mean_ + args.blocks[0].stats_a, corrections(of_input()), args.in_pixels(), n);
    grads_.set_input(to);
  }

  const DualPathSaved& saved_;
  const int64_t lowest_block_;
  Gradients grads_;
  const at::Tensor input_;
  const T *const x_, *const out_;
  const A *const mean_, *const var_;
  const int64_t channels_;                // with corrections, those of a projection's input apart
  at::Tensor gradient_, input_gradient_;  // [pixels, C], [N, C_in, spatial]
  at::Tensor corrections_;
  at::Tensor a_again_, residual_;  // of one block at a time: [rows, ra], [pixels, R]
  T* g_ = nullptr;
};

}  // namespace

template <typename T>
std::vector<at::Tensor> dual_path_backward_cuda(const DualPathArgs& args, const DualPathSaved& saved,
                                                const at::Tensor& grad_output, const std::vector<bool>& needs,
                                                at::TensorList weights, const CudaContext& cuda) {
  return Backward<T>(args, saved, needs, weights, cuda).run(grad_output);
}

#define FASTDENSE_BACKWARD(T)                                                                              \
  template std::vector<at::Tensor> dual_path_backward_cuda<T>(const DualPathArgs&, const DualPathSaved&,   \
                                                              const at::Tensor&, const std::vector<bool>&, \
                                                              at::TensorList, const CudaContext&);
FASTDENSE_BACKWARD(float)
FASTDENSE_BACKWARD(double)
FASTDENSE_BACKWARD(bfloat16)
FASTDENSE_BACKWARD(half)
#undef FASTDENSE_BACKWARD

}  // namespace fastdense
