// The matrix product on tensor cores, for sm_80 and later: blocks of threads each compute a tile of
// C; tiles of A and B are copied to shared memory three steps ahead (cp.async), and each warp
// multiplies its share with mma.sync (mainloop.cuh).
#include "cuda/gemm/gemm.hpp"

#include <climits>
#include <string>
#include <type_traits>

#include "cuda/device.hpp"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/float8.cuh"
#include "cuda/gemm/hopper.hpp"
#include "cuda/gemm/hopper_operands.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/gemm/plain_sum.cuh"

namespace fastnn::cuda {
namespace {

template <class Mode, class S, bool a_along_k, bool b_along_k>
__global__ void __launch_bounds__(S::kThreads, 1)
    product(const Gemm g, const bool a_pieces, const bool b_pieces, const int64_t tile_rows,
            const int64_t tile_columns, const int64_t first_batch) {
  using Element = typename Mode::Element;
  using Sum = typename Mode::Sum;
  using A = TileOf<Element, S::kM, a_along_k, S::kThreads>;
  using B = TileOf<Element, S::kN, b_along_k, S::kThreads>;
  constexpr bool kSplit = sizeof(Element) == 4;
  char* shared = dynamic_shared<char>();

  const TilePlace tile = tile_place(blockIdx.x, tile_rows, tile_columns);
  const int64_t first_row = tile.row * S::kM, first_column = tile.column * S::kN;
  const Placed at = at_batch(g, first_batch + blockIdx.y, sizeof(Element));
  const Source a{at.a, g.m, g.k, g.a.row, g.a.column, a_pieces};
  const Source b{at.b, g.n, g.k, g.b.column, g.b.row, b_pieces};

  const int steps = int((g.k + A::kDepth - 1) / A::kDepth);
  const bool again =
      tile_sums<Mode, S, A, B>(shared, steps, [&](int64_t step, char* to_a, char* to_b) {
        A::load(to_a, a, first_row, step * A::kDepth);
        B::load(to_b, b, first_column, step * A::kDepth);
      });
  const auto* staged = reinterpret_cast<const Sum*>(shared);

  // Neighbours in C are written by neighbouring threads, whichever way it lies.
  const bool across = g.c.column != 1 && g.c.row == 1;
  for (int i = int(threadIdx.x); i < S::kM * S::kN / 4; i += S::kThreads) {
    const int row = across ? i % S::kM : i / (S::kN / 4);
    const int column = 4 * (across ? i / S::kM : i % (S::kN / 4));
    if (first_row + row >= g.m || first_column + column >= g.n) continue;
    const int count = g.n - first_column - column < 4 ? int(g.n - first_column - column) : 4;
    Sum four[4];
#pragma unroll
    for (int e = 0; e < 4; e++) four[e] = staged[staged_at<S>(row, column) + e];
    if constexpr (kSplit)
      if (again)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (e < count)
            four[e] = plain_sum<Element>(g, at, first_row + row, first_column + column + e);
    finish(g, at, first_row + row, first_column + column, four, count);
  }
}

// Whether an operand can be copied 16 bytes at a time: `stride` is that of the dimension which is
// not contiguous.
bool in_pieces(const Operand& x, int64_t contiguous, int64_t stride, const Gemm& g, int size) {
  if (contiguous != 1 || reinterpret_cast<uintptr_t>(x.data) % kPieceBytes ||
      stride * size % kPieceBytes)
    return false;
  for (int d = 0; d < g.batch_dims; d++)
    if (g.batch[d] > 1 && x.batch[d] * size % kPieceBytes) return false;
  return true;
}

constexpr int64_t kMostBatches = 65535;  // of one launch

template <class Mode, class S, bool a_along_k, bool b_along_k>
void run(const Gemm& g, int64_t batches, void* stream) {
  constexpr int size = sizeof(typename Mode::Element);
  const Operand &a = g.a, &b = g.b;
  const bool a_pieces =
      a_along_k ? in_pieces(a, a.column, a.row, g, size) : in_pieces(a, a.row, a.column, g, size);
  const bool b_pieces =
      b_along_k ? in_pieces(b, b.row, b.column, g, size) : in_pieces(b, b.column, b.row, g, size);
  const int64_t rows = (g.m + S::kM - 1) / S::kM, columns = (g.n + S::kN - 1) / S::kN;
  constexpr size_t shared = size_t(kStages) * (S::kM + S::kN) * kRowBytes;
  for (int64_t first = 0; first < batches; first += kMostBatches) {
    const int64_t count = batches - first < kMostBatches ? batches - first : kMostBatches;
    launch(product<Mode, S, a_along_k, b_along_k>, dim3(unsigned(rows * columns), unsigned(count)),
           dim3(S::kThreads), shared, stream, g, a_pieces, b_pieces, rows, columns, first);
  }
}

template <class Mode, class S>
void choose_layout(const Gemm& g, int64_t batches, void* stream) {
  // An operand with no contiguous dimension is read element by element, either way.
  const bool a_along_k = g.a.column == 1 || g.a.row != 1,
             b_along_k = g.b.row == 1 || g.b.column != 1;
  if constexpr (sizeof(typename Mode::Element) == 1)
    run<Mode, S, true, true>(g, batches, stream);  // ldmatrix transposes 16-bit elements only
  else if (a_along_k)
    b_along_k ? run<Mode, S, true, true>(g, batches, stream)
              : run<Mode, S, true, false>(g, batches, stream);
  else
    b_along_k ? run<Mode, S, false, true>(g, batches, stream)
              : run<Mode, S, false, false>(g, batches, stream);
}

template <class Mode>
void choose_shape(const Gemm& g, void* stream) {
  int64_t batches = 1;
  for (int d = 0; d < g.batch_dims; d++) batches *= g.batch[d];
  // Large tiles read less; small ones fill the GPU where there are few. A sum's order is that of
  // its tiles of K, which both have alike: the choice changes no bits.
  const int64_t large =
      (g.m + Large::kM - 1) / Large::kM * ((g.n + Large::kN - 1) / Large::kN) * batches;
  if (large >= kEnoughBlocks)
    choose_layout<Mode, std::conditional_t<(Mode::kGroup > 0), LargeGroups, Large>>(g, batches,
                                                                                    stream);
  else
    choose_layout<Mode, Small>(g, batches, stream);
}

// Floats of eight bits; of both types, the one of fewer bits of exponent first.
void multiply_float8(Gemm g, void* stream) {
  if (g.a_type != kE4M3 && g.b_type == kE4M3) g = turned(g);
  if (g.a_type == kE4M3) g.alpha *= kE4M3Factor;
  if (g.b_type == kE4M3) g.alpha *= kE4M3Factor;
  if (g.b_type == kE4M3)
    choose_shape<Float8<true, true>>(g, stream);
  else if (g.a_type == kE4M3)
    choose_shape<Float8<true, false>>(g, stream);
  else
    choose_shape<Float8<false, false>>(g, stream);
}

}  // namespace

int64_t gemm_workspace(DType a_type, int parts, int64_t batches, int64_t m, int64_t n, int64_t k,
                       bool batch_invariant) {
  return capability() == kHopper
             ? hopper_workspace(a_type, parts, batches, m, n, k, batch_invariant)
             : 0;
}

void gemm(const Gemm& g, void* stream) {
  bool empty = g.m == 0 || g.n == 0;
  for (int d = 0; d < g.batch_dims; d++) empty = empty || g.batch[d] == 0;
  if (empty) return;
  if (g.k / (kRowBytes / 4) >= INT_MAX)  // which only a tensor that repeats its elements can have
    throw std::invalid_argument("gemm: k is too large for a GPU: " + std::to_string(g.k));
  if (g.k > 0 && capability() == kHopper && gemm_on_hopper(g, stream)) return;
  if (is_float8(g.a_type)) return multiply_float8(g, stream);
  switch (g.a_type) {
    case DType::f32:
      return g.parts == 3   ? choose_shape<SplitF32<3>>(g, stream)
             : g.parts == 2 ? choose_shape<SplitF32<2>>(g, stream)
                            : choose_shape<SplitF32<1>>(g, stream);
    case DType::bf16:
      return choose_shape<Bf16>(g, stream);
    case DType::f16:
      return choose_shape<F16>(g, stream);
    case DType::s8:
      return choose_shape<S8>(g, stream);
    case DType::u8:
      return choose_shape<U8>(g, stream);
    default:
      throw std::invalid_argument(std::string("gemm: no CUDA kernel for ") + dtype_name(g.a_type));
  }
}

}  // namespace fastnn::cuda
