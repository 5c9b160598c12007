#include "cuda/host_emulation/block.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "cuda/host_emulation/async.hpp"
#include "cuda/host_emulation/fiber.hpp"
#include "cuda/host_emulation/wgmma.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fastnn::emulation {
namespace {

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xA5;
constexpr int kBarriers = 16;
constexpr unsigned kMaxThreads = 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Thread {
  enum State { kReady, kWaiting, kPolling, kEnded };
  Fiber fiber;
  Self self;
  State state = kReady;
  const char* waits_at = "";
  Where where;
  Votes votes;
  std::function<bool()> polled;
  std::vector<std::vector<Copy>> groups;  // committed ones
  std::vector<Copy> begun;
};

struct Barrier {
  int arrived = 0, expected = 0;
  int yes = 0, votes = 0;
  const char* name = nullptr;
  Where where;
  std::vector<Thread*> waiting;
};

struct Collective {
  Lanes lanes;
  unsigned arrived;
  void (*combine)(Lanes&);
  const char* name;
  Where where;
};

// Memory with a guard behind it: AddressSanitizer stops whoever touches it; without that it holds a
// pattern, and the block's end finds what was written.
struct Guarded {
  struct Free {
    size_t whole;
    void operator()(char* memory) const {
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(memory, whole);
#endif
      std::free(memory);
    }
  };
  std::unique_ptr<char, Free> memory{nullptr, Free{0}};
  size_t bytes = 0;

  void make(size_t size, size_t align) {
    const size_t whole = (size + kGuardBytes + align - 1) / align * align;
    auto* p = static_cast<char*>(std::aligned_alloc(align, whole));
    if (!p) throw std::bad_alloc();
    memory = {p, Free{whole}};
    bytes = size;
    poison(p, size);
    std::memset(p + size, kGuard, whole - size);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(p + size, whole - size);
#endif
  }
  bool intact() const {
#ifdef __SANITIZE_ADDRESS__
    return true;
#else
    const char* guard = memory.get() + bytes;
    return std::all_of(guard, guard + kGuardBytes, [](char c) { return c == char(kGuard); });
#endif
  }
};

struct Block {
  Place place;
  std::deque<Thread> threads;                        // which never moves them
  std::vector<std::vector<Collective>> collectives;  // a warp each
  std::vector<unsigned> alive;                       // and the lanes of it that have not ended
  Barrier barriers[kBarriers];
  Guarded dynamic;
  std::map<const void*, Guarded> statics;
  unsigned unended = 0;
  Fiber scheduler;
  Thread* now = nullptr;
  const std::function<void()>* kernel = nullptr;
  bool faulted = false;
  std::string message;
};

// Kernels are launched from any thread of the host; each has a block of its own.
thread_local Block block;
thread_local uint64_t seed = 1;

// Thrown through the rest of a thread whose run ends with a Fault.
struct Abandoned {};

std::string text(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string text(const Thread& t) {
  return "thread (" + std::to_string(t.self.thread.x) + ", " + std::to_string(t.self.thread.y) +
         ", " + std::to_string(t.self.thread.z) + ")";
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column();
}

void give_way() { block.now->fiber.switch_to(block.scheduler); }

void wait_here(Thread::State state, const char* name, const Where& where) {
  Thread& t = *block.now;
  t.state = state, t.waits_at = name, t.where = where;
  give_way();
}

void thread_main() {
  try {
    (*block.kernel)();
  } catch (Abandoned) {
  }
  Thread& t = *block.now;
  t.state = Thread::kEnded;
  t.groups.clear(), t.begun.clear();  // copies nobody waited for never arrive
  give_way();
}

void complete(Barrier& b) {
  for (Thread* t : b.waiting) {
    t->votes = {b.yes, b.yes == b.votes, b.yes > 0};
    t->state = Thread::kReady;
  }
  b = Barrier{};
}

// A barrier of all threads waits for those that have not ended.
void check_barriers() {
  for (Barrier& b : block.barriers)
    if (b.arrived && b.expected == 0 && b.arrived == int(block.unended)) complete(b);
}

Barrier& arrive(int id, int expected, const char* name, const Where& where) {
  if (id < 0 || id >= kBarriers)
    fault(where, std::string(name) + ": barrier " + std::to_string(id) + " of 16");
  if (expected % 32 || expected < 0 || expected > int(block.threads.size()))
    fault(where, std::string(name) + ": " + std::to_string(expected) + " threads, in a block of " +
                     std::to_string(block.threads.size()));
  Barrier& b = block.barriers[id];
  if (b.arrived && b.expected != expected)
    fault(where, std::string(name) + ": expects " + std::to_string(expected) + " threads where " +
                     text(b.where) + " expects " + std::to_string(b.expected));
  // Threads of one block in two of these is what a GPU calls undefined and seldom complains of.
  if (b.arrived && expected == 0 && !same(b.where, where))
    fault(where, std::string("divergent barrier: ") + text(*block.now) + " is at " + name +
                     " while others are at " + b.name + " of " + text(b.where));
  if (!b.arrived) b.expected = expected, b.name = name, b.where = where;
  b.arrived++;
  return b;
}

bool full(const Barrier& b) { return b.arrived == (b.expected ? b.expected : int(block.unended)); }

void check_deadlock() {
  // The places where threads wait, with how many there are and one of them by name.
  std::map<std::string, std::pair<int, const Thread*>> places;
  for (const Thread& t : block.threads)
    if (t.state == Thread::kWaiting || t.state == Thread::kPolling) {
      auto& at = places[text(t.where) + ": " + t.waits_at];
      at.first++;
      if (!at.second) at.second = &t;
    }
  std::string all;
  for (const auto& [where, who] : places)
    all += (all.empty() ? "" : "; ") + where + " holds " + std::to_string(who.first) +
           " threads, such as " + text(*who.second);
  block.faulted = true;
  block.message = all + " (deadlock: nobody else can run)";
}

void step(Thread& t) {
  block.now = &t;
  block.scheduler.switch_to(t.fiber);
  block.now = nullptr;
  if (t.state == Thread::kEnded) {
    block.unended--;
    block.alive[t.self.warp] &= ~(1u << t.self.lane);
    check_barriers();
  }
}

void run_block(std::mt19937_64& random, bool shuffled) {
  const dim3 size = block.place.block_size;
  const unsigned count = size.x * size.y * size.z, warps = (count + 31) / 32;
  while (block.threads.size() > count) block.threads.pop_back();
  while (block.threads.size() < count) block.threads.emplace_back();
  block.collectives.assign(warps, {});
  block.alive.assign(warps, ~0u);
  if (count % 32) block.alive[warps - 1] = (1u << count % 32) - 1;
  for (Barrier& b : block.barriers) b = Barrier{};
  block.statics.clear();
  begin_async();
  begin_warpgroups();
  block.unended = count;
  for (unsigned i = 0; i < count; i++) {
    Thread& t = block.threads[i];
    t.self = {{i % size.x, i / size.x % size.y, i / size.x / size.y}, i % 32, i / 32};
    t.state = Thread::kReady;
    t.groups.clear(), t.begun.clear();
    t.polled = nullptr;
    t.fiber.start(thread_main);
  }
  std::vector<unsigned> order(warps);
  for (unsigned w = 0; w < warps; w++) order[w] = w;
  const bool lively = shuffled && (random() & 1);  // the copy engine: else it is as late as can be
  while (block.unended && !block.faulted) {
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (unsigned w : order) {
      const unsigned first = w * 32, lanes = std::min(32u, count - first);
      const bool backwards = shuffled && (random() & 1);
      for (unsigned i = 0; i < lanes && !block.faulted; i++) {
        Thread& t = block.threads[first + (backwards ? lanes - 1 - i : i)];
        if (t.state == Thread::kPolling && t.polled()) t.state = Thread::kReady;
        if (t.state != Thread::kReady) continue;
        moved = true;
        step(t);
      }
      if (block.faulted) break;
    }
    if (block.faulted) break;
    // The copy engine works at its own pace; where nobody else can go on, it does.
    if ((!moved || (lively && (random() & 1))) && end_a_copy(random, shuffled)) continue;
    if (!moved) check_deadlock();
  }
  if (block.faulted) return;
  block.message = left_by_async() + left_by_warpgroups();
  if (!block.message.empty()) {
    block.faulted = true;
    return;
  }
  bool intact = !block.dynamic.memory || block.dynamic.intact();
  for (const auto& [key, memory] : block.statics) intact &= memory.intact();
  if (!intact) {
    block.faulted = true;
    block.message = "shared memory: something was written past its end";
  }
}

}  // namespace

const Self& self() { return block.now->self; }
const Place& place() { return block.place; }
unsigned thread_index() { return self().warp * 32 + self().lane; }

void set_seed(uint64_t value) { seed = value; }

void fault(const Where& where, const std::string& message) {
  block.faulted = true;
  block.message = text(where) + ": " + message;
  throw Abandoned{};
}

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || size.z > 64)
    throw Fault("launch: a block of " + std::to_string(threads) + " threads");
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Fault("launch: a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                " x " + std::to_string(grid.z) + " blocks");
  if (block.now) throw Fault("launch: from within a kernel");
  std::mt19937_64 random(seed);
  std::vector<uint64_t> order(blocks);
  for (uint64_t b = 0; b < blocks; b++) order[b] = b;
  if (seed) std::shuffle(order.begin(), order.end(), random);
  block.kernel = &kernel;
  block.faulted = false;
  for (uint64_t b : order) {
    block.place = {
        {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)},
        size,
        grid};
    block.dynamic.memory.reset();
    if (shared_bytes) block.dynamic.make(shared_bytes, 1024);
    block.dynamic.bytes = shared_bytes;
    run_block(random, seed != 0);
    if (block.faulted) break;
  }
  block.dynamic.memory.reset();
  block.statics.clear();
  if (block.faulted) {
    const uint3 b = block.place.block;
    throw Fault(block.message + " [block (" + std::to_string(b.x) + ", " + std::to_string(b.y) +
                ", " + std::to_string(b.z) + ")]");
  }
}

char* dynamic_shared() { return block.dynamic.memory.get(); }
size_t dynamic_shared_bytes() { return block.dynamic.bytes; }

char* static_shared(const void* key, size_t bytes, size_t align) {
  Guarded& memory = block.statics[key];
  if (!memory.memory) memory.make(bytes, std::max<size_t>(align, 16));
  return memory.memory.get();
}

void poison(void* memory, size_t bytes) { std::memset(memory, 0xFF, bytes); }

Votes barrier(int id, int threads, bool vote, const char* name, const Where& where) {
  Barrier& b = arrive(id, threads, name, where);
  b.votes++, b.yes += vote;
  b.waiting.push_back(block.now);
  if (full(b)) {
    complete(b);  // this thread is one of those that become ready, and goes on at once
  } else {
    wait_here(Thread::kWaiting, name, where);
  }
  return block.now->votes;
}

void barrier_arrive(int id, int threads, const char* name, const Where& where) {
  Barrier& b = arrive(id, threads, name, where);
  if (full(b)) complete(b);
}

void wait_until(const std::function<bool()>& ready, const char* name, const Where& where) {
  if (ready()) return;
  block.now->polled = ready;
  wait_here(Thread::kPolling, name, where);
  block.now->polled = nullptr;
}

void collective(unsigned mask, const void* value, void* result, void (*combine)(Lanes&),
                const char* name, const Where& where) {
  const Self me = self();
  auto& open = block.collectives[me.warp];
  if (!(mask >> me.lane & 1))
    fault(where, std::string(name) + ": lane " + std::to_string(me.lane) + " is not in its mask");
  if (const unsigned gone = mask & ~block.alive[me.warp])
    fault(where, std::string(name) + ": its mask has lane " +
                     std::to_string(std::countr_zero(gone)) +
                     ", which does not exist or has ended");
  auto found = std::find_if(open.begin(), open.end(),
                            [&](const Collective& c) { return (c.lanes.mask & mask) != 0; });
  if (found == open.end()) {
    open.push_back({{mask, {}, {}}, 0, combine, name, where});
    found = open.end() - 1;
  } else if (found->lanes.mask != mask || found->combine != combine || !same(found->where, where)) {
    fault(where, std::string("divergent warp: lane ") + std::to_string(me.lane) + " is at " + name +
                     " while others are at " + found->name + " of " + text(found->where));
  }
  found->lanes.value[me.lane] = value;
  found->lanes.result[me.lane] = result;
  found->arrived |= 1u << me.lane;
  if (found->arrived != mask) {
    wait_here(Thread::kWaiting, name, where);
    return;
  }
  Lanes lanes = found->lanes;
  open.erase(found);
  combine(lanes);
  for (unsigned lane = 0; lane < 32; lane++)
    if ((mask >> lane & 1) && lane != me.lane)
      block.threads[me.warp * 32 + lane].state = Thread::kReady;
}

void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  poison(to, bytes + zeros);
  block.now->begun.push_back({to, from, bytes, zeros});
}

void copy_commit() {
  block.now->groups.push_back(std::move(block.now->begun));
  block.now->begun.clear();
}

void copy_wait(int groups) {
  auto& under_way = block.now->groups;
  while (int(under_way.size()) > groups) {
    for (const Copy& c : under_way.front()) {
      if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
      std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
    }
    under_way.erase(under_way.begin());
  }
}

}  // namespace fastnn::emulation
