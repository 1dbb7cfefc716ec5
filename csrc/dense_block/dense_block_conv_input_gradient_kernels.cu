// SPDX-License-Identifier: Apache-2.0
// Gradient of the input of dense_block_conv_launch.h's convolution.
//
// Like the weight's, it reads the d that launch_slice_gradient packed: to finalise d on the way would take two strided
// slices with their rings and the dropout masks once for every part and kernel.
#include "dense_block/dense_block_conv_plan.h"
#include "dense_block/dense_block_conv_tiles.h"

namespace fastdense {
namespace {

// Eight warps: four share the pixels of a tile, 16 by 16 in turns, two the channels of a part.
constexpr int kThreads = 256, kPixelGroups = 4, kChannelGroups = 2;
constexpr int kTallest = kConvPixels / kConvSteps / kPixelGroups;
static_assert(32 * kPixelGroups * kChannelGroups == kThreads && kTallest == 2);

// Chunks of the depth, tap by tap; an odd number gets one more of zeros.
template <typename T>
FASTDENSE_HD int gradient_chunks(int k) {
  return (k + kChunkNumbers<T> - 1) / kChunkNumbers<T>;
}
template <typename T>
FASTDENSE_HD int depth_steps(int k) {
  return (kTaps * gradient_chunks<T>(k) + 1) / 2;
}

template <typename T>
struct InputLayout {
  int weight_stride, d_stride, z_stride;  // bytes from row to row
  int weight, d, d_bytes, z, z_bytes, scale, shift, mean, rows, offsets, tables, bytes;
  FASTDENSE_HD InputLayout(const ConvTiles& tiles, int k, int channels, int buffers) {
    SharedLayout shared;
    const int steps = depth_steps<T>(k);
    weight_stride = row_stride(2 * steps);
    d_stride = row_stride(gradient_chunks<T>(k));
    z_stride = row_stride(channels / kChunkNumbers<T>);
    weight = shared.take(int64_t(channels) * weight_stride);
    d_bytes = tiles.halo() * d_stride;
    d = shared.take(int64_t(buffers) * d_bytes);
    z_bytes = tiles.pixels() * z_stride;
    const int sums_bytes = 2 * kPixelGroups * channels * int(sizeof(float)), tiles_bytes = buffers * z_bytes;
    z = shared.take(tiles_bytes > sums_bytes ? tiles_bytes : sums_bytes);
    scale = shared.take(channels * sizeof(float));
    shift = shared.take(channels * sizeof(float));
    mean = shared.take(channels * sizeof(float));
    rows = shared.take(kConvPixels * sizeof(int64_t));
    offsets = shared.take(2 * steps * sizeof(int));
    tables = shared.take(TilePixels::bytes(tiles));
    bytes = shared.size();
  }
};

template <typename T, int kChannels>
class InputGradientBlock {
  static constexpr int kWide = kChannels / kChannelGroups, kTiles = kWide / 8, kPairs = (kTiles + 1) / 2;
  static constexpr int kChunks = kChannels / kChunkNumbers<T>;

 public:
  __device__ InputGradientBlock(const ConvInputGradientParams<T>& p, const ConvPlan& plan, unsigned char* shared)
      : p_(p),
        plan_(plan),
        at_(plan.tiles, p.k, kChannels, plan.buffers),
        shared_(shared),
        pixels_(plan.tiles, shared + at_.tables),
        first_(int(blockIdx.y) * kChannels),
        channels_(p.b - first_ < kChannels ? p.b - first_ : kChannels),
        lane_(int(threadIdx.x) % 32),
        warp_(int(threadIdx.x) / 32) {}

  __device__ void run() {
    load_weight();
    for_each_tile<TilePlace>(plan_, *this);
    write_sums();
  }

  __device__ void load_tile(const TilePlace& place, int buffer) {
    copy_pixels<kThreads>(d(buffer), at_.d_stride, plan_.tiles.halo(), gradient_chunks<T>(p_.k), p_.d, p_.k, p_.k,
                          [&](int q) { return pixels_.halo_row(place, q); });
    copy_pixels<kThreads>(z(buffer, 0), at_.z_stride, plan_.tiles.pixels(), kChunks, p_.z + first_, p_.b, channels_,
                          [&](int q) { return pixels_.row(place, q); });
    commit_copies();
  }

  __device__ void prepare_tile(const TilePlace& place, int) {
    if (threadIdx.x < kConvPixels) rows()[threadIdx.x] = pixels_.row(place, int(threadIdx.x));
  }

  // dv takes the place of z, and goes out from there.
  __device__ void multiply_tile(int buffer) {
    const int group = warp_ % kPixelGroups, tall = (plan_.tiles.pixels() - 1) / kConvSteps;
    if (group + kPixelGroups <= tall) {
      multiply<kTallest>(buffer);
    } else if (group <= tall) {
      multiply<1>(buffer);
    }
    __syncthreads();  // dv is there
    store_tile(buffer);
  }

  __device__ void finish_tile(bool) {}

 private:
  __device__ float* floats(int at) const { return reinterpret_cast<float*>(shared_ + at); }
  __device__ int64_t* rows() const { return reinterpret_cast<int64_t*>(shared_ + at_.rows); }
  __device__ int* offsets() const { return reinterpret_cast<int*>(shared_ + at_.offsets); }
  __device__ unsigned char* d(int buffer) const { return shared_ + at_.d + buffer * at_.d_bytes; }
  __device__ unsigned char* z(int buffer, int pixel) const {
    return shared_ + at_.z + buffer * at_.z_bytes + pixel * at_.z_stride;
  }

  // Everything that stays; ends with a barrier.
  __device__ void load_weight() {
    const int chunks = gradient_chunks<T>(p_.k), all = 2 * depth_steps<T>(p_.k), real = kTaps * chunks;
    for_each_chunk<kThreads>(kChannels, all, [&](int c, int chunk) {
      const int left = (p_.k - chunk % chunks * kChunkNumbers<T>)*int(sizeof(T));
      const bool exists = c < channels_ && chunk < real;
      const T* from = p_.weight;
      if (exists) from += (int64_t(first_ + c) * kTaps + chunk / chunks) * p_.ld + chunk % chunks * kChunkNumbers<T>;
      copy_async<kChunk>(shared_ + at_.weight + c * at_.weight_stride + chunk * kChunk, from,
                         exists ? (left < kChunk ? left : kChunk) : 0);
    });
    // What reads of a pixel's neighbour at tap t flows back from the neighbour opposite.
    for (int i = int(threadIdx.x); i < all; i += kThreads)
      offsets()[i] = i < real ? i % chunks * kChunk - tap_distance(i / chunks, plan_.tiles.columns) * at_.d_stride : 0;
    for (int c = int(threadIdx.x); c < channels_; c += kThreads) {
      const NormCoefficients<float> norm = p_.norm(first_ + c);
      floats(at_.scale)[c] = norm.scale;
      floats(at_.shift)[c] = norm.shift;
      floats(at_.mean)[c] = norm.mean;
    }
    __syncthreads();
  }

  template <int kTall>
  __device__ void multiply(int buffer) {
    const int steps = depth_steps<T>(p_.k);
    float sum[kTall][kTiles][4] = {};
    const unsigned char* left[kTall];
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
      const int centre = pixels_.centre(block_of_pixels(m) + lane_ % 16);
      left[m] = d(buffer) + (centre < 0 ? pixels_.centre(0) : centre) * at_.d_stride;
    }
    const unsigned char* right[kPairs];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const int c = 16 * n + lane_ / 16 * 8 + lane_ % 8;
      right[n] = shared_ + at_.weight + (first_channel() + (c < kWide ? c : kWide - 1)) * at_.weight_stride +
                 lane_ / 8 % 2 * kChunk;
    }
    for (int step = 0; step < steps; ++step) {
      const int shift = offsets()[2 * step + lane_ / 16];
      uint32_t a[kTall][4];
#pragma unroll
      for (int m = 0; m < kTall; ++m) load_fragments<T>(a[m], left[m] + shift);
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        uint32_t b[4];
        load_fragments<T>(b, right[n] + step * 2 * kChunk);
#pragma unroll
        for (int m = 0; m < kTall; ++m) {
          multiply_add<T>(sum[m][2 * n], a[m], b[0], b[1]);
          if (2 * n + 1 < kTiles) multiply_add<T>(sum[m][2 * n + 1 < kTiles ? 2 * n + 1 : 0], a[m], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mask<kTall>(buffer, n, sum);
  }

  __device__ int first_channel() const { return warp_ / kPixelGroups * kWide; }
  __device__ int block_of_pixels(int m) const { return (warp_ % kPixelGroups + m * kPixelGroups) * kConvSteps; }

  // dv takes the place of z, which only this lane reads.
  template <int kTall>
  __device__ void mask(int buffer, int n, const float (&sum)[kTall][kTiles][4]) {
    const int c = first_channel() + 8 * n + lane_ % 4 * 2;
    if (c >= channels_) return;
    const auto pair = [&](int at) { return *reinterpret_cast<const Vector<float, 2>*>(floats(at) + c); };
    const Vector<float, 2> scale = pair(at_.scale), shift = pair(at_.shift), mean = pair(at_.mean);
#pragma unroll
    for (int m = 0; m < kTall; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = block_of_pixels(m) + 8 * half + lane_ / 4;
        if (rows()[pixel] < 0) continue;
        auto* at = reinterpret_cast<Vector<T, 2>*>(z(buffer, pixel) + c * int(sizeof(T)));
        Vector<T, 2> v = *at;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = load(v.v[i]), du = load(store<T>(sum[m][n][2 * half + i]));
          const float dv = norm_relu_gradient(du, value, scale.v[i], shift.v[i]);
          first_sum_[n][i] += dv;
          second_sum_[n][i] += dv * (value - mean.v[i]);
          v.v[i] = store<T>(dv);
        }
        *at = v;
      }
  }

  __device__ void store_tile(int buffer) {
    for_each_chunk<kThreads>(plan_.tiles.pixels(), kChunks, [&](int pixel, int chunk) {
      const int c = chunk * kChunkNumbers<T>;
      const int64_t row = rows()[pixel];
      if (row < 0 || c >= channels_) return;
      using Chunk = Vector<T, kChunkNumbers<T>>;
      write(p_.dv + row * p_.b + first_ + c, *reinterpret_cast<const Chunk*>(z(buffer, pixel) + chunk * kChunk),
            kChunkNumbers<T>);
    });
  }

  // Sums of the eight lanes that share a column, then of the groups of pixels.
  __device__ void write_sums() {
    float* workspace = floats(at_.z);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float first = first_sum_[n][i], second = second_sum_[n][i];
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          first += __shfl_xor_sync(~0u, first, lanes);
          second += __shfl_xor_sync(~0u, second, lanes);
        }
        if (lane_ >= 4) continue;
        const int at = warp_ % kPixelGroups * kChannels + first_channel() + 8 * n + lane_ * 2 + i;
        workspace[at] = first;
        workspace[kPixelGroups * kChannels + at] = second;
      }
    __syncthreads();
    for (int c = int(threadIdx.x); c < 2 * kChannels; c += kThreads) {
      const int which = c / kChannels, channel = c % kChannels;
      if (channel >= channels_) continue;
      float total = 0;
      for (int group = 0; group < kPixelGroups; ++group)
        total += workspace[(which * kPixelGroups + group) * kChannels + channel];
      p_.partial[(2 * int64_t(blockIdx.x) + which) * p_.b + first_ + channel] = total;
    }
  }

  const ConvInputGradientParams<T>& p_;
  const ConvPlan& plan_;
  const InputLayout<T> at_;
  unsigned char* const shared_;
  const TilePixels pixels_;
  const int first_, channels_, lane_, warp_;
  float first_sum_[kTiles][2] = {}, second_sum_[kTiles][2] = {};
};

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels > 64 ? 1 : 2)
    conv_input_gradient_kernel(const __grid_constant__ ConvInputGradientParams<T> p,
                               const __grid_constant__ ConvPlan plan) {
  wait_for_kernels_before();
  if constexpr (kTensorCores) {
    FASTDENSE_SHARED(shared);
    InputGradientBlock<T, kChannels>(p, plan, shared).run();
  }
}

// Channels of a part: what divides them with the least left over.
inline int part_channels(int64_t b) {
  int best = 0;
  int64_t least = 0;
  for (const int channels : {64, 80, 48}) {
    const int64_t all = (b + channels - 1) / channels * channels;
    if (best == 0 || all < least) {
      best = channels;
      least = all;
    }
  }
  return best;
}

}  // namespace

template <typename T>
ConvPlan plan_conv_input_gradient(const ConvShape& s, int64_t multiprocessors, int64_t most_shared) {
  std::vector<ConvChoice> choices;
  for (const int buffers : {2, 1})
    for (const int channels : {part_channels(s.b), 48})
      choices.push_back({channels, (s.b + channels - 1) / channels, buffers});
  return plan_conv(s, {multiprocessors, most_shared, 2, 1}, choices, [&](const ConvTiles& tiles, const ConvChoice& c) {
    return InputLayout<T>(tiles, int(s.k), c.channels, c.buffers).bytes;
  });
}

template <typename T>
cudaError_t launch_conv_input_gradient(const ConvInputGradientParams<T>& p, const ConvPlan& plan, cudaStream_t stream) {
  const auto launch = [&](auto channels) {
    return launch_conv(conv_input_gradient_kernel<T, decltype(channels)::value>, kThreads, plan, stream, p, plan);
  };
  if (plan.channels == 48) return launch(std::integral_constant<int, 48>());
  if (plan.channels == 64) return launch(std::integral_constant<int, 64>());
  return launch(std::integral_constant<int, 80>());
}

#define FASTDENSE_CONV(T)                                                            \
  template ConvPlan plan_conv_input_gradient<T>(const ConvShape&, int64_t, int64_t); \
  template cudaError_t launch_conv_input_gradient<T>(const ConvInputGradientParams<T>&, const ConvPlan&, cudaStream_t);
FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(FASTDENSE_CONV)
#undef FASTDENSE_CONV

}  // namespace fastdense
