// Every CPU that runs this has a maximum of bytes, and the compiler sees it: there are no files for
// instruction sets.
#include "pool/int8_max.hpp"

#include <algorithm>
#include <cstring>

#include "common/parallel.hpp"

namespace fastnn {

namespace {

// to[i] = the larger of to[i] and from[i]
void raise(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = std::max(to[i], from[i]);
}

}  // namespace

void int8_max_pool(const Int8MaxPool& p) {
  const int64_t lines = p.images * p.out[0], c = p.channels, row = p.size[1] * c;
  const bool small = lines * p.out[1] * c * p.kernel[0] * p.kernel[1] < 100000;
  parallel(small ? 1 : max_threads(), [&](int thread, int came) {
    const Range mine = share_of(lines, 1, thread, came);
    for (int64_t l = mine.begin; l < mine.end; l++) {
      const int64_t h0 = l % p.out[0] * p.stride[0] - p.padding[0];
      const uint8_t* image = p.x + l / p.out[0] * p.size[0] * row;
      for (int64_t o = 0; o < p.out[1]; o++) {
        uint8_t* to = p.y + (l * p.out[1] + o) * c;
        const int64_t w0 = o * p.stride[1] - p.padding[1];
        bool first = true;
        for (int64_t i = 0; i < p.kernel[0]; i++) {
          const int64_t h = h0 + i;
          if (h < 0 || h >= p.size[0]) continue;
          for (int64_t j = 0; j < p.kernel[1]; j++) {
            const int64_t w = w0 + j;
            if (w < 0 || w >= p.size[1]) continue;
            const uint8_t* from = image + h * row + w * c;
            if (first)
              std::memcpy(to, from, size_t(c)), first = false;
            else
              raise(to, from, c);
          }
        }
      }
    }
  });
}

}  // namespace fastnn
