// SPDX-License-Identifier: Apache-2.0
// The kernels of row_kernels.h for one target.

#include "common/row_products.h"

namespace fastdense::FASTDENSE_TARGET {

template <typename T, typename A = accumulate_t<T>>
void norm(const Source<T>& s, bool with_relu, int64_t row, int64_t rows, T* out) {
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t j = 0; j < s.channels; ++j) {
      const A v = mul_add(A(load(s.x[r * s.ld + j])), s.scale[j], s.shift[j]);
      out[r * s.channels + j] = store<T>(with_relu ? relu(v) : v);
    }
}

template <typename T, typename A = accumulate_t<T>>
void norm_backward(const Source<T>& s, bool with_relu, int64_t row, int64_t rows, const T* grad,
                   const BackwardSink<T>& sink, void* room) {
  Scratch scratch(room);
  const int64_t n = s.channels;
  A *sum = scratch.take<A>(n), *weighted = scratch.take<A>(n), *dy = scratch.take<A>(n);
  const auto sink_pixel = sink.accumulate ? (with_relu ? sink_row<true, true, T> : sink_row<false, true, T>)
                                          : (with_relu ? sink_row<true, false, T> : sink_row<false, false, T>);
  sum_in_groups(rows, 1, n, sum, weighted, sink.sum, sink.weighted, [&](int64_t r) {
    for (int64_t j = 0; j < n; ++j) dy[j] = load(grad[(row + r) * n + j]);
    sink_pixel(s, sink, row + r, 0, n, dy, A(1), sum, weighted);
  });
}

// Input gradient of a norm at one row, rounded to Out.
template <typename Out, typename T>
inline void norm_gradient_row(const NormBackward<T>& norm, int64_t row, Out* dz) {
  using A = accumulate_t<T>;
  const int64_t at = row * norm.channels;
  for (int64_t j = 0; j < norm.channels; ++j)
    dz[j] = store<Out>(norm_input_gradient<A>(load(norm.dv[at + j]), load(norm.z[at + j]),
                                              {norm.scale[j], A(0), norm.mean[j], norm.rstd[j]}, norm.t1[j], norm.t2[j],
                                              norm.inv_count));
}

template <typename T>
void norm_gradient(const NormBackward<T>& norm, int64_t row, int64_t rows, T* dz) {
  for (int64_t r = row; r < row + rows; ++r) norm_gradient_row(norm, r, dz + r * norm.channels);
}

template <typename T>
void norm_product_backward(const Source<T>& s, int64_t row, int64_t rows, const NormBackward<T>& norm,
                           const void* panels, const BackwardSink<T>& sink, void* room) {
  using Operand = typename Gemm<T>::Operand;
  Scratch scratch(room);
  const Rows<T> left(scratch, rows, norm.channels);
  left.pad(rows, norm.channels);
  for (int64_t r = 0; r < rows; ++r) norm_gradient_row<Operand>(norm, row + r, left.row(r));
  backward<T>(s, nullptr, row, rows, left, norm.channels, panels, sink, scratch);
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

template <typename T>
void finalise_rows(const Gradient<T>& segment, int64_t row, int64_t rows, T* dx) {
  for (int64_t r = row; r < row + rows; ++r) gradient_row(segment, r, dx + r * segment.columns);
}

// Columns of `left` from the gradient of a segment.
template <typename T, typename A = accumulate_t<T>>
inline void take_gradient(const Gradient<T>& segment, int64_t row, int64_t rows, const Rows<T>& left, int64_t column) {
  for (int64_t r = 0; r < rows; ++r) {
    auto* out = left.row(r) + column;
    gradient_row(segment, row + r, out);
    if (!segment.corrected) continue;
    T* corrected = segment.corrected + (row + r) * segment.ld;
    for (int64_t j = 0; j < segment.columns; ++j) corrected[j] = store<T>(A(load(out[j])));
  }
}

template <typename T>
void product_backward(const Source<T>& s, const PoolGeometry* pool, int64_t row, int64_t rows,
                      const Gradients<T>& gradients, const void* panels, const BackwardSink<T>& sink, void* room) {
  Scratch scratch(room);
  const int64_t depth = gradients.columns();
  const Rows<T> left(scratch, rows, depth);
  left.pad(rows, depth);
  take_gradient(gradients.first, row, rows, left, 0);
  take_gradient(gradients.second, row, rows, left, gradients.first.columns);
  backward<T>(s, pool, row, rows, left, depth, panels, sink, scratch);
}

// An upper bound over all the kernels above.
template <typename T, typename A = accumulate_t<T>>
int64_t scratch_bytes(int64_t widest_source, int64_t widest_product) {
  using Operand = typename Gemm<T>::Operand;
  constexpr int64_t kAlign = Gemm<T>::kAlign, kPanel = Gemm<T>::kPanel, kOperand = sizeof(Operand), kA = sizeof(A);
  const auto operands = [](int64_t rows, int64_t depth) {
    return round_up(rows, kAlign) * Rows<T>::stride(depth) * kOperand;
  };
  const int64_t rows = chunk_rows<T>(1), product = round_up(rows, kAlign) * round_up(widest_product, kPanel) * kA;
  // Chunks of narrow sources have more rows, at most kForwardBytes of them, and the padding.
  const int64_t activated =
      operands(rows, kAlign) + kForwardBytes + operands(chunk_rows<T>(widest_source), widest_source);
  const int64_t forward = activated + product;
  const int64_t backward = operands(kBackwardRows<T>, widest_product) +
                           Gemm<T>::transposed_size(kBackwardRows<T>, widest_product) * kOperand +
                           round_up(kBackwardRows<T>, kAlign) * kColumnBlock * (kOperand + kA);
  constexpr int64_t kGaps = 16 * 64;
  return round_up((forward > backward ? forward : backward) + 3 * widest_source * kA + kGaps, 64);
}

template <typename T>
const RowKernels<T>& row_kernels() {
  static const RowKernels<T> kernels = {Gemm<T>::kPanel,     Gemm<T>::kAlign,  sizeof(typename Gemm<T>::Operand),
                                        kBackwardRows<T>,    pack<T>,          moments<T>,
                                        product<T>,          finalise_rows<T>, norm_product_backward<T>,
                                        product_backward<T>, norm<T>,          norm_backward<T>,
                                        norm_gradient<T>,    scratch_bytes<T>, chunk_rows<T>};
  return kernels;
}

#ifndef FASTDENSE_TARGET_PAIRS
template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<half>& row_kernels<half>();
#endif
template const RowKernels<bfloat16>& row_kernels<bfloat16>();

}  // namespace fastdense::FASTDENSE_TARGET
