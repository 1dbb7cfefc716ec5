// SPDX-License-Identifier: Apache-2.0
// Backward of the dense block on the CPU.  Layers in reverse; `gradient_` collects scale * dy of all consumers, and
// shift_sum_, slope_sum_ the norm corrections, until a slice is finalised.  Sums and weight gradients are kept per
// worker and added in order, so reruns with the same number of threads are bit-identical.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "common/checks.h"
#include "dense_block/dense_block_driver.h"

namespace fastdense {
namespace {

template <typename T>
class Backward : DenseBlockDriver<T> {
  using Base = DenseBlockDriver<T>;
  using A = typename Base::A;
  using Base::args;
  using Base::kernels;
  using typename Base::Coefficients;
  using Needs = std::vector<bool>;

 public:
  Backward(const DenseBlockArgs& args, const at::Tensor& buffer, const at::Tensor& mean, const at::Tensor& var,
           const at::Tensor& z, uint64_t seed, const std::vector<bool>& needs, at::TensorList weights)
      : Base(args),
        seed_(seed),
        pixels_(args.pixels()),
        ld_(args.channels()),
        x_(static_cast<const T*>(buffer.const_data_ptr())),
        mean_(mean.const_data_ptr<A>()),
        var_(var.const_data_ptr<A>()),
        z_(z),
        needs_(needs),
        weights_(weights),
        options_(buffer.options()),
        shift_sum_(size_t(ld_)),
        slope_sum_(size_t(ld_)),
        grads_(needs.size()) {
    for (at::Tensor& grad : grads_) grad = at::empty({0}, buffer.options());
    widest_ = std::max(args.channels(), args.width);
    sums_ = at::empty({this->workers, 2, widest_}, at::TensorOptions().dtype(at::kDouble));
  }

  std::vector<at::Tensor> run(const at::Tensor& grad_output) {
    gradient_ = empty_channels_last(args.sizes(ld_), options_);
    g_ = static_cast<T*>(gradient_.mutable_data_ptr());
    if (args.tail == Tail::kNone)
      gradient_.copy_(grad_output);
    else
      gradient_.zero_();
    if (args.tail == Tail::kTransition) transition(to_channels_last(grad_output));
    if (args.tail == Tail::kNorm || args.tail == Tail::kNormRelu) norm(to_channels_last(grad_output));
    for (int64_t l = int64_t(args.layers.size()) - 1; l >= lowest_layer(); --l) layer(l);
    if (needs_[0]) input();
    return grads_;
  }

 private:
  bool needs(int64_t weight) const { return needs_[size_t(weight) + 1]; }
  void set(int64_t weight, const at::Tensor& value) {
    if (needs(weight)) grads_[size_t(weight) + 1] = value.to(weights_[size_t(weight)].scalar_type()).contiguous();
  }

  // Layers below the lowest one with a parameter or input that needs a gradient are left out.
  int64_t lowest_layer() const {
    if (needs_[0]) return 0;
    int64_t l = 0;
    const int64_t count = int64_t(args.layers.size());
    const int64_t stride = args.bottleneck ? 10 : 5;
    const auto any = [&](int64_t at) {
      return std::any_of(needs_.begin() + 1 + at, needs_.begin() + 1 + at + stride, [](bool n) { return n; });
    };
    while (l < count && !any(l * stride)) ++l;
    return l;
  }

  struct Sums {
    double *sum, *weighted;
  };
  Sums worker_sums(int64_t worker) {
    double* s = sums_.mutable_data_ptr<double>() + worker * 2 * widest_;
    return {s, s + widest_};
  }
  // Sums over all workers, in worker 0's place.
  Sums total_sums(int64_t n) {
    const Sums total = worker_sums(0);
    for (int64_t w = 1; w < this->workers; ++w) {
      const Sums s = worker_sums(w);
      for (int64_t j = 0; j < n; ++j) {
        total.sum[j] += s.sum[j];
        total.weighted[j] += s.weighted[j];
      }
    }
    return total;
  }

  // Weight gradients [workers, depth, padded n], zeroed, if needed.
  at::Tensor worker_gradients(bool needed, int64_t depth, int64_t n) {
    sums_.zero_();
    return at::zeros({needed ? this->workers : 0, this->padded_depth(depth), this->padded(n)},
                     at::TensorOptions().dtype(Base::kAccumulate));
  }
  static A* of_worker(const at::Tensor& gradients, int64_t worker) {
    return gradients.size(0) == 0 ? nullptr
                                  : gradients.mutable_data_ptr<A>() + worker * gradients.size(1) * gradients.size(2);
  }
  static at::Tensor total(const at::Tensor& gradients, int64_t depth, int64_t n) {
    return gradients.sum(0).narrow(0, 0, depth).narrow(1, 0, n);
  }

  BackwardSink<T> sink(int64_t worker, T* gradient, int64_t ld, bool accumulate, const A* mean,
                       const at::Tensor& dweight) {
    const Sums s = worker_sums(worker);
    return {gradient, ld, accumulate, mean, s.sum, s.weighted, of_worker(dweight, worker)};
  }

  // Parameter gradients of a norm from its sums, in place: sum -> s1, weighted -> s2 (dbeta, dgamma).
  Sums norm_gradients(const NormArgs& norm, const Coefficients& c) {
    const Sums s = total_sums(c.n);
    for (int64_t j = 0; j < c.n; ++j) s.weighted[j] *= double(c.rstd()[j]);
    if (norm.weight.defined()) set(norm.at, vector(s.weighted, c.n));
    if (norm.bias.defined()) set(norm.at + 1, vector(s.sum, c.n));
    return s;
  }
  static at::Tensor vector(const double* v, int64_t n) {
    at::Tensor t = at::empty({n}, at::TensorOptions().dtype(at::kDouble));
    std::copy(v, v + n, t.mutable_data_ptr<double>());
    return t;
  }

  // The consumer of a prefix is done: its parameter gradients, and the deferred correction of its channels.
  void consumed(const NormArgs& norm, const Coefficients& c) {
    const Sums s = norm_gradients(norm, c);
    if (norm.frozen()) return;
    for (int64_t j = 0; j < c.n; ++j) {
      const double share = double(c.scale()[j]) / double(pixels_);
      shift_sum_[size_t(j)] += share * s.sum[j];
      slope_sum_[size_t(j)] += share * s.weighted[j] * double(c.rstd()[j]);
    }
  }

  void transition(const at::Tensor& grad) {
    const int64_t co = args.tail_conv.size(0);
    const Coefficients c = this->coefficients(args.tail_norm, mean_, var_, ld_);
    const at::Tensor weight = this->accumulate_type(args.tail_conv);
    const at::Tensor panels = this->pack(weight.template const_data_ptr<A>(), co, ld_, ld_, 1);
    const at::Tensor dweight = worker_gradients(needs(args.tail_conv_at), co, ld_);
    const T* dy = static_cast<const T*>(grad.const_data_ptr());
    const Source<T> source = this->source(x_, ld_, c);
    this->for_each_chunk(args.batch * args.pool.pixels(), kernels.backward_rows,
                         [&](int64_t worker, int64_t, int64_t row, int64_t rows) {
                           kernels.pool_backward(source, args.pool, row, rows, dy, co, co, this->panels_of(panels),
                                                 sink(worker, g_, ld_, true, c.mean(), dweight), this->scratch(worker));
                         });
    if (needs(args.tail_conv_at)) set(args.tail_conv_at, total(dweight, co, ld_).reshape(args.tail_conv.sizes()));
    consumed(args.tail_norm, c);
  }

  void norm(const at::Tensor& grad) {
    const Coefficients c = this->coefficients(args.tail_norm, mean_, var_, ld_);
    const at::Tensor none = worker_gradients(false, 0, 0);
    const T* dy = static_cast<const T*>(grad.const_data_ptr());
    const Source<T> source = this->source(x_, ld_, c);
    this->for_each_chunk(pixels_, kernels.backward_rows, [&](int64_t worker, int64_t, int64_t row, int64_t rows) {
      kernels.norm_backward(source, args.tail == Tail::kNormRelu, row, rows, dy,
                            sink(worker, g_, ld_, true, c.mean(), none), this->scratch(worker));
    });
    consumed(args.tail_norm, c);
  }

  // Gradient [pixels, k] of the slice that layer l wrote; all its consumers are done.
  at::Tensor slice_gradient(int64_t l) {
    const int64_t c = args.layers[l].channels, k = args.growth;
    const at::Tensor corrections = corrections_of(c, k);
    const A* shift_sum = corrections.const_data_ptr<A>();
    if (!d_.defined()) d_ = this->bytes(pixels_ * k * kernels.operand_bytes);
    void* out = d_.mutable_data_ptr();
    const Dropout dropout = this->dropout(seed_, l);
    this->for_each_chunk(pixels_, 4 * kernels.backward_rows, [&](int64_t, int64_t, int64_t row, int64_t rows) {
      kernels.finalise(g_ + c, x_ + c, ld_, row, rows, k, mean_ + c, shift_sum, shift_sum + k, dropout, out);
    });
    return d_;
  }

  at::Tensor corrections_of(int64_t first, int64_t n) {
    at::Tensor t = this->template temporary<A>({2, n});
    A* out = t.mutable_data_ptr<A>();
    for (int64_t j = 0; j < n; ++j) {
      out[j] = A(shift_sum_[size_t(first + j)]);
      out[n + j] = A(slope_sum_[size_t(first + j)]);
    }
    return t;
  }

  void input() {
    const int64_t n = args.in_channels;
    const at::Tensor corrections = corrections_of(0, n);
    const A* shift_sum = corrections.const_data_ptr<A>();
    grads_[0] = empty_channels_last(args.sizes(n), options_);
    T* dx = static_cast<T*>(grads_[0].mutable_data_ptr());
    this->for_each_chunk(pixels_, 4 * kernels.backward_rows, [&](int64_t, int64_t, int64_t row, int64_t rows) {
      kernels.finalise_input(g_, x_, ld_, row, rows, n, mean_, shift_sum, shift_sum + n, dx);
    });
  }

  void layer(int64_t l) {
    const LayerArgs& layer = args.layers[l];
    const Coefficients c1 = this->coefficients(layer.norm1, mean_, var_, layer.channels);
    const Source<T> prefix = this->source(x_, ld_, c1);
    const at::Tensor d = slice_gradient(l);
    if (!args.bottleneck) {
      conv(layer, prefix, d, g_, ld_, true, c1.mean());
      return consumed(layer.norm1, c1);
    }
    const at::Tensor z = bottleneck(l, prefix);
    const T* zp = static_cast<const T*>(z.const_data_ptr());
    const int64_t at = args.norm2_statistics(l), b = args.width;
    const Coefficients c2 = this->coefficients(layer.norm2, mean_ + at, var_ + at, b);
    if (!dv_.defined()) dv_ = at::empty({pixels_, b}, options_);
    T* dvp = static_cast<T*>(dv_.mutable_data_ptr());
    conv(layer, this->source(zp, b, c2), d, dvp, b, false, c2.mean());
    const Sums t = norm_gradients(layer.norm2, c2);
    product(layer, prefix, c1, dvp, zp, c2, t);
    consumed(layer.norm1, c1);
  }

  // The kept output of the 1x1, or the same made again.
  at::Tensor bottleneck(int64_t l, const Source<T>& prefix) {
    if (z_.size(0) > 0) return z_[l];
    if (!z_again_.defined()) z_again_ = at::empty({pixels_, args.width}, options_);
    this->make_bottleneck(args.layers[l], prefix, static_cast<T*>(z_again_.mutable_data_ptr()), nullptr);
    return z_again_;
  }

  void conv(const LayerArgs& layer, const Source<T>& source, const at::Tensor& d, T* gradient, int64_t ld,
            bool accumulate, const A* mean) {
    const int64_t k = args.growth, depth = args.conv.taps() * k, n = source.channels;
    const at::Tensor weight = this->tap_rows(layer.conv2);
    const at::Tensor panels = this->pack(weight.template const_data_ptr<A>(), depth, n, n, 1);
    const at::Tensor dweight = worker_gradients(needs(layer.conv2_at), depth, n);
    const void* dp = d.const_data_ptr();
    this->for_each_chunk(pixels_, kernels.backward_rows, [&](int64_t worker, int64_t, int64_t row, int64_t rows) {
      kernels.conv_backward(source, args.conv, row, rows, dp, k, this->panels_of(panels),
                            sink(worker, gradient, ld, accumulate, mean, dweight), this->scratch(worker));
    });
    if (!needs(layer.conv2_at)) return;
    const at::Tensor by_tap = total(dweight, depth, n).reshape({args.conv.taps(), k, n});
    set(layer.conv2_at, by_tap.permute({1, 2, 0}).reshape(layer.conv2.sizes()).contiguous());
  }

  void product(const LayerArgs& layer, const Source<T>& prefix, const Coefficients& c1, const T* dv, const T* z,
               const Coefficients& c2, const Sums& t) {
    const int64_t b = args.width, c = layer.channels;
    at::Tensor norm2 = this->template temporary<A>({5, b});  // scale, mean, rstd, t1, t2
    A* n = norm2.mutable_data_ptr<A>();
    for (int64_t j = 0; j < b; ++j) {
      n[j] = c2.scale()[j];
      n[b + j] = c2.mean()[j];
      n[2 * b + j] = c2.rstd()[j];
      n[3 * b + j] = A(t.sum[j]);
      n[4 * b + j] = A(t.weighted[j]);
    }
    const A inv_count = layer.norm2.frozen() ? A(0) : A(1.0 / double(pixels_));
    const at::Tensor weight = this->accumulate_type(layer.conv1);
    const at::Tensor panels = this->pack(weight.template const_data_ptr<A>(), b, c, c, 1);
    const at::Tensor dweight = worker_gradients(needs(layer.conv1_at), b, c);
    this->for_each_chunk(pixels_, kernels.backward_rows, [&](int64_t worker, int64_t, int64_t row, int64_t rows) {
      kernels.product_backward(prefix, row, rows, dv, z, b, n, inv_count, this->panels_of(panels),
                               sink(worker, g_, ld_, true, c1.mean(), dweight), this->scratch(worker));
    });
    if (needs(layer.conv1_at)) set(layer.conv1_at, total(dweight, b, c).reshape(layer.conv1.sizes()));
  }

  const uint64_t seed_;
  const int64_t pixels_, ld_;
  const T* const x_;
  const A *const mean_, *const var_;
  const at::Tensor z_;
  const std::vector<bool>& needs_;
  const at::TensorList weights_;
  const at::TensorOptions options_;
  int64_t widest_ = 0;
  at::Tensor sums_;              // [workers, 2, widest]
  at::Tensor d_, dv_, z_again_;  // of one layer at a time: [pixels, k], [pixels, b], [pixels, b]
  at::Tensor gradient_;          // [N, C, spatial], channels innermost
  T* g_ = nullptr;
  std::vector<double> shift_sum_, slope_sum_;
  std::vector<at::Tensor> grads_;
};

// Gradients of the input and of every weight, empty where `needs_grad` says that none is wanted.
std::vector<at::Tensor> dense_block_backward_cpu(const at::Tensor& grad_output,  // shape of the block's output
                                                 const at::Tensor& buffer,       // [N, C, spatial], channels innermost
                                                 const at::Tensor& mean, const at::Tensor& var, const at::Tensor& z,
                                                 at::TensorList weights, at::ArrayRef<double> eps, int64_t num_layers,
                                                 bool bottleneck, std::string_view tail, double drop_rate,
                                                 const std::optional<at::Tensor>& seed, int64_t in_channels,
                                                 c10::List<bool> needs_grad) {
  check_at_most("_dense_block_backward", "in_channels", in_channels, buffer.size(1));
  std::vector<int64_t> sizes = buffer.sizes().vec();
  sizes[1] = in_channels;
  const DenseBlockArgs args =
      parse_dense_block(sizes, buffer.options(), weights, eps, num_layers, bottleneck, tail, drop_rate, seed);
  check_at_least("_dense_block_backward", "needs_grad", int64_t(needs_grad.size()), int64_t(weights.size()) + 1);
  const std::vector<bool> needs(needs_grad.begin(), needs_grad.end());
  if (args.pixels() == 0) {
    std::vector<at::Tensor> zeros{empty_channels_last(sizes, buffer.options())};
    for (size_t i = 0; i < weights.size(); ++i)
      zeros.push_back(needs[i + 1] ? at::zeros_like(weights[i]) : at::empty({0}, buffer.options()));
    return zeros;
  }
  const uint64_t seed_value = drop_rate > 0 ? uint64_t(seed->item<int64_t>()) : 0;
  std::vector<at::Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, buffer.scalar_type(), "_dense_block_backward", [&] {
    using T = typename Storage<scalar_t>::type;
    grads = Backward<T>(args, buffer, mean, var, z, seed_value, needs, weights).run(grad_output);
  });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("_dense_block_backward", &dense_block_backward_cpu); }

}  // namespace fastdense
