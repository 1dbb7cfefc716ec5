// SPDX-License-Identifier: Apache-2.0
// Backward of the dual path stage on the CPU.  Blocks in reverse; `gradient_`, laid out as the output, holds the
// gradient of the residual path, which every block corrects and adds to in place, and collects those of the dense
// channels until their block takes them.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/block_backward.h"
#include "dual_path/dual_path_cpu.h"
#include "dual_path/dual_path_ops.h"

namespace fastdense {
namespace {

template <typename T>
class Backward : BlockBackward<T> {
  using Base = BlockBackward<T>;
  using A = typename Base::A;
  using Base::kernels;
  using typename Base::Coefficients;
  using typename Base::Sums;

 public:
  Backward(const DualPathArgs& args, const DualPathSaved& saved, const std::vector<bool>& needs, at::TensorList weights)
      : Base(needs, weights, saved.out.options(),
             std::max({args.channels(), args.in_channels, args.width_a, args.width_b}), args.process_group),
        args_(args),
        saved_(saved),
        blocks_(args, *this, saved.out.scalar_type()),
        lowest_block_(args.lowest_block(needs)),
        pixels_(args.pixels()),
        ld_(args.channels()),
        input_(to_channels_last(saved.input)),
        x_(static_cast<const T*>(input_.const_data_ptr())),
        out_(static_cast<const T*>(saved.out.const_data_ptr())),
        mean_(saved.mean.const_data_ptr<A>()),
        var_(saved.var.const_data_ptr<A>()),
        corrections_(ld_),
        input_corrections_(args.in_channels) {
    if (saved.a.size(0) == 0)
      a_again_ = at::empty({std::max(args.in_pixels(), pixels_), args.width_a}, this->options());
    if (is_reversible())
      residual_ = saved.out.narrow(1, 0, args.residual).movedim(1, -1).clone(at::MemoryFormat::Contiguous);
  }

  std::vector<at::Tensor> run(const at::Tensor& grad_output) {
    gradient_ = empty_channels_last(args_.sizes(ld_), this->options());
    gradient_.copy_(grad_output);
    g_ = static_cast<T*>(gradient_.mutable_data_ptr());
    for (int64_t i = args_.num_blocks() - 1; i >= lowest_block_; --i) block(i);
    if (lowest_block_ > 0) return this->grads();
    if (args_.projection) projection();
    if (this->needs_input()) input();
    return this->grads();
  }

 private:
  bool is_reversible() const { return saved_.residuals.size(0) == 0 && args_.num_blocks() > 1; }

  // The residual path in front of block i; recomputed block by block in reversible mode.
  Columns<const T> residual_before(int64_t i) const {
    if (i == 0) return {x_, args_.in_channels};
    if (is_reversible()) return {static_cast<const T*>(residual_.const_data_ptr()), args_.residual};
    return {static_cast<const T*>(saved_.residuals[i - 1].const_data_ptr()), args_.residual};
  }

  Coefficients coefficients_of(const NormArgs& norm, int64_t at, int64_t n) const {
    return this->coefficients(norm, mean_ + at, var_ + at, n);
  }

  // Columns [first, first + n) of the gradient buffer with their corrections, which `memory` holds.
  Gradient<T> corrected(int64_t first, int64_t n, Columns<const T> x, const A* mean, bool write, at::Tensor& memory) {
    memory = this->take(corrections_, first, n, pixels_);
    const A* shift_sum = memory.const_data_ptr<A>();
    T* g = g_ + first;
    return {g, ld_, n, x.data, x.ld, mean, shift_sum, shift_sum + n, write ? g : nullptr};
  }

  // dy of the merge of block i: of the residual path behind it, and of its dense channels.  Behind the last block
  // nothing in this stage has read them.
  Gradients<T> merge_gradients(int64_t i, at::Tensor (&memory)[2]) {
    const int64_t first = args_.residual + args_.dense(i);
    if (i == args_.num_blocks() - 1) return {{g_, ld_, args_.residual}, {g_ + first, ld_, args_.growth}};
    const A* mean = mean_ + args_.blocks[size_t(i) + 1].stats_a;
    return {corrected(0, args_.residual, residual_before(i + 1), mean, true, memory[0]),
            corrected(first, args_.growth, {out_ + first, ld_}, mean + first, false, memory[1])};
  }

  void block(int64_t i) {
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    const Coefficients ca = coefficients_of(block.norm_a, block.stats_a, block.channels);
    const Coefficients cb = coefficients_of(block.norm_b, block.stats_b, args_.width_a);
    const T* a = bottleneck_a(i, ca);
    const at::Tensor du = conv_b(i, a, cb);
    T* dup = static_cast<T*>(du.mutable_data_ptr());
    const Sums sums = this->norm_gradients(block.norm_b, cb);
    at::Tensor memory;
    const NormBackward<T> norm_b = this->norm_backward(block.norm_b, cb, sums, dup, a, args_.a_pixels(i), memory);
    // A weight's gradient that is larger than L2 is walked through by columns.
    constexpr int64_t kLarge = 256 * 1024;
    const bool by_columns = std::is_same_v<T, A> && args_.width_a * block.channels * int64_t(sizeof(A)) > kLarge;
    by_columns ? conv_a_by_columns(i, ca, norm_b, dup) : conv_a(i, ca, norm_b);
  }

  // The saved output of conv_a, or the same recomputed.
  const T* bottleneck_a(int64_t i, const Coefficients& c) {
    if (saved_.a.size(0) > 0) return static_cast<const T*>(saved_.a.const_data_ptr()) + args_.a_row(i) * args_.width_a;
    T* a = static_cast<T*>(a_again_.mutable_data_ptr());
    const Sources<T> sources = blocks_.sources(i, c, residual_before(i), {out_ + args_.residual, ld_});
    blocks_.make_a(i, sources, a, {});
    return a;
  }

  // conv_c, norm_c and conv_b; returns the gradient of norm_b's result [N, ra, spatial], with the sums of norm_b.
  at::Tensor conv_b(int64_t i, const T* a, const Coefficients& cb) {
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    const Coefficients cc = coefficients_of(block.norm_c, block.stats_c, args_.width_b);
    const at::Tensor u = blocks_.activate_a(i, a, cb, this->options());
    const at::Tensor dv = at::empty({pixels_, args_.width_b}, this->options());
    const at::Tensor b = saved_.b.size(0) > 0 ? saved_.b.narrow(0, i * pixels_, pixels_)
                                              : blocks_.make_b(i, a, cb, u, {}, this->options(), {});
    const T* bp = static_cast<const T*>(b.const_data_ptr());
    T* dvp = static_cast<T*>(dv.mutable_data_ptr());
    merge(i, bp, cc, dvp);
    const Sums sums = this->norm_gradients(block.norm_c, cc);
    at::Tensor memory;
    const NormBackward<T> norm_c = this->norm_backward(block.norm_c, cc, sums, dvp, bp, pixels_, memory);
    this->share_chunks(pixels_, 4 * kernels.backward_rows, [&](int64_t, int64_t, int64_t, int64_t row, int64_t rows) {
      kernels.norm_input_gradient(norm_c, row, rows, dvp);
    });
    if (is_reversible() && i > 0) reverse(i, bp, cc);
    const bool needed = this->needs(block.conv_b.at);
    const auto [du, dweight] = conv_b_input(i, a, cb, u, dv, needed);
    if (needed) this->set(block.conv_b.at, dweight);
    return du;
  }

  // Gradients of norm_b's result and of the weight from that of conv_b's output, and the sums of norm_b.
  std::tuple<at::Tensor, at::Tensor> conv_b_input(int64_t i, const T* a, const Coefficients& c, const at::Tensor& u,
                                                  const at::Tensor& dv, bool needs_weight) {
    if constexpr (DualPathBlocks<T>::kHasOwn)
      if (const auto& own = blocks_.own(i)) {
        const at::Tensor du = at::empty({args_.a_pixels(i), args_.width_a}, this->options());
        const at::Tensor none = this->worker_gradients(false, 0, 0);
        const at::Tensor dweight =
            own->backward(args_.blocks[size_t(i)].conv_b.weight, this->source(a, args_.width_a, c),
                          static_cast<const T*>(dv.const_data_ptr()), needs_weight, [&](int64_t worker) {
                            return this->epilogue(worker, static_cast<T*>(du.mutable_data_ptr()), args_.width_a, false,
                                                  c.mean(), none);
                          });
        return {du, dweight};
      }
    const auto gradients = blocks_.library.backward(i, dv, u, needs_weight);
    mask(i, a, c, static_cast<T*>(std::get<0>(gradients).mutable_data_ptr()));
    return gradients;
  }

  // conv_c: dv = masked gradient behind norm_c.
  void merge(int64_t i, const T* b, const Coefficients& c, T* dv) {
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    at::Tensor memory[2];
    const Gradients<T> dy = merge_gradients(i, memory);
    conv1x1_backward(block.conv_c, this->source(b, args_.width_b, c), nullptr, dy, dv, args_.width_b, false, c.mean());
  }

  // Backward of a 1x1 with the output gradients `dy`.
  void conv1x1_backward(const ConvArgs& conv, const Source<T>& source, const PoolGeometry* pool, const Gradients<T>& dy,
                        T* gradient, int64_t ld, bool accumulate, const A* mean) {
    const int64_t depth = dy.columns(), n = source.channels;
    const at::Tensor panels = this->pack_backward(conv.weight, 0, n);
    const at::Tensor dweight = this->worker_gradients(this->needs(conv.at), depth, n);
    this->for_each_chunk(pixels_, kernels.backward_rows,
                         [&](int64_t worker, int64_t, int64_t, int64_t row, int64_t rows) {
                           kernels.conv1x1_backward(source, pool, row, rows, dy, this->panels_of(panels),
                                                    this->epilogue(worker, gradient, ld, accumulate, mean, dweight),
                                                    this->workspace(worker));
                         });
    if (this->needs(conv.at)) this->set(conv.at, this->total(dweight, depth, n));
  }

  // residual_{i} = residual_{i+1} - conv_c(b_i).
  void reverse(int64_t i, const T* b, const Coefficients& c) {
    T* residual = static_cast<T*>(residual_.mutable_data_ptr());
    const at::Tensor weight = args_.blocks[size_t(i)].conv_c.weight.narrow(0, 0, args_.residual).neg();
    blocks_.conv1x1(this->pack_forward(weight), {this->source(b, args_.width_b, c)}, nullptr, pixels_,
                    {{residual, args_.residual, args_.residual, nullptr, nullptr, residual, args_.residual}}, {});
  }

  // The gradient of relu(norm_b(a)) passes the ReLU, in place.
  void mask(int64_t i, const T* a, const Coefficients& c, T* du) {
    const Source<T> source = this->source(a, args_.width_a, c);
    const at::Tensor none = this->worker_gradients(false, 0, 0);
    this->for_each_chunk(args_.a_pixels(i), kernels.backward_rows,
                         [&](int64_t worker, int64_t, int64_t, int64_t row, int64_t rows) {
                           kernels.norm_backward(source, true, row, rows, du,
                                                 this->epilogue(worker, du, args_.width_a, false, c.mean(), none),
                                                 this->workspace(worker));
                         });
  }

  // A run of columns that conv_a reads, the gradient that they add to, and the channel of their corrections.
  struct Segment {
    Columns<const T> x;
    int64_t first, n;  // of the norm's channels
    Columns<T> gradient;
    Corrections* corrections;
    int64_t channel;
  };

  std::vector<Segment> segments(int64_t i) {
    const int64_t r = args_.residual, c = args_.blocks[size_t(i)].channels;
    if (i == 0 && args_.projection) {
      input_gradient_ = empty_channels_last(args_.sizes(args_.in_channels, true), this->options()).zero_();
      gi_ = static_cast<T*>(input_gradient_.mutable_data_ptr());
      return {{residual_before(0), 0, c, {gi_, args_.in_channels}, &input_corrections_, 0}};
    }
    if (i == 0) return {{residual_before(0), 0, c, {g_, ld_}, &corrections_, 0}};
    return {{residual_before(i), 0, r, {g_, ld_}, &corrections_, 0},
            {{out_ + r, ld_}, r, c - r, {g_ + r, ld_}, &corrections_, r}};
  }

  at::Tensor weights_of(const DualPathBlockArgs& block, const Segment& s) const {
    return this->pack_backward(block.conv_a.weight, s.first, s.n);
  }

  void conv_a(int64_t i, const Coefficients& c, const NormBackward<T>& norm_b) {
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    const bool needed = this->needs(block.conv_a.at);
    std::vector<at::Tensor> dweights, dnorms, dbiases;
    for (const Segment& s : segments(i)) {
      const at::Tensor panels = weights_of(block, s);
      const at::Tensor dweight = this->worker_gradients(needed, args_.width_a, s.n);
      const Source<T> source = this->source(s.x.data, s.x.ld, c, s.first, s.n);
      this->for_each_chunk(
          args_.a_pixels(i), kernels.backward_rows, [&](int64_t worker, int64_t, int64_t, int64_t row, int64_t rows) {
            kernels.conv1x1_norm_backward(
                source, row, rows, norm_b, this->panels_of(panels),
                this->epilogue(worker, s.gradient.data, s.gradient.ld, true, c.mean() + s.first, dweight),
                this->workspace(worker));
          });
      if (needed) dweights.push_back(this->total(dweight, args_.width_a, s.n));
      const Sums sums = this->norm_sums(c, s.first, s.n);
      dnorms.push_back(this->vector(sums.weighted, s.n));
      dbiases.push_back(this->vector(sums.sum, s.n));
      this->defer(block.norm_a, c, sums, s.first, s.n, args_.a_pixels(i), *s.corrections, s.channel);
    }
    if (needed) this->set(block.conv_a.at, at::cat(dweights, 1));
    this->set_norm(block.norm_a, at::cat(dnorms), at::cat(dbiases));
  }

  // The same, as many columns at once as have their part of the weight's gradient in cache beside some rows of dz.  No
  // sum goes over workers then, so that they share the blocks of columns as they get done.  `dz`: norm_b.dv.
  void conv_a_by_columns(int64_t i, const Coefficients& c, const NormBackward<T>& norm_b, T* dz) {
    constexpr int64_t kColumns = 64, kBytes = 160 * 1024;
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    const int64_t pixels = args_.a_pixels(i), depth = args_.width_a;
    this->share_chunks(pixels, 4 * kernels.backward_rows, [&](int64_t, int64_t, int64_t, int64_t row, int64_t rows) {
      kernels.norm_input_gradient(norm_b, row, rows, dz);
    });
    const bool needed = this->needs(block.conv_a.at);
    const Sums sums = this->channel_sums();
    const std::vector<Segment> segments = this->segments(i);
    std::vector<ColumnBlock> blocks;
    for (const Segment& s : segments) {
      const at::Tensor panels = weights_of(block, s);
      for (int64_t begin = 0; begin < s.n; begin += kColumns)
        blocks.push_back({&s, begin, std::min(kColumns, s.n - begin), panels});
    }
    const at::Tensor dweight = at::zeros({needed ? int64_t(blocks.size()) : 0, this->padded_depth(depth), kColumns},
                                         at::TensorOptions().dtype(Base::kAccumulate));
    const int64_t fit = kBytes / int64_t(sizeof(T)) / depth / kernels.tile_rows * kernels.tile_rows;
    const int64_t most = std::clamp(fit, kernels.tile_rows, kernels.backward_rows);
    this->share_units(int64_t(blocks.size()), [&](int64_t worker, int64_t unit) {
      const auto& [s, begin, n, panels] = blocks[size_t(unit)];
      const int64_t channel = s->first + begin;
      const Source<T> source = this->source(s->x.data + begin, s->x.ld, c, channel, n);
      const auto* w = static_cast<const uint8_t*>(this->panels_of(panels)) +
                      begin * this->padded_depth(depth) * kernels.operand_bytes;
      const BackwardEpilogue<T> epilogue{s->gradient.data + begin,
                                         s->gradient.ld,
                                         true,
                                         c.mean() + channel,
                                         sums.sum + channel,
                                         sums.weighted + channel,
                                         this->of_worker(dweight, unit)};
      for (int64_t row = 0; row < pixels; row += most)
        kernels.conv1x1_backward(source, nullptr, row, std::min(most, pixels - row), {{dz, depth, depth}}, w, epilogue,
                                 this->workspace(worker));
    });
    if (needed) {
      std::vector<at::Tensor> columns;
      for (size_t unit = 0; unit < blocks.size(); ++unit) {
        const int64_t n = blocks[unit].n, height = dweight.size(1), ld = this->padded(n);
        const at::Tensor part = dweight[int64_t(unit)].flatten().narrow(0, 0, height * ld).view({height, ld});
        columns.push_back(part.narrow(0, 0, depth).narrow(1, 0, n));
      }
      this->set(block.conv_a.at, at::cat(columns, 1));
    }
    this->norm_gradients(block.norm_a, c);
    for (const Segment& s : segments)
      this->defer(block.norm_a, c, {sums.sum + s.first, sums.weighted + s.first, 0}, s.first, s.n, pixels,
                  *s.corrections, s.channel);
  }

  // Columns [begin, begin + n) of a segment, whose weights are in `panels`.
  struct ColumnBlock {
    const Segment* segment;
    int64_t begin, n;
    at::Tensor panels;
  };

  // The split.
  void projection() {
    const Coefficients c = coefficients_of(args_.norm_w, args_.stats_w, args_.in_channels);
    const int64_t r = args_.residual;
    at::Tensor memory;
    // The dense channels were read by all blocks but the first.
    const A* mean = mean_ + args_.blocks.back().stats_a + r;
    const Gradient<T> dense = args_.num_blocks() > 1
                                  ? corrected(r, args_.first_dense, {out_ + r, ld_}, mean, false, memory)
                                  : Gradient<T>{g_ + r, ld_, args_.first_dense};
    conv1x1_backward(args_.conv_w, this->source(x_, args_.in_channels, c), args_.strided() ? &args_.sampled : nullptr,
                     {{g_, ld_, r}, dense}, gi_, args_.in_channels, true, c.mean());
    const Sums s = this->norm_gradients(args_.norm_w, c);
    this->defer(args_.norm_w, c, s, 0, c.n, args_.in_pixels(), input_corrections_, 0);
  }

  void input() {
    const int64_t n = args_.in_channels;
    Corrections& of_input = args_.projection ? input_corrections_ : corrections_;
    const at::Tensor corrections = this->take(of_input, 0, n, args_.in_pixels());
    const A* shift_sum = corrections.const_data_ptr<A>();
    const Columns<T> g = args_.projection ? Columns<T>{gi_, n} : Columns<T>{g_, ld_};
    const Gradient<T> gradient{g.data,    g.ld,          n,      x_, n, mean_ + args_.blocks[0].stats_a,
                               shift_sum, shift_sum + n, nullptr};
    // In place where the gradient has a tensor of its own.
    this->grads()[0] = args_.projection ? input_gradient_ : empty_channels_last(args_.sizes(n, true), this->options());
    T* dx = static_cast<T*>(this->grads()[0].mutable_data_ptr());
    this->share_chunks(
        args_.in_pixels(), 4 * kernels.backward_rows,
        [&](int64_t, int64_t, int64_t, int64_t row, int64_t rows) { kernels.finalise(gradient, row, rows, dx); });
  }

  const DualPathArgs& args_;
  const DualPathSaved& saved_;
  const DualPathBlocks<T> blocks_;
  const int64_t lowest_block_;
  const int64_t pixels_, ld_;
  const at::Tensor input_;
  const T *const x_, *const out_;
  const A *const mean_, *const var_;
  at::Tensor gradient_, input_gradient_;  // [N, C, spatial], [N, C_in, spatial], channels innermost
  at::Tensor a_again_, residual_;         // of one block at a time: [rows, ra], [pixels, R]
  T *g_ = nullptr, *gi_ = nullptr;
  Corrections corrections_, input_corrections_;
};

struct BackwardEngine {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static std::vector<at::Tensor> backward(const DualPathArgs& args, const DualPathSaved& saved,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList weights) {
    return Backward<T>(args, saved, needs, weights).run(grad_output);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("_dual_path_stage_backward", &dual_path_stage_backward<BackwardEngine>);
}
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) {
  m.impl("_dual_path_stage_backward", &dual_path_stage_backward<BackwardEngine>);
}

}  // namespace fastdense
