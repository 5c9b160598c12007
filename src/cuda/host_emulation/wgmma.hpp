// wgmma: products of a warpgroup (four warps), of matrices in shared memory that descriptors say
// the layout of, begun now and waited for later. Each warp has 16 of the 64 rows, and does its part
// for itself.
#pragma once
#include <cstdint>
#include <string>

#include "cuda/host_emulation/block.hpp"

namespace fastnn::emulation {

enum class MatrixType { bf16, f16, tf32, e4m3, e5m2, s8, u8 };

// D (64 x columns) = A B, or += where `accumulate`. A: by descriptor, or this thread's four
// registers. `d` has columns / 2 elements, float or int32: 4 j + 2 h + e is row lane / 4 + 8 h of
// the warp's 16, column 8 j + 2 (lane % 4) + e.
struct WarpgroupProduct {
  MatrixType a_type, b_type;
  int columns;
  const uint32_t* a_registers;  // null: by descriptor
  uint64_t a, b;
  bool a_across, b_across;  // M or N runs along the rows in shared memory, instead of K
  bool accumulate;
  void* d;
};
// The accumulators are NaN until a wait. Operands that are not the same at the wait as they were
// here are a fault.
void warpgroup_product(const WarpgroupProduct& product, const Where& where);
void warpgroup_fence(const Where& where);
void warpgroup_commit(const Where& where);
void warpgroup_wait(int groups, const Where& where);

// This warp's threads have so many registers from now on.
void set_registers(int count, bool more, const Where& where);

void begin_warpgroups();
// What is wrong when a block has ended; empty: nothing.
std::string left_by_warpgroups();

}  // namespace fastnn::emulation
