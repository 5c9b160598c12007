// The tile instructions behind names, so that the same kernel also runs on an emulation of them.
// Include after isa/vec.hpp; FASTNN_AMX_EMULATED chooses. Tile numbers are literals 0 to 7; every
// tile is 16 rows of 64 bytes.
//
//   TILE_ZERO(c)  TILE_LOAD(t, p, stride)  TILE_STORE(t, p, stride)
//   TILE_BF16(c, a, b)      c[m][n] += sum over k of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]
//   TILE_S8S8, TILE_U8S8    likewise in fours, into int32
//   tiles_enter(), tiles_leave()   around a thread's use of the tiles: oneDNN keeps its own
//                                  configuration in the same registers, so none is left behind
#pragma once

namespace fastnn::FASTNN_TARGET {

#ifndef FASTNN_AMX_EMULATED

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static const TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Not the compiler's own functions: GCC's tell it that ldtilecfg reads eight bytes and that
// tileloadd reads none, so that it leaves out what was written for them (seen with GCC 12).
static void tiles_enter() { __asm__ volatile("ldtilecfg %0" ::"m"(kTileConfig)); }
static void tiles_leave() { __asm__ volatile("tilerelease"); }

// Every tile instruction is volatile: they stay in their order, the registers being nobody's
// operands.
#define TILE_ZERO(c) __asm__ volatile("tilezero %%tmm" #c::)
#define TILE_LOAD(t, p, stride)                                                                 \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"((const void*)(p)), "r"(int64_t(stride)) \
                   : "memory")
#define TILE_STORE(t, p, stride)                                                               \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void*)(p)), "r"(int64_t(stride)) \
                   : "memory")
#define TILE_BF16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)
#define TILE_S8S8(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)
#define TILE_U8S8(c, a, b) __asm__ volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

#else

// The arithmetic of the manual: bfloat16 products summed in two float32 chains (even and odd) that
// are then added to C; denormal inputs are read as zero and denormal results written as zero.
struct EmulatedTile {
  alignas(64) uint8_t row[16][64];
};
static thread_local EmulatedTile emulated[8];
// A use without tiles_enter is a fault on real hardware, and here.
static thread_local bool configured = false;

static void tiles_enter() { configured = true; }
static void tiles_leave() { configured = false; }
FASTNN_INLINE EmulatedTile& emulated_tile(int t) {
  if (!configured) __builtin_trap();
  return emulated[t];
}
static void emulated_load(int t, const char* p, int64_t stride) {
  for (int r = 0; r < 16; r++) __builtin_memcpy(emulated_tile(t).row[r], p + r * stride, 64);
}
static void emulated_store(int t, char* p, int64_t stride) {
  for (int r = 0; r < 16; r++) __builtin_memcpy(p + r * stride, emulated_tile(t).row[r], 64);
}
FASTNN_INLINE float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f * x : x; }
static void emulated_bf16(int c, int a, int b) {
  EmulatedTile &tc = emulated_tile(c), &ta = emulated_tile(a), &tb = emulated_tile(b);
  for (int m = 0; m < 16; m++) {
    float even[16] = {}, odd[16] = {}, sum[16];
    for (int k = 0; k < 16; k++) {
      bf16 pa[2], pb[32];
      __builtin_memcpy(pa, ta.row[m] + 4 * k, 4);
      __builtin_memcpy(pb, tb.row[k], 64);
      const float a0 = flushed(to_f32(pa[0])), a1 = flushed(to_f32(pa[1]));
      for (int n = 0; n < 16; n++) {
        even[n] = flushed(__builtin_fmaf(a0, flushed(to_f32(pb[2 * n])), even[n]));
        odd[n] = flushed(__builtin_fmaf(a1, flushed(to_f32(pb[2 * n + 1])), odd[n]));
      }
    }
    __builtin_memcpy(sum, tc.row[m], 64);
    for (int n = 0; n < 16; n++) sum[n] = flushed(sum[n] + flushed(even[n] + odd[n]));
    __builtin_memcpy(tc.row[m], sum, 64);
  }
}
template <class A>
static void emulated_int8(int c, int a, int b) {
  EmulatedTile &tc = emulated_tile(c), &ta = emulated_tile(a), &tb = emulated_tile(b);
  for (int m = 0; m < 16; m++) {
    int32_t sum[16];
    __builtin_memcpy(sum, tc.row[m], 64);
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++)
        for (int i = 0; i < 4; i++)
          sum[n] += int32_t(A(ta.row[m][4 * k + i])) * int8_t(tb.row[k][4 * n + i]);
    __builtin_memcpy(tc.row[m], sum, 64);
  }
}

#define TILE_ZERO(c) __builtin_memset(emulated_tile(c).row, 0, 1024)
#define TILE_LOAD(t, p, stride) emulated_load(t, (const char*)(p), stride)
#define TILE_STORE(t, p, stride) emulated_store(t, (char*)(p), stride)
#define TILE_BF16(c, a, b) emulated_bf16(c, a, b)
#define TILE_S8S8(c, a, b) emulated_int8<int8_t>(c, a, b)
#define TILE_U8S8(c, a, b) emulated_int8<uint8_t>(c, a, b)

#endif

}  // namespace fastnn::FASTNN_TARGET
