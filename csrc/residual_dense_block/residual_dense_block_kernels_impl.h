// SPDX-License-Identifier: Apache-2.0
// The kernels of residual_dense_block_kernels.h for one target.
//
// Convolution.  A tile of the prefix is copied into scratch with its halo, zero beyond the image.  Pixels follow each
// other without gaps, so a row of the kernel is one product whose left factor are the tile's pixels, each with its
// neighbours behind it; the sums of all rows of the kernel add up in place.  Backward, a tile of the gradient is filled
// in the same way; it is convolved with the reversed kernel for the input's gradient, and shifted from tap to tap for
// the weight's.

#include "common/row_products.h"

namespace fastdense::FASTDENSE_TARGET {

// A tile with its halo in scratch.
template <typename T>
struct HaloTile {
  using Operand = typename Gemm<T>::Operand;
  int64_t halo_rows, halo_columns, rows, stride, channels, ld;
  Operand* data = nullptr;

  HaloTile(const ConvGeometry& g, const Tile& tile, int64_t channels)
      : halo_rows(g.kernel[0] / 2),
        halo_columns(g.kernel[1] / 2),
        rows(tile.rows + 2 * halo_rows),
        stride(tile.columns + 2 * halo_columns),
        channels(channels),
        ld(round_up(channels, Gemm<T>::kAlign)) {}

  // Products read rows up to a multiple of kAlign, from any pixel on.
  int64_t pixels() const { return rows * stride + Gemm<T>::kAlign; }
  int64_t bytes() const { return round_up(pixels() * ld * int64_t(sizeof(Operand)), 64); }
  Operand* pixel(int64_t row, int64_t column) const { return data + (row * stride + column) * ld; }

  // value(pixel, channel) inside of the image, zero outside.
  template <typename Value>
  void fill(const ConvGeometry& g, const Tile& tile, const Value& value) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = tile.row + r - halo_rows;
      for (int64_t q = 0; q < stride; ++q) {
        const int64_t x = tile.column + q - halo_columns;
        Operand* __restrict out = pixel(r, q);
        const bool inside = 0 <= y && y < g.size[0] && 0 <= x && x < g.size[1];
        const int64_t filled = inside ? channels : 0, at = tile.image * g.pixels() + y * g.size[1] + x;
        for (int64_t j = 0; j < filled; ++j) out[j] = store<Operand>(value(at, j));
        for (int64_t j = filled; j < ld; ++j) out[j] = Operand{};
      }
    }
    for (Operand* out = pixel(rows, 0); out < data + pixels() * ld; ++out) *out = Operand{};
  }
};

// Pixels of a row of sums, as products may overwrite rows up to a multiple of kAlign.
template <typename T>
constexpr int64_t sums_stride(const Tile& tile) {
  return round_up(tile.columns, Gemm<T>::kAlign);
}
template <typename T>
constexpr int64_t sums_bytes(const Tile& tile) {
  return tile.rows * sums_stride<T>(tile) * Gemm<T>::kPanel * int64_t(sizeof(accumulate_t<T>));
}

// sums[tile.rows, sums_stride, kPanel] = the convolution with one panel.
template <typename T>
inline void convolve(const HaloTile<T>& left, const ConvGeometry& g, const Tile& tile,
                     const typename Gemm<T>::Operand* panel, accumulate_t<T>* sums) {
  using G = Gemm<T>;
  const int64_t depth = g.kernel[1] * left.ld, row = sums_stride<T>(tile) * G::kPanel;
  for (int64_t t = 0; t < g.kernel[0]; ++t)
    for (int64_t r = 0; r < tile.rows; ++r)
      G::multiply(tile.columns, depth, G::kPanel, left.pixel(r + t, 0), left.ld, panel + t * depth * G::kPanel,
                  sums + r * row, G::kPanel, t > 0);
}

// visit(index of the pixel, its sums)
template <typename T, typename A, typename Visit>
inline void for_each_sum(const ConvGeometry& g, const Tile& tile, const A* sums, const Visit& visit) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t pixel = tile.image * g.pixels() + (tile.row + r) * g.size[1] + tile.column;
    for (int64_t q = 0; q < tile.columns; ++q)
      visit(pixel + q, sums + (r * sums_stride<T>(tile) + q) * Gemm<T>::kPanel);
  }
}

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
  return HaloTile<T>(g, tile, channels).bytes() + round_up(sums_bytes<T>(tile), 64) + 64;
}

template <typename T, typename A = accumulate_t<T>>
void conv(const Prefix<T>& prefix, const ConvGeometry& g, const Tile& tile, const void* panels, const Finish<T>& f,
          void* room) {
  using G = Gemm<T>;
  Scratch scratch(room);
  HaloTile<T> left(g, tile, prefix.channels);
  left.data = scratch.take<typename G::Operand>(left.pixels() * left.ld);
  A* sums = scratch.take<A>(sums_bytes<T>(tile) / int64_t(sizeof(A)));
  left.fill(g, tile, [&](int64_t pixel, int64_t j) { return A(load(prefix.x[pixel * prefix.ld + j])); });
  for (int64_t j = 0; j < f.channels; j += G::kPanel) {
    const int64_t n = f.channels - j < G::kPanel ? f.channels - j : G::kPanel;
    convolve(left, g, tile, unpacked<T>(panels) + j * g.taps() * left.ld, sums);
    for_each_sum<T>(g, tile, sums, [&](int64_t pixel, const A* s) { finish_pixel(f, s, pixel, j, n); });
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
  const HaloTile<T> left(g, tile, channels);
  const int64_t act = round_up(weight_depth(left, tile), G::kAlign) * G::kPanel;
  const int64_t operands = act + G::transposed_size(left.pixels(), left.ld);
  return left.bytes() + round_up(operands * int64_t(sizeof(typename G::Operand)), 64) +
         round_up(sums_bytes<T>(tile), 64) + 64;
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

// dweight[shift][k][channels] += over the tile, for the columns of one panel.
template <typename T>
inline void add_weight_gradient(const HaloTile<T>& left, const typename Gemm<T>::Transposed& factor,
                                const ConvGeometry& g, const Tile& tile, const typename Gemm<T>::Operand* act,
                                accumulate_t<T>* dweight, int64_t ldw) {
  for (int64_t tap = 0; tap < g.taps(); ++tap)
    Gemm<T>::multiply_transposed(weight_depth(left, tile), left.channels, Gemm<T>::kPanel,
                                 factor.from(tap / g.kernel[1] * left.stride + tap % g.kernel[1]), act,
                                 dweight + tap * left.ld * ldw, ldw);
}

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
                   const void* panels, const ConvGradients<T>& to, void* room) {
  using G = Gemm<T>;
  using Operand = typename G::Operand;
  Scratch scratch(room);
  HaloTile<T> left(g, tile, d.channels);
  left.data = scratch.take<Operand>(left.pixels() * left.ld);
  A* sums = scratch.take<A>(sums_bytes<T>(tile) / int64_t(sizeof(A)));
  const int64_t depth = weight_depth(left, tile), ldw = round_up(prefix.channels, G::kPanel);
  Operand* act = scratch.take<Operand>(round_up(depth, G::kAlign) * G::kPanel);
  if (d.y)
    left.fill(g, tile, [&](int64_t pixel, int64_t j) {
      return leaky_relu_gradient(A(load(d.g[pixel * d.ldg + j])), A(load(d.y[pixel * d.ldy + j])), d.slope);
    });
  else
    left.fill(g, tile, [&](int64_t pixel, int64_t j) { return A(load(d.g[pixel * d.ldg + j])) * d.slope; });
  if (to.bias) add_bias_gradient(left, tile, to.bias);
  typename G::Transposed factor{};
  if (to.weight)
    factor = G::transpose(left.pixels(), left.channels, left.data, left.ld,
                          scratch.take<Operand>(G::transposed_size(left.pixels(), left.ld)));
  const T* origin = prefix.x + (tile.image * g.pixels() + tile.row * g.size[1] + tile.column) * prefix.ld;
  for (int64_t j = 0; j < prefix.channels; j += G::kPanel) {
    const int64_t n = prefix.channels - j < G::kPanel ? prefix.channels - j : G::kPanel;
    if (to.weight) {
      fill_gapped_panel<T>(origin + j, prefix.ld, g.size[1], tile, left.stride, depth, n, act);
      add_weight_gradient(left, factor, g, tile, act, to.weight + j, ldw);
    }
    if (!to.input) continue;
    convolve(left, g, tile, unpacked<T>(panels) + j * g.taps() * left.ld, sums);
    for_each_sum<T>(g, tile, sums, [&](int64_t pixel, const A* __restrict s) {
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
  static const ResidualDenseBlockKernels<T> kernels = {conv<T>, conv_bytes<T>, conv_backward<T>, conv_backward_bytes<T>,
                                                       input_gradient<T>};
  return kernels;
}

#ifndef FASTDENSE_TARGET_AMX
template const ResidualDenseBlockKernels<float>& residual_dense_block_kernels<float>();
template const ResidualDenseBlockKernels<double>& residual_dense_block_kernels<double>();
template const ResidualDenseBlockKernels<half>& residual_dense_block_kernels<half>();
#endif
template const ResidualDenseBlockKernels<bfloat16>& residual_dense_block_kernels<bfloat16>();

}  // namespace fastdense::FASTDENSE_TARGET
