// Rows in the registers of a group of threads: who holds which element, how they are read and
// written 16 bytes at a time, and what the group adds up.
#pragma once
#include "cuda/device.cuh"
#include "cuda/reduce/rows.hpp"

namespace fastnn::cuda {

// The elements of 16 bytes.
template <class T>
struct alignas(16) Pack {
  static constexpr int kEach = 16 / sizeof(T);
  T element[kEach];
};

// Where the operands' row begins, in elements.
__device__ inline void place(const Rows& rows, int64_t row, int64_t (&at)[kRowOperands]) {
#pragma unroll
  for (int o = 0; o < kRowOperands; o++) at[o] = 0;
  for (int d = rows.dims - 1; d >= 0; d--) {
    const int64_t i = d ? row % rows.size[d] : row;
    if (d) row /= rows.size[d];
#pragma unroll
    for (int o = 0; o < kRowOperands; o++) at[o] += i * rows.stride[o][d];
  }
}

// A row of up to threads * mine elements in a group of threads. Rows of whole packs are dealt out
// by packs, others element by element: by the row's length alone, because who holds what decides
// the order of sums. What lies in packs is read and written in packs.
template <class T, int threads_, int mine_>
struct HeldRow {
  static constexpr int threads = threads_, mine = mine_, kEach = Pack<T>::kEach;
  static_assert(mine % kEach == 0);
  int n, thread;
  int count;  // of the row's elements that are this thread's; they come first

  __device__ HeldRow(int n, int thread) : n(n), thread(thread) {
    const int step = in_packs() ? threads * kEach : threads, each = in_packs() ? kEach : 1;
    const int rest = n - thread * each;
    count = rest > 0 ? (rest + step - 1) / step * each : 0;
  }

  __device__ bool in_packs() const { return n % kEach == 0; }
  // The element that is this thread's j-th, if j < count.
  __device__ int index(int j) const {
    return in_packs() ? (j / kEach * threads + thread) * kEach + j % kEach : j * threads + thread;
  }
  __device__ static bool aligned(const T* data, int64_t step) {
    return step == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  // `rest` where the row has no more elements.
  __device__ __forceinline__ void load(float (&to)[mine], const T* data, int64_t step,
                                       float rest) const {
    if (in_packs() && aligned(data, step)) {
#pragma unroll
      for (int p = 0; p < mine / kEach; p++) {
        const bool there = p * kEach < count;
        Pack<T> pack;
        if (there) pack = *reinterpret_cast<const Pack<T>*>(data + index(p * kEach));
#pragma unroll
        for (int e = 0; e < kEach; e++)
          to[p * kEach + e] = there ? to_float(pack.element[e]) : rest;
      }
    } else {
      one_by_one(data, step, [&](int j, const T* from) { to[j] = from ? to_float(*from) : rest; });
    }
  }
  // of(j) for each of this thread's elements.
  template <class Of>
  __device__ __forceinline__ void store(T* data, int64_t step, Of of) const {
    if (in_packs() && aligned(data, step)) {
#pragma unroll
      for (int p = 0; p < mine / kEach; p++) {
        if (p * kEach >= count) continue;
        Pack<T> pack;
#pragma unroll
        for (int e = 0; e < kEach; e++) pack.element[e] = from_float<T>(of(p * kEach + e));
        *reinterpret_cast<Pack<T>*>(data + index(p * kEach)) = pack;
      }
    } else {
      one_by_one(data, step, [&](int j, T* to) {
        if (to) *to = from_float<T>(of(j));
      });
    }
  }

 private:
  // f(j, address) for each of this thread's elements, null behind the row's end. The address
  // steps on: a product for each would take two registers more an element.
  template <class U, class F>
  __device__ __forceinline__ void one_by_one(U* data, int64_t step, F f) const {
    const int within = in_packs() ? 1 : threads,
              across = in_packs() ? threads * kEach - kEach + 1 : threads;
    const int64_t within_step = within * step, across_step = across * step;
    U* at = data + index(0) * step;
#pragma unroll
    for (int j = 0; j < mine; j++) {
      f(j, j < count ? at : nullptr);
      const bool pack_ends = (j + 1) % kEach == 0;
      at += pack_ends ? across_step : within_step;
    }
  }
};

// Longer rows are a block's, in pieces. f(i, count) for those of this thread; neighbouring threads
// have neighbouring pieces.
constexpr int kLongThreads = 512;
template <class T, int threads = kLongThreads, class F>
__device__ __forceinline__ void for_each_piece(int64_t n, F f) {
  constexpr int each = Pack<T>::kEach;
  const bool packs = n % each == 0;
  const int64_t size = packs ? each : 1;
  for (int64_t i = int64_t(threadIdx.x) % threads * size; i < n; i += threads * size)
    f(i, packs ? each : 1);
}
template <class T>
__device__ __forceinline__ void read_piece(float (&to)[Pack<T>::kEach], const T* data, int64_t step,
                                           int64_t i, int count) {
  const T* from = data + i * step;
  if (count > 1 && step == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
    for (int e = 0; e < Pack<T>::kEach; e++) to[e] = to_float(pack.element[e]);
    return;
  }
#pragma unroll
  for (int e = 0; e < Pack<T>::kEach; e++)
    if (e < count) to[e] = to_float(from[e * step]);
}
template <class T>
__device__ __forceinline__ void write_piece(const float (&x)[Pack<T>::kEach], T* data, int64_t step,
                                            int64_t i, int count) {
  T* to = data + i * step;
  if (count > 1 && step == 1 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < Pack<T>::kEach; e++) pack.element[e] = from_float<T>(x[e]);
    *reinterpret_cast<Pack<T>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int e = 0; e < Pack<T>::kEach; e++)
    if (e < count) to[e * step] = from_float<T>(x[e]);
}

struct Add {
  __device__ static float of(float a, float b) { return a + b; }
};
// NaN does not count.
struct Largest {
  __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

// What a group of threads, a part of a warp or a block, has in common. Every thread of the block
// takes part, and all of a group get the same bits.
template <int threads>
struct Group {
  static_assert(threads <= 32 || threads % 32 == 0);
  static constexpr int kWarps = threads <= 32 ? 1 : threads / 32;
  static_assert((kWarps & (kWarps - 1)) == 0 && kWarps <= 32);
  // Two sets of memory, used in turns, so that a barrier a sum is enough.
  using Memory = float[2][2][kWarps];
  Memory& memory;
  int turn = 0;

  template <class Op>
  __device__ static float over_lanes(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
  }
  template <class OpA, class OpB>
  __device__ void reduce(float& a, float& b) {
    constexpr int lanes = threads < 32 ? threads : 32;
    a = over_lanes<OpA>(a, lanes), b = over_lanes<OpB>(b, lanes);
    if constexpr (kWarps > 1) {
      const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
      if (lane == 0) memory[turn][0][warp] = a, memory[turn][1][warp] = b;
      __syncthreads();
      a = over_lanes<OpA>(memory[turn][0][lane % kWarps], kWarps);
      b = over_lanes<OpB>(memory[turn][1][lane % kWarps], kWarps);
      turn ^= 1;
    }
  }
  template <class Op>
  __device__ float reduce(float x) {
    constexpr int lanes = threads < 32 ? threads : 32;
    x = over_lanes<Op>(x, lanes);
    if constexpr (kWarps > 1) {
      const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
      if (lane == 0) memory[turn][0][warp] = x;
      __syncthreads();
      x = over_lanes<Op>(memory[turn][0][lane % kWarps], kWarps);
      turn ^= 1;
    }
    return x;
  }
};

}  // namespace fastnn::cuda
