// GEMM with AVX2: 2 vectors by as many rows as the registers hold.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "gemm/peak.inl"

namespace fastnn {
namespace avx2 {

static constexpr Kernel e4m3 =
    float_kernel<VecF32, f8_e4m3, 6, 2>("avx2 e4m3 6x16", "avx2 e4m3 dot", kE4M3);
static constexpr Kernel e5m2 =
    float_kernel<VecF32, f8_e5m2, 6, 2>("avx2 e5m2 6x16", "avx2 e5m2 dot", kE5M2);
static const Kernel kernels[] = {
    wide_kernel<VecF32, 1, 8>("avx2 f32 1x64", DType::f32),
    wide_kernel<VecF32, 3, 4>("avx2 f32 3x32", DType::f32),
    wide_kernel<VecF64, 1, 8>("avx2 f64 1x32", DType::f64),
    float_kernel<VecF32, float, 6, 2>("avx2 f32 6x16", "avx2 f32 dot", DType::f32),
    float_kernel<VecF64, double, 6, 2>("avx2 f64 6x8", "avx2 f64 dot", DType::f64),
    float_kernel<VecF32, bf16, 6, 2>("avx2 bf16 6x16", "avx2 bf16 dot", DType::bf16),
    float_kernel<VecF32, f16, 6, 2>("avx2 f16 6x16", "avx2 f16 dot", DType::f16),
    e4m3,
    e5m2,
    mixed_kernel("avx2 e4m3 e5m2 6x16", e4m3, e5m2),
    mixed_kernel("avx2 e5m2 e4m3 6x16", e5m2, e4m3),
    pair16_kernel<int8_t, 6, 2>("avx2 s8s8 6x16", DType::s8, 768),
    pair16_kernel<uint8_t, 6, 2>("avx2 u8s8 6x16", DType::u8, 768),
    {},
};

}  // namespace avx2

const Kernel* avx2_kernels() { return avx2::kernels; }

double avx2_peak(const char* kind, int64_t iterations) {
  return avx2::vector_peak(kind, iterations);
}

}  // namespace fastnn
