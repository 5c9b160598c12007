// y = activation(scale_x[m] scale_w[n] (sum_k q[m,k] w[n,k] - zero[m] sum_k w[n,k]) + bias[n]):
// rows of x as uint8, each with a scale and a zero point of its own (or one of each for all, given
// beforehand), times int8 with one scale a row of the weight. Sums are exact in int32, the rest is
// float32 in this order, and y is rounded once: the same bits on every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

// More products of uint8 and int8 might not fit into 32 bits.
constexpr int64_t kInt8MostColumns = 65793;

struct Int8Linear {
  int64_t m = 0, n = 0, k = 0;
  DType type = DType::f32;  // of x and y: f32, bf16 or f16
  const char* x = nullptr;
  int64_t x_row = 0, x_col = 0;  // strides in elements
  const int8_t* w = nullptr;
  int64_t w_row = 0, w_col = 0;
  const char* packed = nullptr;  // w as pack_int8 left it, and how long that is
  int64_t packed_bytes = 0;
  const float* w_scale = nullptr;
  bool one_scale = false;      // of the weight, not n
  const char* bias = nullptr;  // n neighbours, or null
  DType bias_type = DType::f32;
  int activation = 0;
  bool fixed = false;  // the input's scale and zero point are these
  float x_scale = 1;
  int32_t x_zero = 0;
  char* y = nullptr;
  int64_t y_row = 0;
};
// Throws std::invalid_argument, std::bad_alloc.
void int8_linear(const Int8Linear& call);

// A weight as the kernel of the active instruction set reads it, with the sums of its rows.
int64_t packed_int8_bytes(int64_t n, int64_t k);
void pack_int8(const int8_t* w, int64_t n, int64_t k, int64_t w_row, int64_t w_col, char* to);

}  // namespace fastnn
