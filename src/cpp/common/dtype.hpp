// The element types of the kernels. The numbers are shared with python/fastnn/backends/cpu/.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastnn {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, s8 = 4, u8 = 5, s32 = 6 };
constexpr int kDTypes = 7;

// Storage types only: arithmetic happens in float32 after a conversion.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr size_t dtype_size(DType t) {
  switch (t) {
    case DType::f64:
      return 8;
    case DType::f32:
    case DType::s32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    default:
      return 1;
  }
}

constexpr const char* dtype_name(DType t) {
  switch (t) {
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::s8:
      return "int8";
    case DType::u8:
      return "uint8";
    default:
      return "int32";
  }
}

}  // namespace fastnn
