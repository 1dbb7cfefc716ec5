// SPDX-License-Identifier: Apache-2.0
// Rows of an image as grouped convolutions read and write them: the channels of one bundle of groups.
#pragma once

#include "cpu/conv1x1/conv1x1.h"
#include "cpu/grouped_conv/grouped_products.h"
#include "cpu/simd/interleave.h"

namespace fastdense::FASTDENSE_TARGET {

template <typename A>
inline void zero_numbers(A* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = A(0);
}

template <typename A>
inline void copy_numbers(const A* __restrict from, int64_t n, A* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// Pixels with one more, zero, at either end of a row: [rows][width + 2][channels], where lanes are groups of vectors.
template <typename A, bool kLanesAreGroups>
struct HaloRows {
  static constexpr int64_t kNumbers = kElement<A, kLanesAreGroups>;
  int64_t width, channels, count;
  int64_t first = 0;  // row of the image
  A* data = nullptr;

  HaloRows(int64_t width, int64_t channels, int64_t count) : width(width), channels(channels), count(count) {}

  int64_t pixel_step() const { return channels * kNumbers; }
  int64_t row_step() const { return (width + 2) * pixel_step(); }
  // Vectors that start at the last numbers read on behind them.
  int64_t size() const { return count * row_step() + Vec<A>::kLanes; }
  int64_t bytes() const { return round_up(size() * int64_t(sizeof(A)), 64); }
  void take(Workspace& workspace, int64_t row) {
    data = workspace.take<A>(size());
    first = row;
  }

  // From the pixel left of the image on.
  A* row(int64_t y) const { return data + (y - first) * row_step(); }

  // write(row of the image, where its first pixel goes) for those of `height` rows.
  template <typename Write>
  void fill(int64_t height, const Write& write) const {
    for (int64_t y = first; y < first + count; ++y) {
      A* to = row(y);
      if (y < 0 || y >= height) {
        zero_numbers(to, row_step());
        continue;
      }
      zero_numbers(to, pixel_step());
      write(y, to + pixel_step());
      zero_numbers(to + (width + 1) * pixel_step(), pixel_step());
    }
    zero_numbers(data + count * row_step(), Vec<A>::kLanes);
  }
};

// What happens to numbers on the way in: nothing.
template <typename A>
struct AsItIs {
  Vec<A> operator()(Vec<A> x, int64_t) const { return x; }
  A operator()(A x, int64_t) const { return x; }
};

// Norm and ReLU, with coefficients where the numbers will be; the same numbers as norm_relu() makes.
template <typename A>
struct NormRelu {
  const A *scale, *shift;
  Vec<A> operator()(Vec<A> x, int64_t at) const {
    const auto v = x.v * Vec<A>::load(scale + at).v + Vec<A>::load(shift + at).v;
    return {v < Vec<A>::splat(0).v ? Vec<A>::splat(0).v : v};
  }
  A operator()(A x, int64_t at) const { return norm_relu(x, scale[at], shift[at]); }
};

// Pixels of one group: to[pixel][channel].
template <typename A, typename Change>
inline void take_channels(const A* x, int64_t ld, int64_t pixels, int64_t channels, const Change& change, A* to) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  const int64_t whole = channels / kLanes * kLanes;
  for (int64_t p = 0; p < pixels; ++p, x += ld, to += channels) {
    for (int64_t j = 0; j < whole; j += kLanes) change(Vec<A>::load(x + j), j).store(to + j);
    for (int64_t j = whole; j < channels; ++j) to[j] = change(x[j], j);
  }
}

// Pixels of as many groups as a vector has lanes, of which `columns` columns are there: to[pixel][channel][group].
template <typename A, typename Change>
inline void take_groups(const A* x, int64_t ld, int64_t pixels, int64_t channels, int64_t columns, bool at_end,
                        const Change& change, A* to) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  const auto take = [&](const A* from) {
    take_groups_apart(from, channels, [&](int64_t j, Vec<A> v) { change(v, j * kLanes).store(to + j * kLanes); });
    to += channels * kLanes;
  };
  // Not to read on behind the last pixel of all, or where groups are missing.
  const int64_t direct = columns < kLanes * channels ? 0 : at_end ? pixels - 1 : pixels;
  for (int64_t p = 0; p < direct; ++p) take(x + p * ld);
  if (direct == pixels) return;
  A copy[kLanes * (kMostGroupChannels + 1)] = {};
  for (int64_t p = direct; p < pixels; ++p) {
    copy_numbers(x + p * ld, columns, copy);
    take(copy);
  }
}

// The reverse: out[pixel][group][channel], and up to kRun numbers behind.
template <typename A>
inline void put_groups(const A* from, int64_t pixels, int64_t channels, A* out) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  for (int64_t p = 0; p < pixels; ++p, from += channels * kLanes, out += channels * kLanes)
    put_groups_together<A>(channels, [&](int64_t j) { return Vec<A>::load(from + j * kLanes); }, out);
}

}  // namespace fastdense::FASTDENSE_TARGET
