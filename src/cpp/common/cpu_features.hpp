// What this CPU can do, and which instruction set the kernels use.
#pragma once
#include <string>
#include <vector>

namespace fastnn {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C, with the OS saving their registers
  bool avx512 = false;       // F, BW, VL, DQ, CD
  bool avx512_bf16 = false;  // vdpbf16ps
  bool avx512_vnni = false;  // vpdpbusd
  bool amx_bf16 = false;     // tiles, bfloat16 products, and permission from the kernel
  bool amx_int8 = false;
};

// Ordered: an instruction set includes those before it. `amx_emulated` runs the AMX kernels with
// the tile instructions in software; it exists for tests and is never chosen by itself.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3, amx_emulated = 4 };
constexpr int kIsas = 5;

const CpuFeatures& cpu_features();
// From now on this CPU counts as one with AMX: for tests, which execute its instructions
// themselves.
void assume_amx(bool assumed);

// The active instruction set: the best available, or the cap given by FASTNN_ISA or set_isa.
Isa active_isa();
const char* isa_name(Isa isa);
std::vector<std::string> available_isas();
// A name above what the machine has gives the best below it (a cap), except amx-emulated.
// Throws std::invalid_argument for an unknown name.
void set_isa(const std::string& name);

// Asks Linux for the tile registers for the calling thread's process. True when granted.
bool request_amx_permission();

}  // namespace fastnn
