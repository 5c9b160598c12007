// GEMM with AVX512: 2 vectors by as many rows as the registers hold.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "gemm/peak.inl"

namespace fastnn {
namespace avx512 {

static constexpr Kernel e4m3 =
    float_kernel<VecF32, f8_e4m3, 14, 2>("avx512 e4m3 14x32", "avx512 e4m3 dot", kE4M3);
static constexpr Kernel e5m2 =
    float_kernel<VecF32, f8_e5m2, 14, 2>("avx512 e5m2 14x32", "avx512 e5m2 dot", kE5M2);
static const Kernel kernels[] = {
    wide_kernel<VecF32, 3, 8>("avx512 f32 3x128", DType::f32),
    wide_kernel<VecF32, 6, 4>("avx512 f32 6x64", DType::f32),
    wide_kernel<VecF64, 3, 8>("avx512 f64 3x64", DType::f64),
    float_kernel<VecF32, float, 14, 2>("avx512 f32 14x32", "avx512 f32 dot", DType::f32),
    float_kernel<VecF64, double, 14, 2>("avx512 f64 14x16", "avx512 f64 dot", DType::f64),
    float_kernel<VecF32, bf16, 14, 2>("avx512 bf16 14x32", "avx512 bf16 dot", DType::bf16),
    float_kernel<VecF32, f16, 14, 2>("avx512 f16 14x32", "avx512 f16 dot", DType::f16),
    e4m3,
    e5m2,
    mixed_kernel("avx512 e4m3 e5m2 14x32", e4m3, e5m2),
    mixed_kernel("avx512 e5m2 e4m3 14x32", e5m2, e4m3),
    pair16_kernel<int8_t, 14, 2>("avx512 s8s8 14x32", DType::s8, 768),
    pair16_kernel<uint8_t, 14, 2>("avx512 u8s8 14x32", DType::u8, 768),
    {},
};

}  // namespace avx512

const Kernel* avx512_kernels() { return avx512::kernels; }

double avx512_peak(const char* kind, int64_t iterations) {
  return avx512::vector_peak(kind, iterations);
}

}  // namespace fastnn
