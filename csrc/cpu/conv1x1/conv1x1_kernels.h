// SPDX-License-Identifier: Apache-2.0
// CPU kernels that the blocks are built of: 1x1 convolutions with norm + activation as the prologue and batch
// statistics of what they store as the epilogue, their backward, and norms alone.  They do what one thread does with
// one chunk of rows; rows are pixels, channels are innermost.  No torch header.  T is the storage type, A =
// accumulate_t<T> the type of arithmetic, workspace and weights.  BlockForward (cpu/block_forward.h) owns the loop over
// chunks, the threads and all memory.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/batch_norm_math.h"
#include "core/geometry.h"
#include "core/scalar.h"
#include "cpu/activation/activation_kernels.h"
#include "cpu/simd/dispatch.h"

namespace fastdense {

// An activation other than ReLU of a source.
template <typename A>
struct SourceActivation {
  RowActivation<A> run;
  ActivationParameters<A> parameters;
  const A* slope = nullptr;  // [channels], of leaky_relu
};

// act(scale * x + shift) of `channels` columns of a matrix of rows: what a norm + activation makes of a channel prefix.
template <typename T>
struct Source {
  const T* x;                                                     // [rows, ld]
  int64_t ld;                                                     // row stride in elements
  int64_t channels;                                               // columns read
  const accumulate_t<T>* scale;                                   // [channels]
  const accumulate_t<T>* shift;                                   // [channels]
  const SourceActivation<accumulate_t<T>>* activation = nullptr;  // nullptr: ReLU
};

// Columns side by side, in one or two segments.
template <typename T>
struct Sources {
  Source<T> first;
  Source<T> second{};
  int64_t channels() const { return first.channels + second.channels; }
};

// Where columns of a product go: out = product (+ bias) (+ add), rounded, and the moments of what was stored if `mean`.
template <typename T>
struct Target {
  T* out;  // [rows, ld]
  int64_t ld;
  int64_t columns;
  double* mean = nullptr;  // [columns], of this chunk, or nullptr
  double* m2 = nullptr;
  const T* add = nullptr;  // [rows, ld_add] or nullptr; may be `out`
  int64_t ld_add = 0;
  const accumulate_t<T>* bias = nullptr;  // [columns] or nullptr
};

template <typename T>
struct Targets {
  Target<T> first;
  Target<T> second{};
  int64_t columns() const { return first.columns + second.columns; }
};

// The gradient of columns that a product once stored in x, with their deferred correction if `x`.
template <typename T>
struct Gradient {
  using A = accumulate_t<T>;
  const T* g;  // [rows, ld]
  int64_t ld;
  int64_t columns;
  const T* x = nullptr;  // [rows, ldx] or nullptr
  int64_t ldx = 0;
  const A *mean = nullptr, *shift_sum = nullptr, *slope_sum = nullptr;  // [columns]
  T* corrected = nullptr;  // [rows, ld]: the corrected gradient is stored here too (may be g), or nullptr
};

template <typename T>
struct Gradients {
  Gradient<T> first;
  Gradient<T> second{};
  int64_t columns() const { return first.columns + second.columns; }
};

// What follows from dy, the gradient of an activation.
template <typename T>
struct BackwardEpilogue {
  using A = accumulate_t<T>;
  T* gradient;  // [rows, ld]: += the norm's scale * dy if `accumulate`, else = dy; nullptr if not wanted
  int64_t ld;
  bool accumulate;
  const A* mean;            // [n]
  double* sum;              // [n] += sum dy
  double* weighted;         // [n] += sum dy * (x - mean)
  A* dweight;               // [padded depth, padded n] += left^T * activation, or nullptr
  double* slope = nullptr;  // [n] += sum of (gradient of the activation) * min(u, 0): PReLU's, or nullptr
  double* bias = nullptr;   // [depth] += sum of left: that of the convolution's bias, or nullptr
};

// A norm that the gradient dv behind it passes on its way to the norm's input z.
template <typename T>
struct NormBackward {
  using A = accumulate_t<T>;
  const T* dv;  // [rows, channels]
  const T* z;   // [rows, channels]
  int64_t channels;
  const A *scale, *mean, *rstd, *t1, *t2;  // [channels]
  A inv_count;                             // 0 when frozen
  bool has_terms = false;                  // t1 and t2 are what the input owes: dz = scale * dv - t1 - (z - mean) * t2
};

// Factors of products are held in a type and layout of the instruction set's own: `void*` below.
template <typename T>
struct Conv1x1Kernels {
  using A = accumulate_t<T>;
  int64_t panel;          // columns of a panel of packed weights
  int64_t align;          // their depth, and the depth of dweight, is padded to a multiple
  int64_t operand_bytes;  // of an element
  int64_t backward_rows;  // rows of a backward chunk, at most
  int64_t tile_rows;      // rows that a product works on at once; backward_rows and chunk_rows are multiples

  // panels[n / panel][padded depth][panel] = w[k * depth_stride + j * column_stride], zero beyond depth and n
  void (*pack)(const A* w, int64_t depth, int64_t n, int64_t depth_stride, int64_t column_stride, int64_t first_panel,
               int64_t last_panel, void* panels);
  // mean and M2 of the columns of rows
  void (*moments)(const T* x, int64_t ld, int64_t rows, int64_t n, double* mean, double* m2);
  // targets[row] = act(sources)[row] * weight, pooled rows if `pool`
  void (*conv1x1)(const Sources<T>&, const PoolGeometry* pool, int64_t row, int64_t rows, const void* panels,
                  const Targets<T>&, void* workspace);
  // dx[row, :columns] = corrected gradient; dx may be g of the same row stride
  void (*finalise)(const Gradient<T>&, int64_t row, int64_t rows, T* dx);
  // backward of a 1x1 with a norm behind it: left = input gradient of that norm
  void (*conv1x1_norm_backward)(const Source<T>&, int64_t row, int64_t rows, const NormBackward<T>&, const void* panels,
                                const BackwardEpilogue<T>&, void* workspace);
  // backward of a 1x1, behind pooling if `pool`: left = its output gradient
  void (*conv1x1_backward)(const Source<T>&, const PoolGeometry* pool, int64_t row, int64_t rows, const Gradients<T>&,
                           const void* panels, const BackwardEpilogue<T>&, void* workspace);
  // out = scale * x + shift, with or without the activation, and its backward; `grad` may be the epilogue's gradient
  void (*norm)(const Source<T>&, bool activates, int64_t row, int64_t rows, T* out);
  void (*norm_backward)(const Source<T>&, bool activates, int64_t row, int64_t rows, const T* grad,
                        const BackwardEpilogue<T>&, void* workspace);
  // dz[row] = input gradient of the norm; dz may be dv
  void (*norm_input_gradient)(const NormBackward<T>&, int64_t row, int64_t rows, T* dz);
  // bytes of workspace that a thread needs for any of the above: the most channels of sources, and the most columns on
  // either side of a product
  int64_t (*workspace_bytes)(int64_t widest_source, int64_t widest_product);
  int64_t (*chunk_rows)(int64_t channels);  // rows of a forward chunk that reads so many channels
};

FASTDENSE_EACH_ISA_BF16(template <typename T> const Conv1x1Kernels<T>& conv1x1_kernels();)

template <typename T>
inline const Conv1x1Kernels<T>& conv1x1_kernels(Isa isa) {
  FASTDENSE_RETURN_DISPATCH_BF16(T, isa, conv1x1_kernels<T>());
}

}  // namespace fastdense
