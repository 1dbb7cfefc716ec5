// SPDX-License-Identifier: Apache-2.0
// What the backward passes of blocks share on the CPU: which gradients are wanted, the deferred norm corrections, and
// sums and weight gradients per worker, which are added in order: reruns with the same number of threads are
// bit-identical.
#pragma once

#include <ATen/ops/zeros.h>

#include <utility>
#include <vector>

#include "core/layout.h"
#include "cpu/block_forward.h"

namespace fastdense {

// Two numbers per channel, and set of rows, that collect the norm corrections of all consumers (batch_norm_math.h).
class Corrections {
 public:
  explicit Corrections(int64_t channels, int64_t sets = 1)
      : channels_(channels), sets_(sets), shift_sum_(size_t(channels * sets)), slope_sum_(size_t(channels * sets)) {}

  void add(int64_t set, int64_t channel, double shift, double slope) {
    shift_sum_[size_t(set * channels_ + channel)] += shift;
    slope_sum_[size_t(set * channels_ + channel)] += slope;
  }

  // [sets, 2, n] of the channels from `first` on, which start anew.
  template <typename A>
  at::Tensor take(int64_t first, int64_t n) {
    at::Tensor t = BlockForward<A>::template temporary<A>({sets_, 2, n});
    A* out = t.mutable_data_ptr<A>();
    for (int64_t set = 0; set < sets_; ++set, out += 2 * n)
      for (int64_t j = 0; j < n; ++j) {
        const auto at = size_t(set * channels_ + first + j);
        out[j] = A(std::exchange(shift_sum_[at], 0));
        out[n + j] = A(std::exchange(slope_sum_[at], 0));
      }
    return t;
  }

 private:
  int64_t channels_, sets_;
  std::vector<double> shift_sum_, slope_sum_;
};

template <typename T>
class BlockBackward : public BlockForward<T> {
 public:
  using Base = BlockForward<T>;
  using A = typename Base::A;
  using typename Base::Coefficients;

  // needs: whether the gradients of the input and of each weight are wanted; sets: of rows with statistics of their
  // own.
  BlockBackward(const std::vector<bool>& needs, at::TensorList weights, const at::TensorOptions& options,
                int64_t widest_norm, const std::string& process_group = {}, int64_t sets = 1)
      : Base(process_group),
        widest_(widest_norm),
        sets_(sets),
        needs_(needs),
        weights_(weights),
        options_(options),
        grads_(needs.size()) {
    for (at::Tensor& grad : grads_) grad = at::empty({0}, options);
    sums_ = at::empty({this->workers, sets_, 2, widest_}, at::TensorOptions().dtype(at::kDouble));
  }

  bool needs(int64_t weight) const { return needs_[size_t(weight) + 1]; }
  bool needs_input() const { return needs_[0]; }
  void set(int64_t weight, const at::Tensor& value) {
    if (needs(weight)) grads_[size_t(weight) + 1] = laid_out_like(value, weights_[size_t(weight)]);
  }

  // Sums over rows of a gradient and of its products with x - mean.
  struct Sums {
    double *sum, *weighted;  // [channels]
    int64_t next;            // numbers up to those of the next set of rows
    Sums of(int64_t set) const { return {sum + set * next, weighted + set * next, next}; }
  };

  // What else a pass sums up: PReLU's gradient by channel, and a bias's.
  struct ExtraSums {
    int64_t slopes = 0, biases = 0;  // how many numbers of each, 0 for none
  };
  // Starts them anew for the next pass.
  void start_extra_sums(ExtraSums sizes) {
    const auto zeros = [&](int64_t n) {
      return n > 0 ? at::zeros({this->workers, n}, at::TensorOptions().dtype(at::kDouble)) : at::Tensor();
    };
    slope_sums_ = zeros(sizes.slopes);
    bias_sums_ = zeros(sizes.biases);
  }
  at::Tensor slope_sum() const { return slope_sums_.sum(0); }
  at::Tensor bias_sum() const { return bias_sums_.sum(0); }

  // Weight gradients [workers, depth, padded n] and sums, zeroed.
  at::Tensor worker_gradients(bool needed, int64_t depth, int64_t n) {
    sums_.zero_();
    return at::zeros({needed ? this->workers : 0, this->padded_depth(depth), this->padded(n)},
                     at::TensorOptions().dtype(Base::kAccumulate));
  }
  // The sums alone, zeroed, for a pass in which each channel has one worker.
  Sums channel_sums() {
    sums_.zero_();
    return worker_sums(0);
  }
  // Of worker_gradients(), those of one worker, or nullptr.
  static A* of_worker(const at::Tensor& gradients, int64_t worker) {
    return gradients.size(0) == 0 ? nullptr
                                  : gradients.mutable_data_ptr<A>() + worker * gradients.size(1) * gradients.size(2);
  }
  static at::Tensor total(const at::Tensor& gradients, int64_t depth, int64_t n) {
    const at::Tensor sum = gradients.size(0) == 1 ? gradients.select(0, 0) : gradients.sum(0);
    return sum.narrow(0, 0, depth).narrow(1, 0, n);
  }

  BackwardEpilogue<T> epilogue(int64_t worker, T* gradient, int64_t ld, bool accumulate, const A* mean,
                               const at::Tensor& dweight, int64_t set = 0) {
    const Sums s = worker_sums(worker).of(set);
    return {gradient,
            ld,
            accumulate,
            mean,
            s.sum,
            s.weighted,
            of_worker(dweight, worker),
            row_of_worker(slope_sums_, worker),
            row_of_worker(bias_sums_, worker)};
  }

  // Parameter gradients of the channels [first, first + n) of a norm from their sums, in place: sum -> s1, weighted ->
  // s2 (dbeta, dgamma).
  Sums norm_sums(const Coefficients& c, int64_t first, int64_t n) {
    const Sums s = total_sums(n);
    for (int64_t set = 0; set < sets_; ++set)
      for (int64_t j = 0; j < n; ++j) s.of(set).weighted[j] *= double(c.rstd(set)[first + j]);
    return s;
  }
  Sums norm_gradients(const NormArgs& norm, const Coefficients& c) {
    const Sums s = norm_sums(c, 0, c.n);
    const at::Tensor by_set = sums_.select(0, 0).narrow(2, 0, c.n);
    const at::Tensor all = sets_ == 1 ? by_set.select(0, 0) : by_set.sum(0);
    set_norm(norm, all.select(0, 1).clone(), all.select(0, 0).clone());  // results do not share memory
    return s;
  }
  void set_norm(const NormArgs& norm, const at::Tensor& weight, const at::Tensor& bias) {
    if (norm.weight.defined()) set(norm.at, weight);
    if (norm.bias.defined()) set(norm.at + 1, bias);
  }

  // What the input of channels [first, first + n) of a norm over `count` values of a channel owes for one set, by the
  // sums of norm_gradients(): add(channel, shift, slope) for shift + (x - c.mean()) * slope.
  template <typename Add>
  static void for_each_term(const NormArgs& norm, const Coefficients& c, const Sums& s, int64_t first, int64_t n,
                            int64_t count, int64_t set, const Add& add) {
    const Sums sums = s.of(set);
    Base::for_each_group(norm, n, [&](int64_t begin, int64_t size) {
      double shift = 0, slope = 0;
      for (int64_t j = begin; j < begin + size; ++j) {
        const double share = double(c.scale(set)[first + j]) / double(count * size);
        shift += share * sums.sum[j];
        slope += share * sums.weighted[j] * double(c.rstd(set)[first + j]);
      }
      for (int64_t j = begin; j < begin + size; ++j) add(j, shift, slope);
    });
  }

  // Defers the correction of channels [first, first + n) of a norm over `count` values.
  static void defer(const NormArgs& norm, const Coefficients& c, const Sums& s, int64_t first, int64_t n, int64_t count,
                    Corrections& corrections, int64_t channel) {
    if (norm.frozen()) return;
    for_each_term(norm, c, s, first, n, count, 0,
                  [&](int64_t j, double shift, double slope) { corrections.add(0, channel + j, shift, slope); });
  }
  // The same for all channels of a norm and every set of `count` rows, as terms of x - mean with the means [sets, next]
  // of single channels, which those of groups differ from.
  void defer(const NormArgs& norm, const Coefficients& c, const Sums& s, int64_t count, Corrections& corrections,
             const A* mean, int64_t next) const {
    if (norm.frozen()) return;
    for (int64_t set = 0; set < sets_; ++set)
      for_each_term(norm, c, s, 0, c.n, count, set, [&](int64_t j, double shift, double slope) {
        const double apart = double(mean[set * next + j]) - double(c.mean(set)[j]);
        corrections.add(set, j, apart == 0 ? shift : shift + apart * slope, slope);
      });
  }

  // [sets, 2, n] of the channels from `first` on, which `count` values have; these corrections start anew.
  at::Tensor take(Corrections& corrections, int64_t first, int64_t n, int64_t count) const {
    const at::Tensor t = corrections.take<A>(first, n);
    this->sync.means(t, count);
    return t;
  }

  // What the backward of a norm needs to make the gradient of its input z from dv, that of its output, and from the
  // sums of norm_gradients(); `workspace` holds the terms that the result points to.
  NormBackward<T> norm_backward(const NormArgs& norm, const Coefficients& c, const Sums& s, const T* dv, const T* z,
                                int64_t count, at::Tensor& workspace) const {
    const bool has_terms = norm.groups > 0 && !norm.frozen();
    workspace = Base::template temporary<A>({has_terms ? sets_ : 1, 2, c.n});
    A* t = workspace.mutable_data_ptr<A>();
    if (has_terms) {
      for (int64_t set = 0; set < sets_; ++set)
        for_each_term(norm, c, s, 0, c.n, count, set, [&](int64_t j, double shift, double slope) {
          t[2 * set * c.n + j] = A(shift);
          t[(2 * set + 1) * c.n + j] = A(slope);
        });
      return {dv, z, c.n, c.scale(), c.mean(), c.rstd(), t, t + c.n, A(1), true};
    }
    for (int64_t j = 0; j < c.n; ++j) {
      t[j] = A(s.sum[j]);
      t[c.n + j] = A(s.weighted[j]);
    }
    if (!norm.frozen()) this->sync.sums(workspace, count);
    const A inv_count = norm.frozen() ? A(0) : A(1.0 / double(count));
    return {dv, z, c.n, c.scale(), c.mean(), c.rstd(), t, t + c.n, inv_count};
  }

  // The terms of a set.
  static NormBackward<T> of_set(NormBackward<T> norm, const Coefficients& c, int64_t set) {
    if (!norm.has_terms) return norm;
    norm.scale = c.scale(set);
    norm.mean = c.mean(set);
    norm.rstd = c.rstd(set);
    norm.t1 += 2 * set * c.n;
    norm.t2 += 2 * set * c.n;
    return norm;
  }
  using Base::of_set;

  static at::Tensor vector(const double* v, int64_t n) {
    at::Tensor t = at::empty({n}, at::TensorOptions().dtype(at::kDouble));
    std::copy(v, v + n, t.mutable_data_ptr<double>());
    return t;
  }

  const at::TensorOptions& options() const { return options_; }
  std::vector<at::Tensor>& grads() { return grads_; }

 private:
  Sums worker_sums(int64_t worker) {
    double* s = sums_.mutable_data_ptr<double>() + worker * sets_ * 2 * widest_;
    return {s, s + widest_, 2 * widest_};
  }
  static double* row_of_worker(const at::Tensor& sums, int64_t worker) {
    return sums.defined() ? sums.mutable_data_ptr<double>() + worker * sums.size(1) : nullptr;
  }
  // Sums over all workers, in worker 0's place.
  Sums total_sums(int64_t n) {
    for (int64_t w = 1; w < this->workers; ++w)
      for (int64_t set = 0; set < sets_; ++set) {
        const Sums total = worker_sums(0).of(set), s = worker_sums(w).of(set);
        for (int64_t j = 0; j < n; ++j) {
          total.sum[j] += s.sum[j];
          total.weighted[j] += s.weighted[j];
        }
      }
    return worker_sums(0);
  }
  const int64_t widest_, sets_;
  const std::vector<bool>& needs_;
  const at::TensorList weights_;
  const at::TensorOptions options_;
  at::Tensor sums_;                    // [workers, sets, 2, widest]
  at::Tensor slope_sums_, bias_sums_;  // [workers, numbers], undefined where there are none
  std::vector<at::Tensor> grads_;
};

}  // namespace fastdense
