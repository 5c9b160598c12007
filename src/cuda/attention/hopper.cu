// Attention for sm_90a, as in FlashAttention-3 (Shah et al., arXiv:2407.08608). A block has 128
// queries of a head. One thread of its first warpgroup has the copy engine bring the queries, and
// keys and values by tiles of 128; the other two warpgroups have 64 of the queries each, and
// everything between the two products in registers. While one of them computes weights, the tensor
// cores work for the other, and for its own weights of the tile before.
#include "cuda/attention/hopper.hpp"

#include <algorithm>
#include <atomic>

#include "cuda/attention/scores.cuh"
#include "cuda/device.hpp"
#include "cuda/ptx_sm90.cuh"
#include "cuda/warpgroups.cuh"

#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // "declared but never referenced": other architectures' kernels are
                              // empty
#endif

namespace fastnn::cuda {
namespace {

constexpr int kQueries = 128, kKeys = 128;  // of a tile
constexpr int kGroupRows = 64;              // of a consumer
constexpr int kConsumers = 2, kBlockThreads = 128 * (1 + kConsumers);
constexpr int kRow = 128, kColumns = kRow / 2;  // bytes and elements: a row of the pattern
constexpr int kStageRoom = 128 << 10;           // bytes of shared memory for keys and values

// How 16-bit elements are multiplied, and made of two numbers.
#define FASTNN_HALF(Half, wgmma, pack_two)                                                     \
  struct Half {                                                                                \
    template <int count>                                                                       \
    __device__ static __forceinline__ void scores(float (&d)[count], uint64_t q, uint64_t k,   \
                                                  bool accumulate) {                           \
      ptx::wgmma<false, false>(d, q, k, accumulate);                                           \
    }                                                                                          \
    template <int count>                                                                       \
    __device__ static __forceinline__ void results(float (&d)[count],                          \
                                                   const uint32_t (&weights)[4], uint64_t v) { \
      ptx::wgmma<true>(d, weights, v, true);                                                   \
    }                                                                                          \
    __device__ static __forceinline__ uint32_t pack(float low, float high) {                   \
      return ptx::pack_two(low, high);                                                         \
    }                                                                                          \
  };
FASTNN_HALF(HopperBf16, wgmma_bf16, pack_bf16)
FASTNN_HALF(HopperF16, wgmma_f16, pack_f16)
#undef FASTNN_HALF

// Rows of a head in shared memory: the first 64 elements of all, then the others.
template <int rows, int size>
struct HeadTile {
  static constexpr int kBoxBytes = rows * kRow, kBytes = size / kColumns * kBoxBytes;

  __device__ static __forceinline__ void load(char* to, const TensorMap& map, uint64_t* full,
                                              int row, int head, int batch) {
    ptx::mbarrier_arrive_expect(full, kBytes);
#pragma unroll
    for (int box = 0; box < size / kColumns; box++)
      ptx::copy_tile<4>(to + box * kBoxBytes, map, full, {box * kColumns, row, head, batch});
  }
  // Elements 16 `step` to 16 `step` + 15 of rows from `first` on, of which products are sums.
  __device__ static __forceinline__ uint64_t along(const char* tile, int first, int step) {
    return ptx::matrix_descriptor(tile + first * kRow, kPieceBytes, kPattern, Swizzle::bytes128) +
           uint64_t((step / 4 * kBoxBytes + step % 4 * 32) / 16);
  }
  // Rows 16 `step` to 16 `step` + 15, of which products are sums.
  __device__ static __forceinline__ uint64_t across(const char* tile, int step) {
    return ptx::matrix_descriptor(tile, kBoxBytes, kPattern, Swizzle::bytes128) +
           uint64_t(step * 16 * kRow / 16);
  }
};

struct Work {
  uint32_t tiles;         // of queries, of each head
  uint32_t pairs;         // of a batch and a head
  uint32_t together;      // so many pairs' tiles are taken at a time
  uint32_t count;         // of all tiles
  uint32_t heads, share;  // of queries; how many of them have the same keys
  int queries, keys, value_size;
  int high;  // query i sees keys up to i + high
  float scale;
  int q_step[2], k_step[2], v_step[2];  // from head to head, from batch to batch; 0: they are one
  AttentionOperand out;
  float* log_sum;
};

// A tile of queries.
struct Piece {
  uint32_t pair;
  int batch, head, kv_head, first;
  int blocks;  // of keys that any of its queries sees
};

// Of each head the last tile comes first, for which there is most to do where queries see the keys
// before them. Heads that are at work at a time have their keys and values in L2.
__device__ __forceinline__ Piece piece_of(const Work& w, uint32_t index) {
  const uint32_t section = index / (w.together * w.tiles), before = section * w.together;
  const uint32_t width = w.pairs - before < w.together ? w.pairs - before : w.together;
  const uint32_t within = index - before * w.tiles, row = within / width;
  Piece p;
  p.pair = before + within - row * width;
  p.batch = int(p.pair / w.heads), p.head = int(p.pair - uint32_t(p.batch) * w.heads);
  p.kv_head = int(uint32_t(p.head) / w.share);
  p.first = int(w.tiles - 1 - row) * kQueries;
  const int seen = p.first + kQueries + w.high;  // by the last query
  p.blocks = seen <= 0 ? 0 : ((seen < w.keys ? seen : w.keys) + kKeys - 1) / kKeys;
  return p;
}

template <class Half, int size>
struct Kernel {
  using Queries = HeadTile<kQueries, size>;
  using Keys = HeadTile<kKeys, size>;
  static constexpr int kStages = kStageRoom / (2 * Keys::kBytes);
  using Stages = Turn<kStages>;
  static constexpr int kScores = kKeys / 2, kSums = size / 2;  // of a thread

  struct Shared {
    char queries[Queries::kBytes], keys[kStages][Keys::kBytes], values[kStages][Keys::kBytes];
    uint64_t queries_full, queries_empty, keys_full[kStages], keys_empty[kStages],
        values_full[kStages], values_empty[kStages];
  };

  __device__ static __forceinline__ void produce(const TensorMap& q, const TensorMap& k,
                                                 const TensorMap& v, const Work& w) {
    Shared& shared = *dynamic_shared<Shared>();
    Stages turn;
    int round = 0;  // the parity of the queries' barriers
    for (uint32_t index = blockIdx.x; index < w.count; index += gridDim.x) {
      const Piece p = piece_of(w, index);
      if (p.blocks == 0) continue;
      ptx::mbarrier_wait(&shared.queries_empty, round ^ 1), round ^= 1;
      Queries::load(shared.queries, q, &shared.queries_full, p.first, p.head * w.q_step[0],
                    p.batch * w.q_step[1]);
      for (int key = (p.blocks - 1) * kKeys; key >= 0; key -= kKeys, turn.next()) {
        const int stage = turn.stage;
        ptx::mbarrier_wait(shared.keys_empty + stage, turn.parity ^ 1);
        Keys::load(shared.keys[stage], k, shared.keys_full + stage, key, p.kv_head * w.k_step[0],
                   p.batch * w.k_step[1]);
        ptx::mbarrier_wait(shared.values_empty + stage, turn.parity ^ 1);
        Keys::load(shared.values[stage], v, shared.values_full + stage, key,
                   p.kv_head * w.v_step[0], p.batch * w.v_step[1]);
      }
    }
  }

  // What was read may be written over.
  __device__ static __forceinline__ void release(uint64_t* empty) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
  }

  // The consumers begin their products by turns.
  __device__ static __forceinline__ void take_turn(int group) {
    ptx::barrier_sync(1 + group, 128 * kConsumers);
  }
  __device__ static __forceinline__ void pass_turn(int group) {
    ptx::barrier_arrive(2 - group, 128 * kConsumers);
  }

  __device__ static __forceinline__ void begin_scores(float (&scores)[kScores], int group,
                                                      int stage) {
    const Shared& shared = *dynamic_shared<Shared>();
#pragma unroll
    for (int step = 0; step < size / 16; step++)
      Half::scores(scores, Queries::along(shared.queries, group * kGroupRows, step),
                   Keys::along(shared.keys[stage], 0, step), step > 0);
    ptx::wgmma_commit();
  }
  __device__ static __forceinline__ void begin_results(float (&sums)[kSums],
                                                       const uint32_t (&weights)[kKeys / 16][4],
                                                       int stage) {
    const Shared& shared = *dynamic_shared<Shared>();
#pragma unroll
    for (int step = 0; step < kKeys / 16; step++)
      Half::results(sums, weights[step], Keys::across(shared.values[stage], step));
    ptx::wgmma_commit();
  }

  // What a warpgroup's threads know of their rows.
  struct Rows {
    int first;                                    // of the warpgroup
    float largest[2] = {-kInfinity, -kInfinity};  // product so far
    float total[2] = {0, 0};                      // of this thread's weights
    float shrink[2];                              // what earlier weights are multiplied with
  };

  // From products to weights: exp(scale (product - the row's largest)).
  __device__ static __forceinline__ void weigh(float (&x)[kScores], Rows& rows, const Work& w,
                                               int key) {
    // Only tiles at the edge of what is seen have keys that a query does not see.
    if (key + kKeys > w.keys || key + kKeys - 1 > rows.first + w.high) {
      const int row = rows.first + int(threadIdx.x) % 128 / 32 * 16;
      int last[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int seen = row + row_of(2 * half) + w.high;
        last[half] = (seen < w.keys ? seen : w.keys - 1) - key - column_of(0);
      }
#pragma unroll
      for (int i = 0; i < kScores; i++)
        if (i / 4 * 8 + i % 2 > last[i % 4 / 2]) x[i] = -kInfinity;
    }
    const float scale = w.scale * kLog2E;
    float most[2] = {rows.largest[0], rows.largest[1]}, base[2];
#pragma unroll
    for (int i = 0; i < kScores; i++) most[i % 4 / 2] = fmaxf(most[i % 4 / 2], x[i]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      most[half] = row_max(most[half]);
      // A row that has seen nothing yet has no largest score to take off.
      base[half] = most[half] == -kInfinity ? 0 : most[half] * scale;
      rows.shrink[half] = ptx::exp2(fmaf(rows.largest[half], scale, -base[half]));
      rows.largest[half] = most[half];
      rows.total[half] *= rows.shrink[half];
    }
#pragma unroll
    for (int i = 0; i < kScores; i++) {
      x[i] = ptx::exp2(fmaf(x[i], scale, -base[i % 4 / 2]));
      rows.total[i % 4 / 2] += x[i];
    }
  }

  // What wgmma left of the scores, of 16 bits, is what it takes of its left operand.
  __device__ static __forceinline__ void pack(uint32_t (&weights)[kKeys / 16][4],
                                              const float (&x)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores; i += 2) weights[i / 8][i / 2 % 4] = Half::pack(x[i], x[i + 1]);
  }

  // All keys of a tile of queries, from the last on. The products of a tile of keys are begun
  // before those of the tile before it with the values, so that both go on while others weigh.
  __device__ static __forceinline__ void attend(float (&sums)[kSums], Rows& rows, Stages& turn,
                                                const Work& w, int blocks, int group) {
    Shared& shared = *dynamic_shared<Shared>();
    float scores[kScores];
    uint32_t weights[kKeys / 16][4];
    int key = (blocks - 1) * kKeys, read = -1;  // the stage of the values that products are made of
    // Ends the products with values, and gets what was weighed meanwhile ready for the next ones.
    // That the compiler computes no weights behind the wait, there is to be a loop in between: one
    // that waits for a barrier.
    const auto end_results = [&] {
      ptx::wgmma_wait<0>();
      ptx::settle(sums);
      if (read >= 0) release(shared.values_empty + read);
#pragma unroll
      for (int i = 0; i < kSums; i++) sums[i] *= rows.shrink[i % 4 / 2];
      pack(weights, scores);
      ptx::settle(sums), ptx::settle(weights);
    };

    ptx::mbarrier_wait(shared.keys_full + turn.stage, turn.parity);
    take_turn(group);
    ptx::wgmma_fence();
    begin_scores(scores, group, turn.stage);
    pass_turn(group);
    ptx::wgmma_wait<0>();
    ptx::settle(scores);
    release(shared.keys_empty + turn.stage);
    weigh(scores, rows, w, key);

    while ((key -= kKeys) >= 0) {
      const Stages before = turn;
      turn.next();
      ptx::mbarrier_wait(shared.keys_full + turn.stage, turn.parity);
      end_results();
      take_turn(group);
      ptx::wgmma_fence();
      begin_scores(scores, group, turn.stage);
      ptx::mbarrier_wait(shared.values_full + before.stage, before.parity);
      ptx::wgmma_fence();
      begin_results(sums, weights, before.stage);
      pass_turn(group);
      read = before.stage;
      ptx::wgmma_wait<1>();
      ptx::settle(scores);
      release(shared.keys_empty + turn.stage);
      weigh(scores, rows, w, key);
    }
    release(&shared.queries_empty);

    ptx::mbarrier_wait(shared.values_full + turn.stage, turn.parity);
    end_results();
    ptx::wgmma_fence();
    begin_results(sums, weights, turn.stage);
    ptx::wgmma_wait<0>();
    ptx::settle(sums);
    release(shared.values_empty + turn.stage);
    turn.next();
  }

  __device__ static __forceinline__ void write(float (&sums)[kSums], Rows& rows, const Work& w,
                                               const Piece& p) {
    const int warp_row = rows.first + int(threadIdx.x) % 128 / 32 * 16,
              lane = int(threadIdx.x) % 32;
    auto* out = reinterpret_cast<uint16_t*>(w.out.data) + offset(w.out, p.batch, p.head);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row + row_of(2 * half);
      const float total = row_sum(rows.total[half]);
      // A query that sees nothing: the sum is 0, and so is its result.
      const bool nothing = rows.largest[half] == -kInfinity && total == 0;
      const float inverse = nothing ? 0 : 1 / total;
      if (w.log_sum && lane % 4 == 0 && row < w.queries)
        w.log_sum[int64_t(p.pair) * w.queries + row] =
            nothing ? kInfinity : rows.largest[half] * w.scale + logf(total);
#pragma unroll
      for (int j = 0; j < size / 8; j += 4) {
        float eight[8];
#pragma unroll
        for (int i = 0; i < 8; i++) eight[i] = sums[4 * (j + i / 2) + 2 * half + i % 2] * inverse;
        gather_columns(eight);
        const int column = 8 * (j + lane % 4);
        if (row < w.queries && column < w.value_size)
          *reinterpret_cast<uint4*>(out + row * w.out.strides[2] + column) =
              make_uint4(Half::pack(eight[0], eight[1]), Half::pack(eight[2], eight[3]),
                         Half::pack(eight[4], eight[5]), Half::pack(eight[6], eight[7]));
      }
    }
  }

  __device__ static __forceinline__ void consume(const Work& w) {
    Shared& shared = *dynamic_shared<Shared>();
    const int group = int(threadIdx.x) / 128 - 1;
    Stages turn;
    int round = 0;
    if (group == 1) pass_turn(group);  // to the first one
    for (uint32_t index = blockIdx.x; index < w.count; index += gridDim.x) {
      const Piece p = piece_of(w, index);
      float sums[kSums];
#pragma unroll
      for (int i = 0; i < kSums; i++) sums[i] = 0;
      Rows rows;
      rows.first = p.first + group * kGroupRows;
      if (p.blocks > 0) {
        ptx::mbarrier_wait(&shared.queries_full, round), round ^= 1;
        attend(sums, rows, turn, w, p.blocks, group);
      }
      write(sums, rows, w, p);
    }
    if (group == 0) take_turn(group);  // the last that was passed
  }

  __device__ static __forceinline__ void run(const TensorMap& q, const TensorMap& k,
                                             const TensorMap& v, const Work& w) {
    Shared& shared = *dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
      ptx::prefetch_map(q), ptx::prefetch_map(k), ptx::prefetch_map(v);
      constexpr int kReaders = 4 * kConsumers;  // a thread of each warp
      ptx::mbarrier_init(&shared.queries_full, 1);
      ptx::mbarrier_init(&shared.queries_empty, kReaders);
      for (int s = 0; s < kStages; s++) {
        ptx::mbarrier_init(shared.keys_full + s, 1), ptx::mbarrier_init(shared.values_full + s, 1);
        ptx::mbarrier_init(shared.keys_empty + s, kReaders);
        ptx::mbarrier_init(shared.values_empty + s, kReaders);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    // What the producer has no use for, the consumers have.
    if (threadIdx.x < 128) {
      ptx::fewer_registers<40>();
      if (threadIdx.x == 0) produce(q, k, v, w);
    } else {
      ptx::more_registers<232>();
      consume(w);
    }
  }
};

template <class Half, int size>
__global__ void __launch_bounds__(kBlockThreads, 1)
    hopper_forward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                   const __grid_constant__ TensorMap v, const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  Kernel<Half, size>::run(q, k, v, work);
#endif
}

// ---- from the call to its launch ----------------------------------------------------------------

// Tiles, queries and keys, two of which are added in 32 bits.
constexpr int64_t kMostCounted = (int64_t(1) << 30) - 512;
// Of an H100's or H200's 50 MB of L2, for keys and values; the rest is for queries and results.
constexpr int64_t kShareOfL2 = int64_t(32) << 20;

// What this kernel computes; all else is forward.cu's and long_rows.cu's.
bool has(const AttentionForward& a) {
  const bool plain = !a.mask.data && !a.slopes && a.dropout == 0 && a.low <= 1 - a.q_length;
  const int64_t longer = std::max(a.head_size, a.value_size);
  const bool sized = longer > 32 && longer <= 128 && a.head_size % 8 == 0 && a.value_size % 8 == 0;
  // The largest product makes the largest score, and neither under- nor overflows.
  const bool scaled = a.scale > 0x1p-64 && a.scale < 0x1p64;
  return (a.type == DType::bf16 || a.type == DType::f16) && plain && sized && scaled &&
         in_pieces(a.out, 2) && a.q_length < kMostCounted && a.k_length < kMostCounted &&
         a.batch * a.heads < kMostCounted / ceil_div(a.q_length, kQueries);
}

struct Lying {
  TensorLayout layout;
  int step[2];  // see Work
};

// False where no map can say how it lies.
bool describe(const AttentionOperand& x, const Attention& a, int64_t heads, int64_t length,
              int64_t size, int rows, Lying& out) {
  TensorLayout& t = out.layout;
  t.data = x.data, t.element_bytes = 2, t.dims = 4, t.swizzle = Swizzle::bytes128;
  const int64_t sizes[] = {length, heads, a.batch};
  t.sizes[0] = size, t.box[0] = kColumns;
  for (int d = 0; d < 3; d++) {
    const int64_t stride = x.strides[2 - d] * 2;
    const bool one = sizes[d] == 1 || (d > 0 && stride == 0);
    t.sizes[1 + d] = one ? 1 : sizes[d], t.strides[1 + d] = one ? size * 2 : stride;
    t.box[1 + d] = d == 0 ? rows : 1;
    if (d > 0) out.step[d - 1] = !one;
  }
  return x.strides[3] == 1 && t.strides[1] >= size * 2 && why_no_tensor_map(t) == nullptr;
}

std::atomic<int64_t> started = 0;

template <class Half, int size>
void start(const Lying& q, const Lying& k, const Lying& v, const Work& w, bool alike,
           void* stream) {
  // Where all tiles take as long, blocks are persistent: they have the next tile's queries and keys
  // brought while they write the last one's results. Else who is done first gets the next tile.
  const uint32_t blocks = alike ? std::min(w.count, uint32_t(multiprocessors())) : w.count;
  launch(hopper_forward<Half, size>, dim3(blocks), dim3(kBlockThreads),
         sizeof(typename Kernel<Half, size>::Shared), stream, tensor_map(q.layout),
         tensor_map(k.layout), tensor_map(v.layout), w);
  started++;
}

}  // namespace

int64_t attentions_on_hopper() { return started; }

bool attention_on_hopper(const AttentionForward& a, void* stream) {
  Lying q, k, v;
  if (!has(a) || !describe(a.q, a, a.heads, a.q_length, a.head_size, kQueries, q) ||
      !describe(a.k, a, a.kv_heads, a.k_length, a.head_size, kKeys, k) ||
      !describe(a.v, a, a.kv_heads, a.k_length, a.value_size, kKeys, v))
    return false;
  Work w{};
  const int64_t share = a.heads / a.kv_heads, pairs = a.batch * a.heads;
  const int64_t in_l2 = kShareOfL2 / (a.k_length * (a.head_size + a.value_size) * 2);
  w.tiles = uint32_t(ceil_div(a.q_length, kQueries)), w.pairs = uint32_t(pairs);
  w.count = w.tiles * w.pairs;
  w.together = uint32_t(std::min(pairs, std::max<int64_t>(in_l2, 1) * share));
  w.heads = uint32_t(a.heads), w.share = uint32_t(share);
  w.queries = int(a.q_length), w.keys = int(a.k_length), w.value_size = int(a.value_size);
  w.high = int(std::clamp(a.high, -a.q_length, a.k_length));
  w.scale = float(a.scale);
  w.out = a.out, w.log_sum = static_cast<float*>(a.log_sum);
  for (int d = 0; d < 2; d++)
    w.q_step[d] = q.step[d], w.k_step[d] = k.step[d], w.v_step[d] = v.step[d];
  const auto with = [&](auto half) {
    using Half = decltype(half);
    std::max(a.head_size, a.value_size) <= 64 ? start<Half, 64>(q, k, v, w, a.sees_all(), stream)
                                              : start<Half, 128>(q, k, v, w, a.sees_all(), stream);
  };
  a.type == DType::bf16 ? with(HopperBf16{}) : with(HopperF16{});
  return true;
}

}  // namespace fastnn::cuda
