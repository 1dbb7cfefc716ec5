// SPDX-License-Identifier: Apache-2.0
// The products of grouped_conv_launch.h's kernels: what the pixels of a tile, in shared memory, give at one class of
// pixels; included by .cu files only.
#pragma once

#include "cuda/grouped_conv/grouped_conv_tiles.h"

namespace fastdense {

// What a chunk of eight channels reads: one of `window` chunks at one of the taps is an item, two items are the depth
// of a product.
class GroupedItems {
 public:
  FASTDENSE_HD GroupedItems(const GroupedTaps& taps, int window) : taps_(taps), window_(window) {}
  FASTDENSE_HD int count(int c) const { return taps_.of_class(c) * window_; }
  FASTDENSE_HD int steps(int c) const { return (count(c) + 1) / 2; }
  // Of a class in a table of all, whose parts are whole products by two.
  FASTDENSE_HD int first(int c) const {
    int at = 0;
    for (int before = 0; before < c; ++before) at += (count(before) + 3) / 4 * 4;
    return at;
  }
  FASTDENSE_HD int all() const { return first(taps_.classes()); }
  FASTDENSE_HD int chunk(int item) const { return item % window_; }
  // Line and column of an item, as i of GroupedTaps.
  FASTDENSE_HD int line(int item, int c) const {
    return taps_.first() + item / window_ / taps_.count(taps_.parity_x(c));
  }
  FASTDENSE_HD int column(int item, int c) const {
    return taps_.first() + item / window_ % taps_.count(taps_.parity_x(c));
  }
  FASTDENSE_HD int tap(int item, int c) const {
    return taps_.tap(line(item, c), taps_.parity_y(c)) * 3 + taps_.tap(column(item, c), taps_.parity_x(c));
  }
  // The first chunk that chunk `to` reads of the `chunks` of a part.
  FASTDENSE_HD int first_chunk(int to, int chunks, int group) const {
    constexpr int kNumbers = 8;
    const int first = to * kNumbers / group * group / kNumbers;
    return first + window_ <= chunks ? first : chunks - window_;
  }

 private:
  const GroupedTaps taps_;
  const int window_;
};

// Distances in bytes: of each item from the place of a pixel, and of the places of pixels from the start.
class GroupedDistances {
 public:
  static FASTDENSE_HD int bytes(const GroupedItems& items) { return (items.all() + kGroupedPixels) * int(sizeof(int)); }
  // Writes the tables: readers need a barrier.
  __device__ GroupedDistances(const GroupedTiles& t, const GroupedTaps& taps, const GroupedItems& items, int stride,
                              unsigned char* shared)
      : item_(reinterpret_cast<int*>(shared)), pixel_(item_ + items.all()) {
    for (int c = 0; c < taps.classes(); ++c)
      for (int i = int(threadIdx.x); i < (items.count(c) + 3) / 4 * 4; i += kGroupedThreads) {
        const int item = i < items.count(c) ? i : items.count(c) - 1;  // beyond the last the weight is zero
        const int place = items.line(item, c) * t.pitch + t.place(items.column(item, c));
        item_[items.first(c) + i] = place * stride + items.chunk(item) * kChunk;
      }
    const int pixels = t.pixels();
    for (int p = int(threadIdx.x); p < kGroupedPixels; p += kGroupedThreads) {
      const int existing = p < pixels ? p : pixels - 1;
      pixel_[p] = t.base(existing / t.columns, existing % t.columns) * stride;
    }
  }
  __device__ int of_item(int i) const { return item_[i]; }
  __device__ int of_pixel(int p) const { return pixel_[p]; }

 private:
  int *const item_, *const pixel_;
};

// On tensor cores, for types of two bytes.  kWide: chunks of the result side by side that read the same chunks.
template <typename T, int kWide>
class GroupedProducts {
  static_assert(sizeof(T) == 2);
  static constexpr int kTall = 4 / kWide, kBatch = kTall * kGroupedSteps;  // pixels that a warp takes at once
  static constexpr int kBlock = 8 * kChunk;                                // bytes of the weight of an item

 public:
  static FASTDENSE_HD int weight_bytes(const GroupedPlan& plan, const GroupedTaps& taps) {
    return plan.channels / kChunkNumbers<T> * GroupedItems(taps, plan.window).all() * kBlock;
  }
  static FASTDENSE_HD int table_bytes(const GroupedPlan& plan, const GroupedTaps& taps) {
    return GroupedDistances::bytes(GroupedItems(taps, plan.window));
  }

  // stride: bytes from place to place, and from pixel to pixel of the result.
  __device__ GroupedProducts(const GroupedPlan& plan, const GroupedTaps& taps, int channels, int stride,
                             unsigned char* weight, unsigned char* table)
      : taps_(taps),
        items_(taps, plan.window),
        group_(plan.group),
        pixels_(plan.tiles.pixels()),
        chunks_(channels / kChunkNumbers<T>),
        stride_(stride),
        weight_(weight),
        distances_(plan.tiles, taps, items_, stride, table) {}

  // The part's weight, zeros where channels belong to different groups; readers need a barrier.
  __device__ void load_weight(const T* weight) const {
    const GroupedWeight from{group_, taps_.reversed};
    const int all = items_.all();
    for (int c = 0; c < taps_.classes(); ++c) {
      const int first = items_.first(c), count = (items_.count(c) + 3) / 4 * 4;
      for (int e = int(threadIdx.x); e < chunks_ * count * 8; e += kGroupedThreads) {
        const int row = e % 8, item = e / 8 % count, chunk = e / 8 / count, to = 8 * chunk + row;
        const int read = 8 * (items_.first_chunk(chunk, chunks_, group_) + items_.chunk(item));
        Vector<T, 8> v{};
        if (item < items_.count(c)) {
          const int tap = items_.tap(item, c);
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if ((read + i) / group_ == to / group_) v.v[i] = weight[from.at(to, read + i, tap)];
        }
        *reinterpret_cast<Vector<T, 8>*>(weight_ + (chunk * all + first + item) * kBlock + row * kChunk) = v;
      }
    }
  }

  // to [pixels] = the results at a class of pixels, rounded.
  __device__ void multiply(const unsigned char* source, int c, unsigned char* to) const {
    const int lane = int(threadIdx.x) % 32, sets = chunks_ / kWide, batches = (pixels_ + kBatch - 1) / kBatch;
    for (int task = int(threadIdx.x) / 32; task < sets * batches; task += kGroupedWarps) {
      const int chunk = task % sets * kWide, first = task / sets * kBatch;
      int left[kTall];
#pragma unroll
      for (int m = 0; m < kTall; ++m) {
        const int pixel = first + m * kGroupedSteps + lane % 16;
        left[m] =
            distances_.of_pixel(pixel < pixels_ ? pixel : 0) + items_.first_chunk(chunk, chunks_, group_) * kChunk;
      }
      float sum[kTall][kWide][4] = {};
      multiply(source, left, chunk * items_.all() * kBlock, c, sum);
      store_sums(sum, first, to + chunk * kChunk);
    }
  }

 private:
  __device__ __forceinline__ void multiply(const unsigned char* source, const int (&left)[kTall], int right, int c,
                                           float (&sum)[kTall][kWide][4]) const {
    const int lane = int(threadIdx.x) % 32, begin = items_.first(c), steps = items_.steps(c), all = items_.all();
    for (int step = 0; step < steps; step += 2) {
      uint32_t b[kWide][4];
#pragma unroll
      for (int w = 0; w < kWide; ++w)
        load_matrices(b[w], weight_ + right + (w * all + begin + 2 * step) * kBlock + lane * kChunk);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (step + half == steps) break;
        const int distance = distances_.of_item(begin + 2 * (step + half) + lane / 16);
#pragma unroll
        for (int m = 0; m < kTall; ++m) {
          uint32_t a[4];
          load_matrices(a, source + left[m] + distance);
#pragma unroll
          for (int w = 0; w < kWide; ++w) multiply_add<T>(sum[m][w], a, b[w][2 * half], b[w][2 * half + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_sums(const float (&sum)[kTall][kWide][4], int first, unsigned char* to) const {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < kTall; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = first + m * kGroupedSteps + 8 * half + lane / 4;
        if (pixel >= pixels_) continue;
#pragma unroll
        for (int w = 0; w < kWide; ++w)
          *reinterpret_cast<uint32_t*>(to + pixel * stride_ + w * kChunk + lane % 4 * 4) =
              pack_pair<T>(sum[m][w][2 * half], sum[m][w][2 * half + 1]);
      }
  }

  const GroupedTaps taps_;
  const GroupedItems items_;
  const int group_, pixels_, chunks_, stride_;
  unsigned char* const weight_;
  const GroupedDistances distances_;
};

// kSide numbers side by side.
template <int kSide>
__device__ __forceinline__ void load_side(const float* at, float (&v)[kSide]) {
  if constexpr (kSide == 3) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) v[i] = at[i];
  } else {
    const auto all = *reinterpret_cast<const Vector<float, kSide>*>(at);
#pragma unroll
    for (int i = 0; i < kSide; ++i) v[i] = all.v[i];
  }
}

// By multiply-adds, for float: a thread takes four pixels beside each other and kSide channels of a group.
template <int kSide>
class GroupedProducts<float, kSide> {
  static constexpr int kPixels = 4;

 public:
  static FASTDENSE_HD int weight_bytes(const GroupedPlan& plan, const GroupedTaps&) {
    return kTaps * plan.group * plan.channels * int(sizeof(float));
  }
  static FASTDENSE_HD int table_bytes(const GroupedPlan&, const GroupedTaps&) { return 0; }

  __device__ GroupedProducts(const GroupedPlan& plan, const GroupedTaps& taps, int channels, int stride,
                             unsigned char* weight, unsigned char*)
      : tiles_(plan.tiles),
        taps_(taps),
        group_(plan.group),
        channels_(channels),
        stride_(stride),
        weight_(reinterpret_cast<float*>(weight)) {}

  // The part's weight as [tap][channel of the group that is read][channel]; readers need a barrier.
  __device__ void load_weight(const float* weight) const {
    const GroupedWeight from{group_, taps_.reversed};
    for (int e = int(threadIdx.x); e < kTaps * group_ * channels_; e += kGroupedThreads) {
      const int to = e % channels_, read = e / channels_ % group_, tap = e / channels_ / group_;
      weight_[e] = weight[from.at(to, to / group_ * group_ + read, tap)];
    }
  }

  // to [pixels] = the results at a class of pixels.
  __device__ void multiply(const unsigned char* source, int c, unsigned char* to) const {
    const int across = (tiles_.columns + kPixels - 1) / kPixels, sides = channels_ / kSide;
    for (int task = int(threadIdx.x); task < tiles_.rows * across * sides; task += kGroupedThreads) {
      const int channel = task % sides * kSide, y = task / sides / across, x = task / sides % across * kPixels;
      float sum[kPixels][kSide] = {};
      const unsigned char* at = source + tiles_.base(y, x) * stride_ + channel / group_ * group_ * int(sizeof(float));
      if (taps_.reversed || tiles_.step == 1) {
        add_lines<1>(at, channel, c, sum);
      } else {
        add_lines<2>(at, channel, c, sum);
      }
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        if (x + p >= tiles_.columns) break;
        auto* result = reinterpret_cast<float*>(to + (y * tiles_.columns + x + p) * stride_) + channel;
#pragma unroll
        for (int i = 0; i < kSide; ++i) result[i] = sum[p][i];
      }
    }
  }

 private:
  template <int kStep>
  __device__ __forceinline__ void add_lines(const unsigned char* at, int channel, int c,
                                            float (&sum)[kPixels][kSide]) const {
    const int parity = taps_.parity_y(c), end = taps_.first() + taps_.count(parity);
#pragma unroll 1
    for (int i = taps_.first(); i < end; ++i)
#pragma unroll 1
      for (int read = 0; read < group_; read += kSide)
        add_line<kStep>(at + i * tiles_.pitch * stride_ + read * int(sizeof(float)),
                        weight_ + (taps_.tap(i, parity) * 3 * group_ + read) * channels_ + channel, taps_.parity_x(c),
                        sum);
  }

  // Of one line of what the pixels read, kSide channels from `at` on.
  template <int kStep>
  __device__ __forceinline__ void add_line(const unsigned char* at, const float* weight, int parity,
                                           float (&sum)[kPixels][kSide]) const {
    constexpr int kEven = kPixels + (kStep == 1 ? 2 : 1), kOdd = kStep == 1 ? 0 : kPixels;
    float v[kEven + kOdd][kSide];
#pragma unroll
    for (int p = 0; p < kEven + kOdd; ++p) {
      const int place = p < kEven ? p : tiles_.pitch / 2 + p - kEven;
      load_side(reinterpret_cast<const float*>(at + place * stride_), v[p]);
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if (j < taps_.first() || j >= taps_.first() + taps_.count(parity)) continue;
      const float* of_tap = weight + taps_.tap(j, parity) * group_ * channels_;
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        float w[kSide];
        load_side(of_tap + i * channels_, w);
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const int read = kStep == 1 ? p + j : j % 2 == 1 ? kEven + p : p + j / 2;
#pragma unroll
          for (int o = 0; o < kSide; ++o) sum[p][o] = mul_add(v[read][i], w[o], sum[p][o]);
        }
      }
    }
  }

  const GroupedTiles& tiles_;
  const GroupedTaps taps_;
  const int group_, channels_, stride_;
  float* const weight_;
};

}  // namespace fastdense
