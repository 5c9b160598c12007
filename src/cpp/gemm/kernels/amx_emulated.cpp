// The AMX kernels on emulated tiles: the logic of packing, splitting and blocking, testable on any
// machine with AVX-512. Chosen only by name (FASTNN_ISA=amx-emulated).
#define FASTNN_TARGET amx_emulated
#define FASTNN_TARGET_ID 2
#define FASTNN_AMX_EMULATED
#include "gemm/amx.inl"

namespace fastnn {
namespace amx_emulated {
FASTNN_AMX_KERNELS("amx-emulated")
}

const Kernel* amx_emulated_kernels(DType type, Precision precision) {
  return amx_emulated::list(type, precision);
}

}  // namespace fastnn
