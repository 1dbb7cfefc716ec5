// SPDX-License-Identifier: Apache-2.0
// A tensor's memory and version tell of every write that torch knows of.  Writes through `.data` or numpy change
// neither, nor does torch count those to inference tensors.
#include "python/weight_versions.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace py = pybind11;

namespace fastdense {
namespace {

class WeightVersions {
 public:
  explicit WeightVersions(std::vector<at::Tensor> weights) : weights_(std::move(weights)), words_(read()) {}

  bool hold() const { return read() == words_; }

 private:
  std::vector<uint64_t> read() const {
    std::vector<uint64_t> words;
    words.reserve(2 * weights_.size());
    for (const at::Tensor& weight : weights_) {
      words.push_back(reinterpret_cast<uint64_t>(weight.const_data_ptr()));
      words.push_back(weight.is_inference() ? 0 : weight._version());
    }
    return words;
  }

  const std::vector<at::Tensor> weights_;
  const std::vector<uint64_t> words_;
};

}  // namespace

void bind_weight_versions(py::module_& m) {
  py::class_<WeightVersions>(m, "WeightVersions")
      .def(py::init<std::vector<at::Tensor>>(), py::arg("weights"))
      .def("hold", &WeightVersions::hold);
}

}  // namespace fastdense
