// SPDX-License-Identifier: Apache-2.0
// Forward kernels of cuda/norm_relu/norm_relu_launch.h: activations, statistics, slices, packed weights.
#include <type_traits>

#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"
#include "cuda/norm_relu/norm_relu_launch.h"

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

// Moments relative to the first row.
template <typename T, int V>
class ShiftedMoments {
  using A = accumulate_t<T>;

 public:
  __device__ explicit ShiftedMoments(const Vector<T, V>& pivot) {
#pragma unroll
    for (int i = 0; i < V; ++i) pivot_[i] = load(pivot.v[i]);
  }
  template <int kRows>
  __device__ void add_rows(const Vector<T, V> (&x)[kRows]) {
    A shifted[kRows][V];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < V; ++i) shifted[r][i] = load(x[r].v[i]) - pivot_[i];
    state_.add_rows(shifted);
  }
  __device__ ColumnMoments<A, V>& state() { return state_; }

 private:
  A pivot_[V];
  ColumnMoments<A, V> state_;
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

// The mean of all splits first, then M2 around it.
template <typename T>
__global__ void __launch_bounds__(FinaliseShape::kMostThreads)
    finalise_moments_kernel(FinaliseMomentsParams<T> p, int64_t rows, int64_t columns, int64_t splits) {
  using A = accumulate_t<T>;
  FASTDENSE_SHARED(shared);
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t all_splits = (rows + p.chunk - 1) / p.chunk * splits;
  const auto each_split = [&](const auto& body) {
    for (int64_t s = threadIdx.y; s < all_splits && column < columns; s += blockDim.y) {
      const int64_t begin = s / splits * p.chunk, chunk = rows - begin < p.chunk ? rows - begin : p.chunk;
      const int64_t rows_per_split = (chunk + splits - 1) / splits, left = chunk - s % splits * rows_per_split;
      const int64_t even = left < rows_per_split ? (left > 0 ? left : 0) : rows_per_split;
      const double count = double(p.counts ? p.counts[s] : even);
      body(count, double(p.partial[2 * s * columns + column]), double(p.partial[(2 * s + 1) * columns + column]));
    }
  };
  ColumnSums<double, 1> sums;
  each_split([&](double count, double mean, double) { sums.first(0) += count * mean; });
  join_lanes<double>(sums, shared);
  double* total = reinterpret_cast<double*>(shared) + threadIdx.x;
  if (threadIdx.y == 0) *total = sums.first(0) / double(rows);
  __syncthreads();
  const double centre = *total;
  __syncthreads();
  sums = {};
  each_split([&](double count, double mean, double m2) {
    if (count > 0) sums.second(0) += m2 + count * (mean - centre) * (mean - centre);
  });
  join_lanes<double>(sums, shared);
  if (threadIdx.y > 0 || column >= columns) return;
  p.mean[column] = A((p.pivot ? double(load(p.pivot[column])) : 0.0) + centre);
  p.var[column] = A(sums.second(0) / double(rows));
}

template <typename From, typename T>
__global__ void pack_weights_kernel(const __grid_constant__ PackWeightsParams<From, T> p) {
  const PackedWeight<From, T>& w = p.weights[blockIdx.y];
  const int64_t count = w.outer * w.taps * w.inner, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < count; n += stride) {
    const int64_t i = n % w.inner, t = n / w.inner % w.taps, o = n / w.inner / w.taps;
    const accumulate_t<T> value = load(w.from[o * w.outer_stride + i * w.inner_stride + t * w.tap_stride]);
    w.to[(o * w.taps + t) * w.ld + i] = store<T>(value);
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
  const FinaliseShape shape(columns, (rows + p.chunk - 1) / p.chunk * splits);
  FASTDENSE_LAUNCH(finalise_moments_kernel, shape.grid, shape.block, shape.shared_bytes, stream, p, rows, columns,
                   splits);
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
