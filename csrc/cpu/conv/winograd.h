// SPDX-License-Identifier: Apache-2.0
// Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR
// 2016, equations 8 and 13): a square of 2x2 results of a 3x3 convolution is
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A      of a patch d of 4x4 pixels, * elementwise, summed over channels
//
// so that sums over channels are 16 products, 4 a pixel in place of 9.  The gradient with respect to the transformed
// kernel is (B^T d B) * (A dY A^T), and that of g is G^T (...) G.
#pragma once

#include "cpu/simd/vec.h"

namespace fastdense::FASTDENSE_TARGET {

constexpr int64_t kWinogradStep = 2, kWinogradPatch = 4, kWinogradProducts = kWinogradPatch * kWinogradPatch;

// Applies `apply` to the columns of in[Rows][Rows], then to the rows: out = M in M^T.
template <int In, int Out, typename A, typename Apply>
inline void winograd_both(const A (&in)[In][In], A (&out)[Out][Out], const Apply& apply) {
  A half[Out][In];
#pragma GCC unroll 6
  for (int c = 0; c < In; ++c) {
    A column[In], made[Out];
#pragma GCC unroll 6
    for (int r = 0; r < In; ++r) column[r] = in[r][c];
    apply(column, made);
#pragma GCC unroll 6
    for (int r = 0; r < Out; ++r) half[r][c] = made[r];
  }
#pragma GCC unroll 6
  for (int r = 0; r < Out; ++r) apply(half[r], out[r]);
}

// B^T
template <typename A>
inline void winograd_input(const A (&d)[4], A (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// G
template <typename A>
inline void winograd_kernel(const A (&g)[3], A (&u)[4]) {
  const A ends = A(0.5) * (g[0] + g[2]), middle = A(0.5) * g[1];
  u[0] = g[0];
  u[1] = ends + middle;
  u[2] = ends - middle;
  u[3] = g[2];
}

// A^T
template <typename A>
inline void winograd_output(const A (&m)[4], A (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

// A
template <typename A>
inline void winograd_output_gradient(const A (&dy)[2], A (&dm)[4]) {
  dm[0] = dy[0];
  dm[1] = dy[0] + dy[1];
  dm[2] = dy[0] - dy[1];
  dm[3] = -dy[1];
}

// G^T
template <typename A>
inline void winograd_kernel_gradient(const A (&du)[4], A (&dg)[3]) {
  const A sum = A(0.5) * (du[1] + du[2]);
  dg[0] = du[0] + sum;
  dg[1] = A(0.5) * (du[1] - du[2]);
  dg[2] = sum + du[3];
}

// out[(Out * r + c) * out_plane + j] = the transform of in[r * in_row + c * in_column + j], for j < n.
template <int In, int Out, typename A, typename Apply>
inline void winograd_transform(const A* __restrict in, int64_t in_row, int64_t in_column, int64_t n, A* __restrict out,
                               int64_t out_plane, const Apply& apply) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    A from[In][In], to[Out][Out];
#pragma GCC unroll 6
    for (int r = 0; r < In; ++r)
#pragma GCC unroll 6
      for (int c = 0; c < In; ++c) from[r][c] = in[r * in_row + c * in_column + j];
    winograd_both<In, Out>(from, to, apply);
#pragma GCC unroll 6
    for (int r = 0; r < Out; ++r)
#pragma GCC unroll 6
      for (int c = 0; c < Out; ++c) out[(Out * r + c) * out_plane + j] = to[r][c];
  }
}

}  // namespace fastdense::FASTDENSE_TARGET
