// GEMM with AMX.
#define FASTNN_TARGET amx
#define FASTNN_TARGET_ID 2
#include "gemm/amx.inl"

namespace fastnn {
namespace amx {
FASTNN_AMX_KERNELS("amx")
}

const Kernel* amx_kernels(DType type, Precision precision) { return amx::list(type, precision); }

double amx_peak(const char* kind, int64_t iterations) {
  const bool bf16 = __builtin_strcmp(kind, "bf16") == 0, int8 = __builtin_strcmp(kind, "int8") == 0;
  if (!bf16 && !int8) return -1;
  amx::tiles_enter();
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  TILE_ZERO(4);
  TILE_ZERO(5);
  TILE_ZERO(6);
  TILE_ZERO(7);
  if (bf16)
    for (int64_t i = 0; i < iterations; i++) FASTNN_PRODUCTS(TILE_BF16);
  else
    for (int64_t i = 0; i < iterations; i++) FASTNN_PRODUCTS(TILE_S8S8);
  amx::tiles_leave();
  return double(iterations) * 4 * 16 * 16 * (bf16 ? 32 : 64) * 2;
}

}  // namespace fastnn
