// SPDX-License-Identifier: Apache-2.0
// What the blocks of layers share on CUDA, forward and backward: launches, chunks of pixel rows, workspace, packed
// weights, norm parameters, batch statistics.  Knows a stream, but not where it comes from: built under
// FASTDENSE_EMULATE, the same code runs on CPU tensors.
//
// The 1x1 convolutions go through relu(norm(x)) chunk by chunk of pixels, in a workspace that stays in the L2 cache.
// Products read and write strided matrices as they are; convolutions get packed tensors only, since they would copy a
// slice of a buffer, and plans cached for packed results would write to the wrong place.  Nothing waits for the device,
// and all memory comes from the caching allocator: a call can be captured in a CUDA graph.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>

#include "core/layout.h"
#include "core/sync_batch_norm.h"
#include "core/weights.h"
#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

struct CudaContext {
  cudaStream_t stream;
  int64_t workspace_bytes;  // of relu(norm(x)): a third of the L2 cache or so
  int64_t blocks;           // that fill the device: kBlocks a multiprocessor
  bool tensor_cores;        // kernels of cuda/mma.h run on it
  bool tf32;                // products of float may round their factors to TF32
  bool tf32_convolutions;
  int64_t shared_bytes;  // that a block may have

  static constexpr int64_t kBlocks = 8;
  int64_t multiprocessors() const { return std::max<int64_t>(1, blocks / kBlocks); }
};

inline void check_launch(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "fastdense: CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// Kernels on windows divide by 32-bit numbers within an image.
inline void check_image_pixels(const char* op, int64_t pixels) {
  TORCH_CHECK_VALUE(pixels <= std::numeric_limits<uint32_t>::max(), op,
                    ": expected an image to have fewer than 2^32 pixels on CUDA, got ", pixels);
}

// Memory that one step of a pass after the other uses: kernels of one stream run in order.
class ReusedMemory {
 public:
  // Room for so many numbers; what was there is lost.
  template <typename A>
  A* take(int64_t count, const at::TensorOptions& options) {
    const int64_t bytes = count * int64_t(sizeof(A));
    if (!memory_.defined() || memory_.numel() < bytes) {
      memory_.reset();  // first, so that the new piece may lie there
      memory_ = at::empty({bytes}, options.dtype(at::kByte));
    }
    return static_cast<A*>(memory_.mutable_data_ptr());
  }

 private:
  at::Tensor memory_;
};

// Partial sums [splits, 2, columns] of a norm's gradient.
template <typename A>
struct PartialSums {
  A* data;
  int64_t splits, columns;
};

template <typename T>
class CudaBlockForward {
 public:
  using A = accumulate_t<T>;

  // process_group: whose processes share batch statistics; see SyncBatchNorm.
  CudaBlockForward(const at::TensorOptions& options, const CudaContext& cuda, const std::string& process_group)
      : options(options), cuda(cuda), sync(process_group) {}

  static at::ScalarType accumulate() { return std::is_same_v<A, double> ? at::kDouble : at::kFloat; }
  at::Tensor numbers(at::IntArrayRef sizes) const { return at::empty(sizes, options.dtype(accumulate())); }
  static T* data(const at::Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }
  static const T* const_data(const at::Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
  static A* sums(const at::Tensor& t) { return t.mutable_data_ptr<A>(); }

  // A parameter in the type of arithmetic: itself, which the caller holds, or a copy that is kept; nullptr for none.
  const A* vector(const at::Tensor& t) {
    if (!t.defined()) return nullptr;
    if (t.scalar_type() == accumulate() && t.is_contiguous()) return t.template const_data_ptr<A>();
    kept_.push_back(t.to(accumulate()).contiguous());
    return kept_.back().template const_data_ptr<A>();
  }

  NormParams<A> norm_params(const NormArgs& n, const A* batch_mean, const A* batch_var) {
    return {vector(n.weight), vector(n.bias), n.frozen() ? vector(n.running_mean) : batch_mean,
            n.frozen() ? vector(n.running_var) : batch_var, A(n.eps)};
  }

  // Among how many blocks a reduction shares its rows.
  int64_t splits(int64_t rows, int64_t columns) const { return column_reduce_splits(rows, columns, cuda.blocks); }

  // Starts a reduction over all of a matrix.
  template <typename Params>
  void reduction(cudaError_t (*launch)(const Params&, int64_t, int64_t, int64_t, cudaStream_t),
                 const std::type_identity_t<Params>& params, int64_t rows, int64_t columns) const {
    check_launch(launch(params, rows, columns, splits(rows, columns), cuda.stream));
  }

  // Rows of the chunks in which a matrix of so many channels goes through the workspace.
  int64_t chunk_rows(int64_t rows, int64_t channels) const {
    constexpr int64_t kMultiple = 128;
    const int64_t most = std::max<int64_t>(1, cuda.workspace_bytes / (padded(channels) * int64_t(sizeof(T))));
    const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most), even = (rows + chunks - 1) / chunks;
    const int64_t whole = (even + kMultiple - 1) / kMultiple * kMultiple;
    return std::max<int64_t>(1, whole <= most ? whole : even);
  }

  // body(first row, rows, chunk); once without rows where there are none, which still have sums.
  template <typename Body>
  void for_each_chunk(int64_t rows, int64_t step, const Body& body) const {
    int64_t row = 0;
    do {
      body(row, std::min(step, rows - row), row / step);
      row += step;
    } while (row < rows);
  }

  // Partial results of a reduction over a matrix in chunks of `step` rows, none over no rows.
  struct Partials {
    at::Tensor tensor;             // [chunks * splits, 2, columns]
    int64_t step, splits, stride;  // rows of a chunk; blocks that share them; numbers of a chunk
    A* of_chunk(int64_t chunk) const { return sums(tensor) + chunk * stride; }
    PartialSums<A> all() const { return {sums(tensor), tensor.size(0), tensor.size(2)}; }
  };
  Partials partials(int64_t rows, int64_t step, int64_t columns) const {
    const int64_t chunks = (rows + step - 1) / step, blocks = splits(std::min(step, rows), columns);
    return {numbers({chunks * blocks, 2, columns}), step, blocks, blocks * 2 * columns};
  }
  Partials partials(int64_t rows, int64_t columns) const { return partials(rows, std::max<int64_t>(1, rows), columns); }

  // Those of a kernel that takes sums in passing; the next one's are in the same place.
  PartialSums<A> reused_partials(int64_t splits, int64_t columns) const {
    return {partials_.template take<A>(splits * 2 * columns, options), splits, columns};
  }
  // The same of a weight's gradient.
  A* reused_weights(int64_t count) const { return weights_.template take<A>(count, options); }

  // Statistics of the columns of a matrix from partial moments relative to `pivot`.
  void finalise_moments(const Partials& partial, const T* pivot, int64_t rows, const BatchStatistics<A>& to) const {
    const int64_t columns = partial.tensor.size(2);
    check_launch(launch_finalise_moments<T>({sums(partial.tensor), pivot, to.mean, to.var, partial.step}, rows, columns,
                                            partial.splits, cuda.stream));
    share_moments(to, columns, rows);
  }
  void share_moments(const BatchStatistics<A>& of, int64_t columns, int64_t rows) const {
    if (of.mean) sync.moments(of.mean, of.var, columns, rows, options);
  }

  // What a fused kernel takes moments with, in so many splits of its rows; nothing where they are not wanted.
  BlockMoments fused_moments(int64_t splits, int64_t columns, int64_t rows, const BatchStatistics<float>& to) const {
    if (!to.mean) return {};
    if (!ticket_.defined()) ticket_ = at::zeros({1}, options.dtype(at::kInt));
    const int64_t counts = splits * 2 * columns;  // which follow, in the place of two numbers each
    auto* partial = moments_.take<float>(counts + 2 * splits, options);
    return {partial,
            reinterpret_cast<int64_t*>(partial + counts),
            reinterpret_cast<unsigned*>(ticket_.template mutable_data_ptr<int>()),
            to.mean,
            to.var,
            rows};
  }

  void statistics(const Matrix<const T>& x, int64_t rows, int64_t columns, const BatchStatistics<A>& to) const {
    const Partials partial = partials(rows, columns);
    reduction(launch_moments<T>, {x, sums(partial.tensor)}, rows, columns);
    finalise_moments(partial, x.data, rows, to);
  }

  // Rows of the workspace, apart by whole 16 bytes, which products like.
  static int64_t padded(int64_t channels) {
    constexpr int64_t kVector = 16 / sizeof(T);
    return (channels + kVector - 1) / kVector * kVector;
  }
  at::Tensor workspace(int64_t rows, int64_t channels) const {
    const at::Tensor whole = at::empty({rows, padded(channels)}, options);
    return padded(channels) == channels ? whole : whole.narrow(1, 0, channels);
  }
  static Matrix<T> matrix(const at::Tensor& t) { return {data(t), t.stride(0)}; }
  static Matrix<const T> const_matrix(const at::Tensor& t) { return {const_data(t), t.stride(0)}; }

  // Spatial sizes as the library's convolutions take them: at least two dimensions.
  static std::vector<int64_t> with_spatial(std::vector<int64_t> sizes, const int64_t (&spatial)[3], size_t dims) {
    sizes.insert(sizes.end(), spatial, spatial + std::max<size_t>(2, dims));
    return sizes;
  }

  // A weight [n, c, kernel...] in the storage type with the channels innermost: itself where it lies so, else memory
  // that launch_packs() fills.  As a matrix [n, c], or as an image of these sizes, which may have more dimensions of 1.
  at::Tensor pack1x1(const at::Tensor& weight) {
    const int64_t n = weight.size(0), c = weight.size(1);
    if (lies_packed(weight) && weight.stride(0) == padded(c) && weight.stride(1) == 1) return weight.flatten(1);
    const at::Tensor to = workspace(n, c);
    note(weight, false, to, to.stride(0));
    return to;
  }
  at::Tensor pack(const at::Tensor& weight, at::IntArrayRef sizes) {
    if (lies_packed(weight) && weight.strides() == at::IntArrayRef(channels_last_strides(sizes))) return weight;
    const at::Tensor to = empty_channels_last(sizes, options);
    note(weight, false, to, sizes[1]);
    return to;
  }
  // With the first two dimensions exchanged, as a matrix [c * taps, n].
  at::Tensor pack_exchanged(const at::Tensor& weight) {
    const int64_t n = weight.size(0);
    const at::Tensor to = workspace(weight.numel() / std::max<int64_t>(1, n), n);
    note(weight, true, to, to.stride(0));
    return to;
  }
  void launch_packs() {
    launch_packs(from_same_);
    if constexpr (sizeof(T) == 2) launch_packs(from_float_);
  }

  const at::TensorOptions options;
  const CudaContext cuda;
  const SyncBatchNorm sync;

 private:
  // As kernels read it: of the storage type, from whole 16 bytes on.
  bool lies_packed(const at::Tensor& weight) const {
    return weight.scalar_type() == options.dtype().toScalarType() &&
           reinterpret_cast<uintptr_t>(const_data(weight)) % 16 == 0;
  }
  // From one tap of a convolution's weight to the next; nothing where there is no such number.
  static std::optional<int64_t> tap_stride(const at::Tensor& weight) {
    int64_t stride = 0, next = 0;
    for (int64_t d = weight.dim() - 1; d > 1; --d) {
      if (weight.size(d) == 1) continue;
      if (stride == 0) stride = next = weight.stride(d);
      if (weight.stride(d) != next) return std::nullopt;
      next *= weight.size(d);
    }
    return stride;
  }
  // Has a weight packed from `ld` numbers to the next; copies stay alive.
  void note(const at::Tensor& weight, bool exchanged, const at::Tensor& to, int64_t ld) {
    const bool from_float = sizeof(T) == 2 && weight.scalar_type() == at::kFloat;
    at::Tensor from = from_float ? weight : weight.to(options.dtype().toScalarType());
    if (!tap_stride(from)) from = from.contiguous();
    const int64_t outer = exchanged ? 1 : 0, inner = 1 - outer;
    const auto add = [&](auto& list, const auto* data) {
      list.push_back({data, this->data(to), from.size(outer), from.size(inner),
                      from.numel() / std::max<int64_t>(1, from.size(0) * from.size(1)), from.stride(outer),
                      from.stride(inner), *tap_stride(from), ld});
    };
    if (from_float) {
      add(from_float_, from.const_data_ptr<float>());
    } else {
      add(from_same_, const_data(from));
    }
    if (!from.is_same(weight)) kept_.push_back(from);
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

  mutable at::Tensor ticket_;  // of kernels that take moments, one after the other
  mutable ReusedMemory moments_, partials_, weights_;
  std::vector<at::Tensor> kept_;
  std::vector<PackedWeight<T, T>> from_same_;
  std::vector<PackedWeight<float, T>> from_float_;
  // Operands have their types already; an autocast that is on would change those of gradients.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

}  // namespace fastdense
