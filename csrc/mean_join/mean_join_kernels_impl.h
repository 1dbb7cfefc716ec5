// SPDX-License-Identifier: Apache-2.0
// The loops of mean_join_kernels.h for one instruction set; see cpu/simd/target.h.

namespace fastdense {
namespace FASTDENSE_TARGET {
namespace {

// A tile of sums stays in the first-level cache while the inputs pass by, so that any number of inputs is a loop over
// elements that compilers vectorise.
template <typename T>
void run(const MeanJoin<T>& shared, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 1024;
  const MeanJoin<T> join = shared;  // whose pointers no store of the loops can change
  accumulate_t<T> sums[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t size = std::min(end - at, kTile);
#pragma omp simd
    for (int64_t k = 0; k < size; ++k) sums[k] = join.first(at + k);
    for (int input = 1; input < join.joined; ++input) {
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) sums[k] = join.plus(sums[k], input, at + k);
    }
#pragma omp simd
    for (int64_t k = 0; k < size; ++k) join.finish(sums[k], at + k);
  }
}

}  // namespace

template <typename T>
MeanJoinLoop<T> mean_join_loop() {
  return &run<T>;
}

template MeanJoinLoop<float> mean_join_loop();
template MeanJoinLoop<double> mean_join_loop();
template MeanJoinLoop<bfloat16> mean_join_loop();
template MeanJoinLoop<half> mean_join_loop();

}  // namespace FASTDENSE_TARGET
}  // namespace fastdense
