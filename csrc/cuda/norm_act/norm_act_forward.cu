// SPDX-License-Identifier: Apache-2.0
// Forward kernels of cuda/norm_act/norm_act_launch.h: activations, slices, statistics.
#include "cuda/norm_act/set_reduce.h"
#include "cuda/norm_relu/block_moments.h"
#include "cuda/norm_relu/shifted_moments.h"

namespace fastdense {
namespace {

template <typename T, int V>
class ActivateSets : public Columns<ActivateSetsParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<ActivateSetsParams<T>, V>;
  using Base::p_, Base::first_, Base::count_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 1;
  using State = NoState;
  __device__ ActivateSets(const Params& p, int64_t set, int64_t, int64_t first, int count)
      : Base(p, first, count), norm_(p.norm, set, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t) {
    Vector<T, V> y;
    if (p_.pooled) {
      pool(row, y);
    } else {
      A u[V];
      activated(row, u);
#pragma unroll
      for (int i = 0; i < V; ++i) y.v[i] = store<T>(u[i]);
    }
    this->write_row(p_.y, row, y);
  }

 private:
  __device__ void activated(int64_t row, A (&u)[V]) const {
    const Vector<T, V> x = this->read_row(p_.x, row);
#pragma unroll
    for (int i = 0; i < V; ++i) u[i] = mul_add(A(load(x.v[i])), norm_.scale[i], norm_.shift[i]);
    activate(p_.act, first_, count_, u);
  }
  __device__ void pool(int64_t row, Vector<T, V>& y) const {
    const int64_t volume = p_.pool.volume(), origin = window_origin<uint32_t>(p_.pool, p_.first + row);
    A sum[V] = {}, u[V];
    for (int64_t w = 0; w < volume; ++w) {
      activated(origin + window_offset<uint32_t>(p_.pool, w), u);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += u[i];
    }
    const A share = A(1) / A(volume);
#pragma unroll
    for (int i = 0; i < V; ++i) y.v[i] = store<T>(sum[i] * share);
  }

  const SetScales<A, V> norm_;
};

template <typename T, int V>
class SliceInSets : public Columns<SliceInSetsParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<SliceInSetsParams<T>, V>;
  using Base::p_, Base::first_, Base::count_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 2, kSums = 2;
  using State = ColumnMoments<A, V>;
  __device__ SliceInSets(const Params& p, int64_t, int64_t begin, int64_t first, int count)
      : Base(p, first, count), moments_(stored(begin)) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] = stored(row + r * step);
    if (p_.x.data) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) this->write_row(p_.x, row + r * step, x[r]);
    }
    if (p_.partial) moments_.add_rows(x);
  }
  __device__ State& state() { return moments_.state(); }
  __device__ A* partial() const { return p_.partial; }

 private:
  __device__ Vector<T, V> stored(int64_t row) const {
    Vector<T, V> x = this->read_row(p_.features, row);
    if (p_.bias) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (i < count_) x.v[i] = store<T>(A(load(x.v[i])) + p_.bias[first_ + i]);
    }
    apply_dropout(p_.dropout, row * p_.features.ld + first_, x);
    return x;
  }

  ShiftedMoments<T, V> moments_;
};

// Mean and variance of one new channel of a set, which the lanes add up; in lane 0.
template <typename T, typename A = accumulate_t<T>>
__device__ Moments<A> new_channel(const FinaliseSetMomentsParams<T>& p, unsigned set, int64_t column, bool exists,
                                  const LanePlace& at, unsigned char* shared) {
  const A* partial = p.partial + 2 * p.columns * p.splits * set;
  const int64_t each = (p.rows + p.splits - 1) / p.splits;
  MomentSums<1> sums;
  Vector<A, 1> first{};
  if (exists) {
    first = read<1>(partial + column, 1);
#pragma unroll 4
    for (int64_t s = at.lane; s < p.splits; s += at.lanes) {
      const int64_t left = p.rows - s * each;
      sums.add(partial, p.columns, column, s, double(left < 0 ? 0 : left < each ? left : each), first);
    }
  }
  join_lanes<double>(sums, shared, at);
  if (!exists) return {};
  const double pivot = double(load(p.pivot.data[set * p.rows * p.pivot.ld + column])), rows = double(p.rows);
  return {A(1), A(pivot + sums.mean(0, double(first.v[0]), rows)), A(sums.variance(0, rows))};
}

template <typename T>
__device__ void finalise_channels(const FinaliseSetMomentsParams<T>& p, const FinaliseShape& shape, unsigned set,
                                  unsigned range, unsigned char* shared) {
  using A = accumulate_t<T>;
  const LanePlace at = shape.place();
  const bool grouped = p.groups > 0;
  const int64_t most = shape.channels(p.group), begin = (grouped ? 0 : p.first) + range * most;
  const int64_t all = grouped ? p.groups * p.group : p.first + p.columns, end = begin + most < all ? begin + most : all;
  A *mean = p.mean + set * p.next, *var = p.var + set * p.next;
  Moments<double> total{0, 0, 0};
  for (int64_t from = begin; from < end; from += shape.columns) {
    const int64_t channel = from + at.column, column = channel - p.first;
    const bool exists = channel < end, is_new = p.partial && exists && column >= 0 && column < p.columns;
    Moments<A> m{};
    if (p.partial) m = new_channel(p, set, column, is_new, at, shared);
    if (at.lane > 0 || !exists) continue;
    if (is_new) {
      mean[channel] = m.mean;
      var[channel] = m.m2;
    } else {
      m = {A(1), mean[channel], var[channel]};
    }
    total = combine_moments<double>(total, {1, double(m.mean), double(m.m2)});
  }
  if (!grouped) return;
  auto* totals = reinterpret_cast<Moments<double>*>(shared);
  if (at.lane == 0) totals[at.column] = total;
  __syncthreads();
  const GroupColumns of(shape, p.group, at.column);
  const unsigned group = unsigned(begin + at.column) / unsigned(p.group);  // 64 bits would take registers
  if (at.lane > 0 || at.column != of.first || begin + at.column >= end) return;
  for (unsigned i = 1; i < of.count; ++i) total = combine_moments(total, totals[of.first + i]);
  p.group_mean[set * p.groups + group] = A(total.mean);
  p.group_var[set * p.groups + group] = A(total.m2 / total.count);
}

template <typename T>
__host__ __device__ int64_t channel_ranges(const FinaliseSetMomentsParams<T>& p, const FinaliseShape& shape) {
  const auto channels = unsigned(p.groups > 0 ? p.groups * p.group : p.columns),
             most = unsigned(shape.channels(p.group));
  return (channels + most - 1) / most;
}

template <typename T>
__global__ void __launch_bounds__(kFinaliseSetThreads)
    finalise_set_moments_kernel(const __grid_constant__ ManySetMomentsParams<T> many, unsigned sets,
                                FinaliseShape shape) {
  wait_for_kernels_before();
  FASTDENSE_SHARED(shared);
  const FinaliseSetMomentsParams<T>& p = many.norms[blockIdx.y];
  const auto ranges = unsigned(channel_ranges(p, shape));
  if (blockIdx.x >= ranges * sets) return;
  const unsigned set = blockIdx.x / ranges;
  finalise_channels(p, shape, set, blockIdx.x - set * ranges, shared);
}

}  // namespace

template <typename T>
cudaError_t launch_activate_sets(const ActivateSetsParams<T>& p, const SetRows& r, int64_t columns,
                                 cudaStream_t stream) {
  return launch_set_reduce<ActivateSets, T>(p, address_bits(p.x) | address_bits(p.y), r, columns, stream);
}

template <typename T>
cudaError_t launch_slice_in_sets(const SliceInSetsParams<T>& p, const SetRows& r, int64_t columns,
                                 cudaStream_t stream) {
  return launch_set_reduce<SliceInSets, T>(p, address_bits(p.features) | address_bits(p.x), r, columns, stream);
}

template <typename T>
cudaError_t launch_finalise_set_moments(const ManySetMomentsParams<T>& many, int64_t sets, cudaStream_t stream) {
  int64_t splits = 1, most = 0;
  for (int i = 0; i < many.count; ++i)
    if (many.norms[i].partial) splits = std::max(splits, many.norms[i].splits);
  const FinaliseShape shape = FinaliseShape::of(splits);
  for (int i = 0; i < many.count; ++i) most = std::max(most, sets * channel_ranges(many.norms[i], shape));
  if (most == 0) return cudaSuccess;
  const size_t shared = kFinaliseSetThreads * sizeof(Moments<double>);
  FASTDENSE_LAUNCH((finalise_set_moments_kernel<T>), dim3(unsigned(most), unsigned(many.count)),
                   dim3(kFinaliseSetThreads), shared, stream, many, unsigned(sets), shape);
  return cudaGetLastError();
}

#define FASTDENSE_FORWARD(T)                                                                                         \
  template cudaError_t launch_activate_sets<T>(const ActivateSetsParams<T>&, const SetRows&, int64_t, cudaStream_t); \
  template cudaError_t launch_slice_in_sets<T>(const SliceInSetsParams<T>&, const SetRows&, int64_t, cudaStream_t);  \
  template cudaError_t launch_finalise_set_moments<T>(const ManySetMomentsParams<T>&, int64_t, cudaStream_t);
FASTDENSE_FOR_EACH_STORAGE(FASTDENSE_FORWARD)
#undef FASTDENSE_FORWARD

}  // namespace fastdense
