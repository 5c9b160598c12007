// The random numbers of dropout: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011), a function of a key and a counter without any state, so
// that the mask of an element depends on the seed and the element's index alone, never on threads
// or instruction sets, and a backward pass makes it again instead of keeping it.
//
// The key is the 64-bit seed; the counter's low half is `counter`, its high half 0. Element e, the
// index in row-major order, has word e % 4 of counter e / 4. It is kept where word >= threshold.
// isa/philox.hpp makes many words at once.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTNN_PHILOX_INLINE static __host__ __device__ __forceinline__
#else
#define FASTNN_PHILOX_INLINE static inline __attribute__((always_inline))
#endif

namespace fastnn {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

// Always inlined: what two files instantiate is kept once, perhaps in its AVX-512 form.
FASTNN_PHILOX_INLINE PhiloxWords philox(uint64_t seed, uint64_t counter) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < kPhiloxRounds; round++) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// round(p 2^32) for 0 <= p <= 1: an element is dropped with this probability, in 2^-32ths. With
// 2^32, which no word reaches, nothing is kept.
FASTNN_PHILOX_INLINE uint64_t dropout_threshold(double p) { return uint64_t(p * 0x1p32 + 0.5); }

FASTNN_PHILOX_INLINE bool dropout_keeps(uint64_t seed, uint64_t element, uint64_t threshold) {
  return philox(seed, element / 4).word[element % 4] >= threshold;
}

}  // namespace fastnn
