// What sm_90 does beside its threads: barriers in shared memory that count bytes as well as threads
// ("mbarrier"), the copy engine, and the other way to shared memory ("proxy") that it and wgmma
// take, which does not see ordinary stores before a fence.
#pragma once
#include <cstdint>
#include <random>
#include <string>

#include "cuda/host_emulation/block.hpp"
#include "cuda/tensor_map.cuh"

namespace fastnn::emulation {

// As shared memory's own addresses; it does not begin at 0 on a GPU either.
constexpr uint32_t kSharedBase = 1024;
uint32_t shared_address(const void* p, const Where& where);

// ---- mbarriers: a phase ends when all threads have arrived and all announced bytes have ---------

void mbarrier_init(const void* at, int arrivals, const Where& where);
// This thread's mbarriers become visible to the copy engine.
void fence_mbarrier_init();
void mbarrier_arrive(const void* at, int64_t announced, const Where& where);
// Until the phase of this parity has ended; at first that before phase 0, of parity 1, has.
void mbarrier_wait(const void* at, int parity, const Where& where);

// ---- the copy engine ---------------------------------------------------------------------------

// Begins to copy the tile at these coordinates. It is NaN until the copy ends, at any time from now
// on; elements outside of the tensor become zeros.
void copy_tile(void* to, const TensorMap& map, const void* mbarrier, const int* at, int dims,
               const Where& where);

// ---- the proxy ---------------------------------------------------------------------------------

// What this thread stored becomes visible to the copy engine and to wgmma.
void fence_proxy_async();
// Reads as they do. Faults outside of shared memory, or where an ordinary store is not visible yet.
void read_by_proxy(void* to, uint32_t address, size_t bytes, const char* name, const Where& where);

// ---- for the scheduler -------------------------------------------------------------------------

void begin_async();
// Ends one of the copies under way; false where there is none.
bool end_a_copy(std::mt19937_64& random, bool shuffled);
// What is wrong when a block has ended; empty: nothing.
std::string left_by_async();

}  // namespace fastnn::emulation
