// SPDX-License-Identifier: Apache-2.0
// How the kernels of grouped_conv_launch.h are planned and started; included by .cu files only.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>

#include "cuda/grouped_conv/grouped_conv_tiles.h"
#include "cuda/launch.h"

namespace fastdense {

// Whole groups in whole chunks.
template <typename T>
int grouped_unit(int group) {
  return std::lcm(group, kChunkNumbers<T>);
}

// Chunks that one chunk of the result may read, at most.
template <typename T>
int grouped_window(int group) {
  constexpr int kNumbers = kChunkNumbers<T>;
  int most = 0;
  for (int first = 0; first < grouped_unit<T>(group); first += kNumbers) {
    const int last = first + kNumbers - 1, end = (last / group + 1) * group;
    most = std::max(most, (end - 1) / kNumbers + 1 - first / group * group / kNumbers);
  }
  return most;
}

// Numbers side by side that a thread of the kernels for float takes of a group, 0 where there is no such kernel.
inline int grouped_side(int group) { return group % 4 == 0 ? 4 : group % 3 == 0 ? 3 : group % 2 == 0 ? 2 : 0; }

constexpr int kMostGroupedChunks = 8, kMostGroupedWindow = 4;

// Fewer than 2^16 parts, which are a grid's second axis.
template <typename T>
bool has_grouped_kernels(const GroupedShape& s) {
  constexpr int64_t kMostWidth = int64_t(1) << 19, kLongest = std::numeric_limits<int32_t>::max() / 4;
  if (s.channels < 2 || s.channels > 32 || (s.stride != 1 && s.stride != 2) || s.all_channels() > kMostWidth ||
      s.all_channels() % kChunkNumbers<T> != 0 || std::max(s.height, s.width) > kLongest ||
      std::min({s.batch, s.height, s.width}) < 1)
    return false;
  const int group = int(s.channels);
  if (grouped_unit<T>(group) > kMostGroupedChunks * kChunkNumbers<T>) return false;
  return sizeof(T) == 2 ? grouped_window<T>(group) <= kMostGroupedWindow : grouped_side(group) > 0;
}

struct GroupedLimits {
  int64_t multiprocessors, most_shared;  // bytes of shared memory that a block may have
  int64_t most_resident;                 // blocks that a multiprocessor has registers for
  int64_t least_tiles;                   // that make a block worth its partial sums
};

// The first that fits of: two blocks to a multiprocessor or one, large tiles or small, two buffers or one, wide parts
// or narrow.  bytes(plan): of shared memory, 0 where there is no kernel.
template <typename T, typename Bytes>
GroupedPlan plan_grouped(const GroupedShape& s, const GroupedTiles& grid, const GroupedLimits& limits,
                         const Bytes& bytes) {
  if (!has_grouped_kernels<T>(s)) return {};
  constexpr int64_t kReserved = 1024;  // that a block takes of a multiprocessor on top
  GroupedPlan plan;
  plan.stride = int(s.stride);
  plan.group = int(s.channels);
  plan.window = grouped_window<T>(plan.group);
  plan.most_shared_bytes = size_t(limits.most_shared);
  const int unit = grouped_unit<T>(plan.group);
  for (int64_t resident = limits.most_resident; resident > 0; --resident)
    for (const int pixels : {kGroupedPixels, kGroupedPixels / 2, kGroupedPixels / 4}) {
      plan.tiles = grouped_tiles(grid, pixels);
      for (const int buffers : {2, 1})
        for (const int chunks : {kMostGroupedChunks, kMostGroupedChunks / 2}) {
          const int64_t wanted = std::min(s.all_channels(), chunks * int64_t(kChunkNumbers<T>));
          plan.channels = std::max(1, int(wanted / unit)) * unit;
          plan.buffers = buffers;
          const int64_t shared = bytes(plan);
          if (shared == 0 || shared > (limits.most_shared + kReserved) / resident - kReserved) continue;
          plan.shared_bytes = size_t(shared);
          plan.parts = (s.all_channels() + plan.channels - 1) / plan.channels;
          const int64_t fill = std::max<int64_t>(1, limits.multiprocessors * resident / plan.parts);
          const int64_t useful = (plan.tiles.count() + limits.least_tiles - 1) / limits.least_tiles;
          plan.splits = std::max<int64_t>(1, std::min(fill, useful));
          return plan;
        }
    }
  return {};
}

// The grids of pixels of the result, which read the input, and of what reads the result's gradient: all of the input's
// pixels, or with a stride of 2 every second of every second line.
inline GroupedTiles grid_of_result(const GroupedShape& s) {
  return {s.batch, int(s.out_height()), int(s.out_width()), int(s.height), int(s.width), int(s.stride), 0, 0, 0};
}
inline GroupedTiles grid_of_gradient(const GroupedShape& s) {
  const int height = int(s.out_height()), width = int(s.out_width());
  return {s.batch, height, width, height, width, 1, 0, 0, 0};
}

template <typename Kernel, typename... Arguments>
cudaError_t launch_grouped(Kernel kernel, const GroupedPlan& plan, cudaStream_t stream, const Arguments&... arguments) {
  const cudaError_t error = FASTDENSE_ALLOW_SHARED(kernel, plan.most_shared_bytes);
  if (error != cudaSuccess) return error;
  FASTDENSE_LAUNCH(kernel, dim3(unsigned(plan.splits), unsigned(plan.parts)), dim3(unsigned(kGroupedThreads)),
                   plan.shared_bytes, stream, arguments...);
  return cudaGetLastError();
}

// body(variant) with a constant: chunks of the result that read the same ones, or for float numbers side by side.
template <typename T, typename Body>
cudaError_t with_grouped_variant(int group, const Body& body) {
  if constexpr (sizeof(T) == 2) {
    if (group % (2 * kChunkNumbers<T>) == 0) return body(std::integral_constant<int, 2>());
    return body(std::integral_constant<int, 1>());
  } else {
    const int side = grouped_side(group);
    if (side == 4) return body(std::integral_constant<int, 4>());
    if (side == 3) return body(std::integral_constant<int, 3>());
    return body(std::integral_constant<int, 2>());
  }
}

}  // namespace fastdense
