// Three ways, each limited by bytes alone. Rows that fit the registers of up to 512 threads (n <=
// 16384, in the backward 8192) are read once and written once, 16 bytes at a time: 2 numbers moved
// an element, and 3 in the backward. Longer ones are read twice, the second time most likely from
// L2: 3, and 5 in the backward. Along other dimensions than the innermost, neighbouring threads
// have neighbouring rows, which are held, too, while 16 elements a thread are enough.
#include "cuda/softmax/softmax.hpp"

#include "cuda/reduce/rows.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 20;
constexpr int kBlock = 128;                 // threads, of groups that are no more than a warp
constexpr int kLongest[2] = {16384, 8192};  // forward and backward

// e^(x - most) of sums that are added up while the largest element is still looked for. What is
// equal counts as 1, infinities included: where they come to nothing in the end total() says so.
struct Online {
  float most, sum;
  __device__ static Online none() { return {-INFINITY, 0}; }
  __device__ static float times(float below, float most) {
    return below == most ? 1.0f : expf(below - most);
  }
  __device__ void merge(float other_most, float other_sum) {
    const float larger = fmaxf(most, other_most);
    sum = sum * times(most, larger) + other_sum * times(other_most, larger);
    most = larger;
  }
  // NaN in a row with +infinity, or with -infinity alone.
  __device__ float total() const { return fabsf(most) == INFINITY ? NAN : sum; }
};

__device__ inline float result(float x, float most, float sum, float log_sum, bool log) {
  return log ? x - most - log_sum : expf(x - most) / sum;
}
// The terms of the backward's sum, and what is made of it.
__device__ inline float term(float grad, float saved, bool log) {
  return log ? grad : grad * saved;
}
__device__ inline float by_input(float grad, float saved, float sum, bool log) {
  return log ? grad - expf(saved) * sum : saved * (grad - sum);
}

// ---- rows in registers
// ---------------------------------------------------------------------------------------

template <class T, int threads, int mine, bool backward>
__global__ void __launch_bounds__(threads > 32 ? threads : kBlock)
    held_rows(const Rows rows, const bool log) {
  constexpr int block = threads > 32 ? threads : kBlock, groups = block / threads;
  FASTNN_SHARED(typename Group<threads>::Memory, memory);
  Group<threads> group{memory};
  const HeldRow<T, threads, mine> held{int(rows.n), int(threadIdx.x) % threads};
  const T *x = static_cast<const T*>(rows.data[0]), *saved = static_cast<const T*>(rows.data[1]);
  for (int64_t first = int64_t(blockIdx.x) * groups; first < rows.count;
       first += int64_t(gridDim.x) * groups) {
    // Groups without a row go along with the last one's and write nothing.
    const int64_t row = first + int(threadIdx.x) / threads;
    const bool mine_exists = row < rows.count;
    int64_t at[kRowOperands];
    place(rows, mine_exists ? row : rows.count - 1, at);
    float a[mine];
    if constexpr (backward) {
      float y[mine];
      held.load(a, x + at[0], rows.step[0], 0);
      held.load(y, saved + at[1], rows.step[1], 0);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < mine; j++) sum += term(a[j], y[j], log);
      sum = group.template reduce<Add>(sum);
      if (mine_exists)
        held.store(static_cast<T*>(rows.data[2]) + at[2], rows.step[2],
                   [&](int j) { return by_input(a[j], y[j], sum, log); });
    } else {
      held.load(a, x + at[0], rows.step[0], -INFINITY);
      float most = a[0];
#pragma unroll
      for (int j = 1; j < mine; j++) most = fmaxf(most, a[j]);
      most = group.template reduce<Largest>(most);
      // Behind the row's end is what e^-infinity makes 0 of; unless `most` is infinite, too, when
      // every result is NaN.
      float sum = 0;
#pragma unroll
      for (int j = 0; j < mine; j++) {
        const float e = expf(a[j] - most);
        if (!log) a[j] = e;
        sum += e;
      }
      sum = group.template reduce<Add>(sum);
      const float log_sum = logf(sum);
      if (mine_exists)
        held.store(static_cast<T*>(rows.data[1]) + at[1], rows.step[1],
                   [&](int j) { return log ? a[j] - most - log_sum : a[j] / sum; });
    }
  }
}

// ---- rows that are longer
// ------------------------------------------------------------------------------------

// A block a row.
template <class T, bool backward>
__global__ void __launch_bounds__(kLongThreads) long_rows(const Rows rows, const bool log) {
  constexpr int each = Pack<T>::kEach;
  FASTNN_SHARED(Group<kLongThreads>::Memory, memory);
  Group<kLongThreads> group{memory};
  for (int64_t row = blockIdx.x; row < rows.count; row += gridDim.x) {
    int64_t at[kRowOperands];
    place(rows, row, at);
    const T* x = static_cast<const T*>(rows.data[0]) + at[0];
    constexpr int last = backward ? 2 : 1;
    T* out = static_cast<T*>(rows.data[last]) + at[last];
    const int64_t out_step = rows.step[last];
    float a[each], y[each];
    if constexpr (backward) {
      const T* saved = static_cast<const T*>(rows.data[1]) + at[1];
      float sum = 0;
      for_each_piece<T>(rows.n, [&](int64_t i, int count) {
        read_piece(a, x, rows.step[0], i, count);
        read_piece(y, saved, rows.step[1], i, count);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) sum += term(a[e], y[e], log);
      });
      sum = group.template reduce<Add>(sum);
      for_each_piece<T>(rows.n, [&](int64_t i, int count) {
        read_piece(a, x, rows.step[0], i, count);
        read_piece(y, saved, rows.step[1], i, count);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) a[e] = by_input(a[e], y[e], sum, log);
        write_piece(a, out, out_step, i, count);
      });
    } else {
      Online online = Online::none();
      for_each_piece<T>(rows.n, [&](int64_t i, int count) {
        read_piece(a, x, rows.step[0], i, count);
        float most = online.most, sum = 0;
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) most = fmaxf(most, a[e]);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) sum += Online::times(a[e], most);
        online.merge(most, sum);
      });
      const float most = group.template reduce<Largest>(online.most);
      online.merge(most, 0);
      online.sum = group.template reduce<Add>(online.sum);
      const float sum = online.total(), log_sum = logf(sum);
      for_each_piece<T>(rows.n, [&](int64_t i, int count) {
        read_piece(a, x, rows.step[0], i, count);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) a[e] = result(a[e], most, sum, log_sum, log);
        write_piece(a, out, out_step, i, count);
      });
    }
  }
}

// ---- rows whose neighbours are rows
// --------------------------------------------------------------------------

constexpr int kColumnThreads = 256, kMostLanes = 8, kHeld = 16;

// A block has kColumnThreads / lanes rows, each in the hands of `lanes` threads, whose elements are
// `lanes` apart.
template <class T, bool backward, bool held>
__global__ void __launch_bounds__(kColumnThreads, 2)
    columns(const Rows rows, const bool log, const int lanes) {
  FASTNN_SHARED(float, mosts, [kColumnThreads]);
  FASTNN_SHARED(float, sums, [kColumnThreads]);
  const int width = kColumnThreads / lanes, column = int(threadIdx.x) % width,
            lane = int(threadIdx.x) / width;
  constexpr int last = backward ? 2 : 1;
  for (int64_t first = int64_t(blockIdx.x) * width; first < rows.count;
       first += int64_t(gridDim.x) * width) {
    const int64_t row = first + column;
    const bool exists = row < rows.count;
    int64_t at[kRowOperands];
    place(rows, exists ? row : 0, at);
    const T* x = static_cast<const T*>(rows.data[0]) + at[0];
    const T* saved = static_cast<const T*>(rows.data[1]) + at[1];
    T* out = static_cast<T*>(rows.data[last]) + at[last];
    float a[held ? kHeld : 1], y[held && backward ? kHeld : 1];
    // f(x) or f(grad, saved) for this thread's elements.
    auto read = [&](auto f) {
      const T *from = x + lane * rows.step[0], *from_saved = saved + lane * rows.step[1];
      const int64_t next = lanes * rows.step[0], next_saved = lanes * rows.step[1];
      if constexpr (held) {
#pragma unroll
        for (int j = 0; j < kHeld; j++, from += next, from_saved += next_saved) {
          // Behind the end is what adds nothing.
          const bool there = lane + j * lanes < rows.n;
          a[j] = there ? to_float(*from) : backward ? 0 : -INFINITY;
          if constexpr (backward) y[j] = there ? to_float(*from_saved) : 0;
          f(a[j], backward ? y[backward ? j : 0] : 0);
        }
      } else {
        for (int64_t i = lane; i < rows.n; i += lanes, from += next, from_saved += next_saved)
          f(to_float(*from), backward ? to_float(*from_saved) : 0);
      }
    };
    auto again = [&](auto f) {
      if constexpr (held) {
#pragma unroll
        for (int j = 0; j < kHeld; j++) f(a[j], backward ? y[backward ? j : 0] : 0);
      } else {
        read(f);
      }
    };
    Online mine = Online::none();
    if (exists) {
      read([&](float v, float w) {
        if (backward)
          mine.sum += term(v, w, log);
        else if (held)
          mine.most = fmaxf(mine.most, v);
        else
          mine.merge(fmaxf(mine.most, v), Online::times(v, fmaxf(mine.most, v)));
      });
      if (held && !backward)
        again([&](float v, float) { mine.sum += Online::times(v, mine.most); });
    }
    if (lanes > 1) {
      mosts[threadIdx.x] = mine.most, sums[threadIdx.x] = mine.sum;
      __syncthreads();
      mine = {mosts[column], sums[column]};
      for (int other = 1; other < lanes; other++) {
        const int from = other * width + column;
        if (backward)
          mine.sum += sums[from];
        else
          mine.merge(mosts[from], sums[from]);
      }
      __syncthreads();
    }
    if (!exists) continue;
    const float sum = backward ? mine.sum : mine.total(), log_sum = logf(sum);
    T* to = out + lane * rows.step[last];
    int64_t i = lane;
    again([&](float v, float w) {
      if (i < rows.n)
        *to = from_float<T>(backward ? by_input(v, w, sum, log)
                                     : result(v, mine.most, sum, log_sum, log));
      to += lanes * rows.step[last], i += lanes;
    });
  }
}

// ---- launches
// ------------------------------------------------------------------------------------------------

unsigned blocks_of(int64_t rows, int64_t each) {
  const int64_t blocks = ceil_div(rows, each);
  return unsigned(blocks < kMostBlocks ? blocks : kMostBlocks);
}

template <class T, bool backward, int threads, int mine>
void launch_held(const Rows& rows, bool log, void* stream) {
  constexpr int block = threads > 32 ? threads : kBlock;
  launch(held_rows<T, threads, mine, backward>, dim3(blocks_of(rows.count, block / threads)),
         dim3(block), 0, stream, rows, log);
}

template <bool backward>
void run(const Rows& rows, DType type, bool log, void* stream) {
  if (rows.count == 0 || rows.n == 0) return;
  constexpr int last = backward ? 2 : 1;
  with_float_type("softmax", type, [&](auto zero) {
    using T = decltype(zero);
    // What is written decides: partly written lines cost more than partly read ones.
    if (rows.dims > 0 && (rows.step[last] != 1 || rows.n == 1)) {
      const int lanes = rows.n > kHeld ? kMostLanes : 1;
      const dim3 grid(blocks_of(rows.count, kColumnThreads / lanes));
      launch(rows.n <= kHeld * lanes ? columns<T, backward, true> : columns<T, backward, false>,
             grid, dim3(kColumnThreads), 0, stream, rows, log, lanes);
    } else if (rows.n <= 64) {
      launch_held<T, backward, 8, 8>(rows, log, stream);
    } else if (rows.n <= 256) {
      launch_held<T, backward, 32, 8>(rows, log, stream);
    } else if (rows.n <= 1024) {
      launch_held<T, backward, backward ? 64 : 32, backward ? 16 : 32>(rows, log, stream);
    } else if (rows.n <= 4096) {
      launch_held<T, backward, backward ? 256 : 128, backward ? 16 : 32>(rows, log, stream);
    } else if (rows.n <= kLongest[backward]) {
      launch_held<T, backward, 512, kLongest[backward] / 512>(rows, log, stream);
    } else {
      launch(long_rows<T, backward>, dim3(blocks_of(rows.count, 1)), dim3(kLongThreads), 0, stream,
             rows, log);
    }
  });
}

}  // namespace

void softmax(const Rows& rows, DType type, bool log, void* stream) {
  run<false>(rows, type, log, stream);
}
void softmax_backward(const Rows& rows, DType type, bool log, void* stream) {
  run<true>(rows, type, log, stream);
}

}  // namespace fastnn::cuda
