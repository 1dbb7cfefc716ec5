// SPDX-License-Identifier: Apache-2.0
// Gradient of the weight of grouped_conv_launch.h's convolution.
#include "cuda/grouped_conv/grouped_conv_plan.h"
#include "cuda/grouped_conv/grouped_conv_products.h"

namespace fastdense {
namespace {

FASTDENSE_HD GroupedTaps forward_taps() { return {false, 1}; }  // with any stride

// Owners of the sums that a part of the channels has, so many times as a block has threads: lanes.
struct Owners {
  int count, lanes;
  FASTDENSE_HD Owners(int count) : count(count), lanes(count > 0 ? kGroupedThreads / count : 0) {}
};

// Numbers of a lane's sums that are added to another's at once, and from owner to owner: in all banks.
constexpr int kAtOnce = 16, kApart = kAtOnce + 1;

// On tensor cores: warps own a chunk of d, and share the pixels of tiles by steps of products.  kWindow: chunks of u
// that it meets.
template <typename T, int kWindow>
class WeightSums {
  static_assert(sizeof(T) == 2);
  static constexpr int kPairs = (kTaps * kWindow + 1) / 2, kDepth = kGroupedSteps;

 public:
  static FASTDENSE_HD constexpr int count() { return 4 * kPairs; }
  static constexpr int kPixelsAtOnce = 2 * kDepth;

  static FASTDENSE_HD Owners owners(int channels, int) { return {channels / kChunkNumbers<T> * 32}; }
  static FASTDENSE_HD int table_bytes(const GroupedPlan& plan) {
    return GroupedDistances::bytes(GroupedItems(forward_taps(), plan.window)) + kChunk;
  }

  __device__ WeightSums(const GroupedPlan& plan, int channels, int stride, int owner, int lane, unsigned char* table)
      : tiles_(plan.tiles),
        group_(plan.group),
        stride_(stride),
        lane_(lane),
        thread_(owner % 32),
        chunk_(owner / 32),
        lanes_(owners(channels, 0).lanes),
        items_(forward_taps(), kWindow),
        first_chunk_(items_.first_chunk(chunk_, channels / kChunkNumbers<T>, plan.group)),
        zeros_(table),
        distances_(plan.tiles, forward_taps(), items_, stride, table + kChunk) {
    if (threadIdx.x < kChunk / 4) reinterpret_cast<uint32_t*>(table)[threadIdx.x] = 0;
  }

  // What lies outside the image counts as zero in d; in u zeros take its place, since what a tap reads there may be no
  // number.
  __device__ void add_tile(const unsigned char* u, const unsigned char* d, const GroupedPlace& place,
                           const GroupedPixels& pixels) {
    for (int first = lane_ * kPixelsAtOnce; first < tiles_.pixels(); first += lanes_ * kPixelsAtOnce) {
      uint32_t right[4];
      load_matrices_transposed(right, d + (first + thread_) * stride_ + chunk_ * kChunk);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int p = first + half * kDepth + thread_ / 16 * 8 + thread_ % 8, item = thread_ / 8 % 2;
        const bool inside = p < tiles_.pixels() && pixels.row(place, p) >= 0;
        const unsigned char* left = u + (inside ? distances_.of_pixel(p) : 0) + first_chunk_ * kChunk;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          uint32_t a[4];
          load_matrices_transposed(a, inside ? left + distances_.of_item(2 * i + item) : zeros_);
          multiply_add<T>(sum_[i], a, right[2 * half], right[2 * half + 1]);
        }
      }
    }
  }

  __device__ float* numbers() { return sum_[0]; }

  // to [channels of the part][9][channels of a group]
  __device__ void write(float* to) const {
    const GroupedWeight at{group_, false};
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int item = 2 * i + n / 2, out = chunk_ * 8 + thread_ % 4 * 2 + n % 2;
        const int in = (first_chunk_ + items_.chunk(item)) * 8 + thread_ / 4;
        if (item < kTaps * kWindow && in / group_ == out / group_) to[at.at(out, in, items_.tap(item, 0))] = sum_[i][n];
      }
  }

 private:
  const GroupedTiles& tiles_;
  const int group_, stride_, lane_, thread_, chunk_, lanes_;
  const GroupedItems items_;
  const int first_chunk_;
  unsigned char* const zeros_;
  const GroupedDistances distances_;
  float sum_[kPairs][4] = {};
};

// By multiply-adds, for float: a thread owns kSide channels of d and kSide of u, of one group, at three taps beside
// each other; lanes share the lines of tiles.
template <int kSide>
class WeightSums<float, kSide> {
 public:
  static FASTDENSE_HD constexpr int count() { return 3 * kSide * kSide; }
  static constexpr int kPixelsAtOnce = 1;

  static FASTDENSE_HD Owners owners(int channels, int group) { return {3 * (channels / kSide) * (group / kSide)}; }
  static FASTDENSE_HD int table_bytes(const GroupedPlan&) { return 0; }

  __device__ WeightSums(const GroupedPlan& plan, int channels, int stride, int owner, int lane, unsigned char*)
      : tiles_(plan.tiles),
        group_(plan.group),
        stride_(stride),
        lane_(lane),
        lanes_(owners(channels, plan.group).lanes),
        line_(owner % 3),
        out_(owner / 3 / (group_ / kSide) * kSide),
        in_(out_ / group_ * group_ + owner / 3 % (group_ / kSide) * kSide) {}

  __device__ void add_tile(const unsigned char* u, const unsigned char* d, const GroupedPlace& place,
                           const GroupedPixels&) {
    const int rows = tiles_.height - place.y < tiles_.rows ? tiles_.height - place.y : tiles_.rows;
    const int columns = tiles_.width - place.x < tiles_.columns ? tiles_.width - place.x : tiles_.columns;
    const int second = tiles_.place(1) * stride_, third = tiles_.place(2) * stride_;
    for (int y = lane_; y < rows; y += lanes_) {
      const unsigned char* left = u + (tiles_.base(y, 0) + line_ * tiles_.pitch) * stride_ + in_ * int(sizeof(float));
      const unsigned char* right = d + y * tiles_.columns * stride_ + out_ * int(sizeof(float));
#pragma unroll 1
      for (int x = 0; x < columns; ++x, left += stride_, right += stride_) {
        float of_d[kSide], of_u[3][kSide];
        load_side(reinterpret_cast<const float*>(right), of_d);
        load_side(reinterpret_cast<const float*>(left), of_u[0]);
        load_side(reinterpret_cast<const float*>(left + second), of_u[1]);
        load_side(reinterpret_cast<const float*>(left + third), of_u[2]);
#pragma unroll
        for (int j = 0; j < 3; ++j)
#pragma unroll
          for (int o = 0; o < kSide; ++o)
#pragma unroll
            for (int i = 0; i < kSide; ++i) sum_[j][o][i] = mul_add(of_d[o], of_u[j][i], sum_[j][o][i]);
      }
    }
  }

  __device__ float* numbers() { return sum_[0][0]; }

  __device__ void write(float* to) const {
    const GroupedWeight at{group_, false};
#pragma unroll
    for (int j = 0; j < 3; ++j)
#pragma unroll
      for (int o = 0; o < kSide; ++o)
#pragma unroll
        for (int i = 0; i < kSide; ++i) to[at.at(out_ + o, in_ + i, 3 * line_ + j)] = sum_[j][o][i];
  }

 private:
  const GroupedTiles& tiles_;
  const int group_, stride_, lane_, lanes_, line_, out_, in_;
  float sum_[3][kSide][kSide] = {};
};

template <typename T, int kVariant>
struct WeightLayout {
  using Sums = WeightSums<T, kVariant>;
  int stride;  // bytes from place to place
  int u, u_bytes, d, d_bytes, table, norm, pixels, bytes;
  FASTDENSE_HD WeightLayout(const GroupedPlan& plan) {
    SharedLayout shared;
    stride = row_stride(plan.channels / kChunkNumbers<T>);
    u_bytes = plan.tiles.places() * stride;
    d_bytes = d_rows(plan.tiles) * stride;
    d = plan.buffers * u_bytes;
    // The sums of a lane at a time take the place of tiles; a part with fewer channels has more lanes, and less.
    const int sums = Sums::owners(plan.channels, plan.group).count * kApart * int(sizeof(float));
    const int tiles = plan.buffers * (u_bytes + d_bytes);
    u = shared.take(tiles > sums ? tiles : sums);
    table = shared.take(Sums::table_bytes(plan));
    norm = shared.take(GroupedNorm::bytes(plan.channels));
    pixels = shared.take(GroupedPixels::bytes(plan.tiles));
    bytes = shared.size();
  }
  // Of a tile, and of nothing up to whole products.
  static FASTDENSE_HD int d_rows(const GroupedTiles& t) {
    return (t.pixels() + Sums::kPixelsAtOnce - 1) / Sums::kPixelsAtOnce * Sums::kPixelsAtOnce;
  }
};

template <typename T, int kVariant>
class WeightGradientBlock {
  using Layout = WeightLayout<T, kVariant>;
  using Sums = WeightSums<T, kVariant>;

 public:
  __device__ WeightGradientBlock(const GroupedWeightGradientParams<T>& p, const GroupedPlan& plan,
                                 unsigned char* shared)
      : p_(p),
        plan_(plan),
        at_(plan),
        shared_(shared),
        first_(int(blockIdx.y) * plan.channels),
        channels_(p.width - first_ < plan.channels ? p.width - first_ : plan.channels),
        owners_(Sums::owners(channels_, plan.group)),
        lane_(int(threadIdx.x) / owners_.count),
        norm_(shared + at_.norm, plan.channels),
        pixels_(plan.tiles, shared + at_.pixels),
        place_(plan.tiles, blockIdx.x),
        sums_(plan, channels_, at_.stride, int(threadIdx.x) % owners_.count, lane_, shared + at_.table) {}

  __device__ void run() {
    norm_.load(p_.norm, first_, channels_);
    __syncthreads();
    for_each_tile<GroupedPlace>(plan_, *this);
    add_lanes();
    if (lane_ == 0) sums_.write(p_.partial + (int64_t(blockIdx.x) * p_.width + first_) * kTaps * plan_.group);
  }

  __device__ void load_tile(const GroupedPlace& place, int buffer) {
    const int chunks = channels_ / kChunkNumbers<T>;
    copy_pixels<kGroupedThreads>(u(buffer), at_.stride, plan_.tiles.places(), chunks, p_.z + first_, p_.width,
                                 channels_, [&](int p) { return pixels_.source_row(place, p); });
    copy_pixels<kGroupedThreads>(d(buffer), at_.stride, Layout::d_rows(plan_.tiles), chunks, p_.d + first_, p_.width,
                                 channels_, [&](int p) { return pixels_.row(place, p); });
    commit_copies();
  }

  __device__ void prepare_tile(const GroupedPlace& place, int buffer) {
    activate_pixels<kGroupedThreads, T>(u(buffer), at_.stride, plan_.tiles.places(), channels_, norm_.scale,
                                        norm_.shift, [&](int p) { return pixels_.source_row(place, p); });
    place_ = place;
  }

  __device__ void multiply_tile(int buffer) {
    if (lane_ < owners_.lanes) sums_.add_tile(u(buffer), d(buffer), place_, pixels_);
  }

  __device__ void finish_tile(bool) {}

 private:
  __device__ unsigned char* u(int buffer) const { return shared_ + at_.u + buffer * at_.u_bytes; }
  __device__ unsigned char* d(int buffer) const { return shared_ + at_.u + at_.d + buffer * at_.d_bytes; }

  // Lane by lane, in their order, to what lane 0 has; few numbers at once, which would take registers from others.
  __device__ void add_lanes() {
    float* const workspace = reinterpret_cast<float*>(shared_ + at_.u) + int(threadIdx.x) % owners_.count * kApart;
    float* const own = sums_.numbers();
    for (int lane = 1; lane < owners_.lanes; ++lane)
#pragma unroll
      for (int first = 0; first < Sums::count(); first += kAtOnce) {
        __syncthreads();  // the workspace is free
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (lane_ == lane && first + i < Sums::count()) workspace[i] = own[first + i];
        __syncthreads();  // the lane's sums are there
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (lane_ == 0 && first + i < Sums::count()) own[first + i] += workspace[i];
      }
  }

  const GroupedWeightGradientParams<T>& p_;
  const GroupedPlan& plan_;
  const Layout at_;
  unsigned char* const shared_;
  const int first_, channels_;
  const Owners owners_;
  const int lane_;
  const GroupedNorm norm_;
  const GroupedPixels pixels_;
  GroupedPlace place_;  // of the tile in work
  Sums sums_;
};

// As many as a multiprocessor has registers for.
template <typename T, int kVariant>
constexpr int kResident = sizeof(T) == 2 && kVariant == 4 ? 1 : 2;

template <typename T, int kVariant>
__global__ void __launch_bounds__(kGroupedThreads, (kResident<T, kVariant>))
    grouped_weight_gradient_kernel(const __grid_constant__ GroupedWeightGradientParams<T> p,
                                   const __grid_constant__ GroupedPlan plan) {
  wait_for_kernels_before();
  if constexpr (kTensorCores) {
    FASTDENSE_SHARED(shared);
    WeightGradientBlock<T, kVariant>(p, plan, shared).run();
  }
}

// body(variant) with a constant.
template <typename T, typename Body>
auto with_weight_variant(const GroupedPlan& plan, const Body& body) {
  const int variant = sizeof(T) == 2 ? plan.window : grouped_side(plan.group);
  if (variant == 4) return body(std::integral_constant<int, 4>());
  if (variant == 3) return body(std::integral_constant<int, 3>());
  if constexpr (sizeof(T) == 2) {
    if (variant == 1) return body(std::integral_constant<int, 1>());
  }
  return body(std::integral_constant<int, 2>());
}

}  // namespace

template <typename T>
GroupedPlan plan_grouped_weight_gradient(const GroupedShape& s, int64_t multiprocessors, int64_t most_shared) {
  // Partial sums of a block are as much as some tiles.
  const int resident = sizeof(T) == 2 && grouped_window<T>(int(s.channels)) == 4 ? 1 : 2;
  const GroupedLimits limits{multiprocessors, most_shared, resident, 2};
  return plan_grouped<T>(s, grid_of_result(s), limits, [](const GroupedPlan& plan) {
    return with_weight_variant<T>(plan, [&](auto variant) {
      using Layout = WeightLayout<T, decltype(variant)::value>;
      return Layout::Sums::owners(plan.channels, plan.group).lanes > 0 ? Layout(plan).bytes : 0;
    });
  });
}

template <typename T>
cudaError_t launch_grouped_weight_gradient(const GroupedWeightGradientParams<T>& p, const GroupedPlan& plan,
                                           cudaStream_t stream) {
  return with_weight_variant<T>(plan, [&](auto variant) {
    return launch_grouped(grouped_weight_gradient_kernel<T, decltype(variant)::value>, plan, stream, p, plan);
  });
}

#define FASTDENSE_CONV(T)                                                                                           \
  template GroupedPlan plan_grouped_weight_gradient<T>(const GroupedShape&, int64_t, int64_t);                      \
  template cudaError_t launch_grouped_weight_gradient<T>(const GroupedWeightGradientParams<T>&, const GroupedPlan&, \
                                                         cudaStream_t);
FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(FASTDENSE_CONV)
#undef FASTDENSE_CONV

}  // namespace fastdense
