// SPDX-License-Identifier: Apache-2.0
// Backward kernels of cuda/conv1x1/conv1x1_launch.h.  A block owns a run of the prefix's channels and takes tiles of
// rows in turns with the other splits: the product with the weight needs all of the result's columns for these
// channels, that with dz all rows, so that one reading of x and of the gradient serves both.  The sums of the weight's
// gradient and of the norm stay in registers for the block's whole life.
#include <algorithm>

#include "cuda/conv1x1/conv1x1_launch.h"
#include "cuda/conv1x1/conv1x1_tiles.h"
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"
#include "cuda/smem_tile.h"

namespace fastdense {
namespace {

// How a block's warps share out dy [kRows][kColumns] and dweight [kWidth][kColumns], each in parts of whole 16 rows and
// columns.
template <typename T, int kTileWidth>
struct BackwardShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWidth = kTileWidth, kColumns = int(conv1x1_backward_columns<T>());
  // Of a tile: as many as leave room for two stages.
  static constexpr int kRows = kWide ? (kWidth == 48 ? 48 : 32) : kWidth == 192 ? 32 : 64;
  // Where registers hold the weight of a warp's columns, or most of it, it has few of these and 32 rows of dy, not 16.
  // That is for so many steps of the product; more of them would spill.
  static constexpr int kKeptSteps = !kWide && (kWidth == 96 || kWidth == 128) ? 6 : 0;
  static constexpr bool kKeepsWeight = kKeptSteps > 0;
  static constexpr int kRowBlocks = kKeepsWeight ? 2 : 1, kRowWarps = kRows / (16 * kRowBlocks);
  static constexpr int kColumnWarps = kKeepsWeight || (!kWide && kWidth == 192) ? 4 : !kWide && kWidth == 48 ? 1 : 2;
  static constexpr int kWarps = kRowWarps * kColumnWarps, kThreads = 32 * kWarps;
  static constexpr int kWarpColumns = kColumns / kColumnWarps;
  // The same of dweight.
  static constexpr int kWeightRowWarps = kWide               ? (kWidth == 48 ? 3 : 2)
                                         : kWidth == 48      ? 1
                                         : kWidth % 128 == 0 ? 4
                                         : kWidth == 192     ? 4
                                                             : 2;
  static constexpr int kWeightColumnWarps = kWarps / kWeightRowWarps;
  static constexpr int kWarpWeightRows = kWidth / kWeightRowWarps;
  static constexpr int kWarpWeightColumns = kColumns / kWeightColumnWarps;
  static_assert(kWarpColumns % 16 == 0 && kWarpWeightRows % 16 == 0 && kWarpWeightColumns % 16 == 0);

  using Tile = SmemTile<T, kColumns>;  // of x, the gradient and the weight
  using Left = SmemTile<T, kWidth>;    // of dz
  static constexpr int kWeightBytes = Tile::bytes(kWidth), kTileBytes = Tile::bytes(kRows);
  static constexpr int kLeftBytes = Left::bytes(kRows), kStageBytes = kLeftBytes + 2 * kTileBytes;
  static constexpr int kNormAt = kWeightBytes + 2 * kStageBytes;
  static constexpr int kSharedBytes = kNormAt + kColumns * int(sizeof(NormCoefficients<float>));
  static_assert(kSharedBytes <= kMostSharedBytes && 2 * kRowWarps * kColumns * int(sizeof(float)) <= kStageBytes);

  // Sums a thread holds, besides the weight: of dy, of the norm and of dweight.
  static constexpr int kSums = 2 * kWarpColumns + kWarpWeightRows * kWarpWeightColumns / 32;
  // For 8.0, nvcc does not get by with 128 registers where 9.0 does.
  static constexpr bool kTight = kKeepsWeight && kWidth == 128 && kSharedBytesOfMultiprocessor < (228 << 10);
  static constexpr int kLeastBlocks = least_blocks(kThreads, kSharedBytes, kSums > 80 || kTight);
};

template <typename T, typename Shape>
class BackwardBlock {
  using Tile = typename Shape::Tile;
  static constexpr int kPairs = Shape::kWarpColumns / 8;  // runs of 8 columns, of which a lane holds 2
  static constexpr int kRowBlocks = Shape::kRowBlocks, kKept = Shape::kKeptSteps;
  static constexpr int kWeightBlocks = Shape::kWarpWeightRows / 16, kWeightPairs = Shape::kWarpWeightColumns / 8;

 public:
  __device__ BackwardBlock(const Conv1x1BackwardParams<T>& p, int64_t rows, int columns, int access,
                           unsigned char* shared)
      : p_(p), shared_(shared), rows_(rows), columns_(columns), access_(access) {}

  __device__ void run() {
    const Tile weight(shared_);
    copy_tile<Shape::kWidth, Shape::kThreads>(weight, {p_.weight, Shape::kWidth, columns_, access_}, first_);
    const int64_t tiles = (rows_ + Shape::kRows - 1) / Shape::kRows;
    copy_stage(blockIdx.y, tiles, 0);
    for (int i = int(threadIdx.x); i < Shape::kColumns; i += Shape::kThreads)
      norms()[i] = first_ + i < columns_ ? p_.norm(first_ + i) : NormCoefficients<float>{};
    if constexpr (kKept > 0) keep_weight();
    int stage = 0;
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y, stage ^= 1) {
      copy_stage(tile + gridDim.y, tiles, stage ^ 1);
      wait_copies<1>();
      __syncthreads();
      multiply_weight(stage);
      consume(stage);
      __syncthreads();  // y and the gradient are complete
      write_tile<Shape::kRows, Shape::kThreads>(gradient(stage), gradient_matrix(tile), first_);
      if (p_.dweight) multiply_left(stage);
      __syncthreads();  // the next copies go over this stage
    }
    wait_copies<0>();
    if (p_.dweight) store_dweight();
    store_sums();
  }

 private:
  // A warp's parts of dy and of dweight.
  __device__ int row0() const { return warp_ % Shape::kRowWarps * 16 * kRowBlocks; }
  __device__ int column0() const { return warp_ / Shape::kRowWarps * Shape::kWarpColumns; }
  __device__ int weight_row0() const { return warp_ % Shape::kWeightRowWarps * Shape::kWarpWeightRows; }
  __device__ int weight_column0() const { return warp_ / Shape::kWeightRowWarps * Shape::kWarpWeightColumns; }

  __device__ unsigned char* stage_at(int stage) const {
    return shared_ + Shape::kWeightBytes + stage * Shape::kStageBytes;
  }
  __device__ typename Shape::Left dz(int stage) const { return typename Shape::Left(stage_at(stage)); }
  __device__ Tile x(int stage) const { return Tile(stage_at(stage) + Shape::kLeftBytes); }
  __device__ Tile gradient(int stage) const { return Tile(stage_at(stage) + Shape::kLeftBytes + Shape::kTileBytes); }
  __device__ NormCoefficients<float>* norms() const {
    return reinterpret_cast<NormCoefficients<float>*>(shared_ + Shape::kNormAt);
  }

  __device__ int rows_of(int64_t tile) const {
    const int64_t left = rows_ - tile * Shape::kRows;
    return left < Shape::kRows ? int(left) : Shape::kRows;
  }
  __device__ TileMatrix<T> gradient_matrix(int64_t tile) const {
    return {p_.gradient.from_row(tile * Shape::kRows), rows_of(tile), columns_, access_};
  }

  __device__ void copy_stage(int64_t tile, int64_t tiles, int stage) const {
    if (tile < tiles) {
      const int64_t row = tile * Shape::kRows;
      const int count = rows_of(tile);
      copy_tile<Shape::kRows, Shape::kThreads>(dz(stage), {p_.dz.from_row(row), count, Shape::kWidth, kChunkBytes}, 0);
      copy_tile<Shape::kRows, Shape::kThreads>(x(stage), {p_.x.from_row(row), count, columns_, access_}, first_);
      copy_tile<Shape::kRows, Shape::kThreads>(
          gradient(stage), {p_.gradient.from_row(row), p_.add ? count : 0, columns_, access_}, first_);
    }
    commit_copies();
  }

  // Columns of a warp are one pair of fragments then.
  __device__ void keep_weight() {
    static_assert(kPairs == 2 && kKept * Tile::kDepth <= Shape::kWidth);
    wait_copies<0>();
    __syncthreads();
    const Tile weight(shared_);
#pragma unroll
    for (int k = 0; k < kKept; ++k) weight_[k] = weight.right(k * Tile::kDepth, column0(), lane_);
  }
  __device__ RightPair weight_of(int k, int pair) const {
    if constexpr (kKept > 0)
      if (k < kKept * Tile::kDepth) return weight_[k / Tile::kDepth];
    return Tile(shared_).right(k, column0() + 8 * pair, lane_);
  }

  // dy = dz * weight
  __device__ void multiply_weight(int stage) {
    const typename Shape::Left left = dz(stage);
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) dy_[r][j][i] = 0;
#pragma unroll
    for (int k = 0; k < Shape::kWidth; k += Tile::kDepth) {
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) left.left(a[r], row0() + 16 * r, k, lane_);
#pragma unroll
      for (int j = 0; j < kPairs; j += 2) {
        const RightPair b = weight_of(k, j);
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r) {
          multiply_add<T>(dy_[r][j], a[r], b.words[0][0], b.words[0][1]);
          multiply_add<T>(dy_[r][j + 1], a[r], b.words[1][0], b.words[1][1]);
        }
      }
    }
  }

  // Through ReLU and norm: sums, the gradient, and y in the place of x.  In rows that do not exist dz, and so dy, is 0.
  __device__ void consume(int stage) {
    const Tile x = this->x(stage), g = gradient(stage);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int column = column0() + 8 * j + lane_ % 4 * 2;
      const NormCoefficients<float> n[2] = {norms()[column], norms()[column + 1]};
#pragma unroll
      for (int h = 0; h < 2 * kRowBlocks; ++h) {
        const int row = row0() + 8 * h + lane_ / 4;
        uint32_t *at_x = x.word(row, column), *at_g = g.word(row, column);
        float vx[2], vg[2];
        load_pair<T>(at_x, vx[0], vx[1]);
        load_pair<T>(at_g, vg[0], vg[1]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float dym = norm_relu_gradient(dy_[h / 2][j][h % 2 * 2 + i], vx[i], n[i].scale, n[i].shift);
          s1_[j][i] += dym;
          s2_[j][i] += dym * (vx[i] - n[i].mean);
          vg[i] = mul_add(n[i].scale, dym, vg[i]);
          vx[i] = norm_relu(vx[i], n[i].scale, n[i].shift);
        }
        store_pair<T>(at_g, vg[0], vg[1]);
        store_pair<T>(at_x, vx[0], vx[1]);
      }
    }
  }

  // dweight += dz^T * y
  __device__ void multiply_left(int stage) {
    const Tile y = x(stage);
    const typename Shape::Left left = dz(stage);
#pragma unroll
    for (int k = 0; k < Shape::kRows; k += Tile::kDepth) {
      uint32_t a[kWeightBlocks][4];
#pragma unroll
      for (int i = 0; i < kWeightBlocks; ++i) left.left_transposed(a[i], k, weight_row0() + 16 * i, lane_);
#pragma unroll
      for (int j = 0; j < kWeightPairs; j += 2) {
        const RightPair b = y.right(k, weight_column0() + 8 * j, lane_);
#pragma unroll
        for (int i = 0; i < kWeightBlocks; ++i) {
          multiply_add<T>(dweight_[i][j], a[i], b.words[0][0], b.words[0][1]);
          multiply_add<T>(dweight_[i][j + 1], a[i], b.words[1][0], b.words[1][1]);
        }
      }
    }
  }

  __device__ void store_dweight() const {
    float* to = p_.dweight + int64_t(blockIdx.y) * Shape::kWidth * columns_;
#pragma unroll
    for (int i = 0; i < kWeightBlocks; ++i)
#pragma unroll
      for (int j = 0; j < kWeightPairs; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = weight_row0() + 16 * i + e / 2 * 8 + lane_ / 4;
          const int column = first_ + weight_column0() + 8 * j + lane_ % 4 * 2 + e % 2;
          if (column < columns_) to[int64_t(row) * columns_ + column] = dweight_[i][j][e];
        }
  }

  // Joins the row warps' sums.
  __device__ void store_sums() const {
    auto* workspace = reinterpret_cast<float*>(stage_at(0));  // [row warps][2][kColumns]
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float s1 = sum_of_column(s1_[j][i]), s2 = sum_of_column(s2_[j][i]);
        if (lane_ >= 4) continue;
        float* to = workspace + warp_ % Shape::kRowWarps * 2 * Shape::kColumns + column0() + 8 * j + lane_ * 2 + i;
        to[0] = s1;
        to[Shape::kColumns] = s2;
      }
    __syncthreads();
    float* partial = p_.partial + 2 * int64_t(blockIdx.y) * columns_ + first_;
    for (int i = int(threadIdx.x); i < 2 * Shape::kColumns; i += Shape::kThreads) {
      float s = 0;
#pragma unroll
      for (int w = 0; w < Shape::kRowWarps; ++w) s += workspace[2 * w * Shape::kColumns + i];
      const int column = i % Shape::kColumns;
      if (first_ + column < columns_) partial[int64_t(i / Shape::kColumns) * columns_ + column] = s;
    }
  }

  const Conv1x1BackwardParams<T>& p_;
  unsigned char* const shared_;
  const int64_t rows_;
  const int columns_, access_;
  const int first_ = int(blockIdx.x) * Shape::kColumns;  // of this block's columns
  const int warp_ = int(threadIdx.x) / 32, lane_ = int(threadIdx.x) % 32;
  RightPair weight_[kKept > 0 ? kKept : 1];  // of the first steps
  float dy_[kRowBlocks][kPairs][4], s1_[kPairs][2] = {}, s2_[kPairs][2] = {};
  float dweight_[kWeightBlocks][kWeightPairs][4] = {};
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kLeastBlocks)
    conv1x1_backward_kernel(const __grid_constant__ Conv1x1BackwardParams<T> p, int64_t rows, int columns, int access) {
  wait_for_kernels_before();
  if constexpr (kTensorCores) {
    FASTDENSE_SHARED(shared);
    BackwardBlock<T, Shape>(p, rows, columns, access, shared).run();
  }
}

}  // namespace

template <typename T>
cudaError_t launch_conv1x1_backward(const Conv1x1BackwardParams<T>& p, int64_t rows, int64_t columns, int64_t width,
                                    int64_t splits, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_width(width, [&](auto w) {
    using Shape = BackwardShape<T, w()>;
    const cudaError_t error = FASTDENSE_ALLOW_SHARED((conv1x1_backward_kernel<T, Shape>), Shape::kSharedBytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(unsigned((columns + Shape::kColumns - 1) / Shape::kColumns), unsigned(splits));
    const int access = std::min({access_bytes(p.x), access_bytes(p.weight), access_bytes(p.gradient)});
    FASTDENSE_LAUNCH((conv1x1_backward_kernel<T, Shape>), grid, dim3(Shape::kThreads), Shape::kSharedBytes, stream, p,
                     rows, int(columns), access);
    return cudaGetLastError();
  });
}

#define FASTDENSE_BACKWARD(T)                                                                                          \
  template cudaError_t launch_conv1x1_backward<T>(const Conv1x1BackwardParams<T>&, int64_t, int64_t, int64_t, int64_t, \
                                                  cudaStream_t);
FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(FASTDENSE_BACKWARD)
#undef FASTDENSE_BACKWARD

}  // namespace fastdense
