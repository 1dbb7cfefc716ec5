// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/isa.h"

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

constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};
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

Isa machine_isa() {
#if defined(__x86_64__) || defined(__i386__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef FASTDENSE_HAS_AVX512_BF16
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
#endif
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

std::optional<Isa> parse(std::string_view name) {
  for (const Isa isa : kIsas) {
    if (name == isa_name(isa)) return isa;
  }
  return std::nullopt;
}

Isa initial_isa() {
  const char* name = std::getenv("FASTDENSE_SIMD");
  if (name == nullptr || *name == '\0') return machine_isa();
  const std::optional<Isa> wanted = parse(name);
  if (!wanted) {
    std::fprintf(stderr, "fastdense: ignoring FASTDENSE_SIMD=%s, expected %s\n", name, kAllowed);
    return machine_isa();
  }
  return std::min(*wanted, machine_isa());
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

void set_isa(Isa isa) {
  if (isa > machine_isa()) {
    throw std::invalid_argument(std::string("set_simd_level: expected a level this machine has, at most ") +
                                isa_name(machine_isa()) + ", got " + isa_name(isa));
  }
  current().store(isa, std::memory_order_relaxed);
}

void set_isa(const char* name) {
  const std::optional<Isa> isa = parse(name);
  if (!isa) {
    throw std::invalid_argument(std::string("set_simd_level: expected name to be ") + kAllowed + ", got " + name);
  }
  set_isa(*isa);
}

}  // namespace fastdense
