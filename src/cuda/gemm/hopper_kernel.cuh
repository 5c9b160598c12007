// The matrix product for sm_90a. Blocks are persistent, one on each multiprocessor: they go through
// the tiles of C, and of each warp's threads there are two kinds. One thread of the first warpgroup
// has the copy engine bring tiles of A and B, as far ahead as there is room; the other two
// warpgroups multiply them with wgmma, 64 rows of C each, which stay in registers until C is
// written.
//
// A Mode says how a step is multiplied: hopper.cu has those of 16-bit numbers, integers and float32
// in parts, hopper_float8.cu those of 8-bit floats.
#pragma once
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cuda/device.hpp"
#include "cuda/gemm/hopper_epilogue.cuh"
#include "cuda/gemm/hopper_work.cuh"
#include "cuda/ptx_sm90.cuh"

#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // "declared but never referenced": other architectures' kernels are
                              // empty
#endif

namespace fastnn::cuda {

constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kStageRoom = 220 << 10;  // bytes of shared memory for stages

// `name` chooses the instruction by the number of accumulators.
#define FASTNN_HOPPER_MODE(Mode, name, Of, SumType)                                             \
  struct Mode {                                                                                 \
    static constexpr int kParts = 1, kSize = sizeof(Of);                                        \
    static constexpr bool kSplit = false, kFloat8 = false;                                      \
    using Sum = SumType;                                                                        \
    template <bool a_across, bool b_across, int count>                                          \
    __device__ static __forceinline__ void multiply(Sum (&sums)[count], uint64_t a, uint64_t b, \
                                                    bool accumulate) {                          \
      ptx::name<a_across, b_across>(sums, a, b, accumulate);                                    \
    }                                                                                           \
  };

// ---- the kernel ---------------------------------------------------------------------------------

template <class Mode, int columns, bool a_across, bool b_across>
struct HopperKernel {
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
  template <class By = Mode>
  __device__ static __forceinline__ void multiply(Sum (&sums)[kSums], int stage, int first_row,
                                                  int left, int right, bool accumulate) {
    const uint64_t a = A::descriptor(a_tile(stage, left), first_row);
    const uint64_t b = B::descriptor(b_tile(stage, right), 0);
#pragma unroll
    for (int i = 0; i < kInstructions; i++)
      By::template multiply<a_across, b_across>(sums, a + i * A::kNext, b + i * B::kNext,
                                                accumulate || i > 0);
  }

  // What was read of a stage may be written over.
  __device__ static __forceinline__ void release(int stage) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty(stage));
  }

  // One product a step: the next is begun before the last is waited for.
  template <class By = Mode>
  __device__ static __forceinline__ void sum_up(Sum (&sums)[kSums], Stages& turn, uint32_t steps,
                                                int first_row) {
    int before = 0;
    for (uint32_t step = 0; step < steps; step++, turn.next()) {
      ptx::mbarrier_wait(full(turn.stage), turn.parity);
      ptx::wgmma_fence();
      multiply<By>(sums, turn.stage, first_row, 0, 0, step > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (step > 0) release(before);
      before = turn.stage;
    }
    ptx::wgmma_wait<0>();
    release(before);
  }

  // Each step's sums begin anew and are added to the others in float32: of 8-bit floats the tensor
  // cores' own sums have 14 bits. While one warpgroup adds, the other one's products go on.
  template <class By>
  __device__ static __forceinline__ void sum_up_steps(Sum (&sums)[kSums], Stages& turn,
                                                      uint32_t steps, int first_row) {
#pragma unroll
    for (int i = 0; i < kSums; i++) sums[i] = 0;
    for (uint32_t step = 0; step < steps; step++, turn.next()) {
      Sum part[kSums];
      ptx::mbarrier_wait(full(turn.stage), turn.parity);
      ptx::wgmma_fence();
      multiply<By>(part, turn.stage, first_row, 0, 0, false);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      release(turn.stage);
#pragma unroll
      for (int i = 0; i < kSums; i++) sums[i] += part[i];
    }
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
      else if constexpr (Mode::kFloat8)
        Mode::template sum_up<HopperKernel>(g, sums, turn, p.steps, first_row);
      else
        sum_up(sums, turn, p.steps, first_row);
      Placed at = at_batch(g, p.batch, Mode::kSplit ? int(sizeof(float)) : Mode::kSize);
      at.c += p.split * w.split_stride;
      write_rows<Mode::kSplit, Mode::kFloat8>(
          g, at, sums, p.row + first_row + int(threadIdx.x) % 128 / 32 * 16, p.column, simple);
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
  HopperKernel<Mode, columns, a_across, b_across>::run(a, b, g, work, simple);
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

// How many products these kernels have computed.
inline std::atomic<int64_t> hopper_products{0};

template <class Mode, int columns, bool a_across, bool b_across>
void start_on_hopper(const Gemm& g, const Lying& a, const Lying& b, const Work& w, void* stream) {
  using K = HopperKernel<Mode, columns, a_across, b_across>;
  const unsigned blocks = unsigned(std::min<int64_t>(w.count, multiprocessors()));
  launch(warpgroups<Mode, columns, a_across, b_across>, dim3(blocks), dim3(kThreads), K::kShared,
         stream, tensor_map(a.layout), tensor_map(b.layout), g, w, is_simple<Mode::kFloat8>(g));
  hopper_products++;
}

template <class Mode, int columns>
void choose_hopper_layout(const Gemm& g, const Lying& a, const Lying& b, const Work& w,
                          void* stream) {
  if constexpr (Mode::kSplit || Mode::kSize != 2)
    start_on_hopper<Mode, columns, false, false>(g, a, b, w, stream);
  else if (a.across)
    b.across ? start_on_hopper<Mode, columns, true, true>(g, a, b, w, stream)
             : start_on_hopper<Mode, columns, true, false>(g, a, b, w, stream);
  else
    b.across ? start_on_hopper<Mode, columns, false, true>(g, a, b, w, stream)
             : start_on_hopper<Mode, columns, false, false>(g, a, b, w, stream);
}

template <class Mode>
bool multiply_on_hopper(Gemm g, void* stream) {
  if (g.c.column != 1 && g.c.row == 1 && g.a_type != DType::u8) g = turned(g);
  const int64_t batches = batches_of(g);
  const int64_t splits = g.batch_invariant ? 1 : splits_of(Mode::kSize, batches, g.m, g.n, g.k);
  // Two sums an element leave no registers for as many; see hopper_float8.cu.
  const bool narrow = Mode::kFloat8 && !(g.fast_sums && g.a_type == kE4M3 && g.b_type == kE4M3);
  const bool wide_tiles = splits == 1 && !narrow && wide(batches, g.m, g.n);
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
    wide_tiles ? choose_hopper_layout<Mode, 256>(g, a, b, w, stream)
               : choose_hopper_layout<Mode, 128>(g, a, b, w, stream);
    return true;
  }

  if (g.workspace_bytes < int64_t(w.splits) * batches * g.m * g.n * 4) return false;
  // The splits' sums, one C after another.
  using Sum = typename Mode::Sum;
  Gemm sums;
  sums.m = g.m, sums.n = g.n, sums.k = g.k, sums.batch_dims = 1, sums.batch[0] = batches;
  sums.a_type = g.a_type, sums.b_type = g.b_type,
  sums.out = std::is_same_v<Sum, int> ? DType::s32 : DType::f32;
  sums.c.data = g.workspace, sums.c.row = g.n, sums.c.column = 1, sums.c.batch[0] = g.m * g.n;
  w.split_stride = batches * g.m * g.n;
  choose_hopper_layout<Mode, 128>(sums, a, b, w, stream);
  const int64_t fours = ceil_div(g.n, 4), count = fours * g.m * batches;
  launch(add_splits<Sum>, dim3(unsigned(ceil_div(count, 256))), dim3(256), 0, stream, g,
         static_cast<const Sum*>(g.workspace), w.splits, w.split_stride, fours, count);
  return true;
}

}  // namespace fastnn::cuda
