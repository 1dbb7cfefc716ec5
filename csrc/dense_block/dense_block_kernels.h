// SPDX-License-Identifier: Apache-2.0
// CPU kernels of the dense block: what one thread does with one chunk of pixels.  No torch header; rows are pixels,
// channels are innermost.  T is the storage type, A = accumulate_t<T> the type of arithmetic, scratch and weights.
// The driver (dense_block_cpu.cpp) owns the loop over chunks, the threads and all memory.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "common/simd.h"

namespace fastdense {

// relu(scale * x + shift) of `channels` columns of a matrix of rows: what a norm + ReLU makes of a channel prefix.
template <typename T>
struct Source {
  const T* x;                    // [rows, ld]
  int64_t ld;                    // row stride in elements
  int64_t channels;              // columns read
  const accumulate_t<T>* scale;  // [channels]
  const accumulate_t<T>* shift;  // [channels]
};

// Image of up to three spatial dimensions (trailing sizes 1), odd kernel of stride 1 with `same` padding.
struct ConvGeometry {
  int64_t size[3];
  int64_t kernel[3];
  int64_t plane() const { return size[1] * size[2]; }
  int64_t pixels() const { return size[0] * plane(); }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// Windows of stride = size; an incomplete last window is dropped.
struct PoolGeometry {
  int64_t size[3];    // of the image
  int64_t window[3];  // 1 or 2
  int64_t pooled(int d) const { return size[d] / window[d]; }
  int64_t pixels() const { return pooled(0) * pooled(1) * pooled(2); }
  int64_t volume() const { return window[0] * window[1] * window[2]; }
};

struct Dropout {
  double rate;  // 0: none
  uint64_t seed;
  uint32_t layer;
};

// A product left[rows, depth] * weight[depth, n] in backward direction: dy of an activation, and what follows from it.
template <typename T>
struct BackwardSink {
  using A = accumulate_t<T>;
  T* gradient;  // [rows, ld]: += the norm's scale * dy if `accumulate`, else = dy; nullptr if not wanted
  int64_t ld;
  bool accumulate;
  const A* mean;     // [n]
  double* sum;       // [n] += sum dy
  double* weighted;  // [n] += sum dy * (x - mean)
  A* dweight;        // [padded depth, padded n] += left^T * activation, or nullptr
};

// Factors of products are held in a type and layout of the level's own: `void*` below.
template <typename T>
struct DenseBlockKernels {
  using A = accumulate_t<T>;
  int64_t panel;          // columns of a panel of packed weights
  int64_t align;          // their depth, and the depth of dweight, is padded to a multiple
  int64_t operand_bytes;  // of an element
  int64_t backward_rows;  // rows of a backward chunk, at most

  // panels[n / panel][padded depth][panel] = w[k * depth_stride + j * column_stride], zero beyond depth and n
  void (*pack)(const A* w, int64_t depth, int64_t n, int64_t depth_stride, int64_t column_stride, int64_t first_panel,
               int64_t last_panel, void* panels);
  // mean and M2 of the columns of rows
  void (*moments)(const T* x, int64_t ld, int64_t rows, int64_t n, double* mean, double* m2);
  // out[row, :n] = act(source)[row] * weight, pooled rows if `pool`; moments of the stored values if `mean`
  void (*product)(const Source<T>&, const PoolGeometry* pool, int64_t row, int64_t rows, const void* panels, int64_t n,
                  T* out, int64_t ldo, double* mean, double* m2, void* scratch);
  // slice[row, :k] = dropout(conv(act(source))) for the outermost indices [begin, end) of an image
  void (*conv)(const Source<T>&, const ConvGeometry&, int64_t image, int64_t begin, int64_t end, const void* panels,
               int64_t k, T* slice, int64_t lds, const Dropout&, double* mean, double* m2, void* scratch);
  // d[row, :n] = dropout factor * finalised gradient
  void (*finalise)(const T* g, const T* x, int64_t ld, int64_t row, int64_t rows, int64_t n, const A* mean,
                   const A* shift_sum, const A* slope_sum, const Dropout&, void* d);
  void (*finalise_input)(const T* g, const T* x, int64_t ld, int64_t row, int64_t rows, int64_t n, const A* mean,
                         const A* shift_sum, const A* slope_sum, T* dx);
  // backward of a convolution: left = d gathered at the taps
  void (*conv_backward)(const Source<T>&, const ConvGeometry&, int64_t row, int64_t rows, const void* d, int64_t k,
                        const void* panels, const BackwardSink<T>&, void* scratch);
  // backward of the 1x1: left = gradient behind norm2, rebuilt from dv and z (norm[5][b]: scale, mean, rstd, t1, t2)
  void (*product_backward)(const Source<T>&, int64_t row, int64_t rows, const T* dv, const T* z, int64_t b,
                           const A* norm, A inv_count, const void* panels, const BackwardSink<T>&, void* scratch);
  // backward of pool + 1x1: left = grad rows at pooled resolution
  void (*pool_backward)(const Source<T>&, const PoolGeometry&, int64_t row, int64_t rows, const T* grad, int64_t ldg,
                        int64_t n, const void* panels, const BackwardSink<T>&, void* scratch);
  // out = scale * x + shift, with or without ReLU, and its backward
  void (*norm)(const Source<T>&, bool relu, int64_t row, int64_t rows, T* out);
  void (*norm_backward)(const Source<T>&, bool relu, int64_t row, int64_t rows, const T* grad, const BackwardSink<T>&,
                        void* scratch);
  // bytes of scratch that a thread needs for any of the above: the most channels of a source, the most columns on
  // either side of a product (taps * k counts), and the elements of the largest slab of `conv`
  int64_t (*scratch_bytes)(int64_t widest_source, int64_t widest_product, int64_t slab);
  int64_t (*chunk_rows)(int64_t channels);  // rows of a forward chunk that reads so many channels
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
