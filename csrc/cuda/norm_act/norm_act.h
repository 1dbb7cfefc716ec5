// SPDX-License-Identifier: Apache-2.0
// The kernels of cuda/norm_act/norm_act_launch.h on tensors: norms and activations of all kinds for pixels in sets, all
// of a batch or those of each sample, around the library's products.  Knows no device: see cuda/block_forward.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <vector>

#include "core/activation_args.h"
#include "cuda/block_backward.h"
#include "cuda/norm_act/norm_act_launch.h"

namespace fastdense {

template <typename A>
struct NormAct {
  SetNorm<A> norm;
  SetActivation<A> act;
  NormAct from_set(int64_t set) const { return {norm.from_set(set), act}; }
};

// Statistics of the groups of channels of one norm; without groups where channels are normalised with their own.
struct GroupStatistics {
  at::Tensor tensor;  // [2, sets, groups]: mean, variance
  int64_t groups = 0, group = 1;
  template <typename A>
  A* mean() const {
    return groups > 0 ? tensor.mutable_data_ptr<A>() : nullptr;
  }
  template <typename A>
  A* var() const {
    return groups > 0 ? mean<A>() + tensor.size(1) * groups : nullptr;
  }
};

// How sets of rows go through the workspace: some whole sets at once, or one set in pieces.
struct SetChunks {
  int64_t sets, rows;   // all of them; of a set
  int64_t whole, step;  // sets of a chunk, and rows of each
  int64_t pieces() const { return std::max<int64_t>(1, (rows + step - 1) / step); }
};
struct SetChunk {
  int64_t set, sets, row, rows, piece;  // `rows` of each set; the first one is number `row` of all
  int64_t count() const { return sets * rows; }
};

template <typename T>
class CudaNormAct {
 public:
  using A = accumulate_t<T>;

  // mean and var of all channels of all sets; numbers from set to set.
  CudaNormAct(CudaBlockForward<T>& block, int64_t sets, A* mean, A* var, int64_t next)
      : sets(sets), mean(mean), var(var), next(sets > 1 ? next : 0), block_(block) {}

  const int64_t sets;
  A *const mean, *const var;
  const int64_t next;

  GroupStatistics groups_of(const NormArgs& norm, int64_t channels) const {
    if (norm.frozen() || norm.groups == 0 || norm.groups == channels) return {};
    return {block_.numbers({2, sets, norm.groups}), norm.groups, channels / norm.groups};
  }

  // Of a norm whose channels' statistics start at `at`.
  NormAct<A> of(const NormArgs& norm, const ActivationArgs& act, int64_t at, const GroupStatistics& groups) {
    NormAct<A> n;
    n.norm.norm = block_.norm_params(norm, mean + at, var + at);
    if (!norm.frozen()) n.norm.next = next;
    if (groups.groups > 0) {
      n.norm.norm.mean = groups.mean<A>();
      n.norm.norm.var = groups.var<A>();
      n.norm.next = groups.groups;
      n.norm.group = uint32_t(groups.group);
    }
    const auto& p = act.parameters;
    n.act.kind = act.kind;
    n.act.parameters = {A(p.a), A(p.b), A(p.c)};
    if (act.is_prelu) {
      n.act.slope = block_.vector(act.slope.weight);
      n.act.slope_by_channel = act.slope.weight.numel() > 1;
    }
    return n;
  }

  // Rows of a launch over `sets` sets.
  SetRows rows(int64_t sets, int64_t rows, int64_t columns) const {
    const int64_t blocks = std::max<int64_t>(1, block_.cuda.blocks / std::max<int64_t>(1, sets));
    return {sets, rows, column_reduce_splits(rows, columns, blocks)};
  }

  // Of sets of so many rows, for a workspace of `channels`.
  SetChunks chunks(int64_t rows, int64_t channels) const {
    const int64_t step = block_.chunk_rows(rows, channels);
    if (step < rows) return {sets, rows, 1, step};
    return {sets, rows, std::max<int64_t>(1, block_.chunk_rows(sets * rows, channels) / std::max<int64_t>(1, rows)),
            std::max<int64_t>(1, rows)};
  }
  // body(chunk); once without rows where there are none, which still have sums.
  template <typename Body>
  static void for_each(const SetChunks& c, const Body& body) {
    for (int64_t set = 0; set < c.sets; set += c.whole)
      for (int64_t piece = 0; piece < c.pieces(); ++piece) {
        const int64_t row = piece * c.step;
        body(SetChunk{set, std::min(c.whole, c.sets - set), set * c.rows + row, std::min(c.step, c.rows - row), piece});
      }
  }

  // y = act(norm(x)) for the rows of a chunk, or over windows of the pixels of x, whose first row is that of all.
  void activate(const NormAct<A>& n, const Matrix<const T>& x, const Matrix<T>& y, const SetChunk& c, int64_t columns,
                const PoolGeometry* pool = nullptr) const {
    const NormAct<A> of = n.from_set(c.set);
    check_launch(launch_activate_sets<T>(
        {pool ? x : x.from_row(c.row), y, of.norm, of.act, pool != nullptr, pool ? *pool : PoolGeometry{}, c.row},
        rows(c.sets, c.rows, columns), columns, block_.cuda.stream));
  }
  SetChunk all(int64_t pixels) const { return {0, sets, 0, pixels / std::max<int64_t>(1, sets), 0}; }

  // out [pixels, n] = act(norm(x)) * weight^T + bias with `rows` pixels a set, those behind the pool if there is one.
  void product(const NormAct<A>& n, const Matrix<const T>& x, const at::Tensor& weight, const ConvArgs& bias,
               int64_t rows, const at::Tensor& out, const PoolGeometry* pool = nullptr) {
    const SetChunks c = chunks(rows, weight.size(1));
    const at::Tensor y = block_.workspace(std::min(c.whole, c.sets) * std::min(c.step, rows), weight.size(1));
    const at::Tensor added = bias.weight.defined() ? bias.weight.to(out.scalar_type()) : at::Tensor();
    for_each(c, [&](const SetChunk& chunk) {
      activate(n, x, block_.matrix(y), chunk, weight.size(1), pool);
      at::Tensor to = out.narrow(0, chunk.row, chunk.count());
      const at::Tensor from = y.narrow(0, 0, chunk.count());
      if (added.defined())
        at::addmm_out(to, added, from, weight.t());
      else
        at::mm_out(to, from, weight.t());
    });
  }

  // New channels from `first` on: whether statistics are wanted, and the groups of the norm that reads them next, whose
  // channels start at `groups_at`.
  struct NewChannels {
    int64_t first, columns;
    bool wanted = true;
    GroupStatistics groups = {};
    int64_t groups_at = 0;
  };
  // x = dropout(features + bias) unless x is none, and the statistics.
  void slice_in(const Matrix<const T>& features, const Matrix<T>& x, const ConvArgs& bias, const DropoutParams& dropout,
                int64_t pixels, const NewChannels& c) {
    const SetRows r = rows(sets, pixels / std::max<int64_t>(1, sets), c.columns);
    const at::Tensor partial = block_.numbers({c.wanted ? sets * r.splits : 0, 2, c.columns});
    A* sums = c.wanted ? block_.sums(partial) : nullptr;
    const A* added = block_.vector(bias.weight);
    check_launch(launch_slice_in_sets<T>({features, x, added, dropout, sums}, r, c.columns, block_.cuda.stream));
    if (!c.wanted) return;
    FinaliseSetMomentsParams<T> made = of_groups(c.groups, c.groups_at);
    made.partial = sums;
    made.pivot = x.data ? Matrix<const T>(x) : features;
    made.rows = r.rows;
    made.splits = r.splits;
    made.first = c.first - c.groups_at;
    made.columns = c.columns;
    if (r.rows > 0) finalise_moments({made});
    block_.share_moments({mean + c.first, var + c.first}, c.columns, pixels);
  }
  // Of features that stay where they are.
  void statistics(const Matrix<const T>& features, int64_t pixels, const NewChannels& c) {
    slice_in(features, {nullptr, features.ld}, {}, {}, pixels, c);
  }

  // Statistics of groups of channels that have statistics already: notes one for finalise_groups().
  void note_groups(const GroupStatistics& groups, int64_t at) {
    if (groups.groups == 0) return;
    noted_.push_back(of_groups(groups, at));
  }
  void finalise_groups() {
    finalise_moments(noted_);
    noted_.clear();
  }

 private:
  // Without new channels.
  FinaliseSetMomentsParams<T> of_groups(const GroupStatistics& groups, int64_t at) const {
    FinaliseSetMomentsParams<T> p{};
    p.mean = mean + at;
    p.var = var + at;
    p.next = next;
    p.groups = groups.groups;
    p.group = groups.group;
    p.group_mean = groups.template mean<A>();
    p.group_var = groups.template var<A>();
    return p;
  }

  void finalise_moments(const std::vector<FinaliseSetMomentsParams<T>>& norms) const {
    for (size_t begin = 0; begin < norms.size(); begin += kMostSetMoments) {
      ManySetMomentsParams<T> many{};
      many.count = int(std::min<size_t>(kMostSetMoments, norms.size() - begin));
      std::copy_n(norms.begin() + ptrdiff_t(begin), many.count, many.norms);
      check_launch(launch_finalise_set_moments<T>(many, sets, block_.cuda.stream));
    }
  }

  CudaBlockForward<T>& block_;
  std::vector<FinaliseSetMomentsParams<T>> noted_;
};

// Backward: consumers of channels, and the corrections that they owe.
template <typename T>
class CudaNormActBackward {
 public:
  using A = accumulate_t<T>;

  CudaNormActBackward(const CudaBlockForward<T>& block, const CudaNormAct<T>& norms, CudaBlockBackward<T>& grads)
      : block_(block), norms_(norms), grads_(grads) {}

  // What reads the channels whose statistics start at `at`.
  struct Consumer {
    const NormArgs& args;
    const ActivationArgs& act_args;
    const NormAct<A>& n;
    Matrix<const T> x;
    Matrix<T> gradient;
    bool add;  // to the gradient, else it is written
    int64_t at, columns;
  };
  // Where corrections of the channels go.
  struct Corrections {
    double* sums;  // [2, sets, next]: shifts, slopes
    int64_t next;
    bool add;
  };

  // The gradient dy of act(norm(x)), in the consumer's own place if that is its gradient's.
  void consume(const Consumer& c, const Matrix<T>& dy, int64_t pixels, const Corrections& corrections) {
    Partial partial = start({norms_.sets, pixels / std::max<int64_t>(1, norms_.sets), norms_.sets, pixels}, c.columns);
    accumulate(c, dy, norms_.all(pixels), partial, false);
    finish(c, partial, corrections);
  }

  // d = dropout factor * gradient of `columns` channels from `first` on with their corrections, as consume() and
  // product() make them; d may be the gradient.
  void correct(const Matrix<const T>& gradient, const Matrix<const T>& x, const Matrix<T>& d, int64_t pixels,
               int64_t first, int64_t columns, const Corrections& c, const DropoutParams& dropout) const {
    const SetChunk all = norms_.all(pixels);
    check_launch(launch_slice_gradient_sets<T>(
        {gradient, x, d, norms_.mean + first, norms_.next, c.sums, c.sums + norms_.sets * c.next, c.next, dropout},
        norms_.rows(all.sets, all.rows, columns), columns, block_.cuda.stream));
  }

  // Backward of a product with the gradient dz [pixels, n] of its output; `rows` pixels of x and of dz a set, the
  // latter behind the pool if there is one.
  void product(const Consumer& c, const ConvArgs& conv, const at::Tensor& packed, const at::Tensor& dz, int64_t rows,
               const Corrections& corrections) {
    const SetChunks chunks = norms_.chunks(rows, c.columns);
    Partial partial = start(chunks, c.columns);
    const at::Tensor y = block_.workspace(std::min(chunks.whole, chunks.sets) * std::min(chunks.step, rows), c.columns);
    at::Tensor dweight;
    norms_.for_each(chunks, [&](const SetChunk& chunk) {
      const at::Tensor left = dz.narrow(0, chunk.row, chunk.count());
      at::Tensor right = y.narrow(0, 0, chunk.count());
      at::mm_out(right, left, packed);
      accumulate(c, block_.matrix(y), chunk, partial, grads_.needs(conv.at));
      if (grads_.needs(conv.at)) grads_.add(dweight, grads_.over_pixels(left, right));
    });
    if (dweight.defined()) grads_.set(conv.at, dweight);
    finish(c, partial, corrections);
  }

  // The same behind average pooling of `images` images: dz [pooled pixels, n].
  void pooled_product(const Consumer& c, const ConvArgs& conv, const at::Tensor& packed, const at::Tensor& dz,
                      const PoolGeometry& pool, int64_t images, const Corrections& corrections) {
    const int64_t area = pool.size[0] * pool.size[1] * pool.size[2], pooled = pool.pixels();
    // Whole images, so that no window is cut.
    const int64_t step = std::min(images, std::max<int64_t>(1, block_.chunk_rows(images * pooled, c.columns) / pooled));
    const bool by_sample = norms_.sets > 1;
    const SetChunks chunks = by_sample ? SetChunks{images, area, step, area}
                                       : SetChunks{1, images * area, 1, std::max<int64_t>(1, step * area)};
    Partial partial = start(chunks, c.columns);
    const at::Tensor y = block_.workspace(step * pooled, c.columns);
    at::Tensor dweight;
    norms_.for_each(chunks, [&](const SetChunk& chunk) {
      const int64_t image = chunk.row / area, count = chunk.count() / area;
      const at::Tensor left = dz.narrow(0, image * pooled, count * pooled);
      at::Tensor right = y.narrow(0, 0, count * pooled);
      if (grads_.needs(conv.at)) {
        const SetChunk windows{chunk.set, chunk.sets, image * pooled, count * pooled / std::max<int64_t>(1, chunk.sets),
                               0};
        norms_.activate(c.n, c.x, block_.matrix(y), windows, c.columns, &pool);
        grads_.add(dweight, grads_.over_pixels(left, right));
      }
      at::mm_out(right, left, packed);
      accumulate(c, block_.matrix(y), chunk, partial, false, &pool);
    });
    if (dweight.defined()) grads_.set(conv.at, dweight);
    finish(c, partial, corrections);
  }

  void set_bias(const ConvArgs& bias, const at::Tensor& rows) {
    if (bias.weight.defined() && grads_.needs(bias.at))
      grads_.set(bias.at, at::sum(rows, at::IntArrayRef({0}), false, block_.accumulate()));
  }

 private:
  struct Partial {
    at::Tensor sums;              // [sets * units, 3, columns]
    int64_t units, splits, rows;  // of a set; blocks that share a chunk's rows; of a set
  };
  Partial start(const SetChunks& c, int64_t columns) const {
    const int64_t splits = norms_.rows(std::min(c.whole, c.sets), std::min(c.step, c.rows), columns).splits;
    const int64_t units = c.rows > 0 ? c.pieces() * splits : 0;
    return {block_.numbers({c.sets * units, 3, columns}), units, splits, c.rows};
  }

  void accumulate(const Consumer& c, const Matrix<T>& dy, const SetChunk& chunk, const Partial& partial, bool keep_y,
                  const PoolGeometry* pool = nullptr) const {
    const NormAct<A> n = c.n.from_set(chunk.set);
    A* sums = block_.sums(partial.sums) + (chunk.set * partial.units + chunk.piece * partial.splits) * 3 * c.columns;
    check_launch(launch_accumulate_sets<T>({c.x.from_row(chunk.row), dy, c.gradient.from_row(chunk.row), n.norm, n.act,
                                            sums, keep_y, c.add, pool != nullptr, pool ? *pool : PoolGeometry{}},
                                           {chunk.sets, chunk.rows, partial.splits}, c.columns, block_.cuda.stream));
  }

  // Gradients of the parameters of the norm and of PReLU, and the corrections.
  void finish(const Consumer& c, const Partial& partial, const Corrections& to) {
    const auto s = grads_.sums(c.columns);
    const ConvArgs& slope = c.act_args.slope;
    const bool needs_slope = c.act_args.is_prelu && grads_.needs(slope.at);
    const at::Tensor dslope = needs_slope ? block_.numbers({c.columns}) : at::Tensor();
    double* sums = c.args.frozen() ? nullptr : to.sums;
    const double inv_count = partial.rows > 0 ? 1.0 / double(partial.rows) : 0.0;
    check_launch(launch_finalise_set_sums<A>(
        {block_.sums(partial.sums), norms_.sets, partial.units, c.n.norm, block_.sums(s.dweight), block_.sums(s.dbias),
         needs_slope ? block_.sums(dslope) : nullptr, sums, sums ? sums + norms_.sets * to.next : nullptr, to.next,
         to.add, norms_.mean + c.at, norms_.next, inv_count},
        c.columns, block_.cuda.stream));
    grads_.set_norm(c.args, s);
    if (needs_slope) grads_.set(slope.at, slope.weight.numel() == 1 ? dslope.sum() : dslope);
  }

  const CudaBlockForward<T>& block_;
  const CudaNormAct<T>& norms_;
  CudaBlockBackward<T>& grads_;
};

}  // namespace fastdense
