// Sums of the columns of a matrix (bias gradients), and the clock of peak_flops.
#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "common/parallel.hpp"
#include "gemm/kernel.hpp"

#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "isa/vec.hpp"

namespace fastnn {

namespace {
// Rows added in the accumulator's own precision before a block joins the total. The total of a
// float32 sum is a float64, so the error is that of one block.
constexpr int64_t kRows = 64;
constexpr int64_t kColumns = 256;

template <class T>
auto value(T x) {
  if constexpr (sizeof(T) == 8)
    return x;
  else
    return portable::to_f32(x);
}

template <class T>
void sum_columns(const T* x, int64_t m, int64_t n, int64_t rs, int64_t cs, T* out) {
  using Acc = decltype(value(T{}));
  const double microseconds = double(m) * n * sizeof(T) / 1e4;
  parallel(microseconds < 20 ? 1 : max_threads(), [&](int thread, int threads) {
    const Range mine = share_of(n, kColumns, thread, threads);
    for (int64_t j0 = mine.begin; j0 < mine.end; j0 += kColumns) {
      const int64_t w = std::min(kColumns, mine.end - j0);
      double total[kColumns] = {};
      for (int64_t i0 = 0; i0 < m; i0 += kRows) {
        Acc block[kColumns] = {};
        const int64_t i1 = std::min(m, i0 + kRows);
        for (int64_t i = i0; i < i1; i++) {
          const T* row = x + i * rs + j0 * cs;
          if (cs == 1)
            for (int64_t j = 0; j < w; j++) block[j] += value(row[j]);
          else
            for (int64_t j = 0; j < w; j++) block[j] += value(row[j * cs]);
        }
        for (int64_t j = 0; j < w; j++) total[j] += block[j];
      }
      for (int64_t j = 0; j < w; j++) {
        if constexpr (sizeof(T) == 8)
          out[j0 + j] = total[j];
        else
          portable::from_f32(out[j0 + j], float(total[j]));
      }
    }
  });
}
}  // namespace

void column_sum(const void* x, int64_t m, int64_t n, int64_t rs, int64_t cs, DType type,
                void* out) {
  switch (type) {
    case DType::f32:
      return sum_columns((const float*)x, m, n, rs, cs, (float*)out);
    case DType::f64:
      return sum_columns((const double*)x, m, n, rs, cs, (double*)out);
    case DType::bf16:
      return sum_columns((const bf16*)x, m, n, rs, cs, (bf16*)out);
    case DType::f16:
      return sum_columns((const f16*)x, m, n, rs, cs, (f16*)out);
    default:
      throw std::invalid_argument("column_sum: dtype: expected a floating-point type");
  }
}

double timed_rate(PeakFn fn, const char* kind, double seconds) {
  using Clock = std::chrono::steady_clock;
  double operations = 0, elapsed = 0;
  const auto start = Clock::now();
  do {
    operations += fn(kind, 100000);
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return operations / elapsed;
}

}  // namespace fastnn
