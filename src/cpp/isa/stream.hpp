// Writing a run of memory a vector at a time: whole cache lines where that can be, and around the
// caches where it is asked for. Included after isa/vec.hpp's target was chosen.
#pragma once
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

// Stores around the caches; p is aligned to the vector.
#if FASTNN_TARGET_ID == 2
static FASTNN_INLINE void stream(float* p, VecF32 v) { _mm512_stream_ps(p, v.r); }
static FASTNN_INLINE void stream(double* p, VecF64 v) { _mm512_stream_pd(p, v.r); }
template <class H>
static FASTNN_INLINE void stream(H* p, VecF32 v) {
  _mm256_stream_si256((__m256i*)p, v.to(H()));
}
static FASTNN_INLINE void end_stream() { _mm_sfence(); }
#elif FASTNN_TARGET_ID == 1
static FASTNN_INLINE void stream(float* p, VecF32 v) { _mm256_stream_ps(p, v.r); }
static FASTNN_INLINE void stream(double* p, VecF64 v) { _mm256_stream_pd(p, v.r); }
template <class H>
static FASTNN_INLINE void stream(H* p, VecF32 v) {
  _mm_stream_si128((__m128i*)p, v.to(H()));
}
static FASTNN_INLINE void end_stream() { _mm_sfence(); }
#else
template <class T, class V>
static FASTNN_INLINE void stream(T* p, V v) {
  v.store(p);
}
static FASTNN_INLINE void end_stream() {}
#endif

// out[i] = f(i-th vector), where f(i, n) loads n lanes, or all with n = width. After stores around
// the caches end_stream() is due.
template <class T, class V, class F>
static FASTNN_INLINE void fill(T* out, int64_t n, bool around_caches, F f) {
  constexpr int64_t w = V::width;
  constexpr uintptr_t bytes = w * sizeof(T);
  int64_t i = 0;
  // Up to the first aligned address by a partial store, since a vector across two cache lines costs
  // two of them; an array that starts at an odd address never gets there.
  const uintptr_t beyond = uintptr_t(out) % bytes;
  if (n >= 4 * w && beyond % sizeof(T) == 0) {
    if (beyond) {
      i = int64_t((bytes - beyond) / sizeof(T));
      f(0, int(i)).store_partial(out, int(i));
    }
    if (around_caches)
      for (; i + w <= n; i += w) stream(out + i, f(i, int(w)));
  }
  for (; i + w <= n; i += w) f(i, int(w)).store(out + i);
  if (i < n) f(i, int(n - i)).store_partial(out + i, int(n - i));
}

}  // namespace fastnn::FASTNN_TARGET
