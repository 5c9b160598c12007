#include "cuda/host_emulation/wgmma.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "cuda/host_emulation/async.hpp"
#include "cuda/host_emulation/ptx.hpp"

namespace fastnn::emulation {
namespace {

constexpr int kStepBytes = 32;  // of K in one instruction, whatever the type
constexpr int kWarpRows = 16, kGroupWarps = 4;
constexpr int kRegisters = 65536;  // of a multiprocessor

int size_of(MatrixType t) {
  return t == MatrixType::tf32 ? 4 : t == MatrixType::bf16 || t == MatrixType::f16 ? 2 : 1;
}
bool is_float8(MatrixType t) { return t == MatrixType::e4m3 || t == MatrixType::e5m2; }
bool is_integer(MatrixType t) { return t == MatrixType::s8 || t == MatrixType::u8; }

double number(MatrixType t, const char* at) {
  uint8_t byte;
  uint16_t two;
  uint32_t four;
  std::memcpy(&byte, at, 1);
  switch (t) {
    case MatrixType::s8:
      return int8_t(byte);
    case MatrixType::u8:
      return byte;
    case MatrixType::e4m3: {
      const int exponent = byte >> 3 & 15, mantissa = byte & 7;
      const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : mantissa * 0x1p-9;
      return (byte & 0x7F) == 0x7F ? NAN : byte & 0x80 ? -size : size;
    }
    case MatrixType::e5m2:
      return ptx::OfF16::widen(uint16_t(byte << 8));
    case MatrixType::tf32:
      std::memcpy(&four, at, 4);
      return ptx::OfTf32::widen(four);
    default:
      std::memcpy(&two, at, 2);
      return t == MatrixType::bf16 ? ptx::OfBf16::widen(two) : ptx::OfF16::widen(two);
  }
}

// PTX ISA, 9.7.15.5.1.2.2 "Matrix Descriptor Format", bit by bit.
struct Descriptor {
  uint32_t start, leading, stride, base_offset;
  Swizzle swizzle;
  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3FFF) << 4),
        leading(uint32_t(bits >> 16 & 0x3FFF) << 4),
        stride(uint32_t(bits >> 32 & 0x3FFF) << 4),
        base_offset(uint32_t(bits >> 49 & 7)),
        swizzle(Swizzle(bits >> 62 & 3)) {}

  // Where 16 bytes lie: `line` counts rows (of A; columns of B) where K runs along them, `byte` is
  // within its 32 bytes of K; or `line` counts K, and `byte` is along M or N.
  uint32_t at(bool across, uint32_t line, uint32_t byte) const {
    const uint32_t pitch = uint32_t(swizzle_bytes(swizzle));
    uint32_t address = start + line % 8 * pitch;
    if (swizzle == Swizzle::none)
      address += across ? byte / 16 * stride + line / 8 * leading
                        : line / 8 * stride + byte / 16 * leading;
    else
      address += line / 8 * stride + (across ? byte / pitch * leading + byte % pitch : byte);
    if (swizzle != Swizzle::none) address ^= (address >> 3) & (pitch - 16);
    return address;
  }
};

// `lines` rows of A or columns of B, as bytes: [line][32 bytes of K].
std::vector<char> matrix(uint64_t bits, bool across, MatrixType type, int first, int lines,
                         const Where& where) {
  const Descriptor d(bits);
  const int size = size_of(type), each = 16 / size;
  if (bits & ~0xC00E3FFF3FFF3FFFull)
    fault(where, "wgmma: a descriptor with bits set that have no meaning");
  if (across && size != 2) fault(where, "wgmma: only 16-bit elements may lie across");
  // A pattern begins at a multiple of its size, or the descriptor says where in it.
  if (d.swizzle != Swizzle::none &&
      d.base_offset != (d.start >> 7 & 7 & (uint32_t(swizzle_bytes(d.swizzle)) / 16 - 1)))
    fault(where, "wgmma: a descriptor of a matrix that does not begin with a whole pattern");
  std::vector<char> out(lines * kStepBytes);
  char piece[16];
  if (!across) {
    for (int i = 0; i < lines; i++)
      for (int byte = 0; byte < kStepBytes; byte += 16) {
        read_by_proxy(piece, d.at(false, uint32_t(first + i), uint32_t(byte)), 16, "wgmma", where);
        std::memcpy(&out[i * kStepBytes + byte], piece, 16);
      }
  } else {
    for (int k = 0; k < kStepBytes / size; k++)
      for (int i = 0; i < lines; i += each) {
        read_by_proxy(piece, d.at(true, uint32_t(k), uint32_t((first + i) * size)), 16, "wgmma",
                      where);
        for (int e = 0; e < each; e++)
          std::memcpy(&out[(i + e) * kStepBytes + k * size], piece + e * size, size);
      }
  }
  return out;
}

struct Product {
  WarpgroupProduct what[32];  // a lane each
  std::vector<char> a, b;     // the operands as they were when it began
  int first_row;
  Where where;
};

// Accumulators of a warp on which products are under way.
struct Accumulators {
  int products = 0;
  std::vector<uint32_t> values[32];  // what they will be
};

struct Warp {
  std::vector<Product> begun;
  std::deque<std::vector<Product>> groups;
  std::map<void*, Accumulators> under_way;  // by lane 0's
  bool fenced = false;
  int64_t products = 0, registers = 0, register_changes = 0;
};

thread_local std::map<unsigned, Warp> warps;

std::vector<char> left_operand(const Product& p) {
  const WarpgroupProduct& w = p.what[0];
  if (!w.a_registers) return matrix(w.a, w.a_across, w.a_type, p.first_row, kWarpRows, p.where);
  std::vector<char> out(kWarpRows * kStepBytes);
  for (int lane = 0; lane < 32; lane++)
    for (int r = 0; r < 4; r++)
      std::memcpy(&out[(lane / 4 + r % 2 * 8) * kStepBytes + lane % 4 * 4 + r / 2 * 16],
                  &p.what[lane].a_registers[r], 4);
  return out;
}
std::vector<char> right_operand(const Product& p) {
  const WarpgroupProduct& w = p.what[0];
  return matrix(w.b, w.b_across, w.b_type, 0, w.columns, p.where);
}

// sums[j] += a[k] b[k][j], in the order of k: the instruction's sums.
#ifdef __x86_64__
__attribute__((target_clones("default", "avx2"), optimize("O3")))
#endif
void add_products(double* sums, const double* a, const double* b, int depth, int n) {
  for (int k = 0; k < depth; k++)
    for (int j = 0; j < n; j++) sums[j] += a[k] * b[k * n + j];
}

// Likewise of 8-bit floats: products and the sum so far are cut to 13 binary places after the
// leading one of the largest of them, and so is their sum (DeepSeek-V3 Technical Report, 3.3.2:
// "maintaining around 14 bits"). `room`: memory for n numbers.
constexpr int kFloat8Bits = 13;
#ifdef __x86_64__
__attribute__((target_clones("default", "avx2"), optimize("O3")))
#endif
void add_float8_products(double* sums, const double* a, const double* b, int depth, int n,
                         double* room) {
  for (int j = 0; j < n; j++) room[j] = std::fabs(sums[j]);
  for (int k = 0; k < depth; k++)
    for (int j = 0; j < n; j++) {
      const double size = std::fabs(a[k] * b[k * n + j]);
      room[j] = size > room[j] ? size : room[j];
    }
  for (int j = 0; j < n; j++) {  // how many units in the largest one's last place make 1
    const uint64_t exponent = std::bit_cast<uint64_t>(room[j]) & 0x7FF0000000000000u;
    room[j] = exponent ? (1 << kFloat8Bits) / std::bit_cast<double>(exponent) : 1;
  }
  for (int j = 0; j < n; j++) sums[j] = double(int32_t(sums[j] * room[j]));
  for (int k = 0; k < depth; k++)
    for (int j = 0; j < n; j++) sums[j] += double(int32_t(a[k] * b[k * n + j] * room[j]));
  for (int j = 0; j < n; j++) {
    const double sum = sums[j] / room[j];
    const uint64_t bits = std::bit_cast<uint64_t>(sum);
    sums[j] = std::bit_cast<double>(bits & ~((uint64_t(1) << (52 - kFloat8Bits)) - 1));
  }
}

// Where infinities and NaN are among them, which have no such places.
bool all_finite(const double* x, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += x[i] - x[i];
  return sum == 0;
}

void multiply(Product& p, Accumulators& to) {
  const WarpgroupProduct& w = p.what[0];
  const int n = w.columns, depth = kStepBytes / size_of(w.a_type), size = size_of(w.a_type);
  std::vector<double> b(depth * n), sums(n), room(n);
  double a[kStepBytes];
  for (int k = 0; k < depth; k++)
    for (int j = 0; j < n; j++) b[k * n + j] = number(w.b_type, &p.b[j * kStepBytes + k * size]);
  const bool cut = is_float8(w.a_type) && all_finite(b.data(), depth * n);
  for (int row = 0; row < kWarpRows; row++) {
    auto value = [&](int j) -> uint32_t& {
      const int lane = row % 8 * 4 + j % 8 / 2;
      return to.values[lane][j / 8 * 4 + row / 8 * 2 + j % 2];
    };
    for (int j = 0; j < n; j++)
      sums[j] = !w.accumulate          ? 0
                : is_integer(w.a_type) ? double(int32_t(value(j)))
                                       : double(std::bit_cast<float>(value(j)));
    for (int k = 0; k < depth; k++) a[k] = number(w.a_type, &p.a[row * kStepBytes + k * size]);
    if (cut && all_finite(a, depth) && all_finite(sums.data(), n))
      add_float8_products(sums.data(), a, b.data(), depth, n, room.data());
    else
      add_products(sums.data(), a, b.data(), depth, n);
    for (int j = 0; j < n; j++)
      value(j) = is_integer(w.a_type) ? uint32_t(int64_t(sums[j]))
                                      : std::bit_cast<uint32_t>(ptx::toward_zero(sums[j]));
  }
}

void begin(Lanes& lanes, const Where& where) {
  Warp& warp = warps[self().warp];
  Product p;
  for (int lane = 0; lane < 32; lane++)
    p.what[lane] = *static_cast<const WarpgroupProduct*>(lanes.value[lane]);
  p.where = where;
  p.first_row = int(self().warp % kGroupWarps) * kWarpRows;
  const WarpgroupProduct& w = p.what[0];
  for (const WarpgroupProduct& other : p.what)
    if (other.a != w.a || other.b != w.b || other.accumulate != w.accumulate)
      fault(where, "wgmma: lanes with different descriptors");
  const size_t count = w.columns / 2;
  auto found = warp.under_way.find(w.d);
  if (found == warp.under_way.end()) {
    if (!warp.fenced)
      fault(where, "wgmma: no wgmma.fence since its accumulators may have been used");
    found = warp.under_way.emplace(w.d, Accumulators{}).first;
    for (int lane = 0; lane < 32; lane++) {
      auto& values = found->second.values[lane];
      values.resize(count);
      std::memcpy(values.data(), p.what[lane].d, 4 * count);
      poison(p.what[lane].d, 4 * count);
    }
  } else if (found->second.values[0].size() != count) {
    fault(where, "wgmma: accumulators on which a product of another shape is under way");
  }
  p.a = left_operand(p), p.b = right_operand(p);
  multiply(p, found->second);
  found->second.products++;
  warp.products++;
  warp.begun.push_back(std::move(p));
}

void end(Warp& warp, const Product& p) {
  if (left_operand(p) != p.a || right_operand(p) != p.b)
    fault(p.where, "wgmma: operands that were written before it was waited for");
  const auto found = warp.under_way.find(p.what[0].d);
  Accumulators& accumulators = found->second;
  if (--accumulators.products) return;
  for (int lane = 0; lane < 32; lane++) {
    const auto& values = accumulators.values[lane];
    const auto* now = static_cast<const uint32_t*>(p.what[lane].d);
    if (!std::all_of(now, now + values.size(), [](uint32_t x) { return x == ~0u; }))
      fault(p.where, "wgmma: accumulators that were written before it was waited for");
    std::memcpy(p.what[lane].d, values.data(), 4 * values.size());
  }
  warp.under_way.erase(found);
  warp.fenced = false;
}

// A collective of this warp that needs nothing but its place.
template <class F>
void together(F f, const char* name, const Where& where) {
  struct Call {
    F* f;
    const Where* where;
  } call{&f, &where};
  collective(
      ~0u, &call, nullptr,
      [](Lanes& lanes) {
        const auto* c = static_cast<const Call*>(lanes.value[self().lane]);
        (*c->f)(lanes, *c->where);
      },
      name, where);
}

}  // namespace

void warpgroup_product(const WarpgroupProduct& product, const Where& where) {
  struct Call {
    WarpgroupProduct product;  // first, as begin() reads it
    const Where* where;
  } call{product, &where};
  collective(
      ~0u, &call, nullptr,
      [](Lanes& lanes) {
        begin(lanes, *static_cast<const Call*>(lanes.value[self().lane])->where);
      },
      "wgmma.mma_async", where);
}

void warpgroup_fence(const Where& where) {
  together([](Lanes&, const Where&) { warps[self().warp].fenced = true; }, "wgmma.fence", where);
}

void warpgroup_commit(const Where& where) {
  together(
      [](Lanes&, const Where&) {
        Warp& warp = warps[self().warp];
        warp.groups.push_back(std::move(warp.begun));
        warp.begun.clear();
      },
      "wgmma.commit_group", where);
}

void warpgroup_wait(int groups, const Where& where) {
  together(
      [groups](Lanes&, const Where&) {
        Warp& warp = warps[self().warp];
        while (int(warp.groups.size()) > groups) {
          for (const Product& p : warp.groups.front()) end(warp, p);
          warp.groups.pop_front();
        }
      },
      "wgmma.wait_group", where);
}

void set_registers(int count, bool more, const Where& where) {
  if (count < 24 || count > 256 || count % 8)
    fault(where, "setmaxnreg: " + std::to_string(count) + " registers");
  together(
      [count, more](Lanes&, const Where& here) {
        Warp& warp = warps[self().warp];
        if (warp.registers && (more ? count < warp.registers : count > warp.registers))
          fault(here, "setmaxnreg: from " + std::to_string(warp.registers) + " to " +
                          std::to_string(count) + " is the other direction");
        warp.registers = count;
        warp.register_changes++;
      },
      "setmaxnreg", where);
}

void begin_warpgroups() { warps.clear(); }

std::string left_by_warpgroups() {
  const dim3 size = place().block_size;
  const unsigned count = size.x * size.y * size.z / 32;
  int64_t registers = 0;
  for (auto& [index, warp] : warps) {
    if (!warp.groups.empty() || !warp.begun.empty())
      return "wgmma: a warp ended with products that it did not wait for";
    const unsigned first = index / kGroupWarps * kGroupWarps;
    if (first + kGroupWarps > count) return "wgmma: a warp that is not of a whole warpgroup";
    for (unsigned i = first; i < first + kGroupWarps; i++) {
      const auto other = warps.find(i);
      if (other == warps.end() || other->second.products != warp.products)
        return "wgmma: not all warps of a warpgroup did the same products";
      if (other->second.register_changes != warp.register_changes ||
          other->second.registers != warp.registers)
        return "setmaxnreg: not all warps of a warpgroup did the same";
    }
    registers += 32 * warp.registers;
  }
  if (registers > kRegisters)
    return "setmaxnreg: the block's threads have " + std::to_string(registers) + " registers";
  return "";
}

}  // namespace fastnn::emulation
