// SPDX-License-Identifier: Apache-2.0
// The loops of activation_kernels.h for one instruction set; see cpu/simd/target.h.

namespace fastdense::FASTDENSE_TARGET {

// The slope of a channel goes to the function as a number: compilers do not vectorise a struct of its own for each
// value.
template <Activation kind, typename A>
void activation_row(const ActivationParameters<A>& given, const A* __restrict slope, A* __restrict v, int64_t n) {
  const ActivationParameters<A> p = given;  // which no store of the loop can change
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kind == Activation::kLeakyRelu)
      v[i] = ActivationFunction<kind>::value(v[i], slope[i]);
    else
      v[i] = ActivationFunction<kind>::value(v[i], p);
  }
}

template <Activation kind, typename A>
void derivative_row(const ActivationParameters<A>& given, const A* __restrict slope, A* __restrict v, int64_t n) {
  const ActivationParameters<A> p = given;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kind == Activation::kLeakyRelu)
      v[i] = ActivationFunction<kind>::slope(v[i], slope[i]);
    else
      v[i] = ActivationFunction<kind>::slope(v[i], p);
  }
}

template <typename A>
RowActivation<A> row_activation(Activation activation) {
  RowActivation<A> found;
  const auto choose = [&]<Activation kind>() {
    if (activation == kind) found = {activation_row<kind, A>, derivative_row<kind, A>};
  };
  using enum Activation;
  choose.template operator()<kRelu>();
  choose.template operator()<kIdentity>();
  choose.template operator()<kRelu6>();
  choose.template operator()<kLeakyRelu>();
  choose.template operator()<kElu>();
  choose.template operator()<kSilu>();
  choose.template operator()<kGelu>();
  choose.template operator()<kGeluTanh>();
  choose.template operator()<kHardswish>();
  choose.template operator()<kMish>();
  choose.template operator()<kSoftplus>();
  choose.template operator()<kTanh>();
  choose.template operator()<kSigmoid>();
  return found;
}

template RowActivation<float> row_activation<float>(Activation);
template RowActivation<double> row_activation<double>(Activation);

}  // namespace fastdense::FASTDENSE_TARGET
