// A weight of 4 or 8 bits times x in bfloat16, float16 or float32, on tensor cores, two ways.
//
// Up to 16 rows of x reading the weight is all that takes time: each byte goes once from global
// memory to the registers of the thread that multiplies it, without shared memory. Sixteen rows of
// the weight are the left operand of mma.sync, rows of x its columns. A sum does not care in which
// order k comes, so that what a thread gives to several products is one access of 16 bytes (4 where
// groups are short). Eight warps share K.
//
// Many rows: the tiles of the matrix product. The weight's bytes of the next step are in registers
// while a step is multiplied, and become a tile then.
//
// Either way q - zero point is exact in 16 bits, and a scale multiplies the sum of its group.
// float32 is exact as three bfloat16 in the first way; in the second the weight is scaled in
// float32, and split as well.
#include "cuda/quant/weight_only.hpp"

#include <type_traits>

#include "cuda/quant/codes.cuh"
#include "cuda/quant/finish.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kLanes = 32;

template <int each>
__device__ __forceinline__ void finish(const WeightOnly& c, int64_t m, int64_t n,
                                       float (&sums)[each], int count) {
  finish_row(c.type, c.out, c.n, m, n, c.bias, c.bias_type, c.activation, sums, count);
}

// One number, less its zero point (over `offset`, as codes.cuh has it).
__device__ inline float decode(WeightFormat format, uint32_t code, float zero) {
  switch (format) {
    case WeightFormat::s8:
      return Integers::decode(code, 128, zero + 128);
    case WeightFormat::s4:
      return Integers::decode(code, 8, zero + 8);
    case WeightFormat::u4:
      return Integers::decode(code, 0, zero);
    case WeightFormat::e4m3:
      return E4M3::decode(code, 0, 0);
    default:
      return E5M2::decode(code, 0, 0);
  }
}
__device__ inline float zero_at(const WeightOnly& c, int64_t at) {
  return c.zero ? float(c.zero[at]) : 0;
}

// ---- few rows ----------------------------------------------------------------------------------

constexpr int kWarps = 8, kWeights = 16, kRows = 8;
constexpr int64_t kMostRows = 16;

// A word of a weight as pairs of 16 bits, W elements. Of nibbles element j is in a pair with j + 4.
struct Nibbles {
  static constexpr int kEach = 8;
};
template <class Code>
struct Bytes {
  static constexpr int kEach = 4;
};

struct HalfBf16 {
  static constexpr uint32_t kAbove = 0x43004300;  // 128 + a number of 4 bits
  static constexpr float kBase = 128;
  __device__ static uint32_t pack(float a, float b) { return ptx::pack_bf16(a, b); }
  __device__ static uint32_t subtract(uint32_t a, uint32_t b) {
    return ptx::fma_bf16x2(b, pack(-1, -1), a);
  }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
};
struct HalfF16 {
  static constexpr uint32_t kAbove = 0x64006400;
  static constexpr float kBase = 1024;
  __device__ static uint32_t pack(float a, float b) { return ptx::pack_f16(a, b); }
  __device__ static uint32_t subtract(uint32_t a, uint32_t b) {
    return ptx::fma_f16x2(b, pack(-1, -1), a);
  }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_f16(d, a, b);
  }
};

template <class Half>
__device__ __forceinline__ void pairs_of(uint32_t (&pairs)[4], uint32_t word, uint32_t offset,
                                         float zero, Nibbles) {
  const float less = Half::kBase + float(offset) + zero;
  const uint32_t codes = word ^ offset * 0x11111111, base = Half::pack(less, less);
#pragma unroll
  for (int j = 0; j < 4; j++)
    pairs[j] = Half::subtract((codes >> 4 * j & 0x000F000F) | Half::kAbove, base);
}
template <class Half, class Code>
__device__ __forceinline__ void pairs_of(uint32_t (&pairs)[2], uint32_t word, uint32_t offset,
                                         float zero, Bytes<Code>) {
  float x[4];
#pragma unroll
  for (int e = 0; e < 4; e++)
    x[e] = Code::decode(word >> 8 * e & 255, offset, zero + float(offset));
  pairs[0] = Half::pack(x[0], x[1]), pairs[1] = Half::pack(x[2], x[3]);
}

// x in the same order: `parts` numbers that add up to each element.
template <class T, class Half, int each>
struct Columns {
  static constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;
  uint32_t pairs[kParts][each / 2];

  __device__ __forceinline__ void load(const T* from, bool exists) {
    if constexpr (kParts == 1) {
      uint32_t two[each / 2] = {};  // elements 2 i and 2 i + 1
      if (exists) {
        if constexpr (each == 8) {
          const uint4 four = *reinterpret_cast<const uint4*>(from);
          memcpy(two, &four, sizeof four);
        } else {
          const uint2 pair = *reinterpret_cast<const uint2*>(from);
          memcpy(two, &pair, sizeof pair);
        }
      }
#pragma unroll
      for (int i = 0; i < each / 2; i++) {
        if constexpr (each == 4) {
          pairs[0][i] = two[i];
        } else {
          const uint32_t low = two[i / 2] >> 16 * (i % 2) & 0xFFFF,
                         high = two[i / 2 + 2] >> 16 * (i % 2);
          pairs[0][i] = low | high << 16;
        }
      }
    } else {
      float x[each] = {};
      if (exists)
#pragma unroll
        for (int e = 0; e < each; e += 4) {
          const float4 four = *reinterpret_cast<const float4*>(from + e);
          x[e] = four.x, x[e + 1] = four.y, x[e + 2] = four.z, x[e + 3] = four.w;
        }
#pragma unroll
      for (int p = 0; p < kParts; p++) {
        // Cut, so that three parts have all digits, and the largest number does not become
        // infinite.
        uint32_t cut[each];
#pragma unroll
        for (int e = 0; e < each; e++) {
          cut[e] = __float_as_uint(x[e]) & 0xFFFF0000;
          const float rest = x[e] - __uint_as_float(cut[e]);
          if (x[e] != x[e]) cut[e] = 0x7FC00000;
          x[e] = fabsf(x[e]) <= 3.402823466e38f ? rest : 0;
        }
#pragma unroll
        for (int i = 0; i < each / 2; i++) {
          const uint32_t low = each == 4 ? cut[2 * i] : cut[i],
                         high = each == 4 ? cut[2 * i + 1] : cut[(i + 4) % each];
          pairs[p][i] = low >> 16 | high;
        }
      }
    }
  }
};

// words: of a thread at a time, 4 or 1. Asked for three blocks a multiprocessor the compiler takes
// the registers it needs; asked for none it aims at five, and spills.
template <class T, class Word, int words>
__global__ void __launch_bounds__(kWarps* kLanes, 3)
    few_rows(const WeightOnly c, const int64_t group) {
  using Half = std::conditional_t<std::is_same_v<T, __half>, HalfF16, HalfBf16>;
  constexpr int each = Word::kEach, share = words * each, block = 4 * share;
  FASTNN_SHARED(float, sums, [kWarps][kWeights][kRows + 1]);
  const int warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const int place = lane / 4;
  const int64_t first = int64_t(blockIdx.x) * kWeights, first_row = int64_t(blockIdx.y) * kRows;
  const int64_t row = first_row + place;
  // Those beyond the last one are the last one again, and not written.
  const int64_t upper = first + place < c.n ? first + place : c.n - 1,
                lower = first + place + 8 < c.n ? first + place + 8 : c.n - 1;
  const uint32_t offset = c.format == WeightFormat::s8 ? 128 : c.format == WeightFormat::s4 ? 8 : 0;
  const T* x = reinterpret_cast<const T*>(c.x) + row * c.x_row;
  float totals[4] = {};
#pragma unroll 2
  for (int64_t begin = int64_t(warp) * block; begin < c.k; begin += kWarps * block) {
    const int64_t k = begin + lane % 4 * share, at = begin / group;
    uint32_t a[words] = {}, b[words] = {};
    if (k < c.k) {
      const int64_t byte = each == 8 ? k / 2 : k;
      const uint8_t *from = c.w + upper * c.w_row + byte, *below = c.w + lower * c.w_row + byte;
      if constexpr (words == 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from),
                    others = *reinterpret_cast<const uint4*>(below);
        memcpy(a, &four, sizeof four), memcpy(b, &others, sizeof others);
      } else {
        a[0] = *reinterpret_cast<const uint32_t*>(from);
        b[0] = *reinterpret_cast<const uint32_t*>(below);
      }
    }
    const int64_t upper_at = upper * c.groups + at, lower_at = lower * c.groups + at;
    const float upper_zero = zero_at(c, upper_at), lower_zero = zero_at(c, lower_at);
    float products[4] = {};
#pragma unroll
    for (int w = 0; w < words; w++) {
      uint32_t high[each / 2], low[each / 2];
      pairs_of<Half>(high, a[w], offset, upper_zero, Word{});
      pairs_of<Half>(low, b[w], offset, lower_zero, Word{});
      // Zeros beyond the end of K, where the weight is whatever.
      Columns<T, Half, each> columns;
      columns.load(x + k + w * each, k < c.k && row < c.m);
#pragma unroll
      for (int s = 0; s < each / 4; s++) {
        const uint32_t left[4] = {high[2 * s], low[2 * s], high[2 * s + 1], low[2 * s + 1]};
#pragma unroll
        for (int p = 0; p < columns.kParts; p++) {
          const uint32_t right[2] = {columns.pairs[p][2 * s], columns.pairs[p][2 * s + 1]};
          Half::multiply(products, left, right);
        }
      }
    }
    const float upper_scale = c.scale[upper_at], lower_scale = c.scale[lower_at];
    totals[0] += products[0] * upper_scale, totals[1] += products[1] * upper_scale;
    totals[2] += products[2] * lower_scale, totals[3] += products[3] * lower_scale;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) sums[warp][place + e / 2 * 8][lane % 4 * 2 + e % 2] = totals[e];
  __syncthreads();
  const int weight = int(threadIdx.x) % kWeights, column = int(threadIdx.x) / kWeights;
  if (column >= kRows || first + weight >= c.n || first_row + column >= c.m) return;
  float sum[1] = {};
#pragma unroll
  for (int w = 0; w < kWarps; w++) sum[0] += sums[w][weight][column];
  finish(c, first_row + column, first + weight, sum, 1);
}

bool aligned(const void* data, int64_t row, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0 && row % bytes == 0;
}

template <class T, class Word>
bool run_few(const WeightOnly& c, int64_t group, void* stream) {
  const auto fits = [&](int words) {
    const int64_t share = words * Word::kEach;
    return aligned(c.w, c.w_row, 4 * words) && c.k % share == 0 &&
           (c.groups == 1 || group % (4 * share) == 0);
  };
  if (!aligned(c.x, c.x_row * int64_t(sizeof(T)), 16)) return false;
  if (!fits(4) && !fits(1)) return false;
  launch(fits(4) ? few_rows<T, Word, 4> : few_rows<T, Word, 1>,
         dim3(unsigned(ceil_div(c.n, kWeights)), unsigned(ceil_div(c.m, kRows))),
         dim3(kWarps * kLanes), 0, stream, c, group);
  return true;
}
template <class T>
bool run_few(const WeightOnly& c, int64_t group, void* stream) {
  if (c.m > kMostRows || c.k == 0 || c.batch_invariant) return false;
  switch (c.format) {
    case WeightFormat::s8:
      return run_few<T, Bytes<Integers>>(c, group, stream);
    case WeightFormat::e4m3:
      return run_few<T, Bytes<E4M3>>(c, group, stream);
    case WeightFormat::e5m2:
      return run_few<T, Bytes<E5M2>>(c, group, stream);
    default:
      return run_few<T, Nibbles>(c, group, stream);
  }
}

// ---- many rows ---------------------------------------------------------------------------------

// A thread's pieces of a tile of the weight: fetched as they are a step ahead, then put as numbers.
template <class B, class Element, int threads>
struct Weights {
  static constexpr int n = B::kEach, kCount = B::kPieces / threads;
  static constexpr bool kWide = sizeof(Element) == 4;  // scaled at once
  const WeightOnly& c;
  int64_t first, group;
  bool whole;  // pieces can be read as words
  uint2 raw[kCount];

  __device__ static __forceinline__ int row_of(int i) {
    return (i * threads + int(threadIdx.x)) / B::kRow;
  }
  __device__ static __forceinline__ int piece_of(int i) {
    return (i * threads + int(threadIdx.x)) % B::kRow;
  }

  __device__ __forceinline__ void fetch(int64_t step) {
    const bool nibbles = is_nibble_format();
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int64_t at = first + row_of(i), k = step * B::kDepth + piece_of(i) * n;
      raw[i] = make_uint2(0, 0);
      if (at >= c.n || k >= c.k) continue;
      const uint8_t* from = c.w + at * c.w_row + (nibbles ? k / 2 : k);
      if (whole && k + n <= c.k) {
        raw[i] = load_codes<n>(from, nibbles);
        continue;
      }
      const int64_t left = c.k - k < n ? c.k - k : n, bytes = nibbles ? left / 2 : left;
#pragma unroll
      for (int e = 0; e < n; e++)
        if (e < bytes) (e < 4 ? raw[i].x : raw[i].y) |= uint32_t(from[e]) << 8 * (e % 4);
    }
  }

  __device__ __forceinline__ void put(char* tile, int64_t step) const {
    const bool nibbles = is_nibble_format();
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int64_t at = first + row_of(i), k = step * B::kDepth + piece_of(i) * n;
      const int64_t row = at < c.n ? at : c.n - 1;
      float x[n];
#pragma unroll
      for (int e = 0; e < n; e++) {
        const int64_t level = row * c.groups + (k + e < c.k ? k + e : c.k - 1) / group;
        x[e] = decode(c.format, code_of(raw[i], e, nibbles), zero_at(c, level));
        if (kWide) x[e] = __fmul_rn(x[e], c.scale[level]);
        if (k + e >= c.k || at >= c.n) x[e] = 0;
      }
      Element elements[n];
#pragma unroll
      for (int e = 0; e < n; e++) elements[e] = from_float<Element>(x[e]);
      uint4 together;
      memcpy(&together, elements, sizeof together);
      *reinterpret_cast<uint4*>(tile + B::offset(row_of(i), piece_of(i))) = together;
    }
  }

  __device__ __forceinline__ bool is_nibble_format() const {
    return c.format == WeightFormat::s4 || c.format == WeightFormat::u4;
  }
};

// Of 16 bits: after so many steps a sum is one of a group, and its columns' scales are due.
struct GroupScales {
  static constexpr bool kScaled = true;
  const WeightOnly& c;
  int64_t first_column, group_steps;
  __device__ __forceinline__ bool ends(int64_t step) const {
    return step % group_steps == group_steps - 1;
  }
  __device__ __forceinline__ float at(int64_t step, int column) const {
    const int64_t n = first_column + column;
    return n < c.n ? c.scale[n * c.groups + step / group_steps] : 0;
  }
};

__device__ inline float plain_sum(const WeightOnly& c, int64_t group, int64_t m, int64_t n) {
  const float* x = reinterpret_cast<const float*>(c.x) + m * c.x_row;
  const bool nibbles = c.format == WeightFormat::s4 || c.format == WeightFormat::u4;
  float sum = 0;
  for (int64_t k = 0; k < c.k; k++) {
    const int64_t level = n * c.groups + k / group;
    const uint32_t byte = c.w[n * c.w_row + (nibbles ? k / 2 : k)];
    const float q = decode(c.format, nibbles ? byte >> 4 * (k % 2) & 15 : byte, zero_at(c, level));
    sum = fmaf(x[k], __fmul_rn(q, c.scale[level]), sum);
  }
  return sum;
}

template <class Mode, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    many_rows(const WeightOnly c, const int64_t group, const bool x_pieces, const bool whole,
              const int64_t tile_rows, const int64_t tile_columns) {
  using Element = typename Mode::Element;
  using A = TileOf<Element, S::kM, true, S::kThreads>;
  using B = TileOf<Element, S::kN, true, S::kThreads>;
  constexpr bool kWide = sizeof(Element) == 4;
  char* shared = dynamic_shared<char>();
  const TilePlace tile = tile_place(blockIdx.x, tile_rows, tile_columns);
  const int64_t first_row = tile.row * S::kM, first_column = tile.column * S::kN;
  const Source x{c.x, c.m, c.k, c.x_row, 1, x_pieces};
  Weights<B, Element, S::kThreads> weights{c, first_column, group, whole, {}};
  weights.fetch(0);
  const auto load = [&](int64_t step, char* to_a, char* to_b) {
    A::load(to_a, x, first_row, step * A::kDepth);
    weights.put(to_b, step);
    weights.fetch(step + 1);
  };
  const int steps = int((c.k + A::kDepth - 1) / A::kDepth);
  bool again;
  if constexpr (kWide)
    again = tile_sums<Mode, S, A, B>(shared, steps, load);
  else
    again = tile_sums<Mode, S, A, B>(
        shared, steps, load,
        GroupScales{c, first_column, c.groups == 1 ? steps : group / B::kDepth});
  for_fours<S>(reinterpret_cast<const float*>(shared), first_row, first_column, c.m, c.n,
               [&](int64_t m, int64_t n, float (&sums)[4], int count) {
                 if constexpr (kWide)
                   if (again) {
#pragma unroll
                     for (int e = 0; e < 4; e++)
                       if (e < count) sums[e] = plain_sum(c, group, m, n + e);
                   }
                 finish(c, m, n, sums, count);
               });
}

template <class Mode, class S>
void run_many(const WeightOnly& c, int64_t group, void* stream) {
  constexpr int size = sizeof(typename Mode::Element), n = kPieceBytes / size;
  const int64_t rows = ceil_div(c.m, S::kM), columns = ceil_div(c.n, S::kN);
  launch(many_rows<Mode, S>, dim3(unsigned(rows * columns)), dim3(S::kThreads),
         size_t(kStages) * (S::kM + S::kN) * kRowBytes, stream, c, group,
         aligned(c.x, c.x_row * size, kPieceBytes),
         aligned(c.w, c.w_row, is_nibble(c.format) ? n / 2 : n), rows, columns);
}
template <class Mode>
void run_many(const WeightOnly& c, int64_t group, void* stream) {
  if (ceil_div(c.m, LargeGroups::kM) * ceil_div(c.n, LargeGroups::kN) >= kEnoughBlocks)
    run_many<Mode, LargeGroups>(c, group, stream);
  else
    run_many<Mode, Small>(c, group, stream);
}

template <class T, class Mode>
void run(const WeightOnly& c, int64_t group, void* stream) {
  constexpr int64_t depth = kRowBytes / int64_t(sizeof(T));
  if (run_few<T>(c, group, stream)) return;
  if (sizeof(T) == 2 && c.groups > 1 && group % depth)
    throw std::invalid_argument("weight_only_linear: group_size: expected a multiple of 32, got " +
                                std::to_string(group));
  run_many<Mode>(c, group, stream);
}

}  // namespace

void weight_only(const WeightOnly& c, void* stream) {
  if (c.m == 0 || c.n == 0) return;
  const int64_t group = c.k ? c.k / c.groups : 1;
  switch (c.type) {
    case DType::bf16:
      return run<__nv_bfloat16, Bf16>(c, group, stream);
    case DType::f16:
      return run<__half, F16>(c, group, stream);
    default:
      return run<float, SplitF32<3>>(c, group, stream);
  }
}

}  // namespace fastnn::cuda
