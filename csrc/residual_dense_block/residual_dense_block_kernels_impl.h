// SPDX-License-Identifier: Apache-2.0
// The kernels of residual_dense_block_kernels.h for one target.
//
// Backward, a tile of the gradient is convolved with the reversed kernel for the input's gradient, and meets the prefix
// for the weight's, in the transforms of patches or shifted from tap to tap.

#include "cpu/conv/conv2d_tile.h"
#include "cpu/conv1x1/conv1x1.h"

namespace fastdense::FASTDENSE_TARGET {

// Channels [begin, begin + n) of a pixel of the result.
template <typename T, typename A = accumulate_t<T>>
inline void finish_pixel(const Finish<T>& f, const A* __restrict sums, int64_t pixel, int64_t begin, int64_t n) {
  T* __restrict out = f.out + pixel * f.ld + begin;
  const A* bias = f.bias + begin;
  if (!f.inner.x) {
    for (int64_t j = 0; j < n; ++j) out[j] = store<T>(leaky_relu(sums[j] + bias[j], f.slope));
    return;
  }
  const T* inner = f.inner.x + pixel * f.inner.ld + begin;
  if (!f.outer.x) {
    for (int64_t j = 0; j < n; ++j)
      out[j] = store<T>(residual_sum(sums[j] + bias[j], f.inner.scale, A(load(inner[j]))));
    return;
  }
  const T* outer = f.outer.x + pixel * f.outer.ld + begin;
  for (int64_t j = 0; j < n; ++j) {
    const A block = residual_sum(sums[j] + bias[j], f.inner.scale, A(load(inner[j])));
    out[j] = store<T>(residual_sum(block, f.outer.scale, A(load(outer[j]))));
  }
}

template <typename T>
int64_t conv_bytes(int64_t channels, const ConvGeometry& g, const Tile& tile) {
  return Conv2dTile<T>(g, tile, channels).bytes();
}

template <typename T, typename A = accumulate_t<T>>
void conv(const Prefix<T>& prefix, const ConvGeometry& g, const Tile& tile, const void* panels, const Finish<T>& f,
          void* memory) {
  using G = Gemm<T>;
  Workspace workspace(memory);
  Conv2dTile<T> convolution(g, tile, prefix.channels);
  convolution.fill(workspace, [&](int64_t pixel, int64_t j) { return A(load(prefix.x[pixel * prefix.ld + j])); });
  for (int64_t j = 0; j < f.channels; j += G::kPanel) {
    const int64_t n = f.channels - j < G::kPanel ? f.channels - j : G::kPanel;
    for_each_sum<T>(g, tile, convolution.tile(), convolution.sums(panels, j),
                    [&](int64_t pixel, const A* s) { finish_pixel(f, s, pixel, j, n); });
  }
}

// Pixels of the tile without the gap behind its last row: the depth of the weight's gradient.
template <typename T>
int64_t weight_depth(const HaloTile<T>& left, const Tile& tile) {
  return (tile.rows - 1) * left.stride + tile.columns;
}

template <typename T>
int64_t conv_backward_bytes(int64_t channels, const ConvGeometry& g, const Tile& tile) {
  using G = Gemm<T>;
  const Conv2dTile<T> convolution(g, tile, channels);
  const HaloTile<T>& left = convolution.halo();
  int64_t bytes = convolution.bytes() + 4 * 64;
  if (convolution.winograd()) {
    bytes += WinogradWeightGradient<T>(g, convolution).bytes();
  } else {
    const int64_t act = round_up(weight_depth(left, tile), G::kAlign) * G::kPanel;
    const int64_t operands = act + G::transposed_size(left.pixels(), left.ld);
    bytes += round_up(operands * int64_t(sizeof(typename G::Operand)), 64);
  }
  return bytes;
}

// The columns x[tile, :n] as one panel whose rows lie like the pixels of a halo tile, zero in the gaps.
template <typename T>
inline void fill_gapped_panel(const T* x, int64_t ld, int64_t width, const Tile& tile, int64_t stride, int64_t depth,
                              int64_t n, typename Gemm<T>::Operand* panel) {
  static const T zeros[Gemm<T>::kPanel] = {};
  const auto row = [&](int64_t p) {
    const int64_t r = p / stride, q = p - r * stride;
    return q < tile.columns ? x + (r * width + q) * ld : zeros;
  };
  Gemm<T>::fill_panel(depth, n, [&](int64_t p, int64_t i) { return accumulate_t<T>(load(row(p)[i])); }, panel);
}

// The gradient of a layer's weight over a tile of its sums' gradient, panel by panel of the prefix.
template <typename T>
class WeightGradient {
  using A = accumulate_t<T>;
  using G = Gemm<T>;
  using Operand = typename G::Operand;

 public:
  WeightGradient(Workspace& workspace, const Conv2dTile<T>& sums, const ConvGeometry& g, const Tile& tile)
      : sums_(sums), g_(g), tile_(tile), winograd_(g, sums) {
    const HaloTile<T>& left = sums.halo();
    if (sums.winograd()) {
      winograd_.fill(workspace);
    } else {
      act_ = workspace.take<Operand>(round_up(weight_depth(left, tile), G::kAlign) * G::kPanel);
      factor_ = G::transpose(left.pixels(), left.channels, {left.data, left.ld},
                             workspace.take<Operand>(G::transposed_size(left.pixels(), left.ld)));
    }
  }

  // dweight[product][k][channels] += for `n` columns of the prefix from `column` on; taps are in reverse order.
  void add(const Prefix<T>& prefix, int64_t column, int64_t n, A* dweight, int64_t ldw) {
    if (sums_.winograd())
      winograd_.add(
          n, [&](int64_t pixel, int64_t j) { return A(load(prefix.x[pixel * prefix.ld + column + j])); }, dweight, ldw);
    else
      add_taps(prefix, column, n, dweight, ldw);
  }

 private:
  void add_taps(const Prefix<T>& prefix, int64_t column, int64_t n, A* dweight, int64_t ldw) {
    const HaloTile<T>& left = sums_.halo();
    const int64_t depth = weight_depth(left, tile_);
    const int64_t origin = tile_.image * g_.pixels() + tile_.row * g_.size[1] + tile_.column;
    fill_gapped_panel<T>(prefix.x + origin * prefix.ld + column, prefix.ld, g_.size[1], tile_, left.stride, depth, n,
                         act_);
    for (int64_t tap = 0; tap < g_.taps(); ++tap)
      G::multiply_transposed(depth, left.channels, G::kPanel,
                             factor_.from(tap / g_.kernel[1] * left.stride + tap % g_.kernel[1]), act_,
                             {dweight + tap * left.ld * ldw, ldw});
  }

  const Conv2dTile<T>& sums_;
  const ConvGeometry& g_;
  const Tile& tile_;
  WinogradWeightGradient<T> winograd_;
  Operand* act_ = nullptr;
  typename G::Transposed factor_{};
};

// dbias[k] += over the tile.
template <typename T>
inline void add_bias_gradient(const HaloTile<T>& left, const Tile& tile, double* dbias) {
  using A = accumulate_t<T>;
  A sum[kColumnBlock];
  for (int64_t begin = 0; begin < left.channels; begin += kColumnBlock) {
    const int64_t n = left.channels - begin < kColumnBlock ? left.channels - begin : kColumnBlock;
    for (int64_t j = 0; j < n; ++j) sum[j] = 0;
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t q = 0; q < tile.columns; ++q) {
        const auto* d = left.pixel(r + left.halo_rows, q + left.halo_columns) + begin;
        for (int64_t j = 0; j < n; ++j) sum[j] += load(d[j]);
      }
    for (int64_t j = 0; j < n; ++j) dbias[begin + j] += double(sum[j]);
  }
}

template <typename T, typename A = accumulate_t<T>>
void conv_backward(const SumsGradient<T>& d, const Prefix<T>& prefix, const ConvGeometry& g, const Tile& tile,
                   const void* panels, const ConvGradients<T>& to, void* memory) {
  using G = Gemm<T>;
  Workspace workspace(memory);
  Conv2dTile<T> convolution(g, tile, d.channels);
  if (d.y)
    convolution.fill(workspace, [&](int64_t pixel, int64_t j) {
      return leaky_relu_gradient(A(load(d.g[pixel * d.ldg + j])), A(load(d.y[pixel * d.ldy + j])), d.slope);
    });
  else
    convolution.fill(workspace, [&](int64_t pixel, int64_t j) { return A(load(d.g[pixel * d.ldg + j])) * d.slope; });
  if (to.bias) add_bias_gradient(convolution.halo(), tile, to.bias);
  std::optional<WeightGradient<T>> weight;
  if (to.weight) weight.emplace(workspace, convolution, g, tile);
  const int64_t ldw = round_up(prefix.channels, G::kPanel);
  for (int64_t j = 0; j < prefix.channels; j += G::kPanel) {
    const int64_t n = prefix.channels - j < G::kPanel ? prefix.channels - j : G::kPanel;
    if (weight) weight->add(prefix, j, n, to.weight + j, ldw);
    if (!to.input) continue;
    for_each_sum<T>(g, tile, convolution.tile(), convolution.sums(panels, j),
                    [&](int64_t pixel, const A* __restrict s) {
                      T* __restrict out = to.input + pixel * prefix.ld + j;
                      for (int64_t i = 0; i < n; ++i) out[i] = store<T>(to.accumulate ? load(out[i]) + s[i] : s[i]);
                    });
  }
}

template <typename T, typename A = accumulate_t<T>>
void input_gradient(const T* g, int64_t ldg, const T* grad_output, int64_t row, int64_t rows, int64_t n, A factor,
                    T* dx) {
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t j = 0; j < n; ++j)
      dx[r * n + j] = store<T>(residual_sum(A(load(grad_output[r * n + j])), factor, A(load(g[r * ldg + j]))));
}

template <typename T>
const ResidualDenseBlockKernels<T>& residual_dense_block_kernels() {
  static const ResidualDenseBlockKernels<T> kernels = {products<T>,        pack_kernels<T>,  conv<T>,
                                                       conv_bytes<T>,      conv_backward<T>, conv_backward_bytes<T>,
                                                       weight_gradient<T>, input_gradient<T>};
  return kernels;
}

#ifndef FASTDENSE_TARGET_PAIRS
template const ResidualDenseBlockKernels<float>& residual_dense_block_kernels<float>();
template const ResidualDenseBlockKernels<double>& residual_dense_block_kernels<double>();
template const ResidualDenseBlockKernels<half>& residual_dense_block_kernels<half>();
#endif
template const ResidualDenseBlockKernels<bfloat16>& residual_dense_block_kernels<bfloat16>();

}  // namespace fastdense::FASTDENSE_TARGET
