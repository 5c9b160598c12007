// The tile, dot and store loops over one instruction set's vectors. Included by the files in
// kernels/, after isa/vec.hpp, in namespace fastnn::FASTNN_TARGET (see there for why nothing here
// may be shared between targets).
//
// A kernel is described by its Ops: a word of K (one float, two bfloat16, four int8, ...) of A is
// broadcast, a vector of words of B is loaded, and both are multiplied into a vector of sums.
//
//   Word, Acc, width            a word, an accumulator element, lanes
//   Vec                         a vector of words;  Sum: a vector of accumulators
//   zero(), load(p), load_partial(p, n), broadcast(p), multiply_add(sum, a, b)
//   start(p)                    what the sums begin with; p is what packing left behind the panel
//   sums(p), plus(a, b), put(p, sum)   accumulators in memory
//   fold                        of floats: words of K after which a tile begins another sum
//   across_panel(...)           packs a word of K of a panel of two vectors, where that is quicker
//   requantizes                 of integers: whether its tiles take a Finish that requantizes
#pragma once
#include "gemm/kernel.hpp"
#include "isa/gelu.hpp"
#include "isa/integers.hpp"
#include "isa/math.hpp"
#include "isa/vec.hpp"
#include "quant/requantize.inl"
#if FASTNN_TARGET_ID == 2
#include "isa/transpose_avx512.hpp"
#endif

namespace fastnn::FASTNN_TARGET {

FASTNN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Two neighbouring vectors.
template <class T, class V>
FASTNN_INLINE void put_two(T* p, V a, V b) {
  a.store(p);
  b.store(p + V::width);
}
#ifdef __AVX512BF16__
// The instruction rounds as `to` does, but takes denormals for zero.
FASTNN_INLINE void put_two(bf16* p, VecF32 a, VecF32 b) {
  constexpr int denormal = 0x20;
  if (_mm512_fpclass_ps_mask(a.r, denormal) | _mm512_fpclass_ps_mask(b.r, denormal)) {
    a.store(p);
    b.store(p + 16);
  } else {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.r, a.r));
  }
}
#endif

// ---- tile --------------------------------------------------------------------------------------

// The sums' way to C where C holds elements of type T: residual, bias and bounds added on the
// registers, in the order of `epilogue` below.
template <class T, class V, int ROWS, int NV>
FASTNN_INLINE void finish_tile(V (&sum)[ROWS][NV], const Finish& f, int cols) {
  constexpr int W = V::width;
  const int last = cols - (NV - 1) * W;
  auto load = [&](const char* p, int v) __attribute__((always_inline)) {
    const T* from = reinterpret_cast<const T*>(p) + v * W;
    return v + 1 < NV || last == W ? V::load(from) : V::load_partial(from, last);
  };
  if (f.residual) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) sum[i][v] = load(f.residual + i * f.residual_row, v) + sum[i][v];
  }
  if (f.column_bias) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      const V bias = load(f.column_bias, v);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) sum[i][v] = sum[i][v] + bias;
    }
  } else if (f.row_bias) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      T element;
      __builtin_memcpy(&element, f.row_bias + i * f.row_bias_step, sizeof(T));
      V bias;
      if constexpr (sizeof(T) == 8)
        bias = V::set1(element);
      else
        bias = V::set1(to_f32(element));
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) sum[i][v] = sum[i][v] + bias;
    }
  }
  if (f.bounded) {
    const V low = V::set1(f.low), high = V::set1(f.high);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++)
        sum[i][v] = min(high, max(low, sum[i][v]));  // a NaN is the second operand, and passes
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    T* c = reinterpret_cast<T*>(f.c + i * f.c_row);
    if (NV == 2 && last == W) {
      put_two(c, sum[i][0], sum[i][NV - 1]);
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++)
      v + 1 < NV || last == W ? sum[i][v].store(c + v * W)
                              : sum[i][v].store_partial(c + v * W, last);
  }
}

// Sums of integers on their way to C: as numbers, scaled, with bias and bounds, in the order of
// `epilogue` below.
template <class Sum, int ROWS, int NV>
FASTNN_INLINE void finish_integers(Sum (&sum)[ROWS][NV], const Finish& f, int cols) {
  constexpr int W = VecF32::width;
  const int last = cols - (NV - 1) * W;
  VecF32 y[ROWS][NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; v++) {
    const bool whole = v + 1 < NV || last == W;
    auto load = [&](const auto* p) __attribute__((always_inline)) {
      return whole ? VecF32::load(p + v * W) : VecF32::load_partial(p + v * W, last);
    };
    if (f.row_zero) {
      const int32_t* at = f.column_sum + v * W;
      const VecI32 sums = whole ? VecI32::load(at) : VecI32::load_partial(at, last);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++)
        sum[i][v] = (VecI32{sum[i][v]} - VecI32::set1(f.row_zero[i]) * sums).r;
    }
    const VecF32 scale = load(f.column_scale);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
      y[i][v] = to_float(VecI32{sum[i][v]}) * (VecF32::set1(f.row_scale[i]) * scale);
    if (f.column_bias) {
      const VecF32 bias = f.bias_type == DType::f32    ? load((const float*)f.column_bias)
                          : f.bias_type == DType::bf16 ? load((const bf16*)f.column_bias)
                                                       : load((const f16*)f.column_bias);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) y[i][v] = y[i][v] + bias;
    }
    if (f.bounded) {
      const VecF32 low = VecF32::set1(f.low), high = VecF32::set1(f.high);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) y[i][v] = min(high, max(low, y[i][v]));
    }
  }
  auto put = [&](auto type) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      auto* c = reinterpret_cast<decltype(type)*>(f.c + i * f.c_row);
      if (NV == 2 && last == W) {
        put_two(c, y[i][0], y[i][NV - 1]);
        continue;
      }
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++)
        v + 1 < NV || last == W ? y[i][v].store(c + v * W) : y[i][v].store_partial(c + v * W, last);
    }
  };
  if (f.type == DType::f32)
    put(float());
  else if (f.type == DType::bf16)
    put(bf16());
  else
    put(f16());
}

// Sums of any kind on their way to C.
template <class Ops, int ROWS, int NV>
FASTNN_INLINE void finish_sums(typename Ops::Sum (&sum)[ROWS][NV], const Finish& f, int cols) {
  using Acc = typename Ops::Acc;
  if constexpr (Acc(0.5f) == Acc(0)) {
#if FASTNN_TARGET_ID == 2
    if constexpr (Ops::requantizes && NV == 2)
      if (f.requantize)
        return f.residual ? requantize_registers<true>(sum, *f.requantize, f.column, f.c, f.c_row,
                                                       f.residual, f.residual_row)
                          : requantize_registers<false>(sum, *f.requantize, f.column, f.c, f.c_row,
                                                        nullptr, 0);
#endif
    finish_integers(sum, f, cols);
  } else {
    if constexpr (sizeof(Acc) == 4)
      if (f.type == DType::bf16) return finish_tile<bf16>(sum, f, cols);
    finish_tile<Acc>(sum, f, cols);
  }
}

// The same from memory, a vector at a time, for tiles of any size, but to uint8: rows lie `ld`
// apart.
template <class Ops>
static void finish_edge(const typename Ops::Acc* sums, int ld, int rows, const Finish& f,
                        int cols) {
  constexpr bool integers = typename Ops::Acc(0.5f) == typename Ops::Acc(0);
  const int64_t size = dtype_size(f.type), bias_size = integers ? dtype_size(f.bias_type) : size;
  for (int i = 0; i < rows; i++)
    for (int v = 0; v < cols; v += Ops::width) {
      Finish at = f;
      at.c += i * f.c_row + v * size;
      if (f.residual) at.residual += i * f.residual_row + v * size;
      if (f.column_bias) at.column_bias += v * bias_size;
      if (f.row_bias) at.row_bias += i * f.row_bias_step;
      if (f.row_scale) at.row_scale += i, at.column_scale += v;
      if (f.row_zero) at.row_zero += i, at.column_sum += v;
      typename Ops::Sum sum[1][1] = {{Ops::sums(sums + i * ld + v)}};
      finish_sums<Ops>(sum, at, int(least(Ops::width, cols - v)));
    }
}

// Words of K after which a tile's sums begin anew; 0: never.
template <class Ops>
constexpr int64_t folded_words() {
  if constexpr (requires { Ops::fold; })
    return Ops::fold;
  else
    return 0;
}

// ROWS x NV vectors of sums stay in registers over the whole block of K:
//
//            b[0]      b[1]          one load each a step of K
//   a[0] | sum[0][0] sum[0][1]
//   a[1] | sum[1][0] sum[1][1]       one broadcast a row
//   ...
template <class Ops, int ROWS, int NV, int MR, int NR, bool PackedA, bool PackedB>
static void tile(const TileArgs& t) {
  typename Ops::Sum sum[ROWS][NV];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++)
      sum[i][v] = Ops::start(t.b + t.words * t.runs * NR * int64_t(sizeof(typename Ops::Word)) +
                             v * Ops::width * int64_t(sizeof(typename Ops::Acc)));

  constexpr int64_t word = sizeof(typename Ops::Word);
  const int64_t a_row = PackedA ? word : t.a_row, a_word = PackedA ? MR * word : t.a_word;
  const int64_t b_word = PackedB ? NR * word : t.b_word;
  const char *a = t.a, *b = t.b;
  const int last = t.cols - (NV - 1) * Ops::width;  // lanes of the last vector, where B is in place
  auto steps = [&](int64_t count) __attribute__((always_inline)) {
    for (int64_t k = 0; k < count; k++) {
      typename Ops::Vec bv[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) {
        const char* p = b + v * Ops::width * word;
        bv[v] = PackedB || v + 1 < NV ? Ops::load(p) : Ops::load_partial(p, last);
        // The next panel's rows go on where this one's end: asked for a panel ahead, as each is a
        // piece too short for the hardware to see it coming.
        if (!PackedB) __builtin_prefetch(p + NV * Ops::width * word, 0, 2);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const typename Ops::Vec av = Ops::broadcast(a + i * a_row);
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) sum[i][v] = Ops::multiply_add(sum[i][v], av, bv[v]);
      }
      a += a_word;
      b += b_word;
    }
  };
  const char* ahead = t.ahead;
  using Acc = typename Ops::Acc;
  // Sums of Ops::fold words begin anew, and are added to those before them, which wait in memory.
  // (Of a B in place, blocks are no longer than that.)
  constexpr int64_t fold = PackedB ? folded_words<Ops>() : 0;
  alignas(64) Acc folded[fold ? ROWS : 1][NV * Ops::width];
  int64_t left = fold;
  const bool folds = fold && t.words * t.runs > fold + fold / 4;  // not for the sake of a few
  if (folds) __builtin_memset(folded, 0, sizeof(folded));
  for (int64_t run = 0;;) {
    // Read in place, each row is a stream of its own, too short for the hardware to see it coming:
    // the lines of the rows after these are asked for a line's length ahead.
    constexpr bool streams = !PackedA && PackedB;
    const int64_t some = streams || t.ahead_lines ? 64 / word : folds ? fold : t.words;
    for (int64_t k = 0; k < t.words; k += some) {
      const int64_t count = least(some, t.words - k);
      if (folds && (left -= count) < 0) {
        left = fold - count;
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
          for (int v = 0; v < NV; v++) {
            Acc* at = folded[i] + v * Ops::width;
            Ops::put(at, Ops::plus(Ops::sums(at), sum[i][v]));
            sum[i][v] = Ops::zero();
          }
      }
      if (streams && a_word == word)
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) __builtin_prefetch(a + (i + ROWS) * a_row);
      for (const char* end = ahead + t.ahead_lines * 64; ahead < end; ahead += 64)
        __builtin_prefetch(ahead, 0, 2);
      ahead += t.ahead_skip;
      steps(count);
    }
    if (++run == t.runs) break;
    a = t.a + t.a_runs[run];
  }
  if (folds)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++)
        sum[i][v] = Ops::plus(Ops::sums(folded[i] + v * Ops::width), sum[i][v]);
  auto* acc = static_cast<char*>(t.acc);
  int64_t acc_row = t.acc_row;
  if (t.add) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++)
        sum[i][v] = Ops::plus(
            Ops::sums(reinterpret_cast<const Acc*>(acc + i * acc_row) + v * Ops::width), sum[i][v]);
  }
  // Not worth code of its own are the sizes of which a product has one tile at most: fewer rows
  // than a whole tile has, and fewer columns.
  constexpr bool often = ROWS == MR || NV * Ops::width == NR;
  alignas(64) Acc edge[often ? 1 : ROWS][NV * Ops::width];
  if (t.finish) {
    if constexpr (often) return finish_sums<Ops>(sum, *t.finish, t.cols);
    acc = reinterpret_cast<char*>(edge), acc_row = sizeof(edge[0]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++, acc += acc_row)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) Ops::put(reinterpret_cast<Acc*>(acc) + v * Ops::width, sum[i][v]);
  if constexpr (!often)
    if (t.finish) finish_edge<Ops>(edge[0], NV * Ops::width, ROWS, *t.finish, t.cols);
}

// tile<> for a number of rows and vectors known at run time: a table of all of them.
template <class Ops, int MR, int NVMAX, bool PackedA, bool PackedB>
struct Tiles {
  TileFn at[NVMAX][MR];
  template <int V, int R>
  constexpr void fill() {
    at[V - 1][R - 1] = tile<Ops, R, V, MR, NVMAX * Ops::width, PackedA, PackedB>;
    if constexpr (R > 1)
      fill<V, R - 1>();
    else if constexpr (V > 1)
      fill<V - 1, MR>();
  }
  constexpr Tiles() : at{} { fill<NVMAX, MR>(); }
};

template <class Ops, int MR, int NV, bool DirectA, bool DirectB>
static void run_tile(const TileArgs& t) {
  const int v = (t.cols - 1) / Ops::width, r = t.rows - 1;
  static constexpr Tiles<Ops, MR, NV, true, true> packed;
  if constexpr (DirectA || DirectB) {
    if (t.packed_a && t.packed_b) return packed.at[v][r](t);
    if constexpr (DirectA) {
      static constexpr Tiles<Ops, MR, NV, false, true> a_in_place;
      if (t.packed_b) return a_in_place.at[v][r](t);
    }
    if constexpr (DirectB) {
      static constexpr Tiles<Ops, MR, NV, true, false> b_in_place;
      if (t.packed_a) return b_in_place.at[v][r](t);
      static constexpr Tiles<Ops, MR, NV, false, false> in_place;
      return in_place.at[v][r](t);
    }
  }
  packed.at[v][r](t);
}

// The same where a word of A in place is another than a packed one: OpsInPlace's.
template <class Ops, class OpsInPlace, int MR, int NV>
static void run_tile_apart(const TileArgs& t) {
  static constexpr Tiles<Ops, MR, NV, true, true> packed;
  static constexpr Tiles<OpsInPlace, MR, NV, false, true> a_in_place;
  const int v = (t.cols - 1) / Ops::width, r = t.rows - 1;
  t.packed_a ? packed.at[v][r](t) : a_in_place.at[v][r](t);
}

// A kernel for few rows that reads both operands in place: more vectors, to hide the latency.
template <class Ops, int MR, int NV>
static void run_wide_tile(const TileArgs& t) {
  static constexpr Tiles<Ops, MR, NV, false, false> in_place;
  in_place.at[(t.cols - 1) / Ops::width][t.rows - 1](t);
}

// ---- packing -----------------------------------------------------------------------------------

// A word of K for one lane, gathered element by element: any strides, tails as zeros.
template <class Ops, class Src>
FASTNN_INLINE typename Ops::Word gather_word(const Src* src, int64_t k_stride, int64_t left) {
  Src e[Ops::k_word];
  for (int i = 0; i < Ops::k_word; i++) e[i] = i < left ? src[i * k_stride] : Src{};
  return Ops::make_word(e);
}

// How many rows ahead of those that are packed are asked for: they are pieces of long rows, which
// the hardware takes for the beginning of nothing.
constexpr int64_t kAhead = 16;

// Panel layout: word of K outermost, then LANES words, zero-padded in both directions.
template <class Ops, class Src, int LANES>
static unsigned pack_panel(void* dst_, const void* src_, int64_t lane_stride, int64_t k_stride,
                           int lanes, int64_t kc) {
  auto* dst = static_cast<typename Ops::Word*>(dst_);
  const auto* src = static_cast<const Src*>(src_);
  constexpr int G = Ops::k_word, W = Ops::width;
  const int64_t words = (kc + G - 1) / G, whole = kc / G;
  int64_t w0 = 0;
  if (lane_stride == 1) {  // lanes are neighbours: vectors across them, one a word
    if constexpr (requires { Ops::across_panel(src, k_stride, dst); })
      if (lanes == LANES && LANES == 2 * W)
        for (; w0 < whole; w0++) {
          const Src* s = src + w0 * G * k_stride;
#pragma GCC unroll 4
          for (int i = 0; i < G; i++) __builtin_prefetch(s + (i + kAhead * G) * k_stride);
          Ops::across_panel(s, k_stride, dst + w0 * LANES);
        }
    for (; w0 < whole; w0++) {
      const Src* s = src + w0 * G * k_stride;
#pragma GCC unroll 8
      for (int l = 0; l < LANES; l += W) {
        const int n = lanes - l < 0 ? 0 : lanes - l < W ? lanes - l : W;
        const int room = LANES - l < W ? LANES - l : W;
        __builtin_prefetch(s + l + kAhead * k_stride);
        Ops::across(s + l, k_stride, n, dst + w0 * LANES + l, room);
      }
    }
  } else if (k_stride == 1) {  // K is contiguous: square blocks of words, transposed in registers
    for (; w0 + W <= whole; w0 += W)
#pragma GCC unroll 8
      for (int l = 0; l < LANES; l += W) {
        const int n = lanes - l < 0 ? 0 : lanes - l < W ? lanes - l : W;
        const int room = LANES - l < W ? LANES - l : W;
        Ops::along(src + l * lane_stride + w0 * G, lane_stride, n, dst + w0 * LANES + l, LANES,
                   room);
      }
  }
  for (; w0 < words; w0++)
    for (int l = 0; l < LANES; l++)
      dst[w0 * LANES + l] = l < lanes ? gather_word<Ops>(src + l * lane_stride + w0 * G * k_stride,
                                                         k_stride, kc - w0 * G)
                                      : Ops::make_zero_word();
  return 0;
}

// The kernel that multiplies what `a` takes for A by what `b` takes for B; both pack alike.
constexpr Kernel mixed_kernel(const char* name, Kernel a, const Kernel& b) {
  a.name = name, a.b = b.b, a.pack_b = b.pack_b;
  a.dot = nullptr;  // whose operands are of one type
  return a;
}

// ---- dot ---------------------------------------------------------------------------------------

// Both operands run along K: vectors along K too, summed across lanes at the end. For few rows,
// where a packed panel would be used too little to pay for itself. The sums of a lane are blocked,
// as those of the tiles are; the fewer lanes there are, the shorter the blocks.
template <class Ops, class Src, int ROWS, int COLS>
FASTNN_INLINE void dot_block(const Src* x, int64_t xs, const Src* w, int64_t ws, int64_t k,
                             typename Ops::Acc* acc) {
  constexpr int W = Ops::dot_width;
  int64_t steps = 8 * W;
  while (steps * steps * W < k) steps *= 2;  // as many blocks as steps in each, at most
  typename Ops::Sum total[ROWS][COLS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; j++) total[i][j] = Ops::zero();
  int64_t p = 0;
  do {
    typename Ops::Sum sum[ROWS][COLS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int j = 0; j < COLS; j++) sum[i][j] = Ops::zero();
    for (const int64_t end = least(k, p + steps * W); p + W <= end; p += W) {
      typename Ops::Vec wv[COLS];
#pragma GCC unroll 4
      for (int j = 0; j < COLS; j++) wv[j] = Ops::dot_load(w + j * ws + p);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++) {
        const typename Ops::Vec xv = Ops::dot_load(x + i * xs + p);
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) sum[i][j] = Ops::multiply_add(sum[i][j], xv, wv[j]);
      }
    }
    if (const int64_t left = k - p; left > 0 && left < W) {
      typename Ops::Vec wv[COLS];
#pragma GCC unroll 4
      for (int j = 0; j < COLS; j++) wv[j] = Ops::dot_load_partial(w + j * ws + p, int(left));
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++) {
        const typename Ops::Vec xv = Ops::dot_load_partial(x + i * xs + p, int(left));
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) sum[i][j] = Ops::multiply_add(sum[i][j], xv, wv[j]);
      }
      p = k;
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int j = 0; j < COLS; j++) total[i][j] = total[i][j] + sum[i][j];
  } while (p < k);
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; j++) acc[i * kDotCols + j] = reduce_add(total[i][j]);
}

template <class Ops, class Src>
static void run_dot(const void* x_, int64_t xs, int rows, const void* w_, int64_t ws, int cols,
                    int64_t k, void* acc_) {
  const auto *x = static_cast<const Src*>(x_), *w = static_cast<const Src*>(w_);
  auto* acc = static_cast<typename Ops::Acc*>(acc_);
  if (cols == kDotCols) {
    switch (rows) {
      case 1:
        return dot_block<Ops, Src, 1, kDotCols>(x, xs, w, ws, k, acc);
      case 2:
        return dot_block<Ops, Src, 2, kDotCols>(x, xs, w, ws, k, acc);
      case 3:
        return dot_block<Ops, Src, 3, kDotCols>(x, xs, w, ws, k, acc);
      default:
        return dot_block<Ops, Src, 4, kDotCols>(x, xs, w, ws, k, acc);
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++)
      dot_block<Ops, Src, 1, 1>(x + i * xs, xs, w + j * ws, ws, k, acc + i * kDotCols + j);
}

// ---- store -------------------------------------------------------------------------------------

// What an accumulator is computed with on its way out: float32 sums in float32, int32 sums too,
// once row_zero * col_sum is taken from them. (Of floating-point numbers there is none.)
template <class Acc>
struct OutVec {
  using V = VecF32;
};
template <>
struct OutVec<double> {
  using V = VecF64;
};

FASTNN_INLINE VecF32 load_acc(const float* p, int n, const Store&, int64_t, int64_t) {
  return n == VecF32::width ? VecF32::load(p) : VecF32::load_partial(p, n);
}
FASTNN_INLINE VecF64 load_acc(const double* p, int n, const Store&, int64_t, int64_t) {
  return n == VecF64::width ? VecF64::load(p) : VecF64::load_partial(p, n);
}
FASTNN_INLINE VecF32 load_acc(const int32_t* p, int n, const Store& s, int64_t i, int64_t j) {
  auto load = [&](const int32_t* p) __attribute__((always_inline)) {
    return n == VecI32::width ? VecI32::load(p) : VecI32::load_partial(p, n);
  };
  VecI32 v = load(p);
  if (s.row_zero) v = v - VecI32::set1(s.row_zero[i]) * load(s.col_sum + j);
  return to_float(v);
}

// n elements of type T from p, `stride` elements apart (0 repeats one).
template <class V, class T>
FASTNN_INLINE V load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == V::width ? V::load(p) : V::load_partial(p, n);
  T lanes[V::width] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i * stride];
  return V::load(lanes);
}
template <class V>
FASTNN_INLINE V load_typed(const char* base, DType type, int64_t index, int64_t stride, int n) {
  if constexpr (sizeof(typename V::T) == 8) {
    return load_strided<V>((const double*)base + index, stride, n);
  } else {
    switch (type) {
      case DType::bf16:
        return load_strided<V>((const bf16*)base + index, stride, n);
      case DType::f16:
        return load_strided<V>((const f16*)base + index, stride, n);
      default:
        return load_strided<V>((const float*)base + index, stride, n);
    }
  }
}

// Narrow: the result is rounded to 16 bits, so the activation need not be exact to more.
template <bool Narrow, class V>
FASTNN_INLINE V epilogue(V v, const Store& s, int64_t i, int64_t j, int n) {
  constexpr bool f64 = sizeof(typename V::T) == 8;
  using T = typename V::T;
  v = v * V::set1(f64 ? T(s.alpha64) : T(s.alpha));
  if constexpr (!f64) {
    if (s.row_scale && s.col_scale)
      v = v * (V::set1(s.row_scale[i]) * load_strided<V>(s.col_scale + j, 1, n));
    else if (s.row_scale)
      v = v * V::set1(s.row_scale[i]);
    else if (s.col_scale)
      v = v * load_strided<V>(s.col_scale + j, 1, n);
  }
  if (s.residual) {
    const V r = load_typed<V>(s.residual, s.type, i * s.r_rs + j * s.r_cs, s.r_cs, n);
    v = fma(r, V::set1(f64 ? T(s.beta64) : T(s.beta)), v);
  }
  if (s.bias_axis == BiasAxis::column)
    v = v + load_typed<V>(s.bias, s.bias_type, j * s.bias_stride, s.bias_stride, n);
  else if (s.bias_axis == BiasAxis::row)
    v = v + load_typed<V>(s.bias, s.bias_type, i * s.bias_stride, 0, n);
  if (!s.activation) return v;
  if constexpr (Narrow)
    return activate_narrow(s.activation, v);
  else
    return activate(s.activation, v);
}

template <class T, class V>
FASTNN_INLINE void put_row(T* p, int64_t stride, V v, int n) {
  if (stride == 1) {
    n == V::width ? v.store(p) : v.store_partial(p, n);
  } else {
    T lanes[V::width];
    v.store(lanes);
    for (int i = 0; i < n; i++) p[i * stride] = lanes[i];
  }
}

// What most layers end with, residual, bias and an activation, with nothing left to decide inside.
template <class T, int kind>
static void store_layer(const void* sums, int ld, int rows, int cols, const Store& s, int64_t i0,
                        int64_t j0) {
  using V = VecF32;
  const auto* acc = static_cast<const float*>(sums);
  constexpr int W = V::width;
  T* c = reinterpret_cast<T*>(s.c) + i0 * s.c_rs + j0;
  const T* added = s.residual ? reinterpret_cast<const T*>(s.residual) + i0 * s.r_rs + j0 : nullptr;
  for (int j = 0; j < cols; j += 2 * W) {
    const int n[2] = {int(least(W, cols - j)), int(least(W, cols - j - W))};
    V bias[2] = {V::set1(-0.0f), V::set1(-0.0f)};  // to which a sum adds nothing, not even its sign
    if (s.bias_axis == BiasAxis::column)
      for (int v = 0; v < 2 && n[v] > 0; v++)
        bias[v] = load_typed<V>(s.bias, s.bias_type, (j0 + j + v * W) * s.bias_stride,
                                s.bias_stride, n[v]);
    for (int i = 0; i < rows; i++) {
      if (s.bias_axis == BiasAxis::row)
        bias[0] = bias[1] = load_typed<V>(s.bias, s.bias_type, (i0 + i) * s.bias_stride, 0, W);
      auto finished = [&](int v) __attribute__((always_inline)) {
        V y = load_acc(acc + i * ld + j + v * W, n[v], s, i0 + i, j0 + j + v * W);
        if (added) y = load_strided<V>(added + i * s.r_rs + j + v * W, 1, n[v]) + y;
        y = y + bias[v];
        if constexpr (kind == kGelu)
          return gelu_of_sum<sizeof(T) == 2>(y);
        else if constexpr (sizeof(T) == 2)
          return activate_narrow_as<kind>(y);
        else
          return activate_as<kind>(y);
      };
      T* to = c + i * s.c_rs + j;
      if (n[1] == W) {
        put_two(to, finished(0), finished(1));
      } else {
        put_row(to, 1, finished(0), n[0]);
        if (n[1] > 0) put_row(to + W, 1, finished(1), n[1]);
      }
    }
  }
}
// Null: as rare as not to be worth its code.
template <class T>
static constexpr StoreFn store_layer_as[kActivations] = {store_layer<T, kNone>,
                                                         store_layer<T, kRelu>,
                                                         store_layer<T, kGelu>,
                                                         store_layer<T, kGeluTanh>,
                                                         store_layer<T, kSilu>,
                                                         nullptr,
                                                         nullptr,
                                                         store_layer<T, kRelu6>};

template <class T, class Acc>
static void store_tile(const Acc* acc, int ld, int rows, int cols, const Store& s, int64_t i0,
                       int64_t j0) {
  using V = typename OutVec<Acc>::V;
  constexpr bool narrow = sizeof(T) == 2;
  T* c = reinterpret_cast<T*>(s.c) + i0 * s.c_rs + j0 * s.c_cs;
  if (s.c_rs == 1 && s.c_cs != 1 && rows > 1) {
#if FASTNN_TARGET_ID == 2
    if constexpr (sizeof(typename V::T) == 4) {
      // C lies the other way round: a block of 16 x 16 is finished, turned, and its columns
      // written.
      for (int r0 = 0; r0 < rows; r0 += 16)
        for (int j = 0; j < cols; j += 16) {
          const int n = int(least(16, cols - j)), m = int(least(16, rows - r0));
          __m512i block[16];
          for (int i = 0; i < 16; i++) {
            V v = V::zero();
            if (i < m) {
              v = load_acc(acc + (r0 + i) * ld + j, n, s, i0 + r0 + i, j0 + j);
              if (!s.plain) v = epilogue<narrow>(v, s, i0 + r0 + i, j0 + j, n);
            }
            block[i] = _mm512_castps_si512(v.r);
          }
          transpose16(block);
          for (int l = 0; l < n; l++)
            V{_mm512_castsi512_ps(block[l])}.store_partial(c + r0 + (j + l) * s.c_cs, m);
        }
      return;
    }
#endif
    // C lies the other way round: finish the tile in place, then write its columns.
    alignas(64) typename V::T done[32 * 64];
    T column[64];
    for (int j = 0; j < cols; j += V::width) {
      const int n = int(least(V::width, cols - j));
      for (int i = 0; i < rows; i++) {
        V v = load_acc(acc + i * ld + j, n, s, i0 + i, j0 + j);
        if (!s.plain) v = epilogue<narrow>(v, s, i0 + i, j0 + j, n);
        v.store(done + i * V::width);
      }
      for (int l = 0; l < n; l++) {
        T* out = c + (j + l) * s.c_cs;
        for (int i = 0; i < rows; i++) from_any(column[i], done[i * V::width + l]);
        __builtin_memcpy(out, column, size_t(rows) * sizeof(T));
      }
    }
    return;
  }
  if constexpr (sizeof(Acc) == 4 && Acc(0.5f) != Acc(0)) {
    const bool unit = s.alpha == 1 && !s.row_scale && !s.col_scale;
    const bool residual = !s.residual || (s.beta == 1 && s.r_cs == 1);
    if (s.c_cs == 1 && !s.plain && unit && residual)
      if (const auto store = store_layer_as<T>[s.activation])
        return store(acc, ld, rows, cols, s, i0, j0);
  }
  if (s.c_cs == 1 && cols % (2 * V::width) == 0) {
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < cols; j += 2 * V::width) {
        V a = load_acc(acc + i * ld + j, V::width, s, i0 + i, j0 + j);
        V b = load_acc(acc + i * ld + j + V::width, V::width, s, i0 + i, j0 + j + V::width);
        if (!s.plain) {
          a = epilogue<narrow>(a, s, i0 + i, j0 + j, V::width);
          b = epilogue<narrow>(b, s, i0 + i, j0 + j + V::width, V::width);
        }
        put_two(c + i * s.c_rs + j, a, b);
      }
    return;
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j += V::width) {
      const int n = int(least(V::width, cols - j));
      V v = load_acc(acc + i * ld + j, n, s, i0 + i, j0 + j);
      if (!s.plain) v = epilogue<narrow>(v, s, i0 + i, j0 + j, n);
      put_row(c + i * s.c_rs + j * s.c_cs, s.c_cs, v, n);
    }
}

[[maybe_unused]] static void store_f32(const void* acc, int ld, int rows, int cols, const Store& s,
                                       int64_t i0, int64_t j0) {
  const auto* a = static_cast<const float*>(acc);
  switch (s.type) {
    case DType::bf16:
      return store_tile<bf16>(a, ld, rows, cols, s, i0, j0);
    case DType::f16:
      return store_tile<f16>(a, ld, rows, cols, s, i0, j0);
    default:
      return store_tile<float>(a, ld, rows, cols, s, i0, j0);
  }
}

[[maybe_unused]] static void store_f64(const void* acc, int ld, int rows, int cols, const Store& s,
                                       int64_t i0, int64_t j0) {
  store_tile<double>(static_cast<const double*>(acc), ld, rows, cols, s, i0, j0);
}

// What a layer of integers ends with, with nothing left to decide inside: sums less the zero
// points' part, scaled, a bias, an activation. They are sums of rounded numbers, so that the
// activation need not be exact to the last bit.
template <class T, int kind>
static void store_scaled(const void* sums, int ld, int rows, int cols, const Store& s, int64_t i0,
                         int64_t j0) {
  using V = VecF32;
  const auto* acc = static_cast<const int32_t*>(sums);
  T* c = reinterpret_cast<T*>(s.c) + i0 * s.c_rs + j0;
  for (int j = 0; j < cols; j += V::width) {
    const int n = int(least(V::width, cols - j));
    const V scale = load_strided<V>(s.col_scale + j0 + j, 1, n);
    const V bias = s.bias_axis == BiasAxis::column
                       ? load_typed<V>(s.bias, s.bias_type, j0 + j, 1, n)
                       : V::set1(-0.0f);  // to which a sum adds nothing, not even its sign
    for (int i = 0; i < rows; i++) {
      const V v = load_acc(acc + i * ld + j, n, s, i0 + i, j0 + j);
      const V scaled = v * (V::set1(s.row_scale[i0 + i]) * scale) + bias;
      const V y = kind == kGelu ? gelu_near(scaled) : activate_narrow_as<kind>(scaled);
      put_row(c + i * s.c_rs + j, 1, y, n);
    }
  }
}
template <class T>
static constexpr StoreFn store_scaled_as[kActivations] = {
    store_scaled<T, kNone>,     store_scaled<T, kRelu>, store_scaled<T, kGelu>,
    store_scaled<T, kGeluTanh>, store_scaled<T, kSilu>, store_scaled<T, kSigmoid>,
    store_scaled<T, kTanh>,     store_scaled<T, kRelu6>};

[[maybe_unused]] static void store_s32(const void* acc, int ld, int rows, int cols, const Store& s,
                                       int64_t i0, int64_t j0) {
  const auto* a = static_cast<const int32_t*>(acc);
  if (s.requantize) {
    const int64_t size = dtype_size(s.type);
    return requantize_tile(a, ld, rows, cols, *s.requantize, j0, s.type,
                           s.c + (i0 * s.c_rs + j0) * size, s.c_rs * size,
                           s.residual ? s.residual + i0 * s.r_rs + j0 : nullptr, s.r_rs);
  }
  const bool by_row =
      s.bias_axis == BiasAxis::row || (s.bias_axis == BiasAxis::column && s.bias_stride != 1);
  const bool scaled =
      s.row_scale && s.col_scale && s.alpha == 1 && !s.residual && !by_row && s.c_cs == 1;
  switch (s.type) {
    case DType::bf16:
      if (scaled) return store_scaled_as<bf16>[s.activation](a, ld, rows, cols, s, i0, j0);
      return store_tile<bf16>(a, ld, rows, cols, s, i0, j0);
    case DType::f16:
      if (scaled) return store_scaled_as<f16>[s.activation](a, ld, rows, cols, s, i0, j0);
      return store_tile<f16>(a, ld, rows, cols, s, i0, j0);
    case DType::f32:
      if (scaled) return store_scaled_as<float>[s.activation](a, ld, rows, cols, s, i0, j0);
      return store_tile<float>(a, ld, rows, cols, s, i0, j0);
    default:
      break;
  }
  auto* c = reinterpret_cast<int32_t*>(s.c) + i0 * s.c_rs + j0 * s.c_cs;
  if (s.c_cs == 1) {
    for (int i = 0; i < rows; i++) __builtin_memcpy(c + i * s.c_rs, a + i * ld, size_t(cols) * 4);
    return;
  }
  for (int j = 0; j < cols; j++)
    for (int i = 0; i < rows; i++) c[i * s.c_rs + j * s.c_cs] = a[i * ld + j];
}

}  // namespace fastnn::FASTNN_TARGET
