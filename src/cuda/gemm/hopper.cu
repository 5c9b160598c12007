// The matrix product for sm_90a. Blocks are persistent, one on each multiprocessor: they go through
// the tiles of C, and of each warp's threads there are two kinds. One thread of the first warpgroup
// has the copy engine bring tiles of A and B, as far ahead as there is room; the other two
// warpgroups multiply them with wgmma, 64 rows of C each, which stay in registers until C is
// written.
#include "cuda/gemm/hopper.hpp"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cuda/device.hpp"
#include "cuda/gemm/hopper_epilogue.cuh"
#include "cuda/gemm/hopper_work.cuh"
#include "cuda/gemm/parts.cuh"
#include "cuda/ptx_sm90.cuh"

#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // "declared but never referenced": other architectures' kernels are
                              // empty
#endif

namespace fastnn::cuda {
namespace {

constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kStageRoom = 220 << 10;  // bytes of shared memory for stages

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

// ---- the kernel ---------------------------------------------------------------------------------

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
      const PieceOfWork p = piece_of(w, index, columns);
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
      const PieceOfWork p = piece_of(w, index, columns);
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
