// Parallel loops on torch's OpenMP pool.
#pragma once
#include <cstdint>

namespace fastnn {

// Threads that a parallel region started here would get; 1 inside another region.
int max_threads();

// Runs body(thread, threads) once on each of `threads` threads; on the caller alone when that is 1.
// The number of threads that really came is passed to the body. Exceptions must not leave it.
void run_on_threads(int threads, void (*body)(void* context, int thread, int threads),
                    void* context);

// Waits for all threads of the surrounding run_on_threads.
void barrier();

template <class F>
void parallel(int threads, F&& f) {
  if (threads <= 1) {
    f(0, 1);
    return;
  }
  run_on_threads(threads, [](void* c, int t, int n) { (*static_cast<F*>(c))(t, n); }, (void*)&f);
}

// The share [begin, end) of n items, cut at multiples of `grain`, for one of `threads`.
struct Range {
  int64_t begin, end;
};
inline Range share_of(int64_t n, int64_t grain, int thread, int threads) {
  const int64_t blocks = (n + grain - 1) / grain;
  const int64_t b = blocks * thread / threads * grain, e = blocks * (thread + 1) / threads * grain;
  return {b < n ? b : n, e < n ? e : n};
}

}  // namespace fastnn
