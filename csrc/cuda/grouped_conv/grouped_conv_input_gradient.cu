// SPDX-License-Identifier: Apache-2.0
// Gradient of the input of grouped_conv_launch.h's convolution.
//
// With a stride of 2 a tile of the result's gradient gives the gradient at twice as many lines and columns, one class
// of pixels after the other.
#include "cuda/grouped_conv/grouped_conv_block.h"
#include "cuda/grouped_conv/grouped_conv_plan.h"

namespace fastdense {
namespace {

template <typename T, int kVariant>
class InputGradientBlock : GroupedBlock<T, kVariant> {
  using Base = GroupedBlock<T, kVariant>;
  using Base::first_, Base::width_, Base::chunk_, Base::lane_, Base::lanes_, Base::V, Base::kRows;
  using Base::plan_, Base::pixels_, Base::norm_, Base::place_;

  static constexpr int kAtOnce = 2;
  static_assert(kRows % kAtOnce == 0);

 public:
  __device__ InputGradientBlock(const GroupedInputGradientParams<T>& p, const GroupedPlan& plan, unsigned char* shared)
      : Base(plan, {true, plan.stride}, p.width, shared), p_(p), taps_{true, plan.stride} {}

  __device__ void run() {
    this->load_all(p_.weight, p_.norm);
    for_each_tile<GroupedPlace>(plan_, *this);
    this->join(sums_);
    constexpr float kNone[V] = {};
    this->write_partial(sums_, kNone, p_.partial);
  }

  __device__ void load_tile(const GroupedPlace& place, int buffer) { this->load_source(p_.d, place, buffer); }

  __device__ void prepare_tile(const GroupedPlace& place, int) { place_ = place; }

  __device__ void multiply_tile(int buffer) {
    for (int c = 0; c < taps_.classes(); ++c) {
      if (c > 0) __syncthreads();  // the results of the class before are taken
      this->multiply(buffer, c);
      __syncthreads();  // du is there
      finish_class(c);
    }
  }

  __device__ void finish_tile(bool) {}

 private:
  // Row of z of the p-th pixel of a tile, -1 outside the image and beyond the last.
  __device__ int64_t row(int p, int c) const {
    const int pixel = p < plan_.tiles.pixels() ? pixels_.pixel(p) : -1;
    const int y = plan_.stride * (place_.y + (pixel >> 16)) + taps_.parity_y(c);
    const int x = plan_.stride * (place_.x + (pixel & 0xffff)) + taps_.parity_x(c);
    const bool inside = pixel >= 0 && y < p_.image_height && x < p_.image_width;
    return inside ? (place_.image * p_.image_height + y) * p_.image_width + x : -1;
  }

  // Mask, sums and dv of what was computed.
  __device__ void finish_class(int c) {
    if (!this->takes_part()) return;
#pragma unroll 1  // more pixels at once would take registers from products
    for (int r = 0; r < kRows; r += kAtOnce) finish_pixels(lane_ + r * lanes_, c);
  }

  __device__ __forceinline__ void finish_pixels(int first, int c) {
    const int column = first_ + chunk_ * V;
    int64_t rows[kAtOnce];
    Vector<T, V> z[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      rows[r] = row(first + r * lanes_, c);
      if (rows[r] >= 0) z[r] = read<V>(p_.z + rows[r] * width_ + column, V);
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      if (rows[r] < 0) continue;
      Vector<T, V> d = this->result(first + r * lanes_);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int channel = chunk_ * V + i;
        const float value = load(z[r].v[i]);
        const float dv = norm_relu_gradient(load(d.v[i]), value, norm_.scale[channel], norm_.shift[channel]);
        sums_.first(i) += dv;
        sums_.second(i) += dv * (value - norm_.mean[channel]);
        d.v[i] = store<T>(dv);
      }
      write(p_.dv + rows[r] * width_ + column, d, V);
    }
  }

  const GroupedInputGradientParams<T>& p_;
  const GroupedTaps taps_;
  ColumnSums<float, V> sums_;
};

template <typename T, int kVariant>
__global__ void __launch_bounds__(kGroupedThreads, 2)
    grouped_input_gradient_kernel(const __grid_constant__ GroupedInputGradientParams<T> p,
                                  const __grid_constant__ GroupedPlan plan) {
  wait_for_kernels_before();
  if constexpr (kTensorCores) {
    FASTDENSE_SHARED(shared);
    InputGradientBlock<T, kVariant>(p, plan, shared).run();
  }
}

}  // namespace

template <typename T>
GroupedPlan plan_grouped_input_gradient(const GroupedShape& s, int64_t multiprocessors, int64_t most_shared) {
  return plan_grouped<T>(s, grid_of_gradient(s), {multiprocessors, most_shared, 2, 1},
                         [](const GroupedPlan& plan) { return GroupedLayout<T>(plan, {true, plan.stride}).bytes; });
}

template <typename T>
cudaError_t launch_grouped_input_gradient(const GroupedInputGradientParams<T>& p, const GroupedPlan& plan,
                                          cudaStream_t stream) {
  return with_grouped_variant<T>(plan.group, [&](auto variant) {
    return launch_grouped(grouped_input_gradient_kernel<T, decltype(variant)::value>, plan, stream, p, plan);
  });
}

#define FASTDENSE_CONV(T)                                                                                         \
  template GroupedPlan plan_grouped_input_gradient<T>(const GroupedShape&, int64_t, int64_t);                     \
  template cudaError_t launch_grouped_input_gradient<T>(const GroupedInputGradientParams<T>&, const GroupedPlan&, \
                                                        cudaStream_t);
FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(FASTDENSE_CONV)
#undef FASTDENSE_CONV

}  // namespace fastdense
