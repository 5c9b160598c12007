// The weight's gradient of a depthwise convolution over one instruction set's vectors. Included by
// kernels.inl.
#pragma once
#include "conv/depthwise.inl"
#include "conv/kernels.hpp"
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

// Rows of TAPS sums that leave registers for the positions of y they meet and one of x.
constexpr int kRegisters = FASTNN_TARGET_ID == 2 ? 32 : 16, kMostRows = 8;
constexpr int weight_rows(int taps) {
  const int rows = (kRegisters - 1 - taps) / taps;
  return taps == 1 ? kMostRows : rows < taps ? rows : taps;
}

// The sums of B rows of TAPS stay in registers, and so do the J vectors of y that the S next
// positions of x meet: each vector of x is loaded once for all taps of its row.
template <class T, int TAPS, int S, int B, bool WHOLE>
static void weight_runs(const TapRuns& r) {
  using V = typename In<T>::V;
  using Acc = typename In<T>::Acc;
  constexpr int J = (TAPS + S - 1) / S;
  Acc* sums = static_cast<Acc*>(r.sums);
  const int lanes = WHOLE ? V::width : r.lanes;
  auto load = [&](const T* p) __attribute__((always_inline)) {
    return WHOLE ? V::load(p) : V::load_partial(p, lanes);
  };
  V sum[B][TAPS];
#pragma GCC unroll 8
  for (int b = 0; b < B; b++)
#pragma GCC unroll 8
    for (int a = 0; a < TAPS; a++) sum[b][a] = V::load(sums + b * r.sums_row + a * V::width);
  int64_t offset[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; b++) offset[b] = r.offset[b];

  // Step q: positions q * S + first + [0, S) of x and q - [0, J) of y. From q0 to q1 there are all
  // of them; before, some of y may be missing that come first, after it some that come last.
  int64_t begin = -r.first / S, end = (r.in - r.first + S - 1) / S;
  if (begin < 0) begin = 0;
  end = smaller(end, r.out + J - 1);
  int64_t q0 = r.first < 0 ? (S - 1 - r.first) / S : 0;
  q0 = smaller(q0 < J - 1 ? J - 1 : q0, r.out);
  int64_t q1 = r.in - S - r.first;
  q1 = q1 < 0 ? 0 : smaller(r.out, q1 / S + 1);
  if (q1 < q0) q1 = q0;
  const int asks = r.asks;
  for (int64_t row = 0; row < r.rows; row++) {
    const T* x = static_cast<const T*>(r.x) + row * r.x_row;
    const T* y = static_cast<const T*>(r.y) + row * r.y_row;
    const char* x_ahead = r.x_ahead + row * S * r.x_ahead_row;
    const char* y_ahead = r.y_ahead + row * r.y_row * int64_t(sizeof(T));
    auto ask = [&]() __attribute__((always_inline)) {
      if (!asks) return;
#pragma GCC unroll 2
      for (int s = 0; s < S; s++, x_ahead += r.x_line) {
        if (asks & 1) __builtin_prefetch(x_ahead, 0, 2);
        if (S == 2 && (asks & 4)) __builtin_prefetch(x_ahead + r.x_ahead_row, 0, 2);
      }
      if (asks & 2) __builtin_prefetch(y_ahead, 0, 2);
      y_ahead += r.y_line;
    };
    auto edge = [&](int64_t from, int64_t to, bool leading) __attribute__((always_inline)) {
      for (int64_t q = from; q < to; q++) {
        ask();
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) {
          const int64_t p = q * S + s + r.first;
          if (p < 0 || p >= r.in) continue;
          V xv[B];
#pragma GCC unroll 8
          for (int b = 0; b < B; b++) xv[b] = once(load(x + p * r.x_step + offset[b]));
#pragma GCC unroll 8
          for (int j = 0; j < J; j++) {
            const int a = s + j * S;
            if (a < TAPS && (leading ? q >= j : q - j < r.out)) {
              const V yv = once(load(y + (q - j) * r.y_step));
#pragma GCC unroll 8
              for (int b = 0; b < B; b++) sum[b][a] = fma(yv, xv[b], sum[b][a]);
            }
          }
        }
      }
    };
    edge(begin, q0, true);
    if (q0 < q1) {
      V with[J];
#pragma GCC unroll 8
      for (int j = 1; j < J; j++) with[j - 1] = load(y + (q0 - j) * r.y_step);
      const T *yq = y + q0 * r.y_step, *xq = x + (q0 * S + r.first) * r.x_step;
      for (int64_t q = q0; q < q1; q++, yq += r.y_step, xq += S * r.x_step) {
#pragma GCC unroll 8
        for (int j = J - 1; j > 0; j--) with[j] = with[j - 1];
        ask();
        with[0] = once(load(yq));
#pragma GCC unroll 2
        for (int s = 0; s < S; s++)
#pragma GCC unroll 8
          for (int b = 0; b < B; b++) {
            const V v = once(load(xq + s * r.x_step + offset[b]));
#pragma GCC unroll 8
            for (int j = 0; j < J; j++)
              if (s + j * S < TAPS) sum[b][s + j * S] = fma(with[j], v, sum[b][s + j * S]);
          }
      }
    }
    edge(q1, end, false);
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; b++)
#pragma GCC unroll 8
    for (int a = 0; a < TAPS; a++) sum[b][a].store(sums + b * r.sums_row + a * V::width);
}

template <class T, int TAPS, int S, int B>
static void weight_rows_of(const TapRuns& r) {
  if constexpr (B >= 1) {
    if (r.count < B) return weight_rows_of<T, TAPS, S, B - 1>(r);
    // Where masks cost nothing, one form is enough.
    if (FASTNN_TARGET_ID != 2 && r.lanes == In<T>::V::width) {
      weight_runs<T, TAPS, S, B, FASTNN_TARGET_ID != 2>(r);
    } else if constexpr (FASTNN_TARGET_ID > 0) {
      weight_runs<T, TAPS, S, B, false>(r);
    } else {  // row by row: a form for each number of them would be much code
      TapRuns one = r;
      for (int b = 0; b < B; b++, one.offset++, one.asks = 0) {
        weight_runs<T, TAPS, S, 1, false>(one);
        one.sums = static_cast<typename In<T>::Acc*>(one.sums) + r.sums_row;
      }
    }
  }
}

template <class T, int TAPS>
static void weight_taps(int step, const TapRuns& r) {
  if (step == 1 || TAPS == 1)
    weight_rows_of<T, TAPS, 1, weight_rows(TAPS)>(r);
  else
    weight_rows_of<T, TAPS, 2, weight_rows(TAPS)>(r);
}

template <class T>
static void depthwise_weight(int taps, int step, const TapRuns& r) {
  taps == 7   ? weight_taps<T, 7>(step, r)
  : taps == 5 ? weight_taps<T, 5>(step, r)
  : taps == 3 ? weight_taps<T, 3>(step, r)
              : weight_taps<T, 1>(step, r);
}

FASTNN_INLINE void add_wide(double* totals, const float* sums) {
  const VecF32 v = VecF32::load(sums);
  (VecF64::load(totals) + widen_low(v)).store(totals);
  (VecF64::load(totals + VecF64::width) + widen_high(v)).store(totals + VecF64::width);
}
FASTNN_INLINE void add_wide(double* totals, const double* sums) {
  (VecF64::load(totals) + VecF64::load(sums)).store(totals);
}
FASTNN_INLINE double add_lanes(const float* sums) {
  const VecF32 v = VecF32::load(sums);
  return reduce_add(widen_low(v) + widen_high(v));
}
FASTNN_INLINE double add_lanes(const double* sums) { return reduce_add(VecF64::load(sums)); }

template <class T>
static void depthwise_totals(double* totals, void* sums_, int64_t vectors, bool fold) {
  using V = typename In<T>::V;
  auto* sums = static_cast<typename In<T>::Acc*>(sums_);
  for (int64_t i = 0; i < vectors; i++, sums += V::width) {
    if (fold)
      totals[i] += add_lanes(sums);
    else
      add_wide(totals + i * V::width, sums);
    V::zero().store(sums);
  }
}

template <class T>
static void depthwise_finish(const double* totals, int64_t slots, int64_t slot, int64_t lanes,
                             int taps, const int64_t* offset, void* w_, int64_t channel,
                             int64_t begin, int64_t end) {
  T* w = static_cast<T*>(w_);
  for (int64_t l = begin; l < end; l++)
    for (int t = 0; t < taps; t++) {
      double total = 0;
      for (int64_t s = 0; s < slots; s++) total += totals[s * slot + t * lanes + l];
      from_any(w[l * channel + offset[t]], typename In<T>::Acc(total));
    }
}

}  // namespace fastnn::FASTNN_TARGET
