// Masks of vectors as bits of memory: bit e % 8 of byte e / 8 belongs to element e. Included after
// FASTNN_TARGET was chosen; see isa/vec.hpp.
//
//   bits_of(mask)            the lanes of a mask as an integer, lane 0 lowest
//   mask_of(bits, V())       V::Mask: and back; bits beyond V::width are ignored
//   BitWriter(bytes, first)  puts bits one after the other, from element `first`
//   bits_at(bytes, element)  at least 16 bits; reads four bytes, which have to be there
#pragma once
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

#if FASTNN_TARGET_ID == 2

static FASTNN_INLINE uint32_t bits_of(VecF32::Mask mask) { return mask; }
static FASTNN_INLINE uint32_t bits_of(VecF64::Mask mask) { return mask; }
static FASTNN_INLINE VecF32::Mask mask_of(uint32_t bits, VecF32) { return VecF32::Mask(bits); }
static FASTNN_INLINE VecF64::Mask mask_of(uint32_t bits, VecF64) { return VecF64::Mask(bits); }

#elif FASTNN_TARGET_ID == 1

static FASTNN_INLINE uint32_t bits_of(VecF32::Mask mask) {
  return uint32_t(_mm256_movemask_ps(mask.m));
}
static FASTNN_INLINE uint32_t bits_of(VecF64::Mask mask) {
  return uint32_t(_mm256_movemask_pd(mask.m));
}
static FASTNN_INLINE VecF32::Mask mask_of(uint32_t bits, VecF32) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i own = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lane);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(own, lane))};
}
static FASTNN_INLINE VecF64::Mask mask_of(uint32_t bits, VecF64) {
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i own = _mm256_and_si256(_mm256_set1_epi64x(int64_t(bits)), lane);
  return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(own, lane))};
}

#else

template <class Mask>
static FASTNN_INLINE uint32_t bits_of(Mask mask) {
  uint32_t bits = 0;
  for (int i = 0; i < int(sizeof(mask.m) / sizeof(mask.m[0])); i++)
    bits |= uint32_t(mask.m[i] & 1) << i;
  return bits;
}
template <class V>
static FASTNN_INLINE typename V::Mask mask_of(uint32_t bits, V) {
  typename V::Mask mask;
  for (int i = 0; i < V::width; i++) mask.m[i] = bits >> i & 1 ? -1 : 0;
  return mask;
}

#endif

// Bits of the first byte that belong to elements before `first` stay as they are.
class BitWriter {
 public:
  FASTNN_INLINE BitWriter(uint8_t* bytes, uint64_t first)
      : at_(bytes + first / 8), filled_(int(first % 8)) {
    word_ = filled_ ? *at_ & ((1u << filled_) - 1) : 0;
  }
  // The lowest n bits, 0 <= n <= 32; the others have to be 0.
  FASTNN_INLINE void put(uint32_t bits, int n) {
    word_ |= uint64_t(bits) << filled_;
    filled_ += n;
    if (filled_ < 64) return;
    __builtin_memcpy(at_, &word_, 8);
    at_ += 8;
    filled_ -= 64;
    word_ = uint64_t(bits) >> (n - filled_);
  }
  // Writes what was put last; bits of the last byte beyond it become 0.
  FASTNN_INLINE void finish() {
    for (; filled_ > 0; filled_ -= 8, word_ >>= 8) *at_++ = uint8_t(word_);
  }

 private:
  uint8_t* at_;
  uint64_t word_;
  int filled_;
};

static FASTNN_INLINE uint32_t bits_at(const uint8_t* bytes, uint64_t element) {
  uint32_t word;
  __builtin_memcpy(&word, bytes + element / 8, 4);
  return word >> (element % 8);
}

}  // namespace fastnn::FASTNN_TARGET
