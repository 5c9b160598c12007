// GEMM on any CPU: the baseline that the compiler was told to target.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "gemm/float_ops.inl"

namespace fastnn {
namespace portable {

// int8 as int32, one element a word.
struct IntOps {
  typedef int32_t Lanes __attribute__((vector_size(16)));
  using Word = int32_t;
  using Acc = int32_t;
  using Vec = Lanes;
  using Sum = Lanes;
  static constexpr int width = 4, k_word = 1;
  static constexpr bool requantizes = false;
  static FASTNN_INLINE Lanes zero() { return Lanes{}; }
  static FASTNN_INLINE Lanes load(const char* p) {
    Lanes v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static FASTNN_INLINE Lanes load_partial(const char* p, int) { return load(p); }
  static FASTNN_INLINE Lanes broadcast(const char* p) { return *(const int32_t*)p - Lanes{}; }
  static FASTNN_INLINE Lanes multiply_add(Lanes sum, Lanes a, Lanes b) { return sum + a * b; }
  static FASTNN_INLINE Lanes start(const char*) { return Lanes{}; }
  static FASTNN_INLINE Lanes sums(const int32_t* p) { return load((const char*)p); }
  static FASTNN_INLINE Lanes plus(Lanes a, Lanes b) { return a + b; }
  static FASTNN_INLINE void put(int32_t* p, Lanes sum) { __builtin_memcpy(p, &sum, sizeof(sum)); }
  template <class Src>
  static FASTNN_INLINE Word make_word(const Src* e) {
    return e[0];
  }
  static FASTNN_INLINE Word make_zero_word() { return 0; }
  template <class Src>
  static FASTNN_INLINE void across(const Src* src, int64_t, int n, Word* dst, int room) {
    for (int l = 0; l < room; l++) dst[l] = l < n ? src[l] : 0;
  }
  template <class Src>
  static FASTNN_INLINE void along(const Src* src, int64_t lane_stride, int n, Word* dst, int ld,
                                  int room) {
    for (int w = 0; w < width; w++)
      for (int l = 0; l < room; l++) dst[w * ld + l] = l < n ? src[l * lane_stride + w] : 0;
  }
};

// A read where it lies.
struct ByteInPlaceOps : IntOps {
  static FASTNN_INLINE Lanes broadcast(const char* p) { return *(const uint8_t*)p - Lanes{}; }
};

template <class A>
constexpr Kernel int_kernel(const char* name, DType a) {
  constexpr bool in_place = A(-1) > A(0);
  TileFn tile = run_tile<IntOps, 4, 2, false, false>;
  if constexpr (in_place) tile = run_tile_apart<IntOps, ByteInPlaceOps, 4, 2>;
  return {.name = name,
          .a = a,
          .b = DType::s8,
          .acc = DType::s32,
          .mr = 4,
          .nr = 8,
          .kc = 256,
          .a_bytes = 4,
          .b_bytes = 4,
          .pack_a = pack_panel<IntOps, A, 4>,
          .pack_b = pack_panel<IntOps, int8_t, 8>,
          .tile = tile,
          .store = store_s32,
          .direct_a = in_place,
          .finishes = true,
          .runs = in_place};
}

static constexpr Kernel e4m3 =
    float_kernel<VecF32, f8_e4m3, 4, 2>("portable e4m3 4x8", "portable e4m3 dot", kE4M3);
static constexpr Kernel e5m2 =
    float_kernel<VecF32, f8_e5m2, 4, 2>("portable e5m2 4x8", "portable e5m2 dot", kE5M2);
static const Kernel kernels[] = {
    float_kernel<VecF32, float, 4, 2>("portable f32 4x8", "portable f32 dot", DType::f32),
    float_kernel<VecF64, double, 4, 2>("portable f64 4x4", "portable f64 dot", DType::f64),
    float_kernel<VecF32, bf16, 4, 2>("portable bf16 4x8", "portable bf16 dot", DType::bf16),
    float_kernel<VecF32, f16, 4, 2>("portable f16 4x8", "portable f16 dot", DType::f16),
    e4m3,
    e5m2,
    mixed_kernel("portable e4m3 e5m2 4x8", e4m3, e5m2),
    mixed_kernel("portable e5m2 e4m3 4x8", e5m2, e4m3),
    int_kernel<int8_t>("portable s8s8 4x8", DType::s8),
    int_kernel<uint8_t>("portable u8s8 4x8", DType::u8),
    {},
};

}  // namespace portable

const Kernel* portable_kernels() { return portable::kernels; }

double portable_peak(const char* kind, int64_t iterations) {
  using namespace portable;
  if (__builtin_strcmp(kind, "f64") == 0) {
    VecF64 sum[12] = {};
    const VecF64 x = VecF64::set1(0.5);
    chains(sum, iterations, [&](VecF64& s) {
      s = fma(s, x, x);
      asm volatile("" : "+m"(s.r));
    });
    volatile double keep = 0;
    for (auto& s : sum) keep = keep + reduce_add(s);
    return double(iterations) * 12 * VecF64::width * 2;
  }
  // bfloat16 and int8 have no unit of their own here.
  VecF32 sum[12] = {};
  const VecF32 x = VecF32::set1(0.5f);
  chains(sum, iterations, [&](VecF32& s) {
    s = fma(s, x, x);
    asm volatile("" : "+m"(s.r));
  });
  volatile float keep = 0;
  for (auto& s : sum) keep = keep + reduce_add(s);
  return double(iterations) * 12 * VecF32::width * 2;
}

}  // namespace fastnn
