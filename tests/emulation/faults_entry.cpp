// SPDX-License-Identifier: Apache-2.0
// Small kernels with and without a mistake, to test the emulation itself.
#include "cuda/launch.h"

namespace {

enum Fault {
  kNone,
  kNoBarrier,
  kSkippedBarrier,
  kOtherBarrier,
  kOtherShuffle,
  kBefore,
  kBehind,
  kMisaligned,
  kUnwritten,
  kReadBehind,
  kEarlyAccess,
  kNoWait,
};

constexpr unsigned kThreads = 64;

// out[t] = the sum of in over the block, by way of shared memory and warp sums.
__global__ void sum_kernel(const float* in, float* out, int fault) {
  if (fault == kEarlyAccess) FASTDENSE_CHECK_ALIGNED(in, 16);
  if (fault != kNoWait || threadIdx.x != 7) fastdense::wait_for_kernels_before();
  FASTDENSE_SHARED(bytes);
  auto* shared = reinterpret_cast<float*>(bytes);
  const unsigned t = threadIdx.x;
  if (fault == kMisaligned) FASTDENSE_CHECK_ALIGNED(in + 1, 16);
  if (fault == kBefore) shared[-1] = 0;
  if (fault == kBehind) shared[kThreads] = 0;
  float value = in[t];
  if (fault == kReadBehind && t == 5) value += 0 * shared[kThreads];
  for (unsigned lanes = 16; lanes > 0; lanes /= 2) {
    if (fault == kOtherShuffle && t % 2 == 1) {
      value += __shfl_xor_sync(~0u, value, lanes);
    } else {
      value += __shfl_xor_sync(~0u, value, lanes);
    }
  }
  if (fault != kUnwritten || t > 0) shared[t] = value;
  if (fault == kOtherBarrier && t >= 32) {
    __syncthreads();
  } else if (fault != kNoBarrier && (fault != kSkippedBarrier || t != 5)) {
    __syncthreads();
  }
  out[t] = shared[0] + shared[32];
}

}  // namespace

extern "C" {
// The reason for a failure, or an empty text.
const char* run_sum(const float* in, float* out, int fault, bool backwards) {
  fastdense::emulation::backwards = backwards;
  FASTDENSE_LAUNCH(sum_kernel, dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr, in, out, fault);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
}
