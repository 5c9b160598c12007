// A tile of a 3 x 3 depthwise correlation over one instruction set's vectors. Included by
// kernels.inl.
#pragma once
#include "common/activation.hpp"
#include "conv/depthwise.inl"
#include "isa/math.hpp"

namespace fastnn::FASTNN_TARGET {

// As many positions as leave registers for the filter: 7 divide the widths of most networks' maps.
constexpr int kWindowRows = FASTNN_TARGET_ID == 2 ? 2 : 1,
              kWindowPositions = FASTNN_TARGET_ID == 2 ? 7 : 4;

// R x P positions, S apart in the input. The last vector of channels overlaps the one before it.
template <class T, int S, int R, int P>
static void window_tile(const T* const* x, const T* const* w, const T* start, T* out,
                        int64_t out_row, int64_t out_step, int positions, int64_t channels,
                        int64_t ahead, int activation) {
  using V = typename In<T>::V;
  constexpr int COLUMNS = (P - 1) * S + 3;
  for (int64_t c = 0; c < channels; c += V::width) {
    if (channels - c < V::width) c = channels - V::width;
    // What the next tile sees and none before it did: too many streams for the hardware.
    if (ahead)
#pragma GCC unroll 8
      for (int i = 3 - S; i < (R - 1) * S + 3; i++)
#pragma GCC unroll 16
        for (int k = COLUMNS - P * S; k < COLUMNS; k++)
          __builtin_prefetch(x[i * COLUMNS + k] + c + ahead);
    V wv[9], sum[R][P];
#pragma GCC unroll 9
    for (int t = 0; t < 9; t++) wv[t] = once(V::load(w[t] + c));
    const V from = start ? V::load(start + c) : V::zero();
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) sum[r][p] = from;
#pragma GCC unroll 8
    for (int i = 0; i < (R - 1) * S + 3; i++)
#pragma GCC unroll 16
      for (int k = 0; k < COLUMNS; k++) {
        const V v = once(V::load(x[i * COLUMNS + k] + c));
#pragma GCC unroll 2
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
          for (int p = 0; p < P; p++) {
            const int a = i - r * S, b = k - p * S;
            if (a >= 0 && a < 3 && b >= 0 && b < 3) sum[r][p] = fma(wv[a * 3 + b], v, sum[r][p]);
          }
      }
    if (activation == kRelu || activation == kRelu6) {
      const V low = V::zero(), high = V::set1(activation == kRelu6 ? 6 : __builtin_inff());
#pragma GCC unroll 2
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++)
          sum[r][p] = min(high, max(low, sum[r][p]));  // a NaN is the second operand, and passes
    } else if (activation) {
      V all[R * P];
#pragma GCC unroll 2
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) all[r * P + p] = sum[r][p];
#pragma GCC unroll 1
      for (int e = 0; e < R * P; e++) all[e] = activate(activation, all[e]);
#pragma GCC unroll 2
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) sum[r][p] = all[r * P + p];
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
      if (p < positions)
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) sum[r][p].store(out + r * out_row + p * out_step + c);
  }
}

template <class T>
static void depthwise_window(int step, const void* const* x_, const void* const* w_,
                             const void* start_, void* out_, int64_t out_row, int64_t out_step,
                             int rows, int positions, int64_t channels, int64_t ahead,
                             int activation) {
  const auto* x = reinterpret_cast<const T* const*>(x_);
  const auto* w = reinterpret_cast<const T* const*>(w_);
  const T* start = static_cast<const T*>(start_);
  T* out = static_cast<T*>(out_);
  constexpr int R = kWindowRows, P = kWindowPositions;
  auto tile = rows == R ? (step == 1 ? window_tile<T, 1, R, P> : window_tile<T, 2, R, P>)
                        : (step == 1 ? window_tile<T, 1, 1, P> : window_tile<T, 2, 1, P>);
  tile(x, w, start, out, out_row, out_step, positions, channels, ahead, activation);
}

}  // namespace fastnn::FASTNN_TARGET
