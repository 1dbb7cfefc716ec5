// SPDX-License-Identifier: Apache-2.0
// Shapes of images, convolutions and average pools in up to three spatial dimensions, with the channels innermost.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastdense {

// Image of up to three spatial dimensions (trailing sizes 1), odd kernel of stride 1 with `same` padding.
struct ConvGeometry {
  int64_t size[3];
  int64_t kernel[3];
  int64_t plane() const { return size[1] * size[2]; }
  int64_t pixels() const { return size[0] * plane(); }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// A rectangle of an image.
struct Tile {
  int64_t image;
  int64_t row, rows;
  int64_t column, columns;
};

// Windows of pixels whose mean a 1x1 convolution reads.  Average pooling has window = stride; a strided 1x1 convolution
// reads windows of one pixel.
struct PoolGeometry {
  int64_t size[3];  // of the image
  int64_t window[3];
  int64_t stride[3];
  FASTDENSE_HD int64_t pooled(int d) const { return size[d] < window[d] ? 0 : (size[d] - window[d]) / stride[d] + 1; }
  FASTDENSE_HD int64_t pixels() const { return pooled(0) * pooled(1) * pooled(2); }
  FASTDENSE_HD int64_t volume() const { return window[0] * window[1] * window[2]; }
};

// First pixel of the window of pooled pixel `p`, counted over all images; Index holds an image's pixels.
template <typename Index = int64_t>
FASTDENSE_HD int64_t window_origin(const PoolGeometry& g, int64_t p) {
  const int64_t image = p / g.pixels();
  const auto in = Index(p - image * g.pixels()), size1 = Index(g.pooled(1)), size2 = Index(g.pooled(2));
  const Index line = in / size2, i2 = in - line * size2, i0 = line / size1, i1 = line - i0 * size1;
  return ((image * g.size[0] + i0 * g.stride[0]) * g.size[1] + i1 * g.stride[1]) * g.size[2] + i2 * g.stride[2];
}

// Pixel of a window relative to its origin.
template <typename Index = int64_t>
FASTDENSE_HD int64_t window_offset(const PoolGeometry& g, int64_t w) {
  const auto in = Index(w), size1 = Index(g.window[1]), size2 = Index(g.window[2]);
  const Index line = in / size2, w2 = in - line * size2, w0 = line / size1, w1 = line - w0 * size1;
  return (w0 * g.size[1] + w1) * g.size[2] + w2;
}

}  // namespace fastdense
