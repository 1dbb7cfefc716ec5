// SPDX-License-Identifier: Apache-2.0
// Backward kernels of cuda/norm_relu/norm_relu_launch.h.
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"
#include "cuda/norm_relu/norm_relu_launch.h"
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

// What a consumer of V neighbouring channels does with a pixel: gradient, y, and sums.
template <typename T, int V>
class Accumulate {
  using A = accumulate_t<T>;

 public:
  using State = ColumnSums<A, V>;
  __device__ Accumulate(const AccumulateParams<T>& p, int64_t first, int count)
      : relu_(p.relu), norm_(p.norm, first, count), mean_(p.norm.mean, first, count) {}

  // Channel i: adds the gradient dy of its y to g, and returns y.
  __device__ A consume(int i, A x, A dy, T& g) {
    const A gradient = relu_ ? norm_relu_gradient(dy, x, norm_.scale[i], norm_.shift[i]) : dy;
    g = store<T>(mul_add(norm_.scale[i], gradient, A(load(g))));
    state_.first(i) += gradient;
    state_.second(i) += gradient * (x - mean_[i]);
    return norm_relu(x, norm_.scale[i], norm_.shift[i]);
  }
  __device__ State& state() { return state_; }

 private:
  const bool relu_;
  const ColumnScales<A, V> norm_;
  const ColumnValues<A, V> mean_;
  State state_;
};

template <typename T, int V>
class AccumulatePlain : public Columns<AccumulateParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<AccumulateParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 2;
  using State = typename Accumulate<T, V>::State;
  __device__ AccumulatePlain(const Params& p, int64_t first, int count)
      : Base(p, first, count), sums_(p, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> dy[kRows], x[kRows], g[kRows] = {};
    this->read_rows(p_.dy, row, step, dy);
    this->read_rows(p_.x, row, step, x);
    if (p_.add) this->read_rows(p_.gradient, row, step, g);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        dy[r].v[i] = store<T>(sums_.consume(i, load(x[r].v[i]), load(dy[r].v[i]), g[r].v[i]));  // y in dy's place
      this->write_row(p_.gradient, row + r * step, g[r]);
      if (p_.keep_y) this->write_row(p_.dy, row + r * step, dy[r]);
    }
  }
  __device__ State& state() { return sums_.state(); }
  __device__ A* partial() const { return p_.partial; }

 private:
  Accumulate<T, V> sums_;
};

template <typename T>
struct AccumulatePooledParams : AccumulateParams<T> {
  PoolGeometry pool;
};

// A row is a window, with the pixels between it and the next ones, or behind the last: those get no gradient.
template <typename T, int V>
class AccumulatePooled : public Columns<AccumulatePooledParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<AccumulatePooledParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 1;
  using State = typename Accumulate<T, V>::State;
  __device__ AccumulatePooled(const Params& p, int64_t first, int count)
      : Base(p, first, count), sums_(p, first, count), share_(A(1) / A(p.pool.volume())) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    for (int r = 0; r < kRows; ++r, row += step) window(row);
  }
  __device__ State& state() { return sums_.state(); }
  __device__ A* partial() const { return p_.partial; }

 private:
  static constexpr int kPair = 2;  // pixels that are in flight together

  // Pixels from a window's first one to the next window's, or to the end of the image.
  __device__ int extent(int d, uint32_t window) const {
    const PoolGeometry& g = p_.pool;
    const auto begin = window * uint32_t(g.stride[d]);
    return int(window + 1 == g.pooled(d) ? uint32_t(g.size[d]) - begin : uint32_t(g.stride[d]));
  }

  // 32-bit divisions, which GPUs have, within an image.
  __device__ void window(int64_t row) {
    const PoolGeometry& g = p_.pool;
    const int64_t image = row / g.pixels();
    const auto in = uint32_t(row - image * g.pixels()), size1 = uint32_t(g.pooled(1)), size2 = uint32_t(g.pooled(2));
    const uint32_t line = in / size2, i0 = line / size1, i1 = line - i0 * size1, i2 = in - line * size2;
    const int extents[] = {extent(0, i0), extent(1, i1), extent(2, i2)};
    const int64_t origin = window_origin<uint32_t>(g, row);
    Vector<T, V> dy = this->read_row(p_.dy, row);
    A y[V] = {};
    for (int i = 0; i < extents[0]; ++i)
      for (int j = 0; j < extents[1]; j += kPair)
        for (int k = 0; k < extents[2]; ++k) pair(origin, extents[1], i, j, k, dy, y);
    if (!p_.keep_y) return;
#pragma unroll
    for (int i = 0; i < V; ++i) dy.v[i] = store<T>(y[i] * share_);
    this->write_row(p_.dy, row, dy);
  }

  // Pixels j and j + 1 < end; adds to the sum y of a window.
  __device__ void pair(int64_t origin, int end, int i, int j, int k, const Vector<T, V>& dy, A (&y)[V]) {
    const PoolGeometry& g = p_.pool;
    const int64_t first = origin + (i * g.size[1] + j) * g.size[2] + k;
    Vector<T, V> x[kPair], gradient[kPair] = {};
#pragma unroll
    for (int n = 0; n < kPair; ++n) {
      if (j + n >= end) continue;
      x[n] = this->read_row(p_.x, first + n * g.size[2]);
      if (p_.add) gradient[n] = this->read_row(p_.gradient, first + n * g.size[2]);
    }
#pragma unroll
    for (int n = 0; n < kPair; ++n) {
      if (j + n >= end) continue;
      if (i < g.window[0] && j + n < g.window[1] && k < g.window[2]) {
#pragma unroll
        for (int v = 0; v < V; ++v)
          y[v] += sums_.consume(v, load(x[n].v[v]), A(load(dy.v[v])) * share_, gradient[n].v[v]);
      } else if (p_.add) {
        continue;
      }
      this->write_row(p_.gradient, first + n * g.size[2], gradient[n]);
    }
  }

  Accumulate<T, V> sums_;
  const A share_;
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
  constexpr int kMostChannels = std::min<int>(4, 16 / sizeof(T));  // of a thread: eight do not fit in registers
  return launch_column_reduce<AccumulatePooled, T, kMostChannels>(
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
