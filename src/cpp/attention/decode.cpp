// Few queries and many keys, as in generating text: keys and values are read once, where they lie,
// by all queries of the heads that share them.
//
//   for chunk of keys            of all heads, on any thread
//     scores, exponentials, and their product with the values
//   then, for each query: the chunks' results, weighed by exp(their largest - the largest) and
//   added
//
// Chunks are as long for any number of queries, batches and threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "attention/decode.hpp"
#include "attention/parts.hpp"
#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {

using namespace attention_parts;

namespace {

// Enough that what is done once a chunk is little; a few fit a core's own cache.
constexpr int64_t kChunk = 256;
constexpr int64_t kMostRows = 8;

template <class T>
class Decode {
 public:
  explicit Decode(const AttentionForward& call)
      : call_(call),
        kernels_(*attention_kernels().decode),
        copies_(attention_kernels().copy_rows),
        group_(call.heads / call.kv_heads),
        rows_(group_ * call.q_length),
        whole_rows_(rows_ <= 2 ? rows_ : round_up(rows_, 4)),
        chunks_(ceil_div(call.k_length, kChunk)),
        result_(call.value_size + 2) {}

  void run(int threads) {
    const int64_t heads = call_.batch * call_.kv_heads;
    std::unique_ptr<T[]> found(new T[size_t(heads * chunks_ * rows_ * result_)]);
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
    parallel(threads, [&](int thread, int came) {
      Memory m{};
      try {
        Carved measured;
        carve(measured);
        Carved c(static_cast<char*>(scratch(Scratch::misc, size_t(measured.bytes()))));
        m = carve(c);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
        next = heads * chunks_;
      }
      int64_t gathered = -1;
      for (int64_t i; (i = next.fetch_add(1)) < heads * chunks_;) {
        const int64_t head = i / chunks_, chunk = i % chunks_;
        if (head != gathered) gather(m, head / call_.kv_heads, head % call_.kv_heads);
        gathered = head;
        one_chunk(m, head, chunk, found.get() + i * rows_ * result_);
      }
      barrier();
      if (out_of_memory) return;
      const Range mine = share_of(heads * rows_, 1, thread, came);
      for (int64_t i = mine.begin; i < mine.end; i++) combine(m, found.get(), i / rows_, i % rows_);
      scratch_trim();
    });
    if (out_of_memory) throw std::bad_alloc();
  }

 private:
  struct Memory {
    T *queries, *scores, *bias, *results, *one;
    char *keys, *values;  // where their elements do not lie together
  };
  Memory carve(Carved& c) const {
    auto numbers = [&](int64_t n) { return reinterpret_cast<T*>(c.take(n * int64_t(sizeof(T)))); };
    const int64_t size = int64_t(dtype_size(call_.type));
    Memory m;
    m.queries = numbers(whole_rows_ * call_.head_size);
    m.scores = numbers(whole_rows_ * kChunk);
    m.bias = numbers(kChunk);
    m.results = numbers(whole_rows_ * call_.value_size);
    m.one = numbers(call_.value_size);
    m.keys = call_.k.strides[3] == 1 ? nullptr : c.take(kChunk * call_.head_size * size);
    m.values = call_.v.strides[3] == 1 ? nullptr : c.take(kChunk * call_.value_size * size);
    return m;
  }
  char* at(const AttentionOperand& x, int64_t batch, int64_t head, int64_t row) const {
    return x.data + (batch * x.strides[0] + head * x.strides[1] + row * x.strides[2]) *
                        int64_t(dtype_size(call_.type));
  }

  // The queries of a head of keys as numbers; rows behind the last as zeros.
  void gather(const Memory& m, int64_t batch, int64_t kv_head) const {
    const int64_t n = call_.head_size;
    std::memset(m.queries, 0, size_t(whole_rows_ * n) * sizeof(T));
    for (int64_t g = 0; g < group_; g++)
      copies_[int(call_.type)][numbers_](
          {at(call_.q, batch, kv_head * group_ + g, 0), call_.q.strides[2], call_.q.strides[3],
           reinterpret_cast<char*>(m.queries + g * call_.q_length * n), n, call_.q_length, n});
  }

  // Of each row: the results so far, the largest score, and the sum of exponentials.
  void one_chunk(const Memory& m, int64_t head, int64_t chunk, T* found) const {
    const int64_t batch = head / call_.kv_heads, kv_head = head % call_.kv_heads;
    const int64_t begin = chunk * kChunk, n = call_.head_size, nv = call_.value_size;
    const int64_t keys = std::min(kChunk, call_.k_length - begin);
    if (begin > call_.q_length - 1 + call_.high || begin + keys <= call_.low) {
      for (int64_t r = 0; r < rows_; r++, found += result_) {
        std::memset(found, 0, size_t(nv) * sizeof(T));
        found[nv] = -std::numeric_limits<T>::infinity(), found[nv + 1] = 0;
      }
      return;
    }
    const Rows k = rows_of(call_.k, batch, kv_head, begin, keys, n, m.keys);
    const Rows v = rows_of(call_.v, batch, kv_head, begin, keys, nv, m.values);
    const int step = int(std::min<int64_t>(4, whole_rows_));
    for (int64_t r = 0; r < rows_; r += step)
      kernels_.score[int(call_.type)](
          {m.queries + r * n, step, k.from, k.row, keys, n, m.scores + r * kChunk, kChunk});
    for (int64_t r = 0; r < rows_; r++) {
      const bool biased = call_.mask.data || call_.slopes || !call_.sees_all();
      if (biased)
        bias(batch, kv_head * group_ + r / call_.q_length, r % call_.q_length, begin, keys, m.bias);
      kernels_.soften[sizeof(T) == 8](m.scores + r * kChunk, biased ? m.bias : nullptr, keys,
                                      call_.scale, found + r * result_ + nv,
                                      found + r * result_ + nv + 1);
    }
    // Rows behind the last weigh nothing.
    for (int64_t r = rows_; r < whole_rows_; r++)
      std::memset(m.scores + r * kChunk, 0, kChunk * sizeof(T));
    std::memset(m.results, 0, size_t(whole_rows_ * nv) * sizeof(T));
    for (int64_t r = 0; r < rows_; r += step)
      kernels_.weigh[int(call_.type)](
          {m.results + r * nv, step, v.from, v.row, keys, nv, m.scores + r * kChunk, kChunk});
    for (int64_t r = 0; r < rows_; r++)
      std::memcpy(found + r * result_, m.results + r * nv, size_t(nv) * sizeof(T));
  }

  struct Rows {
    const char* from;
    int64_t row;
  };
  Rows rows_of(const AttentionOperand& x, int64_t batch, int64_t head, int64_t begin, int64_t keys,
               int64_t n, char* copy) const {
    const char* from = at(x, batch, head, begin);
    if (!copy) return {from, x.strides[2]};
    const int type = int(call_.type);
    copies_[type][type]({from, x.strides[2], x.strides[3], copy, n, keys, n});
    return {copy, n};
  }

  void bias(int64_t batch, int64_t head, int64_t query, int64_t begin, int64_t keys, T* to) const {
    const int64_t* s = call_.mask.strides;
    const char* mask = call_.mask.data;
    if (mask)
      mask += (batch * s[0] + head * s[1] + query * s[2] + begin * s[3]) *
              int64_t(dtype_size(call_.mask_type));
    const T distance = T(begin - query);
    T slope = 0;
    if (call_.slopes)
      slope = T(call_.slopes[batch * call_.slopes_batch + head * call_.slopes_head]);
    BiasBlock b{};
    b.bias = to, b.keys = keys, b.lanes = 1;
    if (mask) b.mask = &mask;
    b.mask_type = call_.mask_type, b.mask_step = s[3];
    b.distance = &distance, b.slope = call_.slopes ? &slope : nullptr;
    b.shift = double(call_.shift);
    b.bounded = !call_.sees_all();
    b.low = double(call_.low), b.high = double(call_.high);
    kernels_.bias[sizeof(T) == 8](b);
  }

  void combine(const Memory& m, const T* found, int64_t head, int64_t row) const {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const int64_t nv = call_.value_size;
    auto of = [&](int64_t chunk) {
      return found + ((head * chunks_ + chunk) * rows_ + row) * result_;
    };
    T most = -infinity;
    for (int64_t c = 0; c < chunks_; c++) most = std::max(most, of(c)[nv]);
    T sum = 0;
    std::memset(m.one, 0, size_t(nv) * sizeof(T));
    for (int64_t c = 0; c < chunks_; c++) {
      const T* from = of(c);
      if (from[nv + 1] == 0) continue;  // it sees none of these keys
      const T weight = std::exp(from[nv] - most);
      sum += from[nv + 1] * weight;
      for (int64_t e = 0; e < nv; e++) m.one[e] += from[e] * weight;
    }
    const T factor = sum == 0 ? T(0) : 1 / sum;
    for (int64_t e = 0; e < nv; e++) m.one[e] *= factor;
    const int64_t batch = head / call_.kv_heads;
    const int64_t of_head = head % call_.kv_heads * group_ + row / call_.q_length;
    const int64_t query = row % call_.q_length;
    const AttentionOperand& out = call_.out;
    char* to = at(out, batch, of_head, query);
    auto narrow = [&](const T* from, char* at, int64_t n) {
      copies_[numbers_][int(call_.type)]({reinterpret_cast<const char*>(from), n, 1, at, n, 1, n});
    };
    const int64_t step = out.strides[3];
    if (step == 1)
      narrow(m.one, to, nv);
    else
      for (int64_t e = 0; e < nv; e++)
        narrow(m.one + e, to + e * step * int64_t(dtype_size(call_.type)), 1);
    if (call_.log_sum)
      static_cast<T*>(call_.log_sum)[(batch * call_.heads + of_head) * call_.q_length + query] =
          sum == 0 ? infinity : most + std::log(sum);
  }

  const AttentionForward& call_;
  const DecodeKernels& kernels_;
  void (*const (&copies_)[4][4])(const RowCopy&);  // by types
  static constexpr int numbers_ = int(sizeof(T) == 8 ? DType::f64 : DType::f32);
  const int64_t group_, rows_, whole_rows_, chunks_, result_;
};

}  // namespace

bool attention_parts::decodes(const AttentionForward& call) {
  return call.heads / call.kv_heads * call.q_length <= kMostRows && call.dropout == 0;
}

void attention_parts::decode(const AttentionForward& call, int threads) {
  if (call.type == DType::f64)
    Decode<double>(call).run(threads);
  else
    Decode<float>(call).run(threads);
}

}  // namespace fastnn
