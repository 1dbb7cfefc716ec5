// SPDX-License-Identifier: Apache-2.0
// Convolution in two dimensions of a tile of an image with panels of kernels, and its backward.
//
// A tile is copied into the workspace with its halo, zero beyond the image.  A 3x3 kernel goes the way of winograd.h:
// 16 products of the transformed patches.  Otherwise pixels follow each other without gaps, so a row of the kernel is
// one product whose left factor is the tile's pixels, each with its neighbours behind it; the sums of all rows of the
// kernel are added up in place.
#pragma once

#include "cpu/conv/winograd.h"
#include "cpu/conv1x1/conv1x1.h"

namespace fastdense::FASTDENSE_TARGET {

// A tile with its halo, in the workspace.
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
    const int64_t n = channels;
    fill_pixels(g, tile, [&value, n](int64_t at, Operand* __restrict out) {
      for (int64_t j = 0; j < n; ++j) out[j] = store<Operand>(value(at, j));
    });
  }

  // The same by write(pixel, its channels).
  template <typename Write>
  void fill_pixels(const ConvGeometry& g, const Tile& tile, const Write& write) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = tile.row + r - halo_rows;
      for (int64_t q = 0; q < stride; ++q) {
        const int64_t x = tile.column + q - halo_columns;
        Operand* __restrict out = pixel(r, q);
        const bool inside = 0 <= y && y < g.size[0] && 0 <= x && x < g.size[1];
        const int64_t filled = inside ? channels : 0, at = tile.image * g.pixels() + y * g.size[1] + x;
        if (inside) write(at, out);
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

// Instructions on pairs multiply bfloat16, in which transforms would lose digits.
template <typename T>
bool uses_winograd(const ConvGeometry& g) {
  return std::is_same_v<typename Gemm<T>::Operand, accumulate_t<T>> && g.kernel[0] == 3 && g.kernel[1] == 3 &&
         g.kernel[2] == 1 && g.size[2] == 1;
}

// Products that the sums of a convolution are made of.
template <typename T>
int64_t products(const ConvGeometry& g) {
  return uses_winograd<T>(g) ? kWinogradProducts : g.taps();
}

// A tile whose results are whole 2x2 squares, as Winograd's transforms make them; those beyond the image are dropped.
inline Tile round_up_to_winograd(Tile tile) {
  tile.rows = round_up(tile.rows, kWinogradStep);
  tile.columns = round_up(tile.columns, kWinogradStep);
  return tile;
}

// Transforms of the 2x2 squares of a tile: [kWinogradProducts][squares][ld].
template <typename T>
struct WinogradTransforms {
  using A = accumulate_t<T>;
  int64_t down, across, ld;
  A* data = nullptr;

  WinogradTransforms(const Tile& whole, int64_t ld)
      : down(whole.rows / kWinogradStep), across(whole.columns / kWinogradStep), ld(ld) {}
  int64_t count() const { return down * across; }
  int64_t plane() const { return count() * ld; }
  int64_t size() const { return kWinogradProducts * plane(); }

  // From the patch of every square, which starts `shift` pixels down and right of the square's place in `halo`.
  template <int In, typename Apply>
  void fill(const HaloTile<T>& halo, int64_t shift, const Apply& apply) const {
    for (int64_t r = 0; r < down; ++r)
      for (int64_t q = 0; q < across; ++q)
        winograd_transform<In, kWinogradPatch>(
            reinterpret_cast<const A*>(halo.pixel(kWinogradStep * r + shift, kWinogradStep * q + shift)),
            halo.stride * halo.ld, halo.ld, halo.channels, data + (r * across + q) * ld, plane(), apply);
  }
  void fill_patches(const HaloTile<T>& halo) const {
    fill<kWinogradPatch>(halo, 0, [](const A(&d)[4], A(&v)[4]) { winograd_input(d, v); });
  }
  void fill_gradients(const HaloTile<T>& halo) const {
    fill<kWinogradStep>(halo, 1, [](const A(&dy)[2], A(&dm)[4]) { winograd_output_gradient(dy, dm); });
  }
};

// A tile of some channels, to be convolved with panels of kernels.
template <typename T>
class Conv2dTile {
  using A = accumulate_t<T>;
  using G = Gemm<T>;
  using Operand = typename G::Operand;

 public:
  Conv2dTile(const ConvGeometry& g, const Tile& tile, int64_t channels)
      : g_(g),
        winograd_(uses_winograd<T>(g)),
        tile_(winograd_ ? round_up_to_winograd(tile) : tile),
        halo_(g, tile_, channels),
        patches_(tile_, halo_.ld),
        made_(tile_, G::kPanel) {}

  int64_t bytes() const {
    int64_t size = halo_.bytes() + round_up(sums_bytes<T>(tile_), 64);
    if (winograd_) size += (patches_.size() + made_.size()) * int64_t(sizeof(A));
    return size + 4 * 64;
  }

  // value(pixel, channel)
  template <typename Value>
  void fill(Workspace& workspace, const Value& value) {
    fill_by(workspace, [&] { halo_.fill(g_, tile_, value); });
  }

  // write(pixel, its channels)
  template <typename Write>
  void fill_pixels(Workspace& workspace, const Write& write) {
    fill_by(workspace, [&] { halo_.fill_pixels(g_, tile_, write); });
  }

  const HaloTile<T>& halo() const { return halo_; }
  const Tile& tile() const { return tile_; }
  bool winograd() const { return winograd_; }

  // [tile rows, sums_stride, kPanel]: the convolution with the panel whose first column is `column`.
  const A* sums(const void* panels, int64_t column) const {
    const Operand* panel = unpacked<T>(panels) + column * products<T>(g_) * halo_.ld;
    if (winograd_)
      winograd_sums(panel);
    else
      tap_sums(panel);
    return sums_;
  }

 private:
  template <typename Fill>
  void fill_by(Workspace& workspace, const Fill& fill) {
    halo_.data = workspace.take<Operand>(halo_.pixels() * halo_.ld);
    sums_ = workspace.take<A>(sums_bytes<T>(tile_) / int64_t(sizeof(A)));
    fill();
    if (!winograd_) return;
    patches_.data = workspace.take<A>(patches_.size());
    made_.data = workspace.take<A>(made_.size());
    patches_.fill_patches(halo_);
  }

  void tap_sums(const Operand* panel) const {
    const int64_t depth = g_.kernel[1] * halo_.ld, row = sums_stride<T>(tile_) * G::kPanel;
    for (int64_t t = 0; t < g_.kernel[0]; ++t)
      for (int64_t r = 0; r < tile_.rows; ++r)
        G::multiply(tile_.columns, depth, G::kPanel, {halo_.pixel(r + t, 0), halo_.ld}, panel + t * depth * G::kPanel,
                    {sums_ + r * row, G::kPanel}, t > 0);
  }

  void winograd_sums(const Operand* panel) const {
    if constexpr (std::is_same_v<Operand, A>) {
      for (int64_t p = 0; p < kWinogradProducts; ++p)
        G::multiply(patches_.count(), halo_.ld, G::kPanel, {patches_.data + p * patches_.plane(), halo_.ld},
                    panel + p * halo_.ld * G::kPanel, {made_.data + p * made_.plane(), G::kPanel});
      const int64_t row = sums_stride<T>(tile_) * G::kPanel;
      for (int64_t r = 0; r < made_.down; ++r)
        for (int64_t q = 0; q < made_.across; ++q)
          inverse(made_.data + (r * made_.across + q) * G::kPanel, sums_ + kWinogradStep * (r * row + q * G::kPanel),
                  row);
    }
  }

  // The 2x2 results of a square from its transforms.
  void inverse(const A* __restrict from, A* __restrict to, int64_t row) const {
    const int64_t plane = made_.plane();
#pragma GCC ivdep
    for (int64_t j = 0; j < G::kPanel; ++j) {
      A m[4][4], y[2][2];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) m[i / 4][i % 4] = from[i * plane + j];
      winograd_both<4, 2>(m, y, [](const A(&v)[4], A(&made)[2]) { winograd_output(v, made); });
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) to[i / 2 * row + i % 2 * G::kPanel + j] = y[i / 2][i % 2];
    }
  }

  const ConvGeometry& g_;
  const bool winograd_;
  const Tile tile_;
  HaloTile<T> halo_;
  WinogradTransforms<T> patches_, made_;
  A* sums_ = nullptr;
};

// Weights [column][depth][taps] of a panel in the order of the products; reversed: for the gradient of the input.
template <typename T, typename A = accumulate_t<T>>
void pack_kernels(const A* w, const ConvGeometry& g, bool reversed, int64_t depth, int64_t columns,
                  int64_t depth_stride, int64_t column_stride, void* panel) {
  using G = Gemm<T>;
  auto* out = static_cast<typename G::Operand*>(panel);
  const int64_t taps = g.taps(), size = round_up(depth, G::kAlign) * G::kPanel;
  if (!uses_winograd<T>(g)) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const A* from = w + (reversed ? taps - 1 - tap : tap);
      G::fill_panel(
          depth, columns, [=](int64_t k, int64_t i) { return from[k * depth_stride + i * column_stride]; },
          out + tap * size);
    }
    return;
  }
  if constexpr (std::is_same_v<typename G::Operand, A>) {
    const int64_t n = columns < G::kPanel ? columns : G::kPanel;
    constexpr int64_t kAtOnce = 16;  // kernels of a column, which lie one after the other unless reversed
    A taps_of[kAtOnce][9][G::kPanel] = {};
    for (int64_t first = 0; first < depth; first += kAtOnce) {
      const int64_t count = depth - first < kAtOnce ? depth - first : kAtOnce;
      const A* from = w + first * depth_stride;
      if (!reversed)
        transpose_matrix(from, column_stride, n, 9 * count, &taps_of[0][0][0], G::kPanel);
      else
        for (int64_t k = 0; k < count; ++k)
          for (int64_t i = 0; i < n; ++i)
            for (int64_t t = 0; t < 9; ++t) taps_of[k][8 - t][i] = from[k * depth_stride + i * column_stride + t];
      for (int64_t k = 0; k < count; ++k)
        winograd_transform<3, 4>(&taps_of[k][0][0], 3 * G::kPanel, G::kPanel, G::kPanel, out + (first + k) * G::kPanel,
                                 size, [](const A(&v)[3], A(&u)[4]) { winograd_kernel(v, u); });
    }
  }
}

// visit(index of the pixel, its sums) for the pixels of a tile, whose sums are those of `whole`.
template <typename T, typename A, typename Visit>
inline void for_each_sum(const ConvGeometry& g, const Tile& tile, const Tile& whole, const A* sums,
                         const Visit& visit) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t pixel = tile.image * g.pixels() + (tile.row + r) * g.size[1] + tile.column;
    for (int64_t q = 0; q < tile.columns; ++q)
      visit(pixel + q, sums + (r * sums_stride<T>(whole) + q) * Gemm<T>::kPanel);
  }
}

// The gradient of the kernels by Winograd's products, over a tile of the gradient of their sums, panel by panel of the
// channels that the kernels read.
template <typename T>
class WinogradWeightGradient {
  using A = accumulate_t<T>;
  using G = Gemm<T>;
  using Operand = typename G::Operand;

 public:
  WinogradWeightGradient(const ConvGeometry& g, const Conv2dTile<T>& sums)
      : g_(g),
        sums_(sums),
        gradients_(sums.tile(), sums.halo().ld),
        patches_(sums.tile(), G::kPanel),
        read_(g, sums.tile(), G::kPanel) {}

  int64_t bytes() const { return read_.bytes() + (gradients_.size() + patches_.size()) * int64_t(sizeof(A)) + 3 * 64; }

  // After `sums` has been filled with the gradient.
  void fill(Workspace& workspace) {
    gradients_.data = workspace.take<A>(gradients_.size());
    patches_.data = workspace.take<A>(patches_.size());
    read_.data = workspace.take<Operand>(read_.pixels() * read_.ld);
    gradients_.fill_gradients(sums_.halo());
  }

  // dweight[product][k][channels] += for n channels of one panel: value(pixel, channel of the panel).
  template <typename Value>
  void add(int64_t n, const Value& value, A* dweight, int64_t ldw) {
    add_by(n, [&] { read_.fill(g_, sums_.tile(), value); }, dweight, ldw);
  }

  // The same with write(pixel, its n channels).
  template <typename Write>
  void add_pixels(int64_t n, const Write& write, A* dweight, int64_t ldw) {
    add_by(n, [&] { read_.fill_pixels(g_, sums_.tile(), write); }, dweight, ldw);
  }

 private:
  template <typename Fill>
  void add_by(int64_t n, const Fill& fill, A* dweight, int64_t ldw) {
    if constexpr (std::is_same_v<Operand, A>) {
      read_.channels = n;
      fill();
      read_.channels = G::kPanel;
      patches_.fill_patches(read_);
      for (int64_t p = 0; p < kWinogradProducts; ++p)
        G::multiply_transposed(patches_.count(), sums_.halo().channels, G::kPanel,
                               {gradients_.data + p * gradients_.plane(), gradients_.ld},
                               patches_.data + p * patches_.plane(), {dweight + p * sums_.halo().ld * ldw, ldw});
    }
  }

  const ConvGeometry& g_;
  const Conv2dTile<T>& sums_;
  WinogradTransforms<T> gradients_, patches_;
  HaloTile<T> read_;
};

// weight[k][n][taps] = the gradients of all workers [workers][products][padded k][ld], added in order.
template <typename T, typename A = accumulate_t<T>>
void weight_gradient(const A* by_worker, int64_t workers, const ConvGeometry& g, int64_t k, int64_t n, int64_t ld,
                     A* weight) {
  const int64_t count = products<T>(g), taps = g.taps(), row = round_up(k, Gemm<T>::kAlign) * ld;
  constexpr int64_t kColumns = 64;
  A sum[kWinogradProducts][kColumns], made[9][kColumns];
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t columns = n - begin < kColumns ? n - begin : kColumns;
    for (int64_t p = 0; p < count; ++p) {
      A* __restrict total = sum[p];
      for (int64_t worker = 0; worker < workers; ++worker) {
        const A* __restrict from = by_worker + (worker * count + p) * row + begin;
        for (int64_t j = 0; j < columns; ++j) total[j] = worker == 0 ? from[j] : total[j] + from[j];
      }
    }
    if (uses_winograd<T>(g))
      winograd_transform<4, 3>(&sum[0][0], 4 * kColumns, kColumns, columns, &made[0][0], kColumns,
                               [](const A(&du)[4], A(&dg)[3]) { winograd_kernel_gradient(du, dg); });
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t t = 0; t < taps; ++t)
        weight[(begin + j) * taps + t] = uses_winograd<T>(g) ? made[t][j] : sum[taps - 1 - t][j];
  }
}

}  // namespace fastdense::FASTDENSE_TARGET
