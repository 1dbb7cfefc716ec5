// SPDX-License-Identifier: Apache-2.0
// Forward of the dense block on the CPU: the loop over layers, chunk by chunk.
#include <torch/library.h>

#include "dense_block/dense_block_cpu.h"
#include "dense_block/dense_block_ops.h"

namespace fastdense {
namespace {

template <typename T>
class Forward : BlockForward<T> {
  using Base = BlockForward<T>;
  using A = typename Base::A;
  using Base::kernels;
  using typename Base::Coefficients;

 public:
  Forward(const DenseBlockArgs& args, const DenseBlockOutputs& o, uint64_t seed)
      : Base(args.process_group),
        args_(args),
        conv_(args, *this),
        seed_(seed),
        pixels_(args.pixels()),
        sets_(row_sets(args, pixels_)),
        next_(args.statistics()),
        ld_(args.channels()),
        x_(static_cast<T*>(o.buffer.mutable_data_ptr())),
        mean_(o.mean.mutable_data_ptr<A>()),
        var_(o.var.mutable_data_ptr<A>()),
        z_(o.z) {}

  void run(const at::Tensor& input, const DenseBlockOutputs& o) {
    o.buffer.narrow(1, 0, args_.in_channels).copy_(input);
    if (args_.any_batch_statistics()) this->statistics(x_, ld_, sets_, args_.in_channels, mean_, var_, next_);
    if (args_.bottleneck && z_.size(0) == 0 && args_.active_layers() > 0)
      one_z_ = at::empty({pixels_, args_.width}, o.z.options());
    for (size_t l = 0; l < args_.layers.size(); ++l)
      if (!args_.layers[l].dropped) layer(int64_t(l));
    if (args_.tail == Tail::kTransition) transition(static_cast<T*>(o.out.mutable_data_ptr()));
    if (args_.tail == Tail::kNorm || args_.tail == Tail::kNormRelu) norm(static_cast<T*>(o.out.mutable_data_ptr()));
  }

 private:
  void layer(int64_t l) {
    const LayerArgs& layer = args_.layers[l];
    const Coefficients c1 = norm_of(layer.norm1, 0, layer.channels);
    const NormActivation<T> act1(layer.act1, layer.channels);
    const Source<T> prefix = act1.of(this->source(x_, ld_, c1));
    if (!args_.bottleneck) return conv(l, prefix, c1);
    T* z = static_cast<T*>((one_z_.defined() ? one_z_ : z_[layer.z_index]).mutable_data_ptr());
    const int64_t at = args_.norm2_statistics(l);
    bottleneck(layer, prefix, c1, z, !layer.norm2.frozen(), at);
    const Coefficients c2 = norm_of(layer.norm2, at, args_.width);
    const NormActivation<T> act2(layer.act2, args_.width);
    conv(l, act2.of(this->source(z, args_.width, c2)), c2);
  }

  // Coefficients of a norm of n channels whose statistics start at `at`.
  Coefficients norm_of(const NormArgs& norm, int64_t at, int64_t n) const {
    return this->coefficients(norm, mean_ + at, var_ + at, n, sets_.count, next_);
  }

  void bottleneck(const LayerArgs& layer, const Source<T>& prefix, const Coefficients& c1, T* z, bool statistics,
                  int64_t first) {
    const int64_t b = args_.width;
    const Chunks chunks = this->chunks(sets_, kernels.chunk_rows(layer.channels));
    at::Tensor partial = this->template temporary<double>({statistics ? sets_.count * chunks.count : 0, 2, b});
    Bottleneck<T>(*this, layer, prefix, c1)
        .make_all(sets_, z, statistics ? partial.mutable_data_ptr<double>() : nullptr);
    const auto count = [&](int64_t chunk) { return chunks.size(chunk); };
    if (statistics) this->combine(partial, b, count, mean_ + first, var_ + first, sets_.count, next_);
  }

  void conv(int64_t l, const Source<T>& in, const Coefficients& c) {
    const LayerArgs& layer = args_.layers[l];
    const int64_t k = args_.growth, outer = args_.conv.size[0], planes = conv_.slab_planes();
    const int64_t slabs = conv_.slabs_per_image(), units = args_.batch * slabs;
    const bool statistics = args_.any_batch_statistics();
    const bool winograd = conv_.kernels.uses_winograd(args_.conv, k);
    const at::Tensor panels = winograd ? pack_conv2d_weight(*this, conv_.kernels, args_.conv, layer.conv2.weight, false)
                                       : taps(layer, in.channels);
    const auto run = winograd ? conv_.kernels.conv_winograd : conv_.kernels.conv;
    at::Tensor partial = this->template temporary<double>({statistics ? units : 0, 2, k});
    double* p = partial.mutable_data_ptr<double>();
    const void* w = this->panels_of(panels);
    const Dropout dropout = conv_.dropout(seed_, l);
    const at::Tensor bias = this->bias_of(layer.bias2);
    this->share_units(units, [&](int64_t worker, int64_t unit) {
      const int64_t begin = unit % slabs * planes;
      double* moments = statistics ? p + 2 * unit * k : nullptr;
      const int64_t image = unit / slabs;
      run(this->of_set(in, c, args_.per_sample ? image : 0), args_.conv,
          {image, begin, std::min(begin + planes, outer)}, w,
          {x_ + layer.channels, ld_, k, moments, moments ? moments + k : nullptr, nullptr, 0, this->data_of(bias)},
          dropout, this->workspace(worker));
    });
    if (!statistics) return;
    const auto count = [&](int64_t u) {
      const int64_t begin = u % slabs * planes;
      return (std::min(begin + planes, outer) - begin) * args_.conv.plane();
    };
    this->combine(partial, k, count, mean_ + layer.channels, var_ + layer.channels, sets_.count, next_);
  }

  at::Tensor taps(const LayerArgs& layer, int64_t channels) const {
    const at::Tensor weight = BlockForward<T>::tap_rows(layer.conv2.weight);
    return this->pack(weight.template const_data_ptr<A>(), channels, args_.conv.taps() * args_.growth, 1, channels);
  }

  void transition(T* out) {
    const int64_t co = args_.tail_conv.weight.size(0), most = kernels.chunk_rows(ld_);
    const Coefficients c = norm_of(args_.tail_norm, 0, ld_);
    const NormActivation<T> act(args_.tail_act, ld_);
    const Source<T> source = act.of(this->source(x_, ld_, c));
    const at::Tensor panels = this->pack_forward(args_.tail_conv.weight), bias = this->bias_of(args_.tail_bias);
    this->share_chunks(
        row_sets(args_, args_.batch * args_.pool.pixels()), most,
        [&](int64_t worker, int64_t, int64_t set, int64_t row, int64_t rows) {
          kernels.conv1x1({this->of_set(source, c, set)}, &args_.pool, row, rows, this->panels_of(panels),
                          {{out, co, co, nullptr, nullptr, nullptr, 0, this->data_of(bias)}}, this->workspace(worker));
        });
  }

  void norm(T* out) {
    const Coefficients c = norm_of(args_.tail_norm, 0, ld_);
    const NormActivation<T> act(args_.tail_act, ld_);
    const Source<T> source = act.of(this->source(x_, ld_, c));
    this->share_chunks(sets_, kernels.chunk_rows(ld_), [&](int64_t, int64_t, int64_t set, int64_t row, int64_t rows) {
      kernels.norm(this->of_set(source, c, set), args_.tail == Tail::kNormRelu, row, rows, out);
    });
  }

  const DenseBlockArgs& args_;
  const DenseBlockConvolution<T> conv_;
  const uint64_t seed_;
  const int64_t pixels_;
  const RowSets sets_;  // of pixels
  const int64_t next_;  // numbers between the statistics of two sets
  const int64_t ld_;
  T* const x_;
  A *const mean_, *const var_;
  const at::Tensor z_;
  at::Tensor one_z_;
};

struct ForwardEngine {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static void forward(const DenseBlockArgs& args, const at::Tensor& input, const std::optional<at::Tensor>& seed,
                      const DenseBlockOutputs& o) {
    const uint64_t value = args.drop_rate > 0 ? uint64_t(seed->item<int64_t>()) : 0;
    Forward<T>(args, o, value).run(input, o);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("dense_block", &dense_block<ForwardEngine>); }
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) { m.impl("dense_block", &dense_block<ForwardEngine>); }

}  // namespace fastdense
