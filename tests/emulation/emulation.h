// SPDX-License-Identifier: Apache-2.0
// Host twins of what the .cu files use of CUDA, so that the very kernels run on a CPU: block by block, every thread a
// fiber that runs until it meets a barrier or a warp collective.
//
// Two schedules, forwards and backwards: blocks and threads in ascending or descending order, always the first one that
// can run, so that a thread gets ahead of its neighbours by as much as the barriers allow; a result that depends on the
// order is a race.  Asynchronous copies land when they are waited for or, with early_copies, at once.  Shared memory is
// poisoned before every block (NaN in every floating type). A launch fails, with a reason from cudaGetErrorString, when
// threads wait for each other for ever, meet at different barriers or collectives, write in front of shared memory or
// reach behind it, access a vector at an address that is no multiple of its size, return without having called
// wait_for_kernels_before(), or access a vector or copy before.  Not modelled: the order of memory accesses between
// blocks, bank conflicts, speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "shared_memory.h"

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

inline bool backwards = false, early_copies = false;
inline bool skips = false;  // launches are counted only, by the function that starts them
inline std::map<const char*, int64_t> skipped;
inline int64_t launches = 0;
inline std::string failure;   // of the launches since cudaGetLastError was last asked
inline std::string reported;  // what it said last

constexpr size_t kStack = size_t(64) << 10;
constexpr unsigned kWarp = 32;
constexpr size_t kMostShared = size_t(227) << 10;  // that a block may ask for, compute capability 9.0

// The block that runs: its threads, the fibers that carry them, and its shared memory.
class Block {
 public:
  void run(unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
    body_ = &body;
    if (!SharedMemory::holds(shared_bytes)) return fail("more shared memory than there is");
    shared_.place(shared_bytes);
    threads_.resize(threads);
    for (unsigned i = 0; i < threads; ++i) threads_[i].reset(i);
    warps_.resize((threads + kWarp - 1) / kWarp);
    for (Warp& warp : warps_) warp.meeting = Meeting();
    barrier_ = Meeting();
    can_run_.assign((threads + 63) / 64, 0);
    wake(0, threads);
    done_ = 0;
    idle_.clear();
    for (size_t i = fibers_.size(); i-- > 0;) {
      if (stopped_) fibers_[i]->fresh = true;
      idle_.push_back(i);
    }
    stopped_ = false;
    if (threads > 0) switch_to(next(), main_);
    if (failure.empty() && !shared_.whole()) fail("a write outside shared memory");
  }

  unsigned char* shared() { return shared_.data(); }

  void barrier(int line) { meet(barrier_, 0, unsigned(threads_.size()), line); }

  // What each lane of a warp gives to a collective.  Whoever gives next writes to the other half: the half in hand is
  // written again only after the next collective, which begins when all have taken.
  struct Words {
    uint64_t word[6];
  };
  using Given = Words[kWarp];
  const Given& exchange(const Words& words, int line) {
    Warp& warp = warp_of(current_);
    const unsigned half = warp.meeting.number % 2;
    warp.given[half][lane()] = words;
    meet(warp.meeting, first_of_warp(), kWarp, line);
    return warp.given[half];
  }
  void warp_barrier(int line) { meet(warp_of(current_).meeting, first_of_warp(), kWarp, line); }

  unsigned lane() const { return current_ % kWarp; }

  void begin_accesses() { threads_[current_].accesses = true; }
  void access() {
    if (!threads_[current_].accesses) stop("an access before wait_for_kernels_before()");
  }

  void copy(void* to, const void* from, int bytes, int valid) {
    access();
    const Copy copy{to, from, bytes, valid};
    if (early_copies) {
      land(copy);
    } else {
      threads_[current_].copies.push_back(copy);
    }
  }
  void commit() {
    Thread& thread = threads_[current_];
    thread.groups.push_back(thread.copies.size());
  }
  void wait(size_t pending) {
    auto& copies = threads_[current_].copies;
    auto& groups = threads_[current_].groups;
    if (groups.size() <= pending) return;
    const auto landing = groups.end() - ptrdiff_t(pending);
    const size_t count = landing[-1];
    for (size_t i = 0; i < count; ++i) land(copies[i]);
    copies.erase(copies.begin(), copies.begin() + ptrdiff_t(count));
    groups.erase(groups.begin(), landing);
    for (size_t& end : groups) end -= count;
  }

  [[noreturn]] void stop(const char* reason) {
    fail(reason);
    stopped_ = true;
    _longjmp(main_.at, 1);
    __builtin_unreachable();
  }

 private:
  struct Meeting {
    unsigned arrived = 0, number = 0;
    int line = 0;
  };
  struct Warp {
    Meeting meeting;
    Given given[2];
  };
  struct Copy {
    void* to;
    const void* from;
    int bytes, valid;
  };
  struct Thread {
    dim3 index;
    bool started, accesses;
    size_t fiber;
    std::vector<Copy> copies;    // that have not landed
    std::vector<size_t> groups;  // of them, by their ends
    void reset(unsigned i) {
      index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
      started = accesses = false;
      copies.clear();
      groups.clear();
    }
  };
  // A stack to run on.  Entered once by setcontext, then left and entered by jumps, which spare system calls; between
  // blocks it rests where it carried its last thread, unless that was stopped.
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

  Warp& warp_of(unsigned thread) {
    const unsigned warp = thread / kWarp;
    if (threads_.size() < (warp + 1) * kWarp) stop("a collective in a warp of fewer than 32 threads");
    return warps_[warp];
  }

  static void land(const Copy& copy) {
    std::memcpy(copy.to, copy.from, size_t(copy.valid));
    std::memset(static_cast<char*>(copy.to) + copy.valid, 0, size_t(copy.bytes - copy.valid));
  }

  unsigned first_of_warp() const { return current_ / kWarp * kWarp; }

  // Of the threads first ... first + count - 1.
  void meet(Meeting& meeting, unsigned first, unsigned count, int line) {
    if (meeting.arrived > 0 && meeting.line != line) stop("threads meet at different barriers or collectives");
    meeting.line = line;
    can_run_[current_ / 64] &= ~bit(current_);
    if (++meeting.arrived == count) {
      meeting.arrived = 0;
      ++meeting.number;
      wake(first, count);
    }
    // Even the last to arrive steps back, so that the order of threads is the schedule's alone.
    if (const unsigned following = next(); following != current_)
      switch_to(following, *fibers_[threads_[current_].fiber]);
  }

  static uint64_t bit(unsigned thread) { return uint64_t(1) << thread % 64; }

  void wake(unsigned first, unsigned count) {
    for (unsigned thread = first; thread < first + count; ++thread) can_run_[thread / 64] |= bit(thread);
  }

  // The first thread of the schedule that can run.
  unsigned next() const {
    const size_t words = can_run_.size();
    for (size_t i = 0; i < words; ++i) {
      const size_t at = backwards ? words - 1 - i : i;
      if (const uint64_t word = can_run_[at])
        return unsigned(64 * at) + unsigned(backwards ? std::bit_width(word) - 1 : std::countr_zero(word));
    }
    return unsigned(threads_.size());
  }

  // Leaves the fiber `from` for a thread, or for the launch when there is none.
  void switch_to(unsigned thread, Fiber& from) {
    if (thread == threads_.size()) {
      if (done_ < threads_.size()) stop("a barrier or collective was not met by all threads");
      if (_setjmp(from.at) == 0) _longjmp(main_.at, 1);
      return;
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
    threadIdx = threads_[thread].index;
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
      if (!thread.accesses) stop("a thread without wait_for_kernels_before()");
      can_run_[current_ / 64] &= ~bit(current_);
      ++done_;
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
  std::vector<Warp> warps_;
  Meeting barrier_;
  std::vector<uint64_t> can_run_;  // a bit a thread
  size_t done_ = 0;                // threads
  bool stopped_ = false;           // the last block, in the middle
  static void on_fault();
  SharedMemory shared_{&Block::on_fault};
  unsigned current_ = 0;
  const std::function<void()>* body_ = nullptr;
  Fiber main_;
};

inline Block block;
inline void Block::carry() { block.carry_threads(); }
inline void Block::on_fault() { block.stop("an access outside shared memory"); }

// Numbers 0 ... count - 1 in the chosen order, until something fails.
template <typename Body>
void in_order(unsigned count, const Body& body) {
  for (unsigned i = 0; i < count && failure.empty(); ++i) body(backwards ? count - 1 - i : i);
}

template <typename Kernel, typename... Arguments>
void launch(const char* starter, const Kernel& kernel, dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  ++launches;
  if (skips) {
    ++skipped[starter];
    return;
  }
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
  Block::Words words{};
  std::memcpy(words.word, &value, sizeof(V));
  const Block::Given& given = block.exchange(words, line);
  std::memcpy(&value, given[from < kWarp ? from : block.lane()].word, sizeof(V));
  return value;
}

inline void check_aligned(const void* address, size_t bytes) {
  block.access();
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) block.stop("a vector access at a misaligned address");
}

// ldmatrix.x4 and mma.m16n8; cuda/mma.h says who holds what.
inline void load_matrices(uint32_t (&m)[4], const void* row, bool transposed, int line) {
  check_aligned(row, 16);
  Block::Words words{};
  std::memcpy(words.word, &row, sizeof(row));
  const Block::Given& given = block.exchange(words, line);
  const unsigned g = block.lane() / 4, t = block.lane() % 4;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned r = transposed ? 2 * t + j : g, column = transposed ? g : 2 * t + j;
      const char* source;
      std::memcpy(&source, given[8 * i + r].word, sizeof(source));
      uint16_t number;
      std::memcpy(&number, source + 2 * column, 2);
      m[i] = j == 0 ? number : m[i] | uint32_t(number) << 16;
    }
}

// A word holds `numbers` numbers; value(word, i) is the i-th.
template <typename Value>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line, int numbers,
                  const Value& value) {
  Block::Words words{};
  float own[6][2] = {};
  for (int i = 0; i < numbers; ++i) {
    for (int j = 0; j < 4; ++j) own[j][i] = value(a[j], i);
    own[4][i] = value(b0, i);
    own[5][i] = value(b1, i);
  }
  static_assert(sizeof(own) == sizeof(words));
  std::memcpy(words.word, own, sizeof(own));
  const Block::Given& given = block.exchange(words, line);
  const auto of_lane = [&](unsigned lane, unsigned word, int i) {
    float number;
    std::memcpy(&number, reinterpret_cast<const char*>(given[lane].word) + 8 * word + 4 * i, 4);
    return number;
  };
  const unsigned g = block.lane() / 4, t = block.lane() % 4;
  for (unsigned word = 0; word < 8; ++word) {
    for (int i = 0; i < numbers; ++i) {
      float left[2], right[2];
      for (unsigned j = 0; j < 2; ++j) {
        left[j] = of_lane(g * 4 + word % 4, j + 2 * (word / 4), i);
        right[j] = of_lane((2 * t + j) * 4 + word % 4, 4 + word / 4, i);
      }
      for (unsigned e = 0; e < 4; ++e) c[e] += left[e / 2] * right[e % 2];
    }
  }
}

}  // namespace fastdense::emulation

namespace fastdense {
inline void wait_for_kernels_before() { emulation::block.begin_accesses(); }
}  // namespace fastdense

inline cudaError_t cudaGetLastError() {
  using namespace fastdense::emulation;
  if (failure.empty()) return cudaSuccess;
  reported = std::exchange(failure, "");
  return cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : fastdense::emulation::reported.c_str();
}

// Blocks run one after the other.
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }
#define __threadfence() \
  do {                  \
  } while (false)

#define __syncthreads() ::fastdense::emulation::block.barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  ::fastdense::emulation::shuffle(value, ::fastdense::emulation::block.lane() ^ unsigned(lanes), __LINE__)
#define __shfl_down_sync(mask, value, delta) \
  ::fastdense::emulation::shuffle(value, ::fastdense::emulation::block.lane() + unsigned(delta), __LINE__)

#define FASTDENSE_SHARED(name) unsigned char* name = ::fastdense::emulation::block.shared()
#define FASTDENSE_CHECK_ALIGNED(address, bytes) ::fastdense::emulation::check_aligned(address, bytes)
#define FASTDENSE_ALLOW_SHARED(kernel, bytes) \
  ((bytes) <= ::fastdense::emulation::kMostShared ? cudaSuccess : cudaErrorLaunchFailure)
#define FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                              \
  ::fastdense::emulation::launch(                                                                     \
      __PRETTY_FUNCTION__, [&](auto... arguments) { kernel(arguments...); }, dim3(grid), dim3(block), \
      size_t(shared_bytes), cudaStream_t(stream), __VA_ARGS__)
