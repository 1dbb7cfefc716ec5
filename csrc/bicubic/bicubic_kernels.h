// SPDX-License-Identifier: Apache-2.0
// CPU kernels of resampling: what one thread does with some rows of one plane.  No torch header.
//
// A plane is [height, width, inner]: inner is 1 in NCHW and C in channels_last.  Columns are resampled row by row into
// a ring of rows, from which the rows of the result are made; or the rows first, where that is less work.  Every
// element is the same sum in the same order whatever the layout, the batch and the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "bicubic/bicubic_table.h"
#include "core/scalar.h"
#include "cpu/simd/dispatch.h"

namespace fastdense {

// Elements of a row that are made together.
constexpr int64_t kBicubicBlock = 16;
// From so many interleaved channels on, columns are resampled pixel by pixel.
constexpr int64_t kBicubicWideInner = 16;

// A table in the type of arithmetic.  int32_t: fixed-point weights, bytes with kFixedBits.
template <typename A>
struct BicubicMatrix {
  int64_t rows, columns, taps;
  const int32_t* start;  // [rows]
  const A* weight;       // [rows, taps]
};

// A matrix applied to interleaved elements, in blocks: for element e of block b and tap i,
// out[e] = sum_i weight[b][i][e % 16] * in[first[b] + index[e] + i * inner].
template <typename A>
struct BicubicLanes {
  const int32_t* first;  // [blocks]
  const int32_t* span;   // [blocks]: elements of the input that a block reads from `first` on
  const int32_t* index;  // [blocks * 16]
  const A* weight;       // [blocks, taps, 16]
};

// Weights of 16 bits for bytes: integers times 2^-bits.  `weight` [rows, padded] ends in zeros; `lane_weight` [blocks,
// pairs of taps, 16, 2] is for a block of elements whose taps lie close together, nullptr where they do not.
struct BicubicShort {
  int bits;
  int64_t padded;
  const int16_t *weight, *lane_weight;
};
constexpr int64_t kBicubicPadding = 32;
constexpr int64_t kBicubicShortSpan = 128;  // elements that a block may read

template <typename T, typename A>
struct BicubicPlane {
  const T* input;     // [height, width, inner]
  T* output;          // [rows, columns, inner]
  const T* residual;  // like output, added before rounding; or nullptr
  int64_t height, width, inner;
  const BicubicMatrix<A>* rows;     // nullptr: unchanged
  const BicubicMatrix<A>* columns;  // nullptr: unchanged
  BicubicLanes<A> lanes;            // of columns, with inner < kBicubicWideInner
  bool columns_first;
  bool round_between;  // to bytes, after the first of two axes
  bool half_up;        // bytes made of float32: halves up, not to even
  bool is_short;       // bytes times weights of 16 bits, columns first
  BicubicShort short_rows, short_columns;
  A low, high;  // the result is clamped to

  int64_t out_rows() const { return rows ? rows->rows : height; }
  int64_t out_width() const { return (columns ? columns->rows : width) * inner; }
  int64_t in_width() const { return width * inner; }
};

template <typename T, typename A>
struct BicubicKernel {
  // Rows [begin, end) of the output.
  void (*resample)(const BicubicPlane<T, A>&, int64_t begin, int64_t end, A* workspace);
  // Elements of workspace it needs.
  int64_t (*workspace_size)(const BicubicPlane<T, A>&);
};

FASTDENSE_EACH_ISA(template <typename T, typename A> BicubicKernel<T, A> bicubic_kernel();)

template <typename T, typename A>
inline BicubicKernel<T, A> bicubic_kernel(Isa isa) {
  return FASTDENSE_DISPATCH(isa, bicubic_kernel<T, A>());
}

}  // namespace fastdense
