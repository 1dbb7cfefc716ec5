// SPDX-License-Identifier: Apache-2.0
// What the blocks of the forward kernel and of the input's gradient share: tiles of a source in shared memory,
// products, and the way out, in which a thread takes a chunk of channels of every so many pixels; included by .cu files
// only.
#pragma once

#include "cuda/grouped_conv/grouped_conv_products.h"
#include "cuda/norm_relu/block_moments.h"

namespace fastdense {

// What a block holds in shared memory; host and device agree on it.
template <typename T>
struct GroupedLayout {
  int stride;  // bytes from place to place
  int source, source_bytes, weight, table, result, norm, pixels, bytes;
  FASTDENSE_HD GroupedLayout(const GroupedPlan& plan, const GroupedTaps& taps) {
    using Products = GroupedProducts<T, sizeof(T) == 2 ? 1 : 4>;  // of any variant
    SharedLayout shared;
    stride = row_stride(plan.channels / kChunkNumbers<T>);
    source_bytes = plan.tiles.places() * stride;
    source = shared.take(int64_t(plan.buffers) * source_bytes);
    weight = shared.take(Products::weight_bytes(plan, taps));
    table = shared.take(Products::table_bytes(plan, taps));
    const int most_sums = ColumnMoments<float, kChunkNumbers<T>>::kNumbers * kGroupedThreads / 2 * int(sizeof(float));
    const int joins = most_sums > finish_bytes(kGroupedThreads) ? most_sums : finish_bytes(kGroupedThreads);
    const int results = plan.tiles.pixels() * stride;
    result = shared.take(results > joins ? results : joins);
    norm = shared.take(GroupedNorm::bytes(plan.channels));
    pixels = shared.take(GroupedPixels::bytes(plan.tiles));
    bytes = shared.size();
  }
};

template <typename T, int kVariant>
class GroupedBlock {
 protected:
  static constexpr int V = kChunkNumbers<T>;
  // Pixels of a tile for each of the lanes that share a chunk.
  static constexpr int kRows = kGroupedPixels / (kGroupedThreads / 8);

  __device__ GroupedBlock(const GroupedPlan& plan, const GroupedTaps& taps, int width, unsigned char* shared)
      : plan_(plan),
        at_(plan, taps),
        shared_(shared),
        width_(width),
        first_(int(blockIdx.y) * plan.channels),
        channels_(width - first_ < plan.channels ? width - first_ : plan.channels),
        lanes_(int(power_of_two_up_to(unsigned(kGroupedThreads / (channels_ / V))))),
        chunk_(int(threadIdx.x) % (channels_ / V)),
        lane_(int(threadIdx.x) / (channels_ / V)),
        norm_(shared + at_.norm, plan.channels),
        pixels_(plan.tiles, shared + at_.pixels),
        place_(plan.tiles, blockIdx.x),
        products_(plan, taps, channels_, at_.stride, shared + at_.weight, shared + at_.table) {}

  // Everything that stays; ends with a barrier.
  __device__ void load_all(const T* weight, const NormParams<float>& norm) const {
    products_.load_weight(weight + int64_t(first_) * kTaps * plan_.group);
    norm_.load(norm, first_, channels_);
    __syncthreads();
  }
  __device__ void load_source(const T* from, const GroupedPlace& place, int buffer) const {
    copy_pixels<kGroupedThreads>(source(buffer), at_.stride, plan_.tiles.places(), channels_ / V, from + first_, width_,
                                 channels_, [&](int p) { return pixels_.source_row(place, p); });
    commit_copies();
  }
  __device__ void multiply(int buffer, int c) const { products_.multiply(source(buffer), c, shared_ + at_.result); }

  __device__ unsigned char* source(int buffer) const { return shared_ + at_.source + buffer * at_.source_bytes; }
  // This thread's chunk of the result at a pixel.
  __device__ Vector<T, V> result(int p) const {
    return *reinterpret_cast<const Vector<T, V>*>(shared_ + at_.result + p * at_.stride + chunk_ * kChunk);
  }
  // Whether this thread is one of the lanes.
  __device__ bool takes_part() const { return lane_ < lanes_; }
  // The states of all lanes, joined in lane 0.
  template <typename State>
  __device__ void join(State& state) const {
    join_lanes<float>(state, shared_ + at_.result,
                      {unsigned(chunk_), unsigned(channels_ / V), unsigned(lane_), unsigned(lanes_)});
  }
  // Two numbers a column of this thread's chunk go to partial [splits][2][width].
  template <typename State>
  __device__ void write_partial(State& state, const float (&shift)[V], float* partial) const {
    if (lane_ > 0) return;
    float* to = partial + 2 * int64_t(blockIdx.x) * width_ + first_ + chunk_ * V;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      to[i] = state.first(i) + shift[i];
      to[width_ + i] = state.second(i);
    }
  }

  const GroupedPlan& plan_;
  const GroupedLayout<T> at_;
  unsigned char* const shared_;
  const int width_, first_, channels_, lanes_, chunk_, lane_;
  const GroupedNorm norm_;
  const GroupedPixels pixels_;
  GroupedPlace place_;  // of the tile in work
  const GroupedProducts<T, kVariant> products_;
};

}  // namespace fastdense
