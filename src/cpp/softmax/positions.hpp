// Arrays of which one dimension is gone along and all others are positions, each with a result of
// its own: what softmax and cross entropy go over.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/caches.hpp"
#include "softmax/softmax.hpp"

namespace fastnn {

struct Positions {
  static constexpr int kMost = 4;  // operands
  int operands;
  int64_t item[kMost];  // bytes
  char* data[kMost];
  int64_t n, step[kMost];  // along the dimension
  int outer = 0;
  int64_t size[kMaxSoftmaxDims], stride[kMost][kMaxSoftmaxDims];
  int64_t inner = 1, inner_stride[kMost] = {};
  int64_t count = 1;
  // Whether the kernels go along neighbouring positions, or along the dimension's elements. What
  // lies otherwise in an operand goes through a copy, a few positions at a time.
  bool columns;
  bool direct[kMost];
  bool copies = false;
  int64_t together;  // positions of one call of a kernel

  // Positions that are copied together: a cache line of the smallest type.
  static constexpr int64_t kCopied = 32;

  // Operand `by`'s strides decide the order of the positions, those of `layout` which way the
  // kernels go. `number` is an operand that has one number a position, if there is one.
  Positions(const SoftmaxCall& call, const SoftmaxOperand* given, const int64_t* items, int used,
            int by, int layout, int number = -1)
      : operands(used), n(call.shape[call.dim]) {
    int order[kMaxSoftmaxDims], kept_dims = 0;
    for (int d = 0; d < call.dims; d++) {
      if (d == call.dim) continue;
      count *= call.shape[d];
      if (call.shape[d] != 1) order[kept_dims++] = d;
    }
    for (int o = 0; o < used; o++) {
      item[o] = items[o];
      data[o] = static_cast<char*>(given[o].data);
      step[o] = given[o].strides[call.dim];
    }
    const int64_t* strides = given[by].strides;
    std::stable_sort(order, order + kept_dims,
                     [&](int a, int b) { return strides[a] > strides[b]; });
    int kept = 0;
    for (int i = 0; i < kept_dims; i++) {
      const int d = order[i];
      bool merged = kept > 0;
      for (int o = 0; o < used; o++)
        merged = merged && stride[o][kept - 1] == given[o].strides[d] * call.shape[d];
      if (!merged) size[kept++] = 1;
      size[kept - 1] *= call.shape[d];
      for (int o = 0; o < used; o++) stride[o][kept - 1] = given[o].strides[d];
    }
    if (kept > 0) {
      inner = size[--kept];
      for (int o = 0; o < used; o++) inner_stride[o] = stride[o][kept];
    }
    outer = kept;
    columns = n > 1 && step[layout] != 1 && inner > 1 && inner_stride[layout] == 1;
    int64_t bytes = 0;  // of a position
    for (int o = 0; o < used; o++) {
      direct[o] = o == number || (columns ? inner_stride[o] == 1 : n == 1 || step[o] == 1);
      copies = copies || !direct[o];
      bytes += n * item[o];
    }
    // What is gone over several times stays in a core's own cache.
    constexpr int64_t pitch = SoftmaxKernels::kPitch;
    const int64_t in_cache = core_cache_bytes() / 2 / bytes;
    together =
        columns ? std::clamp<int64_t>(in_cache / pitch * pitch, pitch, SoftmaxKernels::kMostColumns)
                : inner;
    if (copies) together = std::min(together, std::clamp<int64_t>(in_cache, 1, kCopied));
  }

  // Of the copies of one block.
  int64_t copies_bytes() const {
    int64_t bytes = 0;
    for (int o = 0; o < operands; o++)
      if (!direct[o]) bytes += together * n * item[o];
    return (bytes + 63) / 64 * 64;
  }
  // Threads share the positions out at multiples of it.
  int64_t grain() const {
    return columns ? std::min<int64_t>(SoftmaxKernels::kPitch, together) : 1;
  }

  // One block, as the kernels see it: operand o's position p, element i at
  // data[o] + (p * position[o] + i * step[o]) * item[o].
  struct Block {
    char* data[kMost];
    int64_t step[kMost], position[kMost];
    int64_t count;
  };

  // f(block) for the positions [begin, end), `inputs` of the operands being read and the others,
  // of those that are copied, written.
  template <class F>
  void for_each_block(int64_t begin, int64_t end, int inputs, char* memory, F f) const {
    while (begin < end) {
      int64_t index = begin / inner;
      const int64_t within = begin - index * inner;
      char* at[kMost];
      for (int o = 0; o < operands; o++) at[o] = data[o] + within * inner_stride[o] * item[o];
      for (int d = outer - 1; d >= 0; d--) {
        for (int o = 0; o < operands; o++) at[o] += index % size[d] * stride[o][d] * item[o];
        index /= size[d];
      }
      Block block;
      block.count = std::min({inner - within, end - begin, together});
      char* free = memory;
      for (int o = 0; o < operands; o++) {
        block.data[o] = at[o], block.step[o] = step[o], block.position[o] = inner_stride[o];
        if (direct[o]) continue;
        block.data[o] = free;
        free += together * n * item[o];
        block.step[o] = columns ? block.count : 1, block.position[o] = columns ? 1 : n;
        if (o < inputs)
          copy(item[o], at[o], step[o], inner_stride[o], block.data[o], block.step[o],
               block.position[o], block.count);
      }
      f(block);
      for (int o = inputs; o < operands; o++)
        if (!direct[o])
          copy(item[o], block.data[o], block.step[o], block.position[o], at[o], step[o],
               inner_stride[o], block.count);
      begin += block.count;
    }
  }

 private:
  template <class T>
  static void copy_as(const char* from, int64_t from_i, int64_t from_j, char* to, int64_t to_i,
                      int64_t to_j, int64_t ni, int64_t nj) {
    const T* f = reinterpret_cast<const T*>(from);
    T* t = reinterpret_cast<T*>(to);
    for (int64_t i = 0; i < ni; i++)
      for (int64_t j = 0; j < nj; j++) t[i * to_i + j * to_j] = f[i * from_i + j * from_j];
  }
  void copy(int64_t bytes, const char* from, int64_t from_step, int64_t from_position, char* to,
            int64_t to_step, int64_t to_position, int64_t positions) const {
    (bytes == 8   ? copy_as<int64_t>
     : bytes == 4 ? copy_as<int32_t>
                  : copy_as<int16_t>)(from, from_step, from_position, to, to_step, to_position, n,
                                      positions);
  }
};

}  // namespace fastnn
