// Every CPU that runs this has a maximum of bytes, and the compiler sees it: there are no files for
// instruction sets.
#include "pool/int8_max.hpp"

#include <algorithm>
#include <cstring>

#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {

namespace {

// to[i] = the largest of from[t * step + i], for t < count
void maxima(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t count, int64_t step,
            int64_t n) {
  if (count == 3) {  // most windows
    const uint8_t *second = from + step, *third = second + step;
    for (int64_t i = 0; i < n; i++) to[i] = std::max(std::max(from[i], second[i]), third[i]);
    return;
  }
  std::memcpy(to, from, size_t(n));
  for (int64_t t = 1; t < count; t++)
    for (int64_t i = 0; i < n; i++) to[i] = std::max(to[i], from[t * step + i]);
}

}  // namespace

void int8_max_pool(const Int8MaxPool& p) {
  const int64_t lines = p.images * p.out[0], c = p.channels, row = p.size[1] * c;
  const bool small = lines * p.out[1] * c * p.kernel[0] * p.kernel[1] < 100000;
  const int threads = small ? 1 : max_threads();
  auto* rows = static_cast<uint8_t*>(scratch(Scratch::accumulator, size_t(threads * row)));
  parallel(threads, [&](int thread, int came) {
    const Range mine = share_of(lines, 1, thread, came);
    uint8_t* highest = rows + thread * row;  // of a window's rows, for all windows of a line
    for (int64_t l = mine.begin; l < mine.end; l++) {
      const int64_t h0 = l % p.out[0] * p.stride[0] - p.padding[0];
      const int64_t first = std::max<int64_t>(h0, 0),
                    last = std::min(h0 + p.kernel[0], p.size[0]);  // one at least: see the binding
      maxima(highest, p.x + (l / p.out[0] * p.size[0] + first) * row, last - first, row, row);
      for (int64_t o = 0; o < p.out[1]; o++) {
        const int64_t w0 = o * p.stride[1] - p.padding[1];
        const int64_t begin = std::max<int64_t>(w0, 0), end = std::min(w0 + p.kernel[1], p.size[1]);
        maxima(p.y + (l * p.out[1] + o) * c, highest + begin * c, end - begin, c, c);
      }
    }
  });
}

}  // namespace fastnn
