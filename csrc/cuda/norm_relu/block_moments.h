// SPDX-License-Identifier: Apache-2.0
// Moments of columns that the blocks of a fused kernel take of their rows, and what the block that ends last makes of
// them.  Included by .cu files only.
//
// That block finds itself by a ticket, an integer that every block raises when its moments are written.  Which block is
// the last differs from run to run; what it adds up, and in which order, does not.
#pragma once

#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

// Whether all other blocks of the grid have come here, whose writes are then seen.  A word of shared memory is free.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    *shared = atomicAdd(ticket, 1u) == blocks - 1;
    if (*shared) *ticket = 0;  // for the next kernel
  }
  __syncthreads();
  const bool last = *shared != 0;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Sums over splits of count * d and M2 + count * d^2 of V neighbouring columns, where d is the difference of a split's
// mean from that of split 0: small, so that the squares do not cancel.
template <int V>
struct MomentSums : ColumnSums<double, V> {
  template <typename A>
  __device__ void add(const A* partial, int64_t columns, int64_t column, int64_t split, double count,
                      const Vector<A, V>& pivot) {
    const A* at = partial + 2 * split * columns + column;
    const Vector<A, V> mean = read<V>(at, V), m2 = read<V>(at + columns, V);
    if (count == 0) return;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const double difference = double(mean.v[i]) - double(pivot.v[i]);
      this->first(i) += count * difference;
      this->second(i) += double(m2.v[i]) + count * difference * difference;
    }
  }
  // Of `rows` rows altogether.
  __device__ double mean(int i, double pivot, double rows) { return pivot + this->first(i) / rows; }
  __device__ double variance(int i, double rows) {
    const double mean = this->first(i) / rows, variance = this->second(i) / rows - mean * mean;
    return variance < 0 ? 0 : variance;
  }
};

// Bytes of shared memory that finish_moments() takes.
FASTDENSE_HD constexpr int finish_bytes(int threads) { return int(sizeof(double)) * 8 * threads / 2; }

// By one block of kThreads threads: V neighbouring columns a thread, splits in turns.
template <int kThreads, int V>
__device__ void finish_columns(const BlockMoments& m, int64_t columns, unsigned splits, unsigned char* shared) {
  const auto vectors = unsigned(columns / V);
  unsigned across = 1;
  while (across < vectors && 2 * across <= kThreads) across *= 2;
  const unsigned lanes = power_of_two_up_to(kThreads / across);
  const unsigned lane = threadIdx.x / across;
  for (unsigned begin = 0; begin < vectors; begin += across) {
    const unsigned vector = begin + threadIdx.x % across;
    const bool exists = vector < vectors;
    const int64_t column = int64_t(exists ? vector : 0) * V;
    const Vector<float, V> pivot = read<V>(m.partial + column, V);
    MomentSums<V> sums;
    if (exists && lane < lanes) {
#pragma unroll 4
      for (unsigned s = lane; s < splits; s += lanes)
        sums.add(m.partial, columns, column, s, double(m.counts[s]), pivot);
    }
    join_lanes<double>(sums, shared, {threadIdx.x % across, across, lane, lanes});
    if (lane > 0 || !exists) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      m.mean[column + i] = float(sums.mean(i, double(pivot.v[i]), double(m.rows)));
      m.var[column + i] = float(sums.variance(i, double(m.rows)));
    }
  }
}

// What a block does when its moments are written, all threads of it; splits of the rows have blocks side by side.
template <int kThreads>
__device__ void finish_moments(const BlockMoments& m, int64_t columns, unsigned char* shared) {
  if (!m.ticket || !is_last_block(m.ticket, reinterpret_cast<unsigned*>(shared))) return;
  if (columns % 4 == 0) return finish_columns<kThreads, 4>(m, columns, gridDim.x, shared);
  finish_columns<kThreads, 1>(m, columns, gridDim.x, shared);
}

}  // namespace fastdense
