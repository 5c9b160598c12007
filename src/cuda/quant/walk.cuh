// Who has which elements of what is quantized (quant/loop.hpp): 16 bytes of x a thread where all
// lies so, and else one by one.
#pragma once
#include "cuda/divisor.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/reduce/rows.cuh"
#include "quant/loop.hpp"

namespace fastnn::cuda {

// Elements from the first of x and q, and of the scale.
struct Offsets {
  int64_t x, q, s;
};

__device__ inline Offsets offsets_of(const Loop& loop, int64_t element) {
  const int last = loop.dims - 1;
  int64_t rest = element / loop.size[last];
  const int64_t within = element - rest * loop.size[last];
  Offsets at{within * loop.x[last], within * loop.q[last],
             within / loop.group % loop.period * loop.stride};
  for (int d = last - 1; d >= 0; d--) {
    const int64_t index = d ? rest % loop.size[d] : rest;
    if (d) rest /= loop.size[d];
    at.x += index * loop.x[d], at.q += index * loop.q[d], at.s += index * loop.s[d];
  }
  return at;
}

// A loop whose elements lie in pieces of 16 bytes of x, with one scale a piece, or (`each`) as many
// as elements, one behind the other.
constexpr int kMostOuter = 3;
struct Pieces {
  uint32_t count = 0;
  int outer = 0;
  bool each = false, flat = false;                 // flat: one run, of one scale
  Divisor inner, group, period, size[kMostOuter];  // in pieces
  int64_t stride = 0, x[kMostOuter] = {}, q[kMostOuter] = {}, s[kMostOuter] = {};

  // `n` elements are the piece.
  template <int n>
  __device__ __forceinline__ Offsets at(uint32_t piece) const {
    if (flat) return {int64_t(piece) * n, int64_t(piece) * n, 0};
    uint32_t rest = piece;
    const uint32_t within = inner.split(rest);
    Offsets at{int64_t(within) * n, int64_t(within) * n, 0};
    if (each) {
      uint32_t index = within;
      at.s = int64_t(period.split(index)) * n;
    } else {
      uint32_t index = group.divide(within);
      at.s = int64_t(period.split(index)) * stride;
    }
#pragma unroll
    for (int d = kMostOuter - 1; d >= 0; d--) {
      if (d >= outer) continue;
      const int64_t index = size[d].split(rest);
      at.x += index * x[d], at.q += index * q[d], at.s += index * s[d];
    }
    return at;
  }
};

// How a piece of x, or of q, is accessed: its address has to be a multiple of so many bytes.
struct Access {
  const void* data;
  int64_t bytes;
  bool fits() const { return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0; }
};

// False where elements do not lie in pieces of n. Scales and zero points, which may be null, are
// read 16 bytes at a time.
inline bool in_pieces(const Loop& loop, int64_t n, Access x, Access q, const void* scale,
                      const void* zero_point, Pieces& pieces) {
  const int last = loop.dims - 1;
  if (last > kMostOuter || loop.x[last] != 1 || loop.q[last] != 1 || loop.size[last] % n ||
      loop.elements / n >= int64_t{1} << 31 || !x.fits() || !q.fits())
    return false;
  pieces.each = loop.group == 1 && loop.stride == 1 && loop.period % n == 0;
  if (!pieces.each && loop.group % n) return false;
  if (pieces.each && (!Access{scale, 16}.fits() || !Access{zero_point, 16}.fits())) return false;
  pieces.count = uint32_t(loop.elements / n), pieces.outer = last;
  pieces.flat = last == 0 && loop.group == loop.elements;
  pieces.inner = Divisor(loop.size[last] / n);
  pieces.group = Divisor(pieces.each ? 1 : loop.group / n);
  pieces.period = Divisor(pieces.each ? loop.period / n : loop.period);
  pieces.stride = loop.stride;
  for (int d = 0; d < last; d++) {
    if (loop.x[d] % n || loop.q[d] % n || (pieces.each && loop.s[d] % n)) return false;
    pieces.size[d] = Divisor(loop.size[d]);
    pieces.x[d] = loop.x[d], pieces.q[d] = loop.q[d], pieces.s[d] = loop.s[d];
  }
  return true;
}

// n neighbours, a multiple of 4, of 4 bytes each, from an address on that is a multiple of 16.
template <int n, class T>
__device__ __forceinline__ void load_neighbours(T (&to)[n], const T* from) {
#pragma unroll
  for (int e = 0; e < n; e += 4) {
    const int4 four = *reinterpret_cast<const int4*>(from + e);
    memcpy(to + e, &four, sizeof four);
  }
}

// ---- one element, of a type that is known at run time ------------------------------------------

__device__ inline float read_number(DType type, const void* x, int64_t at) {
  return type == DType::f64 ? to_float(static_cast<const double*>(x)[at]) : read(type, x, at);
}
__device__ inline void write_number(DType type, void* x, int64_t at, float value) {
  if (type == DType::f64)
    static_cast<double*>(x)[at] = value;
  else
    write(type, x, at, value);
}

}  // namespace fastnn::cuda
