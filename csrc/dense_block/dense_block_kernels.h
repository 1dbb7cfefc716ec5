// SPDX-License-Identifier: Apache-2.0
// CPU kernels of the dense block's convolution: what one thread does with one chunk of pixels.  Everything else that a
// dense block does is done by the kernels of row_kernels.h, whose conventions hold here.
#pragma once

#include <cstdint>

#include "common/conv_geometry.h"
#include "common/row_kernels.h"

namespace fastdense {

struct Dropout {
  double rate;  // 0: none
  uint64_t seed;
  uint32_t layer;
};

template <typename T>
struct DenseBlockKernels {
  using A = accumulate_t<T>;

  // slice[row, :k] = dropout(conv(act(source))) for the outermost indices [begin, end) of an image; the room is that of
  // RowKernels for a product with taps * k columns, and slab * k numbers more
  void (*conv)(const Source<T>&, const ConvGeometry&, int64_t image, int64_t begin, int64_t end, const void* panels,
               int64_t k, T* slice, int64_t lds, const Dropout&, double* mean, double* m2, void* scratch);
  // d[row, :n] = dropout factor * finalised gradient
  void (*finalise)(const T* g, const T* x, int64_t ld, int64_t row, int64_t rows, int64_t n, const A* mean,
                   const A* shift_sum, const A* slope_sum, const Dropout&, void* d);
  // backward of a convolution: left = d gathered at the taps
  void (*conv_backward)(const Source<T>&, const ConvGeometry&, int64_t row, int64_t rows, const void* d, int64_t k,
                        const void* panels, const BackwardSink<T>&, void* scratch);
};

template <typename T>
const DenseBlockKernels<T>& dense_block_kernels(SimdLevel level);

namespace baseline {
template <typename T>
const DenseBlockKernels<T>& dense_block_kernels();
}
namespace avx2 {
template <typename T>
const DenseBlockKernels<T>& dense_block_kernels();
}
namespace avx512 {
template <typename T>
const DenseBlockKernels<T>& dense_block_kernels();
}

namespace amx {  // for bfloat16
template <typename T>
const DenseBlockKernels<T>& dense_block_kernels();
}

}  // namespace fastdense
