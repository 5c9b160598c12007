// A 16 x 16 transpose of 32-bit words in registers. Include after isa/vec.hpp.
#pragma once

namespace fastnn::FASTNN_TARGET {

// row[i] word j becomes row[j] word i. Four rounds of 16 shuffles: pairs, quads, halves, quarters.
FASTNN_INLINE void transpose16(__m512i row[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    row[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    row[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    row[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    row[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // row[4g + c]: lane q holds words (4g..4g+3) of column 4q + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    t[c] = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    row[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
    row[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
    row[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
    row[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
  }
}

// Stores 16 transposed rows of words `ld` words apart, `room` words of each.
FASTNN_INLINE void store_words(const __m512i row[16], uint32_t* dst, int ld, int room) {
  const __mmask16 mask = __mmask16((1u << room) - 1);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_mask_storeu_epi32(dst + i * ld, mask, row[i]);
}

}  // namespace fastnn::FASTNN_TARGET
