// Kernels with planted bugs in what sm_90 does beside its threads: copies of tiles, and products of
// warpgroups.
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/host_emulation/planted.hpp"
#include "cuda/ptx_sm90.cuh"

using namespace fastnn;

namespace planted {
namespace {

enum Bug {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kWrongParity,
  kTooManyBytes,
  kNoInitFence,
  kNoInitBarrier,
  kMisplacedTile,
  kNoSwizzle,
  kNoProxyFence,
  kNoFence,
  kNoProductWait,
  kNeverWaited,
  kOverwritten,
  kRegistersReused,
  kWrongStride,
  kRegistersOfOneWarp,
  kRegistersWrongWay,
  kLongSum,
  kShortSums  // which is right
};

// ---- copies of tiles ----------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int kRows = 8, kRow = 32, kTiles = 4;  // floats; a row is a whole pattern of 128 bytes
constexpr int kTileBytes = kRows * kRow * 4;

// Tiles of a matrix of 30 columns, the last two of which are zeros therefore, in two stages; each
// thread sums what lies at its place.
void tiles(const TensorMap map, float* out, Bug bug) {
  char* shared = dynamic_shared<char>();
  auto* full = reinterpret_cast<uint64_t*>(shared + 2 * kTileBytes);
  uint64_t* empty = full + 2;
  const int i = int(threadIdx.x);
  if (i == 0) {
    for (int s = 0; s < 2; s++)
      ptx::mbarrier_init(full + s, 1), ptx::mbarrier_init(empty + s, kThreads);
    if (bug != kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (bug != kNoInitBarrier) __syncthreads();
  auto load = [&](int tile) {
    const int s = tile % 2;
    if (bug != kNoEmptyWait) ptx::mbarrier_wait(empty + s, 1 - tile / 2 % 2);
    ptx::mbarrier_arrive_expect(full + s, bug == kTooManyBytes ? kTileBytes + 16 : kTileBytes);
    ptx::copy_tile<2>(shared + s * kTileBytes + (bug == kMisplacedTile ? 64 : 0), map, full + s,
                      {0, tile * kRows});
  };
  float sum = 0;
  if (i == 0) load(0);
  for (int tile = 0; tile < kTiles; tile++) {
    const int s = tile % 2;
    if (i == 0 && tile + 1 < kTiles) load(tile + 1);
    if (bug != kNoFullWait) ptx::mbarrier_wait(full + s, (tile / 2 + (bug == kWrongParity)) % 2);
    const int row = i / kRow, column = i % kRow;
    const int piece = bug == kNoSwizzle ? column / 4 : column / 4 ^ row;
    sum += reinterpret_cast<const float*>(shared +
                                          s * kTileBytes)[row * kRow + piece * 4 + column % 4];
    ptx::mbarrier_arrive(empty + s);
  }
  out[i] = sum;
}

std::string run_tiles(Bug bug) {
  std::vector<float> in(30 * kRows * kTiles), out(kThreads, NAN);
  // Rows of 32 floats apart, of which the map knows 30.
  std::vector<float> matrix(kRow * kRows * kTiles, NAN);
  for (size_t i = 0; i < in.size(); i++) matrix[i / 30 * kRow + i % 30] = in[i] = float(i % 37);
  TensorLayout layout;
  layout.data = matrix.data(), layout.element_bytes = 4, layout.dims = 2;
  layout.sizes[0] = 30, layout.sizes[1] = kRows * kTiles, layout.strides[1] = kRow * 4;
  layout.box[0] = kRow, layout.box[1] = kRows, layout.swizzle = Swizzle::bytes128;
  launch(tiles, dim3(1), dim3(kThreads), 2 * kTileBytes + 32, nullptr, tensor_map(layout),
         out.data(), bug);
  for (int i = 0; i < kThreads; i++) {
    float expected = 0;
    for (int tile = 0; tile < kTiles; tile++)
      if (i % kRow < 30) expected += in[(tile * kRows + i / kRow) * 30 + i % kRow];
    if (!(out[i] == expected)) return wrong_result(i, out[i], expected);
  }
  return "";
}

// ---- a product of a warpgroup: 64 x 32 bytes of K times 32 bytes of K x 16 ----------------------

constexpr int kM = 64, kN = 16;
using emulation::MatrixType;

struct Kind {
  MatrixType type;
  Swizzle swizzle;
  bool a_in_registers, a_across, b_across;
};

int size_of(MatrixType t) {
  return t == MatrixType::tf32 ? 4 : t == MatrixType::bf16 || t == MatrixType::f16 ? 2 : 1;
}

// The bits of a small number, the same in all types.
uint32_t bits_of(MatrixType t, int x) {
  switch (t) {
    case MatrixType::s8:
    case MatrixType::u8:
      return uint8_t(x);
    case MatrixType::e4m3:  // -2 to 2
      return (x < 0 ? 0x80u : 0u) | (x == 0 ? 0u : std::abs(x) == 1 ? 0x38u : 0x40u);
    case MatrixType::e5m2:
      return __float2half_rn(float(x)).bits >> 8;
    case MatrixType::bf16:
      return __float2bfloat16_rn(float(x)).bits;
    case MatrixType::f16:
      return __float2half_rn(float(x)).bits;
    default:
      return std::bit_cast<uint32_t>(float(x)) | 0x1FFFu;  // which the tensor cores do not look at
  }
}

int a_value(int m, int k) { return (m * 5 + k * 3 + m / 8) % 5 - 2; }
int b_value(int k, int n) { return (n * 7 + k * 2 + n / 8) % 5 - 2; }

// Where byte `byte` of line `line` lies, `lines` of them in a tile that begins with a pattern:
// lines of swizzle_bytes, in groups of eight; whole tiles of them follow each other.
int place(Swizzle swizzle, int lines, int line, int byte) {
  const int pitch = swizzle_bytes(swizzle);
  int at = byte / pitch * lines * pitch + line * pitch + byte % pitch;
  if (swizzle != Swizzle::none) at ^= (at >> 3) & (pitch - 16);
  return at;
}

void store(char* at, uint32_t bits, int size) { std::memcpy(at, &bits, size); }

int times_of(Bug bug) { return bug == kLongSum || bug == kShortSums ? 2000 : 2; }

void warpgroup(const Kind kind, float* out, Bug bug) {
  char* shared = dynamic_shared<char>();
  const int i = int(threadIdx.x), lane = i % 32, size = size_of(kind.type), depth = 32 / size;
  char *a = shared, *b = shared + 16384;
  for (int at = i; at < kM * depth; at += 128) {
    const int m = at / depth, k = at % depth;
    store(a + (kind.a_across ? place(kind.swizzle, depth, k, m * size)
                             : place(kind.swizzle, kM, m, k * size)),
          bits_of(kind.type, a_value(m, k)), size);
  }
  for (int at = i; at < kN * depth; at += 128) {
    const int n = at / depth, k = at % depth;
    store(b + (kind.b_across ? place(kind.swizzle, depth, k, n * size)
                             : place(kind.swizzle, kN, n, k * size)),
          bits_of(kind.type, b_value(k, n)), size);
  }
  if (bug != kNoProxyFence) ptx::fence_proxy_async();
  __syncthreads();

  uint32_t registers[4];
  for (int r = 0; r < 4; r++) {
    registers[r] = 0;
    for (int e = 0; e < 4 / size; e++)
      registers[r] |= bits_of(kind.type, a_value(i / 32 * 16 + lane / 4 + r % 2 * 8,
                                                 r / 2 * depth / 2 + lane % 4 * (4 / size) + e))
                      << (8 * size * e);
  }
  const int pitch = swizzle_bytes(kind.swizzle);
  // Without swizzling, "leading" and "stride" count groups of 16 bytes; with it, see
  // matrix_descriptor.
  auto descriptor = [&](const char* at, bool across, int lines) {
    const int group = 8 * pitch, tile = lines * pitch;
    if (kind.swizzle != Swizzle::none)
      return ptx::matrix_descriptor(at, tile, bug == kWrongStride ? 2 * group : group,
                                    kind.swizzle);
    return across ? ptx::matrix_descriptor(at, group, tile, kind.swizzle)
                  : ptx::matrix_descriptor(at, tile, group, kind.swizzle);
  };
  float d[kN / 2], total[kN / 2] = {};
  for (float& x : d) x = 1;
  // Twice: d = 1 + 2 a b. Or more often than 8-bit floats can be summed by the tensor cores alone.
  if (bug != kNoFence) ptx::wgmma_fence();
  for (int times = 0; times < times_of(bug); times++) {
    if (bug == kShortSums && times % 4 == 0) {
      ptx::wgmma_wait<0>();
      for (int e = 0; e < kN / 2; e++) total[e] += d[e], d[e] = 0;
      ptx::wgmma_fence();
    }
    const emulation::WarpgroupProduct product{
        kind.type,
        kind.type,
        kN,
        kind.a_in_registers ? registers : nullptr,
        descriptor(a, kind.a_across, kind.a_across ? depth : kM),
        descriptor(b, kind.b_across, kind.b_across ? depth : kN),
        kind.a_across,
        kind.b_across,
        true,
        d};
    emulation::warpgroup_product(product, std::source_location::current());
    ptx::wgmma_commit();
  }
  if (bug == kOverwritten) {
    if (i == 0) b[0] ^= 1, ptx::fence_proxy_async();
    __syncthreads();
  }
  if (bug == kRegistersReused) registers[0] = 7;
  if (bug == kNoProductWait)
    ptx::wgmma_wait<1>();
  else if (bug != kNeverWaited)
    ptx::wgmma_wait<0>();
  if (bug == kRegistersOfOneWarp ? i < 32 : bug == kRegistersWrongWay) ptx::fewer_registers<40>();
  if (bug == kRegistersWrongWay) ptx::fewer_registers<64>();  // which is more than 40
  if (bug == kShortSums)
    for (int e = 0; e < kN / 2; e++) d[e] += total[e];
  const int row = i / 32 * 16 + lane / 4;
  for (int j = 0; j < kN / 8; j++)
    for (int e = 0; e < 4; e++)
      out[(row + e / 2 * 8) * kN + 8 * j + lane % 4 * 2 + e % 2] =
          kind.type == MatrixType::s8
              ? float(std::bit_cast<int>(d[4 * j + e]) - std::bit_cast<int>(1.0f) + 1)
              : d[4 * j + e];
}

std::string run_product(Kind kind, Bug bug) {
  std::vector<float> out(kM * kN, NAN);
  launch(warpgroup, dim3(1), dim3(128), 32768, nullptr, kind, out.data(), bug);
  for (int m = 0; m < kM; m++)
    for (int n = 0; n < kN; n++) {
      int sum = 0;
      for (int k = 0; k < 32 / size_of(kind.type); k++) sum += a_value(m, k) * b_value(k, n);
      const float expected = float(1 + times_of(bug) * sum);
      if (!(out[m * kN + n] == expected))
        return wrong_result(m * kN + n, out[m * kN + n], expected);
    }
  return "";
}

// Every type, layout and swizzling that there is.
std::string run_products() {
  for (const Swizzle swizzle :
       {Swizzle::none, Swizzle::bytes128, Swizzle::bytes64, Swizzle::bytes32})
    for (const MatrixType type : {MatrixType::bf16, MatrixType::f16, MatrixType::tf32,
                                  MatrixType::e4m3, MatrixType::e5m2, MatrixType::s8})
      for (int way = 0; way < 8; way++) {
        const Kind kind{type, swizzle, (way & 1) != 0, (way & 2) != 0, (way & 4) != 0};
        if ((kind.a_across || kind.b_across) && size_of(type) != 2) continue;
        const std::string found = run_product(kind, kNone);
        if (!found.empty()) return found;
      }
  return "";
}

constexpr Kind kPlain{MatrixType::bf16, Swizzle::bytes128, false, false, true};
constexpr Kind kFloat8{MatrixType::e4m3, Swizzle::bytes128, false, false, false};
constexpr Kind kFromRegisters{MatrixType::bf16, Swizzle::bytes128, true, false, false};

}  // namespace

const std::map<std::string, std::function<std::string()>> kSm90 = {
    {"tiles", [] { return run_tiles(kNone); }},
    {"no-full-wait", [] { return run_tiles(kNoFullWait); }},
    {"no-empty-wait", [] { return run_tiles(kNoEmptyWait); }},
    {"wrong-parity", [] { return run_tiles(kWrongParity); }},
    {"too-many-bytes", [] { return run_tiles(kTooManyBytes); }},
    {"no-init-fence", [] { return run_tiles(kNoInitFence); }},
    {"no-init-barrier", [] { return run_tiles(kNoInitBarrier); }},
    {"misplaced-tile", [] { return run_tiles(kMisplacedTile); }},
    {"no-swizzle", [] { return run_tiles(kNoSwizzle); }},
    {"products", run_products},
    {"no-proxy-fence", [] { return run_product(kPlain, kNoProxyFence); }},
    {"no-fence", [] { return run_product(kPlain, kNoFence); }},
    {"no-product-wait", [] { return run_product(kPlain, kNoProductWait); }},
    {"never-waited", [] { return run_product(kPlain, kNeverWaited); }},
    {"overwritten", [] { return run_product(kPlain, kOverwritten); }},
    {"registers-reused", [] { return run_product(kFromRegisters, kRegistersReused); }},
    {"wrong-stride", [] { return run_product(kPlain, kWrongStride); }},
    {"registers-of-one-warp", [] { return run_product(kPlain, kRegistersOfOneWarp); }},
    {"registers-wrong-way", [] { return run_product(kPlain, kRegistersWrongWay); }},
    {"short-sums", [] { return run_product(kFloat8, kShortSums); }},
    {"long-sum", [] { return run_product(kFloat8, kLongSum); }},
};

}  // namespace planted
