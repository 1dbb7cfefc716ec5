// SPDX-License-Identifier: Apache-2.0
#include "common/simd.h"

#ifdef FASTDENSE_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fastdense {
namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512, SimdLevel::kAvx512Bf16,
                                 SimdLevel::kAmx};
constexpr const char* kAllowed = "baseline, avx2, avx512, avx512_bf16 or amx";

// Whether the processor has AMX-BF16 and Linux lets this process use the tiles; torch asks for the same permission.
bool has_amx() {
#ifdef FASTDENSE_HAS_AMX
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

SimdLevel machine_level() {
#if defined(__x86_64__) || defined(__i386__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef FASTDENSE_HAS_AVX512_BF16
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16"))
    return has_amx() ? SimdLevel::kAmx : SimdLevel::kAvx512Bf16;
#endif
  if (avx2 && avx512) return SimdLevel::kAvx512;
  if (avx2) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kBaseline;
}

std::optional<SimdLevel> parse(std::string_view name) {
  for (const SimdLevel level : kLevels) {
    if (name == simd_name(level)) return level;
  }
  return std::nullopt;
}

SimdLevel initial_level() {
  const char* name = std::getenv("FASTDENSE_SIMD");
  if (name == nullptr || *name == '\0') return machine_level();
  const std::optional<SimdLevel> wanted = parse(name);
  if (!wanted) {
    std::fprintf(stderr, "fastdense: ignoring FASTDENSE_SIMD=%s, expected %s\n", name, kAllowed);
    return machine_level();
  }
  return std::min(*wanted, machine_level());
}

std::atomic<SimdLevel>& current_level() {
  static std::atomic<SimdLevel> level{initial_level()};
  return level;
}

}  // namespace

SimdLevel simd_level() { return current_level().load(std::memory_order_relaxed); }

const char* simd_name(SimdLevel level) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(level)];
}

void set_simd_level(SimdLevel level) {
  if (level > machine_level()) {
    throw std::invalid_argument(std::string("set_simd_level: expected a level this machine has, at most ") +
                                simd_name(machine_level()) + ", got " + simd_name(level));
  }
  current_level().store(level, std::memory_order_relaxed);
}

void set_simd_level(const char* name) {
  const std::optional<SimdLevel> level = parse(name);
  if (!level) {
    throw std::invalid_argument(std::string("set_simd_level: expected name to be ") + kAllowed + ", got " + name);
  }
  set_simd_level(*level);
}

}  // namespace fastdense
