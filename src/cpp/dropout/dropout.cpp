// Dimensions that lie densely together, in row-major order, become one; what is left is cut into
// runs for the threads.
#include "dropout/dropout.hpp"

#include <algorithm>

#include "common/caches.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/philox.hpp"

namespace fastnn {
namespace {

const DropoutKernels& kernels() { return FASTNN_KERNELS_OF(dropout); }

// Shape and strides with as few dimensions as there can be; the last is the inner loop. The order
// is never changed: it is that of the words.
struct Loop {
  int dims = 0;
  int64_t size[kMaxDropoutDims], x[kMaxDropoutDims], out[kMaxDropoutDims];
  int64_t elements = 1;

  explicit Loop(const Dropout& call) {
    for (int d = 0; d < call.dims; d++) {
      const int64_t n = call.shape[d], xs = call.x_strides[d], os = call.out_strides[d];
      elements *= n;
      if (n == 1) continue;
      if (dims && x[dims - 1] == xs * n && out[dims - 1] == os * n) {
        size[dims - 1] *= n, x[dims - 1] = xs, out[dims - 1] = os;
      } else {
        size[dims] = n, x[dims] = xs, out[dims] = os;
        dims++;
      }
    }
    if (!dims) size[0] = x[0] = out[0] = dims = 1;
  }
};

}  // namespace

void dropout(const Dropout& call) {
  const Loop loop(call);
  if (loop.elements == 0) return;
  const auto run = kernels().run[int(call.type)];
  const int64_t item = int64_t(dtype_size(call.type));
  const uint64_t threshold = dropout_threshold(call.p);
  const double scale = call.p < 1 ? 1 / (1 - call.p) : 0;
  // As in elementwise.cpp: results that will have left the caches before anyone reads them.
  const bool stream = item >= 4 && call.x != call.out && loop.elements * item > last_cache_bytes();
  const int last = loop.dims - 1;
  const int64_t inner = loop.size[last];
  constexpr int64_t kWorthAThread = 16384;  // elements: about 10 us
  const int64_t shares = loop.elements / kWorthAThread;
  const int threads = shares < 2 ? 1 : int(std::min<int64_t>(shares, max_threads()));
  parallel(threads, [&](int thread, int count) {
    const Range share = share_of(loop.elements, 1024, thread, count);
    for (int64_t begin = share.begin; begin < share.end;) {
      int64_t rest = begin / inner;
      const int64_t within = begin - rest * inner;
      const int64_t n = std::min(inner - within, share.end - begin);
      int64_t x = within * loop.x[last], out = within * loop.out[last];
      for (int d = last - 1; d >= 0; d--) {
        const int64_t index = rest % loop.size[d];
        rest /= loop.size[d];
        x += index * loop.x[d], out += index * loop.out[d];
      }
      run(static_cast<const char*>(call.x) + x * item, loop.x[last],
          static_cast<char*>(call.out) + out * item, loop.out[last], n, call.seed, uint64_t(begin),
          threshold, scale, stream);
      begin += n;
    }
  });
}

void dropout_words(uint64_t seed, uint64_t first, int64_t n, uint32_t* words) {
  kernels().words(seed, first, n, words);
}

}  // namespace fastnn
