// SPDX-License-Identifier: Apache-2.0
// Norm and ReLU of a chunk of rows: activations, moments, rounding of results, gradients.  Plain loops over the scalar
// maths of batch_norm_math.h that the compiler vectorises over channels.  Where a source names another activation,
// norm_activation.h does the same by parts of rows.
#pragma once

#include "cpu/conv1x1/norm_activation.h"
#include "cpu/simd/vec.h"

namespace fastdense::FASTDENSE_TARGET {

// Memory for one chunk, handed out in cache lines.
class Workspace {
 public:
  explicit Workspace(void* start) : at_(static_cast<char*>(start)) {}
  template <typename V>
  V* take(int64_t count) {
    char* start = at_;
    at_ += round_up(count * int64_t(sizeof(V)), 64);
    return reinterpret_cast<V*>(start);
  }

 private:
  char* at_;
};

// A left factor of products: rows as far as products read, and a row stride that covers the padded depth, off the power
// of two, so that rows do not fall into the same cache set.
template <typename T>
struct LeftFactor : RowMajor<typename Gemm<T>::Operand> {
  using Operand = typename Gemm<T>::Operand;
  const int64_t depth;

  // Zeroes the values from `depth` on, as far as products read.
  LeftFactor(Workspace& workspace, int64_t rows, int64_t depth)
      : RowMajor<Operand>{workspace.take<Operand>(round_up(rows, Gemm<T>::kAlign) * stride(depth)), stride(depth)},
        depth(depth) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = depth; i < round_up(depth, Gemm<T>::kAlign); ++i) row(r)[i] = Operand{};
  }
  static constexpr int64_t stride(int64_t depth) {
    return round_up(depth, Gemm<T>::kAlign) + 64 / int64_t(sizeof(Operand));
  }
  Operand* row(int64_t r) const { return this->data + r * this->ld; }
};

// y[rows], columns from `column` on = act(source)
template <typename T>
inline void activate(const Source<T>& s, int64_t row, int64_t rows, const LeftFactor<T>& y, int64_t column) {
  using Operand = typename Gemm<T>::Operand;
  for (int64_t r = 0; r < rows; ++r) {
    if (s.activation) {
      activate_row(s, row + r, 0, s.channels, y.row(r) + column);
      continue;
    }
    const T* x = s.x + (row + r) * s.ld;
    Operand* __restrict out = y.row(r) + column;
    for (int64_t j = 0; j < s.channels; ++j) out[j] = store<Operand>(norm_relu(load(x[j]), s.scale[j], s.shift[j]));
  }
}

// y[0 ... end - begin) = mean of act(source) over the window of a pooled pixel; columns [begin, end).
template <typename T>
inline void activate_pooled_row(const Source<T>& s, const PoolGeometry& g, int64_t pooled_row, int64_t begin,
                                int64_t end, accumulate_t<T>* __restrict y) {
  using A = accumulate_t<T>;
  const int64_t volume = g.volume();
  const A share = A(1) / A(volume);
  const int64_t origin = window_origin(g, pooled_row);
  for (int64_t j = begin; j < end; ++j) y[j - begin] = 0;
  for (int64_t w = 0; w < volume; ++w) {
    const int64_t pixel = origin + window_offset(g, w);
    if (s.activation) {
      add_activated_row(s, pixel, begin, end, y);
      continue;
    }
    const T* x = s.x + pixel * s.ld;
    for (int64_t j = begin; j < end; ++j) y[j - begin] += norm_relu(load(x[j]), s.scale[j], s.shift[j]);
  }
  for (int64_t j = begin; j < end; ++j) y[j - begin] *= share;
}

// As activate() with pooled rows; `memory` holds a row.
template <typename T>
inline void activate_pooled(const Source<T>& s, const PoolGeometry& g, int64_t row, int64_t rows,
                            accumulate_t<T>* memory, const LeftFactor<T>& y, int64_t column) {
  using Operand = typename Gemm<T>::Operand;
  for (int64_t r = 0; r < rows; ++r) {
    activate_pooled_row(s, g, row + r, 0, s.channels, memory);
    Operand* __restrict out = y.row(r) + column;
    for (int64_t j = 0; j < s.channels; ++j) out[j] = store<Operand>(memory[j]);
  }
}

// y[rows, n] as panels
template <typename T>
inline void fill_panels(const accumulate_t<T>* y, int64_t rows, int64_t n, typename Gemm<T>::Operand* panels) {
  using G = Gemm<T>;
  for (int64_t j = 0; j < n; j += G::kPanel, panels += round_up(rows, G::kAlign) * G::kPanel) {
    const auto* from = y + j;
    G::fill_panel(rows, n - j, [=](int64_t r, int64_t i) { return from[r * n + i]; }, panels);
  }
}

// Columns [begin, end) of act(source) as panels; y[rows, end - begin] is workspace.
template <typename T>
inline void activate_panels(const Source<T>& s, int64_t row, int64_t rows, int64_t begin, int64_t end,
                            accumulate_t<T>* y, typename Gemm<T>::Operand* panels) {
  using A = accumulate_t<T>;
  using G = Gemm<T>;
  if (s.activation) {
    for (int64_t r = 0; r < rows; ++r) activate_row(s, row + r, begin, end, y + r * (end - begin));
    return fill_panels<T>(y, rows, end - begin, panels);
  }
  for (int64_t j = begin; j < end; j += G::kPanel, panels += round_up(rows, G::kAlign) * G::kPanel) {
    const T* x = s.x + row * s.ld + j;
    const A *scale = s.scale + j, *shift = s.shift + j;
    const int64_t ld = s.ld;
    G::fill_panel(
        rows, end - j, [=](int64_t r, int64_t i) { return norm_relu(A(load(x[r * ld + i])), scale[i], shift[i]); },
        panels);
  }
}

// Columns [begin, end) of the pooled act(source) as panels; y[rows, end - begin] is workspace.
template <typename T>
inline void activate_pooled_panels(const Source<T>& s, const PoolGeometry& g, int64_t row, int64_t rows, int64_t begin,
                                   int64_t end, accumulate_t<T>* y, typename Gemm<T>::Operand* panels) {
  const int64_t n = end - begin;
  for (int64_t r = 0; r < rows; ++r) activate_pooled_row(s, g, row + r, begin, end, y + r * n);
  fill_panels<T>(y, rows, n, panels);
}

// Mean and M2 of the columns of x[rows, ld], by tiles of kTile rows that are combined in order (Chan).  The second pass
// over a tile also takes the sum of the deviations, which would be 0 but for the rounding of the mean, and corrects
// both.
template <typename T>
void moments(const T* x, int64_t ld, int64_t rows, int64_t n, double* mean, double* m2) {
  using A = accumulate_t<T>;
  constexpr int64_t kTile = 128;
  constexpr int64_t kColumns = 64;
  for (int64_t j = 0; j < n; j += kColumns) {
    const int64_t width = n - j < kColumns ? n - j : kColumns;
    for (int64_t i = 0; i < width; ++i) mean[j + i] = m2[j + i] = 0;
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t tile = rows - r < kTile ? rows - r : kTile;
      const T* first = x + r * ld + j;
      A near[kColumns] = {}, squares[kColumns] = {}, rest[kColumns] = {};  // `near` the mean, up to rounding
      for (int64_t q = 0; q < tile; ++q)
        for (int64_t i = 0; i < width; ++i) near[i] += load(first[q * ld + i]);
      for (int64_t i = 0; i < width; ++i) near[i] /= A(tile);
      for (int64_t q = 0; q < tile; ++q)
        for (int64_t i = 0; i < width; ++i) {
          const A delta = load(first[q * ld + i]) - near[i];
          squares[i] += delta * delta;
          rest[i] += delta;
        }
      for (int64_t i = 0; i < width; ++i) {
        const double shift = double(rest[i]) / double(tile);
        const Moments<double> part = {double(tile), double(near[i]) + shift,
                                      double(squares[i]) - double(rest[i]) * shift};
        const auto sum = combine_moments<double>({double(r), mean[j + i], m2[j + i]}, part);
        mean[j + i] = sum.mean;
        m2[j + i] = sum.m2;
      }
    }
  }
}

// v[rows, ldv] += bias [n], of which nullptr is none
template <typename A>
inline void add_bias(A* v, int64_t ldv, int64_t rows, int64_t n, const A* bias) {
  if (!bias) return;
  for (int64_t r = 0; r < rows; ++r) {
    A* __restrict to = v + r * ldv;
    for (int64_t j = 0; j < n; ++j) to[j] += bias[j];
  }
}

// Rounds v[rows, ldv] into a target; the moments are those of the stored values.
template <typename T>
inline void store_rows(const accumulate_t<T>* v, int64_t ldv, int64_t row, int64_t rows, const Target<T>& target) {
  using A = accumulate_t<T>;
  const int64_t n = target.columns;
  for (int64_t r = 0; r < rows; ++r) {
    const A* from = v + r * ldv;
    T* out = target.out + (row + r) * target.ld;
    const T* add = target.add ? target.add + (row + r) * target.ld_add : nullptr;
    if (add)
      for (int64_t j = 0; j < n; ++j) out[j] = store<T>(A(load(add[j])) + from[j]);
    else
      for (int64_t j = 0; j < n; ++j) out[j] = store<T>(from[j]);
  }
  if (target.mean) moments(target.out + row * target.ld, target.ld, rows, n, target.mean, target.m2);
}

// The gradient of a segment at one row, with its correction.
template <typename Out, typename T>
inline void gradient_row(const Gradient<T>& segment, int64_t row, Out* out) {
  using A = accumulate_t<T>;
  const T* g = segment.g + row * segment.ld;
  if (!segment.x) {
    for (int64_t j = 0; j < segment.columns; ++j) out[j] = store<Out>(A(load(g[j])));
    return;
  }
  const T* x = segment.x + row * segment.ldx;
  for (int64_t j = 0; j < segment.columns; ++j)
    out[j] = store<Out>(
        finalise_gradient<A>(load(g[j]), load(x[j]), segment.mean[j], segment.shift_sum[j], segment.slope_sum[j]));
}

// Columns of a source, or of a product's result.
struct ColumnRange {
  int64_t begin, count;
};

// The epilogue at one pixel: the gradient share * dy of the activation passes its ReLU, or is taken as it is with
// kRelu = false.  dy and the sums, those of sum_in_groups(), are of the columns alone.  Compilers vectorise the loop
// where these pointers are parameters that are __restrict, not members of a structure.
template <bool kRelu, bool kAccumulate, typename T>
inline void epilogue_row(const Source<T>& s, const BackwardEpilogue<T>& epilogue, int64_t pixel, ColumnRange columns,
                         const accumulate_t<T>* __restrict dy, accumulate_t<T> share, accumulate_t<T>* __restrict sum,
                         accumulate_t<T>* __restrict weighted) {
  using A = accumulate_t<T>;
  const int64_t begin = columns.begin, n = columns.count;
  const T* __restrict x = s.x + pixel * s.ld + begin;
  T* __restrict g = epilogue.gradient + pixel * epilogue.ld + begin;
  const A* __restrict scale = s.scale + begin, * __restrict shift = s.shift + begin;
  const A* __restrict mean = epilogue.mean + begin;
  for (int64_t i = 0; i < n; ++i) {
    const A value = load(x[i]);
    A gradient = dy[i] * share;
    if constexpr (kRelu) gradient = norm_relu_gradient(gradient, value, scale[i], shift[i]);
    if constexpr (kAccumulate) {
      g[i] = store<T>(mul_add(scale[i], gradient, A(load(g[i]))));
    } else {
      g[i] = store<T>(gradient);
      gradient = load(g[i]);
    }
    sum[i] += gradient;
    weighted[i] += gradient * (value - mean[i]);
  }
}

// The same where the source names another activation; PReLU's sums go to epilogue.slope.
template <bool kAccumulate, typename T>
[[gnu::noinline]] void activation_epilogue_row(const Source<T>& s, const BackwardEpilogue<T>& epilogue, int64_t pixel,
                                               ColumnRange columns, const accumulate_t<T>* dy, accumulate_t<T> share,
                                               accumulate_t<T>* sum, accumulate_t<T>* weighted) {
  using A = accumulate_t<T>;
  for_each_gradient(s, pixel, columns.begin, columns.count, dy, share, epilogue.slope,
                    [&](int64_t at, int64_t n, const A* gradient) {
                      epilogue_row<false, kAccumulate, T>(s, epilogue, pixel, {columns.begin + at, n}, gradient, A(1),
                                                          sum + at, weighted + at);
                    });
}

// The one of these that a source needs; `activates`: whether there is an activation.
template <typename T>
inline auto epilogue_of(const Source<T>& s, const BackwardEpilogue<T>& epilogue, bool activates = true) {
  if (activates && s.activation)
    return epilogue.accumulate ? activation_epilogue_row<true, T> : activation_epilogue_row<false, T>;
  if (epilogue.accumulate) return activates ? epilogue_row<true, true, T> : epilogue_row<false, true, T>;
  return activates ? epilogue_row<true, false, T> : epilogue_row<false, false, T>;
}

// body(row) for all rows, which adds n columns to `sum` and `weighted`.  After every kSummed pixels these go over to
// the totals and start anew: long sums in float would round too often.
constexpr int64_t kSummed = 32;
template <typename A, typename Body>
inline void sum_in_groups(int64_t rows, int64_t pixels_per_row, int64_t n, A* __restrict sum, A* __restrict weighted,
                          double* __restrict total, double* __restrict total_weighted, const Body& body) {
  const int64_t step = pixels_per_row < kSummed ? kSummed / pixels_per_row : 1;
  for (int64_t begin = 0; begin < rows; begin += step) {
    for (int64_t i = 0; i < n; ++i) sum[i] = weighted[i] = 0;
    const int64_t end = rows - begin < step ? rows : begin + step;
    for (int64_t r = begin; r < end; ++r) body(r);
    for (int64_t i = 0; i < n; ++i) total[i] += double(sum[i]);
    for (int64_t i = 0; i < n; ++i) total_weighted[i] += double(weighted[i]);
  }
}

}  // namespace fastdense::FASTDENSE_TARGET
