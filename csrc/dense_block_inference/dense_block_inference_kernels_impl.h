// SPDX-License-Identifier: Apache-2.0
// The kernels of dense_block_inference_kernels.h for one target.

#include "cpu/conv/winograd4.h"
#include "cpu/conv1x1/conv1x1.h"

namespace fastdense::FASTDENSE_TARGET {

// Instructions on pairs multiply bfloat16, in which transforms would lose digits.
template <typename T>
constexpr bool kHasSquares = std::is_same_v<typename Gemm<T>::Operand, accumulate_t<T>>;

template <typename T>
bool uses_squares(const ConvGeometry& g) {
  return kHasSquares<T> && g.kernel[0] == 3 && g.kernel[1] == 3 && g.kernel[2] == 1 && g.size[2] == 1;
}

// Numbers of a cache line, by which rows and planes are apart from powers of two: these would fall into the same set.
template <typename A>
constexpr int64_t kOff = 64 / int64_t(sizeof(A));

// Their transforms stay in cache beside the panels of one product.
template <typename T>
int64_t most_squares(int64_t channels) {
  constexpr int64_t kBytes = 320 * 1024;
  const int64_t fit = kBytes / (kWinograd4Products * int64_t(sizeof(accumulate_t<T>)) * (channels > 0 ? channels : 1));
  return fit < kTileRows ? kTileRows : fit / kTileRows * kTileRows;
}

template <typename T>
int64_t square_bytes(int64_t channels) {
  if (!kHasSquares<T>) return 0;
  using A = accumulate_t<T>;
  const int64_t of_square = channels + kOff<A> + Gemm<T>::kPanel;
  const int64_t numbers = kWinograd4Products * (channels + most_squares<T>(channels) * of_square + 2 * kOff<A>);
  return numbers * int64_t(sizeof(A)) + 4 * 64;
}

template <typename T, typename A = accumulate_t<T>>
void pack_squares(const A* w, int64_t depth, int64_t n, void* panel) {
  if constexpr (kHasSquares<T>) {
    using G = Gemm<T>;
    constexpr int64_t kAtOnce = 16;  // kernels of a column, which lie one after the other
    const int64_t columns = n < G::kPanel ? n : G::kPanel, plane = depth * G::kPanel;
    auto* out = static_cast<A*>(panel);
    A taps[kAtOnce][9][G::kPanel] = {};
    for (int64_t first = 0; first < depth; first += kAtOnce) {
      const int64_t count = depth - first < kAtOnce ? depth - first : kAtOnce;
      transpose_matrix(w + first * 9, depth * 9, columns, 9 * count, &taps[0][0][0], G::kPanel);
      for (int64_t k = 0; k < count; ++k)
        winograd_transform<3, 6>(&taps[k][0][0], 3 * G::kPanel, G::kPanel, G::kPanel, out + (first + k) * G::kPanel,
                                 plane, [](const A(&g)[3], A(&u)[6]) { Winograd4<A>::kernel(g, u); });
    }
  }
}

// Channels that are summed up before the sum so far is added: the transforms enlarge what long sums round off.
constexpr int64_t kDepth = 32;

// The place of a square: its image, and its first pixel.
struct Square {
  int64_t image, row, column;
  Square(const ConvGeometry& g, int64_t number) {
    const int64_t across = squares_along(g.size[1]), of_image = squares_of_image(g);
    image = number / of_image;
    row = number % of_image / across * kWinograd4Step;
    column = number % across * kWinograd4Step;
  }
};

// patch[36][channels] = relu(source) at the pixels around a square, zero beyond the image.
template <typename T, typename A>
void fill_patch(const Source<T>& s, const ConvGeometry& g, const Square& square, A* patch) {
  const int64_t n = s.channels;
  for (int64_t r = 0; r < kWinograd4Patch; ++r)
    for (int64_t q = 0; q < kWinograd4Patch; ++q) {
      A* __restrict to = patch + (r * kWinograd4Patch + q) * n;
      const int64_t y = square.row + r - 1, x = square.column + q - 1;
      if (y < 0 || y >= g.size[0] || x < 0 || x >= g.size[1]) {
        for (int64_t j = 0; j < n; ++j) to[j] = 0;
        continue;
      }
      const T* __restrict from = s.x + (square.image * g.pixels() + y * g.size[1] + x) * s.ld;
      const A* __restrict scale = s.scale, * __restrict shift = s.shift;
      if (scale)
        for (int64_t j = 0; j < n; ++j) to[j] = norm_relu(A(load(from[j])), scale[j], shift[j]);
      else
        for (int64_t j = 0; j < n; ++j) to[j] = relu(A(load(from[j])));
    }
}

// The 4x4 results of a square from its products, from[36] `plane` apart, for `n` columns of a panel.
template <typename T, typename A = accumulate_t<T>>
void store_square(const A* __restrict from, int64_t plane, const ConvGeometry& g, const Square& square, int64_t column,
                  int64_t n, const Target<T>& slice) {
  constexpr int64_t kPanel = Gemm<T>::kPanel;
  A made[16][kPanel];
#pragma GCC ivdep
  for (int64_t j = 0; j < kPanel; ++j) {
    A m[6][6], y[4][4];
#pragma GCC unroll 36
    for (int i = 0; i < 36; ++i) m[i / 6][i % 6] = from[i * plane + j];
    winograd_both<6, 4>(m, y, [](const A(&v)[6], A(&out)[4]) { Winograd4<A>::output(v, out); });
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) made[i][j] = y[i / 4][i % 4];
  }
  for (int64_t r = 0; r < kWinograd4Step && square.row + r < g.size[0]; ++r)
    for (int64_t q = 0; q < kWinograd4Step && square.column + q < g.size[1]; ++q) {
      const int64_t pixel = square.image * g.pixels() + (square.row + r) * g.size[1] + square.column + q;
      T* __restrict to = slice.out + pixel * slice.ld + column;
      const A* __restrict y = made[4 * r + q];
      if (n == kPanel)
        for (int64_t j = 0; j < kPanel; ++j) to[j] = store<T>(y[j]);
      else
        for (int64_t j = 0; j < n; ++j) to[j] = store<T>(y[j]);
    }
}

template <typename T, typename A = accumulate_t<T>>
void conv_squares(const Source<T>& s, const ConvGeometry& g, const SquareRange& range, const void* panels,
                  const Target<T>& slice, void* memory) {
  if constexpr (kHasSquares<T>) {
    using G = Gemm<T>;
    Workspace workspace(memory);
    const int64_t depth = s.channels, ld = depth + kOff<A>, plane = range.count * ld + kOff<A>;
    const int64_t made_plane = range.count * G::kPanel + kOff<A>;
    A* patch = workspace.take<A>(kWinograd4Products * depth);
    A* patches = workspace.take<A>(kWinograd4Products * plane);
    A* made = workspace.take<A>(kWinograd4Products * made_plane);
    for (int64_t i = 0; i < range.count; ++i) {
      fill_patch(s, g, Square(g, range.first + i), patch);
      winograd_transform<6, 6>(patch, kWinograd4Patch * depth, depth, depth, patches + i * ld, plane,
                               [](const A(&d)[6], A(&v)[6]) { Winograd4<A>::input(d, v); });
    }
    for (int64_t column = 0; column < slice.columns; column += G::kPanel) {
      const A* panel = unpacked<T>(panels) + column * kWinograd4Products * depth;
      for (int64_t p = 0; p < kWinograd4Products; ++p)
        for (int64_t k = 0; k < depth; k += kDepth)
          G::multiply(range.count, depth - k < kDepth ? depth - k : kDepth, G::kPanel, {patches + p * plane + k, ld},
                      panel + (p * depth + k) * G::kPanel, {made + p * made_plane, G::kPanel}, k > 0);
      const int64_t n = slice.columns - column < G::kPanel ? slice.columns - column : G::kPanel;
      for (int64_t i = 0; i < range.count; ++i)
        store_square(made + i * G::kPanel, made_plane, g, Square(g, range.first + i), column, n, slice);
    }
  }
}

template <typename T>
const DenseBlockInferenceKernels<T>& dense_block_inference_kernels() {
  static const DenseBlockInferenceKernels<T> kernels = {uses_squares<T>,    most_squares<T>, square_bytes<T>,
                                                        kWinograd4Products, pack_squares<T>, conv_squares<T>};
  return kernels;
}

#ifndef FASTDENSE_TARGET_PAIRS
template const DenseBlockInferenceKernels<float>& dense_block_inference_kernels<float>();
template const DenseBlockInferenceKernels<double>& dense_block_inference_kernels<double>();
template const DenseBlockInferenceKernels<half>& dense_block_inference_kernels<half>();
#endif
template const DenseBlockInferenceKernels<bfloat16>& dense_block_inference_kernels<bfloat16>();

}  // namespace fastdense::FASTDENSE_TARGET
