// SPDX-License-Identifier: Apache-2.0
// Whether a kernel of this library may be started before the one before it in the stream has ended ("programmatic
// dependent launch"), to spare the time between two kernels.  FASTDENSE_DEPENDENT_LAUNCH=1 in the environment says so;
// it never ran on a GPU, so that the default is 0.
//
// A kernel waits at its very beginning for the end of the one before it, which did the same.  So nothing that it reads
// is still written, nothing that it writes is still read, and whoever waits for a kernel has waited for all before it:
// also kernels of torch and its libraries, which are started as ever.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace fastdense {

// Read once.
inline bool dependent_launch() {
  static const bool wanted = [] {
    const char* value = std::getenv("FASTDENSE_DEPENDENT_LAUNCH");
    const std::string_view text = value == nullptr ? "" : value;
    if (text != "" && text != "0" && text != "1")
      std::fprintf(stderr, "fastdense: ignoring FASTDENSE_DEPENDENT_LAUNCH=%s, expected 0 or 1\n", value);
    return text == "1";
  }();
  return wanted;
}

}  // namespace fastdense
