// GEMM with AVX512: 2 vectors by as many rows as the registers hold.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "gemm/float_ops.inl"
#include "gemm/pair16_ops.inl"

namespace fastnn {
namespace avx512 {

static const Kernel kernels[] = {
    wide_kernel<VecF32, 3, 8>("avx512 f32 3x128", DType::f32, 128),
    wide_kernel<VecF32, 6, 4>("avx512 f32 6x64", DType::f32, 128),
    wide_kernel<VecF64, 3, 8>("avx512 f64 3x64", DType::f64, 256),
    float_kernel<VecF32, float, 14, 2>("avx512 f32 14x32", "avx512 f32 dot", DType::f32, 128),
    float_kernel<VecF64, double, 14, 2>("avx512 f64 14x16", "avx512 f64 dot", DType::f64, 256),
    float_kernel<VecF32, bf16, 14, 2>("avx512 bf16 14x32", "avx512 bf16 dot", DType::bf16, 128),
    float_kernel<VecF32, f16, 14, 2>("avx512 f16 14x32", "avx512 f16 dot", DType::f16, 128),
    pair16_kernel<int8_t, 14, 2>("avx512 s8s8 14x32", DType::s8, 768),
    pair16_kernel<uint8_t, 14, 2>("avx512 u8s8 14x32", DType::u8, 768),
    {},
};

}  // namespace avx512

const Kernel* avx512_kernels() { return avx512::kernels; }

double avx512_peak(const char* kind, int64_t iterations) {
  using namespace avx512;
  if (__builtin_strcmp(kind, "f64") == 0) {
    VecF64 sum[12] = {};
    const VecF64 x = VecF64::set1(0.5);
    chains(sum, iterations, [&](VecF64& s) {
      s = fma(s, x, x);
      asm volatile("" : "+x"(s.r));
    });
    volatile double keep = 0;
    for (auto& s : sum) keep = keep + reduce_add(s);
    return double(iterations) * 12 * VecF64::width * 2;
  }
  // bfloat16 and int8 are computed on the float32 units and vpmaddwd here.
  const bool pairs = __builtin_strcmp(kind, "int8") == 0;
  if (!pairs && __builtin_strcmp(kind, "f32") != 0 && __builtin_strcmp(kind, "bf16") != 0)
    return -1;
  if (pairs) {
    Pair16Ops::Vec sum[12];
    for (auto& s : sum) s = Pair16Ops::zero();
    const int word = 0x00030005;
    const Pair16Ops::Vec x = Pair16Ops::broadcast((const char*)&word);
    chains(sum, iterations, [&](Pair16Ops::Vec& s) {
      s = Pair16Ops::multiply_add(s, x, x);
      asm volatile("" : "+v"(s));
    });
    int32_t keep[Pair16Ops::width];
    volatile int32_t total = 0;
    for (auto& s : sum) {
      Pair16Ops::store(keep, s);
      total = total + keep[0];
    }
    return double(iterations) * 12 * Pair16Ops::width * 4;
  }
  VecF32 sum[12] = {};
  const VecF32 x = VecF32::set1(0.5f);
  chains(sum, iterations, [&](VecF32& s) {
    s = fma(s, x, x);
    asm volatile("" : "+x"(s.r));
  });
  volatile float keep = 0;
  for (auto& s : sum) keep = keep + reduce_add(s);
  return double(iterations) * 12 * VecF32::width * 2;
}

}  // namespace fastnn
