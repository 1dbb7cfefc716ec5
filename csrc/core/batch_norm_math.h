// SPDX-License-Identifier: Apache-2.0
// Scalar maths of batch, instance and group norm and ReLU, shared by every op and device: relu(scale * x + shift), its
// backward with the correction deferred until all consumers of a channel are done, and the running statistics.  Written
// once; loops around it live with the ops.
//
// Deferred correction.  The gradient of batch norm is affine in x per channel.  The consumers l of a channel, which
// share its batch statistics, add scale_l * dy_l to one gradient buffer and the two correction terms to two numbers
// per channel, which are applied once, when all consumers are done (finalise_gradient).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/scalar.h"

namespace fastdense {

// Batch norm of one channel: y = scale * x + shift with xhat = (x - mean) * rstd.
template <typename A>
struct NormCoefficients {
  A scale, shift, mean, rstd;
};

template <typename A>
FASTDENSE_HD NormCoefficients<A> norm_coefficients(A weight, A bias, A mean, A var, A eps) {
  const A rstd = A(1) / std::sqrt(var + eps);
  const A scale = weight * rstd;
  return {scale, bias - mean * scale, mean, rstd};
}

// Forward and backward decide the sign of scale * x + shift by this very expression, so that they always agree.
template <typename A>
FASTDENSE_HD A norm_relu(A x, A scale, A shift) {
  return relu(mul_add(x, scale, shift));
}

// The gradient dy of norm_relu(x, scale, shift) in front of the ReLU.
template <typename A>
FASTDENSE_HD A norm_relu_gradient(A dy, A x, A scale, A shift) {
  return relu_passes(mul_add(x, scale, shift)) ? dy : A(0);
}

// Gradient of a channel once all its consumers have added scale * dy to g: shift_sum = sum_l scale_l s1_l / M and
// slope_sum = sum_l scale_l rstd_l s2_l / M.  Where nothing was added, as by frozen norms, the gradient is g, even if x
// is not finite.
template <typename A>
FASTDENSE_HD A finalise_gradient(A g, A x, A mean, A shift_sum, A slope_sum) {
  const A corrected = g - shift_sum - (x - mean) * slope_sum;
  return shift_sum == A(0) && slope_sum == A(0) ? g : corrected;
}

// Immediate form for a channel with one consumer; t1 = sum dy, t2 = sum dy * xhat, inv_count = 1/M (0 when frozen).
template <typename A>
FASTDENSE_HD A norm_input_gradient(A dy, A x, NormCoefficients<A> n, A t1, A t2, A inv_count) {
  const A xhat = (x - n.mean) * n.rstd;
  const A corrected = dy - (t1 + xhat * t2) * inv_count;
  return n.scale * (inv_count == A(0) ? dy : corrected);
}

// Where the batch statistics of channels go; nowhere if nullptr.
template <typename A>
struct BatchStatistics {
  A *mean = nullptr, *var = nullptr;
};

// Count, mean and sum of squared deviations of a set of values.
template <typename A>
struct Moments {
  A count, mean, m2;
};

// Chan, Golub, LeVeque (1979): moments of a union.  Never negative, exact for unequal counts.
template <typename A>
FASTDENSE_HD Moments<A> combine_moments(Moments<A> p, Moments<A> q) {
  const A count = p.count + q.count;
  if (count == A(0)) return p;
  const A delta = q.mean - p.mean, share = q.count / count;
  return {count, p.mean + delta * share, p.m2 + q.m2 + delta * delta * p.count * share};
}

// running <- running + factor * (batch - running); `batch` is the unbiased variance for running_var.
template <typename A>
FASTDENSE_HD A update_running(A running, A batch, A factor) {
  return running + factor * (batch - running);
}

// A negative momentum means the cumulative average over the batches so far.
FASTDENSE_HD double running_factor(double momentum, int64_t batches) {
  return momentum < 0 ? 1.0 / double(batches) : momentum;
}

FASTDENSE_HD double unbiased_factor(double count) { return count / (count - 1); }

}  // namespace fastdense
