// Depthwise convolution of 8-bit images: a channel a lane.
#pragma once
#include "conv/int8_kernels.hpp"
#include "quant/requantize.inl"

namespace fastnn::FASTNN_TARGET {

constexpr int kInt8Positions = 4;  // at once, which share the filter
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class T, class Residual>
static void int8_depthwise_typed(const uint8_t* const* x, const int32_t* w, int taps,
                                 int64_t positions, int64_t channels, const Requantize& q,
                                 char* out, int64_t out_step, const char* residual) {
  Requantizer<Residual> to(q);
  auto vector = [&](int64_t c, int n) __attribute__((always_inline)) {
    to.columns(q, c, n);
    auto some = [&](int64_t p, auto count) __attribute__((always_inline)) {
      constexpr int P = decltype(count)::value;
      Ints sum[P];
#pragma GCC unroll 4
      for (int i = 0; i < P; i++) sum[i] = Ints::zero();
      for (int t = 0; t < taps; t++) {
        const Ints filter = Ints::load(w + t * channels + c, n);
#pragma GCC unroll 4
        for (int i = 0; i < P; i++)
          sum[i] = sum[i].plus_product(Ints::widen(x[(p + i) * taps + t] + c, n), filter);
      }
#pragma GCC unroll 4
      for (int i = 0; i < P; i++)
        to.put(reinterpret_cast<T*>(out) + (p + i) * out_step + c, sum[i],
               reinterpret_cast<const Residual*>(residual) + (p + i) * out_step + c, n);
    };
    int64_t p = 0;
    for (; p + kInt8Positions <= positions; p += kInt8Positions) some(p, Count<kInt8Positions>{});
    for (; p < positions; p++) some(p, Count<1>{});
  };
  int64_t c = 0;
  for (; c + Ints::width <= channels; c += Ints::width) vector(c, Ints::width);  // without masks
  if (c < channels) vector(c, int(channels - c));
}

static void int8_depthwise(const uint8_t* const* x, const int32_t* w, int taps, int64_t positions,
                           int64_t channels, const Requantize& q, DType type, char* out,
                           int64_t out_step, const char* residual) {
  auto typed = [&](auto element) {
    using T = decltype(element);
    const auto run = !residual                      ? int8_depthwise_typed<T, NoResidual>
                     : q.residual_type == DType::s8 ? int8_depthwise_typed<T, int8_t>
                                                    : int8_depthwise_typed<T, uint8_t>;
    run(x, w, taps, positions, channels, q, out, out_step, residual);
  };
  if (type == DType::f32)
    typed(float());
  else if (type == DType::bf16)
    typed(bf16());
  else
    typed(uint8_t());
}

}  // namespace fastnn::FASTNN_TARGET
