// The operands of mma.sync as a thread makes them from pieces of 16 bytes that it copied itself.
// Which place along a sum an element has does not matter as long as both operands agree, nor does
// it which column of a product is which; so a thread takes what lies together in memory, and shared
// memory is nothing but its own waiting line: no thread reads what another copied.
//
// Of scores, chunk by chunk of 64 bytes: thread t of a group of four has piece t of one key's
// (group g's) 64 bytes, and of those of queries g and g + 8. Of results: it has piece g of 128
// bytes of the values of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, in which product i takes element
// i.
#pragma once
#include "cuda/attention/scores.cuh"

namespace fastnn::cuda {

struct Piece {
  uint32_t word[4];
};

__device__ __forceinline__ Piece read_piece(const char* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void write_piece(char* to, const Piece& p) {
  *reinterpret_cast<uint4*>(to) = make_uint4(p.word[0], p.word[1], p.word[2], p.word[3]);
}

// 16 bits: a piece has two steps of mma.sync.
template <class Multiply>
struct HalfOperands {
  static constexpr int kLeft = 2;  // pieces of a thread's queries in a chunk
  using Weights = uint32_t[4];

  __device__ static __forceinline__ void queries(Piece (&left)[kLeft], const Piece& above,
                                                 const Piece& below) {
#pragma unroll
    for (int s = 0; s < 2; s++)
      left[s] = {
          {above.word[2 * s], below.word[2 * s], above.word[2 * s + 1], below.word[2 * s + 1]}};
  }
  // sums += the products of 16 queries and 8 keys over a chunk.
  __device__ static __forceinline__ void score(float (&sums)[4], const Piece (&left)[kLeft],
                                               const Piece& key) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const uint32_t right[2] = {key.word[2 * s], key.word[2 * s + 1]};
      Multiply::of(sums, left[s].word, right);
    }
  }
  // From the exponentials of 16 keys as mma.sync left their scores.
  __device__ static __forceinline__ void weights(Weights& left, const float (&p)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      left[i] = Multiply::pack(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
  }
  // sums[i] += weights times element i of the values' pieces.
  template <int columns>
  __device__ static __forceinline__ void weigh(float (&sums)[columns][4], int first,
                                               const Weights& left, const Piece (&values)[4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      uint32_t right[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t x = values[2 * half].word[i / 2], y = values[2 * half + 1].word[i / 2];
        right[half] = i % 2 ? (x >> 16) | (y & 0xFFFF0000u) : (x & 0xFFFFu) | (y << 16);
      }
      Multiply::of(sums[first + i], left, right);
    }
  }
};

template <class Mode>
struct Operands;
template <>
struct Operands<Bf16> : HalfOperands<MultiplyBf16> {};
template <>
struct Operands<F16> : HalfOperands<MultiplyF16> {};

// float32 in three parts. What an infinity leaves for the others is NaN; it is the first parts that
// have its sign, and where their sum is not finite the others do not count.
template <>
struct Operands<SplitF32<3>> {
  using Mode = SplitF32<3>;
  static constexpr int kLeft = 3;
  struct Weights {
    uint32_t upper[3][2], lower[3][2];
  };

  __device__ static __forceinline__ void split(uint32_t (&parts)[3][2], const Piece& piece) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __uint_as_float(piece.word[i]);
    Mode::split<true>(parts, x);
  }
  __device__ static __forceinline__ void multiply(float (&sums)[4], const Weights& left,
                                                  const Piece& right) {
    uint32_t parts[3][2];
    split(parts, right);
    float first[4], others[4];
    Mode::products(first, others, left.upper, left.lower, parts);
#pragma unroll
    for (int e = 0; e < 4; e++)
      sums[e] += fabsf(first[e]) < kInfinity ? first[e] + others[e] : first[e];
  }

  __device__ static __forceinline__ void queries(Piece (&left)[kLeft], const Piece& above,
                                                 const Piece& below) {
    Weights w;
    split(w.upper, above), split(w.lower, below);
#pragma unroll
    for (int p = 0; p < 3; p++)
      left[p] = {{w.upper[p][0], w.upper[p][1], w.lower[p][0], w.lower[p][1]}};
  }
  __device__ static __forceinline__ void score(float (&sums)[4], const Piece (&left)[kLeft],
                                               const Piece& key) {
    Weights w;
#pragma unroll
    for (int p = 0; p < 3; p++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        w.upper[p][i] = left[p].word[i], w.lower[p][i] = left[p].word[2 + i];
    multiply(sums, w, key);
  }
  __device__ static __forceinline__ void weights(Weights& left, const float (&p)[2][4]) {
    float above[4] = {p[0][0], p[0][1], p[1][0], p[1][1]},
          below[4] = {p[0][2], p[0][3], p[1][2], p[1][3]};
    Mode::split<true>(left.upper, above), Mode::split<true>(left.lower, below);
  }
  template <int columns>
  __device__ static __forceinline__ void weigh(float (&sums)[columns][4], int first,
                                               const Weights& left, const Piece (&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      multiply(sums[first + i], left,
               {{values[0].word[i], values[1].word[i], values[2].word[i], values[3].word[i]}});
  }
};

}  // namespace fastnn::cuda
