// A block of CUDA threads on the CPU: who runs, who waits for whom, and what a kernel may ask of
// the others. Blocks run one after another; of a block's warps and of a warp's lanes a seeded
// generator chooses whose turn it is, and whoever's turn it is runs until it has to wait. So a warp
// runs as far ahead of the others as the barriers let it, which is what brings missing ones to
// light.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastnn::emulation {

using Where = std::source_location;

// What a kernel did that a GPU would not forgive; the message begins with file:line.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a thread sees of itself.
struct Self {
  uint3 thread;
  unsigned lane, warp;
};
struct Place {
  uint3 block;
  dim3 block_size, grid_size;
};
const Self& self();
const Place& place();
unsigned thread_index();  // of the block's, counted

// Runs kernel() once for each thread of the grid. Throws Fault.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// The order of warps and blocks in every run from now on. 0: as they are numbered.
void set_seed(uint64_t seed);

// Ends the run with a Fault.
[[noreturn]] void fault(const Where& where, const std::string& message);

// ---- shared memory -----------------------------------------------------------------------------

// Before a block begins all of it is NaN; behind it lie guards, which are looked at when it ends.
char* dynamic_shared();
size_t dynamic_shared_bytes();
// The same memory for every thread of the block that asks with this key.
char* static_shared(const void* key, size_t bytes, size_t align);
// All bits set: NaN in every floating-point type, -1 in integers.
void poison(void* memory, size_t bytes);

// ---- barriers ----------------------------------------------------------------------------------

struct Votes {
  int count;
  bool all, any;
};
// Waits for `threads` threads (0: all of the block that have not ended) at barrier `id`.
Votes barrier(int id, int threads, bool vote, const char* name, const Where& where);
// Counts as one of them without waiting.
void barrier_arrive(int id, int threads, const char* name, const Where& where);
// Goes on when ready() holds, which another thread makes come true.
void wait_until(const std::function<bool()>& ready, const char* name, const Where& where);

// ---- warps -------------------------------------------------------------------------------------

// What the lanes of a collective have brought; `value[lane]` is null where a lane is not in the
// mask.
struct Lanes {
  unsigned mask;
  const void* value[32];
  void* result[32];
};
// Waits for all lanes of `mask` to come to the same place; the last one calls combine.
void collective(unsigned mask, const void* value, void* result, void (*combine)(Lanes&),
                const char* name, const Where& where);

// ---- copies that end later ---------------------------------------------------------------------

// A copy that this thread has begun: the destination is poisoned now and filled when it is waited
// for.
void copy_async(void* to, const void* from, size_t bytes, size_t zeros);
void copy_commit();
void copy_wait(int groups);  // until at most so many of the groups are under way

}  // namespace fastnn::emulation
