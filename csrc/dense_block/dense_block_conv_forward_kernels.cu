// SPDX-License-Identifier: Apache-2.0
// Forward kernel of dense_block_conv_launch.h.
#include "cuda/norm_relu/block_moments.h"
#include "dense_block/dense_block_conv_plan.h"
#include "dense_block/dense_block_conv_tiles.h"

namespace fastdense {
namespace {

// Eight warps: four share the pixels of a tile, 16 by 16 in turns, two the depth of the sums.
constexpr int kThreads = 256, kPixelGroups = 4, kDepthGroups = 2, kTallest = kConvPixels / kConvSteps / kPixelGroups;
static_assert(32 * kPixelGroups * kDepthGroups == kThreads && kTallest == 2 && kDepthGroups == 2);

// What a block holds in shared memory; host and device agree on it.
template <typename T>
struct ForwardLayout {
  int weight_stride, u_stride, sum_stride;  // bytes from row to row
  int weight, u, u_bytes, sums, scale, shift, rows, tables, bytes;
  FASTDENSE_HD ForwardLayout(const ConvTiles& tiles, int b, int columns, int buffers) {
    SharedLayout shared;
    const int chunks = b / kChunkNumbers<T>;
    weight_stride = row_stride(kTaps * chunks);
    u_stride = row_stride(chunks);
    sum_stride = (columns % 16 == 0 ? columns + 8 : columns) * int(sizeof(float));  // pairs of eight rows in all banks
    weight = shared.take(int64_t(columns) * weight_stride);
    u_bytes = tiles.halo() * u_stride;
    u = shared.take(int64_t(buffers) * u_bytes);
    sums = shared.take(int64_t(kConvPixels) * sum_stride);
    scale = shared.take(b * sizeof(float));
    shift = shared.take(b * sizeof(float));
    rows = shared.take(kConvPixels * sizeof(int64_t));
    tables = shared.take(TilePixels::bytes(tiles));
    bytes = shared.size();
  }
};

// Moments of one column over this thread's pixels, relative to `pivot`.
struct LaneMoments {
  float pivot = 0;
  Moments<float> all{0, 0, 0};

  // value(p) for p = first, first + step, ... below `end` where taken(p).
  template <typename Taken, typename Value>
  __device__ void add(int first, int step, int end, const Taken& taken, const Value& value) {
    Moments<float> m{0, 0, 0};
    for (int p = first; p < end; p += step)
      if (taken(p)) {
        m.count += 1;
        m.mean += value(p) - pivot;
      }
    if (m.count == 0) return;
    m.mean /= m.count;
    for (int p = first; p < end; p += step)
      if (taken(p)) m.m2 += (value(p) - pivot - m.mean) * (value(p) - pivot - m.mean);
    all = combine_moments(all, m);
  }
};

template <typename T, int kColumns>
class ForwardBlock {
  static constexpr int kTiles = kColumns / 8, kPairs = (kTiles + 1) / 2;
  static constexpr int kLanes = kThreads / kColumns;  // threads that share a column of the sums

 public:
  __device__ ForwardBlock(const ConvForwardParams<T>& p, const ConvPlan& plan, int vector, unsigned char* shared)
      : p_(p),
        plan_(plan),
        vector_(vector),
        at_(plan.tiles, p.b, kColumns, plan.buffers),
        shared_(shared),
        pixels_(plan.tiles, shared + at_.tables),
        first_(int(blockIdx.y) * kColumns),
        columns_(p.k - first_ < kColumns ? p.k - first_ : kColumns),
        lane_(int(threadIdx.x) % 32),
        warp_(int(threadIdx.x) / 32) {}

  __device__ void run() {
    load_weight();
    for_each_tile<TilePlace>(plan_, *this);
    if (p_.moments.partial) write_moments();
  }

  __device__ void load_tile(const TilePlace& place, int buffer) {
    copy_pixels<kThreads>(u(buffer), at_.u_stride, plan_.tiles.halo(), p_.b / kChunkNumbers<T>, p_.z, p_.b, p_.b,
                          [&](int q) { return pixels_.halo_row(place, q); });
    commit_copies();
  }

  __device__ void prepare_tile(const TilePlace& place, int buffer) {
    activate_pixels<kThreads, T>(u(buffer), at_.u_stride, plan_.tiles.halo(), p_.b, floats(at_.scale),
                                 floats(at_.shift), [&](int q) { return pixels_.halo_row(place, q); });
    if (threadIdx.x < kConvPixels) rows()[threadIdx.x] = pixels_.row(place, int(threadIdx.x));
  }

  // Products of the tile; what both groups of the depth have is added up in shared memory.
  __device__ void multiply_tile(int buffer) {
    const int group = warp_ % kPixelGroups, tall = (plan_.tiles.pixels() - 1) / kConvSteps;
    float sum[kTallest][kTiles][4] = {};
    if (group + kPixelGroups <= tall) {
      multiply<kTallest>(u(buffer), sum);
    } else if (group <= tall) {
      multiply<1>(u(buffer), sum);
    }
    for (int turn = kDepthGroups - 1; turn >= 0; --turn) {
      if (warp_ / kPixelGroups == turn) add_to_sums(sum, turn < kDepthGroups - 1);
      if (turn > 0) __syncthreads();
    }
  }

  __device__ void finish_tile(bool first) {
    store_tile();
    if (p_.moments.partial) {
      __syncthreads();  // what was stored is there
      add_moments(first);
    }
    __syncthreads();  // sums and rows are free
  }

 private:
  __device__ unsigned char* u(int buffer) const { return shared_ + at_.u + buffer * at_.u_bytes; }
  __device__ float* floats(int at) const { return reinterpret_cast<float*>(shared_ + at); }
  __device__ int64_t* rows() const { return reinterpret_cast<int64_t*>(shared_ + at_.rows); }
  __device__ float* sums(int pixel) const { return floats(at_.sums + pixel * at_.sum_stride); }

  // Everything that stays; ends with a barrier.
  __device__ void load_weight() {
    const int depth = kTaps * p_.b;
    copy_pixels<kThreads>(shared_ + at_.weight, at_.weight_stride, kColumns, depth / kChunkNumbers<T>, p_.weight, depth,
                          depth, [&](int j) { return j < columns_ ? int64_t(first_ + j) : -1; });
    for (int c = int(threadIdx.x); c < p_.b; c += kThreads) {
      const NormCoefficients<float> norm = p_.norm(c);
      floats(at_.scale)[c] = norm.scale;
      floats(at_.shift)[c] = norm.shift;
    }
    __syncthreads();
  }

  template <int kTall>
  __device__ void multiply(const unsigned char* u, float (&sum)[kTallest][kTiles][4]) {
    const int group = warp_ % kPixelGroups, part = warp_ / kPixelGroups, steps = p_.b / kStep<T>;
    const unsigned char* left[kTall];
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
      const int centre = pixels_.centre((group + m * kPixelGroups) * kConvSteps + lane_ % 16);
      left[m] = u + (centre < 0 ? pixels_.centre(0) : centre) * at_.u_stride + lane_ / 16 * kChunk;
    }
    const unsigned char* right[kPairs];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const int column = 16 * n + lane_ / 16 * 8 + lane_ % 8;
      right[n] = shared_ + at_.weight + (column < kColumns ? column : kColumns - 1) * at_.weight_stride +
                 lane_ / 8 % 2 * kChunk;
    }
    for (int tap = 0; tap < kTaps; ++tap) {
      const int shift = tap_distance(tap, plan_.tiles.columns) * at_.u_stride, before = tap * steps;
      for (int step = (part + before) % kDepthGroups; step < steps; step += kDepthGroups) {
        uint32_t a[kTall][4];
#pragma unroll
        for (int m = 0; m < kTall; ++m) load_fragments<T>(a[m], left[m] + shift + step * 2 * kChunk);
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
          uint32_t b[4];
          load_fragments<T>(b, right[n] + (before + step) * 2 * kChunk);
#pragma unroll
          for (int m = 0; m < kTall; ++m) {
            multiply_add<T>(sum[m][2 * n], a[m], b[0], b[1]);
            if (2 * n + 1 < kTiles) multiply_add<T>(sum[m][2 * n + 1 < kTiles ? 2 * n + 1 : 0], a[m], b[2], b[3]);
          }
        }
      }
    }
  }

  __device__ void add_to_sums(const float (&sum)[kTallest][kTiles][4], bool add) {
#pragma unroll
    for (int m = 0; m < kTallest; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = sums((warp_ % kPixelGroups + m * kPixelGroups) * kConvSteps + 8 * half + lane_ / 4) + lane_ % 4 * 2;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          auto* pair = reinterpret_cast<Vector<float, 2>*>(to + 8 * n);
          const Vector<float, 2> before = add ? *pair : Vector<float, 2>{};
          *pair = {{before.v[0] + sum[m][n][2 * half], before.v[1] + sum[m][n][2 * half + 1]}};
        }
      }
  }

  // The slice, by stores of vector_ numbers, and what was stored in place of the sums.
  __device__ void store_tile() {
    if constexpr (sizeof(T) == 2) {
      if (vector_ == 8) return store_vectors<8>();
    }
    if (vector_ == 4) return store_vectors<4>();
    if (vector_ == 2) return store_vectors<2>();
    store_vectors<1>();
  }

  template <int V>
  __device__ void store_vectors() {
    constexpr int kAcross = kColumns / V;
    for (int e = int(threadIdx.x); e < kConvPixels * kAcross; e += kThreads) {
      const int p = e / kAcross, j = e % kAcross * V, count = columns_ - j < V ? columns_ - j : V;
      const int64_t row = rows()[p];
      if (row < 0 || count <= 0) continue;
      float* sum = sums(p) + j;
      Vector<T, V> x;
#pragma unroll
      for (int i = 0; i < V; ++i) x.v[i] = store<T>(sum[i]);
      apply_dropout(p_.dropout, row * p_.k + first_ + j, x);
      write(p_.x.data + row * p_.x.ld + first_ + j, x, count);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] = load(x.v[i]);
    }
  }

  // A thread adds up pixels of one column, relative to the first that its block stored.
  __device__ void add_moments(bool first) {
    const int column = int(threadIdx.x) % kColumns, lane = int(threadIdx.x) / kColumns;
    if (lane >= kLanes) return;
    if (first) moments_.pivot = sums(0)[column];
    moments_.add(
        lane, kLanes, plan_.tiles.pixels(), [&](int p) { return rows()[p] >= 0; },
        [&](int p) { return sums(p)[column]; });
  }

  // The lanes' moments, joined in their order; all are relative to the same pivot.
  __device__ void write_moments() {
    const int column = int(threadIdx.x) % kColumns, lane = int(threadIdx.x) / kColumns;
    static_assert(3 * kThreads <= kConvPixels * 16 && finish_bytes(kThreads) <= kConvPixels * 16 * int(sizeof(float)));
    float* workspace = floats(at_.sums);
    workspace[threadIdx.x] = moments_.all.count;
    workspace[kThreads + threadIdx.x] = moments_.all.mean;
    workspace[2 * kThreads + threadIdx.x] = moments_.all.m2;
    __syncthreads();
    if (lane == 0 && column < columns_) {
      Moments<float> all = moments_.all;
      for (int l = 1; l < kLanes; ++l) {
        const int at = l * kColumns + column;
        all = combine_moments(all, {workspace[at], workspace[kThreads + at], workspace[2 * kThreads + at]});
      }
      float* to = p_.moments.partial + 2 * int64_t(blockIdx.x) * p_.k + first_ + column;
      to[0] = all.mean + moments_.pivot;
      to[p_.k] = all.m2;
      if (first_ + column == 0) p_.moments.counts[blockIdx.x] = int64_t(all.count);
    }
    __syncthreads();  // the workspace is free
    finish_moments<kThreads>(p_.moments, p_.k, shared_ + at_.sums);
  }

  const ConvForwardParams<T>& p_;
  const ConvPlan& plan_;
  const int vector_;
  const ForwardLayout<T> at_;
  unsigned char* const shared_;
  const TilePixels pixels_;
  const int first_, columns_, lane_, warp_;
  LaneMoments moments_;
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns > 32 ? 1 : 2)
    conv_forward_kernel(const __grid_constant__ ConvForwardParams<T> p, const __grid_constant__ ConvPlan plan,
                        int vector) {
  wait_for_kernels_before();
  if constexpr (kTensorCores) {
    FASTDENSE_SHARED(shared);
    ForwardBlock<T, kColumns>(p, plan, vector, shared).run();
  }
}

}  // namespace

template <typename T>
ConvPlan plan_conv_forward(const ConvShape& s, int64_t multiprocessors, int64_t most_shared) {
  std::vector<ConvChoice> choices;
  // Whole weights first: parts of them read z again.
  for (int64_t parts = (s.k + kMostColumns - 1) / kMostColumns; parts <= 4; ++parts)
    for (const int buffers : {2, 1}) {
      const int columns = kernel_columns((s.k + parts - 1) / parts);
      choices.push_back({columns, (s.k + columns - 1) / columns, buffers});
    }
  return plan_conv(s, {multiprocessors, most_shared, 2, 1}, choices, [&](const ConvTiles& tiles, const ConvChoice& c) {
    return ForwardLayout<T>(tiles, int(s.b), c.channels, c.buffers).bytes;
  });
}

template <typename T>
cudaError_t launch_conv_forward(const ConvForwardParams<T>& p, const ConvPlan& plan, cudaStream_t stream) {
  int vector = kChunkNumbers<T>;  // the widest stores that the slice allows
  while (address_bits(p.x) % (vector * sizeof(T)) != 0) vector /= 2;
  return with_columns(plan.channels, [&](auto columns) {
    return launch_conv(conv_forward_kernel<T, decltype(columns)::value>, kThreads, plan, stream, p, plan, vector);
  });
}

#define FASTDENSE_CONV(T)                                                     \
  template ConvPlan plan_conv_forward<T>(const ConvShape&, int64_t, int64_t); \
  template cudaError_t launch_conv_forward<T>(const ConvForwardParams<T>&, const ConvPlan&, cudaStream_t);
FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(FASTDENSE_CONV)
#undef FASTDENSE_CONV

}  // namespace fastdense
