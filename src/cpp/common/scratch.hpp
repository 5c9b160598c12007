// Working memory of the kernels: one growing, 64-byte aligned buffer a thread and slot.
#pragma once
#include <cstddef>

namespace fastnn {

// Each slot is an independent buffer, so that a kernel can hold several at once.
enum class Scratch : int { packed_a = 0, packed_b = 1, accumulator = 2, misc = 3 };
constexpr int kScratchSlots = 4;

// At least `bytes`, valid until this thread asks for the same slot again. Contents are unspecified.
// Throws std::bad_alloc. Buffers above 256 MB are given back by scratch_trim().
void* scratch(Scratch slot, size_t bytes);
// Frees this thread's oversized buffers; called at the end of an op.
void scratch_trim();

}  // namespace fastnn
