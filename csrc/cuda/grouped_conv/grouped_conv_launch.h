// SPDX-License-Identifier: Apache-2.0
// Grouped 3x3 convolutions with few channels a group, fused with what stands around them: norm + ReLU in front, the
// moments of the result behind; in backward the mask and the sums of the norm.  No torch header.  Two dimensions,
// padding 1, stride 1 or 2, channels innermost, as many behind as in front.  Sums are float32.
//
// bfloat16 and half run on tensor cores: at up to eight channels a group five products of 16x8x16 make 128 results,
// where plain arithmetic would take 9 multiply-adds for each channel of a group, and shared memory limits both.  The
// factor is the weight's blocks of 8x8 channels, zeros where these belong to different groups.  So a number that is not
// finite reaches channels of other groups beside it.  float is computed by plain multiply-adds, exactly, group by
// group.
//
// A block takes tiles of pixels in turns, and a part of the channels that consists of whole groups.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

constexpr int kGroupedPixels = 128, kGroupedSteps = 16;  // the most that a tile has; those of a product

struct GroupedShape {
  int64_t batch, height, width, stride;
  int64_t groups, channels;  // channels of a group
  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t all_channels() const { return groups * channels; }
};

// Rectangles of a grid of pixels, and of the source that convolutions at these pixels read: its pixel
// (step * y - 1 + i, step * x - 1 + j) for i, j = 0, 1, 2.
struct GroupedTiles {
  int64_t batch;
  int height, width, source_height, source_width, step;
  int rows, columns;  // of a tile
  int pitch;          // places from line to line of the source
  FASTDENSE_HD int64_t down() const { return (height + rows - 1) / rows; }
  FASTDENSE_HD int64_t across() const { return (width + columns - 1) / columns; }
  FASTDENSE_HD int64_t count() const { return batch * down() * across(); }
  FASTDENSE_HD int pixels() const { return rows * columns; }
  FASTDENSE_HD int lines() const { return step * (rows - 1) + 3; }
  FASTDENSE_HD int length() const { return step * (columns - 1) + 3; }  // of a line
  FASTDENSE_HD int places() const { return lines() * pitch; }
  // Place in its line of column x of the source.  With a step of 2 the even columns come first, so that neighbours
  // read neighbours.
  FASTDENSE_HD int place(int x) const { return step == 1 ? x : x / 2 + x % 2 * (pitch / 2); }
  FASTDENSE_HD int column(int place) const {
    return step == 1 ? place : place < pitch / 2 ? 2 * place : 2 * (place - pitch / 2) + 1;
  }
  // Place of what pixel (y, x) of a tile reads at i = j = 0.
  FASTDENSE_HD int base(int y, int x) const { return step * y * pitch + x; }
};

// Threads take four pixels beside each other, of which the last may lie behind the line.  Lines are apart so that
// eight pixels that are read at once lie in different banks, where that can be had.
inline int grouped_pitch(int columns, int step) {
  const int whole = (columns + 3) / 4 * 4, least = step == 1 ? whole + 2 : 2 * (whole + 1);
  for (int pitch = least; columns % 8 != 0 && pitch < least + 8; pitch += step)
    if ((step * pitch - columns) % 8 == 0) return pitch;
  return least;
}

// The tiles of at most so many pixels that make the least work.
inline GroupedTiles grouped_tiles(GroupedTiles grid, int most_pixels) {
  GroupedTiles best = grid;
  int64_t least = 0;
  for (int most = std::min(grid.width, most_pixels), columns; most > 0; most = columns - 1) {
    GroupedTiles t = grid;
    const int across = (t.width + most - 1) / most;
    t.columns = columns = (t.width + across - 1) / across;
    const int fit = std::min(t.height, most_pixels / t.columns), down = (t.height + fit - 1) / fit;
    t.rows = (t.height + down - 1) / down;
    t.pitch = grouped_pitch(t.columns, t.step);
    const int64_t steps = (t.pixels() + kGroupedSteps - 1) / kGroupedSteps;
    const int64_t work = t.count() * (t.lines() * t.length() + steps * kGroupedSteps);
    if (least > 0 && work >= least) continue;
    least = work;
    best = t;
  }
  return best;
}

// How one of the kernels runs: blocks [splits][parts], where a part of the channels falls to each of the second axis.
struct GroupedPlan {
  GroupedTiles tiles{};
  int stride = 0, group = 0;  // of the convolution; channels of a group
  int window = 0;             // chunks of 16 bytes of channels that one such chunk of the result may read
  int channels = 0;           // of a part, 0 where nothing fits
  int64_t splits = 0, parts = 0;
  int buffers = 0;  // 2: the next tile is on its way while one is in work
  size_t shared_bytes = 0;
  // What a kernel is allowed: all that a device has, since threads with other plans may start the same kernel.
  size_t most_shared_bytes = 0;
  explicit operator bool() const { return channels > 0; }
};

// most_shared: bytes of shared memory that a block may have.  T is bfloat16, half or float.
template <typename T>
GroupedPlan plan_grouped_forward(const GroupedShape&, int64_t multiprocessors, int64_t most_shared);
template <typename T>
GroupedPlan plan_grouped_input_gradient(const GroupedShape&, int64_t multiprocessors, int64_t most_shared);
template <typename T>
GroupedPlan plan_grouped_weight_gradient(const GroupedShape&, int64_t multiprocessors, int64_t most_shared);

// out = conv(relu(norm(z))), and its moments.
template <typename T>
struct GroupedForwardParams {
  const T* z;  // [pixels, width], as out
  NormParams<float> norm;
  const T* weight;  // [width][9][channels of a group]
  int width;
  T* out;
  BlockMoments moments;  // by the plan's splits
};
template <typename T>
cudaError_t launch_grouped_forward(const GroupedForwardParams<T>&, const GroupedPlan&, cudaStream_t);

// dv = gradient of norm(z) in front of its ReLU, from the gradient d of the convolution's result, with partial sums of
// dv and dv * (z - mean).
template <typename T>
struct GroupedInputGradientParams {
  const T *d, *weight, *z;
  NormParams<float> norm;
  int width, image_height, image_width;  // of z
  T* dv;
  float* partial;  // [splits][2][width]
};
template <typename T>
cudaError_t launch_grouped_input_gradient(const GroupedInputGradientParams<T>&, const GroupedPlan&, cudaStream_t);

// The weight's gradient d^T * relu(norm(z)) at each tap.
template <typename T>
struct GroupedWeightGradientParams {
  const T *d, *z;
  NormParams<float> norm;
  int width;
  float* partial;  // [splits][width][9][channels of a group], to be added up
};
template <typename T>
cudaError_t launch_grouped_weight_gradient(const GroupedWeightGradientParams<T>&, const GroupedPlan&, cudaStream_t);

}  // namespace fastdense
