// SPDX-License-Identifier: Apache-2.0
// Norms with another activation than ReLU, by parts of rows: what norm_relu.h does where a source names one.  These are
// functions of their own, which the compiler does not mix into the loops of ReLU.
#pragma once

#include "cpu/simd/vec.h"

namespace fastdense::FASTDENSE_TARGET {

// Columns that are worked on at once.
constexpr int64_t kRowPart = 128;

// v[n] = scale * x + shift of columns from `begin` on of one pixel
template <typename T>
inline void pre_activation(const Source<T>& s, int64_t pixel, int64_t begin, int64_t n, accumulate_t<T>* __restrict v) {
  using A = accumulate_t<T>;
  const T* __restrict x = s.x + pixel * s.ld + begin;
  const A* __restrict scale = s.scale + begin, * __restrict shift = s.shift + begin;
  for (int64_t j = 0; j < n; ++j) v[j] = mul_add(A(load(x[j])), scale[j], shift[j]);
}

template <typename A>
inline const A* slope_at(const SourceActivation<A>& activation, int64_t begin) {
  return activation.slope ? activation.slope + begin : nullptr;
}

// write(column, values, n) with act(source) of columns [begin, end) of one pixel, part by part.
template <typename T, typename Write>
inline void for_each_activated(const Source<T>& s, int64_t pixel, int64_t begin, int64_t end, const Write& write) {
  const auto& activation = *s.activation;
  accumulate_t<T> v[kRowPart];
  for (int64_t j = begin; j < end; j += kRowPart) {
    const int64_t n = end - j < kRowPart ? end - j : kRowPart;
    pre_activation(s, pixel, j, n, v);
    activation.run.value(activation.parameters, slope_at(activation, j), v, n);
    write(j, v, n);
  }
}

// out[end - begin] = act(source)
template <typename Out, typename T>
[[gnu::noinline]] void activate_row(const Source<T>& s, int64_t pixel, int64_t begin, int64_t end, Out* out) {
  for_each_activated(s, pixel, begin, end, [=](int64_t column, const accumulate_t<T>* v, int64_t n) {
    Out* __restrict to = out + (column - begin);
    for (int64_t j = 0; j < n; ++j) to[j] = store<Out>(v[j]);
  });
}

// sum[end - begin] += act(source)
template <typename T, typename A = accumulate_t<T>>
[[gnu::noinline]] void add_activated_row(const Source<T>& s, int64_t pixel, int64_t begin, int64_t end, A* sum) {
  for_each_activated(s, pixel, begin, end, [=](int64_t column, const A* v, int64_t n) {
    A* __restrict to = sum + (column - begin);
    for (int64_t j = 0; j < n; ++j) to[j] += v[j];
  });
}

// The gradient share * dy of the activation at one pixel passes it: write(part, gradients of u) with the columns of the
// part.  slope[j] += gradient * min(u, 0) if `slope` is not nullptr.
template <typename T, typename Write, typename A = accumulate_t<T>>
inline void for_each_gradient(const Source<T>& s, int64_t pixel, int64_t begin, int64_t count, const A* dy, A share,
                              double* slope, const Write& write) {
  const auto& activation = *s.activation;
  A v[kRowPart];
  for (int64_t j = 0; j < count; j += kRowPart) {
    const int64_t n = count - j < kRowPart ? count - j : kRowPart;
    pre_activation(s, pixel, begin + j, n, v);
    if (slope)
      for (int64_t i = 0; i < n; ++i) slope[begin + j + i] += v[i] > A(0) ? 0.0 : double(dy[j + i] * share * v[i]);
    activation.run.derivative(activation.parameters, slope_at(activation, begin + j), v, n);
    for (int64_t i = 0; i < n; ++i) v[i] *= dy[j + i] * share;
    write(j, n, v);
  }
}

}  // namespace fastdense::FASTDENSE_TARGET
