// The windows as tables, the choice between planes and channels, and the threads.
#include "pool/pool.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/caches.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {
namespace {

const PoolKernels& kernels() { return FASTNN_KERNELS_OF(pool); }

enum class Job { forward, backward, element };

// Memory for the tables of a call. Those of a small one lie in here: to allocate each of a dozen
// would take longer than the pooling itself.
class Tables {
 public:
  Tables() = default;
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;
  template <class T>
  T* take(int64_t n) {
    static_assert(sizeof(T) % 8 == 0);
    const size_t bytes = size_t(n) * sizeof(T);
    if (bytes > sizeof(small_) - used_) {
      more_.push_back(std::make_unique_for_overwrite<char[]>(bytes));
      return reinterpret_cast<T*>(more_.back().get());
    }
    T* p = reinterpret_cast<T*>(small_ + used_);
    used_ += bytes;
    return p;
  }

 private:
  alignas(8) char small_[4096];
  size_t used_ = 0;
  std::vector<std::unique_ptr<char[]>> more_;
};

// The tables of one axis.
struct Axis {
  PoolAxis given;
  bool regular = true;
  int64_t *begin, *first, *count, *back_begin = nullptr;
  double* divisor;
  PoolTap* back = nullptr;

  void make(bool include_padding, bool backward, Tables& tables) {
    PoolAxis& a = given;
    if (a.in < 1 || a.out < 1 || a.kernel < 0 || a.stride < 1 || a.padding < 0 || a.dilation < 1)
      throw std::invalid_argument("pool: windows: expected positive sizes");
    if (a.kernel == 0 && a.in % a.out == 0) {
      a.kernel = a.stride = a.in / a.out;
      a.padding = 0;
      a.dilation = 1;
    }
    regular = a.kernel > 0;
    begin = tables.take<int64_t>(a.out);
    first = tables.take<int64_t>(a.out);
    count = tables.take<int64_t>(a.out);
    divisor = tables.take<double>(a.out);
    int64_t most = 0;
    for (int64_t o = 0; o < a.out; o++) {
      if (regular) {
        const int64_t b = o * a.stride - a.padding;
        begin[o] = b;
        first[o] = b < 0 ? (-b + a.dilation - 1) / a.dilation : 0;
        const int64_t beyond = b < a.in ? (a.in - b + a.dilation - 1) / a.dilation : 0;
        count[o] = std::min(beyond, a.kernel) - first[o];
        divisor[o] =
            double(include_padding ? std::min(b + a.kernel, a.in + a.padding) - b : count[o]);
      } else {
        begin[o] = o * a.in / a.out;
        first[o] = 0;
        count[o] = ((o + 1) * a.in + a.out - 1) / a.out - begin[o];
        divisor[o] = double(count[o]);
      }
      if (count[o] < 1) throw std::invalid_argument("pool: windows: one without any element");
      most = std::max(most, count[o]);
    }
    if (!regular) {
      a.kernel = most;
      a.stride = a.dilation = 1;
      a.padding = 0;
    }
    if (!backward) return;
    back_begin = tables.take<int64_t>(a.in + 1);
    std::fill_n(back_begin, a.in + 1, 0);
    auto each = [&](auto&& f) {
      for (int64_t o = 0; o < a.out; o++)
        for (int64_t k = first[o]; k < first[o] + count[o]; k++) f(o, k, begin[o] + k * a.dilation);
    };
    each([&](int64_t, int64_t, int64_t i) { back_begin[i + 1]++; });
    for (int64_t i = 0; i < a.in; i++) back_begin[i + 1] += back_begin[i];
    back = tables.take<PoolTap>(back_begin[a.in]);
    int64_t* next = tables.take<int64_t>(a.in);
    std::copy_n(back_begin, a.in, next);
    each([&](int64_t o, int64_t k, int64_t i) { back[next[i]++] = {o, k}; });
  }

  // How far apart the elements of one window lie, and the outputs that read one element.
  int64_t span() const {
    int64_t most = 1;
    for (int64_t o = 0; o < given.out; o++)
      most = std::max(most, (count[o] - 1) * given.dilation + 1);
    return most;
  }
  int64_t back_span() const {
    int64_t most = 1;
    for (int64_t i = 0; i < given.in; i++)
      if (back_begin[i] < back_begin[i + 1])
        most = std::max(most, back[back_begin[i + 1] - 1].o - back[back_begin[i]].o + 1);
    return most;
  }
  int64_t most_back() const {
    int64_t most = 1;
    for (int64_t i = 0; i < given.in; i++) most = std::max(most, back_begin[i + 1] - back_begin[i]);
    return most;
  }
  PoolWindows windows() const {
    return {given.in,       given.out,  given.kernel, given.stride, given.padding,
            given.dilation, regular,    begin,        first,        count,
            divisor,        back_begin, back};
  }
};

int64_t rounded_up(int64_t n) { return (n + 15) / 16 * 16; }

bool covers(const PoolAxis& a) {
  const bool whole = a.kernel == 0 ? a.out == 1 : a.kernel == a.in && a.out == 1;
  return whole && a.padding == 0;
}

// Where one window spans the whole width, rows that lie together are one longer row: a mean over
// 7 x 7 is one over 49. The taps keep their numbers.
void fold_rows(PoolCall& c) {
  for (int times = 0; times < 2; times++) {
    PoolAxis &h = c.axis[1], &w = c.axis[2];
    const bool dense = c.x.stride[3] == c.x.stride[4] * w.in || h.in == 1;
    const bool divides = h.kernel > 0 || h.in % h.out == 0;
    if (!covers(w) || !dense || !divides || h.padding != 0 || h.dilation != 1) return;
    if (h.kernel == 0) h.kernel = h.stride = h.in / h.out;
    PoolAxis folded;
    folded.in = h.in * w.in;
    folded.out = h.out;
    folded.kernel = h.kernel * w.in;
    folded.stride = h.stride * w.in;
    w = folded;
    h = c.axis[0];
    c.axis[0] = {};
    for (PoolTensor* t : {&c.x, &c.out, &c.codes}) {
      if (t != &c.x) t->stride[4] = t->stride[3];
      t->stride[3] = t->stride[2];
      t->stride[2] = 0;
    }
  }
}

// Blocks of channels, so that small images have work for all threads too.
constexpr int64_t kChannelBlock = 256;

struct Plan {
  Tables tables;
  Axis axis[3];
  PoolPlan p{};
  PoolCall call;
  bool channels_last;
  int64_t planes, in_rows, out_rows;
  size_t item;

  Plan(const PoolCall& given, Job job) : call(given), item(dtype_size(given.type)) {
    auto dense = [](const PoolTensor& t) { return t.stride[1] == 1; };
    channels_last = call.channels > 1 && (!call.x.data || dense(call.x)) && dense(call.out) &&
                    (!call.codes.data || dense(call.codes));
    if (!channels_last) fold_rows(call);
    for (int d = 0; d < 3; d++) {
      axis[d].given = call.axis[d];
      axis[d].make(call.include_padding, job == Job::backward, tables);
      p.axis[d] = axis[d].windows();
    }
    const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
    p.channels = call.channels;
    std::copy_n(call.x.stride, 5, p.x);
    std::copy_n(call.out.stride, 5, p.out);
    std::copy_n(call.codes.stride, 5, p.code);
    p.wide_codes = call.wide_codes;
    p.divisor = call.divisor;
    if (double(wz.kernel) * double(wy.kernel) * double(wx.kernel) > double(kMostTaps))
      throw std::invalid_argument("pool: windows: more than 2^24 taps");
    p.taps = wz.kernel * wy.kernel * wx.kernel;
    if (call.codes.data && !call.wide_codes && p.taps > 256)
      throw std::invalid_argument("pool: codes: expected int32 for more than 256 taps");
    planes = call.batch * call.channels;
    p.around_caches = planes * wz.in * wy.in * wx.in * int64_t(item) > last_cache_bytes() / 2;
    in_rows = wz.in * wy.in;
    out_rows = wz.out * wy.out;
    // Where the last cache still holds the input, asking for it early only takes time.
    const int64_t row_bytes = std::min(p.channels, kChannelBlock) * wx.in * int64_t(item);
    p.fetch = p.around_caches && (wy.kernel + wy.stride) * row_bytes <= core_cache_bytes() / 2;
    if (job == Job::element) return;

    const bool forward = job == Job::forward;
    // Tap by tap a vector holds successive outputs, which must be enough of them and, where the
    // stride is more than 2, worth a scalar split of the row.
    p.segments =
        !wx.regular ||
        (wx.stride > 2 && wx.dilation == 1 && (!forward || wx.kernel >= 16 || wx.out < 16)) ||
        (wx.out == 1 && wx.count[0] == wx.in && wx.dilation == 1 && wx.padding == 0);
    p.whole = p.segments && wz.in * wy.in == 1 && out_rows == 1 && wx.out == 1 && wx.padding == 0 &&
              wx.count[0] == wx.in;
    const int64_t reach = (wx.kernel - 1) * wx.dilation / wx.stride;
    p.lead = forward || p.segments ? 0 : reach;
    const int64_t places =
        forward ? wx.out : std::max(wx.out, (wx.in + wx.padding + wx.stride - 1) / wx.stride);
    p.row = p.lead + rounded_up(p.segments ? wx.out : places) + 16;
    p.phase_length = p.segments ? rounded_up(wx.in) + 16
                                : std::max(rounded_up(places) + reach + 16,
                                           (wx.in + wx.padding) / wx.stride + 16);
    p.ring_z = std::min(forward ? axis[0].span() : axis[0].back_span(), forward ? wz.in : wz.out);
    p.ring_y = std::min(forward ? axis[1].span() : axis[1].back_span(), forward ? wy.in : wy.out);
    p.window_rows = forward ? wz.kernel * wy.kernel : axis[0].most_back() * axis[1].most_back();
  }

  void make_positions() {
    const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
    int64_t* position = tables.take<int64_t>(p.taps);
    int64_t* address = tables.take<int64_t>(p.taps);
    p.tap_position = position, p.tap_address = address;
    for (int64_t z = 0; z < wz.kernel; z++)
      for (int64_t y = 0; y < wy.kernel; y++)
        for (int64_t x = 0; x < wx.kernel; x++) {
          const int64_t dz = z * wz.dilation, dy = y * wy.dilation, dx = x * wx.dilation;
          *position++ = (dz * wy.in + dy) * wx.in + dx;
          *address++ = dz * p.x[2] + dy * p.x[3] + dx * p.x[4];
        }
  }

  size_t scratch_bytes() const {
    const PoolWindows& wx = p.axis[2];
    const int64_t phases = p.segments ? 1 : wx.stride;
    const int64_t numbers = phases * (p.phase_length + 1) + p.ring_z * p.ring_y * (2 * p.row + 1) +
                            2 * p.window_rows + 2 * wx.kernel + 5 * p.row + 2;
    return size_t(numbers) * 8 + 16 * 64;
  }

  const PoolKernels::OfType& of() const { return kernels().of[int(call.type)]; }
  char* x() const { return static_cast<char*>(call.x.data); }
  char* out() const { return static_cast<char*>(call.out.data); }
  char* codes() const { return static_cast<char*>(call.codes.data); }
  int64_t code_size() const { return call.wide_codes ? 4 : 1; }

  // A guess at the nanoseconds on one thread, only to decide on threads.
  int threads() const {
    double in = double(planes), work = double(planes);
    for (const PoolWindows& w : p.axis) {
      in *= double(w.in);
      work *= double(w.out) * double(w.kernel);
    }
    constexpr double kWorthAThread = 10'000;
    const double shares = (in + work) * 0.15 * double(item) / 4 / kWorthAThread;
    return shares < 2 ? 1 : int(std::min(shares, double(max_threads())));
  }
};

void run_planes(const Plan& plan, PoolKernels::Planes kernel, int64_t rows_of_plane) {
  const int64_t rows = plan.planes * rows_of_plane;
  const int threads = plan.threads();
  const size_t bytes = (plan.scratch_bytes() + 4095) / 4096 * 4096;
  char* work = static_cast<char*>(scratch(Scratch::misc, bytes * size_t(threads)));
  // Whole planes where there are enough of them: rows next to a cut are reduced twice.
  const int64_t grain = plan.planes >= 4 * threads ? rows_of_plane : 1;
  parallel(threads, [&](int thread, int count) {
    const Range r = share_of(rows, grain, thread, count);
    if (r.begin < r.end)
      kernel(plan.p, plan.x(), plan.out(), plan.codes(), r.begin, r.end,
             work + size_t(thread) * bytes);
  });
  scratch_trim();
}

void run_channels(const Plan& plan, PoolKernels::Channels kernel, int64_t rows_of_plane) {
  const PoolPlan& p = plan.p;
  const int64_t blocks = (p.channels + kChannelBlock - 1) / kChannelBlock;
  const int64_t units = plan.call.batch * rows_of_plane * blocks;
  const int64_t item = int64_t(plan.item), code = plan.code_size();
  parallel(plan.threads(), [&](int thread, int count) {
    const Range r = share_of(units, 1, thread, count);
    for (int64_t u = r.begin; u < r.end; u++) {
      const int64_t c = u % blocks * kChannelBlock, row = u / blocks % rows_of_plane,
                    n = u / blocks / rows_of_plane;
      kernel(p, plan.x() + (n * p.x[0] + c) * item, plan.out() + (n * p.out[0] + c) * item,
             plan.codes() ? plan.codes() + (n * p.code[0] + c) * code : nullptr, row,
             std::min(kChannelBlock, p.channels - c));
    }
  });
}

// Calls f(batch, channel, z, y, x) for every output: channels innermost where they lie together.
template <class F>
void for_outputs(const Plan& plan, F f) {
  const PoolPlan& p = plan.p;
  const int64_t width = p.axis[2].out, height = p.axis[1].out;
  const int64_t channels = plan.channels_last ? 1 : p.channels;
  parallel(plan.threads(), [&](int thread, int count) {
    const Range r = share_of(plan.call.batch * channels * plan.out_rows, 1, thread, count);
    for (int64_t u = r.begin; u < r.end; u++) {
      const int64_t plane = u / plan.out_rows, row = u % plan.out_rows;
      const int64_t n = plane / channels, z = row / height, y = row % height;
      if (plan.channels_last) {
        for (int64_t x = 0; x < width; x++)
          for (int64_t c = 0; c < p.channels; c++) f(n, c, z, y, x);
      } else {
        for (int64_t x = 0; x < width; x++) f(n, plane % channels, z, y, x);
      }
    }
  });
}

bool empty(const PoolCall& call) { return call.batch == 0 || call.channels == 0; }

int64_t code_at(const Plan& plan, int64_t place) {
  return plan.call.wide_codes ? static_cast<const int32_t*>(plan.call.codes.data)[place]
                              : static_cast<const uint8_t*>(plan.call.codes.data)[place];
}

template <class Item>
void gather(const Plan& plan) {
  const PoolPlan& p = plan.p;
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const Item* x = static_cast<const Item*>(plan.call.x.data);
  Item* out = static_cast<Item*>(plan.call.out.data);
  const int64_t elements = wz.in * wy.in * wx.in;
  for_outputs(plan, [&](int64_t n, int64_t c, int64_t z, int64_t y, int64_t o) {
    const int64_t code = code_at(
        plan, n * p.code[0] + c * p.code[1] + z * p.code[2] + y * p.code[3] + o * p.code[4]);
    const int64_t corner = (wz.begin[z] * wy.in + wy.begin[y]) * wx.in + wx.begin[o];
    // What is no code of this op must not lead out of memory.
    const bool known = uint64_t(code) < uint64_t(p.taps) &&
                       uint64_t(corner + p.tap_position[code]) < uint64_t(elements);
    out[n * p.out[0] + c * p.out[1] + z * p.out[2] + y * p.out[3] + o * p.out[4]] =
        known ? x[n * p.x[0] + c * p.x[1] + wz.begin[z] * p.x[2] + wy.begin[y] * p.x[3] +
                  wx.begin[o] * p.x[4] + p.tap_address[code]]
              : Item(0);
  });
}

}  // namespace

void max_pool(const PoolCall& call) {
  if (empty(call)) return;
  const Plan plan(call, Job::forward);
  const auto& k = plan.of();
  const bool coded = call.codes.data != nullptr;
  if (plan.channels_last)
    run_channels(plan, coded ? k.max_codes_channels : k.max_channels, plan.out_rows);
  else
    run_planes(plan, coded ? k.max_codes : k.max, plan.out_rows);
}

void avg_pool(const PoolCall& call) {
  if (empty(call)) return;
  const Plan plan(call, Job::forward);
  if (plan.channels_last)
    run_channels(plan, plan.of().avg_channels, plan.out_rows);
  else
    run_planes(plan, plan.of().avg, plan.out_rows);
}

void avg_pool_backward(const PoolCall& call) {
  if (empty(call)) return;
  const Plan plan(call, Job::backward);
  if (plan.channels_last)
    run_channels(plan, plan.of().avg_backward_channels, plan.in_rows);
  else
    run_planes(plan, plan.of().avg_backward, plan.in_rows);
}

void max_pool_scatter(const PoolCall& call) {
  if (empty(call)) return;
  Plan plan(call, Job::backward);
  const PoolPlan& p = plan.p;
  // A gradient that gathers asks every tap which reads it. That is done in vectors; one by one
  // outputs take longer each, but few are left where the stride is large.
  double taps_of_element = 1;
  for (const PoolWindows& w : p.axis)
    taps_of_element *= double(w.kernel) / double(std::min(w.stride, w.kernel));
  const bool gathers =
      taps_of_element <= 24 && (plan.channels_last || (!p.segments && p.axis[2].stride <= 2));
  if (gathers) {
    if (plan.channels_last)
      run_channels(plan, plan.of().max_backward_channels, plan.in_rows);
    else
      run_planes(plan, plan.of().max_backward, plan.in_rows);
    return;
  }
  plan.make_positions();
  // Sixteen channels that lie together share their cache lines.
  const int64_t block = plan.channels_last ? 16 : 1;
  const int64_t blocks = (p.channels + block - 1) / block, units = call.batch * blocks;
  const int64_t item = int64_t(plan.item), code = plan.code_size();
  const int64_t elements = plan.in_rows * p.axis[2].in;
  const int threads = plan.threads();
  const size_t bytes = (size_t(elements * block) * 8 + 4095) / 4096 * 4096;
  char* work = static_cast<char*>(scratch(Scratch::misc, bytes * size_t(threads)));
  parallel(threads, [&](int thread, int count) {
    const Range r = share_of(units, 1, thread, count);
    for (int64_t u = r.begin; u < r.end; u++) {
      const int64_t n = u / blocks, c = u % blocks * block;
      plan.of().scatter(p, plan.x() + (n * p.x[0] + c * p.x[1]) * item,
                        plan.out() + (n * p.out[0] + c * p.out[1]) * item,
                        plan.codes() + (n * p.code[0] + c * p.code[1]) * code,
                        std::min(block, p.channels - c), work + size_t(thread) * bytes);
    }
  });
  scratch_trim();
}

void max_pool_gather(const PoolCall& call) {
  if (empty(call)) return;
  Plan plan(call, Job::element);
  plan.make_positions();
  if (plan.item == 8)
    gather<uint64_t>(plan);
  else if (plan.item == 4)
    gather<uint32_t>(plan);
  else
    gather<uint16_t>(plan);
}

void max_pool_indices(const PoolCall& call) {
  if (empty(call)) return;
  Plan plan(call, Job::element);
  plan.make_positions();
  const PoolPlan& p = plan.p;
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  int64_t* out = static_cast<int64_t*>(call.out.data);
  const int64_t* position = p.tap_position;  // what is no code of this op means the first tap
  const int64_t channels = plan.channels_last ? 1 : p.channels;
  const int64_t run = plan.channels_last ? p.channels : 1;
  parallel(plan.threads(), [&](int thread, int count) {
    const Range r = share_of(plan.call.batch * channels * plan.out_rows, 1, thread, count);
    for (int64_t u = r.begin; u < r.end; u++) {
      const int64_t plane = u / plan.out_rows, row = u % plan.out_rows;
      const int64_t n = plane / channels, c = plane % channels, z = row / wy.out, y = row % wy.out;
      const int64_t corner = (wz.begin[z] * wy.in + wy.begin[y]) * wx.in;
      int64_t* to = out + n * p.out[0] + c * p.out[1] + z * p.out[2] + y * p.out[3];
      const int64_t from = n * p.code[0] + c * p.code[1] + z * p.code[2] + y * p.code[3];
      auto convert = [&](const auto* codes) {
        for (int64_t o = 0; o < wx.out; o++) {
          const int64_t base = corner + wx.begin[o];
          const auto* code = codes + from + o * p.code[4];
          int64_t* at = to + o * p.out[4];
          for (int64_t i = 0; i < run; i++)
            at[i] = base + position[uint64_t(code[i]) < uint64_t(p.taps) ? code[i] : 0];
        }
      };
      if (call.wide_codes)
        convert(static_cast<const int32_t*>(call.codes.data));
      else
        convert(static_cast<const uint8_t*>(call.codes.data));
    }
  });
}

}  // namespace fastnn
