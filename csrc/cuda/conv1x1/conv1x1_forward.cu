// SPDX-License-Identifier: Apache-2.0
// Forward kernel of cuda/conv1x1/conv1x1_launch.h.  A block takes tiles of rows in turns, with all columns of the
// result, and walks along the prefix in steps of 128 bytes a row: copies fill one stage while products read another.
#include <algorithm>

#include "cuda/conv1x1/conv1x1_launch.h"
#include "cuda/conv1x1/conv1x1_tiles.h"
#include "cuda/norm_relu/block_moments.h"
#include "cuda/smem_tile.h"

namespace fastdense {
namespace {

// How a block shares out its tile: warps side by side in rows and columns, each with a part of at most 32 rows.
template <typename T, int kTileRows, int kTileWidth>
struct ForwardShape {
  static constexpr int kRows = kTileRows, kWidth = kTileWidth, kDepth = kStepBytes / int(sizeof(T));
  static constexpr int kWarpRows = kRows == 128 ? 32 : 16, kRowWarps = kRows / kWarpRows;
  static constexpr int kColumnWarps = kWidth == 48 ? 1 : kWidth == 192 ? 3 : 2, kWarpColumns = kWidth / kColumnWarps;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;

  using Tile = SmemTile<T, kDepth>;    // of x, and of the weight
  using Result = SmemTile<T, kWidth>;  // of z, where the stages were
  static constexpr int kXBytes = Tile::bytes(kRows), kStageBytes = kXBytes + Tile::bytes(kWidth);
  static constexpr int kScalesBytes = 2 * kDepth * int(sizeof(ChannelScale));
  static constexpr int kStages = 3 * kStageBytes + kScalesBytes <= kMostSharedBytes ? 3 : 2;
  static constexpr int kSumsAt = Result::bytes(kRows);
  // Means and M2 of the block's tiles so far [2][kWidth] outlast a tile.
  static constexpr int kMomentsAt =
      std::max(kStages * kStageBytes + kScalesBytes, kSumsAt + kRowWarps * kWidth * int(sizeof(float)));
  static constexpr int kSharedBytes = kMomentsAt + 2 * kWidth * int(sizeof(float));
  static_assert(kSharedBytes <= kMostSharedBytes && finish_bytes(kThreads) <= kMomentsAt);

  static constexpr int kSums = kWarpRows * kWarpColumns / 32;  // that a thread holds
  static constexpr int kLeastBlocks = least_blocks(kThreads, kSharedBytes, kSums > (sizeof(T) == 4 ? 48 : 64));
};

template <typename T, typename Shape>
class ForwardBlock {
  using Tile = typename Shape::Tile;
  static constexpr int kBlocks = Shape::kWarpColumns / 16;  // of 16 columns
  static constexpr int kPerWord = 4 / int(sizeof(T));

 public:
  __device__ ForwardBlock(const Conv1x1Params<T>& p, int64_t rows, int columns, int access, unsigned char* shared)
      : p_(p),
        shared_(shared),
        rows_(rows),
        columns_(columns),
        x_{p.x, 0, columns, access},
        weight_{p.weight, Shape::kWidth, columns, access} {}

  __device__ void run() {
    for (int i = int(threadIdx.x); i < Shape::kWidth; i += Shape::kThreads) mean_of(i) = m2_of(i) = 0;
    for (; first_row() < rows_; ++done_) {
      count_ = rows_ - first_row() < Shape::kRows ? int(rows_ - first_row()) : Shape::kRows;
      forget(warp_);  // else the tile's addresses fill the registers
      forget(lane_);
      run_tile();
      if (p_.moments.partial) statistics();
    }
    if (p_.moments.partial) write_moments();
  }

 private:
  __device__ void run_tile() {
    const int steps = (columns_ + Shape::kDepth - 1) / Shape::kDepth;
    x_.matrix = p_.x.from_row(first_row());
    x_.rows = count_;
#pragma unroll
    for (int i = 0; i < Shape::kWarpRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[i][j][e] = 0;
    store_scales(0, numbers_of(0));
#pragma unroll
    for (int step = 0; step < Shape::kStages - 1; ++step) copy_step(step, steps);
    for (int step = 0; step < steps; ++step) {
      wait_copies<Shape::kStages - 2>();
      __syncthreads();
      copy_step(step + Shape::kStages - 1, steps);  // over what was read one step ago
      const NormNumbers next = numbers_of(step + 1);
      multiply(step);
      store_scales(step + 1, next);
    }
    wait_copies<0>();
    __syncthreads();  // the result takes the place of the stages
    if (p_.behind.mean) activate();
    store_result();
    __syncthreads();  // the next tile's copies go over it
  }

  __device__ int64_t first_row() const { return (int64_t(done_) * gridDim.x + blockIdx.x) * Shape::kRows; }
  // This warp's part of the tile.
  __device__ int row0() const { return warp_ % Shape::kRowWarps * Shape::kWarpRows; }
  __device__ int column0() const { return warp_ / Shape::kRowWarps * Shape::kWarpColumns; }
  __device__ unsigned char* stage(int step) const { return shared_ + step % Shape::kStages * Shape::kStageBytes; }
  // Scales and shifts of the channels of a step; two places take turns.
  __device__ ChannelScale* scales(int step) const {
    return reinterpret_cast<ChannelScale*>(shared_ + Shape::kStages * Shape::kStageBytes) + step % 2 * Shape::kDepth;
  }

  __device__ void copy_step(int step, int steps) const {
    if (step < steps) {
      const Tile x(stage(step)), weight(stage(step) + Shape::kXBytes);
      copy_tile<Shape::kRows, Shape::kThreads>(x, x_, step * Shape::kDepth);
      copy_tile<Shape::kWidth, Shape::kThreads>(weight, weight_, step * Shape::kDepth);
    }
    commit_copies();
  }

  // A thread a channel.
  __device__ NormNumbers numbers_of(int step) const {
    const int channel = step * Shape::kDepth + int(threadIdx.x);
    return int(threadIdx.x) < Shape::kDepth && channel < columns_ ? NormNumbers(p_.norm, channel) : NormNumbers();
  }
  __device__ void store_scales(int step, const NormNumbers& numbers) const {
    if (int(threadIdx.x) < Shape::kDepth) scales(step)[threadIdx.x] = numbers.scale(p_.norm.eps);
  }

  __device__ void multiply(int step) {
    const Tile x(stage(step)), weight(stage(step) + Shape::kXBytes);
    const ChannelScale* scale = scales(step);
#pragma unroll
    for (int k = 0; k < Shape::kDepth; k += Tile::kDepth) {
      ChannelScale s[2][kPerWord];  // of the channels in the lane's words
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < kPerWord; ++n) s[i][n] = scale[k + (lane_ % 4 + 4 * i) * kPerWord + n];
      uint32_t a[Shape::kWarpRows / 16][4];
#pragma unroll
      for (int i = 0; i < Shape::kWarpRows / 16; ++i) {
        x.left_as_stored(a[i], row0() + 16 * i, k, lane_);
#pragma unroll
        for (int w = 0; w < 4; ++w) a[i][w] = activated<T>(a[i][w], s[w / 2]);
      }
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const RightPair b = weight.right_of_rows(column0() + 16 * j, k, lane_);
#pragma unroll
        for (int i = 0; i < Shape::kWarpRows / 16; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) multiply_add<T>(sum_[i][2 * j + h], a[i], b.words[h][0], b.words[h][1]);
      }
    }
  }

  // Sums become relu(norm(z)).
  __device__ void activate() {
#pragma unroll
    for (int j = 0; j < 2 * kBlocks; ++j)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = column0() + 8 * j + lane_ % 4 * 2 + n;
        const ChannelScale s = NormNumbers(p_.behind, column).scale(p_.behind.eps);
#pragma unroll
        for (int i = 0; i < Shape::kWarpRows / 16; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& v = sum_[i][j][2 * h + n];
            v = norm_relu(load(store<T>(v)), s.scale, s.shift);
          }
      }
  }

  // Rounds the sums to what is stored, and stores it.
  __device__ void store_result() {
    const typename Shape::Result z(shared_);
#pragma unroll
    for (int i = 0; i < Shape::kWarpRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float (&v)[4] = sum_[i][j];
          uint32_t* to = z.word(row0() + 16 * i + 8 * h + lane_ / 4, column0() + 8 * j + lane_ % 4 * 2);
          store_pair<T>(to, v[2 * h], v[2 * h + 1]);
        }
    __syncthreads();
    write_tile<Shape::kRows, Shape::kThreads>(
        z, TileMatrix<T>{p_.z.from_row(first_row()), count_, Shape::kWidth, kChunkBytes}, 0);
  }

  // Mean and M2 of what was stored, around the tile's own mean, join those of the tiles before.
  __device__ void statistics() {
    float mean[2 * kBlocks][2] = {};
    add_up([&](float v, int, int) { return v; });
#pragma unroll
    for (int j = 0; j < 2 * kBlocks; ++j)
#pragma unroll
      for (int n = 0; n < 2; ++n) mean[j][n] = total(column0() + 8 * j + lane_ % 4 * 2 + n) / float(count_);
    for (int i = int(threadIdx.x); i < Shape::kWidth; i += Shape::kThreads) tile_mean(i) = total(i) / float(count_);
    __syncthreads();  // all have read before anybody writes anew
    add_up([&](float v, int j, int n) { return (v - mean[j][n]) * (v - mean[j][n]); });
    for (int i = int(threadIdx.x); i < Shape::kWidth; i += Shape::kThreads) {
      const Moments<float> all = combine_moments<float>({float(done_ * Shape::kRows), mean_of(i), m2_of(i)},
                                                        {float(count_), tile_mean(i), total(i)});
      mean_of(i) = all.mean;
      m2_of(i) = all.m2;
    }
    __syncthreads();  // the next tile's copies go over the sums
  }

  __device__ void write_moments() const {
    const BlockMoments& m = p_.moments;
    float* partial = m.partial + 2 * int64_t(blockIdx.x) * Shape::kWidth;
    for (int i = int(threadIdx.x); i < Shape::kWidth; i += Shape::kThreads) {
      partial[i] = mean_of(i);
      partial[Shape::kWidth + i] = m2_of(i);
    }
    if (threadIdx.x == 0 && m.counts) m.counts[blockIdx.x] = done_ > 0 ? int64_t(done_ - 1) * Shape::kRows + count_ : 0;
    finish_moments<Shape::kThreads>(m, Shape::kWidth, shared_);
  }

  // A column's moments, always the same thread's; those of the tiles before, and of this one.
  __device__ float& mean_of(int i) const { return reinterpret_cast<float*>(shared_ + Shape::kMomentsAt)[i]; }
  __device__ float& m2_of(int i) const { return (&mean_of(i))[Shape::kWidth]; }
  __device__ float& tile_mean(int i) const { return reinterpret_cast<float*>(shared_)[i]; }  // where z was
  __device__ float* sums() const { return reinterpret_cast<float*>(shared_ + Shape::kSumsAt); }
  // Sums of term(v, j, n) over the rows that exist, by warps.
  template <typename Term>
  __device__ void add_up(const Term& term) const {
#pragma unroll
    for (int j = 0; j < 2 * kBlocks; ++j)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < Shape::kWarpRows / 16; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (row0() + 16 * i + 8 * h + lane_ / 4 < count_) s += term(sum_[i][j][2 * h + n], j, n);
        s = sum_of_column(s);
        if (lane_ < 4) sums()[warp_ % Shape::kRowWarps * Shape::kWidth + column0() + 8 * j + lane_ % 4 * 2 + n] = s;
      }
    __syncthreads();
  }
  __device__ float total(int column) const {
    float s = 0;
#pragma unroll
    for (int w = 0; w < Shape::kRowWarps; ++w) s += sums()[w * Shape::kWidth + column];
    return s;
  }

  const Conv1x1Params<T>& p_;
  unsigned char* const shared_;
  const int64_t rows_;
  int done_ = 0;       // tiles, whole ones
  int count_ = 0;      // rows of this tile that exist
  const int columns_;  // of x
  TileMatrix<const T> x_;
  const TileMatrix<const T> weight_;
  int warp_ = int(threadIdx.x) / 32, lane_ = int(threadIdx.x) % 32;
  float sum_[Shape::kWarpRows / 16][2 * kBlocks][4];
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kLeastBlocks)
    conv1x1_kernel(const __grid_constant__ Conv1x1Params<T> p, int64_t rows, int columns, int access) {
  wait_for_kernels_before();
  if constexpr (kTensorCores) {
    FASTDENSE_SHARED(shared);
    ForwardBlock<T, Shape>(p, rows, columns, access, shared).run();
  }
}

template <typename T, int kWidth, int kRows>
cudaError_t launch(const Conv1x1Params<T>& p, int64_t rows, int64_t columns, int64_t blocks, cudaStream_t stream) {
  using Shape = ForwardShape<T, kRows, kWidth>;
  const cudaError_t error = FASTDENSE_ALLOW_SHARED((conv1x1_kernel<T, Shape>), Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  FASTDENSE_LAUNCH((conv1x1_kernel<T, Shape>), dim3(unsigned(blocks)), dim3(Shape::kThreads), Shape::kSharedBytes,
                   stream, p, rows, int(columns), std::min(access_bytes(p.x), access_bytes(p.weight)));
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t launch_conv1x1(const Conv1x1Params<T>& p, int64_t rows, int64_t columns, int64_t width, int64_t tile,
                           int64_t blocks, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return with_width(width, [&](auto w) {
    constexpr int kWidth = w();
    if constexpr (sizeof(T) == 2 || kWidth <= 128) {
      if (tile == 128) return launch<T, kWidth, 128>(p, rows, columns, blocks, stream);
    }
    return tile == 64 ? launch<T, kWidth, 64>(p, rows, columns, blocks, stream)
                      : launch<T, kWidth, 32>(p, rows, columns, blocks, stream);
  });
}

#define FASTDENSE_FORWARD(T)                                                                                   \
  template cudaError_t launch_conv1x1<T>(const Conv1x1Params<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                         cudaStream_t);
FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(FASTDENSE_FORWARD)
#undef FASTDENSE_FORWARD

}  // namespace fastdense
