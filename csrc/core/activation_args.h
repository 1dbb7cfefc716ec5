// SPDX-License-Identifier: Apache-2.0
// Activations by their names and numbers, in the order of the norms in front of them, as an op takes them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/activation_math.h"
#include "core/weights.h"

namespace fastdense {

// What stands behind a norm.
struct ActivationArgs {
  Activation kind = Activation::kRelu;
  ActivationParameters<double> parameters;
  bool is_prelu = false;
  ConvArgs slope;  // PReLU's parameter [1] or [channels], else undefined
};

class ActivationReader {
 public:
  // names: of each norm's activation, separated by commas, or none: all are ReLU; numbers: two for each name.
  ActivationReader(const char* op, std::string_view names, at::ArrayRef<double> numbers, int64_t norms);

  bool given() const { return !names_.empty(); }
  ActivationArgs next();
  // That of the last one.
  const std::string& name() const { return name_; }

 private:
  const char* op_;
  std::vector<std::string> names_;
  at::ArrayRef<double> numbers_;
  std::string name_;
  size_t next_ = 0;
};

}  // namespace fastdense
