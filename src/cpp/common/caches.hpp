// The sizes of this CPU's caches.
#pragma once
#include <cstdint>

namespace fastnn {

// A core's own, and the last one, which it shares with others; 1 MB and 32 MB where Linux does not
// tell. sysconf() does not serve: for AMD's CPUs glibc gives the last caches of all cores together.
int64_t core_cache_bytes();
int64_t last_cache_bytes();

}  // namespace fastnn
