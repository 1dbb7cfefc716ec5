// SPDX-License-Identifier: Apache-2.0
// The kernels of dense_block_kernels.h for one target.
//
// Convolution.  The growth rate k is small, so the taps are unrolled on the narrow side: forward, one product makes all
// taps' contributions [rows, taps * k] of every input pixel, which are then added up at their output pixels; backward,
// the k-channel gradient is gathered at the taps [rows, taps * k] and serves both products, with respect to the input
// and to the weight.  No wide im2col, no padding arithmetic, and every product is a plain matrix product.  Where the
// 16 products of winograd.h are fewer, tiles of whole rows go that way instead.

#include "cpu/conv/conv2d_tile.h"
#include "cpu/conv/conv_taps.h"

namespace fastdense::FASTDENSE_TARGET {

// out[slab pixels, k] += contributions t[rows, taps * k] of the input pixels from `pixel` on.
template <typename A>
inline void scatter_taps(const ConvGeometry& g, const Slab& slab, int64_t pixel, int64_t rows, int64_t k,
                         RowMajor<const A> t, A* out) {
  const int64_t first = slab.begin * g.plane();
  PixelIndex p(g, pixel);
  for (int64_t r = 0; r < rows; ++r, p.next(g)) {
    const A* row = t.data + r * t.ld;
    for_each_tap(
        g, p, slab.begin, slab.end,
        [&](int64_t tap, int64_t q) {
          A* __restrict o = out + (q - first) * k;
          const A* contribution = row + tap * k;
          for (int64_t j = 0; j < k; ++j) o[j] += contribution[j];
        },
        [](int64_t) {});
  }
}

// v[rows, k] *= dropout factors (0 or 1 / (1 - rate)); the mask is a function of (seed, layer, row, channel).
template <typename V>
inline void apply_dropout(const Dropout& dropout, int64_t row, int64_t rows, int64_t k, V* v) {
  using A = accumulate_t<V>;
  if (dropout.rate == 0) return;
  const uint64_t threshold = dropout_threshold(dropout.rate);
  const A factor = dropout.rate < 1 ? A(1 / (1 - dropout.rate)) : A(0);
  for (int64_t i = 0; i < rows * k; ++i)
    v[i] = dropout_keep(dropout.seed, dropout.layer, uint64_t(row * k + i), threshold) ? store<V>(load(v[i]) * factor)
                                                                                       : store<V>(A(0));
}

template <typename T, typename A = accumulate_t<T>>
void conv(const Source<T>& s, const ConvGeometry& g, const Slab& slab, const void* panels, const Target<T>& slice,
          const Dropout& dropout, void* memory) {
  using G = Gemm<T>;
  Workspace workspace(memory);
  const auto [image, begin, end] = slab;
  const int64_t plane = g.plane(), halo = g.kernel[0] / 2, pixels = (end - begin) * plane, k = slice.columns;
  const int64_t n = g.taps() * k, ldt = round_up(n, G::kPanel);
  const int64_t step = chunk_rows<T>(s.channels > n ? s.channels : n);
  A* out = workspace.take<A>(pixels * k);
  const LeftFactor<T> u(workspace, step, s.channels);
  A* t = workspace.take<A>(round_up(step, G::kAlign) * ldt);
  for (int64_t i = 0; i < pixels * k; ++i) out[i] = 0;
  const int64_t last = (end + halo < g.size[0] ? end + halo : g.size[0]) * plane;
  for (int64_t pixel = (begin > halo ? begin - halo : 0) * plane; pixel < last; pixel += step) {
    const int64_t rows = last - pixel < step ? last - pixel : step;
    activate(s, image * g.pixels() + pixel, rows, u, 0);
    G::multiply(rows, s.channels, n, u, unpacked<T>(panels), {t, ldt});
    scatter_taps<A>(g, slab, pixel, rows, k, {t, ldt}, out);
  }
  const int64_t row = image * g.pixels() + begin * plane;
  add_bias(out, k, pixels, k, slice.bias);
  apply_dropout(dropout, row, pixels, k, out);
  store_rows<T>(out, k, row, pixels, slice);
}

// Transforms cost about a third of what products do.
template <typename T>
bool uses_winograd(const ConvGeometry& g, int64_t k) {
  constexpr int64_t kPanel = Gemm<T>::kPanel, kPerPixel = kWinogradProducts / (kWinogradStep * kWinogradStep);
  return uses_winograd<T>(g) && 4 * kPerPixel * round_up(k, kPanel) < 3 * round_up(g.taps() * k, kPanel);
}

template <typename T>
bool uses_winograd_backward(const ConvGeometry& g) {
  return uses_winograd<T>(g);
}

// Rows of a tile whose transforms stay in L2: whole 2x2 squares.
template <typename T>
int64_t winograd_rows(const ConvGeometry& g, int64_t channels) {
  constexpr int64_t kBytes = 512 * 1024, kCopies = 4;  // a pixel is in four patches
  const int64_t row = kCopies * round_up(g.size[1], kWinogradStep) * channels * int64_t(sizeof(accumulate_t<T>));
  const int64_t fit = kBytes / (row > 0 ? row : 1) / kWinogradStep * kWinogradStep;
  const int64_t all = round_up(g.size[0], kWinogradStep);
  return fit < kWinogradStep ? kWinogradStep : fit < all ? fit : all;
}

// Beside the gradient of the sums, L2 holds a panel of what the kernels read and one of its gradient.
template <typename T>
int64_t winograd_rows_backward(const ConvGeometry& g, int64_t k) {
  return winograd_rows<T>(g, k + 2 * Gemm<T>::kPanel);
}

template <typename T>
int64_t winograd_bytes(const ConvGeometry& g, int64_t channels, int64_t k) {
  if (!uses_winograd<T>(g)) return 0;
  const Tile forward{0, 0, winograd_rows<T>(g, channels), 0, g.size[1]};
  const Tile backward{0, 0, winograd_rows_backward<T>(g, k), 0, g.size[1]};
  const Conv2dTile<T> sums(g, backward, k);
  const int64_t of_forward = Conv2dTile<T>(g, forward, channels).bytes();
  const int64_t of_backward = sums.bytes() + WinogradWeightGradient<T>(g, sums).bytes();
  return of_forward > of_backward ? of_forward : of_backward;
}

template <typename T, typename A = accumulate_t<T>>
void conv_winograd(const Source<T>& s, const ConvGeometry& g, const Slab& slab, const void* panels,
                   const Target<T>& slice, const Dropout& dropout, void* memory) {
  using G = Gemm<T>;
  Workspace workspace(memory);
  const int64_t plane = g.plane(), pixels = (slab.end - slab.begin) * plane, k = slice.columns;
  const int64_t row = slab.image * g.pixels() + slab.begin * plane;
  A* out = workspace.take<A>(pixels * k);
  for (int64_t at = slab.begin, step = winograd_rows<T>(g, s.channels); at < slab.end; at += step) {
    const Tile tile{slab.image, at, slab.end - at < step ? slab.end - at : step, 0, g.size[1]};
    Workspace rest = workspace;
    Conv2dTile<T> convolution(g, tile, s.channels);
    if (s.activation)
      convolution.fill_pixels(rest,
                              [&](int64_t pixel, auto* values) { activate_row(s, pixel, 0, s.channels, values); });
    else
      convolution.fill(rest, [&](int64_t pixel, int64_t j) {
        return norm_relu(A(load(s.x[pixel * s.ld + j])), s.scale[j], s.shift[j]);
      });
    for (int64_t j = 0; j < k; j += G::kPanel) {
      const int64_t n = k - j < G::kPanel ? k - j : G::kPanel;
      for_each_sum<T>(g, tile, convolution.tile(), convolution.sums(panels, j), [&](int64_t pixel, const A* sums) {
        A* __restrict to = out + (pixel - row) * k + j;
        for (int64_t i = 0; i < n; ++i) to[i] = sums[i];
      });
    }
  }
  add_bias(out, k, pixels, k, slice.bias);
  apply_dropout(dropout, row, pixels, k, out);
  store_rows<T>(out, k, row, pixels, slice);
}

template <typename T, typename A = accumulate_t<T>>
void conv_winograd_backward(const Source<T>& s, const ConvGeometry& g, const Tile& tile, const SliceGradient& d,
                            const void* panels, const BackwardEpilogue<T>& epilogue, void* memory) {
  using G = Gemm<T>;
  Workspace workspace(memory);
  const int64_t k = d.k;
  Conv2dTile<T> convolution(g, tile, k);
  const auto* gradient = unpacked<T>(d.d);
  convolution.fill(workspace, [&](int64_t pixel, int64_t j) { return A(load(gradient[pixel * k + j])); });
  WinogradWeightGradient<T> weight(g, convolution);
  if (epilogue.dweight) weight.fill(workspace);
  const auto epilogue_pixel = epilogue_of(s, epilogue);
  const int64_t origin = tile.image * g.pixels() + tile.row * g.size[1];
  for (int64_t j = 0; j < s.channels; j += G::kPanel) {
    const int64_t n = s.channels - j < G::kPanel ? s.channels - j : G::kPanel;
    if (epilogue.dweight && s.activation)
      weight.add_pixels(
          n, [&](int64_t pixel, auto* values) { activate_row(s, pixel, j, j + n, values); }, epilogue.dweight + j,
          round_up(s.channels, G::kPanel));
    else if (epilogue.dweight)
      weight.add(
          n,
          [&](int64_t pixel, int64_t i) {
            return norm_relu(A(load(s.x[pixel * s.ld + j + i])), s.scale[j + i], s.shift[j + i]);
          },
          epilogue.dweight + j, round_up(s.channels, G::kPanel));
    if (!epilogue.gradient) continue;
    const A* sums = convolution.sums(panels, j);
    const int64_t row = sums_stride<T>(convolution.tile()) * G::kPanel;
    A sum[G::kPanel], weighted[G::kPanel];
    sum_in_groups(tile.rows, tile.columns, n, sum, weighted, epilogue.sum + j, epilogue.weighted + j, [&](int64_t r) {
      for (int64_t q = 0; q < tile.columns; ++q)
        epilogue_pixel(s, epilogue, origin + r * tile.columns + q, {j, n}, sums + r * row + q * G::kPanel, A(1), sum,
                       weighted);
    });
  }
}

template <typename T>
void finalise(const Gradient<T>& gradient, int64_t row, int64_t rows, const Dropout& dropout, void* out) {
  const int64_t n = gradient.columns;
  auto* d = static_cast<typename Gemm<T>::Operand*>(out) + row * n;
  for (int64_t r = 0; r < rows; ++r) gradient_row(gradient, row + r, d + r * n);
  apply_dropout(dropout, row, rows, n, d);
}

template <typename T>
void conv_backward(const Source<T>& s, const ConvGeometry& g, int64_t row, int64_t rows, const SliceGradient& d,
                   const void* panels, const BackwardEpilogue<T>& epilogue, void* memory) {
  Workspace workspace(memory);
  const LeftFactor<T> left(workspace, rows, g.taps() * d.k);
  gather_taps<T>(g, row, rows, d.k, unpacked<T>(d.d), left);
  backward<T>(s, nullptr, row, rows, left, panels, epilogue, workspace);
}

template <typename T>
const DenseBlockKernels<T>& dense_block_kernels() {
  static const DenseBlockKernels<T> kernels = {conv<T>,
                                               conv_winograd<T>,
                                               finalise<T>,
                                               conv_backward<T>,
                                               conv_winograd_backward<T>,
                                               uses_winograd<T>,
                                               uses_winograd_backward<T>,
                                               winograd_rows_backward<T>,
                                               winograd_bytes<T>,
                                               products<T>,
                                               pack_kernels<T>,
                                               weight_gradient<T>};
  return kernels;
}

#ifndef FASTDENSE_TARGET_PAIRS
template const DenseBlockKernels<float>& dense_block_kernels<float>();
template const DenseBlockKernels<double>& dense_block_kernels<double>();
template const DenseBlockKernels<half>& dense_block_kernels<half>();
#endif
template const DenseBlockKernels<bfloat16>& dense_block_kernels<bfloat16>();

}  // namespace fastdense::FASTDENSE_TARGET
