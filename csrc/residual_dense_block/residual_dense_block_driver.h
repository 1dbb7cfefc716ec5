// SPDX-License-Identifier: Apache-2.0
// What the passes of the residual dense block on the CPU share: tiles of the images, and weights and their gradients
// tap by tap.
#pragma once

#include <algorithm>

#include "common/row_driver.h"
#include "residual_dense_block/residual_dense_block.h"

namespace fastdense {

template <typename T>
class ResidualConvolution {
  using A = accumulate_t<T>;

 public:
  ResidualConvolution(const ResidualDenseBlockArgs& args, const RowDriver<T>& rows) : args_(args), rows_(rows) {}

  struct Tiles {
    Tile first;
    int64_t down, across;
  };

  // Equal tiles of which `channels` numbers a pixel stay in L2 with their halo; enough of them for all workers.
  Tiles tiles(int64_t channels) const {
    constexpr int64_t kColumns = 48, kBytes = 256 * 1024;
    const int64_t height = args_.height, width = args_.width;
    const int64_t across = std::max<int64_t>(1, (width + kColumns - 1) / kColumns),
                  columns = (width + across - 1) / across;
    const int64_t row_bytes = (columns + 2) * rows_.padded_depth(channels) * rows_.kernels.operand_bytes;
    const int64_t fit = std::max<int64_t>(2, kBytes / std::max<int64_t>(1, row_bytes) - 2);
    int64_t down = std::max<int64_t>(1, (height + fit - 1) / fit);
    while (down < height && down * across * args_.batch < 4 * rows_.workers) ++down;
    return {{0, 0, std::max<int64_t>(1, (height + down - 1) / down), 0, std::max<int64_t>(1, columns)}, down, across};
  }

  // body(worker, tile) for all tiles.
  template <typename Body>
  void for_each_tile(const Tiles& t, const Body& body) const {
    rows_.for_each_worker(args_.batch * t.down * t.across, [&](int64_t worker, int64_t unit) {
      Tile tile{unit / (t.down * t.across), unit / t.across % t.down * t.first.rows, t.first.rows,
                unit % t.across * t.first.columns, t.first.columns};
      tile.rows = std::min(tile.rows, args_.height - tile.row);
      tile.columns = std::min(tile.columns, args_.width - tile.column);
      if (tile.rows > 0 && tile.columns > 0) body(worker, tile);
    });
  }

  // Panels of a layer's weight for the kernels: of its outputs, or reversed for those of its input's gradient.
  at::Tensor pack(const ResidualLayerArgs& layer, bool reversed) const {
    const at::Tensor weight = rows_.accumulate_type(layer.conv.weight);
    const A* w = weight.template const_data_ptr<A>();
    const int64_t taps = layer.geometry.taps(), in = taps, out = taps * layer.channels;  // strides of the channels
    const int64_t depth = reversed ? layer.out : layer.channels, n = reversed ? layer.channels : layer.out;
    const int64_t depth_stride = reversed ? out : in, column_stride = reversed ? in : out;
    const int64_t panel = rows_.kernels.panel, bytes = rows_.padded_depth(depth) * panel * rows_.kernels.operand_bytes;
    at::Tensor packed = rows_.bytes(rows_.padded(n) / panel * taps * bytes);
    uint8_t* to = packed.mutable_data_ptr<uint8_t>();
    rows_.for_each_worker(rows_.padded(n) / panel * taps, [&](int64_t, int64_t unit) {
      const int64_t first = unit / taps * panel, tap = unit % taps;
      rows_.kernels.pack(w + first * column_stride + (reversed ? taps - 1 - tap : tap), depth, n - first, depth_stride,
                         column_stride, 0, 1, to + unit * bytes);
    });
    return packed;
  }

  // A layer's weight gradient of those per worker [workers, taps * padded out, padded channels], the last tap first.
  at::Tensor weight_gradient(const ResidualLayerArgs& layer, const at::Tensor& by_worker) const {
    const int64_t taps = layer.geometry.taps(), n = layer.channels, workers = by_worker.size(0), ld = by_worker.size(2);
    const int64_t per_worker = by_worker.size(1) * ld, per_tap = by_worker.size(1) / taps * ld;
    at::Tensor total = rows_.template temporary<A>(layer.conv.weight.sizes());
    const A* from = by_worker.template const_data_ptr<A>();
    A* to = total.template mutable_data_ptr<A>();
    rows_.for_each_worker(layer.out, [=](int64_t, int64_t k) {
      A* out = to + k * n * taps;
      for (int64_t worker = 0; worker < workers; ++worker)
        for (int64_t tap = 0; tap < taps; ++tap) {
          const A* row = from + worker * per_worker + (taps - 1 - tap) * per_tap + k * ld;
          if (worker == 0)
            for (int64_t j = 0; j < n; ++j) out[j * taps + tap] = row[j];
          else
            for (int64_t j = 0; j < n; ++j) out[j * taps + tap] += row[j];
        }
    });
    return total;
  }

 private:
  const ResidualDenseBlockArgs& args_;
  const RowDriver<T>& rows_;
};

}  // namespace fastdense
