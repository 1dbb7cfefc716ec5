// SPDX-License-Identifier: Apache-2.0
// The kernels of residual_dense_block_kernels.h for one target.
//
// Convolution.  A tile of the prefix is copied into scratch with its halo, zero beyond the image; every tap is then a
// product whose left factor is the tile, shifted, and whose sums add up in place: no rows are copied nine times, and
// nothing is scattered.  Backward, the k-channel gradient is gathered at the taps and serves both products.

#include "common/conv_taps.h"

namespace fastdense::FASTDENSE_TARGET {

// Layout of a tile in scratch: rows of `stride` pixels, and of `sums` pixels in the result, as products may overwrite
// rows up to a multiple of kAlign.
template <typename T>
struct TileLayout {
  int64_t halo_rows, halo_columns, rows, stride, sums;
  TileLayout(const ConvGeometry& g, const Tile& tile)
      : halo_rows(g.kernel[0] / 2),
        halo_columns(g.kernel[1] / 2),
        rows(tile.rows + 2 * halo_rows),
        stride(tile.columns + 2 * halo_columns),
        sums(round_up(tile.columns, Gemm<T>::kAlign)) {}
  // Products read rows up to a multiple of kAlign.
  int64_t pixels() const { return rows * stride + Gemm<T>::kAlign; }
};

template <typename T>
int64_t conv_bytes(int64_t channels, const ConvGeometry& g, const Tile& tile, int64_t out) {
  const TileLayout<T> layout(g, tile);
  const int64_t left =
      (layout.pixels() + Gemm<T>::kAlign) * Rows<T>::stride(channels) * sizeof(typename Gemm<T>::Operand);
  const int64_t sums = tile.rows * layout.sums * round_up(out, Gemm<T>::kPanel) * int64_t(sizeof(accumulate_t<T>));
  return round_up(left, 64) + round_up(sums, 64) + 64;
}

// The tile with its halo; what lies outside of the image is zero.
template <typename T>
inline void copy_tile(const Prefix<T>& prefix, const ConvGeometry& g, const Tile& tile, const TileLayout<T>& layout,
                      const Rows<T>& left) {
  using Operand = typename Gemm<T>::Operand;
  for (int64_t r = 0; r < layout.rows; ++r) {
    const int64_t y = tile.row + r - layout.halo_rows;
    for (int64_t q = 0; q < layout.stride; ++q) {
      const int64_t x = tile.column + q - layout.halo_columns;
      Operand* __restrict out = left.row(r * layout.stride + q);
      if (y < 0 || y >= g.size[0] || x < 0 || x >= g.size[1]) {
        for (int64_t j = 0; j < prefix.channels; ++j) out[j] = Operand{};
        continue;
      }
      const T* in = prefix.x + (tile.image * g.pixels() + y * g.size[1] + x) * prefix.ld;
      for (int64_t j = 0; j < prefix.channels; ++j) out[j] = store<Operand>(load(in[j]));
    }
  }
}

// One pixel of the result.
template <typename T, typename A = accumulate_t<T>>
inline void finish_pixel(const Finish<T>& f, const A* __restrict sums, int64_t pixel) {
  T* __restrict out = f.out + pixel * f.ld;
  if (!f.inner.x) {
    for (int64_t j = 0; j < f.channels; ++j) out[j] = store<T>(leaky_relu(sums[j] + f.bias[j], f.slope));
    return;
  }
  const T* inner = f.inner.x + pixel * f.inner.ld;
  if (!f.outer.x) {
    for (int64_t j = 0; j < f.channels; ++j)
      out[j] = store<T>(residual_sum(sums[j] + f.bias[j], f.inner.scale, A(load(inner[j]))));
    return;
  }
  const T* outer = f.outer.x + pixel * f.outer.ld;
  for (int64_t j = 0; j < f.channels; ++j) {
    const A block = residual_sum(sums[j] + f.bias[j], f.inner.scale, A(load(inner[j])));
    out[j] = store<T>(residual_sum(block, f.outer.scale, A(load(outer[j]))));
  }
}

template <typename T, typename A = accumulate_t<T>>
void conv(const Prefix<T>& prefix, const ConvGeometry& g, const Tile& tile, const void* panels, const Finish<T>& f,
          void* room) {
  using G = Gemm<T>;
  Scratch scratch(room);
  const TileLayout<T> layout(g, tile);
  const int64_t channels = prefix.channels, ldc = round_up(f.channels, G::kPanel);
  const int64_t tap_size = round_up(channels, G::kAlign) * ldc;
  const Rows<T> left(scratch, layout.pixels(), channels);
  A* sums = scratch.take<A>(tile.rows * layout.sums * ldc);
  left.pad(layout.pixels(), channels);
  copy_tile(prefix, g, tile, layout, left);
  for (int64_t j = 0; j < ldc; j += G::kPanel) {
    const auto* panel = unpacked<T>(panels) + j * round_up(channels, G::kAlign);
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t shift = tap / g.kernel[1] * layout.stride + tap % g.kernel[1];
      for (int64_t r = 0; r < tile.rows; ++r)
        G::multiply(tile.columns, channels, G::kPanel, left.row(r * layout.stride + shift), left.ld,
                    panel + tap * tap_size, sums + r * layout.sums * ldc + j, ldc, tap > 0);
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t pixel = tile.image * g.pixels() + (tile.row + r) * g.size[1] + tile.column;
    for (int64_t q = 0; q < tile.columns; ++q) finish_pixel(f, sums + (r * layout.sums + q) * ldc, pixel + q);
  }
}

template <typename T, typename A = accumulate_t<T>>
void output_gradient(const T* g, int64_t ldg, const T* y, int64_t ldy, int64_t row, int64_t rows, int64_t n, A slope,
                     void* out) {
  using Operand = typename Gemm<T>::Operand;
  for (int64_t r = row; r < row + rows; ++r) {
    Operand* __restrict d = static_cast<Operand*>(out) + r * n;
    for (int64_t j = 0; j < n; ++j) {
      const A gradient = load(g[r * ldg + j]);
      d[j] = store<Operand>(y ? leaky_relu_gradient(gradient, A(load(y[r * ldy + j])), slope) : gradient * slope);
    }
  }
}

template <typename T, typename A = accumulate_t<T>>
void conv_backward(const Prefix<T>& prefix, const ConvGeometry& g, int64_t row, int64_t rows, const void* d, int64_t k,
                   const void* panels, T* gradient, bool accumulate, A* dweight, double* dbias, void* room) {
  using Operand = typename Gemm<T>::Operand;
  Scratch scratch(room);
  const int64_t depth = g.taps() * k, ld = prefix.ld;
  const Rows<T> left(scratch, rows, depth);
  left.pad(rows, depth);
  gather_taps<T>(g, row, rows, k, unpacked<T>(d), left);
  backward_blocks<T>(
      rows, prefix.channels, left, depth, panels, dweight, gradient != nullptr, scratch,
      [&](int64_t begin, int64_t end, A*, Operand* act) {
        for (int64_t j = begin; j < end;
             j += Gemm<T>::kPanel, act += round_up(rows, Gemm<T>::kAlign) * Gemm<T>::kPanel) {
          const T* x = prefix.x + row * ld + j;
          Gemm<T>::fill_panel(rows, end - j, [=](int64_t r, int64_t i) { return A(load(x[r * ld + i])); }, act);
        }
      },
      [&](int64_t begin, int64_t n, const A* dy, int64_t ldd) {
        for (int64_t r = 0; r < rows; ++r) {
          T* __restrict out = gradient + (row + r) * ld + begin;
          const A* __restrict from = dy + r * ldd;
          for (int64_t j = 0; j < n; ++j) out[j] = store<T>(accumulate ? load(out[j]) + from[j] : from[j]);
        }
      });
  if (!dbias) return;
  A sum[kColumnBlock];
  for (int64_t begin = 0; begin < k; begin += kColumnBlock) {
    const int64_t n = k - begin < kColumnBlock ? k - begin : kColumnBlock;
    for (int64_t j = 0; j < n; ++j) sum[j] = 0;
    for (int64_t r = row; r < row + rows; ++r)
      for (int64_t j = 0; j < n; ++j) sum[j] += load(unpacked<T>(d)[r * k + begin + j]);
    for (int64_t j = 0; j < n; ++j) dbias[begin + j] += double(sum[j]);
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
  static const ResidualDenseBlockKernels<T> kernels = {conv<T>, conv_bytes<T>, output_gradient<T>, conv_backward<T>,
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
