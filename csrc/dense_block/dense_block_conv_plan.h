// SPDX-License-Identifier: Apache-2.0
// How the kernels of dense_block_conv_launch.h are planned and started; included by .cu files only.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "dense_block/dense_block_conv_launch.h"

namespace fastdense {

// What a plan depends on beside the shape: the device, and the kernel.
struct ConvLimits {
  int64_t multiprocessors, most_shared;  // bytes of shared memory that a block may have
  int most_resident;                     // blocks that a multiprocessor has registers for
  int64_t least_tiles;                   // that make a block worth its partial sums
};

// One way to run a kernel: `parts` blocks side by side with so many channels each, and buffers for tiles.
struct ConvChoice {
  int channels;
  int64_t parts;
  int buffers;
};

// The first of the choices that fits into shared memory with whole tiles, else the first that does with half ones, else
// none; none where b is no multiple of 16.  bytes(tiles, choice): of shared memory.
template <typename Bytes>
ConvPlan plan_conv(const ConvShape& s, const ConvLimits& limits, const std::vector<ConvChoice>& choices,
                   const Bytes& bytes) {
  if (s.b % 16 != 0) return {};  // products take the depth in whole steps
  for (const int pixels : {kConvPixels, kConvPixels / 2}) {
    const ConvTiles tiles = conv_tiles(s.batch, int(s.height), int(s.width), pixels);
    for (const ConvChoice& choice : choices) {
      const int64_t shared = bytes(tiles, choice);
      if (shared > limits.most_shared) continue;
      const int64_t resident = std::min<int64_t>(limits.most_resident, limits.most_shared / shared);
      const int64_t fill = std::max<int64_t>(1, limits.multiprocessors * resident / choice.parts);
      const int64_t useful = (tiles.count() + limits.least_tiles - 1) / limits.least_tiles;
      ConvPlan plan{tiles};
      plan.channels = choice.channels;
      plan.parts = choice.parts;
      plan.buffers = choice.buffers;
      plan.splits = std::max<int64_t>(1, std::min(fill, useful));
      plan.shared_bytes = size_t(shared);
      plan.most_shared_bytes = size_t(limits.most_shared);
      return plan;
    }
  }
  return {};
}

template <typename Kernel, typename... Arguments>
cudaError_t launch_conv(Kernel kernel, int threads, const ConvPlan& plan, cudaStream_t stream,
                        const Arguments&... arguments) {
  const cudaError_t error = FASTDENSE_ALLOW_SHARED(kernel, plan.most_shared_bytes);
  if (error != cudaSuccess) return error;
  FASTDENSE_LAUNCH(kernel, dim3(unsigned(plan.splits), unsigned(plan.parts)), dim3(unsigned(threads)),
                   plan.shared_bytes, stream, arguments...);
  return cudaGetLastError();
}

// New channels that a block can take, and of the kernels for 16, 24, ... the narrowest for so many.
constexpr int kMostColumns = 48;
inline int kernel_columns(int64_t columns) { return std::max(16, int((columns + 7) / 8 * 8)); }

// body(columns) with a constant.
template <typename Body>
auto with_columns(int columns, const Body& body) {
  switch (columns) {
    case 16:
      return body(std::integral_constant<int, 16>());
    case 24:
      return body(std::integral_constant<int, 24>());
    case 32:
      return body(std::integral_constant<int, 32>());
    case 40:
      return body(std::integral_constant<int, 40>());
    default:
      return body(std::integral_constant<int, kMostColumns>());
  }
}

}  // namespace fastdense
