// SPDX-License-Identifier: Apache-2.0
// The dense block on a CUDA device: the loop over layers between the kernels of dense_block_launch.h and the library's
// matrix products and convolutions.  Knows a stream, but not where it comes from: built under FASTDENSE_EMULATE, the
// same code runs on CPU tensors.
//
// The 1x1 convolutions go through relu(norm(prefix)) chunk by chunk of pixels, in a scratch that stays in the L2 cache.
// Products read and write strided matrices as they are; convolutions get packed tensors only, since they would copy a
// slice of the buffer, and plans cached for packed results would write to the wrong place.  Nothing waits for the
// device, and all memory comes from the caching allocator: a call can be captured in a CUDA graph.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/layout.h"
#include "dense_block/dense_block_launch.h"
#include "dense_block/dense_block_ops.h"

namespace fastdense {

struct CudaContext {
  cudaStream_t stream;
  int64_t scratch_bytes;  // of relu(norm(prefix)): a third of the L2 cache or so
  int64_t blocks;         // that fill the device
};

inline void check_launch(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "dense_block: expected a kernel to start, got: ", cudaGetErrorString(error));
}

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
class CudaBlock {
 public:
  using A = accumulate_t<T>;

  CudaBlock(const DenseBlockArgs& args, const at::TensorOptions& options, const std::optional<at::Tensor>& seed,
            const CudaContext& cuda)
      : args(args),
        options(options),
        cuda(cuda),
        pixels(args.pixels()),
        ld(args.channels()),
        seed_(args.drop_rate > 0 ? seed->const_data_ptr<int64_t>() : nullptr) {
    TORCH_CHECK_VALUE(args.conv.pixels() <= std::numeric_limits<uint32_t>::max(),
                      "dense_block: expected an image to have fewer than 2^32 pixels on CUDA, got ",
                      args.conv.pixels());
  }

  static at::ScalarType accumulate() { return std::is_same_v<A, double> ? at::kDouble : at::kFloat; }
  at::Tensor numbers(at::IntArrayRef sizes) const { return at::empty(sizes, options.dtype(accumulate())); }
  static T* data(const at::Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }
  static const T* const_data(const at::Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
  static A* sums(const at::Tensor& t) { return t.mutable_data_ptr<A>(); }

  // Sizes of an image as the library's convolutions take it: at least two spatial dimensions.
  std::vector<int64_t> image_sizes(int64_t channels) const {
    return with_spatial({args.batch, channels}, args.conv.size);
  }
  at::Tensor packed_image(int64_t channels) const { return empty_channels_last(image_sizes(channels), options); }

  NormParams<A> norm_params(const NormArgs& n, const A* batch_mean, const A* batch_var) {
    return {vector(n.weight), vector(n.bias), n.frozen() ? vector(n.running_mean) : batch_mean,
            n.frozen() ? vector(n.running_var) : batch_var, A(n.eps)};
  }

  DropoutParams dropout(int64_t layer) const {
    return {seed_, uint32_t(layer), dropout_threshold(args.drop_rate),
            args.drop_rate < 1 ? 1 / (1 - args.drop_rate) : 0.0};
  }

  // Among how many blocks a sweep shares its rows.
  int64_t splits(int64_t rows, int64_t columns) const { return sweep_splits(rows, columns, cuda.blocks); }

  // Starts a sweep over all of a matrix.
  template <typename Params>
  void sweep(cudaError_t (*launch)(const Params&, int64_t, int64_t, int64_t, cudaStream_t),
             const std::type_identity_t<Params>& params, int64_t rows, int64_t columns) const {
    check_launch(launch(params, rows, columns, splits(rows, columns), cuda.stream));
  }

  // Rows of the chunks in which a matrix of so many channels goes through the scratch.
  int64_t chunk_rows(int64_t rows, int64_t channels) const {
    constexpr int64_t kMultiple = 128;
    const int64_t most = std::max<int64_t>(1, cuda.scratch_bytes / (padded(channels) * int64_t(sizeof(T))));
    const int64_t chunks = (rows + most - 1) / most, even = (rows + chunks - 1) / chunks;
    const int64_t whole = (even + kMultiple - 1) / kMultiple * kMultiple;
    return whole <= most ? whole : even;
  }

  // body(first row, rows, chunk)
  template <typename Body>
  void for_each_chunk(int64_t rows, int64_t step, const Body& body) const {
    for (int64_t row = 0; row < rows; row += step) body(row, std::min(step, rows - row), row / step);
  }

  // Rows of the scratch, apart by whole 16 bytes, which products like.
  static int64_t padded(int64_t channels) {
    constexpr int64_t kVector = 16 / sizeof(T);
    return (channels + kVector - 1) / kVector * kVector;
  }
  at::Tensor scratch(int64_t rows, int64_t channels) const {
    return at::empty({rows, padded(channels)}, options).narrow(1, 0, channels);
  }
  static Matrix<T> matrix(const at::Tensor& t) { return {data(t), t.stride(0)}; }

  // Weights of the layers from `first` on and of the tail, in the storage type with the channels innermost.
  void pack_weights(int64_t first) {
    conv1_.resize(args.layers.size());
    conv2_.resize(args.layers.size());
    for (size_t l = size_t(first); l < args.layers.size(); ++l) {
      if (args.bottleneck) conv1_[l] = pack1x1(args.layers[l].conv1.weight);
      conv2_[l] =
          pack(args.layers[l].conv2.weight,
               empty_channels_last(with_spatial({args.growth, args.layers[l].conv2.weight.size(1)}, args.conv.kernel),
                                   options));
    }
    if (args.tail == Tail::kTransition) tail_conv_ = pack1x1(args.tail_conv.weight);
    launch_packs(from_same_);
    if constexpr (sizeof(T) == 2) launch_packs(from_float_);
  }
  const at::Tensor& conv1(int64_t l) const { return conv1_[size_t(l)]; }  // [b, c]
  const at::Tensor& conv2(int64_t l) const { return conv2_[size_t(l)]; }  // [k, b or c, kernel]
  const at::Tensor& tail_conv() const { return tail_conv_; }              // [co, C]

  // z [pixels, b] = relu(norm(prefix)) * conv1^T; the same in forward and, when z was not kept, in backward.
  void make_bottleneck(int64_t l, const T* x, const NormParams<A>& norm1, const at::Tensor& z) const {
    const int64_t c = args.layers[size_t(l)].channels, step = chunk_rows(pixels, c);
    const at::Tensor y = scratch(std::min(step, pixels), c);
    for_each_chunk(pixels, step, [&](int64_t row, int64_t rows, int64_t) {
      sweep(launch_activate<T>, {{x + row * ld, ld}, matrix(y), norm1, true}, rows, c);
      at::Tensor out = z.narrow(0, row, rows);
      at::mm_out(out, y.narrow(0, 0, rows), conv1(l).t());
    });
  }

  // relu(norm(x)) of a matrix as a packed image.
  at::Tensor activated_image(const T* x, int64_t ldx, const NormParams<A>& norm, int64_t channels) const {
    const at::Tensor y = packed_image(channels);
    sweep(launch_activate<T>, {{x, ldx}, {data(y), channels}, norm, true}, pixels, channels);
    return y;
  }

  // Padding of the convolution.
  std::vector<int64_t> half_kernel() const {
    std::vector<int64_t> padding = with_spatial({}, args.conv.kernel);
    for (int64_t& size : padding) size /= 2;
    return padding;
  }

  const DenseBlockArgs& args;
  const at::TensorOptions options;
  const CudaContext cuda;
  const int64_t pixels, ld;

 private:
  std::vector<int64_t> with_spatial(std::vector<int64_t> sizes, const int64_t (&spatial)[3]) const {
    sizes.insert(sizes.end(), spatial, spatial + std::max<size_t>(2, args.spatial.size()));
    return sizes;
  }

  // A norm's vector in the type of arithmetic, kept alive.
  const A* vector(const at::Tensor& t) {
    if (!t.defined()) return nullptr;
    kept_.push_back(t.to(accumulate()).contiguous());
    return kept_.back().template const_data_ptr<A>();
  }

  at::Tensor pack1x1(const at::Tensor& weight) {
    return pack(weight.flatten(1), scratch(weight.size(0), weight.size(1)));
  }

  // Notes that `to` is to be filled, or takes the weight itself where it lies as wanted.
  at::Tensor pack(const at::Tensor& weight, const at::Tensor& to) {
    const bool same = weight.scalar_type() == options.dtype().toScalarType();
    const at::Tensor from = weight.reshape({weight.size(0), weight.size(1), -1});
    const int64_t taps = from.size(2), ld_to = to.dim() == 2 ? to.stride(0) : to.size(1);
    if (same && to.strides() == weight.strides()) return weight;
    const auto note = [&](auto& list, const at::Tensor& source, auto* data) {
      kept_.push_back(source);
      list.push_back({data, this->data(to), source.size(0), source.size(1), taps, source.stride(0), source.stride(1),
                      source.stride(2), ld_to});
    };
    if (sizeof(T) == 2 && weight.scalar_type() == at::kFloat) {
      note(from_float_, from, from.const_data_ptr<float>());
    } else {
      const at::Tensor converted = from.to(options.dtype().toScalarType());
      note(from_same_, converted, const_data(converted));
    }
    return to;
  }

  template <typename From>
  void launch_packs(std::vector<PackedWeight<From, T>>& list) const {
    for (size_t begin = 0; begin < list.size(); begin += kMostPacked) {
      PackWeightsParams<From, T> params{};
      params.count = int(std::min<size_t>(kMostPacked, list.size() - begin));
      std::copy_n(list.begin() + ptrdiff_t(begin), params.count, params.weights);
      check_launch(launch_pack_weights<From, T>(params, cuda.stream));
    }
    list.clear();
  }

  const int64_t* seed_;
  std::vector<at::Tensor> conv1_, conv2_, kept_;
  at::Tensor tail_conv_;
  std::vector<PackedWeight<T, T>> from_same_;
  std::vector<PackedWeight<float, T>> from_float_;
  // Operands have their types already; an autocast that is on would change those of gradients.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

}  // namespace fastdense
