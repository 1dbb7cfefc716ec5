// SPDX-License-Identifier: Apache-2.0
// A tensor's memory and version tell of every write that torch knows of.  Writes through `.data` or numpy change
// neither, nor does torch count those to inference tensors.
#include "python/weight_versions.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace py = pybind11;

namespace fastdense {
namespace {

// Keeps no reference to a tensor: torch.utils.swap_tensors refuses those that C++ holds.
class WeightVersions {
 public:
  explicit WeightVersions(const py::list& weights) : words_(read(weights)) {}

  bool hold(const py::list& weights) const { return read(weights) == words_; }

 private:
  static std::vector<uint64_t> read(const py::list& weights) {
    std::vector<uint64_t> words;
    words.reserve(2 * weights.size());
    for (const py::handle weight : weights) {
      if (weight.is_none()) continue;
      TORCH_CHECK_TYPE(THPVariable_Check(weight.ptr()), "WeightVersions: expected tensors, got ",
                       py::type::of(weight).attr("__name__").cast<std::string>());
      const at::Tensor& tensor = THPVariable_Unpack(weight.ptr());
      words.push_back(reinterpret_cast<uint64_t>(tensor.const_data_ptr()));
      words.push_back(tensor.is_inference() ? 0 : tensor._version());
    }
    return words;
  }

  const std::vector<uint64_t> words_;
};

}  // namespace

void bind_weight_versions(py::module_& m) {
  py::class_<WeightVersions>(m, "WeightVersions")
      .def(py::init<const py::list&>(), py::arg("weights"))
      .def("hold", &WeightVersions::hold, py::arg("weights"));
}

}  // namespace fastdense
