// SPDX-License-Identifier: Apache-2.0
// The fused kernels of dense_block_conv_launch.h on tensors, and when they are used.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <type_traits>

#include "cuda/block_forward.h"
#include "cuda/conv1x1/conv1x1.h"
#include "cuda/kernel_choice.h"
#include "dense_block/dense_block.h"
#include "dense_block/dense_block_conv_launch.h"

namespace fastdense {

// The plans of a block's 3x3 convolutions, none where the library's way is taken.
//
// The library's way writes u = relu(norm2(z)) and reads it again, copies the result into the slice, and in backward
// makes u anew for the weight's gradient and takes the sums of norm2 in a pass of its own: per pixel and layer 3b + 3k
// numbers for b + k forward, 7b + 3k for 4b + 3k backward.  It takes five kernels less a layer in a training step, two
// less in inference.  So the fused way is expected to win even where a single block computes a tile and leaves the
// device idle, which takes about as long as these two.  All this is counted, nothing of it measured.
template <typename T>
struct ConvPlans {
  ConvPlan forward, input_gradient, weight_gradient;

  ConvPlans(const DenseBlockArgs& args, const CudaContext& cuda) {
    if constexpr (!std::is_same_v<T, double>) {
      const ConvGeometry& g = args.conv;
      constexpr int64_t kLongest = std::numeric_limits<int32_t>::max() / 2;  // side of an image
      const bool possible = !args.has_extras() && cuda.tensor_cores && (sizeof(T) == 2 || cuda.tf32_convolutions) &&
                            args.bottleneck && args.spatial.size() == 2 && g.kernel[0] == 3 && g.kernel[1] == 3 &&
                            args.pixels() > 0 && args.width % 16 == 0 && args.growth * sizeof(T) % 4 == 0 &&
                            std::max(g.size[0], g.size[1]) < kLongest;
      if (!possible) return;
      const ConvShape shape{args.batch, g.size[0], g.size[1], args.width, args.growth};
      const int64_t processors = cuda.multiprocessors();
      const ConvPlans plans{plan_conv_forward<T>(shape, processors, cuda.shared_bytes),
                            plan_conv_input_gradient<T>(shape, processors, cuda.shared_bytes),
                            plan_conv_weight_gradient<T>(shape, processors, cuda.shared_bytes)};
      const bool fit = plans.forward && plans.input_gradient && plans.weight_gradient;
      if (use_fused(fit, true)) *this = plans;
    }
  }
  explicit operator bool() const { return bool(forward); }

 private:
  ConvPlans(const ConvPlan& forward, const ConvPlan& input_gradient, const ConvPlan& weight_gradient)
      : forward(forward), input_gradient(input_gradient), weight_gradient(weight_gradient) {}
};

// The slice x = dropout(conv(relu(norm(z)))) with the weight packed [k, b, 3, 3], channels innermost, and mean and
// variance of its channels where wanted.
template <typename T>
void fused_conv(const CudaBlockForward<T>& block, const ConvPlan& plan, const T* z,
                const NormParams<accumulate_t<T>>& norm, const at::Tensor& packed, const Matrix<T>& x,
                const DropoutParams& dropout, const BatchStatistics<accumulate_t<T>>& statistics) {
  if constexpr (!std::is_same_v<T, double>) {
    const int64_t k = packed.size(0), b = packed.size(1), pixels = plan.tiles.pixels_of_images();
    const BlockMoments moments = block.fused_moments(plan.splits, k, pixels, statistics);
    check_launch(launch_conv_forward<T>({z, norm, block.const_data(packed), int(b), int(k), x, dropout, moments}, plan,
                                        block.cuda.stream));
    block.share_moments(statistics, k, pixels);
  }
}

// Gradient dv [pixels, b] in front of the ReLU of norm(z) from the gradient d of the convolution, with the weight
// packed [b * 9, k]; the result is the partial sums of the norm's gradient, which the next step overwrites.
template <typename T>
PartialSums<accumulate_t<T>> fused_conv_input_gradient(const CudaBlockForward<T>& block, const ConvPlan& plan,
                                                       const T* d, const at::Tensor& exchanged, const T* z,
                                                       const NormParams<accumulate_t<T>>& norm, T* dv) {
  const int64_t b = exchanged.size(0) / 9, k = exchanged.size(1);
  const PartialSums<accumulate_t<T>> partial = block.reused_partials(plan.splits, b);
  if constexpr (!std::is_same_v<T, double>)
    check_launch(launch_conv_input_gradient<T>(
        {d, block.const_data(exchanged), exchanged.stride(0), z, norm, int(b), int(k), dv, partial.data}, plan,
        block.cuda.stream));
  return partial;
}

// Gradient of the weight [k, b, 3, 3] in the layout of `like`, a sum over splits that finalise_sums() takes.
template <typename T>
WeightSum<accumulate_t<T>> fused_conv_weight_gradient(const CudaBlockForward<T>& block, const ConvPlan& plan,
                                                      const T* d, const T* z, const NormParams<accumulate_t<T>>& norm,
                                                      const at::Tensor& like) {
  if constexpr (std::is_same_v<T, double>) {
    return {};
  } else {
    const WeightSum<float> sum = sum_of_3x3(block, plan.splits, like);
    check_launch(launch_conv_weight_gradient<T>({d, z, norm, int(like.size(1)), int(like.size(0)), sum.target}, plan,
                                                block.cuda.stream));
    return sum;
  }
}

}  // namespace fastdense
