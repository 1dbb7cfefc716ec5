// SPDX-License-Identifier: Apache-2.0
// Sums of products in registers, of pixels by vectors of channels: what grouped convolutions are made of.  A number of
// the left factor is one for all lanes, or, where lanes are groups, a vector.
#pragma once

#include <type_traits>

#include "cpu/simd/vec.h"

namespace fastdense::FASTDENSE_TARGET {

// Sums that are held at once: of 16 registers, or of AVX-512's 32.
constexpr int kGroupedSums = 2 * kTileRows;
constexpr int kMostVectors = 4;

template <typename A, bool kLanesAreGroups>
constexpr int64_t kElement = kLanesAreGroups ? Vec<A>::kLanes : 1;

template <bool kLanesAreGroups, typename A>
inline Vec<A> load_element(const A* p) {
  if constexpr (kLanesAreGroups)
    return Vec<A>::load(p);
  else
    return Vec<A>::splat(*p);
}

// How many of n vectors are worked on at once.
inline int vectors_at_once(int64_t n) {
  return n <= kMostVectors ? int(n) : n % 4 == 0 ? 4 : n % 3 == 0 ? 3 : n < 6 ? 3 : 4;
}

// call(std::integral_constant<int, n>) for 1 <= n <= Most.
template <int Most, typename Call>
inline void with_constant(int64_t n, const Call& call) {
  if constexpr (Most > 1)
    if (n < Most) return with_constant<Most - 1>(n, call);
  call(std::integral_constant<int, Most>());
}

// visit(begin, count) for runs of [0, n) of at most `most`, as equal as can be.
template <typename Visit>
inline void for_each_run(int64_t n, int64_t most, const Visit& visit) {
  const int64_t runs = (n + most - 1) / most;
  for (int64_t i = 0, begin = 0; i < runs; ++i) {
    const int64_t end = n * (i + 1) / runs;
    visit(begin, end - begin);
    begin = end;
  }
}

// A row of pixels that a row of the kernel meets, and its weights [depth][vectors][kLanes].
template <typename A>
struct TapRow {
  const A *x, *weights;
};

template <typename A>
struct TapRows {
  TapRow<A> row[3];
  int count = 0;
  void add(const A* x, const A* weights) { row[count++] = {x, weights}; }
};

// Numbers between neighbours.
struct ProductSteps {
  int64_t depth;    // terms of a row of the kernel
  int64_t x;        // from an output pixel to the next
  int64_t weights;  // from a term to the next
  int64_t out;      // from an output pixel to the next
};

// out[Pixels][Vectors] = sum over rows and depth
template <bool kLanesAreGroups, int Pixels, int Vectors, typename A>
[[gnu::noinline]] void product_tile(const TapRows<A>& rows, const ProductSteps& steps, int64_t x_at, int64_t weights_at,
                                    A* out) {
  using V = Vec<A>;
  V sum[Pixels][Vectors];
#pragma GCC unroll 24
  for (int p = 0; p < Pixels; ++p)
#pragma GCC unroll 4
    for (int o = 0; o < Vectors; ++o) sum[p][o] = V::splat(0);
  const int64_t step = steps.x, depth = steps.depth, next = steps.weights;
  for (int r = 0; r < rows.count; ++r) {
    const A *x = rows.row[r].x + x_at, *w = rows.row[r].weights + weights_at;
    for (int64_t k = 0; k < depth; ++k, x += kElement<A, kLanesAreGroups>, w += next) {
      V weight[Vectors];
#pragma GCC unroll 4
      for (int o = 0; o < Vectors; ++o) weight[o] = V::load(w + o * V::kLanes);
#pragma GCC unroll 24
      for (int p = 0; p < Pixels; ++p) {
        const V value = load_element<kLanesAreGroups>(x + p * step);
#pragma GCC unroll 4
        for (int o = 0; o < Vectors; ++o) sum[p][o] = V::fma(value, weight[o], sum[p][o]);
      }
    }
  }
#pragma GCC unroll 24
  for (int p = 0; p < Pixels; ++p)
#pragma GCC unroll 4
    for (int o = 0; o < Vectors; ++o) sum[p][o].store(out + p * steps.out + o * V::kLanes);
}

// The same for a row of pixels and any number of vectors.
template <bool kLanesAreGroups, typename A>
void product_row(const TapRows<A>& rows, const ProductSteps& steps, int64_t pixels, int64_t vectors, A* out) {
  for_each_run(vectors, vectors_at_once(vectors), [&](int64_t first, int64_t count) {
    const int64_t at = first * Vec<A>::kLanes;
    with_constant<kMostVectors>(count, [&](auto some) {
      constexpr int kVectors = some, kPixels = kGroupedSums / kVectors;
      for_each_run(pixels, kPixels, [&](int64_t pixel, int64_t n) {
        with_constant<kPixels>(n, [&](auto number) {
          product_tile<kLanesAreGroups, number, kVectors>(rows, steps, pixel * steps.x, at,
                                                          out + pixel * steps.out + at);
        });
      });
    });
  });
}

// Pixels of some rows: numbers between rows and between pixels.
template <typename A>
struct PixelGrid {
  const A* data;
  int64_t row, pixel;
};

// dweight[Terms][Vectors] += sum over pixels of x[pixel][term] * dy[pixel][vector]
template <bool kLanesAreGroups, int Terms, int Vectors, typename A>
[[gnu::noinline]] void outer_tile(const PixelGrid<A>& x, int64_t x_at, const PixelGrid<A>& dy, int64_t dy_at,
                                  int64_t rows, int64_t pixels, A* dweight, int64_t step) {
  using V = Vec<A>;
  V sum[Terms][Vectors];
#pragma GCC unroll 24
  for (int k = 0; k < Terms; ++k)
#pragma GCC unroll 4
    for (int o = 0; o < Vectors; ++o) sum[k][o] = V::splat(0);
  for (int64_t r = 0; r < rows; ++r) {
    const A *from = x.data + r * x.row + x_at, *g = dy.data + r * dy.row + dy_at;
    for (int64_t p = 0; p < pixels; ++p, from += x.pixel, g += dy.pixel) {
      V gradient[Vectors];
#pragma GCC unroll 4
      for (int o = 0; o < Vectors; ++o) gradient[o] = V::load(g + o * V::kLanes);
#pragma GCC unroll 24
      for (int k = 0; k < Terms; ++k) {
        const V value = load_element<kLanesAreGroups>(from + k * kElement<A, kLanesAreGroups>);
#pragma GCC unroll 4
        for (int o = 0; o < Vectors; ++o) sum[k][o] = V::fma(value, gradient[o], sum[k][o]);
      }
    }
  }
#pragma GCC unroll 24
  for (int k = 0; k < Terms; ++k)
#pragma GCC unroll 4
    for (int o = 0; o < Vectors; ++o) {
      A* to = dweight + k * step + o * V::kLanes;
      V::fma(V::splat(1), V::load(to), sum[k][o]).store(to);
    }
}

// The same for any number of terms and vectors.
template <bool kLanesAreGroups, typename A>
void outer_rows(const PixelGrid<A>& x, const PixelGrid<A>& dy, int64_t rows, int64_t pixels, int64_t terms,
                int64_t vectors, A* dweight) {
  const int64_t step = vectors * Vec<A>::kLanes;
  for_each_run(vectors, vectors_at_once(vectors), [&](int64_t first, int64_t count) {
    const int64_t at = first * Vec<A>::kLanes;
    with_constant<kMostVectors>(count, [&](auto some) {
      constexpr int kVectors = some, kTerms = kGroupedSums / kVectors;
      for_each_run(terms, kTerms, [&](int64_t term, int64_t n) {
        with_constant<kTerms>(n, [&](auto number) {
          outer_tile<kLanesAreGroups, number, kVectors>(x, term * kElement<A, kLanesAreGroups>, dy, at, rows, pixels,
                                                        dweight + term * step + at, step);
        });
      });
    });
  });
}

}  // namespace fastdense::FASTDENSE_TARGET
