// SPDX-License-Identifier: Apache-2.0
// The kernels of cpu/conv1x1/conv1x1_kernels.h for one target.

#include "cpu/conv1x1/conv1x1.h"

namespace fastdense::FASTDENSE_TARGET {

template <typename T, typename A = accumulate_t<T>>
void norm(const Source<T>& s, bool activates, int64_t row, int64_t rows, T* out) {
  if (activates && s.activation) {
    for (int64_t r = row; r < row + rows; ++r) activate_row(s, r, 0, s.channels, out + r * s.channels);
    return;
  }
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t j = 0; j < s.channels; ++j) {
      const A v = mul_add(A(load(s.x[r * s.ld + j])), s.scale[j], s.shift[j]);
      out[r * s.channels + j] = store<T>(activates ? relu(v) : v);
    }
}

template <typename T, typename A = accumulate_t<T>>
void norm_backward(const Source<T>& s, bool activates, int64_t row, int64_t rows, const T* grad,
                   const BackwardEpilogue<T>& epilogue, void* memory) {
  Workspace workspace(memory);
  const int64_t n = s.channels;
  A *sum = workspace.take<A>(n), *weighted = workspace.take<A>(n), *dy = workspace.take<A>(n);
  const auto epilogue_pixel = epilogue_of(s, epilogue, activates);
  sum_in_groups(rows, 1, n, sum, weighted, epilogue.sum, epilogue.weighted, [&](int64_t r) {
    for (int64_t j = 0; j < n; ++j) dy[j] = load(grad[(row + r) * n + j]);
    epilogue_pixel(s, epilogue, row + r, {0, n}, dy, A(1), sum, weighted);
  });
}

// Input gradient of a norm at one row, rounded to Out.
template <typename Out, typename T>
inline void norm_gradient_row(const NormBackward<T>& norm, int64_t row, Out* dz) {
  using A = accumulate_t<T>;
  const int64_t at = row * norm.channels;
  if (norm.has_terms) {
    for (int64_t j = 0; j < norm.channels; ++j)
      dz[j] = store<Out>(finalise_gradient<A>(norm.scale[j] * A(load(norm.dv[at + j])), load(norm.z[at + j]),
                                              norm.mean[j], norm.t1[j], norm.t2[j]));
    return;
  }
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
void conv1x1_norm_backward(const Source<T>& s, int64_t row, int64_t rows, const NormBackward<T>& norm,
                           const void* panels, const BackwardEpilogue<T>& epilogue, void* memory) {
  using Operand = typename Gemm<T>::Operand;
  Workspace workspace(memory);
  const LeftFactor<T> left(workspace, rows, norm.channels);
  for (int64_t r = 0; r < rows; ++r) norm_gradient_row<Operand>(norm, row + r, left.row(r));
  backward<T>(s, nullptr, row, rows, left, panels, epilogue, workspace);
}

template <typename T>
void finalise_rows(const Gradient<T>& segment, int64_t row, int64_t rows, T* dx) {
  for (int64_t r = row; r < row + rows; ++r) gradient_row(segment, r, dx + r * segment.columns);
}

// Columns of `left` from the gradient of a segment.
template <typename T, typename A = accumulate_t<T>>
inline void take_gradient(const Gradient<T>& segment, int64_t row, int64_t rows, const LeftFactor<T>& left,
                          int64_t column) {
  for (int64_t r = 0; r < rows; ++r) {
    auto* out = left.row(r) + column;
    gradient_row(segment, row + r, out);
    if (!segment.corrected) continue;
    T* corrected = segment.corrected + (row + r) * segment.ld;
    for (int64_t j = 0; j < segment.columns; ++j) corrected[j] = store<T>(A(load(out[j])));
  }
}

template <typename T>
void conv1x1_backward(const Source<T>& s, const PoolGeometry* pool, int64_t row, int64_t rows,
                      const Gradients<T>& gradients, const void* panels, const BackwardEpilogue<T>& epilogue,
                      void* memory) {
  Workspace workspace(memory);
  const LeftFactor<T> left(workspace, rows, gradients.columns());
  take_gradient(gradients.first, row, rows, left, 0);
  take_gradient(gradients.second, row, rows, left, gradients.first.columns);
  backward<T>(s, pool, row, rows, left, panels, epilogue, workspace);
}

// An upper bound over all the kernels above.
template <typename T, typename A = accumulate_t<T>>
int64_t workspace_bytes(int64_t widest_source, int64_t widest_product) {
  using Operand = typename Gemm<T>::Operand;
  constexpr int64_t kAlign = Gemm<T>::kAlign, kPanel = Gemm<T>::kPanel, kOperand = sizeof(Operand), kA = sizeof(A);
  const auto operands = [](int64_t rows, int64_t depth) {
    return round_up(rows, kAlign) * LeftFactor<T>::stride(depth) * kOperand;
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
const Conv1x1Kernels<T>& conv1x1_kernels() {
  static const Conv1x1Kernels<T> kernels = {Gemm<T>::kPanel,
                                            Gemm<T>::kAlign,
                                            sizeof(typename Gemm<T>::Operand),
                                            kBackwardRows<T>,
                                            kRowMultiple<T>,
                                            pack<T>,
                                            moments<T>,
                                            conv1x1<T>,
                                            finalise_rows<T>,
                                            conv1x1_norm_backward<T>,
                                            conv1x1_backward<T>,
                                            norm<T>,
                                            norm_backward<T>,
                                            norm_gradient<T>,
                                            workspace_bytes<T>,
                                            chunk_rows<T>};
  return kernels;
}

#ifndef FASTDENSE_TARGET_PAIRS
template const Conv1x1Kernels<float>& conv1x1_kernels<float>();
template const Conv1x1Kernels<double>& conv1x1_kernels<double>();
template const Conv1x1Kernels<half>& conv1x1_kernels<half>();
#endif
template const Conv1x1Kernels<bfloat16>& conv1x1_kernels<bfloat16>();

}  // namespace fastdense::FASTDENSE_TARGET
