// The register-only loops of the plain vector units, for peak_flops.
#pragma once
#include "gemm/float_ops.inl"
#include "gemm/pair16_ops.inl"

namespace fastnn::FASTNN_TARGET {

static double vector_peak(const char* kind, int64_t iterations) {
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
      Pair16Ops::Vec y = x;  // unknown to the compiler, or the product leaves the loop
      asm volatile("" : "+x"(y));
      s = Pair16Ops::multiply_add(s, x, y);
      asm volatile("" : "+x"(s));
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

}  // namespace fastnn::FASTNN_TARGET
