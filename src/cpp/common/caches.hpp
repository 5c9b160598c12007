// The sizes of this CPU's caches.
#pragma once
#include <cstdint>
#include <numeric>

namespace fastnn {

// A core's own, and the last one, which it shares with others; 1 MB and 32 MB where Linux does not
// tell. sysconf() does not serve: for AMD's CPUs glibc gives the last caches of all cores together.
int64_t core_cache_bytes();
int64_t last_cache_bytes();

// Whether so many rows at such a distance share so few sets of L1 that they push each other out.
inline bool rows_collide(int64_t bytes, int64_t rows) {
  constexpr int64_t way = 4096, ways = 8;
  return rows * std::gcd(bytes, way) > (ways - 2) * way;
}

}  // namespace fastnn
