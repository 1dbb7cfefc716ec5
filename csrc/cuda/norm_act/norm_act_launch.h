// SPDX-License-Identifier: Apache-2.0
// CUDA kernels for dense blocks of any norm and any activation: what norm_relu_launch.h has for batch norm and ReLU,
// but for rows in sets that have statistics of their own, all rows or those of each sample.  No torch header.
//
// A block of threads has rows of one set only, so that sets may have any number of rows, and one launch does for all of
// them.  Rows of a set are shared among `splits` blocks; partial sums are [sets * splits][sums][columns], and
// `finalise` kernels add them up set by set.  The kind of the activation is a number that all threads branch by: these
// kernels wait for memory.
#pragma once

#include "core/activation_math.h"
#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

// The rows of a launch: sets one behind the other.
struct SetRows {
  int64_t sets, rows;  // of each
  int64_t splits;      // blocks that share a set's rows
};

// A norm by the statistics that each set of rows is normalised with.
template <typename A>
struct SetNorm {
  NormParams<A> norm;  // weight and bias of channels; mean and variance of groups of channels, those of the first set
  int64_t next = 0;    // numbers from the statistics of a set to those of the next; 0: all sets have the same
  uint32_t group = 1;  // channels that share statistics
  FASTDENSE_HD int64_t at(int64_t set, int64_t channel) const {
    return set * next + (group == 1 ? channel : int64_t(uint32_t(channel) / group));
  }
  FASTDENSE_HD A mean(int64_t set, int64_t channel) const { return norm.mean[at(set, channel)]; }
  FASTDENSE_HD NormCoefficients<A> operator()(int64_t set, int64_t channel) const {
    const int64_t i = at(set, channel);
    return norm_coefficients(norm.weight ? norm.weight[channel] : A(1), norm.bias ? norm.bias[channel] : A(0),
                             norm.mean[i], norm.var[i], norm.eps);
  }
  SetNorm from_set(int64_t set) const {
    SetNorm n = *this;
    n.norm.mean += set * next;
    n.norm.var += set * next;
    return n;
  }
};

template <typename A>
struct SetActivation {
  Activation kind = Activation::kRelu;
  ActivationParameters<A> parameters;
  const A* slope = nullptr;  // PReLU's parameter
  bool slope_by_channel = false;
};

// y = mean of act(norm(x)) over the windows of the pooled pixels [first, ...), or without windows y = act(norm(x)).
template <typename T>
struct ActivateSetsParams {
  Matrix<const T> x;
  Matrix<T> y;
  SetNorm<accumulate_t<T>> norm;
  SetActivation<accumulate_t<T>> act;
  bool pooled;
  PoolGeometry pool;
  int64_t first;
};
template <typename T>
cudaError_t launch_activate_sets(const ActivateSetsParams<T>&, const SetRows&, int64_t columns, cudaStream_t);

// New features become a slice of a buffer, x = dropout(features + bias), or stay where they are if x is none; and their
// moments relative to the first row of a set, unless `partial` is nullptr.
template <typename T>
struct SliceInSetsParams {
  Matrix<const T> features;
  Matrix<T> x;                  // data is nullptr where nothing is written
  const accumulate_t<T>* bias;  // [columns] or nullptr
  DropoutParams dropout;
  accumulate_t<T>* partial;  // [sets * splits][2][columns]
};
template <typename T>
cudaError_t launch_slice_in_sets(const SliceInSetsParams<T>&, const SetRows&, int64_t columns, cudaStream_t);

// From the moments of new channels [first, first + columns), where there are any, their mean and variance for each set;
// and those of groups of channels of the norm that reads them next.
template <typename T>
struct FinaliseSetMomentsParams {
  const accumulate_t<T>* partial;  // of launch_slice_in_sets, or nullptr: there are no new channels
  Matrix<const T> pivot;  // what it is relative to: the first row of the new channels, `rows` rows from set to set
  int64_t rows, splits;   // of a set
  int64_t first, columns;
  accumulate_t<T>*mean, *var;     // of channel 0 of the first set
  int64_t next;                   // numbers from set to set
  int64_t groups = 0, group = 1;  // the norm's groups, and channels of a group; 0: not wanted
  accumulate_t<T>*group_mean = nullptr, *group_var = nullptr;  // [sets][groups]
};
// One launch takes so many.
constexpr int kMostSetMoments = 16;
template <typename T>
struct ManySetMomentsParams {
  FinaliseSetMomentsParams<T> norms[kMostSetMoments];
  int count;
};
template <typename T>
cudaError_t launch_finalise_set_moments(const ManySetMomentsParams<T>&, int64_t sets, cudaStream_t);

// d = dropout factor * gradient of channels whose consumers are done.  d may be the gradient.
template <typename T>
struct SliceGradientSetsParams {
  Matrix<const T> gradient, x;
  Matrix<T> d;
  const accumulate_t<T>* mean;  // of single channels
  int64_t next;                 // numbers from set to set
  const double *shift_sum, *slope_sum;
  int64_t next_sums;
  DropoutParams dropout;
};
template <typename T>
cudaError_t launch_slice_gradient_sets(const SliceGradientSetsParams<T>&, const SetRows&, int64_t columns,
                                       cudaStream_t);

// One consumer adds its gradient: gradient (+)= scale * du, with du the gradient dy of act(norm(x)) in front of the
// activation, and partial sums of du, of du * (x - mean) and, which is the gradient of PReLU's parameter, of
// dy * min(u, 0).  y = act(norm(x)) is written over dy if `keep_y`.  The gradient may take dy's place.
// Behind pooling: dy [pooled pixels] goes to the pixels of each window in equal shares; rows are whole images.
template <typename T>
struct AccumulateSetsParams {
  Matrix<const T> x;
  Matrix<T> dy, gradient;
  SetNorm<accumulate_t<T>> norm;
  SetActivation<accumulate_t<T>> act;
  accumulate_t<T>* partial;  // [sets * splits][3][columns]
  bool keep_y, add;          // add to `gradient`, else write it
  bool pooled;
  PoolGeometry pool;
};
template <typename T>
cudaError_t launch_accumulate_sets(const AccumulateSetsParams<T>&, const SetRows&, int64_t columns, cudaStream_t);

// Adds up partial sums of a norm's gradient, `units` of each set.  Over all sets dbias = sum du, dweight = sum du *
// xhat and PReLU's dslope; and for each set, unless shift_sum is nullptr, the deferred correction of the norm's
// channels, as terms of x - mean with the mean of the single channel.
template <typename A>
struct FinaliseSetSumsParams {
  const A* partial;
  int64_t sets, units;
  SetNorm<A> norm;
  A *dweight, *dbias, *dslope;    // [columns]; the last may be nullptr
  double *shift_sum, *slope_sum;  // of the first set, or nullptr
  int64_t next_sums;              // numbers from set to set
  bool add;                       // add to the corrections, else write them
  const A* mean;                  // of single channels
  int64_t next;                   // numbers from set to set
  double inv_count;               // 1 / values of a channel and set
};
template <typename A>
cudaError_t launch_finalise_set_sums(const FinaliseSetSumsParams<A>&, int64_t columns, cudaStream_t);

}  // namespace fastdense
