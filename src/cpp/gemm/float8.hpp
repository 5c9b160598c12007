// Floats of eight bits as operands of a product: torch's float8_e4m3fn and float8_e5m2. Nothing
// else is computed of them, so that their numbers come after those of common/dtype.hpp, which
// everything takes.
#pragma once
#include "common/dtype.hpp"

namespace fastnn {

constexpr DType kE4M3 = DType(kDTypes), kE5M2 = DType(kDTypes + 1);
constexpr bool is_float8(DType t) { return t == kE4M3 || t == kE5M2; }
constexpr const char* operand_name(DType t) {
  return t == kE4M3 ? "float8_e4m3fn" : t == kE5M2 ? "float8_e5m2" : dtype_name(t);
}

// As they lie in memory.
struct f8_e4m3 {
  uint8_t bits;
};
struct f8_e5m2 {
  uint8_t bits;
};

}  // namespace fastnn
