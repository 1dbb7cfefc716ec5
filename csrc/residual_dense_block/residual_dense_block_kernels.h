// SPDX-License-Identifier: Apache-2.0
// CPU kernels of the residual dense block: what one thread does with one tile of an image or one chunk of pixel rows.
// The conventions of row_kernels.h hold.
#pragma once

#include <cstdint>

#include "common/conv_geometry.h"
#include "common/row_kernels.h"

namespace fastdense {

// The channels that a layer reads.
template <typename T>
struct Prefix {
  const T* x;  // [pixels, ld]
  int64_t ld;
  int64_t channels;
};

// A rectangle of an image.
struct Tile {
  int64_t image;
  int64_t row, rows;
  int64_t column, columns;
};

template <typename T>
struct Residual {
  const T* x;  // [pixels, ld], or nullptr
  int64_t ld;
  accumulate_t<T> scale;  // of what is added to x
};

// What becomes of the sums of a convolution: out = LeakyReLU(sum + bias), or with residuals
// out = inner.scale * (sum + bias) + inner.x, and = outer.scale * that + outer.x.
template <typename T>
struct Finish {
  using A = accumulate_t<T>;
  T* out;  // [pixels, ld]
  int64_t ld;
  int64_t channels;
  const A* bias;  // [channels]
  A slope;
  Residual<T> inner, outer;
};

template <typename T>
struct ResidualDenseBlockKernels {
  using A = accumulate_t<T>;

  // `panels` holds the panels of every tap, one tap behind the other
  void (*conv)(const Prefix<T>&, const ConvGeometry&, const Tile&, const void* panels, const Finish<T>&, void* scratch);
  // bytes of scratch that this needs
  int64_t (*conv_bytes)(int64_t channels, const ConvGeometry&, const Tile&, int64_t out);
  // d[row, :n] = gradient in front of LeakyReLU with output y, or slope * g without y
  void (*output_gradient)(const T* g, int64_t ldg, const T* y, int64_t ldy, int64_t row, int64_t rows, int64_t n,
                          A slope, void* d);
  // backward of a convolution from its output gradient d[pixels, k]: gradient[row, :channels] = or += input gradient,
  // unless nullptr; dweight [padded taps * k, padded channels] += and dbias [k] +=, unless nullptr
  void (*conv_backward)(const Prefix<T>&, const ConvGeometry&, int64_t row, int64_t rows, const void* d, int64_t k,
                        const void* panels, T* gradient, bool accumulate, A* dweight, double* dbias, void* scratch);
  // dx[row, :n] = g + factor * grad_output
  void (*input_gradient)(const T* g, int64_t ldg, const T* grad_output, int64_t row, int64_t rows, int64_t n, A factor,
                         T* dx);
};

template <typename T>
const ResidualDenseBlockKernels<T>& residual_dense_block_kernels(SimdLevel level);

namespace baseline {
template <typename T>
const ResidualDenseBlockKernels<T>& residual_dense_block_kernels();
}
namespace avx2 {
template <typename T>
const ResidualDenseBlockKernels<T>& residual_dense_block_kernels();
}
namespace avx512 {
template <typename T>
const ResidualDenseBlockKernels<T>& residual_dense_block_kernels();
}
namespace amx {  // for bfloat16
template <typename T>
const ResidualDenseBlockKernels<T>& residual_dense_block_kernels();
}

}  // namespace fastdense
