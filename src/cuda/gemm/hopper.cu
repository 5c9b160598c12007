// The matrix product for sm_90a. Blocks are persistent, one on each multiprocessor: they go through
// the tiles of C, and of each warp's threads there are two kinds. One thread of the first warpgroup
// has the copy engine bring tiles of A and B, as far ahead as there is room; the other two
// warpgroups multiply them with wgmma, 64 rows of C each, which stay in registers until C is
// written.
#include "cuda/gemm/hopper.hpp"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>

#include "cuda/device.hpp"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/gemm/parts.cuh"
#include "cuda/gemm/plain_sum.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/types.cuh"
#include "cuda/warpgroups.cuh"

#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // "declared but never referenced": other architectures' kernels are
                              // empty
#endif

namespace fastnn::cuda {
namespace {

constexpr int kRows = 128;    // of a tile
constexpr int kRowOfK = 128;  // bytes of K in a tile: one row of the swizzling pattern
constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kStageRoom = 220 << 10;  // bytes of shared memory for stages
constexpr int kTileStrip = 16;         // rows of tiles that are taken together, see tile_place()
// Multiprocessors of an H100 or H200. The shape of tiles and the number of splits are chosen for
// these, wherever it runs: they are not to change bits from one GPU to the next.
constexpr int kUsualBlocks = 132;

// ---- how a step is multiplied -------------------------------------------------------------------

// `name` chooses the instruction by the number of accumulators.
#define FASTNN_MODE(Mode, name, Of, SumType)                                                    \
  struct Mode {                                                                                 \
    static constexpr int kParts = 1, kSize = sizeof(Of);                                        \
    static constexpr bool kSplit = false;                                                       \
    using Sum = SumType;                                                                        \
    template <bool a_across, bool b_across, int count>                                          \
    __device__ static __forceinline__ void multiply(Sum (&sums)[count], uint64_t a, uint64_t b, \
                                                    bool accumulate) {                          \
      ptx::name<a_across, b_across>(sums, a, b, accumulate);                                    \
    }                                                                                           \
  };
FASTNN_MODE(HopperBf16, wgmma_bf16, __nv_bfloat16, float)
FASTNN_MODE(HopperF16, wgmma_f16, __half, float)
FASTNN_MODE(HopperS8, wgmma_s8, int8_t, int)
FASTNN_MODE(HopperU8, wgmma_u8_s8, uint8_t, int)
#undef FASTNN_MODE

// float32 as bfloat16 parts, of which the maps have one after the other in their outermost
// dimension.
template <int parts>
struct HopperParts : HopperBf16 {
  static constexpr int kParts = parts;
  static constexpr bool kSplit = true;
};

// ---- tiles in shared memory ---------------------------------------------------------------------

// `extent` rows of A, or columns of B, times 128 bytes of K. K runs along the rows of 128 bytes,
// or, `across`, 64 elements of M or N do (16-bit ones), in as many boxes as it takes.
template <int size, int extent, bool across>
struct HopperTile {
  static constexpr int kBytes = extent * kRowOfK;
  static constexpr int kBoxExtent = across ? kRowOfK / size : extent;
  static constexpr int kBoxBytes = kBoxExtent * kRowOfK;
  static_assert(!across || size == 2);

  __device__ static __forceinline__ void load(char* to, const TensorMap& map, uint64_t* full,
                                              int first, int k, const int (&batch)[3], bool deep) {
#pragma unroll
    for (int box = 0; box < extent / kBoxExtent; box++) {
      const int from = first + box * kBoxExtent;
      const int inner = across ? from : k, outer = across ? k : from;
      if (deep)
        ptx::copy_tile<5>(to + box * kBoxBytes, map, full,
                          {inner, outer, batch[0], batch[1], batch[2]});
      else
        ptx::copy_tile<3>(to + box * kBoxBytes, map, full, {inner, outer, batch[0]});
    }
  }
  // Of the rows or columns from `first` on, a multiple of 64.
  __device__ static __forceinline__ uint64_t descriptor(const char* tile, int first) {
    return ptx::matrix_descriptor(tile + first * kRowOfK, across ? kBoxBytes : kPieceBytes,
                                  kPattern, Swizzle::bytes128);
  }
  // From one instruction's 32 bytes of K to the next: within the pattern's rows, or 16 rows on.
  static constexpr uint64_t kNext = (across ? 16 * kRowOfK : 32) / 16;
};
constexpr int kInstructions = kRowOfK / 32;  // of a step of one tile

// ---- the kernel ---------------------------------------------------------------------------------

struct Work {
  // What is counted here is less than 2 to the power of 31, so that divisions are short.
  uint32_t rows, columns;  // of tiles
  uint32_t steps;          // of K
  uint32_t splits, steps_each;
  uint32_t count;        // of all pieces of work
  int64_t split_stride;  // elements of C from one split's sums to the next one's
  // Batches are the third coordinate of the maps or, deep, the third to the fifth, the innermost of
  // which count to `batch`. Steps are from one to the next, 0 where an operand is shared.
  bool deep;
  uint32_t batch[2];
  int a_step[3], b_step[3];
  int a_parts, b_parts;  // of the third coordinate from part to part
};

struct Piece {
  uint32_t batch, split, first_step, steps;
  int64_t row, column;
};

// The splits of a tile follow each other, so that they read the same tiles' neighbours at a time.
__device__ __forceinline__ Piece piece_of(const Work& w, uint32_t index, int columns) {
  Piece p;
  p.split = index % w.splits, index /= w.splits;
  p.batch = index / (w.rows * w.columns);
  const TilePlace place =
      tile_place(index - p.batch * w.rows * w.columns, w.rows, w.columns, kTileStrip);
  p.row = place.row * kRows, p.column = place.column * columns;
  p.first_step = p.split * w.steps_each;
  p.steps = w.steps - p.first_step < w.steps_each ? w.steps - p.first_step : w.steps_each;
  return p;
}

// Eight neighbours in C, alpha times their sums.
template <class Sum>
__device__ __forceinline__ void write_eight(const Gemm& g, int64_t to, const Sum (&sums)[8]) {
  void* c = const_cast<void*>(g.c.data);
  if constexpr (std::is_same_v<Sum, int>)
    if (g.out == DType::s32) {
      uint32_t words[8];
#pragma unroll
      for (int e = 0; e < 8; e++) words[e] = uint32_t(sums[e]);
      return store_words(static_cast<int*>(c) + to, words);
    }
  float x[8];
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = float(sums[e]) * g.alpha;
  write_all(g.out, c, to, x);
}

// From a warp's 16 rows of sums to C. `simple`: C is alpha times the sums, and so aligned that it
// is written 16 bytes at a time; that is unrolled, as registers have no index. For all the rest the
// sums move down by 16 registers at a time instead, past one copy of much code.
template <bool split, int count, class Sum>
__device__ __forceinline__ void write_rows(const Gemm& g, const Placed& at, Sum (&sums)[count],
                                           int64_t first_row, int64_t first_column, bool simple) {
  constexpr float kMost = 3.402823466e38f;
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = first_row + lane / 4;
  if constexpr (split) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < count; i++) finite = finite && fabsf(float(sums[i])) <= kMost;
    simple = simple && __all_sync(~0u, finite);
  }
  if (simple) {
#pragma unroll
    for (int j = 0; j < count / 4; j += 4)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Sum eight[8];
#pragma unroll
        for (int i = 0; i < 8; i++) eight[i] = sums[4 * (j + i / 2) + 2 * half + i % 2];
        gather_columns(eight);
        const int64_t column = first_column + 8 * (j + lane % 4);
        if (row + 8 * half < g.m && column < g.n)
          write_eight(g, at.c + (row + 8 * half) * g.c.row + column, eight);
      }
    return;
  }
#pragma unroll 1
  for (int j = 0; j < count / 4; j += 4) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Sum eight[8];
#pragma unroll
      for (int i = 0; i < 8; i++) eight[i] = sums[4 * (i / 2) + 2 * half + i % 2];
      gather_columns(eight);
      const int64_t column = first_column + 8 * (j + lane % 4);
      const int64_t left = row + 8 * half < g.m ? g.n - column : 0;
      if constexpr (split) {
        // Parts of an infinity, or of a number whose products leave float32's range on the way,
        // multiply to NaN where float32 has a number or an infinity.
#pragma unroll
        for (int e = 0; e < 8; e++)
          if (e < left && !(fabsf(eight[e]) <= kMost))
            eight[e] = plain_sum<float>(g, at, row + 8 * half, column + e);
      }
      if (left > 0) finish(g, at, row + 8 * half, column, eight, left < 8 ? int(left) : 8);
    }
#pragma unroll
    for (int i = 0; i + 16 < count; i++) sums[i] = sums[i + 16];
  }
}

template <class Mode, int columns, bool a_across, bool b_across>
struct Kernel {
  static constexpr int kParts = Mode::kParts;
  using Sum = typename Mode::Sum;
  using A = HopperTile<Mode::kSize, kRows, a_across>;
  using B = HopperTile<Mode::kSize, columns, b_across>;
  static constexpr int kStageBytes = kParts * (A::kBytes + B::kBytes);
  static constexpr int kStages = kStageRoom / kStageBytes;
  static constexpr size_t kShared = kStages * kStageBytes + 2 * kStages * sizeof(uint64_t);
  static_assert(kStages >= 2);
  using Stages = Turn<kStages>;
  static constexpr int kSums = columns / 2;

  __device__ static __forceinline__ uint64_t* full(int stage) {
    return reinterpret_cast<uint64_t*>(dynamic_shared<char>() + kStages * kStageBytes) + stage;
  }
  __device__ static __forceinline__ uint64_t* empty(int stage) { return full(kStages + stage); }
  __device__ static __forceinline__ char* a_tile(int stage, int part) {
    return dynamic_shared<char>() + stage * kStageBytes + part * A::kBytes;
  }
  __device__ static __forceinline__ char* b_tile(int stage, int part) {
    return a_tile(stage, kParts) + part * B::kBytes;
  }

  __device__ static __forceinline__ void produce(const TensorMap& a, const TensorMap& b,
                                                 const Work& w) {
    Stages turn;
    for (uint32_t index = blockIdx.x; index < w.count; index += gridDim.x) {
      const Piece p = piece_of(w, index, columns);
      int batch[3] = {int(p.batch), 0, 0};
      if (w.deep) {
        const uint32_t outer = p.batch / w.batch[0];
        batch[0] = int(p.batch % w.batch[0]);
        batch[1] = int(outer % w.batch[1]), batch[2] = int(outer / w.batch[1]);
      }
      for (uint32_t step = 0; step < p.steps; step++, turn.next()) {
        ptx::mbarrier_wait(empty(turn.stage), turn.parity ^ 1);
        uint64_t* barrier = full(turn.stage);
        ptx::mbarrier_arrive_expect(barrier, kStageBytes);
        const int at_k = int((p.first_step + step) * (kRowOfK / Mode::kSize));
#pragma unroll
        for (int part = 0; part < kParts; part++) {
          const int in_a[3] = {batch[0] * w.a_step[0] + part * w.a_parts, batch[1] * w.a_step[1],
                               batch[2] * w.a_step[2]};
          const int in_b[3] = {batch[0] * w.b_step[0] + part * w.b_parts, batch[1] * w.b_step[1],
                               batch[2] * w.b_step[2]};
          A::load(a_tile(turn.stage, part), a, barrier, int(p.row), at_k, in_a, w.deep);
          B::load(b_tile(turn.stage, part), b, barrier, int(p.column), at_k, in_b, w.deep);
        }
      }
    }
  }

  // sums (+)= part `left` of A times part `right` of B.
  __device__ static __forceinline__ void multiply(Sum (&sums)[kSums], int stage, int first_row,
                                                  int left, int right, bool accumulate) {
    const uint64_t a = A::descriptor(a_tile(stage, left), first_row);
    const uint64_t b = B::descriptor(b_tile(stage, right), 0);
#pragma unroll
    for (int i = 0; i < kInstructions; i++)
      Mode::template multiply<a_across, b_across>(sums, a + i * A::kNext, b + i * B::kNext,
                                                  accumulate || i > 0);
  }

  // What was read of a stage may be written over.
  __device__ static __forceinline__ void release(int stage) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty(stage));
  }

  // One product a step: the next is begun before the last is waited for.
  __device__ static __forceinline__ void sum_up(Sum (&sums)[kSums], Stages& turn, uint32_t steps,
                                                int first_row) {
    int before = 0;
    for (uint32_t step = 0; step < steps; step++, turn.next()) {
      ptx::mbarrier_wait(full(turn.stage), turn.parity);
      ptx::wgmma_fence();
      multiply(sums, turn.stage, first_row, 0, 0, step > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (step > 0) release(before);
      before = turn.stage;
    }
    ptx::wgmma_wait<0>();
    release(before);
  }

  // float32 in parts i, j of A, B with i + j < kParts; the other products are below float32's own
  // error. Tensor cores cut their sums instead of rounding them, so that a long chain would drift:
  // sums begin anew in every step, those of the first parts apart from the others, which they would
  // cut.
  __device__ static __forceinline__ void sum_up_parts(Sum (&sums)[kSums], Stages& turn,
                                                      uint32_t steps, int first_row) {
#pragma unroll
    for (int i = 0; i < kSums; i++) sums[i] = 0;
    for (uint32_t step = 0; step < steps; step++, turn.next()) {
      Sum first[kSums], others[kSums];
      ptx::mbarrier_wait(full(turn.stage), turn.parity);
      ptx::wgmma_fence();
      multiply(first, turn.stage, first_row, 0, 0, false);
#pragma unroll
      for (int order = kParts - 1; order > 0; order--)
#pragma unroll
        for (int left = order; left >= 0; left--)
          multiply(others, turn.stage, first_row, left, order - left,
                   order < kParts - 1 || left < order);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      release(turn.stage);
#pragma unroll
      for (int i = 0; i < kSums; i++) sums[i] += first[i] + others[i];
    }
  }

  __device__ static __forceinline__ void consume(const Gemm& g, const Work& w, bool simple) {
    Stages turn;
    const int first_row = (int(threadIdx.x) / 128 - 1) * 64;
    for (uint32_t index = blockIdx.x; index < w.count; index += gridDim.x) {
      const Piece p = piece_of(w, index, columns);
      Sum sums[kSums];
      if constexpr (kParts > 1)
        sum_up_parts(sums, turn, p.steps, first_row);
      else
        sum_up(sums, turn, p.steps, first_row);
      Placed at = at_batch(g, p.batch, Mode::kSplit ? int(sizeof(float)) : Mode::kSize);
      at.c += p.split * w.split_stride;
      write_rows<Mode::kSplit>(g, at, sums, p.row + first_row + int(threadIdx.x) % 128 / 32 * 16,
                               p.column, simple);
    }
  }

  __device__ static __forceinline__ void run(const TensorMap& a, const TensorMap& b, const Gemm& g,
                                             const Work& w, bool simple) {
    if (threadIdx.x == 0) {
      ptx::prefetch_map(a), ptx::prefetch_map(b);
      for (int s = 0; s < kStages; s++) {
        ptx::mbarrier_init(full(s), 1);
        ptx::mbarrier_init(empty(s), 4 * kConsumers);  // a thread of each warp
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    // What the producer has no use for, the accumulators have.
    if (threadIdx.x < 128) {
      ptx::fewer_registers<40>();
      if (threadIdx.x == 0) produce(a, b, w);
    } else {
      ptx::more_registers<232>();
      consume(g, w, simple);
    }
  }
};

template <class Mode, int columns, bool a_across, bool b_across>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroups(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
               const __grid_constant__ Gemm g, const __grid_constant__ Work work,
               const bool simple) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  Kernel<Mode, columns, a_across, b_across>::run(a, b, g, work, simple);
#endif
}

// C of the splits' sums, added up in their order.
template <class Sum>
__global__ void __launch_bounds__(256)
    add_splits(const Gemm g, const Sum* sums, const int64_t splits, const int64_t split_stride,
               const int64_t fours, const int64_t count) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= count) return;
  const int64_t column = index % fours * 4, line = index / fours;
  const int64_t row = line % g.m, batch = line / g.m;
  const int left = g.n - column < 4 ? int(g.n - column) : 4;
  const Sum* from = sums + line * g.n + column;
  Sum x[4] = {};
  for (int64_t s = 0; s < splits; s++, from += split_stride)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (e < left) x[e] += from[e];
  finish(g, at_batch(g, batch, 1), row, column, x, left);
}

// ---- from a product to its launch ---------------------------------------------------------------

// Of tiles, steps, and what the coordinates of tensor maps count, with room for a tile.
constexpr int64_t kMostCounted = (int64_t(1) << 31) - 512;

// The batches as up to three dimensions, innermost first, in each of which both operands have a
// stride (0: they are shared).
struct Batches {
  int dims = 0;
  int64_t size[3] = {1, 1, 1}, a[3] = {}, b[3] = {};
};

bool group_batches(const Gemm& g, Batches& out) {
  for (int d = g.batch_dims - 1; d >= 0; d--) {
    if (g.batch[d] == 1) continue;
    const int last = out.dims - 1;
    if (last >= 0 && g.a.batch[d] == out.a[last] * out.size[last] &&
        g.b.batch[d] == out.b[last] * out.size[last]) {
      out.size[last] *= g.batch[d];
      continue;
    }
    if (out.dims == 3) return false;
    out.size[out.dims] = g.batch[d], out.a[out.dims] = g.a.batch[d];
    out.b[out.dims++] = g.b.batch[d];
  }
  return true;
}

struct Lying {
  TensorLayout layout;
  bool across = false;
  int step[3] = {};  // see Work
};

// How an operand lies, whose extent is M or N; false where no map can say so.
bool describe(const void* data, int64_t extent, int64_t extent_stride, int64_t k, int64_t k_stride,
              const Batches& batches, const int64_t (&strides)[3], int size, int box,
              bool batch_invariant, Lying& out) {
  const bool along = k_stride == 1 || k == 1;
  out.across = !along;
  if (!along && (extent_stride != 1 && extent != 1)) return false;
  if (!along && size != 2) return false;  // wgmma takes only 16-bit elements across
  TensorLayout& t = out.layout;
  t.data = data, t.element_bytes = size, t.swizzle = Swizzle::bytes128;
  t.dims = batches.dims > 1 ? 5 : 3;
  const int depth = kRowOfK / size;
  t.sizes[0] = along ? k : extent, t.sizes[1] = along ? extent : k;
  t.box[0] = depth, t.box[1] = along ? box : depth;
  // A dimension of one element may have any stride: one that the map takes. But a row alone is not
  // to go another way than the same row among others.
  const int64_t least = ceil_div(t.sizes[0] * size, 16) * 16;
  t.strides[1] =
      t.sizes[1] == 1 && !batch_invariant ? least : (along ? extent_stride : k_stride) * size;
  for (int d = 0; d < 3; d++) {
    out.step[d] = strides[d] != 0;
    t.sizes[2 + d] = out.step[d] ? batches.size[d] : 1, t.box[2 + d] = 1;
    t.strides[2 + d] = out.step[d] ? strides[d] * size : least;
  }
  return t.strides[1] >= t.sizes[0] * size && why_no_tensor_map(t) == nullptr;
}

bool is_shared(const Gemm& g, const Operand& x) {
  for (int d = 0; d < g.batch_dims; d++)
    if (g.batch[d] > 1 && x.batch[d] != 0) return false;
  return true;
}

void set_batches(const Batches& batches, const Lying& a, const Lying& b, Work& w) {
  w.deep = batches.dims > 1;
  w.batch[0] = uint32_t(batches.size[0]), w.batch[1] = uint32_t(batches.size[1]);
  std::copy(a.step, a.step + 3, w.a_step), std::copy(b.step, b.step + 3, w.b_step);
}

int64_t batches_of(const Gemm& g) {
  int64_t batches = 1;
  for (int d = 0; d < g.batch_dims; d++) batches *= g.batch[d];
  return batches;
}

Operand turned(Operand x) {
  std::swap(x.row, x.column);
  return x;
}

// C transposed is B transposed times A transposed: where C's columns are contiguous, so that what
// neighbouring threads write is.
Gemm turned(const Gemm& g) {
  Gemm t = g;
  t.m = g.n, t.n = g.m;
  t.a = turned(g.b), t.b = turned(g.a), t.c = turned(g.c), t.residual = turned(g.residual);
  t.row_scale = g.col_scale, t.col_scale = g.row_scale;
  if (g.bias_axis != BiasAxis::none)
    t.bias_axis = g.bias_axis == BiasAxis::row ? BiasAxis::column : BiasAxis::row;
  return t;
}

// Whether C is alpha times the sums and lies in pieces of eight that are whole and aligned.
bool is_simple(const Gemm& g) {
  const int64_t piece = g.out == DType::bf16 || g.out == DType::f16 ? 16 : 32;
  if (g.c.column != 1 || g.n % 8 || g.c.row % 8 ||
      reinterpret_cast<uintptr_t>(g.c.data) % std::min<int64_t>(piece, 16))
    return false;
  for (int d = 0; d < g.batch_dims; d++)
    if (g.batch[d] > 1 && g.c.batch[d] % 8) return false;
  return !g.row_scale && !g.col_scale && g.bias_axis == BiasAxis::none && !g.residual.data &&
         g.activation == kNone;
}

std::atomic<int64_t> started = 0;

template <class Mode, int columns, bool a_across, bool b_across>
void start(const Gemm& g, const Lying& a, const Lying& b, const Work& w, void* stream) {
  using K = Kernel<Mode, columns, a_across, b_across>;
  const unsigned blocks = unsigned(std::min<int64_t>(w.count, multiprocessors()));
  launch(warpgroups<Mode, columns, a_across, b_across>, dim3(blocks), dim3(kThreads), K::kShared,
         stream, tensor_map(a.layout), tensor_map(b.layout), g, w, is_simple(g));
  started++;
}

template <class Mode, int columns>
void choose_layout(const Gemm& g, const Lying& a, const Lying& b, const Work& w, void* stream) {
  if constexpr (Mode::kSplit || Mode::kSize != 2)
    start<Mode, columns, false, false>(g, a, b, w, stream);
  else if (a.across)
    b.across ? start<Mode, columns, true, true>(g, a, b, w, stream)
             : start<Mode, columns, true, false>(g, a, b, w, stream);
  else
    b.across ? start<Mode, columns, false, true>(g, a, b, w, stream)
             : start<Mode, columns, false, false>(g, a, b, w, stream);
}

// Whether tiles of 256 columns take less time than twice as many of 128, which read more.
bool wide(int64_t batches, int64_t m, int64_t n) {
  const int64_t rows = ceil_div(m, kRows) * batches;
  const int64_t rounds_wide = ceil_div(rows * ceil_div(n, 256), kUsualBlocks),
                rounds = ceil_div(rows * ceil_div(n, 128), kUsualBlocks);
  return 20 * rounds_wide <= 11 * rounds;
}

// How many ways K is split where there are few tiles: by the shape alone.
int64_t splits_of(int size, int64_t batches, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kFewestSteps = 8;  // of a split
  const int64_t tiles = ceil_div(m, kRows) * ceil_div(n, 128) * batches;
  const int64_t steps = ceil_div(k * size, kRowOfK);
  return std::max<int64_t>(1, std::min(kUsualBlocks / tiles, steps / kFewestSteps));
}

// False where it is too much to be counted.
bool count_work(const Gemm& g, int columns, int size, int64_t batches, int64_t splits, Work& w) {
  const int64_t rows = ceil_div(g.m, kRows), across = ceil_div(g.n, columns);
  const int64_t steps = ceil_div(g.k * size, kRowOfK), each = ceil_div(steps, splits);
  const int64_t used = ceil_div(steps, each);  // splits, none without a step
  if (rows * across > kMostCounted / batches / used) return false;
  w.rows = uint32_t(rows), w.columns = uint32_t(across), w.steps = uint32_t(steps);
  w.steps_each = uint32_t(each), w.splits = uint32_t(used);
  w.count = uint32_t(rows * across * batches * used);
  return true;
}

template <class Mode>
bool multiply(Gemm g, void* stream) {
  if (g.c.column != 1 && g.c.row == 1 && g.a_type != DType::u8) g = turned(g);
  const int64_t batches = batches_of(g);
  const int64_t splits = g.batch_invariant ? 1 : splits_of(Mode::kSize, batches, g.m, g.n, g.k);
  const bool wide_tiles = splits == 1 && wide(batches, g.m, g.n);
  const int columns = wide_tiles ? 256 : 128;
  Batches of;
  Lying a, b;
  if (!group_batches(g, of) ||
      !describe(g.a.data, g.m, g.a.row, g.k, g.a.column, of, of.a, Mode::kSize, kRows,
                g.batch_invariant, a) ||
      !describe(g.b.data, g.n, g.b.column, g.k, g.b.row, of, of.b, Mode::kSize, columns,
                g.batch_invariant, b))
    return false;
  Work w{};
  if (!count_work(g, columns, Mode::kSize, batches, splits, w)) return false;
  set_batches(of, a, b, w);
  if (w.splits == 1) {
    wide_tiles ? choose_layout<Mode, 256>(g, a, b, w, stream)
               : choose_layout<Mode, 128>(g, a, b, w, stream);
    return true;
  }

  if (g.workspace_bytes < int64_t(w.splits) * batches * g.m * g.n * 4) return false;
  // The splits' sums, one C after another.
  using Sum = typename Mode::Sum;
  Gemm sums;
  sums.m = g.m, sums.n = g.n, sums.k = g.k, sums.batch_dims = 1, sums.batch[0] = batches;
  sums.a_type = g.a_type, sums.out = std::is_same_v<Sum, int> ? DType::s32 : DType::f32;
  sums.c.data = g.workspace, sums.c.row = g.n, sums.c.column = 1, sums.c.batch[0] = g.m * g.n;
  w.split_stride = batches * g.m * g.n;
  choose_layout<Mode, 128>(sums, a, b, w, stream);
  const int64_t fours = ceil_div(g.n, 4), count = fours * g.m * batches;
  launch(add_splits<Sum>, dim3(unsigned(ceil_div(count, 256))), dim3(256), 0, stream, g,
         static_cast<const Sum*>(g.workspace), w.splits, w.split_stride, fours, count);
  return true;
}

// Without so many rows, columns and depth the parts take longer to make than they save.
constexpr int64_t kFewestOfParts = 1024, kFewestDepthOfParts = 256;
constexpr int64_t kMostPartsBytes = int64_t(4) << 30;

// float32: parts of both operands are made first, K along their rows, whichever way they lay.
template <int parts>
bool multiply_parts(Gemm g, void* stream) {
  constexpr int kColumns = 128;
  if (g.workspace_bytes == 0) return false;
  if (g.c.column != 1 && g.c.row == 1) g = turned(g);
  const int64_t batches = batches_of(g), depth = padded_depth(g.k);
  const int64_t a_batches = is_shared(g, g.a) ? 1 : batches,
                b_batches = is_shared(g, g.b) ? 1 : batches;
  if (g.workspace_bytes < parts * (a_batches * g.m + b_batches * g.n) * depth * 2) return false;
  auto* a_parts = static_cast<__nv_bfloat16*>(g.workspace);
  auto* b_parts = a_parts + parts * a_batches * g.m * depth;

  // The first parts of all batches, then the second ones.
  Batches of;
  of.dims = 1;
  Lying a, b;
  Work w{};
  of.size[0] = parts * a_batches, of.a[0] = g.m * depth;
  if (!describe(a_parts, g.m, depth, g.k, 1, of, of.a, 2, kRows, false, a)) return false;
  of.size[0] = parts * b_batches, of.b[0] = g.n * depth;
  if (!describe(b_parts, g.n, depth, g.k, 1, of, of.b, 2, kColumns, false, b)) return false;
  if (!count_work(g, kColumns, 2, batches, 1, w)) return false;
  w.a_step[0] = a_batches > 1, w.b_step[0] = b_batches > 1;
  w.a_parts = int(a_batches), w.b_parts = int(b_batches);

  make_parts(g, g.a, g.m, g.a.row, g.a.column, parts, a_batches, a_parts, stream);
  make_parts(g, g.b, g.n, g.b.column, g.b.row, parts, b_batches, b_parts, stream);
  start<HopperParts<parts>, kColumns, false, false>(g, a, b, w, stream);
  return true;
}

}  // namespace

int64_t hopper_workspace(DType a_type, int parts, int64_t batches, int64_t m, int64_t n, int64_t k,
                         bool batch_invariant) {
  if (batch_invariant || !batches || !m || !n || !k) return 0;
  if (a_type == DType::f32) {
    if (std::min(m, n) < kFewestOfParts || k < kFewestDepthOfParts) return 0;
    const int64_t bytes = parts * batches * (m + n) * padded_depth(k) * 2;
    return bytes <= kMostPartsBytes ? bytes : 0;
  }
  const int size = a_type == DType::bf16 || a_type == DType::f16 ? 2 : 1;
  const int64_t splits = splits_of(size, batches, m, n, k);
  return splits > 1 ? splits * batches * m * n * 4 : 0;
}

int64_t gemms_on_hopper() { return started; }

bool gemm_on_hopper(const Gemm& g, void* stream) {
  if (g.m > kMostCounted || g.n > kMostCounted || g.k > kMostCounted ||
      batches_of(g) > kMostCounted / g.parts)
    return false;
  switch (g.a_type) {
    case DType::f32:
      return g.parts == 3   ? multiply_parts<3>(g, stream)
             : g.parts == 2 ? multiply_parts<2>(g, stream)
                            : multiply_parts<1>(g, stream);
    case DType::bf16:
      return multiply<HopperBf16>(g, stream);
    case DType::f16:
      return multiply<HopperF16>(g, stream);
    case DType::s8:
      return multiply<HopperS8>(g, stream);
    case DType::u8:
      return multiply<HopperU8>(g, stream);
    default:
      return false;
  }
}

}  // namespace fastnn::cuda
