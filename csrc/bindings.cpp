// SPDX-License-Identifier: Apache-2.0
// Module fastdense._C: what is not a tensor. build_info(), the SIMD level and the choice of CUDA kernels, and in the
// submodule `scalar` the scalar functions that CPU and CUDA kernels share, for tests: one bind_<op>() an op; the class
// Fingerprint. Importing the module also loads the ops registered in library.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <thread>

#include "bicubic/bicubic_table.h"
#include "core/dropout_math.h"
#include "core/scalar.h"
#include "cpu/simd/isa.h"
#include "cuda/dependent_launch.h"
#include "cuda/kernel_choice.h"
#include "highway_gate/highway_gate_math.h"
#include "python/allocation_tape.h"
#include "python/fingerprint.h"
#include "python/weight_versions.h"
#include "residual_dense_block/residual_dense_block_math.h"

#ifdef C10_API
#error "bindings.cpp must not include a torch header: tensors go through the dispatcher"
#endif

namespace py = pybind11;

namespace fastdense {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = FASTDENSE_VERSION;
  info["torch"] = FASTDENSE_TORCH_VERSION;
#ifdef FASTDENSE_CUDA_VERSION
  info["cuda"] = FASTDENSE_CUDA_VERSION;
  info["cuda_arch_list"] = FASTDENSE_CUDA_ARCH_LIST;
#else
  info["cuda"] = py::none();
  info["cuda_arch_list"] = py::none();
#endif
#ifdef __clang__
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["simd"] = isa_name(current_isa());
  info["cuda_kernels"] = cuda_kernels_name(cuda_kernels());
  info["dependent_launch"] = dependent_launch();
  info["threads"] = std::thread::hardware_concurrency();
  return info;
}

template <typename A>
void bind_arithmetic(py::module_& scalar, const char* suffix) {
  const auto def = [&](std::string name, auto function, auto... arguments) {
    scalar.def((name + suffix).c_str(), function, arguments...);
  };
  def("mul_add", [](A a, A b, A c) { return mul_add(a, b, c); }, py::arg("a"), py::arg("b"), py::arg("c"));
  def("relu", [](A v) { return relu(v); }, py::arg("v"));
  def("relu_passes", [](A v) { return relu_passes(v); }, py::arg("v"));
}

template <typename T>
void bind_storage(py::module_& scalar, const char* name) {
  const std::string suffix = std::string("_") + name;
  scalar.def(("load" + suffix).c_str(), [](uint16_t bits) { return load(T{bits}); }, py::arg("bits"));
  scalar.def(("store" + suffix).c_str(), [](float v) { return to_bits(store<T>(v)); }, py::arg("v"));
}

void bind_dropout_mask(py::module_& scalar) {
  using Key = std::array<uint32_t, 2>;
  using Block = std::array<uint32_t, 4>;
  scalar.def(
      "philox4x32",
      [](const Key& key, const Block& counter) {
        const PhiloxBlock random = philox4x32({{key[0], key[1]}}, {{counter[0], counter[1], counter[2], counter[3]}});
        return Block{random.words[0], random.words[1], random.words[2], random.words[3]};
      },
      py::arg("key"), py::arg("counter"));
  scalar.def("dropout_threshold", &dropout_threshold, py::arg("drop_rate"));
  scalar.def("dropout_keep", &dropout_keep, py::arg("seed"), py::arg("layer"), py::arg("index"), py::arg("threshold"));
}

template <typename A, typename Activation>
void bind_highway_activation(py::module_& scalar, const std::string& suffix) {
  scalar.def(("highway_output" + suffix).c_str(), &highway_output<Activation, A>, py::arg("x"), py::arg("first"),
             py::arg("second"));
  scalar.def(("highway_gradients" + suffix).c_str(),
             [](A g, A x, A first, A second) {
               const auto grads = highway_gradients<Activation>(g, x, first, second);
               return std::array<A, 3>{grads.input, grads.first, grads.second};
             },
             py::arg("g"), py::arg("x"), py::arg("first"), py::arg("second"));
}

template <typename A>
void bind_highway_gate(py::module_& scalar, const std::string& suffix) {
  scalar.def(("exp_of_nonpositive" + suffix).c_str(), [](A v) { return exp_of_nonpositive(v); }, py::arg("v"));
  scalar.def(("highway_tanh" + suffix).c_str(), &HighwayTanh::value<A>, py::arg("v"));
  bind_highway_activation<A, HighwayRelu>(scalar, "_relu" + suffix);
  bind_highway_activation<A, HighwayTanh>(scalar, "_tanh" + suffix);
  bind_highway_activation<A, HighwayIdentity>(scalar, "_identity" + suffix);
}

template <typename A>
void bind_residual_dense_block(py::module_& scalar, const std::string& suffix) {
  scalar.def(("leaky_relu" + suffix).c_str(), &leaky_relu<A>, py::arg("v"), py::arg("slope"));
  scalar.def(("leaky_relu_gradient" + suffix).c_str(), &leaky_relu_gradient<A>, py::arg("g"), py::arg("y"),
             py::arg("slope"));
  scalar.def(("residual_sum" + suffix).c_str(), &residual_sum<A>, py::arg("v"), py::arg("scale"), py::arg("input"));
}

void bind_bicubic(py::module_& m, py::module_& scalar) {
  scalar.def("cubic_kernel", &cubic_kernel<double>, py::arg("x"), py::arg("a"));
  scalar.def("byte_half_up", &byte_half_up<double>, py::arg("v"));
  scalar.def("byte_half_even", &byte_half_even, py::arg("v"));
  scalar.def("byte_of_fixed", &byte_of_fixed, py::arg("v"));
  scalar.def("pillow_rows_first", &pillow_rows_first, py::arg("height"), py::arg("width"), py::arg("out_height"),
             py::arg("out_width"));
  m.def(
      "bicubic_rows",
      [](int64_t in, int64_t out, double step, double a, bool antialias, const std::string& border,
         bool align_corners) {
        const std::optional<Border> known = find_border(border);
        if (in < 1 || out < 1 || !known) throw py::value_error("bicubic_rows: expected sizes and border to be valid");
        constexpr double kMostEntries = 1 << 28;  // of a matrix that is written out
        if (!(0 <= step && step <= widest_step(in, out)) || double(in) * double(out) > kMostEntries)
          throw py::value_error("bicubic_rows: expected a step and sizes whose weights can be computed");
        const BicubicTable table =
            make_bicubic_table({in, out, step, a, antialias, *known, align_corners, false, false});
        const std::vector<double> empty(static_cast<size_t>(in));
        std::vector<std::vector<double>> rows(static_cast<size_t>(out), empty);
        for (int64_t r = 0; r < out; ++r)
          for (int64_t k = 0; k < table.taps; ++k)
            rows[size_t(r)][size_t(table.start[size_t(r)] + k)] = table.weight[size_t(r * table.taps + k)];
        return rows;
      },
      py::arg("input_size"), py::arg("size"), py::arg("step"), py::arg("a"), py::arg("antialias"), py::arg("border"),
      py::arg("align_corners"));
}

void bind(py::module_& m) {
  m.def("build_info", &build_info);
  m.def("set_simd_level", py::overload_cast<const char*>(&set_isa), py::arg("name"));
  m.def("set_cuda_kernels", &set_cuda_kernels, py::arg("name"));
  py::module_ scalar = m.def_submodule("scalar", "Scalar functions shared by the CPU and CUDA kernels.");
  bind_arithmetic<double>(scalar, "");
  bind_arithmetic<float>(scalar, "_float");
  bind_storage<bfloat16>(scalar, "bfloat16");
  bind_storage<half>(scalar, "half");
  bind_dropout_mask(scalar);
  bind_highway_gate<double>(scalar, "");
  bind_highway_gate<float>(scalar, "_float");
  bind_residual_dense_block<double>(scalar, "");
  bind_residual_dense_block<float>(scalar, "_float");
  bind_bicubic(m, scalar);
  bind_fingerprint(m);
  bind_allocation_tape(m);
  bind_weight_versions(m);
}

}  // namespace
}  // namespace fastdense

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { fastdense::bind(m); }
