// SPDX-License-Identifier: Apache-2.0
// Host twins of what the .cu files use of CUDA, so that the very kernels run on a CPU: block by block, every thread a
// fiber that runs until it meets a barrier or a warp collective.
//
// Two schedules, forwards and backwards: blocks and threads in ascending or descending order, always the first one that
// can run, so that a thread gets ahead of its neighbours by as much as the barriers allow; a result that depends on the
// order is a race.  Shared memory is poisoned before every block (NaN in every floating type) and guarded on both
// sides. A launch fails, with a reason from cudaGetErrorString, when threads wait for each other for ever, meet at
// different barriers or collectives, write outside shared memory, or access a vector at an address that is no multiple
// of its size.  Not modelled: the order of memory accesses between blocks, bank conflicts, speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace fastdense::emulation {

inline bool backwards = false;
inline int64_t launches = 0;
inline std::string failure;   // of the launches since cudaGetLastError was last asked
inline std::string reported;  // what it said last

constexpr size_t kGuard = 256, kStack = size_t(64) << 10, kAlign = 128;
constexpr unsigned kWarp = 32;
constexpr unsigned char kPoison = 0xff;

// The block that runs: its threads, the fibers that carry them, and its shared memory.
class Block {
 public:
  void run(unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
    body_ = &body;
    shared_bytes_ = shared_bytes;
    shared_.assign(kAlign + 2 * kGuard + shared_bytes, kPoison);
    threads_.assign(threads, Thread());
    warps_.assign((threads + kWarp - 1) / kWarp, Meeting());
    barrier_ = Meeting();
    idle_.clear();
    for (size_t i = fibers_.size(); i-- > 0;) {
      fibers_[i]->fresh = true;
      idle_.push_back(i);
    }
    if (threads > 0) switch_to(next(), main_);
    if (!failure.empty()) return;
    const auto whole = [&](const unsigned char* at) {
      for (size_t i = 0; i < kGuard; ++i)
        if (at[i] != kPoison) return false;
      return true;
    };
    if (!whole(shared() - kGuard) || !whole(shared() + shared_bytes)) fail("a write outside shared memory");
  }

  unsigned char* shared() {
    const auto at = reinterpret_cast<uintptr_t>(shared_.data()) + kGuard;
    return reinterpret_cast<unsigned char*>((at + kAlign - 1) / kAlign * kAlign);
  }

  void barrier(int line) { meet(barrier_, unsigned(threads_.size()), line); }

  // Gives `value` to the warp and returns that of lane `from`.
  uint64_t shuffle(uint64_t value, unsigned from, int line) {
    const unsigned warp = current_ / kWarp, lane = current_ % kWarp;
    if (threads_.size() < (warp + 1) * kWarp) stop("a collective in a warp of fewer than 32 threads");
    threads_[current_].given = value;
    meet(warps_[warp], kWarp, line);
    const uint64_t got = threads_[warp * kWarp + (from < kWarp ? from : lane)].given;
    meet(warps_[warp], kWarp, line);  // nobody gives anew before all have taken
    return got;
  }

  unsigned lane() const { return current_ % kWarp; }

  [[noreturn]] void stop(const char* reason) {
    fail(reason);
    _longjmp(main_.at, 1);
    __builtin_unreachable();
  }

 private:
  struct Meeting {
    unsigned arrived = 0, number = 0;
    int line = 0;
  };
  struct Thread {
    bool started = false, done = false;
    const Meeting* at = nullptr;  // what it waits for, and the number of that meeting
    unsigned number = 0;
    size_t fiber = 0;
    uint64_t given = 0;
    bool can_run() const { return !done && (!at || at->number != number); }
  };
  // A stack to run on.  Entered once by setcontext, then left and entered by jumps, which spare system calls.
  struct Fiber {
    bool fresh = true;
    jmp_buf at;
    std::unique_ptr<char[]> stack;
  };

  void fail(const char* reason) {
    if (!failure.empty()) return;
    failure = std::string(reason) + ": block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
              ", " + std::to_string(blockIdx.z) + "), thread " + std::to_string(current_);
  }

  void meet(Meeting& meeting, unsigned count, int line) {
    if (meeting.arrived > 0 && meeting.line != line) stop("threads meet at different barriers or collectives");
    meeting.line = line;
    Thread& thread = threads_[current_];
    thread.number = meeting.number;
    thread.at = &meeting;
    if (++meeting.arrived == count) {
      meeting.arrived = 0;
      ++meeting.number;
    }
    // Even the last to arrive steps back, so that the order of threads is the schedule's alone.
    if (const unsigned following = next(); following != current_) switch_to(following, *fibers_[thread.fiber]);
    thread.at = nullptr;
  }

  // The first thread of the schedule that can run.
  unsigned next() {
    const auto count = unsigned(threads_.size());
    for (unsigned i = 0; i < count; ++i) {
      const unsigned thread = backwards ? count - 1 - i : i;
      if (threads_[thread].can_run()) return thread;
    }
    return count;
  }

  bool all_done() const {
    for (const Thread& thread : threads_)
      if (!thread.done) return false;
    return true;
  }

  // Leaves the fiber `from` for a thread, or for the launch when there is none.
  void switch_to(unsigned thread, Fiber& from) {
    if (thread == threads_.size()) {
      if (!all_done()) stop("a barrier or collective was not met by all threads");
      _longjmp(main_.at, 1);
    }
    Thread& t = threads_[thread];
    if (!t.started) {
      if (idle_.empty()) {
        idle_.push_back(fibers_.size());
        fibers_.push_back(std::make_unique<Fiber>());
      }
      t.fiber = idle_.back();
      idle_.pop_back();
    }
    enter(thread);
    Fiber& to = *fibers_[t.fiber];
    if (_setjmp(from.at) != 0) return;
    if (!to.fresh) _longjmp(to.at, 1);
    begin(to);
  }

  void enter(unsigned thread) {
    current_ = thread;
    threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y));
  }

  static void begin(Fiber& fiber) {
    fiber.fresh = false;
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Block::carry, 0);
    setcontext(&context);
  }

  // A fiber carries one thread after the other as long as none waits.
  static void carry();
  void carry_threads() {
    for (;;) {
      Thread& thread = threads_[current_];
      const size_t own = thread.fiber;
      thread.started = true;
      (*body_)();
      thread.done = true;
      const unsigned following = next();
      if (following < threads_.size() && !threads_[following].started) {
        threads_[following].fiber = own;
        enter(following);
      } else {
        idle_.push_back(own);
        switch_to(following, *fibers_[own]);
      }
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<size_t> idle_;
  std::vector<Thread> threads_;
  std::vector<Meeting> warps_;
  Meeting barrier_;
  std::vector<unsigned char> shared_;
  size_t shared_bytes_ = 0;
  unsigned current_ = 0;
  const std::function<void()>* body_ = nullptr;
  Fiber main_;
};

inline Block block;
inline void Block::carry() { block.carry_threads(); }

// Numbers 0 ... count - 1 in the chosen order, until something fails.
template <typename Body>
void in_order(unsigned count, const Body& body) {
  for (unsigned i = 0; i < count && failure.empty(); ++i) body(backwards ? count - 1 - i : i);
}

template <typename Kernel, typename... Arguments>
void launch(const Kernel& kernel, dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  ++launches;
  gridDim = grid;
  blockDim = threads;
  const std::function<void()> body = [&] { kernel(arguments...); };
  in_order(grid.z, [&](unsigned z) {
    in_order(grid.y, [&](unsigned y) {
      in_order(grid.x, [&](unsigned x) {
        blockIdx = dim3(x, y, z);
        block.run(threads.x * threads.y * threads.z, shared_bytes, body);
      });
    });
  });
}

template <typename V>
V shuffle(V value, unsigned from, int line) {
  static_assert(sizeof(V) <= 8 && std::is_trivially_copyable_v<V>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(V));
  word = block.shuffle(word, from, line);
  std::memcpy(&value, &word, sizeof(V));
  return value;
}

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) block.stop("a vector access at a misaligned address");
}

}  // namespace fastdense::emulation

inline cudaError_t cudaGetLastError() {
  using namespace fastdense::emulation;
  if (failure.empty()) return cudaSuccess;
  reported = std::exchange(failure, "");
  return cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : fastdense::emulation::reported.c_str();
}

#define __syncthreads() ::fastdense::emulation::block.barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  ::fastdense::emulation::shuffle(value, ::fastdense::emulation::block.lane() ^ unsigned(lanes), __LINE__)
#define __shfl_down_sync(mask, value, delta) \
  ::fastdense::emulation::shuffle(value, ::fastdense::emulation::block.lane() + unsigned(delta), __LINE__)

#define FASTDENSE_SHARED(name) unsigned char* name = ::fastdense::emulation::block.shared()
#define FASTDENSE_CHECK_ALIGNED(address, bytes) ::fastdense::emulation::check_aligned(address, bytes)
#define FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                   \
  ::fastdense::emulation::launch([](auto... arguments) { kernel(arguments...); }, dim3(grid), dim3(block), \
                                 size_t(shared_bytes), cudaStream_t(stream), __VA_ARGS__)
