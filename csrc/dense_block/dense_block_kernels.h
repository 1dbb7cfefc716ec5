// SPDX-License-Identifier: Apache-2.0
// CPU kernels of the dense block's convolution: what one thread does with one chunk of pixels.  Everything else that a
// dense block does is done by the kernels of cpu/conv1x1/conv1x1_kernels.h, whose conventions hold here.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "core/dropout_math.h"
#include "core/geometry.h"
#include "cpu/conv1x1/conv1x1_kernels.h"
#include "cpu/simd/dispatch.h"

namespace fastdense {

struct Dropout {
  double rate;  // 0: none
  uint64_t seed;
  uint32_t layer;
};

// A part of an image: outermost indices [begin, end).
struct Slab {
  int64_t image, begin, end;
};

// Gradient d [pixels, k] of a slice, as factors of products.
struct SliceGradient {
  const void* d;
  int64_t k;
};

template <typename T>
struct DenseBlockKernels {
  using A = accumulate_t<T>;

  // slice = dropout(conv(act(source))) at the pixels of a slab; the workspace is that of Conv1x1Kernels for a product
  // with taps * k columns, and pixels * k numbers more
  void (*conv)(const Source<T>&, const ConvGeometry&, const Slab&, const void* panels, const Target<T>& slice,
               const Dropout&, void* workspace);
  // The same by Winograd's products (winograd.h), with panels of pack().
  void (*conv_winograd)(const Source<T>&, const ConvGeometry&, const Slab&, const void* panels, const Target<T>& slice,
                        const Dropout&, void* workspace);
  // d[row, :columns] = dropout factor * corrected gradient
  void (*finalise)(const Gradient<T>&, int64_t row, int64_t rows, const Dropout&, void* d);
  // backward of a convolution: left = d gathered at the taps
  void (*conv_backward)(const Source<T>&, const ConvGeometry&, int64_t row, int64_t rows, const SliceGradient&,
                        const void* panels, const BackwardEpilogue<T>&, void* workspace);
  void (*conv_winograd_backward)(const Source<T>&, const ConvGeometry&, const Tile&, const SliceGradient&,
                                 const void* panels, const BackwardEpilogue<T>&, void* workspace);

  // Whether Winograd's products are fewer, forward and backward; rows of a tile of the latter; bytes of workspace that
  // they need, that of a slab not included.
  bool (*uses_winograd)(const ConvGeometry&, int64_t k);
  bool (*uses_winograd_backward)(const ConvGeometry&);
  int64_t (*winograd_rows_backward)(const ConvGeometry&, int64_t k);
  int64_t (*winograd_bytes)(const ConvGeometry&, int64_t channels, int64_t k);
  // As in cpu/conv/conv2d_tile.h.
  int64_t (*products)(const ConvGeometry&);
  void (*pack)(const A* weight, const ConvGeometry&, bool reversed, int64_t depth, int64_t columns,
               int64_t depth_stride, int64_t column_stride, void* panel);
  void (*weight_gradient)(const A* by_worker, int64_t workers, const ConvGeometry&, int64_t k, int64_t n, int64_t ld,
                          A* weight);
};

FASTDENSE_EACH_ISA_BF16(template <typename T> const DenseBlockKernels<T>& dense_block_kernels();)

template <typename T>
inline const DenseBlockKernels<T>& dense_block_kernels(Isa isa) {
  FASTDENSE_RETURN_DISPATCH_BF16(T, isa, dense_block_kernels<T>());
}

}  // namespace fastdense
