// SPDX-License-Identifier: Apache-2.0
#include "core/activation_args.h"

#include <algorithm>
#include <utility>

#include "core/checks.h"

namespace fastdense {
namespace {

// Names without numbers.
constexpr std::pair<const char*, Activation> kPlain[] = {
    {"relu", Activation::kRelu},           {"identity", Activation::kIdentity}, {"relu6", Activation::kRelu6},
    {"prelu", Activation::kLeakyRelu},     {"silu", Activation::kSilu},         {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh},  {"selu", Activation::kElu},          {"mish", Activation::kMish},
    {"hardswish", Activation::kHardswish}, {"tanh", Activation::kTanh},         {"sigmoid", Activation::kSigmoid},
};

// Klambauer et al., Self-Normalizing Neural Networks, arXiv:1706.02515: alpha and scale, with torch's digits.
constexpr double kSeluAlpha = 1.6732632423543772848170429916717, kSeluScale = 1.0507009873554804934193349852946;

}  // namespace

ActivationReader::ActivationReader(const char* op, std::string_view names, at::ArrayRef<double> numbers, int64_t norms)
    : op_(op), numbers_(numbers), name_("relu") {
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    names_.emplace_back(names.substr(begin, end - begin));
    begin = end + 1;
  }
  if (!names_.empty()) check_entries(op, "activations", names_.size(), norms);
  check_entries(op, "activation_parameters", numbers.size(), 2 * int64_t(names_.size()));
  for (const double number : numbers) check_finite(op, "every one of activation_parameters", number);
}

ActivationArgs ActivationReader::next() {
  ActivationArgs args;
  if (names_.empty()) return args;
  const double first = numbers_[2 * next_], second = numbers_[2 * next_ + 1];
  name_ = names_[next_++];
  const auto check = [&](bool good, const char* what) {
    TORCH_CHECK_VALUE(good, op_, ": expected the activation_parameters of ", name_, " to be ", what, ", got ", first,
                      " and ", second);
  };
  for (const auto& [name, kind] : kPlain)
    if (name_ == name) {
      check(first == 0 && second == 0, "0 and 0");
      args.kind = kind;
      args.is_prelu = name_ == "prelu";
      if (name_ == "selu") args.parameters = {kSeluAlpha * kSeluScale, kSeluScale, 1};
      return args;
    }
  if (name_ == "leaky_relu") {
    check(second == 0, "a slope and 0");
    args.kind = Activation::kLeakyRelu;
    args.parameters = {first};
  } else if (name_ == "elu") {
    check(second == 0, "alpha and 0");
    args.kind = Activation::kElu;
    args.parameters = {first, 1, 1};
  } else if (name_ == "celu") {
    check(first > 0 && second == 0, "alpha above 0 and 0");
    args.kind = Activation::kElu;
    args.parameters = {first, 1, 1 / first};
  } else if (name_ == "softplus") {
    check(first > 0, "beta above 0 and a threshold");
    args.kind = Activation::kSoftplus;
    args.parameters = {first, second};
  } else {
    TORCH_CHECK_VALUE(false, op_,
                      ": expected every one of activations to be relu, identity, relu6, leaky_relu, prelu, elu, celu, "
                      "selu, silu, gelu, gelu_tanh, hardswish, mish, softplus, tanh or sigmoid, got ",
                      name_);
  }
  return args;
}

}  // namespace fastdense
