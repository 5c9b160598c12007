// Dimensions that lie densely together become one (quant/loop.hpp); what is left is cut into runs
// for the threads.
#include "quant/quantize.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/caches.hpp"
#include "common/kernels_of.hpp"
#include "common/memory.hpp"
#include "common/parallel.hpp"
#include "quant/loop.hpp"

namespace fastnn {
namespace {

const QuantizeKernels& kernels() { return FASTNN_KERNELS_OF(quantize); }

constexpr float kLeastScale = std::numeric_limits<float>::min();
constexpr int64_t kWorthAThread = 16384;  // elements: about 10 us

int threads_for(int64_t elements) {
  const int64_t shares = elements / kWorthAThread;
  return shares < 2 ? 1 : int(std::min<int64_t>(shares, max_threads()));
}

// Two arrays of floats that live as long as this does.
struct Floats {
  Memory memory;
  float *a, *b;
  explicit Floats(int64_t n)
      : memory(size_t(n) * 2 * sizeof(float)), a(memory.as<float>()), b(a + n) {}
};

// ---- the loop over all elements ----------------------------------------------------------------

// A part of the inner loop: offsets of its first element (of its first scale in s, without what the
// pattern adds), and its place in the pattern.
struct Piece {
  int64_t x, q, s, first, n, element;
};

// Calls f(Piece) for elements begin to end - 1, in order.
template <class F>
void for_pieces(const Loop& loop, int64_t begin, int64_t end, F f) {
  const int last = loop.dims - 1;
  const int64_t inner = loop.size[last];
  while (begin < end) {
    int64_t rest = begin / inner;
    const int64_t within = begin - rest * inner;
    Piece piece{within * loop.x[last],
                within * loop.q[last],
                0,
                within,
                std::min(inner - within, end - begin),
                begin};
    for (int d = last - 1; d >= 0; d--) {
      const int64_t index = rest % loop.size[d];
      rest /= loop.size[d];
      piece.x += index * loop.x[d], piece.q += index * loop.q[d], piece.s += index * loop.s[d];
    }
    f(piece);
    begin += piece.n;
  }
}

struct Call {
  const Numbers& numbers;
  Loop loop;
  int64_t x_item;

  Call(const Numbers& numbers, By by)
      : numbers(numbers), loop(numbers, by), x_item(int64_t(dtype_size(numbers.type))) {}

  char* x_at(int64_t offset) const { return static_cast<char*>(numbers.x) + offset * x_item; }
  char* q_at(int64_t offset) const {
    return static_cast<char*>(numbers.q) + (is_packed(numbers.scheme) ? offset / 2 : offset);
  }
  ScaledRun run(const Piece& piece, bool to_q) const {
    const int last = loop.dims - 1;
    ScaledRun run{};
    run.from = to_q ? x_at(piece.x) : q_at(piece.q);
    run.to = to_q ? q_at(piece.q) : x_at(piece.x);
    run.from_stride = to_q ? loop.x[last] : loop.q[last];
    run.to_stride = to_q ? loop.q[last] : loop.x[last];
    run.n = piece.n;
    run.group = loop.group, run.period = loop.period, run.stride = loop.stride;
    run.first = piece.first;
    run.element = uint64_t(piece.element);
    return run;
  }
};

void run_all(const Call& call, QuantizeKernels::Run kernel, bool to_q, const float* factor,
             const float* zero, uint64_t seed, bool around_caches) {
  parallel(threads_for(call.loop.elements), [&](int thread, int threads) {
    const Range share = share_of(call.loop.elements, 1024, thread, threads);
    for_pieces(call.loop, share.begin, share.end, [&](const Piece& piece) {
      ScaledRun run = call.run(piece, to_q);
      run.factor = factor + piece.s, run.zero = zero + piece.s;
      run.seed = seed, run.around_caches = around_caches;
      kernel(run);
    });
  });
}

// As in elementwise.cpp: results that will have left the caches before anyone reads them, pushed
// out by what is read.
bool around_caches(const Call& call) {
  return call.loop.elements * (call.x_item + 1) > last_cache_bytes();
}

// ---- scales ------------------------------------------------------------------------------------

[[noreturn]] void bad_scale(float scale) {
  throw std::invalid_argument("scale: expected positive, normal, finite numbers, got " +
                              std::to_string(scale));
}

// What the kernels multiply with, and zero points as floats.
void prepare(const Numbers& numbers, const float* scale, const int32_t* zero_point, bool invert,
             Floats& out) {
  const int64_t n = numbers.scales;
  const Limits range = limits(numbers.scheme);
  std::atomic<bool> good{true};
  parallel(threads_for(n), [&](int thread, int threads) {
    const Range share = share_of(n, 1024, thread, threads);
    bool all = true;
    for (int64_t i = share.begin; i < share.end; i++) {
      all &= scale[i] >= kLeastScale && scale[i] <= std::numeric_limits<float>::max();
      out.a[i] = invert ? 1 / scale[i] : scale[i];
      out.b[i] = zero_point ? float(zero_point[i]) : 0.0f;
      all &= out.b[i] >= range.least && out.b[i] <= range.most;
    }
    if (!all) good = false;
  });
  if (good) return;
  for (int64_t i = 0; i < n; i++) {
    if (!(scale[i] >= kLeastScale && scale[i] <= std::numeric_limits<float>::max()))
      bad_scale(scale[i]);
    if (zero_point && !(out.b[i] >= range.least && out.b[i] <= range.most))
      throw std::invalid_argument("zero_point: expected " + std::to_string(int(range.least)) +
                                  " to " + std::to_string(int(range.most)) + ", got " +
                                  std::to_string(zero_point[i]));
  }
}

struct Chosen {
  float scale;
  float zero;
};
Chosen choose(float low, float high, Limits range, bool symmetric) {
  float scale = symmetric ? std::max(high, -low) / range.most
                          : high / (range.most - range.least) - low / (range.most - range.least);
  scale = scale == 0 ? 1.0f : std::max(scale, kLeastScale);
  if (symmetric) return {scale, 0};
  const float zero = range.least - std::nearbyint(low / scale);
  return {scale, std::min(std::max(zero, range.least), range.most)};
}

// low and high of a piece's scales take in its elements.
void range_of_piece(const Call& call, QuantizeKernels::Range kernel, Piece piece, float* low,
                    float* high) {
  const Loop& loop = call.loop;
  RangeRun run{};
  run.stride = loop.x[loop.dims - 1];
  low += piece.s, high += piece.s;
  for (int64_t i = 0; i < piece.n;) {
    const int64_t at = piece.first + i, within = at % loop.group, rest = piece.n - i;
    const int64_t scale = at / loop.group % loop.period;
    run.x = call.x_at(piece.x + i * run.stride);
    run.low = low + scale * loop.stride, run.high = high + scale * loop.stride;
    run.each = loop.group == 1 && loop.stride == 1;
    if (run.each) {
      // Whole patterns at once, or the rest of one.
      const bool whole = scale == 0 && rest >= loop.period;
      run.n = whole ? loop.period : std::min(rest, loop.period - scale);
      run.count = whole ? rest / loop.period : 1;
    } else {
      const bool whole = within == 0 && rest >= loop.group && loop.stride == 1;
      run.n = whole ? loop.group : std::min(rest, loop.group - within);
      run.count = whole ? std::min(rest / loop.group, loop.period - scale) : 1;
    }
    kernel(run);
    i += run.n * run.count;
  }
}

// The ranges of all scales, whose elements may lie anywhere.
void find_ranges(const Call& call, float* low, float* high) {
  const int64_t scales = call.numbers.scales;
  const auto kernel = kernels().range[int(call.numbers.type)];
  // A thread has ranges of its own, which must not be more work than the elements.
  const int threads = scales > call.loop.elements / 16 ? 1 : threads_for(call.loop.elements);
  Floats own(scales * threads);
  std::fill_n(own.a, 2 * scales * threads, 0.0f);
  std::fill_n(low, scales, 0.0f);
  std::fill_n(high, scales, 0.0f);
  parallel(threads, [&](int thread, int count) {
    const Range share = share_of(call.loop.elements, 1024, thread, count);
    for_pieces(call.loop, share.begin, share.end, [&](const Piece& piece) {
      range_of_piece(call, kernel, piece, own.a + thread * scales, own.b + thread * scales);
    });
  });
  for (int t = 0; t < threads; t++)
    for (int64_t i = 0; i < scales; i++) {
      low[i] = std::min(low[i], own.a[t * scales + i]);
      high[i] = std::max(high[i], own.b[t * scales + i]);
    }
}

void put(const Chosen& chosen, int64_t i, float* scale, int32_t* zero_point) {
  scale[i] = chosen.scale;
  if (zero_point) zero_point[i] = int32_t(chosen.zero);
}

// `count` groups of `group` elements behind each other, in the cache while they are read twice: the
// first one's scale is scale[0], and the next one's scale[scale_stride].
struct Groups {
  DType type;
  const char* x;
  int64_t x_stride, group, count;
  Scheme scheme;
  bool symmetric;
  char* q;
  int64_t q_stride;
  float* scale;
  int32_t* zero_point;
  int64_t scale_stride;
  Rounding rounding;
  uint64_t element;
  bool around_caches;
};
void quantize_groups(const QuantizeKernels& table, const Groups& groups) {
  constexpr int64_t kMost = 256;
  float low[kMost], high[kMost], inverse[kMost], zero[kMost];
  const Limits range = limits(groups.scheme);
  // An even count of elements at a time, where two make a byte.
  int64_t at_once = std::min(kMost, 8192 / std::max<int64_t>(groups.group, 1) + 1);
  if (is_packed(groups.scheme) && groups.group % 2) at_once = std::max<int64_t>(at_once & -2, 2);
  const int64_t item = int64_t(dtype_size(groups.type));
  const auto find = table.range[int(groups.type)];
  const auto quantize =
      table.quantize[int(groups.type)][int(groups.scheme)][groups.rounding.stochastic];
  for (int64_t g = 0; g < groups.count; g += at_once) {
    const int64_t count = std::min(at_once, groups.count - g), first = g * groups.group;
    std::fill_n(low, count, 0.0f);
    std::fill_n(high, count, 0.0f);
    const char* x = groups.x + first * groups.x_stride * item;
    find({x, groups.x_stride, groups.group, count, low, high, false});
    for (int64_t i = 0; i < count; i++) {
      const Chosen chosen = choose(low[i], high[i], range, groups.symmetric);
      put(chosen, (g + i) * groups.scale_stride, groups.scale, groups.zero_point);
      inverse[i] = 1 / chosen.scale, zero[i] = chosen.zero;
    }
    ScaledRun run{};
    run.from = x, run.from_stride = groups.x_stride;
    run.to = groups.q + (is_packed(groups.scheme) ? first / 2 : first * groups.q_stride);
    run.to_stride = groups.q_stride;
    run.n = count * groups.group;
    run.factor = inverse, run.zero = zero;
    run.group = groups.group, run.period = count, run.stride = 1;
    run.seed = groups.rounding.seed, run.element = groups.element + uint64_t(first);
    run.around_caches = groups.around_caches;
    if (groups.group) quantize(run);
  }
}

}  // namespace

void quantize(const Numbers& numbers, const float* scale, const int32_t* zero_point,
              Rounding rounding) {
  Floats parameters(numbers.scales);
  prepare(numbers, scale, zero_point, true, parameters);
  const Call call(numbers, order_for(numbers, rounding.stochastic, By::q));
  if (call.loop.elements == 0) return;
  const auto kernel =
      kernels().quantize[int(numbers.type)][int(numbers.scheme)][rounding.stochastic];
  run_all(call, kernel, true, parameters.a, parameters.b, rounding.seed, around_caches(call));
}

void dequantize(const Numbers& numbers, const float* scale, const int32_t* zero_point) {
  Floats parameters(numbers.scales);
  prepare(numbers, scale, zero_point, false, parameters);
  const Call call(numbers, order_for(numbers, false, By::x));
  if (call.loop.elements == 0) return;
  const auto kernel = kernels().dequantize[int(numbers.type)][int(numbers.scheme)];
  run_all(call, kernel, false, parameters.a, parameters.b, 0, around_caches(call));
}

void choose_scale(const Numbers& numbers, bool symmetric, float* scale, int32_t* zero_point) {
  const Limits range = limits(numbers.scheme);
  Floats found(numbers.scales);
  const Call call(numbers, By::x);
  if (call.loop.elements)
    find_ranges(call, found.a, found.b);
  else
    std::fill_n(found.a, 2 * numbers.scales, 0.0f);
  for (int64_t i = 0; i < numbers.scales; i++)
    put(choose(found.a[i], found.b[i], range, symmetric), i, scale, zero_point);
}

void quantize_dynamic(const Numbers& numbers, bool symmetric, float* scale, int32_t* zero_point,
                      Rounding rounding) {
  const Call call(numbers, order_for(numbers, rounding.stochastic, By::q));
  const Loop& loop = call.loop;
  // Runs that stay in a core's own cache while they are read twice, and enough of them.
  const int threads = threads_for(loop.elements);
  const bool in_cache = loop.group * call.x_item <= core_cache_bytes() / 2;
  if (!loop.elements || !loop.each_in_a_run() || !in_cache ||
      loop.elements / loop.group < 4 * (threads - 1)) {
    choose_scale(numbers, symmetric, scale, zero_point);
    return quantize(numbers, scale, zero_point, rounding);
  }
  const QuantizeKernels& table = kernels();
  const bool around = around_caches(call);
  parallel(threads, [&](int thread, int count) {
    const int last = loop.dims - 1;
    // Shares begin where a byte does.
    const int64_t grain = is_packed(numbers.scheme) && loop.group % 2 ? 2 : 1;
    const Range share = share_of(loop.elements / loop.group, grain, thread, count);
    for_pieces(loop, share.begin * loop.group, share.end * loop.group, [&](const Piece& piece) {
      const int64_t begin = piece.s + piece.first / loop.group * loop.stride;
      quantize_groups(
          table, {numbers.type, call.x_at(piece.x), loop.x[last], loop.group, piece.n / loop.group,
                  numbers.scheme, symmetric, call.q_at(piece.q), loop.q[last], scale + begin,
                  zero_point ? zero_point + begin : nullptr, loop.stride, rounding,
                  uint64_t(piece.element), around});
    });
  });
}

void quantize_rows(const Rows& rows, int64_t begin, int64_t end) {
  const QuantizeKernels& table = kernels();
  const int64_t item = int64_t(dtype_size(rows.type));
  for (int64_t r = begin; r < end && rows.given && rows.columns; r++) {
    const float inverse = 1 / rows.scale[r];
    const float zero = rows.zero_point ? float(rows.zero_point[r]) : 0;
    ScaledRun run{};
    run.from = static_cast<const char*>(rows.x) + r * rows.row_stride * item;
    run.from_stride = rows.column_stride;
    run.to = static_cast<char*>(rows.q) + r * rows.q_row_stride, run.to_stride = 1;
    run.n = run.group = rows.columns, run.period = 1;
    run.factor = &inverse, run.zero = &zero;
    table.quantize[int(rows.type)][int(rows.scheme)][0](run);
  }
  for (int64_t r = begin; r < end && !rows.given; r++)
    quantize_groups(table, {rows.type,
                            static_cast<const char*>(rows.x) + r * rows.row_stride * item,
                            rows.column_stride,
                            rows.columns,
                            1,
                            rows.scheme,
                            rows.symmetric,
                            static_cast<char*>(rows.q) + r * rows.q_row_stride,
                            1,
                            rows.scale + r,
                            rows.zero_point ? rows.zero_point + r : nullptr,
                            1,
                            {false, 0},
                            0,
                            false});
}

}  // namespace fastnn
