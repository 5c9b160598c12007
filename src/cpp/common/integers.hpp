// Divisions that round to one side.
#pragma once
#include <cstdint>

namespace fastnn {

// Of numbers that are not negative.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Of any number by a positive one.
constexpr int64_t ceil_div_signed(int64_t a, int64_t b) {
  return a >= 0 ? (a + b - 1) / b : -(-a / b);
}
constexpr int64_t floor_div(int64_t a, int64_t b) { return -ceil_div_signed(-a, b); }

}  // namespace fastnn
