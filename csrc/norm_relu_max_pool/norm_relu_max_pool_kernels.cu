// SPDX-License-Identifier: Apache-2.0
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"
#include "norm_relu_max_pool/norm_relu_max_pool_launch.h"
#include "norm_relu_max_pool/norm_relu_max_pool_windows.h"

namespace fastdense {
namespace {

// Base of what is done with images: the parameters, and V neighbouring channels.  Derived classes have
//   uint32_t rows() const      of an image
//   void image(int64_t)        the image that the next rows are of
//   void row(uint32_t)
//   State, and where that is not NoState:  State& state();  accumulate_t<T>* partial() const
template <typename P, int V>
class PoolChannels {
 public:
  using Params = P;

 protected:
  __device__ PoolChannels(const Params& p, int64_t first) : p_(p), first_(first) {}

  // `pixels` of an image.
  template <typename T>
  __device__ ImageChannels<T, V> channels(T* data, int64_t image, int64_t pixels) const {
    const int64_t c = p_.shape.channels;
    return p_.shape.channels_last ? ImageChannels<T, V>{data + image * pixels * c + first_, uint32_t(c)}
                                  : ImageChannels<T, V>{data + (image * c + first_) * pixels, 1};
  }

  const Params& p_;
  const int64_t first_;
};

template <typename T, int V, typename Windows>
class PoolForward : public PoolChannels<NormPoolForwardParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = PoolChannels<NormPoolForwardParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  using State = NoState;
  __device__ PoolForward(const Params& p, int64_t first, int count) : Base(p, first), norm_(p.norm, first, count) {}

  __device__ uint32_t rows() const { return uint32_t(p_.shape.g.pooled_pixels()); }
  __device__ void image(int64_t n) {
    x_ = this->channels(p_.x, n, p_.shape.g.pixels());
    y_ = this->channels(p_.y, n, rows());
    if (p_.indices) indices_ = this->channels(p_.indices, n, rows());
  }
  __device__ void row(uint32_t pooled) const {
    A best[V] = {};
    Vector<uint8_t, V> index;
#pragma unroll
    for (int i = 0; i < V; ++i) index.v[i] = kNoIndex;
    Windows::template visit<V>(p_.shape.g, x_, pooled, [&](int position, const Vector<T, V>& x, bool inside) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A value = mul_add(A(load(x.v[i])), norm_.scale[i], norm_.shift[i]);
        const bool leads = inside && takes_lead(value, best[i]);
        best[i] = leads ? value : best[i];
        index.v[i] = leads ? uint8_t(position) : index.v[i];
      }
    });
    Vector<T, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y.v[i] = store<T>(best[i]);
    y_.write(pooled, y);
    if (p_.indices) indices_.write(pooled, index);
  }

 private:
  const ColumnScales<A, V> norm_;
  ImageChannels<const T, V> x_{};
  ImageChannels<T, V> y_{};
  ImageChannels<uint8_t, V> indices_{};
};

// Whether the backward pass reads all pixels of a cell before their gradients.  From compute capability 10.0 on, its
// registers would spill.  The emulation does both.
__device__ inline bool backward_reads_ahead([[maybe_unused]] uint32_t cell) {
#if defined(FASTDENSE_EMULATE)
  return cell % 2 == 0;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return false;
#else
  return true;
#endif
}

// Base of the two that go from cell to cell of the input: its gradient dy in front of the pool.
template <typename P, typename T, int V, typename Windows>
class PoolCells : public PoolChannels<P, V> {
 protected:
  using A = accumulate_t<T>;
  using Base = PoolChannels<P, V>;
  using Base::p_;

 public:
  __device__ PoolCells(const P& p, int64_t first) : Base(p, first) {}
  __device__ uint32_t rows() const { return Windows::cells(p_.shape.g); }
  __device__ void image(int64_t n) {
    const int64_t pooled = p_.shape.g.pooled_pixels();
    x_ = this->channels(p_.x, n, p_.shape.g.pixels());
    gradients_ = {this->channels(p_.grad, n, pooled), this->channels(p_.indices, n, pooled)};
  }

 protected:
  // body(pixel, x of it, dy)
  template <typename Body>
  __device__ void each_pixel(uint32_t cell, bool reads_ahead, const Body& body) const {
    uint32_t pixels[Windows::kCellPixels];
    Windows::find_pixels(p_.shape.g, cell, pixels);
    Vector<T, V> x[Windows::kCellPixels];
    if (reads_ahead) {
#pragma unroll
      for (int r = 0; r < Windows::kCellPixels; ++r) x[r] = x_[pixels[r] == kNoPixel ? 0 : pixels[r]];
    }
    Windows::template gather<V, A>(p_.shape.g, gradients_, cell, [&](int r, const A(&dy)[V]) {
      if (pixels[r] == kNoPixel) return;
      if (!reads_ahead) x[r] = x_[pixels[r]];
      body(pixels[r], x[r], dy);
    });
  }

 private:
  ImageChannels<const T, V> x_{};
  PooledGradients<T, V> gradients_{};
};

template <typename T, int V, typename Windows>
class PoolSums : public PoolCells<NormPoolSumsParams<T>, T, V, Windows> {
  using Base = PoolCells<NormPoolSumsParams<T>, T, V, Windows>;
  using Base::p_;
  using typename Base::A;

 public:
  using typename Base::Params;
  using State = ColumnSums<A, V>;
  __device__ PoolSums(const Params& p, int64_t first, int count) : Base(p, first), mean_(p.mean, first, count) {}

  __device__ void row(uint32_t cell) {
    this->each_pixel(cell, true, [&](uint32_t, const Vector<T, V>& x, const A(&dy)[V]) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        state_.first(i) += dy[i];
        // Where there is no gradient, x need not be finite.
        if (dy[i] != A(0)) state_.second(i) += dy[i] * (load(x.v[i]) - mean_[i]);
      }
    });
  }
  __device__ State& state() { return state_; }
  __device__ A* partial() const { return p_.partial; }

 private:
  const ColumnValues<A, V> mean_;
  State state_;
};

template <typename T, int V, typename Windows>
class PoolBackward : public PoolCells<NormPoolBackwardParams<T>, T, V, Windows> {
  using Base = PoolCells<NormPoolBackwardParams<T>, T, V, Windows>;
  using Base::p_;
  using typename Base::A;

 public:
  using typename Base::Params;
  using State = NoState;
  __device__ PoolBackward(const Params& p, int64_t first, int count)
      : Base(p, first), t1_(p.t1, first, count), t2_(p.t2, first, count) {
#pragma unroll
    for (int i = 0; i < V; ++i) norm_[i] = i < count ? p.norm(first + i) : NormCoefficients<A>{};
  }

  __device__ void image(int64_t n) {
    Base::image(n);
    dx_ = this->channels(p_.dx, n, p_.shape.g.pixels());
  }
  __device__ void row(uint32_t cell) const {
    this->each_pixel(cell, backward_reads_ahead(cell), [&](uint32_t pixel, const Vector<T, V>& x, const A(&dy)[V]) {
      Vector<T, V> dx;
#pragma unroll
      for (int i = 0; i < V; ++i)
        dx.v[i] = store<T>(norm_input_gradient<A>(dy[i], load(x.v[i]), norm_[i], t1_[i], t2_[i], p_.inv_count));
      dx_.write(pixel, dx);
    });
  }

 private:
  NormCoefficients<A> norm_[V];
  const ColumnValues<A, V> t1_, t2_;
  ImageChannels<T, V> dx_{};
};

// Blocks take columns of channels; their splits take the rows of an image in turns, and images in turns.
template <template <typename, int, typename> class Pool, typename T, int V, typename Windows>
__global__ void __launch_bounds__(kReduceThreads, kLeastReduceBlocks)
    norm_pool_kernel(const __grid_constant__ typename Pool<T, V, Windows>::Params p, int64_t batch) {
  wait_for_kernels_before();
  using Work = Pool<T, V, Windows>;
  const int64_t channels = p.shape.channels, first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  const int count = first < channels ? V : 0;  // channels are whole vectors
  Work work(p, first, count);
  if (count > 0) {
    const int64_t rows = work.rows(), step = int64_t(gridDim.y) * blockDim.y;
    for (int64_t image = blockIdx.z; image < batch; image += gridDim.z) {
      work.image(image);
      for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += step)
        work.row(uint32_t(row));
    }
  }
  if constexpr (!std::is_same_v<typename Work::State, NoState>)
    write_partial<accumulate_t<T>, V>(work.state(), work.partial(), int64_t(blockIdx.z) * gridDim.y + blockIdx.y,
                                      channels, first, count);
}

// Blocks take a channel of planes each, threads its values in turns; a split of them as in a reduction.
// body(plane, index in it)
template <typename Body>
__device__ void for_each_of_split(int64_t rows, int64_t pixels, int64_t channels, const Body& body) {
  const int64_t per_split = (rows + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * per_split;
  const int64_t end = begin + per_split < rows ? begin + per_split : rows;
  for (int64_t image = begin / pixels; image * pixels < end; ++image) {
    const int64_t before = image * pixels, last = end - before < pixels ? end - before : pixels;
    for (int64_t i = (begin > before ? begin - before : 0) + threadIdx.y; i < last; i += blockDim.y)
      body(image * channels + blockIdx.x, i);
  }
}

template <typename T>
__global__ void plane_moments_kernel(const __grid_constant__ PlaneMomentsParams<T> p, int64_t rows, int64_t channels) {
  wait_for_kernels_before();
  using A = accumulate_t<T>;
  const T first = p.x[blockIdx.x * p.pixels];
  const A pivot = load(first);
  if (blockIdx.y == 0 && threadIdx.y == 0) p.pivot[blockIdx.x] = first;
  ColumnMoments<A, 1> moments;
  for_each_of_split(rows, p.pixels, channels, [&](int64_t plane, int64_t i) {
    const A value[1][1] = {{A(load(p.x[plane * p.pixels + i])) - pivot}};
    moments.add_rows(value);
  });
  write_partial<A, 1>(moments, p.partial, blockIdx.y, channels, blockIdx.x, 1);
}

}  // namespace

template <typename T>
cudaError_t launch_plane_moments(const PlaneMomentsParams<T>& p, int64_t rows, int64_t channels, int64_t splits,
                                 cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (rows == 0 || channels == 0) return cudaSuccess;
  const dim3 block(1, kReduceThreads);
  FASTDENSE_LAUNCH(plane_moments_kernel<T>, dim3(unsigned(channels), unsigned(splits)), block,
                   (join_bytes<A, ColumnMoments<A, 1>>(block)), stream, p, rows, channels);
  return cudaGetLastError();
}

namespace {

template <template <typename, int, typename> class Pool, typename T, int V, typename Windows>
cudaError_t launch(const typename Pool<T, V, Windows>::Params& p, int64_t batch, const NormPoolSplits& splits,
                   cudaStream_t stream) {
  using State = typename Pool<T, V, Windows>::State;
  const int64_t vectors = (p.shape.channels + V - 1) / V;
  const unsigned lanes = p.shape.channels_last ? power_of_two_from(vectors, 32) : 1;
  const dim3 block(lanes, kReduceThreads / lanes);
  const dim3 grid(unsigned((vectors + lanes - 1) / lanes), unsigned(splits.pixels), unsigned(splits.images));
  size_t shared = 0;
  if constexpr (!std::is_same_v<State, NoState>) shared = join_bytes<accumulate_t<T>, State>(block);
  FASTDENSE_LAUNCH((norm_pool_kernel<Pool, T, V, Windows>), grid, block, shared, stream, p, batch);
  return cudaGetLastError();
}

template <template <typename, int, typename> class Pool, typename T, int V>
cudaError_t launch_windows(const typename Pool<T, V, AnyWindows>::Params& p, int64_t batch,
                           const NormPoolSplits& splits, cudaStream_t stream) {
  using Stem = SquareWindows<3, 2, 1>;
  using Quarters = SquareWindows<2, 2, 0>;
  if (Stem::are(p.shape.g)) return launch<Pool, T, V, Stem>(p, batch, splits, stream);
  if (Quarters::are(p.shape.g)) return launch<Pool, T, V, Quarters>(p, batch, splits, stream);
  return launch<Pool, T, V, AnyWindows>(p, batch, splits, stream);
}

// `bits`: of the addresses of all tensors.  Windows are known to the widest accesses, and to planes.
template <template <typename, int, typename> class Pool, typename T, int V = 16 / sizeof(T)>
cudaError_t launch_pool(const typename Pool<T, V, AnyWindows>::Params& p, uintptr_t bits, int64_t batch,
                        const NormPoolSplits& splits, cudaStream_t stream) {
  const int64_t channels = p.shape.channels;
  if (batch == 0 || channels == 0) return cudaSuccess;
  if (!p.shape.channels_last) return launch_windows<Pool, T, 1>(p, batch, splits, stream);
  if constexpr (V > 1) {
    if ((bits | uintptr_t(channels) * sizeof(T)) % (V * sizeof(T)) != 0)
      return launch_pool<Pool, T, V / 2>(p, bits, batch, splits, stream);
  }
  if constexpr (V * sizeof(T) == 16) return launch_windows<Pool, T, V>(p, batch, splits, stream);
  return launch<Pool, T, V, AnyWindows>(p, batch, splits, stream);
}

template <typename T>
uintptr_t bits_of(const T* data, const uint8_t* bytes) {
  return reinterpret_cast<uintptr_t>(data) | reinterpret_cast<uintptr_t>(bytes) * sizeof(T);
}

}  // namespace

template <typename T>
cudaError_t launch_norm_pool(const NormPoolForwardParams<T>& p, int64_t batch, const NormPoolSplits& splits,
                             cudaStream_t stream) {
  return launch_pool<PoolForward, T>(p, bits_of(p.x, p.indices) | bits_of(p.y, nullptr), batch, splits, stream);
}

template <typename T>
cudaError_t launch_norm_pool_sums(const NormPoolSumsParams<T>& p, int64_t batch, const NormPoolSplits& splits,
                                  cudaStream_t stream) {
  return launch_pool<PoolSums, T>(p, bits_of(p.x, p.indices) | bits_of(p.grad, nullptr), batch, splits, stream);
}

template <typename T>
cudaError_t launch_norm_pool_backward(const NormPoolBackwardParams<T>& p, int64_t batch, const NormPoolSplits& splits,
                                      cudaStream_t stream) {
  const uintptr_t bits = bits_of(p.x, p.indices) | bits_of(p.grad, nullptr) | bits_of(p.dx, nullptr);
  return launch_pool<PoolBackward, T>(p, bits, batch, splits, stream);
}

#define FASTDENSE_NORM_POOL(T)                                                                                         \
  template cudaError_t launch_plane_moments<T>(const PlaneMomentsParams<T>&, int64_t, int64_t, int64_t, cudaStream_t); \
  template cudaError_t launch_norm_pool<T>(const NormPoolForwardParams<T>&, int64_t, const NormPoolSplits&,            \
                                           cudaStream_t);                                                              \
  template cudaError_t launch_norm_pool_sums<T>(const NormPoolSumsParams<T>&, int64_t, const NormPoolSplits&,          \
                                                cudaStream_t);                                                         \
  template cudaError_t launch_norm_pool_backward<T>(const NormPoolBackwardParams<T>&, int64_t, const NormPoolSplits&,  \
                                                    cudaStream_t);
FASTDENSE_FOR_EACH_STORAGE(FASTDENSE_NORM_POOL)
#undef FASTDENSE_NORM_POOL

}  // namespace fastdense
