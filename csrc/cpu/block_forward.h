// SPDX-License-Identifier: Apache-2.0
// What the blocks of layers share on the CPU, forward and backward: threads, chunks of pixel rows, workspace, packed
// weights, norm coefficients, batch statistics.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <type_traits>
#include <vector>

#include "core/batch_norm_math.h"
#include "core/storage.h"
#include "core/sync_batch_norm.h"
#include "core/weights.h"
#include "cpu/conv1x1/conv1x1_kernels.h"

namespace fastdense {

// Runs of rows that share statistics: all of them, or those of one sample each.
struct RowSets {
  RowSets(int64_t rows) : rows(rows) {}  // NOLINT: all rows are one set
  RowSets(int64_t count, int64_t rows) : count(count), rows(rows) {}
  int64_t count = 1, rows;
};

// A set of rows in pieces, which begin at multiples of `multiple`.
struct Chunks {
  int64_t rows, count, multiple;
  int64_t begin(int64_t chunk) const {
    const int64_t step = count * multiple;
    return std::min(rows, (chunk * rows + step - 1) / step * multiple);
  }
  int64_t size(int64_t chunk) const { return begin(chunk + 1) - begin(chunk); }
};

template <typename T>
class BlockForward {
 public:
  using A = accumulate_t<T>;
  static constexpr at::ScalarType kAccumulate = std::is_same_v<A, double> ? at::kDouble : at::kFloat;

  // process_group: whose processes share batch statistics; see SyncBatchNorm.
  explicit BlockForward(const std::string& process_group = {})
      : kernels(conv1x1_kernels<T>(current_isa())), workers(std::max(1, at::get_num_threads())), sync(process_group) {}

  // Workspace for every worker: what Conv1x1Kernels need, and `extra` bytes.
  void reserve_workspace(int64_t widest_source, int64_t widest_product, int64_t extra = 0) {
    workspace_bytes_ = kernels.workspace_bytes(widest_source, widest_product) + extra;
    workspace_ = bytes(workers * workspace_bytes_);
  }
  void* workspace(int64_t worker) const { return workspace_.mutable_data_ptr<uint8_t>() + worker * workspace_bytes_; }

  template <typename V>
  static at::Tensor temporary(at::IntArrayRef sizes) {
    constexpr at::ScalarType type = std::is_same_v<V, double> ? at::kDouble : at::kFloat;
    return at::empty(sizes, at::TensorOptions().dtype(type));
  }

  static at::Tensor bytes(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(at::kByte)); }

  // body(worker, chunk, set, first row, rows) for chunks of at most `most` rows, none of which has rows of two sets.
  // Worker w always gets the same run of chunks, whichever thread runs it, so sums per worker do not depend on
  // scheduling.
  template <typename Body>
  void for_each_chunk(const RowSets& sets, int64_t most, const Body& body) const {
    const Chunks chunks = this->chunks(sets, most);
    for_each_worker(sets.count * chunks.count, of_chunk(sets, chunks, body));
  }

  // The same for bodies that keep nothing for their worker; see share_units().
  template <typename Body>
  void share_chunks(const RowSets& sets, int64_t most, const Body& body) const {
    const Chunks chunks = this->chunks(sets, most);
    share_units(sets.count * chunks.count, of_chunk(sets, chunks, body));
  }

  // Of a set: enough of them for all workers, of the same number of tiles where there are many rows.
  Chunks chunks(const RowSets& sets, int64_t most) const {
    const int64_t shares = sets.count < workers ? workers : 1;
    const int64_t least = std::max<int64_t>(1, (sets.rows + most - 1) / most);
    const int64_t count = std::min((least + shares - 1) / shares * shares, sets.rows);
    return {sets.rows, count, sets.rows >= 4 * kernels.tile_rows * count ? kernels.tile_rows : 1};
  }

  // body(worker, unit) for all units; contiguous runs of units per worker.
  template <typename Body>
  void for_each_worker(int64_t units, const Body& body) const {
    const int64_t used = std::min(workers, units);
    at::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t unit = worker * units / used; unit < (worker + 1) * units / used; ++unit) body(worker, unit);
    });
  }

  // The same for bodies whose results do not depend on who runs them: cores are never equally fast, so a worker who is
  // done with his run goes on with what is left of the others'.
  template <typename Body>
  void share_units(int64_t units, const Body& body) const {
    struct alignas(64) Next {  // a cache line each
      std::atomic<int64_t> unit;
    };
    const int64_t used = std::min(workers, units);
    std::vector<Next> next(static_cast<size_t>(used));
    for (int64_t worker = 0; worker < used; ++worker) next[size_t(worker)].unit = worker * units / used;
    at::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t away = 0; away < used; ++away) {
          const int64_t of = (worker + away) % used, last = (of + 1) * units / used;
          for (int64_t unit; (unit = next[size_t(of)].unit.fetch_add(1, std::memory_order_relaxed)) < last;)
            body(worker, unit);
        }
    });
  }

  // weight [n, depth] (or its transpose) in panels for the kernels; its data is at panels_of().
  at::Tensor pack(const A* weight, int64_t depth, int64_t n, int64_t depth_stride, int64_t column_stride) const {
    at::Tensor packed = bytes(padded(n) * padded_depth(depth) * kernels.operand_bytes);
    pack_to(packed.mutable_data_ptr(), weight, depth, n, depth_stride, column_stride);
    return packed;
  }
  void pack_to(void* out, const A* weight, int64_t depth, int64_t n, int64_t depth_stride,
               int64_t column_stride) const {
    share_units(padded(n) / kernels.panel, [&](int64_t, int64_t panel) {
      kernels.pack(weight, depth, n, depth_stride, column_stride, panel, panel + 1, out);
    });
  }

  // A 1x1 convolution [n, depth, 1...] for forward products.
  at::Tensor pack_forward(const at::Tensor& conv) const {
    const at::Tensor weight = accumulate_type(conv);
    return pack(weight.template const_data_ptr<A>(), conv.size(1), conv.size(0), 1, conv.size(1));
  }

  // Input channels [first, first + n) of a 1x1 convolution [depth, channels, 1...] for backward products.
  at::Tensor pack_backward(const at::Tensor& conv, int64_t first, int64_t n) const {
    const at::Tensor weight = accumulate_type(conv);
    return pack(weight.template const_data_ptr<A>() + first, conv.size(0), n, conv.size(1), 1);
  }

  static const void* panels_of(const at::Tensor& packed) { return packed.const_data_ptr(); }

  int64_t padded(int64_t n) const { return (n + kernels.panel - 1) / kernels.panel * kernels.panel; }
  int64_t padded_depth(int64_t depth) const { return (depth + kernels.align - 1) / kernels.align * kernels.align; }

  static at::Tensor accumulate_type(const at::Tensor& t) { return t.to(kAccumulate).contiguous(); }

  // A bias [n] in the type of arithmetic, and its numbers; undefined and nullptr where there is none.
  static at::Tensor bias_of(const ConvArgs& bias) {
    return bias.weight.defined() ? accumulate_type(bias.weight) : at::Tensor();
  }
  static const A* data_of(const at::Tensor& bias) {
    return bias.defined() ? bias.template const_data_ptr<A>() : nullptr;
  }

  // conv [k, in, kernel...] as rows [taps * k, in].
  static at::Tensor tap_rows(const at::Tensor& conv) {
    const at::Tensor w = accumulate_type(conv);
    return w.reshape({w.size(0), w.size(1), -1}).permute({2, 0, 1}).reshape({-1, w.size(1)}).contiguous();
  }

  struct Coefficients {
    at::Tensor tensor;  // [sets, 4, n]: scale, shift, mean, rstd
    int64_t n;
    int64_t next = 0;  // numbers up to those of the next set; 0 where all sets have the same
    const A* row(int i, int64_t set) const { return tensor.const_data_ptr<A>() + set * next + i * n; }
    const A* scale(int64_t set = 0) const { return row(0, set); }
    const A* shift(int64_t set = 0) const { return row(1, set); }
    const A* mean(int64_t set = 0) const { return row(2, set); }
    const A* rstd(int64_t set = 0) const { return row(3, set); }
  };

  // From statistics of `sets` sets of rows, those of a set `next` numbers behind those of the one before it, or from
  // the running ones of a frozen norm.
  Coefficients coefficients(const NormArgs& norm, const A* set_mean, const A* set_var, int64_t n, int64_t sets = 1,
                            int64_t next = 0) const {
    const int64_t count = norm.frozen() ? 1 : sets;
    Coefficients c{temporary<A>({count, 4, n}), n, count > 1 ? 4 * n : 0};
    const at::Tensor weight = norm.weight.defined() ? accumulate_type(norm.weight) : norm.weight;
    const at::Tensor bias = norm.bias.defined() ? accumulate_type(norm.bias) : norm.bias;
    const at::Tensor mean = norm.frozen() ? accumulate_type(norm.running_mean) : norm.running_mean;
    const at::Tensor var = norm.frozen() ? accumulate_type(norm.running_var) : norm.running_var;
    const A* w = weight.defined() ? weight.const_data_ptr<A>() : nullptr;
    const A* b = bias.defined() ? bias.const_data_ptr<A>() : nullptr;
    for (int64_t set = 0; set < count; ++set) {
      const A* m = norm.frozen() ? mean.const_data_ptr<A>() : set_mean + set * next;
      const A* v = norm.frozen() ? var.const_data_ptr<A>() : set_var + set * next;
      A* out = c.tensor.template mutable_data_ptr<A>() + set * c.next;
      for_each_group(norm, n, [&](int64_t begin, int64_t size) {
        const BatchMoments<A> moments = size == 1 ? BatchMoments<A>{m[begin], v[begin]} : of_group(m, v, begin, size);
        for (int64_t j = begin; j < begin + size; ++j) {
          const auto k = norm_coefficients<A>(w ? w[j] : A(1), b ? b[j] : A(0), moments.mean, moments.var, A(norm.eps));
          out[j] = k.scale;
          out[n + j] = k.shift;
          out[2 * n + j] = k.mean;
          out[3 * n + j] = k.rstd;
        }
      });
    }
    return c;
  }

  // body(first, channels) for all groups of n channels that share statistics; a batch norm's are single channels.
  template <typename Body>
  static void for_each_group(const NormArgs& norm, int64_t n, const Body& body) {
    const int64_t size = norm.groups > 0 && !norm.frozen() ? n / norm.groups : 1;
    for (int64_t begin = 0; begin < n; begin += size) body(begin, size);
  }

  // `n` columns of x from channel `first` of the norm on.
  static Source<T> source(const T* x, int64_t ld, const Coefficients& c, int64_t first, int64_t n) {
    return {x, ld, n, c.scale() + first, c.shift() + first};
  }
  static Source<T> source(const T* x, int64_t ld, const Coefficients& c) { return source(x, ld, c, 0, c.n); }
  // The same columns with the coefficients of a set.
  static Source<T> of_set(Source<T> source, const Coefficients& c, int64_t set) {
    source.scale += set * c.next;
    source.shift += set * c.next;
    return source;
  }

  // Moments [units, 2, n] of units of count(unit) rows each, combined in order.
  void combine(const at::Tensor& partial, int64_t n, const std::function<int64_t(int64_t)>& count, A* mean,
               A* var) const {
    const double* p = partial.const_data_ptr<double>();
    int64_t rows = 0;
    for (int64_t u = 0; u < partial.size(0); ++u) rows += count(u);
    for (int64_t j = 0; j < n; ++j) {
      Moments<double> total{0, 0, 0};
      for (int64_t u = 0; u < partial.size(0); ++u)
        total = combine_moments<double>(total, {double(count(u)), p[2 * u * n + j], p[(2 * u + 1) * n + j]});
      mean[j] = A(total.mean);
      var[j] = A(total.m2 / total.count);
    }
    sync.moments(mean, var, n, rows, at::TensorOptions());
  }

  // The same for each of `sets` sets of as many units; `next`: see coefficients().
  void combine(const at::Tensor& partial, int64_t n, const std::function<int64_t(int64_t)>& count, A* mean, A* var,
               int64_t sets, int64_t next) const {
    const int64_t units = sets > 0 ? partial.size(0) / sets : 0;
    for (int64_t set = 0; set < sets; ++set)
      combine(partial.narrow(0, set * units, units), n, count, mean + set * next, var + set * next);
  }

  // Statistics of n columns of x[rows, ld].
  void statistics(const T* x, int64_t ld, const RowSets& sets, int64_t n, A* mean, A* var, int64_t next = 0) const {
    constexpr int64_t kRows = 1024;
    const Chunks chunks = this->chunks(sets, kRows);
    at::Tensor partial = temporary<double>({sets.count * chunks.count, 2, n});
    double* p = partial.mutable_data_ptr<double>();
    share_chunks(sets, kRows, [&](int64_t, int64_t chunk, int64_t, int64_t row, int64_t count) {
      kernels.moments(x + row * ld, ld, count, n, p + 2 * chunk * n, p + (2 * chunk + 1) * n);
    });
    combine(partial, n, [&](int64_t chunk) { return chunks.size(chunk); }, mean, var, sets.count, next);
  }

  const Conv1x1Kernels<T>& kernels;
  const int64_t workers;
  const SyncBatchNorm sync;

 private:
  template <typename V>
  struct BatchMoments {
    V mean, var;
  };
  // Of the values of `size` channels with as many values each.
  static BatchMoments<A> of_group(const A* mean, const A* var, int64_t begin, int64_t size) {
    Moments<double> total{0, 0, 0};
    for (int64_t j = begin; j < begin + size; ++j)
      total = combine_moments<double>(total, {1, double(mean[j]), double(var[j])});
    return {A(total.mean), A(total.m2 / total.count)};
  }

  // body(worker, chunk, set, first row, rows) for a chunk, counted through all sets.
  template <typename Body>
  static auto of_chunk(const RowSets& sets, const Chunks& chunks, const Body& body) {
    return [&sets, chunks, &body](int64_t worker, int64_t unit) {
      const int64_t set = unit / chunks.count, chunk = unit % chunks.count;
      body(worker, unit, set, set * sets.rows + chunks.begin(chunk), chunks.size(chunk));
    };
  }

  int64_t workspace_bytes_ = 0;
  at::Tensor workspace_;
};

}  // namespace fastdense
