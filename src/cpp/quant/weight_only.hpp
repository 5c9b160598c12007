// A linear layer whose weight alone is quantized: y = activation(x Wᵀ + bias), where
//
//   W[n, k] = (q[n, k] - zero_point[n, g]) * scale[n, g],    g = k / group
//
// with x in float32, bfloat16 or float16. Every q is exact in bfloat16, and so is q minus a zero
// point of its range; no weight is ever rounded to 16 bits after it was scaled.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"
#include "gemm/gemm.hpp"

namespace fastnn {

// Four bits are two a byte, the element of even index in the low half. Shared with
// python/fastnn/backends/cpu/weight_only.py.
enum class WeightFormat : int { s8 = 0, s4 = 1, u4 = 2, e4m3 = 3, e5m2 = 4 };
constexpr int kWeightFormats = 5;
constexpr bool is_nibble(WeightFormat f) { return f == WeightFormat::s4 || f == WeightFormat::u4; }
constexpr int64_t weight_bytes(WeightFormat f, int64_t elements) {
  return is_nibble(f) ? elements / 2 : elements;
}

struct WeightOnly {
  int64_t m, n, k;
  DType type;  // of x and out: f32, bf16, f16
  const char* x;
  int64_t x_row;  // elements; those of a row are neighbours
  WeightFormat format;
  const uint8_t* w;
  int64_t w_row;        // bytes
  int64_t groups;       // in a row, of k / groups elements each; at least 1
  const float* scale;   // (n, groups)
  const int32_t* zero;  // likewise, or null
  const char* bias;     // (n), or null
  DType bias_type;
  int activation;
  char* out;  // (m, n)
  Precision precision;
  bool batch_invariant;
};
void weight_only(const WeightOnly& call);

// ---- the kernels of one instruction set --------------------------------------------------------

// How scales and blocks go together: one for some blocks, one for each, or several in a block.
enum class Scales : int { of_segments, of_blocks, in_block };

// What a few rows of x are multiplied with. K is cut into blocks, as many elements as the decoder
// of a format takes at once; x is packed in the decoder's order, padded with zeros to whole blocks.
struct FewRows {
  int64_t k;
  const char* x;
  int64_t x_row;  // bytes
  const uint8_t* w;
  int64_t w_row;
  const float* scale;
  const int32_t* zero;
  int64_t groups;
  const float* x_sums;  // (rows, groups), where there are zero points
  Scales way;
  int64_t segment;     // blocks that are summed before they are scaled
  int64_t scale_step;  // scales from a segment, or a block, to the next
  int32_t index[16];   // in_block: which of a block's scales is that of a lane
};

constexpr int64_t kFewRows = 8;  // that take part while a block is in registers

// int8 in halves, for vdpbf16ps and one row or two: more products, but fewer conversions.
constexpr int kHalves = kWeightFormats;

struct WeightOnlyKernels {
  // For few rows: elements in a block, bytes of an element of x as it is packed, and of a block.
  int block[kWeightFormats + 1];
  int x_bytes, x_block[kWeightFormats + 1];
  // A row of x, `type` elements, in a decoder's order.
  void (*pack_x[kWeightFormats + 1])(const char* x, DType type, int64_t k, char* out);
  // sums[r * ld + c] of rows [i, i + rows) and columns [n, n + columns).
  void (*few_rows[kWeightFormats + 1])(const FewRows& f, int64_t i, int rows, int64_t n,
                                       int columns, float* sums, int64_t ld);
  // The sums of the groups of a row of x.
  void (*group_sums)(const char* x, DType type, int64_t groups, int64_t group, float* sums);
  // For many: elements [k0, k0 + count) of `columns` rows of the weight, as (q - zero) * scale in
  // float32, to out[k * ld + column], the columns up to ld, a multiple of 8, as zeros. Or of one
  // row, as q - zero in bfloat16.
  void (*decode_f32[kWeightFormats])(const uint8_t* w, int64_t w_row, int columns, int64_t k0,
                                     int64_t count, int64_t group, const float* scale,
                                     const int32_t* zero, int64_t groups, float* out, int ld);
  void (*decode_bf16[kWeightFormats])(const uint8_t* w, int64_t k0, int64_t count, int64_t group,
                                      const int32_t* zero, bf16* out);
  // total = [total +] sums * scale, by columns, which there are `ld` of, whole vectors.
  void (*add_scaled)(float* total, const float* sums, const float* scale, int rows, int ld,
                     bool add);
  void (*widen)(const char* x, DType type, int64_t n, float* out);
  // Elements [k0, k0 + count) of so many rows of the weight as q - zero, bfloat16, in a panel of 32
  // columns of words of two, those that are not there as zeros. Null: of the decoders above.
  void (*make_panel[kWeightFormats])(const uint8_t* w, int64_t w_row, int columns, int64_t k0,
                                     int64_t count, int64_t group, const int32_t* zero,
                                     int64_t groups, char* panel);
  // total[i * 32 + j] = [that +] the products of rows of x, bfloat16 that lie as they are, `x_row`
  // bytes apart, with a panel of 32 columns of words of two; each segment of so many words has
  // scales of its own. Null where this is no instruction's work.
  void (*scaled_tile)(const char* x, int64_t x_row, int rows, const char* panel, int64_t words,
                      int64_t segments, const float* scales, float* total, bool add);
};

const WeightOnlyKernels& portable_weight_only();
const WeightOnlyKernels& avx2_weight_only();
const WeightOnlyKernels& avx512_weight_only();
// Those which multiply bfloat16 with vdpbf16ps, for x of that type.
const WeightOnlyKernels& avx512_dot_weight_only();

}  // namespace fastnn
