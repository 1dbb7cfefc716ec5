// SPDX-License-Identifier: Apache-2.0
// Dense blocks in inference on the CPU: folding and packing, and the loop over images, layers and rows.
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

#include "core/checks.h"
#include "core/layout.h"
#include "cpu/block_forward.h"
#include "dense_block/dense_block_kernels.h"
#include "dense_block_inference/dense_block_inference.h"
#include "dense_block_inference/dense_block_inference_kernels.h"

namespace fastdense {
namespace {

template <typename T>
PanelSizes panel_sizes(const ConvGeometry& g) {
  const auto& products = conv1x1_kernels<T>(current_isa());
  const auto& squares = dense_block_inference_kernels<T>(current_isa());
  return {products.panel, products.align, products.operand_bytes, g.taps(),
          squares.uses_squares(g) ? squares.products : 0};
}

// How images are shared out among threads.
struct Sharing {
  Sharing(const DenseBlockArgs& args, int64_t workers)
      : by_image(args.batch % workers == 0 || args.batch >= 8 * workers),
        group(by_image ? images_of_group(args, workers) : args.batch) {}

  const bool by_image;  // whether each worker has images of its own, or all work on the same
  const int64_t group;  // images that go through the block together

 private:
  // Enough rows for products to be fast, and few enough for their features to stay in cache.
  static int64_t images_of_group(const DenseBlockArgs& args, int64_t workers) {
    constexpr int64_t kRows = 784;
    const int64_t of_worker = std::max<int64_t>(1, args.batch / workers);
    return std::min(of_worker, std::max<int64_t>(1, kRows / args.conv.pixels()));
  }
};

// Whether conv2 goes by F(4x4, 3x3), which has fewer products but four times the weights: few pixels are sooner done by
// their taps than these are read.
bool goes_by_squares(const DenseBlockArgs& args, const PanelSizes& sizes, const Sharing& sharing) {
  // Products of a pair of channels that reading its weights is worth.  On two AVX2 cores DenseNet-121's third block
  // takes 0.8 of the time by taps at 4 x 4 pixels, 0.9 at 5 x 5, as much at 6 x 6 or two images of 4 x 4, 1.1 at 8 x 8.
  constexpr int64_t kWorth = 144;
  const int64_t of_image = sizes.taps * args.conv.pixels() - sizes.squares * squares_of_image(args.conv);
  return sizes.squares > 0 && sharing.group * of_image > kWorth;
}

template <typename T>
class Packer : BlockForward<T> {
  using Base = BlockForward<T>;
  using A = typename Base::A;

 public:
  Packer(const DenseBlockArgs& args, const PanelSizes& sizes, const ConvForms& forms)
      : args_(args),
        squares_(dense_block_inference_kernels<T>(current_isa())),
        sizes_(sizes),
        forms_(forms),
        packed_(empty_packed({args, sizes, forms}, at::TensorOptions().dtype(Base::kAccumulate))),
        numbers_(packed_.numbers.template mutable_data_ptr<A>()),
        panels_(packed_.panels.template mutable_data_ptr<uint8_t>()) {}

  PackedBlock run() const {
    const PackedLayout& layout = packed_.layout;
    for (size_t l = 0; l < args_.layers.size(); ++l) pack_layer(args_.layers[l], layout.layers[l]);
    if (args_.tail != Tail::kNone) put(scale_and_shift(args_.tail_norm, args_.channels()), layout.tail_coefficients);
    if (args_.tail == Tail::kTransition) {
      const at::Tensor& conv = args_.tail_conv.weight;
      pack_rows(Base::accumulate_type(conv).reshape({conv.size(0), conv.size(1)}), layout.tail_conv);
    }
    return packed_;
  }

 private:
  void pack_layer(const LayerArgs& layer, const PackedLayout::Layer& at) const {
    put(scale_and_shift(layer.norm1, layer.channels), at.coefficients);
    if (args_.bottleneck) {
      const at::Tensor c = scale_and_shift(layer.norm2, args_.width);
      const at::Tensor weight = Base::accumulate_type(layer.conv1.weight).reshape({args_.width, layer.channels});
      pack_rows(weight * c[0].unsqueeze(1), at.conv1);
      put(c[1], at.bias1);
    }
    if (forms_.taps) pack_rows(Base::tap_rows(layer.conv2.weight), at.taps);
    if (forms_.squares) pack_squares(layer.conv2.weight, at.squares);
  }

  at::Tensor scale_and_shift(const NormArgs& norm, int64_t n) const {
    return this->coefficients(norm, nullptr, nullptr, n).tensor[0].narrow(0, 0, 2);
  }

  void put(const at::Tensor& numbers, int64_t at) const {
    std::memcpy(numbers_ + at, numbers.template const_data_ptr<A>(), numbers.nbytes());
  }

  // weight [n, depth]
  void pack_rows(const at::Tensor& weight, int64_t at) const {
    this->pack_to(panels_ + at, weight.template const_data_ptr<A>(), weight.size(1), weight.size(0), 1, weight.size(1));
  }

  void pack_squares(const at::Tensor& conv, int64_t at) const {
    const at::Tensor weight = Base::accumulate_type(conv);
    const int64_t n = conv.size(0), depth = conv.size(1), panel = this->kernels.panel;
    const int64_t bytes = sizes_.conv_squares(depth, panel);
    const A* w = weight.template const_data_ptr<A>();
    this->share_units((n + panel - 1) / panel, [&](int64_t, int64_t unit) {
      squares_.pack(w + unit * panel * depth * 9, depth, n - unit * panel, panels_ + at + unit * bytes);
    });
  }

  const DenseBlockArgs& args_;
  const DenseBlockInferenceKernels<T>& squares_;
  const PanelSizes sizes_;
  const ConvForms forms_;
  const PackedBlock packed_;
  A* const numbers_;
  uint8_t* const panels_;
};

// Images that go through the block together.
struct Images {
  int64_t first, count;
};

template <typename T>
class Inference : BlockForward<T> {
  using Base = BlockForward<T>;
  using A = typename Base::A;
  using Base::kernels;

 public:
  Inference(const DenseBlockArgs& args, const PanelSizes& sizes, const Sharing& sharing, const PackedBlock& packed,
            const at::Tensor& input, const at::Tensor& out)
      : args_(args),
        layout_(packed.layout),
        numbers_(packed.numbers.template const_data_ptr<A>()),
        panels_(packed.panels.template const_data_ptr<uint8_t>()),
        squares_(dense_block_inference_kernels<T>(current_isa())),
        taps_(dense_block_kernels<T>(current_isa())),
        sizes_(sizes),
        by_squares_(goes_by_squares(args, sizes, sharing)),
        image_(args.conv.pixels()),
        ld_(args.channels()),
        input_(to_channels_last(input)),
        out_(static_cast<T*>(out.mutable_data_ptr())),
        by_image_(sharing.by_image),
        group_(sharing.group) {
    const int64_t teams = by_image_ ? this->workers : 1, b = args.width, depth = b > 0 ? b : ld_;
    const int64_t co = args.tail == Tail::kTransition ? args.tail_conv.weight.size(0) : 0;
    const int64_t sums = by_squares_ ? 0 : image_ * args.growth * int64_t(sizeof(A)) + 64;
    this->reserve_workspace(std::max(ld_, b), std::max({b, args.conv.taps() * args.growth, co}),
                            sums + squares_.workspace_bytes(depth));
    if (args.tail != Tail::kNone) buffer_ = Base::bytes(teams * group_ * image_ * ld_ * int64_t(sizeof(T)));
    if (b > 0) z_ = Base::bytes(teams * group_ * image_ * b * int64_t(sizeof(T)));
    if (b > 0 && !by_squares_) unit_ = at::stack({at::ones({b}, numbers()), at::zeros({b}, numbers())});
  }

  void run() const {
    if (!by_image_) return block(0, {0, args_.batch});
    const int64_t most = (args_.batch + this->workers - 1) / this->workers;
    const int64_t groups = this->workers * ((most + group_ - 1) / group_);
    this->share_units(groups, [&](int64_t worker, int64_t unit) {
      const int64_t first = unit * args_.batch / groups, end = (unit + 1) * args_.batch / groups;
      if (end > first) block(worker, {first, end - first});
    });
  }

 private:
  static at::TensorOptions numbers() { return at::TensorOptions().dtype(Base::kAccumulate); }

  // body(worker, unit) for all units: by all workers where they share the images, else by the one that has them.
  template <typename Body>
  void share(int64_t worker, int64_t units, const Body& body) const {
    if (!by_image_) return this->share_units(units, body);
    for (int64_t unit = 0; unit < units; ++unit) body(worker, unit);
  }

  // Parts that `count` things are worked on in, `most` at once.
  int64_t parts(int64_t count, int64_t most) const {
    const int64_t needed = (count + most - 1) / most, shares = by_image_ ? 1 : this->workers;
    return std::min(count, (needed + shares - 1) / shares * shares);
  }

  // Of the images that a worker has, or all.
  T* memory(const at::Tensor& bytes, int64_t worker, int64_t columns) const {
    return static_cast<T*>(bytes.mutable_data_ptr()) + worker * group_ * image_ * columns;
  }

  void block(int64_t worker, const Images& images) const {
    const int64_t rows = images.count * image_, b = args_.width, first = images.first * image_;
    T* x = buffer_.defined() ? memory(buffer_, worker, ld_) : out_ + first * ld_;
    T* z = b > 0 ? memory(z_, worker, b) : nullptr;
    const T* from = static_cast<const T*>(input_.const_data_ptr()) + first * args_.in_channels;
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(x + r * ld_, from + r * args_.in_channels, size_t(args_.in_channels) * sizeof(T));
    for (size_t l = 0; l < args_.layers.size(); ++l) {
      const PackedLayout::Layer& layer = layout_.layers[l];
      Source<T> source = prefix(x, layer.coefficients, args_.layers[l].channels);
      T* slice = x + source.channels;
      if (b > 0) {
        product(worker, source, nullptr, rows, layer.conv1,
                {z, b, b, nullptr, nullptr, nullptr, 0, numbers_ + layer.bias1});
        source = {z, b, b, nullptr, nullptr};  // relu alone
      }
      by_squares_ ? squares(worker, images.count, source, layer.squares, {slice, ld_, args_.growth})
                  : taps(worker, images.count, source, layer.taps, {slice, ld_, args_.growth});
    }
    tail(worker, images, x);
  }

  Source<T> prefix(const T* x, int64_t coefficients, int64_t n) const {
    const A* c = numbers_ + coefficients;
    return {x, ld_, n, c, c + n};
  }

  // target = act(source) * panels + bias.  Few rows are shared by columns, so that each weight is read once.
  void product(int64_t worker, const Source<T>& s, const PoolGeometry* pool, int64_t rows, int64_t panels_at,
               const Target<T>& target) const {
    constexpr int64_t kFewRows = 96;
    const int64_t n = target.columns, panels = sizes_.padded(n) / kernels.panel, most = kernels.chunk_rows(s.channels);
    const int64_t sides = !by_image_ && rows < kFewRows * this->workers ? std::min(panels, this->workers) : 1;
    const int64_t count = sides > 1 ? 1 : parts(rows, most);
    share(worker, count * sides, [&](int64_t w, int64_t unit) {
      const int64_t part = unit / sides, side = unit % sides, end = (part + 1) * rows / count;
      const int64_t first = side * panels / sides * kernels.panel;
      Target<T> to = target;
      to.out += first;
      to.columns = std::min(n, (side + 1) * panels / sides * kernels.panel) - first;
      if (to.bias) to.bias += first;
      for (int64_t row = part * rows / count; row < end; row += most)
        kernels.conv1x1({s}, pool, row, std::min(most, end - row),
                        panels_ + panels_at + sizes_.conv1x1(s.channels, first), {to}, this->workspace(w));
    });
  }

  void squares(int64_t worker, int64_t images, const Source<T>& s, int64_t panels_at, const Target<T>& slice) const {
    const int64_t total = images * squares_of_image(args_.conv),
                  count = parts(total, squares_.most_squares(s.channels));
    share(worker, count, [&](int64_t w, int64_t part) {
      const int64_t first = part * total / count, end = (part + 1) * total / count;
      squares_.conv(s, args_.conv, {first, end - first}, panels_ + panels_at, slice, this->workspace(w));
    });
  }

  // The taps are added up, plane by plane.
  void taps(int64_t worker, int64_t images, Source<T> s, int64_t panels_at, const Target<T>& slice) const {
    if (!s.scale) {
      s.scale = unit_.template const_data_ptr<A>();
      s.shift = s.scale + s.channels;
    }
    const int64_t outer = args_.conv.size[0], slabs = by_image_ ? 1 : std::min(outer, this->workers);
    share(worker, images * slabs, [&](int64_t w, int64_t unit) {
      const int64_t part = unit % slabs;
      taps_.conv(s, args_.conv, {unit / slabs, part * outer / slabs, (part + 1) * outer / slabs}, panels_ + panels_at,
                 slice, {0, 0, 0}, this->workspace(w));
    });
  }

  void tail(int64_t worker, const Images& images, const T* x) const {
    if (args_.tail == Tail::kNone) return;
    const Source<T> s = prefix(x, layout_.tail_coefficients, ld_);
    if (args_.tail == Tail::kTransition) {
      const int64_t pooled = args_.pool.pixels(), n = args_.tail_conv.weight.size(0);
      return product(worker, s, &args_.pool, images.count * pooled, layout_.tail_conv,
                     {out_ + images.first * pooled * n, n, n});
    }
    T* out = out_ + images.first * image_ * ld_;
    const int64_t rows = images.count * image_, count = parts(rows, rows);
    share(worker, count, [&](int64_t, int64_t part) {
      const int64_t row = part * rows / count, end = (part + 1) * rows / count;
      kernels.norm(s, args_.tail == Tail::kNormRelu, row, end - row, out);
    });
  }

  const DenseBlockArgs& args_;
  const PackedLayout& layout_;
  const A* const numbers_;
  const uint8_t* const panels_;
  const DenseBlockInferenceKernels<T>& squares_;
  const DenseBlockKernels<T>& taps_;
  const PanelSizes sizes_;
  const bool by_squares_;
  const int64_t image_;  // pixels of one
  const int64_t ld_;
  const at::Tensor input_;
  T* const out_;
  const bool by_image_;
  const int64_t group_;
  at::Tensor buffer_;  // undefined where the features are the output
  at::Tensor z_, unit_;
};

at::TensorOptions options_of(const char* op, at::TensorList weights) {
  check_at_least(op, "number of weights", int64_t(weights.size()), 5);
  check_floating(op, "layer 0 conv", weights[4]);
  check_rank_between(op, "layer 0 conv", weights[4], 3, 5);
  return weights[4].options();
}

std::vector<at::Tensor> pack_dense_block(at::TensorList weights, at::ArrayRef<double> eps, int64_t in_channels,
                                         int64_t num_layers, bool bottleneck, std::string_view tail) {
  constexpr const char* kOp = "pack_dense_block";
  const at::TensorOptions options = options_of(kOp, weights);
  check_at_least(kOp, "in_channels", in_channels, 1);
  std::vector<int64_t> sizes(size_t(weights[4].dim()), 2);  // any image: what is packed does not depend on its size
  sizes[1] = in_channels;
  const DenseBlockArgs args = parse_dense_block(kOp, sizes, options, weights,
                                                {eps, num_layers, bottleneck, tail, 0, std::nullopt, "", "", {}, {}});
  check_inference(kOp, args);
  std::vector<at::Tensor> packed;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights[4].scalar_type(), kOp, [&] {
    using T = typename Storage<scalar_t>::type;
    const PanelSizes panels = panel_sizes<T>(args.conv);
    const ConvForms forms{true, panels.squares > 0};  // for images of any size
    packed = to_list(weights[4].is_meta() ? empty_packed({args, panels, forms}, options)
                                          : Packer<T>(args, panels, forms).run());
  });
  return packed;
}

at::Tensor dense_block_inference(const at::Tensor& input,  // [N, C0, spatial]
                                 at::TensorList weights, at::ArrayRef<double> eps, int64_t num_layers, bool bottleneck,
                                 std::string_view tail, at::TensorList packed, bool contiguous) {
  constexpr const char* kOp = "dense_block_inference";
  check_floating(kOp, "input", input);
  const DenseBlockArgs args = parse_dense_block(kOp, input.sizes(), input.options(), weights,
                                                {eps, num_layers, bottleneck, tail, 0, std::nullopt, "", "", {}, {}});
  check_inference(kOp, args);
  const at::Tensor out = empty_channels_last(args.out_sizes(), input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
    using T = typename Storage<scalar_t>::type;
    const PanelSizes sizes = panel_sizes<T>(args.conv);
    const Sharing sharing(args, std::max(1, at::get_num_threads()));
    std::optional<PackedBlock> block;
    if (!packed.empty())
      block = read_packed(kOp, {args, sizes, {true, sizes.squares > 0}}, packed, statistics_dtype(input.scalar_type()));
    if (!has_values(out)) return;
    const bool by_squares = goes_by_squares(args, sizes, sharing);
    if (!block) block = Packer<T>(args, sizes, {!by_squares, by_squares}).run();
    Inference<T>(args, sizes, sharing, *block, input, out).run();
  });
  return contiguous ? out.contiguous() : out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("pack_dense_block", &pack_dense_block);
  m.impl("dense_block_inference", &dense_block_inference);
}
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) {
  m.impl("pack_dense_block", &pack_dense_block);
  m.impl("dense_block_inference", &dense_block_inference);
}

}  // namespace fastdense
