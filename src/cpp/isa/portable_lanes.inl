// bfloat16 and float16 of four portable lanes: to_f32 and from_f32 by operators that vectors have,
// with all computed that a branch would choose from. Branches for each lane, inlined wherever
// elements are loaded or stored, are slower and take the compiler half a minute a file. Included by
// vec.hpp, in namespace fastnn::FASTNN_TARGET.

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

template <class T>
FASTNN_INLINE uint64_t read(const char* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof(T));
  return x;
}
// The first n of four, the first one lowest, through a register: memory that was written in pieces
// is slow to read as one.
FASTNN_INLINE Words load_halves(const void* from, int n) {
  const char* p = static_cast<const char*>(from);
  uint64_t all = 0;
  if (n >= 4) {
    all = read<uint64_t>(p);
  } else {
    if (n & 1) all = read<uint16_t>(p + 2 * (n & 2));
    if (n & 2) all = all << 32 | read<uint32_t>(p);
  }
  return __builtin_convertvector(bit_cast<Halves>(all), Words);
}
FASTNN_INLINE void store_halves(void* to, Words words, int n) {
  char* p = static_cast<char*>(to);
  uint64_t all = bit_cast<uint64_t>(__builtin_convertvector(words, Halves));
  if (n >= 4) return void(__builtin_memcpy(p, &all, 8));
  if (n & 2) {
    __builtin_memcpy(p, &all, 4);
    all >>= 32;
  }
  if (n & 1) __builtin_memcpy(p + 2 * (n & 2), &all, 2);
}

FASTNN_INLINE Words choose(Integers mask, Words yes, Words no) {
  return (Words(mask) & yes) | (~Words(mask) & no);
}

FASTNN_INLINE Floats to_floats(Words h, bf16) { return Floats(h << 16); }
FASTNN_INLINE Floats to_floats(Words h, f16) {
  const Words sign = (h & 0x8000) << 16, mag = h & 0x7fff;
  const Floats magnitude = Floats(mag << 13) * bit_cast<float>(0x77800000u);  // 2^112
  const Words special = 0x7f800000u | (mag & 0x3ff) << 13;
  return Floats(sign | choose(Integers(mag) >= 0x7c00, special, Words(magnitude)));
}

FASTNN_INLINE Words from_floats(Floats x, bf16) {
  const Words u = Words(x);
  return choose(x != x, u | 0x400000, u + 0x7fff + (u >> 16 & 1)) >> 16;
}
FASTNN_INLINE Words from_floats(Floats x, f16) {
  const Words u = Words(x), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
  const Words denormal = Words(Floats(mag) + 0.5f) - 0x3f000000u;
  Words h = (mag - 0x38000000u + 0xfff + (mag >> 13 & 1)) >> 13;
  h = choose(Integers(mag) < 0x38800000, denormal, h);
  h = choose(Integers(mag) >= 0x477ff000, Words{} + 0x7c00, h);
  h = choose(Integers(mag) > 0x7f800000, 0x7e00 | (mag >> 13 & 0x3ff), h);
  return sign | h;
}
