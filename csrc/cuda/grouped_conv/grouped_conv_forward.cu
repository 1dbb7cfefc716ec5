// SPDX-License-Identifier: Apache-2.0
// Forward kernel of grouped_conv_launch.h.
#include "cuda/grouped_conv/grouped_conv_block.h"
#include "cuda/grouped_conv/grouped_conv_plan.h"

namespace fastdense {
namespace {

template <typename T, int kVariant>
class ForwardBlock : GroupedBlock<T, kVariant> {
  using Base = GroupedBlock<T, kVariant>;
  using Base::at_, Base::plan_, Base::shared_, Base::pixels_, Base::channels_, Base::norm_, Base::place_;
  using Base::first_, Base::width_, Base::chunk_, Base::lane_, Base::lanes_, Base::V, Base::kRows;

  static constexpr int kAtOnce = 2;
  static_assert(kRows % kAtOnce == 0);

 public:
  __device__ ForwardBlock(const GroupedForwardParams<T>& p, const GroupedPlan& plan, unsigned char* shared)
      : Base(plan, {false, plan.stride}, p.width, shared), p_(p) {}

  __device__ void run() {
    this->load_all(p_.weight, p_.norm);
    for_each_tile<GroupedPlace>(plan_, *this);
    if (p_.moments.partial) write_moments();
  }

  __device__ void load_tile(const GroupedPlace& place, int buffer) { this->load_source(p_.z, place, buffer); }

  __device__ void prepare_tile(const GroupedPlace& place, int buffer) {
    activate_pixels<kGroupedThreads, T>(this->source(buffer), at_.stride, plan_.tiles.places(), channels_, norm_.scale,
                                        norm_.shift, [&](int p) { return pixels_.source_row(place, p); });
    place_ = place;
  }

  __device__ void multiply_tile(int buffer) { this->multiply(buffer, 0); }

  // Stores the tile and takes its moments, relative to the first pixel that the block has.
  __device__ void finish_tile(bool first) {
    if (!this->takes_part()) return;
    Vector<T, V> pivot{};
    if (first) pivot = this->result(0);
    if (first && lane_ == 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) pivots()[i] = load(pivot.v[i]);
    }
#pragma unroll 1  // more pixels at once would take registers from products
    for (int r = 0; r < kRows; r += kAtOnce) finish_pixels(lane_ + r * lanes_, first, pivot);
  }

 private:
  // Of this thread's chunk, in shared memory where the norm's mean is not needed.
  __device__ float* pivots() const { return norm_.mean + chunk_ * V; }

  __device__ __forceinline__ void finish_pixels(int first_pixel, bool first, const Vector<T, V>& pivot) {
    Vector<T, V> x[kAtOnce];
    bool stored[kAtOnce];
    float count = 0;
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int p = first_pixel + r * lanes_;
      const int64_t row = p < plan_.tiles.pixels() ? pixels_.row(place_, p) : -1;
      stored[r] = row >= 0;
      if (!stored[r]) continue;
      x[r] = this->result(p);
      write(p_.out + row * width_ + first_ + chunk_ * V, x[r], V);
      count += 1;
    }
    if (!p_.moments.partial || count == 0) return;
#pragma unroll
    for (int i = 0; i < V; ++i) add_moment(i, first ? load(pivot.v[i]) : pivots()[i], x, stored, count);
    moments_.count() += count;
  }

  __device__ __forceinline__ void add_moment(int i, float pivot, const Vector<T, V> (&x)[kAtOnce],
                                             const bool (&stored)[kAtOnce], float count) {
    float mean = 0, m2 = 0;
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      if (stored[r]) mean += load(x[r].v[i]) - pivot;
    mean *= 1 / count;
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const float deviation = stored[r] ? load(x[r].v[i]) - pivot - mean : 0.0f;
      m2 += deviation * deviation;
    }
    moments_.add(i, {count, mean, m2});
  }

  __device__ void write_moments() {
    __syncthreads();  // all have read the last results
    this->join(moments_);
    float pivot[V];
#pragma unroll
    for (int i = 0; i < V; ++i) pivot[i] = pivots()[i];
    this->write_partial(moments_, pivot, p_.moments.partial);
    if (first_ == 0 && threadIdx.x == 0) p_.moments.counts[blockIdx.x] = int64_t(moments_.count());
    finish_moments<kGroupedThreads>(p_.moments, width_, shared_ + at_.result);
  }

  const GroupedForwardParams<T>& p_;
  ColumnMoments<float, V> moments_;
};

template <typename T, int kVariant>
__global__ void __launch_bounds__(kGroupedThreads, 2)
    grouped_forward_kernel(const __grid_constant__ GroupedForwardParams<T> p,
                           const __grid_constant__ GroupedPlan plan) {
  wait_for_kernels_before();
  if constexpr (kTensorCores) {
    FASTDENSE_SHARED(shared);
    ForwardBlock<T, kVariant>(p, plan, shared).run();
  }
}

}  // namespace

template <typename T>
GroupedPlan plan_grouped_forward(const GroupedShape& s, int64_t multiprocessors, int64_t most_shared) {
  return plan_grouped<T>(s, grid_of_result(s), {multiprocessors, most_shared, 2, 1},
                         [](const GroupedPlan& plan) { return GroupedLayout<T>(plan, {false, plan.stride}).bytes; });
}

template <typename T>
cudaError_t launch_grouped_forward(const GroupedForwardParams<T>& p, const GroupedPlan& plan, cudaStream_t stream) {
  return with_grouped_variant<T>(plan.group, [&](auto variant) {
    return launch_grouped(grouped_forward_kernel<T, decltype(variant)::value>, plan, stream, p, plan);
  });
}

#define FASTDENSE_CONV(T)                                                              \
  template GroupedPlan plan_grouped_forward<T>(const GroupedShape&, int64_t, int64_t); \
  template cudaError_t launch_grouped_forward<T>(const GroupedForwardParams<T>&, const GroupedPlan&, cudaStream_t);
FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(FASTDENSE_CONV)
#undef FASTDENSE_CONV

}  // namespace fastdense
