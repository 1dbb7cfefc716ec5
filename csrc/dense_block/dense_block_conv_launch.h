// SPDX-License-Identifier: Apache-2.0
// The 3x3 convolution of a dense layer on tensor cores, fused with what stands around it: norm2 + ReLU in front,
// dropout, the slice of the buffer and its statistics behind; in backward the mask and the sums of norm2.  No torch
// header.  Two dimensions, stride 1, padding 1, channels innermost: z [pixels, b], x and d k channels a pixel.  T is
// bfloat16, half, or float, whose products are TF32; sums are float.
//
// A block takes tiles of pixels in turns: a rectangle of an image, or several images that are small.  Plans tell how
// a device of so much shared memory shares the work out; what does not fit has none.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

// A tile has at most kConvPixels; rows of the products beyond its pixels are computed in vain, whole 16 are left out.
constexpr int kConvPixels = 128, kConvSteps = 16;
// Rows of shared memory that are an odd number of 16 bytes apart repeat their banks after so many; products read as
// many rows at once.
constexpr int kConvBanks = 8;

struct ConvTiles {
  int64_t batch;
  int height, width;
  int images, rows, columns;   // of a tile
  uint8_t order[kConvPixels];  // in which products take its pixels
  FASTDENSE_HD int64_t down() const { return (height + rows - 1) / rows; }
  FASTDENSE_HD int64_t across() const { return (width + columns - 1) / columns; }
  FASTDENSE_HD int64_t count() const { return (batch + images - 1) / images * down() * across(); }
  FASTDENSE_HD int pixels() const { return images * rows * columns; }
  int64_t pixels_of_images() const { return batch * height * width; }
  FASTDENSE_HD int halo() const { return images * (rows + 2) * (columns + 2); }  // with a ring of pixels around
  // Place of a pixel among those with the ring.
  FASTDENSE_HD int centre(int pixel) const {
    const int line = pixel / columns, image = line / rows;
    return (image * (rows + 2) + line - image * rows + 1) * (columns + 2) + pixel - line * columns + 1;
  }
};

// Pixels of a tile by the banks that they lie in.
struct ConvBanks {
  int count[kConvBanks] = {};
  uint8_t pixel[kConvBanks][kConvPixels];
  explicit ConvBanks(const ConvTiles& t) {
    for (int p = 0; p < t.pixels(); ++p) {
      const int bank = t.centre(p) % kConvBanks;
      pixel[bank][count[bank]++] = uint8_t(p);
    }
  }
  int most() const { return *std::max_element(count, count + kConvBanks); }
};

// Orders the pixels so that those read at once lie in different banks as far as possible: the fullest first.
inline void spread_over_banks(ConvTiles& t) {
  ConvBanks banks(t);
  for (int first = 0, n = 0; first < t.pixels(); first += kConvBanks) {
    int taken[kConvBanks] = {};
    for (; n < std::min(first + kConvBanks, t.pixels()); ++n) {
      int best = -1;
      for (int b = 0; b < kConvBanks; ++b)
        if (banks.count[b] > 0 &&
            (best < 0 || taken[b] < taken[best] || (taken[b] == taken[best] && banks.count[b] > banks.count[best])))
          best = b;
      ++taken[best];
      t.order[n] = banks.pixel[best][--banks.count[best]];
    }
  }
}

// The tiles that make the least work of images of this size, of these the ones that spread best over banks.
inline ConvTiles conv_tiles(int64_t batch, int height, int width, int most_pixels) {
  const int most_halo = most_pixels * 8 / 5;
  ConvTiles best{};
  int64_t least = 0;
  int least_banks = 0;
  for (int most = std::min(width, most_pixels), columns; most > 0; most = columns - 1) {
    ConvTiles t{batch, height, width, 1, 0, 0, {}};
    const int across = (width + most - 1) / most;
    t.columns = columns = (width + across - 1) / across;
    const int fit = std::min({height, most_pixels / t.columns, most_halo / (t.columns + 2) - 2});
    if (fit < 1) continue;
    const int down = (height + fit - 1) / fit;
    t.rows = (height + down - 1) / down;
    if (t.rows == height && t.columns == width)
      t.images = std::max(1, int(std::min<int64_t>({batch, most_pixels / t.pixels(), most_halo / t.halo()})));
    const int64_t work = t.count() * (t.halo() + (t.pixels() + kConvSteps - 1) / kConvSteps * kConvSteps);
    if (least > 0 && work > least) continue;
    const int banks = ConvBanks(t).most();
    if (work == least && banks >= least_banks) continue;
    least = work;
    least_banks = banks;
    best = t;
  }
  spread_over_banks(best);
  return best;
}

// How one of the kernels runs: blocks [splits][parts], where a part of the channels falls to each of the second axis.
struct ConvPlan {
  ConvTiles tiles;
  int channels = 0;  // of a part, 0 where nothing fits
  int64_t splits = 0, parts = 0;
  int buffers = 0;  // 2: the next tile is on its way while one is in work
  size_t shared_bytes = 0;
  // What a kernel is allowed: all that a device has, since threads with other plans may start the same kernel.
  size_t most_shared_bytes = 0;
  explicit operator bool() const { return channels > 0; }
};

struct ConvShape {
  int64_t batch;
  int64_t height, width;
  int64_t b, k;
};

// most_shared: bytes of shared memory that a block may have.
template <typename T>
ConvPlan plan_conv_forward(const ConvShape&, int64_t multiprocessors, int64_t most_shared);
template <typename T>
ConvPlan plan_conv_input_gradient(const ConvShape&, int64_t multiprocessors, int64_t most_shared);
template <typename T>
ConvPlan plan_conv_weight_gradient(const ConvShape&, int64_t multiprocessors, int64_t most_shared);

// x = dropout(conv(relu(norm(z)))), and x's moments.
template <typename T>
struct ConvForwardParams {
  const T* z;
  NormParams<float> norm;
  const T* weight;  // [k][9][b]
  int b, k;
  Matrix<T> x;
  DropoutParams dropout;
  BlockMoments moments;  // by the plan's splits
};
template <typename T>
cudaError_t launch_conv_forward(const ConvForwardParams<T>&, const ConvPlan&, cudaStream_t);

// dv = gradient of norm(z) in front of its ReLU, from the gradient d of the convolution's result, with partial sums of
// dv and dv * (z - mean).
template <typename T>
struct ConvInputGradientParams {
  const T* d;       // [pixels, k]
  const T* weight;  // [b][9][ld]: the weight's first two dimensions exchanged
  int64_t ld;       // a multiple of 16 bytes
  const T* z;
  NormParams<float> norm;
  int b, k;
  T* dv;
  float* partial;  // [splits][2][b]
};
template <typename T>
cudaError_t launch_conv_input_gradient(const ConvInputGradientParams<T>&, const ConvPlan&, cudaStream_t);

// The weight's gradient d^T * relu(norm(z)) at each tap.
template <typename T>
struct ConvWeightGradientParams {
  const T *d, *z;
  NormParams<float> norm;
  int b, k;
  float* partial;  // [splits][k][9][b], to be added up
};
template <typename T>
cudaError_t launch_conv_weight_gradient(const ConvWeightGradientParams<T>&, const ConvPlan&, cudaStream_t);

}  // namespace fastdense
