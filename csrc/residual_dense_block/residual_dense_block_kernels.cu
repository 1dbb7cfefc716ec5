// SPDX-License-Identifier: Apache-2.0
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"
#include "residual_dense_block/residual_dense_block_launch.h"

namespace fastdense {
namespace {

template <typename T, int V>
class PackRows : public Columns<PackRowsParams<T>, V> {
  using Base = Columns<PackRowsParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 4;
  using State = NoState;
  __device__ PackRows(const Params& p, int64_t first, int count) : Base(p, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t from = p_.first + row + r * step;
      x[r] = p_.begin <= from && from < p_.end ? this->read_row(p_.x, from) : Vector<T, V>{};
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) this->write_row(p_.packed, row + r * step, x[r]);
  }
};

// V neighbouring numbers of a bias, or zeros.
template <typename A, int V>
struct ColumnBias {
  A v[V];
  __device__ ColumnBias(const A* bias, int64_t first, int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = bias && i < count ? bias[first + i] : A(0);
  }
  __device__ A operator[](int i) const { return v[i]; }
};

template <typename T, int V>
class Append : public Columns<AppendParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<AppendParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 4;
  using State = NoState;
  __device__ Append(const Params& p, int64_t first, int count) : Base(p, first, count), bias_(p.bias, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> x[kRows];
    this->read_rows(p_.sums, row, step, x);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i) x[r].v[i] = store<T>(leaky_relu<A>(load(x[r].v[i]) + bias_[i], p_.slope));
      this->write_row(p_.y, row + r * step, x[r]);
    }
  }

 private:
  const ColumnBias<A, V> bias_;
};

template <typename T, int V>
class Residual : public Columns<ResidualParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<ResidualParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 2;
  using State = NoState;
  __device__ Residual(const Params& p, int64_t first, int count) : Base(p, first, count), bias_(p.bias, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> x[kRows], inner[kRows], outer[kRows] = {};
    this->read_rows(p_.sums, row, step, x);
    this->read_rows(p_.inner, row, step, inner);
    if (p_.outer.data) this->read_rows(p_.outer, row, step, outer);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        A value = residual_sum<A>(load(x[r].v[i]) + bias_[i], p_.inner_scale, load(inner[r].v[i]));
        if (p_.outer.data) value = residual_sum<A>(value, p_.outer_scale, load(outer[r].v[i]));
        x[r].v[i] = store<T>(value);
      }
      this->write_row(p_.y, row + r * step, x[r]);
    }
  }

 private:
  const ColumnBias<A, V> bias_;
};

template <typename T, int V>
class SumsGradient : public Columns<SumsGradientParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<SumsGradientParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 2;
  using State = ColumnSums<A, V>;
  __device__ SumsGradient(const Params& p, int64_t first, int count) : Base(p, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> g[kRows], y[kRows] = {};
    this->read_rows(p_.gradient, row, step, g);
    if (p_.y.data) this->read_rows(p_.y, row, step, y);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        // zeros for y take every gradient times the factor
        const A d = leaky_relu_gradient<A>(load(g[r].v[i]), load(y[r].v[i]), p_.factor);
        state_.first(i) += d;
        g[r].v[i] = store<T>(d);
      }
      this->write_row(p_.d, row + r * step, g[r]);
    }
  }
  __device__ State& state() { return state_; }
  __device__ A* partial() const { return p_.partial; }

 private:
  State state_;
};

template <typename T, int V>
class AddRows : public Columns<AddRowsParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<AddRowsParams<T>, V>;
  using Base::p_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 4;
  using State = NoState;
  __device__ AddRows(const Params& p, int64_t first, int count) : Base(p, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> dx[kRows], g[kRows];
    this->read_rows(p_.dx, row, step, dx);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      g[r] = row + r * step < p_.added ? this->read_row(p_.gradient, row + r * step) : Vector<T, V>{};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i) g[r].v[i] = store<T>(A(load(g[r].v[i])) + A(load(dx[r].v[i])));
      this->write_row(p_.gradient, row + r * step, g[r]);
    }
  }
};

}  // namespace

template <typename T>
cudaError_t launch_pack_rows(const PackRowsParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                             cudaStream_t stream) {
  return launch_column_reduce<PackRows, T>(p, address_bits(p.x) | address_bits(p.packed), rows, columns, splits,
                                           stream);
}

template <typename T>
cudaError_t launch_append(const AppendParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                          cudaStream_t stream) {
  return launch_column_reduce<Append, T>(p, address_bits(p.sums) | address_bits(p.y), rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_residual(const ResidualParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                            cudaStream_t stream) {
  const uintptr_t bits = address_bits(p.sums) | address_bits(p.y) | address_bits(p.inner) | address_bits(p.outer);
  return launch_column_reduce<Residual, T>(p, bits, rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_sums_gradient(const SumsGradientParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                                 cudaStream_t stream) {
  const uintptr_t bits = address_bits(p.gradient) | address_bits(p.y) | address_bits(p.d);
  return launch_column_reduce<SumsGradient, T>(p, bits, rows, columns, splits, stream);
}

template <typename T>
cudaError_t launch_add_rows(const AddRowsParams<T>& p, int64_t rows, int64_t columns, int64_t splits,
                            cudaStream_t stream) {
  return launch_column_reduce<AddRows, T>(p, address_bits(p.dx) | address_bits(p.gradient), rows, columns, splits,
                                          stream);
}

#define FASTDENSE_RESIDUAL(T)                                                                                          \
  template cudaError_t launch_pack_rows<T>(const PackRowsParams<T>&, int64_t, int64_t, int64_t, cudaStream_t);         \
  template cudaError_t launch_append<T>(const AppendParams<T>&, int64_t, int64_t, int64_t, cudaStream_t);              \
  template cudaError_t launch_residual<T>(const ResidualParams<T>&, int64_t, int64_t, int64_t, cudaStream_t);          \
  template cudaError_t launch_sums_gradient<T>(const SumsGradientParams<T>&, int64_t, int64_t, int64_t, cudaStream_t); \
  template cudaError_t launch_add_rows<T>(const AddRowsParams<T>&, int64_t, int64_t, int64_t, cudaStream_t);
FASTDENSE_FOR_EACH_STORAGE(FASTDENSE_RESIDUAL)
#undef FASTDENSE_RESIDUAL

}  // namespace fastdense
