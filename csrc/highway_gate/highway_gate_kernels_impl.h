// SPDX-License-Identifier: Apache-2.0
// The loops of highway_gate_kernels.h for one instruction set; see cpu/simd/target.h.

namespace fastdense {
namespace FASTDENSE_TARGET {
namespace {

// functor(i) for all elements, without a division for each.
template <typename Functor>
void run(const Functor& shared, int64_t begin, int64_t end) {
  const Functor functor = shared;  // whose pointers no store of the loop can change
  for (int64_t i = begin; i < end;) {
    const int64_t before = i / functor.block * functor.block, stop = std::min(end, before + functor.block);
#pragma omp simd
    for (int64_t k = i; k < stop; ++k) functor.element(k, k + before);
    i = stop;
  }
}

}  // namespace

template <typename T, typename Activation>
HighwayLoops<T, Activation> highway_loops() {
  return {&run<HighwayForward<T, Activation>>, &run<HighwayBackward<T, Activation>>};
}

#define FASTDENSE_HIGHWAY_LOOPS(T, Activation) template HighwayLoops<T, Activation> highway_loops<T, Activation>();
FASTDENSE_HIGHWAY_CASES(FASTDENSE_HIGHWAY_LOOPS)
#undef FASTDENSE_HIGHWAY_LOOPS

}  // namespace FASTDENSE_TARGET
}  // namespace fastdense
