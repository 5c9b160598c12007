// The matrix product for sm_90a of 16-bit numbers, of integers, and of float32 in parts of
// bfloat16.
#include "cuda/gemm/hopper.hpp"

#include "cuda/gemm/hopper_kernel.cuh"
#include "cuda/gemm/parts.cuh"
#include "cuda/ptx_sm90.cuh"

namespace fastnn::cuda {
namespace {

// ---- how a step is multiplied -------------------------------------------------------------------

FASTNN_HOPPER_MODE(HopperBf16, wgmma_bf16, __nv_bfloat16, float)
FASTNN_HOPPER_MODE(HopperF16, wgmma_f16, __half, float)
FASTNN_HOPPER_MODE(HopperS8, wgmma_s8, int8_t, int)
FASTNN_HOPPER_MODE(HopperU8, wgmma_u8_s8, uint8_t, int)

// float32 as bfloat16 parts, of which the maps have one after the other in their outermost
// dimension.
template <int parts>
struct HopperParts : HopperBf16 {
  static constexpr int kParts = parts;
  static constexpr bool kSplit = true;
};

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
  start_on_hopper<HopperParts<parts>, kColumns, false, false>(g, a, b, w, stream);
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

int64_t gemms_on_hopper() { return hopper_products; }

bool gemm_on_hopper(const Gemm& g, void* stream) {
  if (g.m > kMostCounted || g.n > kMostCounted || g.k > kMostCounted ||
      batches_of(g) > kMostCounted / g.parts)
    return false;
  if (is_float8(g.a_type)) return float8_on_hopper(g, stream);
  switch (g.a_type) {
    case DType::f32:
      return g.parts == 3   ? multiply_parts<3>(g, stream)
             : g.parts == 2 ? multiply_parts<2>(g, stream)
                            : multiply_parts<1>(g, stream);
    case DType::bf16:
      return multiply_on_hopper<HopperBf16>(g, stream);
    case DType::f16:
      return multiply_on_hopper<HopperF16>(g, stream);
    case DType::s8:
      return multiply_on_hopper<HopperS8>(g, stream);
    case DType::u8:
      return multiply_on_hopper<HopperU8>(g, stream);
    default:
      return false;
  }
}

}  // namespace fastnn::cuda