// Parts of images, of tensors and of the work, as the convolutions of all types cut them.
#pragma once
#include <atomic>
#include <new>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/patches.hpp"

namespace fastnn {

// Threads are worth waking for about 20 microseconds of work.
inline int threads_for(double multiplications) { return multiplications < 1e6 ? 1 : max_threads(); }

// The spatial dimensions as one that runs over all of them at one stride, if they lie so.
inline bool flat(const Tensor5& t, int64_t& stride) {
  stride = 0;
  int64_t seen = 1;
  for (int d = 4; d >= 2; d--) {
    if (t.size[d] == 1) continue;
    if (seen == 1)
      stride = t.stride[d];
    else if (t.stride[d] != stride * seen)
      return false;
    seen *= t.size[d];
  }
  if (seen == 1) stride = 1;
  return true;
}

inline Patches patches_of(const Tensor5& in, int64_t channels, DType type) {
  Patches p;
  p.data = in.data;
  p.element = int64_t(dtype_size(type));
  p.images = in.size[0], p.channels = channels;
  p.image_stride = in.stride[0], p.channel_stride = in.stride[1];
  for (int d = 0; d < kSpatial; d++) p.size[d] = in.size[2 + d], p.stride[d] = in.stride[2 + d];
  return p;
}

inline Tensor5 channels_from(Tensor5 t, int64_t first, int64_t count, DType type) {
  t.data += first * t.stride[1] * int64_t(dtype_size(type));
  t.size[1] = count;
  return t;
}

// Groups whole to the threads where there are enough of them, else one after the other.
template <class F>
void for_groups(int64_t groups, double multiplications, F f) {
  const int threads = threads_for(multiplications);
  if (groups < 4 * threads) {
    for (int64_t g = 0; g < groups; g++) f(g, threads);
    scratch_trim();  // what products read may lie in this memory, so that they cannot
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  parallel(threads, [&](int, int) {
    try {
      for (int64_t g; (g = next.fetch_add(1)) < groups;) f(g, 1);
      scratch_trim();
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace fastnn
