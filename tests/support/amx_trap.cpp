// Executes the AMX instructions of a program on a CPU that lacks them: there each of them raises
// SIGILL, and the handler below decodes it and does what the manual says (Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2, "TDPBF16PS" and its like). So it is the
// compiled code of the AMX kernels that runs, and not another program: what the compiler made of it
// as well. A fault in it - a tile that is not configured, an operand that does not fit - stops the
// process with a line that says which.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <ucontext.h>

namespace {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

thread_local Config config;  // of palette 0: tiles are not in use
thread_local uint8_t tiles[8][16][64];
long executed = 0;

[[noreturn]] void fault(const char* instruction, const char* what) {
  std::fprintf(stderr, "amx: %s: %s\n", instruction, what);
  std::abort();
}

// ---- what an instruction's bytes say -----------------------------------------------------------

enum Prefix { kNone, k66, kF3, kF2 };  // pp of a VEX prefix

struct Instruction {
  const uint8_t* at;
  int length;
  Prefix prefix;
  uint8_t opcode;
  int reg, rm, vvvv;
  bool in_memory, has_sib;
  int64_t base, index_times_scale;  // of the operand in memory
};

int64_t general_register(const greg_t* gregs, int number) {
  static const int place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
  return gregs[place[number]];
}

// False where it is none of AMX.
bool decode(const greg_t* gregs, Instruction& to) {
  const auto* p = reinterpret_cast<const uint8_t*>(gregs[REG_RIP]);
  to.at = p;
  // VEX of three bytes, opcodes 0F38, W0, 128 bits.
  if (p[0] != 0xC4 || (p[1] & 0x1F) != 2 || (p[2] & 0x84)) return false;
  const int r = p[1] & 0x80 ? 0 : 8, x = p[1] & 0x40 ? 0 : 8, b = p[1] & 0x20 ? 0 : 8;
  to.vvvv = ~(p[2] >> 3) & 15;
  to.prefix = Prefix(p[2] & 3);
  to.opcode = p[3];
  if (to.opcode != 0x49 && to.opcode != 0x4B && to.opcode != 0x5C && to.opcode != 0x5E)
    return false;
  const int mod = p[4] >> 6;
  to.reg = (p[4] >> 3 & 7) + r;
  to.rm = (p[4] & 7) + b;
  to.in_memory = mod != 3;
  to.has_sib = to.in_memory && (p[4] & 7) == 4;
  to.base = to.index_times_scale = 0;
  const uint8_t* end = p + 5;
  if (to.in_memory) {
    bool wide = mod == 2, relative = false, has_base = true;
    int base = to.rm;
    if (to.has_sib) {
      const uint8_t sib = *end++;
      base = (sib & 7) + b;
      const int index = (sib >> 3 & 7) + x;
      if (index != 4)
        to.index_times_scale = general_register(gregs, index) * (int64_t(1) << (sib >> 6));
      if (mod == 0 && (sib & 7) == 5) has_base = false, wide = true;
    } else if (mod == 0 && (p[4] & 7) == 5) {
      has_base = false, wide = relative = true;
    }
    if (has_base) to.base = general_register(gregs, base);
    if (mod == 1) {
      to.base += int8_t(*end++);
    } else if (wide) {
      int32_t displacement;
      std::memcpy(&displacement, end, 4);
      end += 4;
      to.base += displacement;
    }
    if (relative) to.base += int64_t(end);
  }
  to.length = int(end - p);
  return true;
}

// ---- what they do ------------------------------------------------------------------------------

void check_tile(const char* name, int tile) {
  if (config.palette != 1) fault(name, "no tiles are configured");
  if (tile >= 8) fault(name, "there are eight tiles");
  if (config.rows[tile] == 0 || config.bytes[tile] == 0) fault(name, "the tile has no size");
}

void load_config(int64_t address) {
  Config next;
  std::memcpy(&next, reinterpret_cast<const void*>(address), sizeof(next));
  if (next.palette > 1) fault("ldtilecfg", "palette");
  if (next.palette == 1) {
    for (uint8_t byte : next.reserved)
      if (byte) fault("ldtilecfg", "reserved bytes are not 0");
    for (int t = 0; t < 16; t++) {
      if (next.rows[t] > 16 || next.bytes[t] > 64) fault("ldtilecfg", "a tile is too large");
      if ((next.rows[t] == 0) != (next.bytes[t] == 0))
        fault("ldtilecfg", "a tile of rows without columns, or of columns without rows");
      if (t >= 8 && next.rows[t]) fault("ldtilecfg", "there are eight tiles");
    }
  }
  config = next;
  std::memset(tiles, 0, sizeof(tiles));
}

void load(const Instruction& i) {
  check_tile("tileloadd", i.reg);
  std::memset(tiles[i.reg], 0, sizeof(tiles[i.reg]));
  for (int row = 0; row < config.rows[i.reg]; row++)
    std::memcpy(tiles[i.reg][row],
                reinterpret_cast<const void*>(i.base + row * i.index_times_scale),
                config.bytes[i.reg]);
}

void store(const Instruction& i) {
  check_tile("tilestored", i.reg);
  for (int row = 0; row < config.rows[i.reg]; row++)
    std::memcpy(reinterpret_cast<void*>(i.base + row * i.index_times_scale), tiles[i.reg][row],
                config.bytes[i.reg]);
}

float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }
float from_bf16(const uint8_t* p) {
  const uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

void check_product(const char* name, const Instruction& i) {
  const int c = i.reg, a = i.rm, b = i.vvvv;
  check_tile(name, c), check_tile(name, a), check_tile(name, b);
  if (c == a || c == b || a == b) fault(name, "the tiles must differ");
  if (config.rows[a] != config.rows[c] || config.bytes[b] != config.bytes[c] ||
      config.bytes[a] != 4 * config.rows[b])
    fault(name, "the tiles' sizes do not fit");
}

__attribute__((target("avx2,fma"))) void multiply_bf16(const Instruction& i) {
  check_product("tdpbf16ps", i);
  for (int m = 0; m < config.rows[i.reg]; m++)
    for (int n = 0; n < config.bytes[i.reg] / 4; n++) {
      float even = 0, odd = 0, c;
      for (int k = 0; k < config.bytes[i.rm] / 4; k++) {
        const uint8_t *a = tiles[i.rm][m] + 4 * k, *b = tiles[i.vvvv][k] + 4 * n;
        even = flushed(__builtin_fmaf(from_bf16(a), from_bf16(b), even));
        odd = flushed(__builtin_fmaf(from_bf16(a + 2), from_bf16(b + 2), odd));
      }
      uint8_t* to = tiles[i.reg][m] + 4 * n;
      std::memcpy(&c, to, 4);
      c = flushed(flushed(c) + flushed(even + odd));
      std::memcpy(to, &c, 4);
    }
}

int extended(uint8_t byte, bool is_signed) { return is_signed ? int(int8_t(byte)) : int(byte); }

void multiply_int8(const Instruction& i) {
  check_product("tdpb..d", i);
  const bool a_signed = i.prefix == kF2 || i.prefix == kF3;  // tdpbssd, tdpbsud
  const bool b_signed = i.prefix == kF2 || i.prefix == k66;  // tdpbssd, tdpbusd
  for (int m = 0; m < config.rows[i.reg]; m++)
    for (int n = 0; n < config.bytes[i.reg] / 4; n++) {
      uint32_t sum;
      uint8_t* to = tiles[i.reg][m] + 4 * n;
      std::memcpy(&sum, to, 4);
      for (int k = 0; k < config.bytes[i.rm]; k++)
        sum += uint32_t(extended(tiles[i.rm][m][k], a_signed) *
                        extended(tiles[i.vvvv][k / 4][4 * n + k % 4], b_signed));
      std::memcpy(to, &sum, 4);
    }
}

bool execute(const Instruction& i) {
  switch (i.opcode) {
    case 0x49:
      if (i.prefix == kNone && i.in_memory && i.reg == 0) return load_config(i.base), true;
      if (i.prefix == kNone && !i.in_memory && i.reg == 0 && i.rm == 0) {  // tilerelease
        config = {};
        return true;
      }
      if (i.prefix == kF2 && !i.in_memory && i.rm == 0) {
        check_tile("tilezero", i.reg);
        std::memset(tiles[i.reg], 0, sizeof(tiles[i.reg]));
        return true;
      }
      return false;
    case 0x4B:
      if (!i.has_sib) return false;
      if (i.prefix == kF2 || i.prefix == k66) return load(i), true;
      if (i.prefix == kF3) return store(i), true;
      return false;
    case 0x5C:
      if (i.prefix != kF3 || i.in_memory) return false;
      return multiply_bf16(i), true;
    default:
      if (i.in_memory) return false;
      return multiply_int8(i), true;
  }
}

struct sigaction before;

void on_illegal_instruction(int signal, siginfo_t* info, void* context) {
  greg_t* gregs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction instruction;
  if (!decode(gregs, instruction) || !execute(instruction)) {
    sigaction(SIGILL, &before, nullptr);  // who comes back meets it again, without this handler
    return;
  }
  __atomic_add_fetch(&executed, 1, __ATOMIC_RELAXED);
  gregs[REG_RIP] += instruction.length;
}

}  // namespace

extern "C" {

void amx_trap() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &before);
}
void amx_release() { sigaction(SIGILL, &before, nullptr); }
long amx_executed() { return __atomic_load_n(&executed, __ATOMIC_RELAXED); }
// Whether the calling thread has left tiles configured.
int amx_in_use() { return config.palette; }

// Faults that must be found: tiles that nobody has configured, and what GCC 12 makes of its own
// _tile_loadconfig, which tells it that eight bytes are read: the others are not written.
void amx_planted_unconfigured() { __asm__ volatile("tilezero %%tmm0" ::); }
void amx_planted_half_configured() {
  const Config half{1, 0, {}, {}, {}};
  __asm__ volatile("ldtilecfg %0\n\ttilezero %%tmm0" ::"m"(half));
}
}
