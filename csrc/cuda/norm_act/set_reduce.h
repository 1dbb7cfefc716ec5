// SPDX-License-Identifier: Apache-2.0
// CUDA reductions over rows in sets, column by column, and activations of neighbouring columns; included by .cu files
// only.
//
// A reduction is a class as in cuda/norm_relu/column_reduce.h, but
//   Reduce(const Params&, int64_t set, int64_t begin, int64_t first, int count)
//                                      for a set whose rows start at `begin`
//   static constexpr int kSums         of a column, if it has a State
#pragma once

#include "cuda/norm_act/norm_act_launch.h"
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"

namespace fastdense {

// Calls body.operator()<kind>(); all threads of a kernel have the same kind.
template <typename Body>
__device__ __forceinline__ void with_activation(Activation kind, const Body& body) {
  switch (kind) {
#define FASTDENSE_CASE(name)                      \
  case Activation::name:                          \
    body.template operator()<Activation::name>(); \
    break;
    FASTDENSE_CASE(kRelu)
    FASTDENSE_CASE(kIdentity)
    FASTDENSE_CASE(kRelu6)
    FASTDENSE_CASE(kLeakyRelu)
    FASTDENSE_CASE(kElu)
    FASTDENSE_CASE(kSilu)
    FASTDENSE_CASE(kGelu)
    FASTDENSE_CASE(kGeluTanh)
    FASTDENSE_CASE(kHardswish)
    FASTDENSE_CASE(kMish)
    FASTDENSE_CASE(kSoftplus)
    FASTDENSE_CASE(kTanh)
    FASTDENSE_CASE(kSigmoid)
#undef FASTDENSE_CASE
  }
}

// The slope of channel `channel` of LeakyReLU or PReLU.
template <typename A>
__device__ __forceinline__ A slope_of(const SetActivation<A>& act, int64_t channel) {
  return act.slope ? act.slope[act.slope_by_channel ? channel : 0] : act.parameters.a;
}

// Registers do not hold what more numbers at once would take.
constexpr int kMostActivated = 4;

// u[i] of channels first + i, of which `count` exist, becomes act(u[i]).
template <int kBegin = 0, int V, typename A>
__device__ __forceinline__ void activate(const SetActivation<A>& act, int64_t first, int count, A (&u)[V]) {
  constexpr int kEnd = kBegin + kMostActivated < V ? kBegin + kMostActivated : V;
  with_activation(act.kind, [&]<Activation kind>() {
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      if constexpr (kind == Activation::kLeakyRelu) {
        if (i < count) u[i] = ActivationFunction<kind>::value(u[i], slope_of(act, first + i));
      } else {
        u[i] = ActivationFunction<kind>::value(u[i], act.parameters);
      }
    }
  });
  if constexpr (kEnd < V) activate<kEnd>(act, first, count, u);
}

// The same with derivative[i] = act'(u[i]); u[i] stays as it is unless its value is wanted.
template <int kBegin = 0, int V, typename A>
__device__ __forceinline__ void differentiate(const SetActivation<A>& act, int64_t first, int count, bool value,
                                              A (&u)[V], A (&derivative)[V]) {
  constexpr int kEnd = kBegin + kMostActivated < V ? kBegin + kMostActivated : V;
  with_activation(act.kind, [&]<Activation kind>() {
    using Function = ActivationFunction<kind>;
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      if constexpr (kind == Activation::kLeakyRelu) {
        const A slope = i < count ? slope_of(act, first + i) : A(0);
        derivative[i] = Function::slope(u[i], slope);
        if (value) u[i] = Function::value(u[i], slope);
      } else {
        derivative[i] = Function::slope(u[i], act.parameters);
        if (value) u[i] = Function::value(u[i], act.parameters);
      }
    }
  });
  if constexpr (kEnd < V) differentiate<kEnd>(act, first, count, value, u, derivative);
}

// scale, shift and mean of V neighbouring channels for one set.
template <typename A, int V>
struct SetScales {
  A scale[V], shift[V], mean[V];
  __device__ SetScales(const SetNorm<A>& norm, int64_t set, int64_t first, int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      scale[i] = shift[i] = mean[i] = A(0);
      if (i < count) {
        const NormCoefficients<A> c = norm(set, first + i);
        scale[i] = c.scale;
        shift[i] = c.shift;
        mean[i] = c.mean;
      }
    }
  }
};

// Joins the states of a block's lanes and writes kSums of each column as unit `unit` of [units][kSums][columns].
template <int kSums, typename A, int V, typename State>
__device__ void write_sums(State& state, A* partial, int64_t unit, int64_t columns, int64_t first, int count) {
  FASTDENSE_SHARED(shared);
  join_lanes<A>(state, shared);
  if (threadIdx.y > 0) return;
  partial += kSums * unit * columns + first;
#pragma unroll
  for (int k = 0; k < kSums; ++k)
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) partial[k * columns + i] = state.numbers[k * V + i];
}

template <template <typename, int> class Reduce, typename T, int V>
__global__ void __launch_bounds__(kReduceThreads, kLeastReduceBlocks)
    set_reduce_kernel(const __grid_constant__ typename Reduce<T, V>::Params params, int64_t rows, int64_t columns,
                      int64_t rows_per_block, unsigned splits, unsigned across) {
  wait_for_kernels_before();
  using A = accumulate_t<T>;
  constexpr int kTileRows = Reduce<T, V>::kTileRows;
  const unsigned unit = blockIdx.x / across, set = unit / splits, split = unit - set * splits;
  const int64_t first = (int64_t(blockIdx.x - unit * across) * blockDim.x + threadIdx.x) * V;
  const int count = columns - first < V ? int(columns - first) : V;
  const int64_t begin = set * rows, step = blockDim.y, of_block = split * rows_per_block;
  const int64_t end = begin + (of_block + rows_per_block < rows ? of_block + rows_per_block : rows);
  Reduce<T, V> reduction(params, set, begin, first, count);
  if (count > 0) {
    int64_t row = begin + of_block + threadIdx.y;
    for (; row + (kTileRows - 1) * step < end; row += kTileRows * step) reduction.template tile<kTileRows>(row, step);
    for (; row < end; row += step) reduction.template tile<1>(row, step);
  }
  if constexpr (!std::is_same_v<typename Reduce<T, V>::State, NoState>) {
    if (A* partial = reduction.partial())
      write_sums<Reduce<T, V>::kSums, A, V>(reduction.state(), partial, unit, columns, first, count);
  }
}

// `bits`: of all matrices that the reduction moves vectors of.
template <template <typename, int> class Reduce, typename T, int V = 16 / sizeof(T)>
cudaError_t launch_set_reduce(const typename Reduce<T, V>::Params& params, uintptr_t bits, const SetRows& r,
                              int64_t columns, cudaStream_t stream) {
  if (r.sets == 0 || r.rows == 0 || columns == 0) return cudaSuccess;
  if constexpr (V > 1) {
    if (bits % (V * sizeof(T)) != 0 || columns < V)
      return launch_set_reduce<Reduce, T, V / 2>(params, bits, r, columns, stream);
  }
  using State = typename Reduce<T, V>::State;
  const ColumnReduceShape shape(r.rows, columns, V, r.splits);
  const unsigned across = shape.grid.x;
  size_t shared = 0;
  if constexpr (!std::is_same_v<State, NoState>) shared = join_bytes<accumulate_t<T>, State>(shape.block);
  // One number for columns, splits and sets: a grid has few rows of blocks.
  FASTDENSE_LAUNCH((set_reduce_kernel<Reduce, T, V>), dim3(unsigned(r.sets * r.splits * across)), shape.block, shared,
                   stream, params, r.rows, columns, shape.rows_per_block, unsigned(r.splits), across);
  return cudaGetLastError();
}

// The threads of a `finalise` kernel: a few columns, whose lanes take the units of a sum in turns.
constexpr unsigned kFinaliseSetThreads = 256, kMostFinaliseLanes = 32;

struct FinaliseShape {
  unsigned lanes, columns;
  static FinaliseShape of(int64_t units) {
    const unsigned lanes = power_of_two_from(units, kMostFinaliseLanes);
    return {lanes, kFinaliseSetThreads / lanes};
  }
  // Channels of a block: whole groups, or a single one that it goes through in parts.
  FASTDENSE_HD int64_t channels(int64_t group) const {
    return group < columns ? columns / unsigned(group) * unsigned(group) : group;
  }
  __device__ LanePlace place() const { return {threadIdx.x % columns, columns, threadIdx.x / columns, lanes}; }
};

// Which columns of a block belong to the group of column `column`: `count` from `first` on, or all of them where a
// group has more channels.
struct GroupColumns {
  unsigned first, count;
  __device__ GroupColumns(const FinaliseShape& shape, int64_t group, unsigned column)
      : first(group < shape.columns ? unsigned(column / unsigned(group) * unsigned(group)) : 0),
        count(group < shape.columns ? unsigned(group) : shape.columns) {}
};

}  // namespace fastdense
