// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the residual dense block share on the CPU: tiles of the images, packed weights and their
// gradients.
#pragma once

#include <algorithm>

#include "cpu/conv/conv2d_weights.h"
#include "residual_dense_block/residual_dense_block_kernels.h"
#include "residual_dense_block/residual_dense_block_ops.h"

namespace fastdense {

template <typename T>
class ResidualConvolution {
  using A = accumulate_t<T>;

 public:
  ResidualConvolution(const ResidualDenseBlockArgs& args, const BlockForward<T>& block)
      : kernels(residual_dense_block_kernels<T>(current_isa())), args_(args), block_(block) {}

  const ResidualDenseBlockKernels<T>& kernels;

  struct Tiles {
    Tile first;
    int64_t down, across;
  };

  // Equal tiles, even in size, of which the transforms of `channels` numbers a pixel stay in L2; enough of them for all
  // workers.
  Tiles tiles(int64_t channels) const {
    constexpr int64_t kColumns = 48, kBytes = 640 * 1024, kCopies = 4;  // a pixel is in four patches
    const int64_t height = args_.height, width = args_.width;
    const int64_t columns = even(ceil(width, ceil(width, kColumns))), across = ceil(width, columns);
    const int64_t row_bytes = kCopies * columns * block_.padded_depth(channels) * block_.kernels.operand_bytes;
    const int64_t fit = std::max<int64_t>(2, kBytes / std::max<int64_t>(1, row_bytes) / 2 * 2);
    int64_t rows = std::min(fit, even(ceil(height, ceil(height, fit))));
    while (rows > 2 && ceil(height, rows) * across * args_.batch < 4 * block_.workers) rows -= 2;
    return {{0, 0, rows, 0, columns}, ceil(height, rows), across};
  }

  // body(worker, tile) for all tiles.
  template <typename Body>
  void for_each_tile(const Tiles& t, const Body& body) const {
    block_.for_each_worker(args_.batch * t.down * t.across, of_tile(t, body));
  }

  // The same for bodies that keep nothing for their worker.
  template <typename Body>
  void share_tiles(const Tiles& t, const Body& body) const {
    block_.share_units(args_.batch * t.down * t.across, of_tile(t, body));
  }

  at::Tensor pack(const ResidualLayerArgs& layer, bool reversed) const {
    return pack_conv2d_weight(block_, kernels, layer.geometry, layer.conv.weight, reversed);
  }
  at::Tensor weight_gradient(const ResidualLayerArgs& layer, const at::Tensor& by_worker) const {
    return sum_conv2d_weight_gradient(block_, kernels, layer.geometry, layer.conv.weight, by_worker);
  }

 private:
  template <typename Body>
  auto of_tile(const Tiles& t, const Body& body) const {
    return [this, &t, &body](int64_t worker, int64_t unit) {
      Tile tile{unit / (t.down * t.across), unit / t.across % t.down * t.first.rows, t.first.rows,
                unit % t.across * t.first.columns, t.first.columns};
      tile.rows = std::min(tile.rows, args_.height - tile.row);
      tile.columns = std::min(tile.columns, args_.width - tile.column);
      if (tile.rows > 0 && tile.columns > 0) body(worker, tile);
    };
  }

  static int64_t ceil(int64_t n, int64_t by) { return std::max<int64_t>(1, (n + by - 1) / by); }
  static int64_t even(int64_t n) { return n + n % 2; }

  const ResidualDenseBlockArgs& args_;
  const BlockForward<T>& block_;
};

}  // namespace fastdense
