// What convolution needs of one instruction set besides a matrix product: moving elements between
// an image and the panels that the product multiplies.
#pragma once
#include <cstdint>

namespace fastnn {

// dst[r * dst_row + i] = lo <= i < hi ? src[r * src_row + i * stride] : 0, for r < rows, i < n.
// Nothing outside of [lo, hi) is read. Strides in elements.
using CopyRowsFn = void (*)(void* dst, int64_t dst_row, const void* src, int64_t src_row,
                            int64_t rows, int64_t stride, int64_t lo, int64_t hi, int64_t n);
// One lane of a transposition: its elements [lo, hi) are at src[i * stride], the others zero.
struct Lane {
  const char* src;
  int32_t lo, hi;
};
// dst[i * ld + l] = element i of lane l, for i < n, l < lanes.
using TransposeFn = void (*)(void* dst, int64_t ld, const Lane* lanes, int count, int64_t stride,
                             int64_t n);

struct ConvKernels {
  CopyRowsFn copy_rows[3];  // of elements of 2, 4 and 8 bytes
  TransposeFn transpose[3];
};
constexpr int size_index(int64_t bytes) { return bytes == 2 ? 0 : bytes == 4 ? 1 : 2; }

const ConvKernels& portable_conv();
const ConvKernels& avx2_conv();
const ConvKernels& avx512_conv();
const ConvKernels& conv_kernels();  // of the active instruction set

}  // namespace fastnn
