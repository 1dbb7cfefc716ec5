// SPDX-License-Identifier: Apache-2.0
// Gradient of the weight of dense_block_conv_launch.h's convolution.
#include "dense_block/dense_block_conv_plan.h"
#include "dense_block/dense_block_conv_tiles.h"

namespace fastdense {
namespace {

// One warp a tap; each keeps its sums [channels of a part][k] for as long as the block lives.
constexpr int kThreads = 32 * kTaps, kTallest = 4;

template <typename T>
struct WeightLayout {
  int u_stride, d_stride;  // bytes from row to row
  int u, u_bytes, d, d_bytes, zeros, scale, shift, at, tables, bytes;
  FASTDENSE_HD WeightLayout(const ConvTiles& tiles, int channels, int columns, int buffers) {
    SharedLayout shared;
    u_stride = row_stride(channels / kChunkNumbers<T>);
    d_stride = row_stride(columns / kChunkNumbers<T>);
    u_bytes = tiles.halo() * u_stride;
    u = shared.take(int64_t(buffers) * u_bytes);
    d_bytes = whole_steps(tiles) * d_stride;
    d = shared.take(int64_t(buffers) * d_bytes);
    zeros = shared.take(u_stride);
    scale = shared.take(channels * sizeof(float));
    shift = shared.take(channels * sizeof(float));
    at = shared.take(kConvPixels * sizeof(int));
    tables = shared.take(TilePixels::bytes(tiles));
    bytes = shared.size();
  }
  // Pixels of a tile and of nothing up to whole steps of the depth.
  static FASTDENSE_HD int whole_steps(const ConvTiles& tiles) {
    return (tiles.pixels() + kStep<T> - 1) / kStep<T> * kStep<T>;
  }
};

template <typename T, int kColumns>
class WeightGradientBlock {
  static constexpr int kTiles = kColumns / 8, kChunks = kColumns / kChunkNumbers<T>;

 public:
  __device__ WeightGradientBlock(const ConvWeightGradientParams<T>& p, const ConvPlan& plan, unsigned char* shared)
      : p_(p),
        plan_(plan),
        at_(plan.tiles, plan.channels, kColumns, plan.buffers),
        shared_(shared),
        pixels_(plan.tiles, shared + at_.tables),
        first_(int(blockIdx.y) * plan.channels),
        channels_(p.b - first_ < plan.channels ? p.b - first_ : plan.channels),
        lane_(int(threadIdx.x) % 32),
        tap_(int(threadIdx.x) / 32) {}

  __device__ void run() {
    load_norm();
    for_each_tile<TilePlace>(plan_, *this);
    write_sums();
  }

  __device__ void load_tile(const TilePlace& place, int buffer) {
    copy_pixels<kThreads>(u(buffer), at_.u_stride, plan_.tiles.halo(), channels_ / kChunkNumbers<T>, p_.z + first_,
                          p_.b, channels_, [&](int q) { return pixels_.halo_row(place, q); });
    copy_pixels<kThreads>(d(buffer), at_.d_stride, WeightLayout<T>::whole_steps(plan_.tiles), kChunks, p_.d, p_.k, p_.k,
                          [&](int q) { return pixels_.row(place, q); });
    commit_copies();
  }

  __device__ void prepare_tile(const TilePlace& place, int buffer) {
    activate_pixels<kThreads, T>(u(buffer), at_.u_stride, plan_.tiles.halo(), channels_, floats(at_.scale),
                                 floats(at_.shift), [&](int q) { return pixels_.halo_row(place, q); });
    if (threadIdx.x < kConvPixels) {
      const int p = int(threadIdx.x);
      places()[p] = pixels_.row(place, p) < 0 ? -1 : pixels_.centre(p) * at_.u_stride;
    }
  }

  __device__ void multiply_tile(int buffer) { multiply(u(buffer), d(buffer)); }

  __device__ void finish_tile(bool) {}

 private:
  __device__ unsigned char* u(int buffer) const { return shared_ + at_.u + buffer * at_.u_bytes; }
  __device__ unsigned char* d(int buffer) const { return shared_ + at_.d + buffer * at_.d_bytes; }
  __device__ float* floats(int at) const { return reinterpret_cast<float*>(shared_ + at); }
  // Of each pixel in u, -1 where there is none.
  __device__ int* places() const { return reinterpret_cast<int*>(shared_ + at_.at); }

  // Everything that stays; ends with a barrier.
  __device__ void load_norm() {
    for (int i = int(threadIdx.x); i < at_.u_stride / 4; i += kThreads) floats(at_.zeros)[i] = 0;
    for (int c = int(threadIdx.x); c < channels_; c += kThreads) {
      const NormCoefficients<float> norm = p_.norm(first_ + c);
      floats(at_.scale)[c] = norm.scale;
      floats(at_.shift)[c] = norm.shift;
    }
    __syncthreads();
  }

  // sums[channel][column] += u^T * d, the depth being pixels.  What lies outside the image counts as zero in d; in u a
  // row of zeros takes its place, since the neighbour that a tap reads may be no number.
  __device__ void multiply(const unsigned char* u, const unsigned char* d) {
    const int tall = channels_ / kConvSteps, pixels = plan_.tiles.pixels();
    const int shift = tap_distance(tap_, plan_.tiles.columns) * at_.u_stride;
    const auto pixel = [&](int p) {
      const int place = places()[p];
      return place < 0 ? shared_ + at_.zeros : u + place + shift;
    };
    for (int first = 0; first < pixels; first += kStep<T>) {
      uint32_t right[kTiles][2];
      if constexpr (sizeof(T) == 2) {
        const unsigned char* row = d + (first + lane_ % 16) * at_.d_stride;
#pragma unroll
        for (int n = 0; n < (kTiles + 1) / 2; ++n) {
          const int column = 16 * n + lane_ / 16 * 8;
          uint32_t b[4];
          load_matrices_transposed(b, row + (column < kColumns ? column : kColumns - 8) * int(sizeof(T)));
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (2 * n + i / 2 < kTiles) right[2 * n + i / 2 < kTiles ? 2 * n + i / 2 : 0][i % 2] = b[i];
        }
        const unsigned char* left = pixel(first + lane_ / 16 * 8 + lane_ % 8) + lane_ / 8 % 2 * kChunk;
        multiply(tall, right, [&](int m, uint32_t (&a)[4]) { load_matrices_transposed(a, left + 2 * kChunk * m); });
      } else {
        const int t = lane_ % 4, g = lane_ / 4;
        const auto word = [](const unsigned char* row, int i) {
          return tf32_bits(*reinterpret_cast<const float*>(row + i * int(sizeof(float))));
        };
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) right[n][i] = word(d + (first + t + 4 * i) * at_.d_stride, 8 * n + g);
        const unsigned char *near = pixel(first + t), *far = pixel(first + t + 4);
        multiply(tall, right, [&](int m, uint32_t (&a)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = word(i < 2 ? near : far, kConvSteps * m + i % 2 * 8 + g);
        });
      }
    }
  }

  template <typename Load>
  __device__ __forceinline__ void multiply(int tall, const uint32_t (&right)[kTiles][2], const Load& load_left) {
#pragma unroll
    for (int m = 0; m < kTallest; ++m) {
      if (m >= tall) break;
      uint32_t a[4];
      load_left(m, a);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) multiply_add<T>(sum_[m][n], a, right[n][0], right[n][1]);
    }
  }

  __device__ void write_sums() {
    float* to = p_.partial + (int64_t(blockIdx.x) * p_.k * kTaps + tap_) * p_.b + first_ + lane_ / 4;
#pragma unroll
    for (int m = 0; m < kTallest; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = kConvSteps * m + i / 2 * 8, column = 8 * n + lane_ % 4 * 2 + i % 2;
          if (c < channels_ && column < p_.k) to[int64_t(column) * kTaps * p_.b + c] = sum_[m][n][i];
        }
  }

  const ConvWeightGradientParams<T>& p_;
  const ConvPlan& plan_;
  const WeightLayout<T> at_;
  unsigned char* const shared_;
  const TilePixels pixels_;
  const int first_, channels_, lane_, tap_;
  float sum_[kTallest][kTiles][4] = {};
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    conv_weight_gradient_kernel(const __grid_constant__ ConvWeightGradientParams<T> p,
                                const __grid_constant__ ConvPlan plan) {
  wait_for_kernels_before();
  if constexpr (kTensorCores) {
    FASTDENSE_SHARED(shared);
    WeightGradientBlock<T, kColumns>(p, plan, shared).run();
  }
}

}  // namespace

template <typename T>
ConvPlan plan_conv_weight_gradient(const ConvShape& s, int64_t multiprocessors, int64_t most_shared) {
  if (s.k > kMostColumns) return {};
  const int64_t tall = s.b / kConvSteps, parts = (tall + kTallest - 1) / kTallest;
  const int channels = int((tall + parts - 1) / parts * kConvSteps);
  // Partial sums of a block are as much as some tiles.
  const ConvLimits limits{multiprocessors, most_shared, 1, 2};
  return plan_conv(s, limits, {{channels, parts, 2}, {channels, parts, 1}},
                   [&](const ConvTiles& tiles, const ConvChoice& c) {
                     return WeightLayout<T>(tiles, c.channels, kernel_columns(s.k), c.buffers).bytes;
                   });
}

template <typename T>
cudaError_t launch_conv_weight_gradient(const ConvWeightGradientParams<T>& p, const ConvPlan& plan,
                                        cudaStream_t stream) {
  return with_columns(kernel_columns(p.k), [&](auto columns) {
    return launch_conv(conv_weight_gradient_kernel<T, decltype(columns)::value>, kThreads, plan, stream, p, plan);
  });
}

#define FASTDENSE_CONV(T)                                                                                  \
  template ConvPlan plan_conv_weight_gradient<T>(const ConvShape&, int64_t, int64_t);                      \
  template cudaError_t launch_conv_weight_gradient<T>(const ConvWeightGradientParams<T>&, const ConvPlan&, \
                                                      cudaStream_t);
FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(FASTDENSE_CONV)
#undef FASTDENSE_CONV

}  // namespace fastdense
