// SPDX-License-Identifier: Apache-2.0
// The fused kernels of grouped_conv_launch.h on tensors, and when they are used.
#pragma once

#include <ATen/core/Tensor.h>

#include <type_traits>

#include "cuda/conv1x1/conv1x1.h"
#include "cuda/grouped_conv/grouped_conv_launch.h"
#include "cuda/kernel_choice.h"

namespace fastdense {

// The plans of grouped 3x3 convolutions of one shape, none where the library's way is taken.
//
// The library's way writes u = relu(norm(z)) and reads it again, copies the result to where it is kept and takes its
// moments in a pass of its own, and in backward makes u anew and takes the sums of the norm in another: per pixel and
// channel 7 numbers for 2 forward, 8 for 5 backward.  benchmarks/grouped_conv_model.py counts cycles: in 16 bits the
// fused way takes less even where the library's convolutions cost nothing but these bytes.  Multiply-adds of float32 do
// up to 12 channels a group, where the library may round to TF32; where it must not, it makes as many.  All this is
// counted, nothing of it measured.
template <typename T>
struct GroupedPlans {
  GroupedPlan forward, input_gradient, weight_gradient;

  GroupedPlans() = default;
  GroupedPlans(const GroupedShape& shape, const CudaContext& cuda) {
    if constexpr (!std::is_same_v<T, double>) {
      if (!cuda.tensor_cores || cuda_kernels() == CudaKernels::kLibrary) return;
      const int64_t processors = cuda.multiprocessors();
      GroupedPlans plans;
      plans.forward = plan_grouped_forward<T>(shape, processors, cuda.shared_bytes);
      plans.input_gradient = plan_grouped_input_gradient<T>(shape, processors, cuda.shared_bytes);
      plans.weight_gradient = plan_grouped_weight_gradient<T>(shape, processors, cuda.shared_bytes);
      constexpr int64_t kMostByMultiplyAdds = 12;
      const bool faster = sizeof(T) == 2 || !cuda.tf32_convolutions || shape.channels <= kMostByMultiplyAdds;
      if (use_fused(plans.forward && plans.input_gradient && plans.weight_gradient, faster)) *this = plans;
    }
  }
  explicit operator bool() const { return bool(forward); }
};

// out [pixels, width] = conv(relu(norm(z))) with the weight packed [width, channels of a group, 3, 3], channels
// innermost, and mean and variance of its channels where wanted.
template <typename T>
void grouped_conv(const CudaBlockForward<T>& block, const GroupedPlan& plan, const T* z,
                  const NormParams<accumulate_t<T>>& norm, const at::Tensor& packed, const Matrix<T>& out,
                  int64_t pixels, const BatchStatistics<accumulate_t<T>>& statistics) {
  if constexpr (!std::is_same_v<T, double>) {
    const int64_t width = packed.size(0);
    const BlockMoments moments = block.fused_moments(plan.splits, width, pixels, statistics);
    check_launch(launch_grouped_forward<T>({z, norm, block.const_data(packed), int(width), out.data, moments}, plan,
                                           block.cuda.stream));
    block.share_moments(statistics, width, pixels);
  }
}

// dv [input pixels, width] = the gradient in front of the ReLU of norm(z), from that of the result; the result is the
// partial sums of the norm's gradient, which the next step overwrites.
template <typename T>
PartialSums<accumulate_t<T>> grouped_conv_input_gradient(const CudaBlockForward<T>& block, const GroupedPlan& plan,
                                                         const GroupedShape& shape, const T* d,
                                                         const at::Tensor& packed, const T* z,
                                                         const NormParams<accumulate_t<T>>& norm, T* dv) {
  const int64_t width = packed.size(0);
  const PartialSums<accumulate_t<T>> partial = block.reused_partials(plan.splits, width);
  if constexpr (!std::is_same_v<T, double>)
    check_launch(launch_grouped_input_gradient<T>(
        {d, block.const_data(packed), z, norm, int(width), int(shape.height), int(shape.width), dv, partial.data}, plan,
        block.cuda.stream));
  return partial;
}

// Gradient of the weight in the layout of `like`, a sum over splits that finalise_sums() takes.
template <typename T>
WeightSum<accumulate_t<T>> grouped_conv_weight_gradient(const CudaBlockForward<T>& block, const GroupedPlan& plan,
                                                        const T* d, const T* z, const NormParams<accumulate_t<T>>& norm,
                                                        const at::Tensor& like) {
  if constexpr (std::is_same_v<T, double>) {
    return {};
  } else {
    const WeightSum<float> sum = sum_of_3x3(block, plan.splits, like);
    check_launch(
        launch_grouped_weight_gradient<T>({d, z, norm, int(like.size(0)), sum.target}, plan, block.cuda.stream));
    return sum;
  }
}

}  // namespace fastdense
