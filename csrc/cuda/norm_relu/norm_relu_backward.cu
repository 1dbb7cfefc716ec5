// SPDX-License-Identifier: Apache-2.0
// Backward kernels of cuda/norm_relu/norm_relu_launch.h.
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"
#include "cuda/norm_relu/norm_relu_launch.h"
#include "cuda/norm_relu/pooled_row.h"
#include "cuda/norm_relu/slice_gradient.h"

namespace fastdense {
namespace {

template <typename T, int V>
class SliceGradient : public SliceGradientColumns<T, V, SliceGradientParams<T>> {
 public:
  using Params = SliceGradientParams<T>;
  __device__ SliceGradient(const Params& p, int64_t first, int count)
      : SliceGradientColumns<T, V, Params>(p, first, count, p.mean, p.shift_sum, p.slope_sum) {}
};

template <typename T, int V>
class MaskReduce : public Columns<MaskReduceParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<MaskReduceParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 2;
  using State = ColumnSums<A, V>;
  __device__ MaskReduce(const Params& p, int64_t first, int count)
      : Base(p, first, count), norm_(p.norm, first, count), mean_(p.norm.mean, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> du[kRows], z[kRows];
    this->read_rows(p_.du, row, step, du);
    this->read_rows(p_.z, row, step, z);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A value = load(z[r].v[i]);
        const A dv = norm_relu_gradient<A>(load(du[r].v[i]), value, norm_.scale[i], norm_.shift[i]);
        state_.first(i) += dv;
        state_.second(i) += dv * (value - mean_[i]);
      }
  }
  __device__ State& state() { return state_; }
  __device__ A* partial() const { return p_.partial; }

 private:
  const ColumnScales<A, V> norm_;
  const ColumnValues<A, V> mean_;
  State state_;
};

template <typename T, int V>
class InputGradient : public Columns<InputGradientParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<InputGradientParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 2;
  using State = NoState;
  __device__ InputGradient(const Params& p, int64_t first, int count)
      : Base(p, first, count), t1_(p.t1, first, count), t2_(p.t2, first, count) {
#pragma unroll
    for (int i = 0; i < V; ++i) norm_[i] = i < count ? p.norm(first + i) : NormCoefficients<A>{};
  }

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> du[kRows], z[kRows];
    this->read_rows(p_.du, row, step, du);
    this->read_rows(p_.z, row, step, z);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A value = load(z[r].v[i]);
        const A dv = norm_relu_gradient<A>(load(du[r].v[i]), value, norm_[i].scale, norm_[i].shift);
        du[r].v[i] = store<T>(norm_input_gradient(dv, value, norm_[i], t1_[i], t2_[i], p_.inv_count));
      }
      this->write_row(p_.du, row + r * step, du[r]);
    }
  }

 private:
  NormCoefficients<A> norm_[V];
  const ColumnValues<A, V> t1_, t2_;
};

// Which row of dy belongs to a pixel, and how much of it.
struct SameRow {
  __device__ int64_t operator()(int64_t row) const { return row; }
  template <typename A>
  __device__ A share() const {
    return A(1);
  }
};

template <typename T>
struct AccumulatePooledParams : AccumulateParams<T> {
  PoolGeometry pool;
};

template <typename T, int V, typename Pixel>
class AccumulateRows : public Columns<AccumulateParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<AccumulateParams<T>, V>;
  using Base::p_;

 public:
  static constexpr int kTileRows = 2;
  using State = ColumnSums<A, V>;
  __device__ AccumulateRows(const AccumulateParams<T>& p, const Pixel& pixel, int64_t first, int count)
      : Base(p, first, count), pixel_(pixel), norm_(p.norm, first, count), mean_(p.norm.mean, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> dy[kRows], x[kRows], g[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t from = pixel_(row + r * step);
      dy[r] = from < 0 ? Vector<T, V>{} : this->read_row(p_.dy, from);
      x[r] = this->read_row(p_.x, row + r * step);
      if (p_.add) g[r] = this->read_row(p_.gradient, row + r * step);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i) consume(i, load(x[r].v[i]), dy[r].v[i], g[r].v[i]);
      this->write_row(p_.gradient, row + r * step, g[r]);
      if (p_.keep_y) this->write_row(p_.dy, row + r * step, dy[r]);
    }
  }
  __device__ State& state() { return state_; }
  __device__ A* partial() const { return p_.partial; }

 private:
  // Channel i of a pixel; y takes dy's place.
  __device__ void consume(int i, A x, T& dy, T& g) {
    A gradient = load(dy) * share_;
    if (p_.relu) gradient = norm_relu_gradient(gradient, x, norm_.scale[i], norm_.shift[i]);
    g = store<T>(mul_add(norm_.scale[i], gradient, A(load(g))));
    dy = store<T>(norm_relu(x, norm_.scale[i], norm_.shift[i]));
    state_.first(i) += gradient;
    state_.second(i) += gradient * (x - mean_[i]);
  }

  Pixel pixel_;
  const A share_ = pixel_.template share<A>();
  const ColumnScales<A, V> norm_;
  const ColumnValues<A, V> mean_;
  State state_;
};

template <typename T, int V>
struct AccumulatePlain : AccumulateRows<T, V, SameRow> {
  using Params = AccumulateParams<T>;
  __device__ AccumulatePlain(const Params& p, int64_t first, int count)
      : AccumulateRows<T, V, SameRow>(p, SameRow(), first, count) {}
};

template <typename T, int V>
struct AccumulatePooled : AccumulateRows<T, V, PooledRow> {
  using Params = AccumulatePooledParams<T>;
  __device__ AccumulatePooled(const Params& p, int64_t first, int count)
      : AccumulateRows<T, V, PooledRow>(p, PooledRow(p.pool), first, count) {}
};

template <typename A>
struct OneSum {
  static constexpr int kNumbers = 1;
  A numbers[kNumbers] = {};
  __device__ void join(const A (&other)[kNumbers]) { numbers[0] += other[0]; }
};

// Blocks add up a few columns of the norm's sums, or of the weight's, which are many more; lanes take the splits in
// turns.
constexpr unsigned kFinaliseThreads = 512, kNormColumns = 8, kWeightColumns = 32;

// Where in the block this thread is, and its column in the grid.
__device__ __forceinline__ LanePlace place_among(unsigned columns) {
  return {threadIdx.x % columns, columns, threadIdx.x / columns, kFinaliseThreads / columns};
}

template <typename A>
__device__ void finalise_norm(const FinaliseSumsParams<A>& p, int64_t columns, unsigned char* shared) {
  const LanePlace at = place_among(kNormColumns);
  const int64_t column = int64_t(blockIdx.x) * kNormColumns + at.column;
  ColumnSums<double, 1> sums;
  if (column < columns) {
#pragma unroll 4
    for (int64_t s = at.lane; s < p.splits; s += at.lanes) {
      sums.first(0) += double(p.partial[2 * s * columns + column]);
      sums.second(0) += double(p.partial[(2 * s + 1) * columns + column]);
    }
  }
  join_lanes<double>(sums, shared, at);
  if (at.lane > 0 || column >= columns) return;
  const NormCoefficients<A> norm = p.norm(column);
  const double s1 = sums.first(0), s2 = sums.second(0) * double(norm.rstd);
  p.dbias[column] = A(s1);
  p.dweight[column] = A(s2);
  if (!p.shift_sum) return;
  const double share = double(norm.scale) * p.inv_count;
  p.shift_sum[column] += share * s1;
  p.slope_sum[column] += share * s2 * double(norm.rstd);
}

template <typename A>
__device__ void sum_weight(const SumPartialsParams<A>& p, unsigned block, unsigned char* shared) {
  const LanePlace at = place_among(kWeightColumns);
  const int64_t column = int64_t(block) * kWeightColumns + at.column;
  OneSum<A> sum;
  if (column < p.count) {
#pragma unroll 4
    for (int64_t s = at.lane; s < p.splits; s += at.lanes) sum.numbers[0] += p.partial[s * p.count + column];
  }
  join_lanes<A>(sum, shared, at);
  if (at.lane > 0 || column >= p.count) return;
  const auto inner = uint32_t(p.inner), taps = uint32_t(p.taps);
  const uint32_t row = uint32_t(column) / inner, i = uint32_t(column) - row * inner, o = row / taps, t = row - o * taps;
  p.to[o * p.outer_stride + t * p.tap_stride + i * p.inner_stride] = sum.numbers[0];
}

template <typename A>
__global__ void __launch_bounds__(kFinaliseThreads)
    finalise_sums_kernel(FinaliseSumsParams<A> norm, int64_t columns, SumPartialsParams<A> weight,
                         unsigned norm_blocks) {
  wait_for_kernels_before();
  FASTDENSE_SHARED(shared);
  if (blockIdx.x < norm_blocks) return finalise_norm(norm, columns, shared);
  sum_weight(weight, blockIdx.x - norm_blocks, shared);
}

}  // namespace

template <typename T>
cudaError_t launch_slice_gradient(const SliceGradientParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                                  cudaStream_t stream) {
  return launch_column_reduce<SliceGradient, T>(p, address_bits(p.gradient) | address_bits(p.x) | address_bits(p.d),
                                                rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_mask_reduce(const MaskReduceParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                               cudaStream_t stream) {
  return launch_column_reduce<MaskReduce, T>(p, address_bits(p.du) | address_bits(p.z), rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_input_gradient(const InputGradientParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                                  cudaStream_t stream) {
  return launch_column_reduce<InputGradient, T>(p, address_bits(p.du) | address_bits(p.z), rows, columns, splits,
                                                stream);
}

template <typename T>
cudaError_t launch_accumulate(const AccumulateParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                              cudaStream_t stream) {
  return launch_column_reduce<AccumulatePlain, T>(p, address_bits(p.x) | address_bits(p.dy) | address_bits(p.gradient),
                                                  rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_accumulate_pooled(const AccumulateParams<T>& p, const PoolGeometry& pool, int64_t rows,
                                     int64_t columns, int64_t splits, cudaStream_t stream) {
  return launch_column_reduce<AccumulatePooled, T>(
      {p, pool}, address_bits(p.x) | address_bits(p.dy) | address_bits(p.gradient), rows, columns, splits, stream);
}

template <typename A>
cudaError_t launch_finalise_sums(const FinaliseSumsParams<A>& p, int64_t columns, const SumPartialsParams<A>& weight,
                                 cudaStream_t stream) {
  const auto blocks = [](int64_t count, unsigned each) { return unsigned((count + each - 1) / each); };
  const unsigned norm_blocks = blocks(columns, kNormColumns), all = norm_blocks + blocks(weight.count, kWeightColumns);
  if (all == 0) return cudaSuccess;
  const size_t shared = 2 * sizeof(double) * kFinaliseThreads / 2;
  FASTDENSE_LAUNCH(finalise_sums_kernel<A>, dim3(all), dim3(kFinaliseThreads), shared, stream, p, columns, weight,
                   norm_blocks);
  return cudaGetLastError();
}

#define FASTDENSE_BACKWARD(T)                                                                                         \
  template cudaError_t launch_slice_gradient<T>(const SliceGradientParams<T>&, int64_t, int64_t, int64_t,             \
                                                cudaStream_t);                                                        \
  template cudaError_t launch_mask_reduce<T>(const MaskReduceParams<T>&, int64_t, int64_t, int64_t, cudaStream_t);    \
  template cudaError_t launch_input_gradient<T>(const InputGradientParams<T>&, int64_t, int64_t, int64_t,             \
                                                cudaStream_t);                                                        \
  template cudaError_t launch_accumulate<T>(const AccumulateParams<T>&, int64_t, int64_t, int64_t, cudaStream_t);     \
  template cudaError_t launch_accumulate_pooled<T>(const AccumulateParams<T>&, const PoolGeometry&, int64_t, int64_t, \
                                                   int64_t, cudaStream_t);
FASTDENSE_FOR_EACH_STORAGE(FASTDENSE_BACKWARD)
#undef FASTDENSE_BACKWARD
template cudaError_t launch_finalise_sums<float>(const FinaliseSumsParams<float>&, int64_t,
                                                 const SumPartialsParams<float>&, cudaStream_t);
template cudaError_t launch_finalise_sums<double>(const FinaliseSumsParams<double>&, int64_t,
                                                  const SumPartialsParams<double>&, cudaStream_t);

}  // namespace fastdense
