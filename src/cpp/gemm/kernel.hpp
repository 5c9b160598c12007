// What one instruction set offers for one pair of types: the contract between the five loops of
// driver.cpp and the files in kernels/.
//
// A kernel multiplies a panel of A (up to mr rows) by a panel of B (up to nr columns) over one
// block of K, into a tile of accumulators of mr x nr, row-major. Panels are packed:
// K is cut into words of `k_word` elements and padded with zeros to a multiple of `k_step`.
#pragma once
#include "gemm/gemm.hpp"

namespace fastnn {

// What packing noticed. The split-product kernels cannot represent these; see gemm.cpp.
enum PackFlags : unsigned {
  kNonFinite = 1,  // an infinity or a NaN
  kTiny = 2,       // a panel that is not zero and all below 2^-45
  kVeryTiny = 4,   // likewise, below 2^-90
};

// Where a tile goes and what happens to it on the way.
struct Store {
  char* c;
  int64_t c_rs, c_cs;
  DType type;
  bool plain;  // a conversion to `type` and nothing else
  float alpha, beta;
  double alpha64, beta64;
  const char* residual;
  int64_t r_rs, r_cs;
  const char* bias;
  DType bias_type;
  BiasAxis bias_axis;
  int64_t bias_stride;
  int activation;
  const float* row_scale;
  const float* col_scale;
  // Of sums of integers: row_zero * col_sum is taken away first, exactly. A is then row_zero higher
  // than the numbers that it stands for, and col_sum holds the sums of B's columns.
  const int32_t* row_zero;
  const int32_t* col_sum;
  const Requantize* requantize;
  int64_t residual_size;  // of an element, in bytes
  const Pieces* columns;  // null: evenly apart; for the driver, not for a StoreFn
};

// One panel of up to mr (nr) lanes over kc elements of K; strides in elements.
using PackFn = unsigned (*)(void* panel, const void* src, int64_t lane_stride, int64_t k_stride,
                            int lanes, int64_t kc);
// What is left behind the `words` of K of a panel of B once all of it is packed: column sums.
using FinishFn = void (*)(void* panel, int64_t words);
// How a tile goes from the registers to a C whose columns are neighbours, all of one type: what
// most layers end with. Strides in bytes; null for what there is nothing of.
struct Finish {
  char* c;
  int64_t c_row;
  DType type;  // of C: that of the sums or bfloat16; of sums of integers, any that is not float64
  const char* residual;
  int64_t residual_row;
  const char* column_bias;
  const char* row_bias;
  int64_t row_bias_step;
  bool bounded;
  float low, high;
  // Of sums of integers alone, to which nothing else is added but a column_bias, of any such type.
  DType bias_type;
  const float *row_scale, *column_scale;
  const int32_t *row_zero, *column_sum;  // both or neither
  // Nothing but this to uint8 elements, from this column on, by kernels that requantize.
  const Requantize* requantize;
  int64_t column;
};
// One tile. Strides in bytes; they are those of a panel unless the operand is read where it lies.
struct TileArgs {
  int64_t words = 0;                // of K, in each run
  int64_t runs = 1;                 // more than one by kernels that finish
  const int64_t* a_runs = nullptr;  // how far each is from `a`; B goes on
  const char* a = nullptr;
  int64_t a_row = 0, a_word = 0;
  const char* b = nullptr;
  int64_t b_word = 0;
  int rows = 0, cols = 0;
  bool packed_a = true, packed_b = true;
  void* acc = nullptr;
  int64_t acc_row = 0;
  bool add = false;                // to what acc holds, instead of replacing it
  const Finish* finish = nullptr;  // where the sums go instead of acc, by kernels that finish
  // What a later tile reads, asked for a part at a time by kernels that finish: so many lines with
  // every line of words of K, and then others, `ahead_skip` bytes on. In one go they would wait for
  // each other, and the tile for them.
  const char* ahead = nullptr;
  int64_t ahead_lines = 0, ahead_skip = 0;
};
using TileFn = void (*)(const TileArgs&);
// Rows [i0, i0+rows) and columns [j0, j0+cols) of C from a tile whose rows are `ld` apart.
using StoreFn = void (*)(const void* acc, int ld, int rows, int cols, const Store&, int64_t i0,
                         int64_t j0);
// All dot products of rows x[0..rows) with w[0..cols), rows and cols <= kDotRows, kDotCols, into
// acc[rows][kDotCols]; both run along K with stride 1. Strides in elements.
using DotFn = void (*)(const void* x, int64_t x_stride, int rows, const void* w, int64_t w_stride,
                       int cols, int64_t k, void* acc);
constexpr int kDotRows = 4, kDotCols = 4;

struct Kernel {
  const char* name = nullptr;
  DType a = DType::f32, b = DType::f32, acc = DType::f32;  // as they lie in memory; accumulator
  int mr = 0, nr = 0;                                      // tile
  int k_word = 1;                                          // elements of K in a word
  int k_step = 1;                                          // K is padded to a multiple of it
  int64_t kc = 0;                                          // block of K, a multiple of k_step
  int64_t fold = 0;  // elements of K after which a tile begins another sum; 0: not within a block
  int a_bytes = 0, b_bytes = 0;  // packed bytes an element
  int b_extra = 0;               // further bytes a panel and block (column sums)
  PackFn pack_a = nullptr, pack_b = nullptr;
  FinishFn finish_b = nullptr;
  TileFn tile = nullptr;
  StoreFn store = nullptr;
  DotFn dot = nullptr;
  const char* dot_name = "";
  bool direct_a = false;      // can read A where it lies, along K or across
  bool direct_b = false;      // and B, across
  bool finishes = false;      // its tiles take a Finish, runs and `ahead`
  bool requantizes = false;   // its tiles of nr columns take a Finish that requantizes
  bool runs = false;          // its tiles take runs of uint8
  bool split = false;         // a split product: see split_refused
  bool few_rows = false;      // for at most mr rows, reading B in place
  void (*enter)() = nullptr;  // on each thread before and after its tiles
  void (*leave)() = nullptr;
};

// The kernels of an instruction set, ended by a null name; the first that fits is taken.
const Kernel* portable_kernels();
const Kernel* avx2_kernels();
const Kernel* avx512_kernels();
const Kernel* avx512_dot_kernels(DType, Precision);
const Kernel* amx_kernels(DType, Precision);
const Kernel* amx_emulated_kernels(DType, Precision);

// Register-only loops for `peak_flops`: the operations that `iterations` rounds do, or -1 where the
// instruction set has no such unit.
using PeakFn = double (*)(const char* kind, int64_t iterations);
double portable_peak(const char*, int64_t);
double avx2_peak(const char*, int64_t);
double avx512_peak(const char*, int64_t);
double avx512_dot_peak(const char*, int64_t);
double amx_peak(const char*, int64_t);

double timed_rate(PeakFn, const char* kind, double seconds);  // reduce.cpp

// The kernel that multiplies int8 or uint8 (`a`) by int8 on the active instruction set.
const Kernel& integer_kernel(DType a);
// The kernel of this type on the active instruction set; and the one that is no split product.
const Kernel& tile_kernel(DType type, bool exact_only);
const Kernel& exact_kernel(DType type);
// The kernel that packs float32 as this one, which reads packed operands alone, has its operands
// packed: for what an earlier product left, where its own type is another.
const Kernel& numbers_kernel(const Kernel& kernel);
// The kernel of this type, if its tiles take a Finish and K in pieces of any length, else null; and
// if they read A's rows where they lie as well.
const Kernel* runs_kernel(DType type, Precision precision, bool exact_only);
const Kernel* strips_kernel(DType type, Precision precision, bool exact_only);
// The one of uint8 with int8 that reads so many channels where they lie, without many zeros beside.
const Kernel& byte_strips_kernel(int64_t channels);

// driver.cpp: one problem without batches, on up to `threads` threads. False where the kernel is a
// split one and packing noticed what it cannot represent: C is then not what it should be, and to
// be computed again. See split_refused.
bool run_blocked(const Kernel&, const Gemm&, int threads);
bool run_panels(const Kernel&, const Gemm&, int threads);  // where there is a PanelSource
void run_strips(const Kernel&, const Gemm&, int threads);  // where there is a StripSource
void run_strips_transposed(const Kernel&, const Gemm&, int threads);
void run_dot(const Kernel&, const Gemm&, int threads);
bool split_refused(unsigned a_flags, unsigned b_flags);
Store make_store(const Gemm&);
size_t packed_b_bytes(const Kernel&, int64_t k, int64_t n);
unsigned pack_all_b(const Kernel&, const Matrix& b, int64_t k, int64_t n, char* dst, int thread,
                    int threads);

}  // namespace fastnn
