// SPDX-License-Identifier: Apache-2.0
// Forward kernels of cuda/norm_relu/norm_relu_launch.h: activations, statistics, slices, packed weights.
#include <type_traits>

#include "cuda/norm_relu/block_moments.h"
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"
#include "cuda/norm_relu/norm_relu_launch.h"
#include "cuda/norm_relu/shifted_moments.h"

namespace fastdense {
namespace {

template <typename T, int V>
class Activate : public Columns<ActivateParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<ActivateParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 4;
  using State = NoState;
  __device__ Activate(const Params& p, int64_t first, int count) : Base(p, first, count), norm_(p.norm, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> x[kRows];
    this->read_rows(p_.x, row, step, x);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A value = mul_add(load(x[r].v[i]), norm_.scale[i], norm_.shift[i]);
        x[r].v[i] = store<T>(p_.relu ? relu(value) : value);
      }
      this->write_row(p_.y, row + r * step, x[r]);
    }
  }

 private:
  const ColumnScales<A, V> norm_;
};

template <typename T, int V>
class ActivatePooled : public Columns<ActivatePooledParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<ActivatePooledParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 1;
  using State = NoState;
  __device__ ActivatePooled(const Params& p, int64_t first, int count)
      : Base(p, first, count), norm_(p.norm, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    for (int r = 0; r < kRows; ++r, row += step) pooled_row(row);
  }

 private:
  __device__ void pooled_row(int64_t row) {
    const int64_t volume = p_.pool.volume();
    const int64_t origin = window_origin<uint32_t>(p_.pool, p_.first + row);
    A sum[V] = {};
    for (int64_t w = 0; w < volume; ++w) {
      const Vector<T, V> x = this->read_row(p_.x, origin + window_offset<uint32_t>(p_.pool, w));
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += norm_relu(A(load(x.v[i])), norm_.scale[i], norm_.shift[i]);
    }
    const A share = A(1) / A(volume);
    Vector<T, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y.v[i] = store<T>(sum[i] * share);
    this->write_row(p_.y, row, y);
  }

  const ColumnScales<A, V> norm_;
};

template <typename T, int V>
class ReduceMoments : public Columns<MomentsParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<MomentsParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 4;
  using State = ColumnMoments<A, V>;
  __device__ ReduceMoments(const Params& p, int64_t first, int count)
      : Base(p, first, count), moments_(this->read_row(p.x, 0)) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> x[kRows];
    this->read_rows(p_.x, row, step, x);
    moments_.add_rows(x);
  }
  __device__ State& state() { return moments_.state(); }
  __device__ A* partial() const { return p_.partial; }

 private:
  ShiftedMoments<T, V> moments_;
};

template <typename T, int V>
class SliceIn : public Columns<SliceInParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<SliceInParams<T>, V>;
  using Base::p_, Base::first_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 2;
  using State = ColumnMoments<A, V>;
  __device__ SliceIn(const Params& p, int64_t first, int count) : Base(p, first, count), moments_(pivot()) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] = stored(row + r * step);
#pragma unroll
    for (int r = 0; r < kRows; ++r) this->write_row(p_.x, row + r * step, x[r]);
    if (p_.partial) moments_.add_rows(x);
  }
  __device__ State& state() { return moments_.state(); }
  __device__ A* partial() const { return p_.partial; }

 private:
  __device__ Vector<T, V> stored(int64_t row) const {
    Vector<T, V> x = this->read_row(p_.features, row);
    apply_dropout(p_.dropout, row * p_.features.ld + first_, x);
    if (!p_.add.data) return x;
    const Vector<T, V> add = this->read_row(p_.add, row);
#pragma unroll
    for (int i = 0; i < V; ++i) x.v[i] = store<T>(A(load(add.v[i])) + A(load(x.v[i])));
    return x;
  }
  __device__ Vector<T, V> pivot() const { return p_.pivot ? read<V>(p_.pivot + first_, this->count_) : stored(0); }

  ShiftedMoments<T, V> moments_;
};

// How many rows a split has, of chunks that are each shared out evenly.
struct RowShares {
  int64_t chunk, last_chunk, each, last_each;  // rows of a chunk, and of a split of it
  uint32_t splits, all_splits;
  RowShares(int64_t rows, int64_t chunk, int64_t splits_of_chunk)
      : chunk(chunk),
        last_chunk((rows - 1) % chunk + 1),
        each((chunk + splits_of_chunk - 1) / splits_of_chunk),
        last_each((last_chunk + splits_of_chunk - 1) / splits_of_chunk),
        splits(uint32_t(splits_of_chunk)),
        all_splits(uint32_t((rows + chunk - 1) / chunk * splits_of_chunk)) {}
  __device__ int64_t operator()(uint32_t s) const {
    const bool last = s >= all_splits - splits;
    const uint32_t in_chunk = splits == 1 ? 0 : s % splits;
    const int64_t most = last ? last_each : each, left = (last ? last_chunk : chunk) - in_chunk * most;
    return left < most ? (left > 0 ? left : 0) : most;
  }
};

// Blocks of a few columns, whose lanes take the splits in turns.
constexpr unsigned kMomentColumns = 8, kMostMomentLanes = 128;

template <typename T>
__global__ void __launch_bounds__(kMomentColumns* kMostMomentLanes)
    finalise_moments_kernel(FinaliseMomentsParams<T> p, int64_t rows, int64_t columns, RowShares shares) {
  wait_for_kernels_before();
  using A = accumulate_t<T>;
  FASTDENSE_SHARED(shared);
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  MomentSums<1> sums;
  Vector<A, 1> first{};
  if (column < columns) {
    first = read<1>(p.partial + column, 1);
#pragma unroll 4
    for (uint32_t s = threadIdx.y; s < shares.all_splits; s += blockDim.y)
      sums.add(p.partial, columns, column, s, double(shares(s)), first);
  }
  join_lanes<double>(sums, shared);
  if (threadIdx.y > 0 || column >= columns) return;
  const double pivot = p.pivot ? double(load(p.pivot[column])) : 0.0;
  p.mean[column] = A(pivot + sums.mean(0, double(first.v[0]), double(rows)));
  p.var[column] = A(sums.variance(0, double(rows)));
}

template <typename From, typename T>
__global__ void pack_weights_kernel(const __grid_constant__ PackWeightsParams<From, T> p) {
  wait_for_kernels_before();
  const PackedWeight<From, T>& w = p.weights[blockIdx.y];
  const auto inner = uint32_t(w.inner), taps = uint32_t(w.taps);
  const int64_t count = w.outer * w.taps * w.inner, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < count; n += stride) {
    const uint32_t row = uint32_t(n) / inner, i = uint32_t(n) - row * inner, o = row / taps, t = row - o * taps;
    const accumulate_t<T> value = load(w.from[o * w.outer_stride + i * w.inner_stride + t * w.tap_stride]);
    w.to[row * w.ld + i] = store<T>(value);
  }
}

}  // namespace

template <typename T>
cudaError_t launch_activate(const ActivateParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                            cudaStream_t stream) {
  return launch_column_reduce<Activate, T>(p, address_bits(p.x) | address_bits(p.y), rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_activate_pooled(const ActivatePooledParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                                   cudaStream_t stream) {
  return launch_column_reduce<ActivatePooled, T>(p, address_bits(p.x) | address_bits(p.y), rows, columns, splits,
                                                 stream);
}

template <typename T>
cudaError_t launch_moments(const MomentsParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                           cudaStream_t stream) {
  return launch_column_reduce<ReduceMoments, T>(p, address_bits(p.x), rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_slice_in(const SliceInParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                            cudaStream_t stream) {
  const uintptr_t bits = address_bits(p.features) | address_bits(p.x) | address_bits(p.add) | address_bits(p.pivot, 0);
  return launch_column_reduce<SliceIn, T>(p, bits, rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_finalise_moments(const FinaliseMomentsParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                                    cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const RowShares shares(rows, p.chunk, splits);
  const dim3 block(kMomentColumns, power_of_two_from(shares.all_splits, kMostMomentLanes));
  const dim3 grid(unsigned((columns + kMomentColumns - 1) / kMomentColumns));
  FASTDENSE_LAUNCH(finalise_moments_kernel<T>, grid, block, (join_bytes<double, MomentSums<1>>(block)), stream, p, rows,
                   columns, shares);
  return cudaGetLastError();
}

template <typename From, typename T>
cudaError_t launch_pack_weights(const PackWeightsParams<From, T>& p, cudaStream_t stream) {
  constexpr int64_t kThreads = 256, kMostBlocks = 256;
  if (p.count == 0) return cudaSuccess;
  int64_t largest = 1;
  for (int i = 0; i < p.count; ++i)
    largest = std::max(largest, p.weights[i].outer * p.weights[i].taps * p.weights[i].inner);
  const auto blocks = unsigned(std::min((largest + kThreads - 1) / kThreads, kMostBlocks));
  FASTDENSE_LAUNCH((pack_weights_kernel<From, T>), dim3(blocks, unsigned(p.count)), dim3(kThreads), 0, stream, p);
  return cudaGetLastError();
}

#define FASTDENSE_PACK(From, T) \
  template cudaError_t launch_pack_weights<From, T>(const PackWeightsParams<From, T>&, cudaStream_t);
#define FASTDENSE_FORWARD(T)                                                                                  \
  template cudaError_t launch_activate<T>(const ActivateParams<T>&, int64_t, int64_t, int64_t, cudaStream_t); \
  template cudaError_t launch_activate_pooled<T>(const ActivatePooledParams<T>&, int64_t, int64_t, int64_t,   \
                                                 cudaStream_t);                                               \
  template cudaError_t launch_moments<T>(const MomentsParams<T>&, int64_t, int64_t, int64_t, cudaStream_t);   \
  template cudaError_t launch_slice_in<T>(const SliceInParams<T>&, int64_t, int64_t, int64_t, cudaStream_t);  \
  template cudaError_t launch_finalise_moments<T>(const FinaliseMomentsParams<T>&, int64_t, int64_t, int64_t, \
                                                  cudaStream_t);                                              \
  FASTDENSE_PACK(T, T)
FASTDENSE_FOR_EACH_STORAGE(FASTDENSE_FORWARD)
FASTDENSE_PACK(float, bfloat16)
FASTDENSE_PACK(float, half)
#undef FASTDENSE_FORWARD
#undef FASTDENSE_PACK

}  // namespace fastdense
