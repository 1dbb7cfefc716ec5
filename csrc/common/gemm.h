// SPDX-License-Identifier: Apache-2.0
// Small matrix products on cache-sized chunks, single-threaded: the caller owns the loop over chunks and threads.
// One operand is always stored in panels of kPanel<A> columns ([panel][row][kPanel], zero-padded), so that the inner
// loop is two vector loads, kTileRows broadcasts and 2 * kTileRows fused multiply-adds.  Included once per target.
namespace fastdense::FASTDENSE_TARGET {

template <typename A>
constexpr int kPanel = 2 * Vec<A>::kLanes;

// Rows of a K block: kGemmBlock x kPanel values of the panel stay in L1 while the rows of the chunk pass by.
constexpr int64_t kGemmBlock = 256;

// C[rows, kPanel] (+)= sum_k L(i, k) * panel[k, :] with L(i, k) = left[i * row_stride + k * step].
template <int Rows, typename A>
inline void gemm_tile(int64_t depth, const A* left, int64_t row_stride, int64_t step, const A* panel, A* c, int64_t ldc,
                      bool accumulate) {
  using V = Vec<A>;
  V sum[Rows][2];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    sum[i][0] = accumulate ? V::load(c + i * ldc) : V::splat(0);
    sum[i][1] = accumulate ? V::load(c + i * ldc + V::kLanes) : V::splat(0);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const V p0 = V::load(panel + k * kPanel<A>), p1 = V::load(panel + k * kPanel<A> + V::kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const V l = V::splat(left[i * row_stride + k * step]);
      sum[i][0] = V::fma(l, p0, sum[i][0]);
      sum[i][1] = V::fma(l, p1, sum[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    sum[i][0].store(c + i * ldc);
    sum[i][1].store(c + i * ldc + V::kLanes);
  }
}

// The last, short tile of a column of tiles.
template <int Rows, typename A>
inline void gemm_short_tile(int64_t rows, int64_t depth, const A* left, int64_t row_stride, int64_t step,
                            const A* panel, A* c, int64_t ldc, bool accumulate) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return gemm_tile<Rows>(depth, left, row_stride, step, panel, c, ldc, accumulate);
    gemm_short_tile<Rows - 1>(rows, depth, left, row_stride, step, panel, c, ldc, accumulate);
  }
}

template <typename A>
inline void gemm_column(int64_t rows, int64_t depth, const A* left, int64_t row_stride, int64_t step, const A* panel,
                        A* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    gemm_tile<kTileRows>(depth, left + i * row_stride, row_stride, step, panel, c + i * ldc, ldc, accumulate);
  gemm_short_tile<kTileRows - 1>(rows - i, depth, left + i * row_stride, row_stride, step, panel, c + i * ldc, ldc,
                                 accumulate);
}

// C[rows, n] = L[rows, depth] * B[depth, n];  L row-major, B in panels, ldc and C padded to whole panels.
template <typename A>
inline void gemm(int64_t rows, int64_t depth, int64_t n, const A* left, int64_t ldl, const A* panels, A* c,
                 int64_t ldc) {
  for (int64_t k = 0; k < depth; k += kGemmBlock) {
    const int64_t block = depth - k < kGemmBlock ? depth - k : kGemmBlock;
    for (int64_t j = 0; j < n; j += kPanel<A>)
      gemm_column(rows, block, left + k, ldl, 1, panels + j * depth + k * kPanel<A>, c + j, ldc, k > 0);
  }
}

// C[m, n] += L[rows, m]^T * R[rows, n];  L row-major, R in panels, ldc and C padded to whole panels.
template <typename A>
inline void gemm_transposed(int64_t rows, int64_t m, int64_t n, const A* left, int64_t ldl, const A* panels, A* c,
                            int64_t ldc) {
  for (int64_t j = 0; j < n; j += kPanel<A>) gemm_column(m, rows, left, 1, ldl, panels + j * rows, c + j, ldc, true);
}

}  // namespace fastdense::FASTDENSE_TARGET
