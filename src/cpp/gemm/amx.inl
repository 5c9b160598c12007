// GEMM on tiles: 2 x 2 tiles of C stay in registers, 2 of A and 2 of B pass through.
//
//              B0   B1        a step of K is 64 bytes of each row of A:
//         A0 | C0   C1        32 bfloat16, or 64 int8
//         A1 | C2   C3
//
// Packed A, a panel of 32 rows:      [step][part][tile of 16 rows][row][64 bytes of K]
// Packed B, a panel of 32 columns:   [step][part][tile of 16 columns][word of K][column][4 bytes]
//
// float32 is split, exactly and by truncation, into parts of bfloat16, x = hi + mid + lo (8 + 8 + 8
// bits of mantissa), and the products of the parts that matter are summed, smallest first:
//
//   highest   lo hi, mid hi, mid mid, hi mid, hi lo, hi hi     (left out: below 2^-24 of hi hi)
//   high      lo hi, hi lo, hi hi, of two parts (16 bits)
//   medium    one product of bfloat16, rounded to nearest
//
// float16 is exactly two parts, and all four products are summed. Truncation, because rounding hi
// up would carry the largest finite value to infinity. An infinity or a NaN would meet parts that
// are zero, so packing reports it and the call is computed on the FMA units instead.
#pragma once
#include "gemm/microkernel.inl"
#include "gemm/operands.inl"
#include "isa/amx.hpp"
#include "isa/transpose_avx512.hpp"

namespace fastnn::FASTNN_TARGET {

constexpr int kTile = 1024;  // bytes

// ---- packing -----------------------------------------------------------------------------------

// A block of up to 16 lanes by 16 steps of K as float32: out[lane] holds K, or out[k] holds lanes.
template <bool LaneMajor, class Src>
FASTNN_INLINE void fetch16(const Src* src, int64_t lane_stride, int64_t k_stride, int lanes, int ks,
                           __m512i out[16]) {
  const int64_t outer = LaneMajor ? lane_stride : k_stride;
  const int64_t inner = LaneMajor ? k_stride : lane_stride;
  const int no = LaneMajor ? lanes : ks, ni = LaneMajor ? ks : lanes;
  if (inner == 1 || outer != 1) {
    for (int i = 0; i < 16; i++) {
      if (i >= no) {
        out[i] = _mm512_setzero_si512();
      } else if (inner == 1) {
        out[i] = _mm512_castps_si512(load_operand_partial<VecF32>(src + i * outer, ni).r);
      } else {
        float row[16] = {};
        for (int j = 0; j < ni; j++) row[j] = operand(src[i * outer + j * inner]);
        out[i] = _mm512_castps_si512(VecF32::load(row).r);
      }
    }
    return;
  }
  for (int j = 0; j < 16; j++)
    out[j] = j < ni ? _mm512_castps_si512(load_operand_partial<VecF32>(src + j * inner, no).r)
                    : _mm512_setzero_si512();
  transpose16(out);
}

// The next part of x, in the upper halves of the words; x becomes what is left. Exact.
FASTNN_INLINE __m512i take_part(__m512i& x) {
  const __m512i part = _mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000)));
  x = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(part)));
  return part;
}
FASTNN_INLINE __m512i rounded(__m512i x) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(VecF32{_mm512_castsi512_ps(x)}.to(bf16())), 16);
}

struct Seen {
  __m512i magnitude = _mm512_setzero_si512();
  FASTNN_INLINE void note(__m512i x) {
    magnitude = _mm512_max_epu32(magnitude, _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)));
  }
  FASTNN_INLINE unsigned flags() const {
    const uint32_t m = _mm512_reduce_max_epu32(magnitude);
    if (m >= 0x7f800000u) return kNonFinite;
    if (m == 0) return 0;
    if (m < 0x12800000u) return kTiny | kVeryTiny;  // 2^-90
    return m < 0x29000000u ? unsigned(kTiny) : 0u;  // 2^-45
  }
};

template <class Src, int Parts, bool Round>
static unsigned pack_a_tiles(void* dst_, const void* src_, int64_t lane_stride, int64_t k_stride,
                             int lanes, int64_t kc) {
  auto* dst = static_cast<char*>(dst_);
  const auto* src = static_cast<const Src*>(src_);
  Seen seen;
  for (int64_t k0 = 0; k0 < kc; k0 += 32, dst += Parts * 2 * kTile)
    for (int t = 0; t < 2; t++)
      for (int h = 0; h < 2; h++) {
        const int n = int(least(16, lanes - 16 * t)), ks = int(least(16, kc - k0 - 16 * h));
        __m512i block[16];
        if (n <= 0 || ks <= 0) {
          for (auto& r : block) r = _mm512_setzero_si512();
        } else {
          fetch16<true>(src + 16 * t * lane_stride + (k0 + 16 * h) * k_stride, lane_stride,
                        k_stride, n, ks, block);
        }
        for (int r = 0; r < 16; r++) {
          __m512i x = block[r];
          seen.note(x);
          for (int p = 0; p < Parts; p++) {
            const __m512i part = Round ? rounded(x) : take_part(x);
            _mm256_storeu_si256((__m256i*)(dst + (p * 2 + t) * kTile + r * 64 + h * 32),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(part, 16)));
          }
        }
      }
  return Parts > 1 ? seen.flags() : 0;
}

template <class Src, int Parts, bool Round>
static unsigned pack_b_tiles(void* dst_, const void* src_, int64_t lane_stride, int64_t k_stride,
                             int lanes, int64_t kc) {
  auto* dst = static_cast<char*>(dst_);
  const auto* src = static_cast<const Src*>(src_);
  Seen seen;
  for (int64_t k0 = 0; k0 < kc; k0 += 32, dst += Parts * 2 * kTile)
    for (int t = 0; t < 2; t++)
      for (int h = 0; h < 2; h++) {
        const int n = int(least(16, lanes - 16 * t)), ks = int(least(16, kc - k0 - 16 * h));
        __m512i block[16];
        if (n <= 0 || ks <= 0) {
          for (auto& r : block) r = _mm512_setzero_si512();
        } else {
          fetch16<false>(src + 16 * t * lane_stride + (k0 + 16 * h) * k_stride, lane_stride,
                         k_stride, n, ks, block);
        }
        for (int r = 0; r < 8; r++) {
          __m512i even = block[2 * r], odd = block[2 * r + 1];
          seen.note(even);
          seen.note(odd);
          for (int p = 0; p < Parts; p++) {
            const __m512i low = Round ? rounded(even) : take_part(even);
            const __m512i high = Round ? rounded(odd) : take_part(odd);
            _mm512_storeu_si512(dst + (p * 2 + t) * kTile + (h * 8 + r) * 64,
                                _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
          }
        }
      }
  return Parts > 1 ? seen.flags() : 0;
}

template <class Src>
FASTNN_INLINE __m512i fetch_bytes(const Src* src, int64_t stride, int n) {
  if (stride == 1)
    return _mm512_maskz_loadu_epi8(n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1, src);
  alignas(64) Src row[64] = {};
  for (int i = 0; i < n; i++) row[i] = src[i * stride];
  return _mm512_load_si512(row);
}

template <class Src>
static unsigned pack_a_bytes(void* dst_, const void* src_, int64_t lane_stride, int64_t k_stride,
                             int lanes, int64_t kc) {
  auto* dst = static_cast<char*>(dst_);
  const auto* src = static_cast<const Src*>(src_);
  for (int64_t k0 = 0; k0 < kc; k0 += 64, dst += 2 * kTile)
    for (int r = 0; r < 32; r++)
      _mm512_storeu_si512(dst + r * 64, r < lanes
                                            ? fetch_bytes(src + r * lane_stride + k0 * k_stride,
                                                          k_stride, int(least(64, kc - k0)))
                                            : _mm512_setzero_si512());
  return 0;
}

static unsigned pack_b_bytes(void* dst_, const void* src_, int64_t lane_stride, int64_t k_stride,
                             int lanes, int64_t kc) {
  auto* dst = static_cast<char*>(dst_);
  const auto* src = static_cast<const int8_t*>(src_);
  for (int64_t k0 = 0; k0 < kc; k0 += 64, dst += 2 * kTile)
    for (int t = 0; t < 2; t++) {
      const int n = int(least(16, lanes - 16 * t)), ks = int(least(64, kc - k0));
      const int8_t* s = src + 16 * t * lane_stride + k0 * k_stride;
      __m512i word[16];
      if (lane_stride == 1 && k_stride != 1) {
        for (int w = 0; w < 16; w++) {
          word[w] = _mm512_setzero_si512();
          for (int i = 0; i < 4; i++)
            if (4 * w + i < ks && n > 0)
              word[w] = _mm512_or_si512(
                  word[w], _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(
                                                 VecF32::first(n), s + (4 * w + i) * k_stride)),
                                             8 * i));
        }
      } else {
        for (int l = 0; l < 16; l++)
          word[l] = l < n ? fetch_bytes(s + l * lane_stride, k_stride, ks) : _mm512_setzero_si512();
        transpose16(word);
      }
      for (int w = 0; w < 16; w++) _mm512_storeu_si512(dst + t * kTile + w * 64, word[w]);
    }
  return 0;
}

// ---- tiles -------------------------------------------------------------------------------------

#define FASTNN_LOAD_A(part)                                \
  do {                                                     \
    TILE_LOAD(4, a + (part) * a_part, a_row);              \
    TILE_LOAD(5, a + (part) * a_part + 16 * a_row, a_row); \
  } while (0)
#define FASTNN_LOAD_B(part)                           \
  do {                                                \
    TILE_LOAD(6, b + (part) * 2 * kTile, 64);         \
    TILE_LOAD(7, b + (part) * 2 * kTile + kTile, 64); \
  } while (0)
#define FASTNN_PRODUCTS(op) \
  do {                      \
    op(0, 4, 6);            \
    op(1, 4, 7);            \
    op(2, 5, 6);            \
    op(3, 5, 7);            \
  } while (0)

FASTNN_INLINE void clear_sums() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
}
FASTNN_INLINE void store_sums(char* p, int64_t row) {
  TILE_STORE(0, p, row);
  TILE_STORE(1, p + 64, row);
  TILE_STORE(2, p + 16 * row, row);
  TILE_STORE(3, p + 16 * row + 64, row);
}

// Products: how many of the part products are summed: 1, 3 (two parts), 4 (two parts), 6 (three).
template <int Products>
static void bf16_tiles(const TileArgs& t) {
  constexpr int parts = Products == 1 ? 1 : Products == 6 ? 3 : 2;
  const int64_t a_row = t.packed_a ? 64 : t.a_row, a_part = 2 * kTile;
  const int64_t a_step = t.packed_a ? parts * 2 * kTile : 64;
  const char *a = t.a, *b = t.b;
  clear_sums();
  for (int64_t w = 0; w < t.words; w += 16, a += a_step, b += parts * 2 * kTile) {
    if constexpr (Products == 1) {
      FASTNN_LOAD_B(0);
      FASTNN_LOAD_A(0);
      FASTNN_PRODUCTS(TILE_BF16);
    } else if constexpr (parts == 2) {
      FASTNN_LOAD_A(1);
      if constexpr (Products == 4) {
        FASTNN_LOAD_B(1);
        FASTNN_PRODUCTS(TILE_BF16);  // lo lo
      }
      FASTNN_LOAD_B(0);
      FASTNN_PRODUCTS(TILE_BF16);  // lo hi
      FASTNN_LOAD_A(0);
      FASTNN_LOAD_B(1);
      FASTNN_PRODUCTS(TILE_BF16);  // hi lo
      FASTNN_LOAD_B(0);
      FASTNN_PRODUCTS(TILE_BF16);  // hi hi
    } else {
      FASTNN_LOAD_B(0);
      FASTNN_LOAD_A(2);
      FASTNN_PRODUCTS(TILE_BF16);  // lo hi
      FASTNN_LOAD_A(1);
      FASTNN_PRODUCTS(TILE_BF16);  // mid hi
      FASTNN_LOAD_B(1);
      FASTNN_PRODUCTS(TILE_BF16);  // mid mid
      FASTNN_LOAD_A(0);
      FASTNN_PRODUCTS(TILE_BF16);  // hi mid
      FASTNN_LOAD_B(2);
      FASTNN_PRODUCTS(TILE_BF16);  // hi lo
      FASTNN_LOAD_B(0);
      FASTNN_PRODUCTS(TILE_BF16);  // hi hi
    }
  }
  if (!t.add) return store_sums(static_cast<char*>(t.acc), t.acc_row);
  alignas(64) float sums[32 * 32];
  store_sums(reinterpret_cast<char*>(sums), 128);
  auto* acc = static_cast<float*>(t.acc);
  for (int i = 0; i < 32 * 32; i += 16)
    (VecF32::load(acc + i) + VecF32::load(sums + i)).store(acc + i);
}

// A packed, or, of whole steps of K, in place in any number of runs.
template <bool SignedA>
static void int8_tiles(const TileArgs& t) {
  const int64_t a_part = 0;
  const char* b = t.b;
  alignas(64) char rows[32 * 64];
  clear_sums();
  for (int64_t run = 0; run < t.runs; run++) {
    const char* from = t.a + (run ? t.a_runs[run] : 0);
    for (int64_t w = 0; w < t.words; w += 16, b += 2 * kTile) {
      const char* a = from;
      int64_t a_row = t.packed_a ? 64 : t.a_row;
      if (!t.packed_a && t.a_runs && t.rows < 32) {
        // A tile is loaded whole, and behind the rows of a strip there may be nothing.
        for (int r = 0; r < t.rows; r++)
          _mm512_store_si512(rows + r * 64, _mm512_loadu_si512(from + r * a_row));
        a = rows, a_row = 64;
      }
      FASTNN_LOAD_B(0);
      FASTNN_LOAD_A(0);
      if constexpr (SignedA)
        FASTNN_PRODUCTS(TILE_S8S8);
      else
        FASTNN_PRODUCTS(TILE_U8S8);
      from += t.packed_a ? 2 * kTile : 64;
    }
  }
  if (!t.add) return store_sums(static_cast<char*>(t.acc), t.acc_row);
  alignas(64) int32_t sums[32 * 32];
  store_sums(reinterpret_cast<char*>(sums), 128);
  auto* acc = static_cast<int32_t*>(t.acc);
  for (int i = 0; i < 32 * 32; i += 16)
    _mm512_storeu_si512(acc + i,
                        _mm512_add_epi32(_mm512_loadu_si512(acc + i), _mm512_load_si512(sums + i)));
}

// ---- kernels -----------------------------------------------------------------------------------

// kc: one operand's panel, parts * 32 rows * kc * 2 bytes, has to share L1 (48 KB) with the other's
// stream, and a block of A (a quarter of L2) be tall enough that C is not stored too often.
template <class Src, int Products, bool Round>
constexpr Kernel tile_kernel(const char* name, DType type) {
  constexpr int parts = Products == 1 ? 1 : Products == 6 ? 3 : 2;
  constexpr bool in_place = sizeof(Src) == 2 && Products == 1;
  return {.name = name,
          .a = type,
          .b = type,
          .mr = 32,
          .nr = 32,
          .k_word = 2,
          .k_step = 32,
          .kc = Products == 1 ? 1024 : 256,
          .a_bytes = 2 * parts,
          .b_bytes = 2 * parts,
          .pack_a = pack_a_tiles<Src, parts, Round>,
          .pack_b = pack_b_tiles<Src, parts, Round>,
          .tile = bf16_tiles<Products>,
          .store = store_f32,
          .direct_a = in_place,
          .split = Products != 1,
          .enter = tiles_enter,
          .leave = tiles_leave};
}

template <class A>
constexpr Kernel int8_tile_kernel(const char* name, DType type) {
  return {.name = name,
          .a = type,
          .b = DType::s8,
          .acc = DType::s32,
          .mr = 32,
          .nr = 32,
          .k_word = 4,
          .k_step = 64,
          .kc = 2048,
          .a_bytes = 1,
          .b_bytes = 1,
          .pack_a = pack_a_bytes<A>,
          .pack_b = pack_b_bytes,
          .tile = int8_tiles<(A(-1) < A(0))>,
          .store = store_s32,
          .direct_a = true,
          .runs = A(-1) > A(0),
          .enter = tiles_enter,
          .leave = tiles_leave};
}

#define FASTNN_AMX_KERNELS(prefix)                                                               \
  static constexpr Kernel e4m3 =                                                                 \
      tile_kernel<f8_e4m3, 1, false>(prefix " e4m3 as bf16 32x32", kE4M3);                       \
  static constexpr Kernel e5m2 =                                                                 \
      tile_kernel<f8_e5m2, 1, false>(prefix " e5m2 as bf16 32x32", kE5M2);                       \
  static const Kernel kernels[] = {                                                              \
      tile_kernel<float, 6, false>(prefix " f32 in 3 bf16, 6 products, 32x32", DType::f32),      \
      tile_kernel<bf16, 1, false>(prefix " bf16 32x32", DType::bf16),                            \
      tile_kernel<f16, 4, false>(prefix " f16 in 2 bf16, 4 products, 32x32", DType::f16),        \
      e4m3,                                                                                      \
      e5m2,                                                                                      \
      mixed_kernel(prefix " e4m3 e5m2 as bf16 32x32", e4m3, e5m2),                               \
      mixed_kernel(prefix " e5m2 e4m3 as bf16 32x32", e5m2, e4m3),                               \
      int8_tile_kernel<int8_t>(prefix " s8s8 32x32", DType::s8),                                 \
      int8_tile_kernel<uint8_t>(prefix " u8s8 32x32", DType::u8),                                \
      {},                                                                                        \
  };                                                                                             \
  static const Kernel high[] = {                                                                 \
      tile_kernel<float, 3, false>(prefix " f32 in 2 bf16, 3 products, 32x32", DType::f32), {}}; \
  static const Kernel medium[] = {                                                               \
      tile_kernel<float, 1, true>(prefix " f32 as bf16 32x32", DType::f32), {}};                 \
  static const Kernel* list(DType type, Precision p) {                                           \
    if (type != DType::f32 || p == Precision::highest) return kernels;                           \
    return p == Precision::high ? high : medium;                                                 \
  }

}  // namespace fastnn::FASTNN_TARGET
