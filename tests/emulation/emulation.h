// SPDX-License-Identifier: Apache-2.0
// Host twins of what the .cu files use of CUDA, so that the very kernels run on a CPU: one thread after the other,
// block by block, forwards or backwards.  For kernels without shared memory and barriers, whose threads never wait for
// each other; a result that depends on the order is a race.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace fastdense::emulation {

inline bool backwards = false;
inline int64_t launches = 0;

// Numbers 0 ... count - 1 in the chosen order.
template <typename Body>
void in_order(unsigned count, const Body& body) {
  for (unsigned i = 0; i < count; ++i) body(backwards ? count - 1 - i : i);
}

}  // namespace fastdense::emulation

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace fastdense::emulation {

template <typename Kernel, typename... Arguments>
void launch(const Kernel& kernel, dim3 grid, dim3 block, const Arguments&... arguments) {
  ++launches;
  gridDim = grid;
  blockDim = block;
  in_order(grid.z, [&](unsigned z) {
    in_order(grid.y, [&](unsigned y) {
      in_order(grid.x, [&](unsigned x) {
        blockIdx = dim3(x, y, z);
        in_order(block.x, [&](unsigned t) {
          threadIdx = dim3(t, 0, 0);
          kernel(arguments...);
        });
      });
    });
  });
}

}  // namespace fastdense::emulation

#define FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::fastdense::emulation::launch([](auto... arguments) { kernel(arguments...); }, dim3(grid), dim3(block), __VA_ARGS__)
