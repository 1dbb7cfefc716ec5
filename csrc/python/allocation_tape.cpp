// SPDX-License-Identifier: Apache-2.0
// torch's allocators tell a profiler, where there is one, of all that they hand out and take back.  A tape is such a
// profiler, that only listens; torch.profiler hears nothing while it runs.
#include "python/allocation_tape.h"

#include <c10/util/ThreadLocalDebugInfo.h>
#include <pybind11/stl.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace fastdense {
namespace {

using torch::profiler::impl::ActiveProfilerType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;
using torch::profiler::impl::ProfilerStateBase;

class Listener : public ProfilerStateBase {
 public:
  explicit Listener(c10::DeviceType device)
      : ProfilerStateBase(ProfilerConfig(ProfilerState::Disabled, false, /*profile_memory=*/true)), device_(device) {}

  ActiveProfilerType profilerType() override { return ActiveProfilerType::NONE; }

  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (device.type() != device_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_.push_back(bytes);
  }

  std::vector<int64_t> bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

  int64_t position() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return int64_t(bytes_.size());
  }

 private:
  const c10::DeviceType device_;
  std::mutex mutex_;
  std::vector<int64_t> bytes_;
};

// A context manager.  The backward pass of what runs inside is heard as well, whichever thread it runs in.
class AllocationTape {
 public:
  explicit AllocationTape(const std::string& device)
      : listener_(std::make_shared<Listener>(c10::Device(device).type())) {}

  void enter() { guard_ = std::make_unique<c10::DebugInfoGuard>(c10::DebugInfoKind::PROFILER_STATE, listener_); }
  void exit() { guard_.reset(); }
  std::vector<int64_t> bytes() const { return listener_->bytes(); }
  int64_t position() const { return listener_->position(); }

 private:
  std::shared_ptr<Listener> listener_;
  std::unique_ptr<c10::DebugInfoGuard> guard_;
};

}  // namespace

void bind_allocation_tape(py::module_& m) {
  py::class_<AllocationTape>(m, "AllocationTape")
      .def(py::init<const std::string&>(), py::arg("device"))
      .def("__enter__",
           [](const py::object& self) {
             self.cast<AllocationTape&>().enter();
             return self;
           })
      .def("__exit__", [](AllocationTape& self, const py::args&) { self.exit(); })
      .def_property_readonly("bytes", &AllocationTape::bytes)
      .def_property_readonly("position", &AllocationTape::position);
}

}  // namespace fastdense
