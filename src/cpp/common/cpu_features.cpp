#include "common/cpu_features.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastnn {

#if defined(__x86_64__)
bool request_amx_permission() {
  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux 5.16 and later; refused before.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

static uint64_t xgetbv0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
}

static CpuFeatures detect() {
  CpuFeatures f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave) return f;
  const uint64_t xcr0 = xgetbv0();
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6,
             tiles = (xcr0 & 0x60000) == 0x60000;
  unsigned a7, b7, c7, d7;
  if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return f;
  f.avx2 = ymm && fma && f16c && (b7 & (1u << 5));
  const unsigned need512 = (1u << 16) | (1u << 17) | (1u << 28) | (1u << 30) | (1u << 31);
  f.avx512 = f.avx2 && zmm && (b7 & need512) == need512;
  f.avx512_vnni = f.avx512 && (c7 & (1u << 11));
  unsigned a71 = 0, b71, c71, d71;
  if (a7 >= 1) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
  f.avx512_bf16 = f.avx512 && (a71 & (1u << 5));
  const bool amx_tile = d7 & (1u << 24);
  if (f.avx512 && tiles && amx_tile && request_amx_permission()) {
    f.amx_bf16 = d7 & (1u << 22);
    f.amx_int8 = d7 & (1u << 25);
  }
  return f;
}
#else
bool request_amx_permission() { return false; }
static CpuFeatures detect() { return {}; }
#endif

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

static std::atomic<bool> amx_assumed{false};
void assume_amx(bool assumed) { amx_assumed = assumed; }

static bool usable(Isa isa) {
  [[maybe_unused]] const CpuFeatures& f = cpu_features();
  switch (isa) {
    case Isa::portable:
      return true;
#ifdef FASTNN_HAS_AVX2
    case Isa::avx2:
      return f.avx2;
#endif
#ifdef FASTNN_HAS_AVX512
    case Isa::avx512:
      return f.avx512;
    case Isa::amx_emulated:
      return f.avx512;
#endif
#ifdef FASTNN_HAS_AMX
    case Isa::amx:
      return (f.amx_bf16 && f.amx_int8) || (f.avx512 && amx_assumed);
#endif
    default:
      return false;
  }
}

const char* isa_name(Isa isa) {
  static const char* names[kIsas] = {"portable", "avx2", "avx512", "amx", "amx-emulated"};
  return names[int(isa)];
}

std::vector<std::string> available_isas() {
  std::vector<std::string> out;
  for (int i = 0; i < kIsas; i++)
    if (usable(Isa(i))) out.push_back(isa_name(Isa(i)));
  return out;
}

static Isa capped(const std::string& name) {
  for (int i = 0; i < kIsas; i++) {
    if (name != isa_name(Isa(i))) continue;
    if (Isa(i) == Isa::amx_emulated && usable(Isa(i))) return Isa(i);
    int best = i > int(Isa::amx) ? int(Isa::amx) : i;
    while (!usable(Isa(best))) best--;
    return Isa(best);
  }
  throw std::invalid_argument("isa: expected portable, avx2, avx512, amx or amx-emulated, got '" +
                              name + "'");
}

static std::atomic<int>& active() {
  static std::atomic<int> isa([] {
    const char* cap = std::getenv("FASTNN_ISA");
    return int(capped(cap && *cap ? cap : "amx"));
  }());
  return isa;
}

Isa active_isa() { return Isa(active().load(std::memory_order_relaxed)); }
void set_isa(const std::string& name) { active().store(int(capped(name))); }

}  // namespace fastnn
