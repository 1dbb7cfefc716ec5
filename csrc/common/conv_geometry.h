// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

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

}  // namespace fastdense
