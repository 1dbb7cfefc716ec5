// SPDX-License-Identifier: Apache-2.0
// Backward kernels of cuda/norm_act/norm_act_launch.h.
#include "cuda/norm_act/set_reduce.h"
#include "cuda/norm_relu/pooled_row.h"
#include "cuda/norm_relu/slice_gradient.h"

namespace fastdense {
namespace {

template <typename T, int V>
class SliceGradientSets : public SliceGradientColumns<T, V, SliceGradientSetsParams<T>> {
 public:
  using Params = SliceGradientSetsParams<T>;
  __device__ SliceGradientSets(const Params& p, int64_t set, int64_t, int64_t first, int count)
      : SliceGradientColumns<T, V, Params>(p, first, count, p.mean + set * p.next, p.shift_sum + set * p.next_sums,
                                           p.slope_sum + set * p.next_sums) {}
};

// Sums of du, du * (x - mean) and dy * min(u, 0) a column.
template <typename A, int V>
struct ConsumerSums {
  static constexpr int kNumbers = 3 * V;
  A numbers[kNumbers] = {};
  __device__ void join(const A (&other)[kNumbers]) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i] += other[i];
  }
};

template <typename T, int V>
class AccumulateSets : public Columns<AccumulateSetsParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<AccumulateSetsParams<T>, V>;
  using Base::p_, Base::first_, Base::count_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 1, kSums = 3;
  using State = ConsumerSums<A, V>;
  __device__ AccumulateSets(const Params& p, int64_t set, int64_t, int64_t first, int count)
      : Base(p, first, count), pixel_(p.pool), norm_(p.norm, set, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t) {
    const int64_t from = p_.pooled ? pixel_(row) : row;
    const Vector<T, V> dy = from < 0 ? Vector<T, V>{} : this->read_row(p_.dy, from);
    const Vector<T, V> x = this->read_row(p_.x, row);
    Vector<T, V> g{};
    if (p_.add) g = this->read_row(p_.gradient, row);
    A u[V], derivative[V];
#pragma unroll
    for (int i = 0; i < V; ++i) u[i] = mul_add(A(load(x.v[i])), norm_.scale[i], norm_.shift[i]);
    const A share = p_.pooled ? pixel_.template share<A>() : A(1);
    if (p_.act.slope) {
#pragma unroll
      for (int i = 0; i < V; ++i) state_.numbers[2 * V + i] += u[i] > A(0) ? A(0) : A(load(dy.v[i])) * share * u[i];
    }
    differentiate(p_.act, first_, count_, p_.keep_y, u, derivative);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A gradient = A(load(dy.v[i])) * share * derivative[i];
      g.v[i] = store<T>(mul_add(norm_.scale[i], gradient, A(load(g.v[i]))));
      state_.numbers[i] += gradient;
      state_.numbers[V + i] += gradient * (A(load(x.v[i])) - norm_.mean[i]);
    }
    this->write_row(p_.gradient, row, g);
    if (!p_.keep_y) return;
    Vector<T, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y.v[i] = store<T>(u[i]);
    this->write_row(p_.dy, row, y);
  }
  __device__ State& state() { return state_; }
  __device__ A* partial() const { return p_.partial; }

 private:
  PooledRow pixel_;
  const SetScales<A, V> norm_;
  State state_;
};

// The deferred corrections of a set's channels, those of whole groups; `range` counts these.
template <typename A>
__device__ void finalise_corrections(const FinaliseSetSumsParams<A>& p, int64_t columns, const FinaliseShape& shape,
                                     unsigned set, unsigned range, unsigned char* shared) {
  const LanePlace at = shape.place();
  const int64_t group = p.norm.group, most = shape.channels(group), begin = range * most;
  const int64_t end = begin + most < columns ? begin + most : columns;
  const A* partial = p.partial + 3 * columns * p.units * set;
  double shift = 0, slope = 0;
  for (int64_t from = begin; from < end; from += shape.columns) {
    const int64_t column = from + at.column;
    ColumnSums<double, 1> sums;
    if (column < end) {
#pragma unroll 4
      for (int64_t s = at.lane; s < p.units; s += at.lanes) {
        sums.first(0) += double(partial[3 * s * columns + column]);
        sums.second(0) += double(partial[(3 * s + 1) * columns + column]);
      }
    }
    join_lanes<double>(sums, shared, at);
    if (at.lane > 0 || column >= end) continue;
    const NormCoefficients<A> norm = p.norm(set, column);
    const double share = double(norm.scale) * p.inv_count / double(group);
    shift += share * sums.first(0);
    slope += share * sums.second(0) * double(norm.rstd) * double(norm.rstd);
  }
  auto* totals = reinterpret_cast<double*>(shared);
  if (at.lane == 0) {
    totals[at.column] = shift;
    totals[shape.columns + at.column] = slope;
  }
  __syncthreads();
  if (at.lane > 0 || begin + at.column >= end) return;
  const GroupColumns of(shape, group, at.column);
  shift = slope = 0;
  for (unsigned i = of.first; i < of.first + of.count; ++i) {
    shift += totals[i];
    slope += totals[shape.columns + i];
  }
  for (int64_t column = begin + at.column; column < end; column += shape.columns) {
    const double apart = double(p.mean[set * p.next + column]) - double(p.norm.mean(set, column));
    const double moved = apart == 0 ? shift : shift + apart * slope;
    double &to_shift = p.shift_sum[set * p.next_sums + column], &to_slope = p.slope_sum[set * p.next_sums + column];
    to_shift = p.add ? to_shift + moved : moved;
    to_slope = p.add ? to_slope + slope : slope;
  }
}

// Sums over all sets: of du, of du * xhat, and of dy * min(u, 0).
template <typename A>
__device__ void finalise_parameters(const FinaliseSetSumsParams<A>& p, int64_t columns, const FinaliseShape& shape,
                                    unsigned range, unsigned char* shared) {
  const LanePlace at = shape.place();
  const int64_t column = int64_t(range) * shape.columns + at.column;
  ConsumerSums<double, 1> sums;
  if (column < columns) {
    const auto units = uint32_t(p.units), all = uint32_t(p.sets) * units;
    for (uint32_t s = at.lane; s < all; s += at.lanes) {
      const A* partial = p.partial + 3 * int64_t(s) * columns + column;
      const double rstd = double(p.norm(s / units, column).rstd);
      sums.numbers[0] += double(partial[0]);
      sums.numbers[1] += double(partial[columns]) * rstd;
      if (p.dslope) sums.numbers[2] += double(partial[2 * columns]);
    }
  }
  join_lanes<double>(sums, shared, at);
  if (at.lane > 0 || column >= columns) return;
  p.dbias[column] = A(sums.numbers[0]);
  p.dweight[column] = A(sums.numbers[1]);
  if (p.dslope) p.dslope[column] = A(sums.numbers[2]);
}

template <typename A>
__global__ void __launch_bounds__(kFinaliseSetThreads)
    finalise_set_sums_kernel(const __grid_constant__ FinaliseSetSumsParams<A> p, int64_t columns,
                             FinaliseShape of_parameters, unsigned parameter_blocks, FinaliseShape of_corrections,
                             unsigned ranges) {
  wait_for_kernels_before();
  FASTDENSE_SHARED(shared);
  if (blockIdx.x < parameter_blocks) return finalise_parameters(p, columns, of_parameters, blockIdx.x, shared);
  const unsigned block = blockIdx.x - parameter_blocks, set = block / ranges;
  finalise_corrections(p, columns, of_corrections, set, block - set * ranges, shared);
}

}  // namespace

template <typename T>
cudaError_t launch_slice_gradient_sets(const SliceGradientSetsParams<T>& p, const SetRows& r, int64_t columns,
                                       cudaStream_t stream) {
  const uintptr_t bits = address_bits(p.gradient) | address_bits(p.x) | address_bits(p.d);
  return launch_set_reduce<SliceGradientSets, T>(p, bits, r, columns, stream);
}

template <typename T>
cudaError_t launch_accumulate_sets(const AccumulateSetsParams<T>& p, const SetRows& r, int64_t columns,
                                   cudaStream_t stream) {
  const uintptr_t bits = address_bits(p.x) | address_bits(p.dy) | address_bits(p.gradient);
  constexpr int kMost = sizeof(T) == 8 ? 2 : kMostActivated;  // registers do not hold sums of more columns
  return launch_set_reduce<AccumulateSets, T, kMost>(p, bits, r, columns, stream);
}

template <typename A>
cudaError_t launch_finalise_set_sums(const FinaliseSetSumsParams<A>& p, int64_t columns, cudaStream_t stream) {
  const auto blocks = [&](int64_t each) { return unsigned((columns + each - 1) / each); };
  const FinaliseShape of_parameters = FinaliseShape::of(p.sets * p.units), of_corrections = FinaliseShape::of(p.units);
  const unsigned parameter_blocks = blocks(of_parameters.columns);
  const unsigned ranges = p.shift_sum ? blocks(of_corrections.channels(p.norm.group)) : 0;
  const auto all = unsigned(parameter_blocks + p.sets * ranges);
  if (all == 0) return cudaSuccess;
  const size_t shared = 2 * sizeof(double) * kFinaliseSetThreads;
  FASTDENSE_LAUNCH((finalise_set_sums_kernel<A>), dim3(all), dim3(kFinaliseSetThreads), shared, stream, p, columns,
                   of_parameters, parameter_blocks, of_corrections, ranges);
  return cudaGetLastError();
}

#define FASTDENSE_BACKWARD(T)                                                                                    \
  template cudaError_t launch_slice_gradient_sets<T>(const SliceGradientSetsParams<T>&, const SetRows&, int64_t, \
                                                     cudaStream_t);                                              \
  template cudaError_t launch_accumulate_sets<T>(const AccumulateSetsParams<T>&, const SetRows&, int64_t, cudaStream_t);
FASTDENSE_FOR_EACH_STORAGE(FASTDENSE_BACKWARD)
#undef FASTDENSE_BACKWARD
template cudaError_t launch_finalise_set_sums<float>(const FinaliseSetSumsParams<float>&, int64_t, cudaStream_t);
template cudaError_t launch_finalise_set_sums<double>(const FinaliseSetSumsParams<double>&, int64_t, cudaStream_t);

}  // namespace fastdense
