// SPDX-License-Identifier: Apache-2.0
// Dropout from a counter: whether an element is kept depends on (seed, layer, index) alone, so a backward
// pass or a recomputation asks again instead of storing masks, and CPU and CUDA agree whatever the launch
// shape.
//
//   word(index) = Philox4x32-10(key = seed, counter = (index / 4, layer, 0))[index % 4]
//   keep(index) = word(index) >= drop_rate * 2^32
//
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC'11 (2011), section 3.3.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastdense {

struct PhiloxKey {
  uint32_t words[2];
};

struct PhiloxBlock {
  uint32_t words[4];
};

FASTDENSE_HD PhiloxBlock philox4x32(PhiloxKey key, PhiloxBlock counter) {
  constexpr int kRounds = 10;
  constexpr uint32_t kMultipliers[] = {0xd2511f53, 0xcd9e8d57};
  constexpr uint32_t kWeyl[] = {0x9e3779b9, 0xbb67ae85};
  PhiloxBlock x = counter;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t first = uint64_t(kMultipliers[0]) * x.words[0];
    const uint64_t second = uint64_t(kMultipliers[1]) * x.words[2];
    x = {{uint32_t(second >> 32) ^ x.words[1] ^ key.words[0], uint32_t(second),
          uint32_t(first >> 32) ^ x.words[3] ^ key.words[1], uint32_t(first)}};
    key.words[0] += kWeyl[0];
    key.words[1] += kWeyl[1];
  }
  return x;
}

// The four random words of elements 4 * block ... 4 * block + 3.
FASTDENSE_HD PhiloxBlock dropout_words(uint64_t seed, uint32_t layer, uint64_t block) {
  return philox4x32({{uint32_t(seed), uint32_t(seed >> 32)}}, {{uint32_t(block), uint32_t(block >> 32), layer, 0}});
}

// Smallest word that is kept, in [0, 2^32]: 64 bits, so that drop_rate 1 keeps nothing.
FASTDENSE_HD uint64_t dropout_threshold(double drop_rate) {
  const double scaled = drop_rate * 4294967296.0;
  const uint64_t floor = uint64_t(scaled);
  return floor + (double(floor) < scaled ? 1 : 0);
}

FASTDENSE_HD bool dropout_keep(uint64_t seed, uint32_t layer, uint64_t index, uint64_t threshold) {
  return dropout_words(seed, layer, index / 4).words[index % 4] >= threshold;
}

// Functor over blocks of four elements, which share one Philox evaluation.
struct DropoutMask {
  const int64_t* seed;  // read where the mask is written: no host synchronisation
  bool* mask;           // [count]
  int64_t count;
  uint32_t layer;
  uint64_t threshold;

  FASTDENSE_HD int64_t blocks() const { return count / 4 + (count % 4 != 0); }

  FASTDENSE_HD void operator()(int64_t block) const {
    const PhiloxBlock random = dropout_words(uint64_t(*seed), layer, uint64_t(block));
    const int64_t first = 4 * block;
    for (int i = 0; i < 4 && first + i < count; ++i) mask[first + i] = random.words[i] >= threshold;
  }
};

}  // namespace fastdense
