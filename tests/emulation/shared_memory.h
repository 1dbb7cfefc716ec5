// SPDX-License-Identifier: Apache-2.0
// A block's shared memory under emulation: it ends where a page begins that nobody can read or write, so that an access
// behind it is a fault, which becomes a call of a function.  In front of it, writes alone are noticed.
#pragma once

#include <signal.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstring>

namespace fastdense::emulation {

class SharedMemory {
 public:
  static constexpr size_t kMost = size_t(256) << 10, kGuard = 256, kAlign = 128;
  static constexpr unsigned char kPoison = 0xff;

  // on_fault() does not return.
  explicit SharedMemory(void (*on_fault)()) {
    pages() = static_cast<unsigned char*>(mmap(nullptr, kAll, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages() + kPage, kMost, PROT_READ | PROT_WRITE);
    handler() = on_fault;
  }

  static bool holds(size_t bytes) { return bytes + kGuard + kAlign <= kMost; }
  // Poisoned, so many bytes.
  unsigned char* place(size_t bytes) {
    watch();
    bytes_ = bytes;
    data_ = pages() + kPage + kMost - (bytes + kAlign - 1) / kAlign * kAlign;
    std::memset(data_ - kGuard, kPoison, size_t(end() - data_) + kGuard);
    return data_;
  }
  unsigned char* data() const { return data_; }
  // Whether nobody wrote around it.
  bool whole() const {
    for (const unsigned char* at = data_ - kGuard; at < end(); ++at)
      if ((at < data_ || at >= data_ + bytes_) && *at != kPoison) return false;
    return true;
  }

 private:
  static constexpr size_t kPage = size_t(64) << 10, kAll = kMost + 2 * kPage;  // a multiple of what systems have
  static unsigned char* end() { return pages() + kPage + kMost; }
  static unsigned char*& pages() {
    static unsigned char* at = nullptr;
    return at;
  }
  static void (*&handler())() {
    static void (*function)() = nullptr;
    return function;
  }
  static struct sigaction& before() {
    static struct sigaction action{};
    return action;
  }

  // Whoever handled faults before still gets those of other addresses.
  static void watch() {
    static const bool watches = [] {
      struct sigaction action{};
      action.sa_sigaction = [](int, siginfo_t* info, void*) {
        const auto* at = static_cast<const unsigned char*>(info->si_addr);
        if (at >= pages() && at < pages() + kAll) handler()();
        sigaction(SIGSEGV, &before(), nullptr);
      };
      action.sa_flags = SA_SIGINFO | SA_NODEFER;
      return sigaction(SIGSEGV, &action, &before()) == 0;
    }();
    (void)watches;
  }

  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fastdense::emulation
