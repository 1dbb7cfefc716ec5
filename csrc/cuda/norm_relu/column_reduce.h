// SPDX-License-Identifier: Apache-2.0
// CUDA reductions over the rows of a matrix, column by column; included by .cu files only.
//
// A reduction is a class ColumnReduce<T, V>, T being the storage type, which takes V neighbouring columns.  It has
//   using Params                       what the launcher was given
//   static constexpr int kTileRows     of a tile: more hide more latency, fewer leave registers
//   ColumnReduce(const Params&, int64_t first, int count)
//                                      of its columns, which start at `first`, only `count` exist
//   template <int kRows> void tile(int64_t row, int64_t step)
//                                      works on rows row, row + step, ...
//   State                              what lanes join and blocks write, or NoState
//   State& state();  accumulate_t<T>* partial() const
//                                      [splits][2][columns], or nullptr
// A tile loads all its rows before it stores any, so that loads are in flight together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/batch_norm_math.h"
#include "core/scalar.h"
#include "cuda/launch.h"

namespace fastdense {

// V neighbouring elements, moved by one access.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T v[V];
};

// The first `count` elements, and zeros.
template <int V, typename T, typename Stored = std::remove_const_t<T>>
__device__ __forceinline__ Vector<Stored, V> read(T* at, int count) {
  Vector<Stored, V> x;
  if (count == V) {
    FASTDENSE_CHECK_ALIGNED(at, sizeof(x));
    x = *reinterpret_cast<const Vector<Stored, V>*>(at);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) x.v[i] = i < count ? at[i] : Stored{};
  }
  return x;
}

template <int V, typename T>
__device__ __forceinline__ void write(T* at, const Vector<T, V>& x, int count) {
  if (count == V) {
    FASTDENSE_CHECK_ALIGNED(at, sizeof(x));
    *reinterpret_cast<Vector<T, V>*>(at) = x;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) at[i] = x.v[i];
  }
}

struct NoState {};

// Two sums a column.
template <typename A, int V>
struct ColumnSums {
  static constexpr int kNumbers = 2 * V;
  A numbers[kNumbers] = {};
  __device__ A& first(int i) { return numbers[i]; }
  __device__ A& second(int i) { return numbers[V + i]; }
  __device__ void join(const A (&other)[kNumbers]) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i] += other[i];
  }
};

// Mean and M2 a column, and the count that they share.
template <typename A, int V>
struct ColumnMoments {
  static constexpr int kNumbers = 2 * V + 1;
  A numbers[kNumbers] = {};
  __device__ A& first(int i) { return numbers[i]; }
  __device__ A& second(int i) { return numbers[V + i]; }
  __device__ A& count() { return numbers[2 * V]; }
  __device__ void add(int i, Moments<A> m) {
    const Moments<A> sum = combine_moments({count(), first(i), second(i)}, m);
    first(i) = sum.mean;
    second(i) = sum.m2;
  }
  __device__ void join(const A (&other)[kNumbers]) {
#pragma unroll
    for (int i = 0; i < V; ++i) add(i, {other[2 * V], other[i], other[V + i]});
    count() += other[2 * V];
  }
  template <int kRows>
  __device__ void add_rows(const A (&x)[kRows][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      A mean = 0, m2 = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) mean += x[r][i];
      mean *= A(1) / A(kRows);
#pragma unroll
      for (int r = 0; r < kRows; ++r) m2 += (x[r][i] - mean) * (x[r][i] - mean);
      add(i, {A(kRows), mean, m2});
    }
    count() += A(kRows);
  }
};

// Which column a thread of a block works on, of how many, and as which of the `lanes` that share it.
struct LanePlace {
  unsigned column, columns, lane, lanes;
};

// Joins the states of all lanes of a column in lane 0.  Lanes are a power of two, threads that are none come along;
// shared memory holds kNumbers for half of the lanes.
template <typename A, typename State>
__device__ void join_lanes(State& state, unsigned char* shared, const LanePlace& at) {
  A* workspace = reinterpret_cast<A*>(shared);
  const unsigned slots = at.columns * at.lanes / 2;
  for (unsigned half = at.lanes / 2; half > 0; half /= 2) {
    const unsigned slot = at.lane % half * at.columns + at.column;
    if (half <= at.lane && at.lane < 2 * half) {
#pragma unroll
      for (int i = 0; i < State::kNumbers; ++i) workspace[i * slots + slot] = state.numbers[i];
    }
    __syncthreads();
    if (at.lane < half) {
      A other[State::kNumbers];
#pragma unroll
      for (int i = 0; i < State::kNumbers; ++i) other[i] = workspace[i * slots + slot];
      state.join(other);
    }
    __syncthreads();  // all have read before anybody writes anew
  }
}

// Of a block whose threads with the same x are lanes.
template <typename A, typename State>
__device__ void join_lanes(State& state, unsigned char* shared) {
  join_lanes<A>(state, shared, {threadIdx.x, blockDim.x, threadIdx.y, blockDim.y});
}

// Joins the states of a block's lanes and writes those of columns first, first + 1, ... as split `split` of the partial
// sums [splits][2][columns].
template <typename A, int V, typename State>
__device__ void write_partial(State& state, A* partial, int64_t split, int64_t columns, int64_t first, int count) {
  FASTDENSE_SHARED(shared);
  join_lanes<A>(state, shared);
  if (threadIdx.y > 0) return;
  partial += 2 * split * columns + first;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i >= count) break;
    partial[i] = state.first(i);
    partial[columns + i] = state.second(i);
  }
}

// Bytes of shared memory that it takes.
template <typename A, typename State>
size_t join_bytes(dim3 block) {
  return State::kNumbers * sizeof(A) * (block.x * block.y / 2);
}

constexpr int kReduceThreads = 256, kLeastReduceBlocks = 2;  // of a block; blocks an SM holds

template <template <typename, int> class ColumnReduce, typename T, int V>
__global__ void __launch_bounds__(kReduceThreads, kLeastReduceBlocks)
    column_reduce_kernel(const __grid_constant__ typename ColumnReduce<T, V>::Params params, int64_t rows,
                         int64_t columns, int64_t rows_per_block) {
  wait_for_kernels_before();
  using A = accumulate_t<T>;
  constexpr int kTileRows = ColumnReduce<T, V>::kTileRows;
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  const int count = columns - first < V ? int(columns - first) : V;
  const int64_t begin = blockIdx.y * rows_per_block, step = blockDim.y;
  const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
  ColumnReduce<T, V> reduction(params, first, count);
  if (count > 0) {
    int64_t row = begin + threadIdx.y;
    for (; row + (kTileRows - 1) * step < end; row += kTileRows * step) reduction.template tile<kTileRows>(row, step);
    for (; row < end; row += step) reduction.template tile<1>(row, step);
  }
  if constexpr (!std::is_same_v<typename ColumnReduce<T, V>::State, NoState>) {
    if (A* partial = reduction.partial())
      write_partial<A, V>(reduction.state(), partial, blockIdx.y, columns, first, count);
  }
}

__host__ __device__ constexpr unsigned power_of_two_up_to(unsigned n) {
  unsigned power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

inline unsigned power_of_two_from(int64_t n, unsigned most) {
  unsigned power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

// How rows and columns are shared out; `vector` columns a thread.
struct ColumnReduceShape {
  dim3 grid, block;
  int64_t rows_per_block;
  ColumnReduceShape(int64_t rows, int64_t columns, int64_t vector, int64_t splits) {
    const int64_t vectors = (columns + vector - 1) / vector;
    rows_per_block = (rows + splits - 1) / splits;
    const unsigned across = power_of_two_from(vectors, 32);
    block = dim3(across, power_of_two_from(rows_per_block, kReduceThreads / across));
    grid = dim3(unsigned((vectors + across - 1) / across), unsigned(splits));
  }
};

// The address bits that tell how wide the accesses to a matrix can be.
template <typename T>
uintptr_t address_bits(const T* data, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) | uintptr_t(ld) * sizeof(T);
}

// `bits`: of all matrices that the reduction moves vectors of.
template <template <typename, int> class ColumnReduce, typename T, int V = 16 / sizeof(T)>
cudaError_t launch_column_reduce(const typename ColumnReduce<T, V>::Params& params, uintptr_t bits, int64_t rows,
                                 int64_t columns, int64_t splits, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  if constexpr (V > 1) {
    if (bits % (V * sizeof(T)) != 0 || columns < V)
      return launch_column_reduce<ColumnReduce, T, V / 2>(params, bits, rows, columns, splits, stream);
  }
  using State = typename ColumnReduce<T, V>::State;
  const ColumnReduceShape shape(rows, columns, V, splits);
  size_t shared = 0;
  if constexpr (!std::is_same_v<State, NoState>) shared = join_bytes<accumulate_t<T>, State>(shape.block);
  FASTDENSE_LAUNCH((column_reduce_kernel<ColumnReduce, T, V>), shape.grid, shape.block, shared, stream, params, rows,
                   columns, shape.rows_per_block);
  return cudaGetLastError();
}

}  // namespace fastdense
