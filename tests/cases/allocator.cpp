// SPDX-License-Identifier: Apache-2.0
// A CPU allocator around torch's that counts, fails where it is told to, and fills memory with NaN before it is handed
// out and after it came back.  C functions, called through ctypes.
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating type
constexpr uint8_t kPriority = 255;

std::atomic<bool> poison{false};
std::atomic<int64_t> made{0}, fails_at{0}, live_bytes{0};

struct Memory {
  c10::DataPtr data;
  size_t size;
};

// By address: the context of what an allocator hands out has to be the address itself.
std::unordered_map<void*, Memory> live;
std::mutex mutex;

void fill(const Memory& memory) {
  if (poison && memory.size > 0) std::memset(memory.data.get(), kPoison, memory.size);
}

void release(void* address) {
  if (!address) return;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = live.find(address);
  fill(found->second);
  live_bytes -= int64_t(found->second.size);
  live.erase(found);
}

class Watched : public c10::Allocator {
 public:
  explicit Watched(c10::Allocator* inner) : inner_(inner) {}

  c10::DataPtr allocate(size_t size) override {
    TORCH_CHECK(++made != fails_at, "planted: not enough memory for ", size, " bytes");
    Memory memory{inner_->allocate(size), size};
    void* address = memory.data.get();
    const c10::Device device = memory.data.device();
    if (address) {
      fill(memory);
      const std::lock_guard<std::mutex> lock(mutex);
      live_bytes += int64_t(size);
      live.emplace(address, std::move(memory));
    }
    return {address, address, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

 private:
  c10::Allocator* inner_;
};

c10::Allocator* outer = nullptr;  // torch's, while ours is in its place

}  // namespace

extern "C" {

void install() {
  outer = c10::GetCPUAllocator();
  static Watched watched(outer);
  c10::SetCPUAllocator(&watched, kPriority);
}
void uninstall() { c10::SetCPUAllocator(outer, kPriority); }

void set_poison(bool on) { poison = on; }

// From now on allocations count from 1, and the one with this number fails; 0 for none.
void fail_at(int64_t number) {
  fails_at = number;
  made = 0;
}
int64_t allocations() { return made; }
int64_t bytes_in_use() { return live_bytes; }
}
