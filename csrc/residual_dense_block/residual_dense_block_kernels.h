// SPDX-License-Identifier: Apache-2.0
// CPU kernels of the residual dense block: what one thread does with one tile of an image or one chunk of pixel rows.
// The conventions of cpu/conv1x1/conv1x1_kernels.h hold.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "core/geometry.h"
#include "cpu/conv1x1/conv1x1_kernels.h"
#include "cpu/simd/dispatch.h"
#include "residual_dense_block/residual_dense_block_math.h"

namespace fastdense {

// The channels that a layer reads.
template <typename T>
struct Prefix {
  const T* x;  // [pixels, ld]
  int64_t ld;
  int64_t channels;
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

// Gradient of the sums of a convolution: in front of LeakyReLU with output y, or slope * g without y.
template <typename T>
struct SumsGradient {
  const T* g;  // [pixels, ldg]
  int64_t ldg;
  const T* y;  // [pixels, ldy], or nullptr
  int64_t ldy;
  int64_t channels;
  accumulate_t<T> slope;
};

// Where the gradients of a convolution go; nullptr where one is not wanted.
template <typename T>
struct ConvGradients {
  T* input;  // [pixels, ld of the prefix]: of the prefix, = or +=
  bool accumulate;
  accumulate_t<T>* weight;  // [products][padded channels of the sums][padded channels of the prefix] +=
  double* bias;             // [channels of the sums] +=
};

// `panels` hold, panel by panel, the factors of all products, one behind the other.
template <typename T>
struct ResidualDenseBlockKernels {
  using A = accumulate_t<T>;

  // of which the sums of a convolution are made
  int64_t (*products)(const ConvGeometry&);
  // A panel from its weights on; reversed: of the gradient of the input.
  void (*pack)(const A* weight, const ConvGeometry&, bool reversed, int64_t depth, int64_t columns,
               int64_t depth_stride, int64_t column_stride, void* panel);
  void (*conv)(const Prefix<T>&, const ConvGeometry&, const Tile&, const void* panels, const Finish<T>&,
               void* workspace);
  // bytes of workspace that this needs
  int64_t (*conv_bytes)(int64_t channels, const ConvGeometry&, const Tile&);
  // `panels` are reversed
  void (*conv_backward)(const SumsGradient<T>&, const Prefix<T>&, const ConvGeometry&, const Tile&, const void* panels,
                        const ConvGradients<T>&, void* workspace);
  int64_t (*conv_backward_bytes)(int64_t channels, const ConvGeometry&, const Tile&);
  // weight[k][n][taps] from those of all workers [workers][products][padded k][ld]
  void (*weight_gradient)(const A* by_worker, int64_t workers, const ConvGeometry&, int64_t k, int64_t n, int64_t ld,
                          A* weight);
  // dx[row, :n] = g + factor * grad_output
  void (*input_gradient)(const T* g, int64_t ldg, const T* grad_output, int64_t row, int64_t rows, int64_t n, A factor,
                         T* dx);
};

FASTDENSE_EACH_ISA_BF16(template <typename T> const ResidualDenseBlockKernels<T>& residual_dense_block_kernels();)

template <typename T>
inline const ResidualDenseBlockKernels<T>& residual_dense_block_kernels(Isa isa) {
  FASTDENSE_RETURN_DISPATCH_BF16(T, isa, residual_dense_block_kernels<T>());
}

}  // namespace fastdense
