#include "cuda/host_emulation/async.hpp"

#include <cstring>
#include <map>
#include <vector>

namespace fastnn::emulation {
namespace {

constexpr int kMostArrivals = (1 << 20) - 1;
constexpr uint64_t kMark = 0xB0B1B2B3B4B5B6B7;  // what the 8 bytes of an mbarrier hold

struct MBarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet there; negative where they came first
  int phase = 0;
  unsigned by = 0;  // the thread that made it
  bool fenced = false;
};

struct TileCopy {
  char* to;
  TensorLayout layout;
  const void* mbarrier;
  int at[kMostMapDims];
};

struct Async {
  std::map<const void*, MBarrier> mbarriers;
  std::vector<TileCopy> copies;
  std::vector<char> visible;  // shared memory as the proxy sees it; empty until somebody asks
};
thread_local Async async;

std::vector<char>& visible() {
  if (async.visible.empty()) {
    async.visible.resize(dynamic_shared_bytes());
    poison(async.visible.data(), async.visible.size());
  }
  return async.visible;
}

// Offset of a pointer into dynamic shared memory, or -1.
int64_t offset_of(const void* p) {
  const int64_t offset = static_cast<const char*>(p) - dynamic_shared();
  return dynamic_shared() && offset >= 0 && offset < int64_t(dynamic_shared_bytes()) ? offset : -1;
}

MBarrier& find(const void* at, const char* name, const Where& where) {
  const auto found = async.mbarriers.find(at);
  if (found == async.mbarriers.end())
    fault(where, std::string(name) + ": no mbarrier was made there yet");
  uint64_t mark;
  std::memcpy(&mark, at, 8);
  if (mark != kMark) fault(where, std::string(name) + ": something was written over the mbarrier");
  return found->second;
}

void end_phase_if_done(MBarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.arrivals;
  b.phase++;
}

int64_t bytes_of(const TensorLayout& t) {
  int64_t bytes = t.element_bytes;
  for (int d = 0; d < t.dims; d++) bytes *= t.box[d];
  return bytes;
}

void carry_out(const TileCopy& c) {
  const TensorLayout& t = c.layout;
  const int64_t first = offset_of(c.to), bytes = bytes_of(t), row = t.box[0] * t.element_bytes;
  const int span = swizzle_bytes(t.swizzle);
  std::vector<char> line(static_cast<size_t>(row));
  for (int64_t at = 0; at < bytes; at += row) {
    // The row's coordinates in the outer dimensions.
    int64_t index = at / row, from = 0;
    bool inside = true;
    for (int d = 1; d < t.dims; d++) {
      const int64_t i = c.at[d] + index % t.box[d];
      index /= t.box[d];
      inside = inside && i >= 0 && i < t.sizes[d];
      from += i * t.strides[d];
    }
    for (int e = 0; e < t.box[0]; e++) {
      const int64_t i = int64_t(c.at[0]) + e;
      char* to = line.data() + e * t.element_bytes;
      if (inside && i >= 0 && i < t.sizes[0])
        std::memcpy(to, static_cast<const char*>(t.data) + from + i * t.element_bytes,
                    size_t(t.element_bytes));
      else
        std::memset(to, 0, size_t(t.element_bytes));
    }
    for (int64_t piece = 0; piece < row; piece += 16) {
      uint64_t to = uint64_t(first + at + piece) + kSharedBase;
      if (t.swizzle != Swizzle::none) to ^= (to >> 3) & uint64_t(span - 16);
      std::memcpy(dynamic_shared() + to - kSharedBase, line.data() + piece, 16);
      std::memcpy(visible().data() + to - kSharedBase, line.data() + piece, 16);
    }
  }
  MBarrier& b = async.mbarriers.at(c.mbarrier);
  b.bytes -= bytes;
  end_phase_if_done(b);
}

}  // namespace

uint32_t shared_address(const void* p, const Where& where) {
  const int64_t offset = offset_of(p);
  if (offset < 0) fault(where, "an address outside of dynamic shared memory");
  return uint32_t(offset) + kSharedBase;
}

void mbarrier_init(const void* at, int arrivals, const Where& where) {
  if (reinterpret_cast<uintptr_t>(at) % 8 || offset_of(at) < 0)
    fault(where, "mbarrier.init: no multiple of 8, or outside of dynamic shared memory");
  if (arrivals < 1 || arrivals > kMostArrivals)
    fault(where, "mbarrier.init: " + std::to_string(arrivals) + " arrivals");
  std::memcpy(const_cast<void*>(at), &kMark, 8);
  async.mbarriers[at] = {arrivals, arrivals, 0, 0, thread_index(), false};
}

void fence_mbarrier_init() {
  for (auto& [at, b] : async.mbarriers) b.fenced = b.fenced || b.by == thread_index();
}

void mbarrier_arrive(const void* at, int64_t announced, const Where& where) {
  MBarrier& b = find(at, "mbarrier.arrive", where);
  if (b.pending == 0)
    fault(where, "mbarrier.arrive: more than " + std::to_string(b.arrivals) + " in one phase");
  b.bytes += announced;
  b.pending--;
  end_phase_if_done(b);
}

void mbarrier_wait(const void* at, int parity, const Where& where) {
  const MBarrier* b = &find(at, "mbarrier.try_wait", where);
  if (parity != 0 && parity != 1)
    fault(where, "mbarrier.try_wait: a parity of " + std::to_string(parity));
  wait_until([b, parity] { return b->phase % 2 != parity; }, "mbarrier.try_wait", where);
}

void copy_tile(void* to, const TensorMap& map, const void* mbarrier, const int* at, int dims,
               const Where& where) {
  const TensorLayout& t = map.layout;
  const char* name = "cp.async.bulk.tensor";
  if (dims != t.dims)
    fault(where, std::string(name) + ": " + std::to_string(dims) + " dimensions, of a map of " +
                     std::to_string(t.dims));
  const int64_t offset = offset_of(to), bytes = bytes_of(t);
  // The hardware takes multiples of 128; with less than a whole pattern nobody knows what lies
  // where.
  const int align = t.swizzle == Swizzle::none ? 128 : 8 * swizzle_bytes(t.swizzle);
  if (offset < 0 || offset + bytes > int64_t(dynamic_shared_bytes()) || offset % align)
    fault(where, std::string(name) + ": outside of shared memory, or no multiple of " +
                     std::to_string(align));
  if (t.swizzle != Swizzle::none && t.box[0] * t.element_bytes != swizzle_bytes(t.swizzle))
    fault(where, std::string(name) + ": rows shorter than what is swizzled");
  if (!find(mbarrier, name, where).fenced)
    fault(where, std::string(name) + ": an mbarrier that no fence has made visible");
  TileCopy copy{static_cast<char*>(to), t, mbarrier, {}};
  for (int d = 0; d < dims; d++) copy.at[d] = at[d];
  poison(to, size_t(bytes));
  poison(visible().data() + offset, size_t(bytes));
  async.copies.push_back(copy);
}

void fence_proxy_async() {
  fence_mbarrier_init();
  if (dynamic_shared_bytes())
    std::memcpy(visible().data(), dynamic_shared(), dynamic_shared_bytes());
}

void read_by_proxy(void* to, uint32_t address, size_t bytes, const char* name, const Where& where) {
  const int64_t offset = int64_t(address) - kSharedBase;
  if (offset < 0 || offset + int64_t(bytes) > int64_t(dynamic_shared_bytes()))
    fault(where,
          std::string(name) + ": reads outside of shared memory, at " + std::to_string(address));
  std::memcpy(to, dynamic_shared() + offset, bytes);
  if (std::memcmp(to, visible().data() + offset, bytes))
    fault(where, std::string(name) + ": reads what was stored without fence.proxy.async");
}

void begin_async() {
  async.mbarriers.clear();
  async.copies.clear();
  async.visible.clear();
}

bool end_a_copy(std::mt19937_64& random, bool shuffled) {
  if (async.copies.empty()) return false;
  const size_t which = shuffled ? random() % async.copies.size() : 0;
  const TileCopy copy = async.copies[which];
  async.copies.erase(async.copies.begin() + std::ptrdiff_t(which));
  carry_out(copy);
  return true;
}

std::string left_by_async() {
  return async.copies.empty() ? ""
                              : "cp.async.bulk.tensor: the block ended while a copy was under way";
}

}  // namespace fastnn::emulation
