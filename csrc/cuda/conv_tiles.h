// SPDX-License-Identifier: Apache-2.0
// What the fused 3x3 kernels share: rows of pixels in shared memory, and the loop over tiles; included by .cu files
// only.
#pragma once

#include "cuda/mma.h"
#include "cuda/norm_relu/columns.h"

namespace fastdense {

constexpr int kChunk = 16;  // bytes of the widest access
template <typename T>
constexpr int kChunkNumbers = kChunk / int(sizeof(T));
constexpr int kTaps = 9;

FASTDENSE_HD constexpr int chunks_of(int64_t bytes) { return int((bytes + kChunk - 1) / kChunk); }
// Bytes from row to row in shared memory: an odd number of chunks, so that eight rows lie in all banks.
FASTDENSE_HD constexpr int row_stride(int chunks) { return (chunks | 1) * kChunk; }

// Shared memory, taken piece by piece in the same order on host and device.
class SharedLayout {
 public:
  FASTDENSE_HD int take(int64_t bytes) {
    const int at = size_;
    size_ += int((bytes + 127) / 128 * 128);
    return at;
  }
  FASTDENSE_HD int size() const { return size_; }

 private:
  int size_ = 0;
};

// body(pixel, chunk) for what falls to this thread, in an order that gives a thread few chunks and many pixels.
template <int kThreads, typename Body>
__device__ __forceinline__ void for_each_chunk(int pixels, int chunks, const Body& body) {
  constexpr int kAcross = 8;
  for (int chunk = int(threadIdx.x) % kAcross; chunk < chunks; chunk += kAcross)
    for (int p = int(threadIdx.x) / kAcross; p < pixels; p += kThreads / kAcross) body(p, chunk);
}

// Copies a row of `bytes` to shared memory, or clears it, in pieces that its address allows: 16, 8 or 4 bytes.
__device__ __forceinline__ void copy_chunk(unsigned char* to, const unsigned char* from, int bytes, int piece) {
  if (piece == 16) {
    copy_async<16>(to, from, bytes);
  } else if (piece == 8) {
    for (int at = 0; at < kChunk; at += 8) {
      const int valid = bytes - at < 0 ? 0 : bytes - at < 8 ? bytes - at : 8;
      copy_async<8>(to + at, valid > 0 ? from + at : from, valid);
    }
  } else {
    for (int at = 0; at < kChunk; at += 4) {
      const int valid = bytes - at < 4 ? 0 : 4;
      copy_async<4>(to + at, valid > 0 ? from + at : from, valid);
    }
  }
}

// The widest piece that rows of `bytes` from an aligned address on allow.
FASTDENSE_HD constexpr int widest_piece(int64_t bytes) { return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4; }

// Rows [pixels][chunks] of a tile from the first `channels` of a matrix's rows, zeros beyond these; row_of(p) is -1
// where there is none and zeros take its place.
template <int kThreads, typename T, typename RowOf>
__device__ __forceinline__ void copy_pixels(unsigned char* to, int stride, int pixels, int chunks, const T* from,
                                            int64_t ld, int channels, const RowOf& row_of) {
  const int bytes = channels * int(sizeof(T)), piece = widest_piece(ld * int64_t(sizeof(T)));
  for_each_chunk<kThreads>(pixels, chunks, [&](int p, int chunk) {
    const int64_t row = row_of(p);
    const int left = row < 0 ? 0 : bytes - chunk * kChunk;
    const auto* source = reinterpret_cast<const unsigned char*>(from);
    copy_chunk(to + p * stride + chunk * kChunk,
               left > 0 ? source + row * ld * int64_t(sizeof(T)) + chunk * kChunk : source,
               left < 0        ? 0
               : left < kChunk ? left
                               : kChunk,
               piece);
  });
}

// z becomes u = relu(norm(z)) in the chunks that this thread copied; rounded as Activate does.  What lies outside the
// image stays zero.
template <int kThreads, typename T, typename RowOf>
__device__ __forceinline__ void activate_pixels(unsigned char* z, int stride, int pixels, int channels,
                                                const float* scale, const float* shift, const RowOf& row_of) {
  constexpr int V = kChunkNumbers<T>;
  int known = -1;
  float a[V], b[V];
  for_each_chunk<kThreads>(pixels, chunks_of(channels * int(sizeof(T))), [&](int p, int chunk) {
    if (chunk != known) {
      known = chunk;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] = scale[chunk * V + i];
        b[i] = shift[chunk * V + i];
      }
    }
    if (row_of(p) < 0) return;
    auto* at = reinterpret_cast<Vector<T, V>*>(z + p * stride + chunk * kChunk);
    Vector<T, V> v = *at;
#pragma unroll
    for (int i = 0; i < V; ++i) v.v[i] = store<T>(norm_relu(load(v.v[i]), a[i], b[i]));
    *at = v;
  });
}

// The tiles of a plan in turns; Place(tiles, n) is where tile n lies.  A kernel's class has
//   load_tile(place, buffer)      starts the copies of a tile into a buffer
//   prepare_tile(place, buffer)   behind the copies of this thread: what it makes of them
//   multiply_tile(buffer)         behind a barrier: the last that reads the buffer
//   finish_tile(first)            behind another: the rest, for the first tile of this block or a later one
// With two buffers the copies of the next tile are under way from the start, with one while the last part works.
template <typename Place, typename Plan, typename Block>
__device__ __forceinline__ void for_each_tile(const Plan& plan, Block& block) {
  const int64_t tiles = plan.tiles.count();
  int64_t tile = blockIdx.x;
  if (tile < tiles) block.load_tile(Place(plan.tiles, tile), 0);
  for (int buffer = 0; tile < tiles; tile += gridDim.x) {
    const int64_t next = tile + gridDim.x;
    if (plan.buffers == 2 && next < tiles) {
      block.load_tile(Place(plan.tiles, next), buffer ^ 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    block.prepare_tile(Place(plan.tiles, tile), buffer);
    __syncthreads();  // the tile is there
    block.multiply_tile(buffer);
    __syncthreads();  // the buffer is free
    if (plan.buffers == 1 && next < tiles) block.load_tile(Place(plan.tiles, next), 0);
    if (plan.buffers == 2) buffer ^= 1;
    block.finish_tile(tile == blockIdx.x);
  }
}

}  // namespace fastdense
