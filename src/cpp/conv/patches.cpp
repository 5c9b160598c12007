#include "conv/patches.hpp"

#include <algorithm>

#include "common/integers.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {

const ConvKernels& conv_kernels() { return FASTNN_KERNELS_OF(conv); }

namespace {

constexpr int kMostLanes = 128;  // the widest panel of any kernel
constexpr int64_t kFewChannels = 4;

// A step of 1 is the rule here, and a division takes longer than the rest of what asks.
int64_t ceil_div_unless_1(int64_t a, int64_t b) { return b == 1 ? a : ceil_div_signed(a, b); }

// Neighbouring positions of the filter in one row of one image.
struct Run {
  int64_t image, at[kSpatial];
  int64_t begin;  // of the run, among the columns or rows that were asked for
  int length;
};

Run run_at(const Patches& p, int64_t position, int64_t begin, int64_t most) {
  Run r;
  r.begin = begin;
  r.at[2] = position % p.out[2];
  position /= p.out[2];
  r.at[1] = position % p.out[1];
  position /= p.out[1];
  r.at[0] = position % p.out[0];
  r.image = position / p.out[0];
  r.length = int(std::min(most, p.out[2] - r.at[2]));
  return r;
}

Tap tap_at(const Patches& p, int64_t index) {
  Tap t;
  t.at[2] = index % p.taps[2];
  index /= p.taps[2];
  t.at[1] = index % p.taps[1];
  t.at[0] = index / p.taps[1];
  return t;
}

// Where tap t of dimension d meets the first position of a run.
int64_t met_by(const Patches& p, const Run& r, int d, int64_t t) {
  return r.at[d] * p.step[d] + p.first[d] + t * p.delta[d];
}

// What one tap sees of a run: elements [lo, hi) of it, at src + i * stride; or nothing.
struct Seen {
  const char* src = nullptr;
  int64_t stride = 0, lo = 0, hi = 0;
};
// One tap of the last dimension, in which a run lies: which part of the run is inside, and how far
// its first element is from the image's.
struct Along {
  int32_t lo, hi;
  int64_t offset;
};
Along along(const Patches& p, const Run& r, int64_t t) {
  const int64_t step = p.step[2], from = met_by(p, r, 2, t);
  Along a;
  a.lo = int32_t(std::clamp<int64_t>(ceil_div_unless_1(-from, step), 0, r.length));
  a.hi = int32_t(std::clamp<int64_t>(ceil_div_unless_1(p.size[2] - from, step), a.lo, r.length));
  if (p.remainder_stride) {
    const int64_t rest = ((from % step) + step) % step;
    a.offset = rest * p.remainder_stride + (from - rest) / step * p.stride[2];
  } else {
    a.offset = from * p.stride[2];
  }
  return a;
}
bool inside(const Patches& p, int d, int64_t at) { return at >= 0 && at < p.size[d]; }
Seen seen_from(const Patches& p, const Run& r, const Along& a, int64_t offset) {
  return {p.data + (r.image * p.image_stride + offset + a.offset) * p.element,
          p.remainder_stride ? p.stride[2] : p.step[2] * p.stride[2], a.lo, a.hi};
}
Seen see(const Patches& p, const Run& r, const Tap& t) {
  const int64_t at[] = {met_by(p, r, 0, t.at[0]), met_by(p, r, 1, t.at[1])};
  if (!inside(p, 0, at[0]) || !inside(p, 1, at[1])) return {p.data, 0, 0, 0};
  return seen_from(p, r, along(p, r, t.at[2]), at[0] * p.stride[0] + at[1] * p.stride[1]);
}

// The same for all taps of a run, one after the other: each dimension's part of the answer is found
// once, if it has no more taps than there is room for.
class View {
 public:
  static bool fits(const Patches& p) {
    return p.taps[0] <= kTaps && p.taps[1] <= kTaps && p.taps[2] <= kTaps;
  }
  void look(const Patches& p, const Run& r) {
    run_ = r;
    for (int d = 0; d < 2; d++)
      for (int64_t t = 0; t < p.taps[d]; t++) {
        const int64_t at = met_by(p, r, d, t);
        inside_[d][t] = inside(p, d, at);
        offset_[d][t] = at * p.stride[d];
      }
    for (int64_t t = 0; t < p.taps[2]; t++) along_[t] = along(p, r, t);
  }
  Seen see(const Patches& p, const Tap& t) const {
    if (!inside_[0][t.at[0]] || !inside_[1][t.at[1]]) return {p.data, 0, 0, 0};
    return seen_from(p, run_, along_[t.at[2]], offset_[0][t.at[0]] + offset_[1][t.at[1]]);
  }

 private:
  static constexpr int64_t kTaps = 16;
  Run run_;
  bool inside_[2][kTaps];
  int64_t offset_[2][kTaps];
  Along along_[kTaps];
};

// Which channels of a tap are among the indices [k0, k0 + k) of (c, t), and where the first of them
// is among those, and how far the next.
struct Channels {
  int64_t first, count, at, apart;
};
Channels channels_of(const Patches& p, int64_t tap, int64_t k0, int64_t k) {
  if (p.channels_inner) {
    const int64_t begin = std::max(k0, tap * p.channels),
                  end = std::min(k0 + k, (tap + 1) * p.channels);
    return {begin - tap * p.channels, std::max<int64_t>(0, end - begin), begin - k0, 1};
  }
  const int64_t taps = p.tap_count();
  const int64_t begin = std::max<int64_t>(0, ceil_div_unless_1(k0 - tap, taps)),
                end = std::min(p.channels, ceil_div_unless_1(k0 + k - tap, taps));
  return {begin, std::max<int64_t>(0, end - begin), begin * taps + tap - k0, taps};
}

// The taps that [k0, k0 + k) has any of.
struct TapRange {
  int64_t begin, end;
};
TapRange taps_of(const Patches& p, int64_t k0, int64_t k) {
  if (!p.channels_inner) return {0, p.tap_count()};
  return {k0 / p.channels, std::min(p.tap_count(), ceil_div_unless_1(k0 + k, p.channels))};
}

}  // namespace

bool Patches::join_lines() {
  if (tap_count() != 1 || remainder_stride) return false;
  int64_t step_between = 1, seen = 1;
  for (int d = kSpatial - 1; d >= 0; d--) {
    if (step[d] != 1 || first[d] != 0 || size[d] != out[d]) return false;
    if (size[d] == 1) continue;
    if (seen == 1)
      step_between = stride[d];
    else if (stride[d] != step_between * seen)
      return false;
    seen *= size[d];
  }
  size[0] = size[1] = out[0] = out[1] = 1;
  size[2] = out[2] = seen;
  stride[2] = step_between;
  return true;
}

bool SplitRows::pays(const Patches& p) {
  return p.step[2] > 1 && p.taps[2] > 1 && p.channels <= kFewChannels && p.size[2] > 0 &&
         View::fits(p);
}

void SplitRows::apply(Patches& p, int threads) {
  const int64_t step = p.step[2], columns = (p.size[2] + step - 1) / step;
  const int64_t row = step * columns, plane = p.size[1] * row, channel = p.size[0] * plane;
  char* to = static_cast<char*>(
      scratch(Scratch::packed_b, size_t(p.images * p.channels * channel * p.element)));
  const auto copy = conv_kernels().copy_rows[size_index(p.element)];
  const int64_t units = p.images * p.channels * p.size[0];
  parallel(threads, [&](int thread, int came) {
    const Range mine = share_of(units, 1, thread, came);
    for (int64_t unit = mine.begin; unit < mine.end; unit++) {
      const int64_t d = unit % p.size[0], c = unit / p.size[0] % p.channels,
                    n = unit / p.size[0] / p.channels;
      const char* from =
          p.data + (n * p.image_stride + c * p.channel_stride + d * p.stride[0]) * p.element;
      for (int64_t rest = 0; rest < step; rest++)
        copy(to + (unit * plane + rest * columns) * p.element, row,
             from + rest * p.stride[2] * p.element, p.stride[1], p.size[1], step * p.stride[2], 0,
             (p.size[2] - rest + step - 1) / step, columns);
    }
  });
  p.data = to;
  p.image_stride = p.channels * channel, p.channel_stride = channel;
  p.stride[0] = plane, p.stride[1] = row, p.stride[2] = 1;
  p.remainder_stride = columns;
}

PatchColumns::PatchColumns(const Patches& p) : p_(p), kernels_(conv_kernels()) {
  if (p.channels > kFewChannels) return;
  for (int64_t t = 0; t < p.tap_count(); t++) taps_.push_back(tap_at(p, t));
}

void PatchColumns::fill(void* dst_, int64_t, int64_t k0, int64_t k, int64_t j0, int columns,
                        int ld) const {
  char* dst = static_cast<char*>(dst_);
  const int size = size_index(p_.element);
  Run runs[kMostLanes];
  int count = 0;
  for (int j = 0; j < columns; j += runs[count++].length)
    runs[count] = run_at(p_, j0 + j, j, columns - j);

  const bool viewed = View::fits(p_);
  View views[kMostLanes];
  for (int i = 0; i < count && viewed; i++) views[i].look(p_, runs[i]);
  auto seen = [&](int i, const Tap& t) {
    return viewed ? views[i].see(p_, t) : see(p_, runs[i], t);
  };

  if (viewed && p_.channels <= kFewChannels &&
      (p_.remainder_stride || p_.step[2] * p_.stride[2] == 1)) {
    // Few channels a tap: row by row, each wherever it comes from.
    constexpr int64_t kRows = 64;
    Lane rows[kRows];
    for (int64_t first = 0; first < k; first += kRows) {
      const int64_t n = std::min(kRows, k - first);
      for (int i = 0; i < count; i++) {
        for (int64_t r = 0; r < n; r++) {
          const int64_t index = k0 + first + r;
          const int64_t c = p_.channels_inner ? index % p_.channels : index / p_.tap_count();
          const int64_t t = p_.channels_inner ? index / p_.channels : index % p_.tap_count();
          const Seen s = views[i].see(p_, taps_[size_t(t)]);
          rows[r] = {s.src + c * p_.channel_stride * p_.element, int32_t(s.lo), int32_t(s.hi)};
        }
        char* to = dst + (first * ld + runs[i].begin) * p_.element;
        // The last run's rows end with zeros, up to the panel's width.
        const bool last = i + 1 == count;
        kernels_.gather_rows[size](to, ld, rows, n, last ? ld - runs[i].begin : runs[i].length);
      }
    }
    return;
  }

  const TapRange range = taps_of(p_, k0, k);
  const bool across = p_.channel_stride == 1 && p_.channels > 1;
  for (int64_t tap = range.begin; tap < range.end; tap++) {
    const Channels ch = channels_of(p_, tap, k0, k);
    if (!ch.count) continue;
    const Tap t = tap_at(p_, tap);
    char* row = dst + ch.at * ld * p_.element;
    if (across) {
      // A position's channels are neighbours: one lane each, turned into rows.
      Lane lanes[kMostLanes];
      for (int i = 0; i < count; i++) {
        const Seen s = seen(i, t);
        for (int l = 0; l < runs[i].length; l++) {
          const bool in = l >= s.lo && l < s.hi;
          lanes[runs[i].begin + l] = {s.src + (in ? (l * s.stride + ch.first) * p_.element : 0), 0,
                                      in ? int32_t(ch.count) : 0};
        }
      }
      for (int l = columns; l < ld; l++) lanes[l] = {p_.data, 0, 0};
      kernels_.transpose[size](row, ch.apart * ld, lanes, ld, 1, ch.count);
      continue;
    }
    for (int i = 0; i < count; i++) {
      const Seen s = seen(i, t);
      kernels_.copy_rows[size](row + runs[i].begin * p_.element, ch.apart * ld,
                               s.src + ch.first * p_.channel_stride * p_.element, p_.channel_stride,
                               ch.count, s.stride, s.lo, s.hi, runs[i].length);
    }
    if (columns < ld)
      kernels_.copy_rows[size](row + columns * p_.element, ch.apart * ld, p_.data, 0, ch.count, 1,
                               0, 0, ld - columns);
  }
}

MatrixRows PatchColumns::rows(int64_t, int64_t k0, int64_t j0, int64_t columns) const {
  // Of one tap that sees whole lines; of these what begins in the first one.
  if (p_.tap_count() != 1 || p_.step[2] * p_.stride[2] != 1 || p_.first[2] != 0) return {};
  const Run r = run_at(p_, j0, 0, columns);
  const Seen s = see(p_, r, Tap{});
  if (s.lo >= s.hi) return {};
  return {s.src + k0 * p_.channel_stride * p_.element, p_.channel_stride * p_.element,
          (s.hi - s.lo) * p_.element};
}

void PatchRows::fill(void* dst_, int64_t segment, int64_t k0, int64_t k, int64_t j0, int columns,
                     int ld) const {
  char* dst = static_cast<char*>(dst_);
  const int size = size_index(p_.element);
  const bool neighbours = p_.channel_stride == 1 && p_.channels_inner;
  const TapRange range = taps_of(p_, j0, columns);
  const int64_t first = segment * p_.positions() + k0, taps = p_.tap_count();

  Tap tap_of[kMostLanes];
  if (!neighbours)
    for (int l = 0; l < columns; l++)
      tap_of[l] = tap_at(p_, p_.channels_inner ? (j0 + l) / p_.channels : (j0 + l) % taps);

  Run r;
  for (int64_t at = 0; at < k; at += r.length) {
    r = run_at(p_, first + at, at, k - at);
    char* rows = dst + at * ld * p_.element;
    if (neighbours) {
      // Rows of channels, copied as they lie.
      for (int64_t tap = range.begin; tap < range.end; tap++) {
        const Channels ch = channels_of(p_, tap, j0, columns);
        const Seen s = see(p_, r, tap_at(p_, tap));
        char* to = rows + ch.at * p_.element;
        auto zero = [&](int64_t begin, int64_t end) {
          kernels_.copy_rows[size](to + begin * ld * p_.element, ld, p_.data, 0, end - begin, 1, 0,
                                   0, ch.count);
        };
        zero(0, s.lo);
        kernels_.copy_rows[size](to + s.lo * ld * p_.element, ld,
                                 s.src + (s.lo * s.stride + ch.first) * p_.element, s.stride,
                                 s.hi - s.lo, 1, 0, ch.count, ch.count);
        zero(s.hi, r.length);
      }
      if (columns < ld)
        kernels_.copy_rows[size](rows + columns * p_.element, ld, p_.data, 0, r.length, 1, 0, 0,
                                 ld - columns);
      continue;
    }
    Lane lanes[kMostLanes];
    int64_t stride = 1;
    View view;
    const bool viewed = View::fits(p_);
    if (viewed) view.look(p_, r);
    for (int l = 0; l < columns; l++) {
      const int64_t c = p_.channels_inner ? (j0 + l) % p_.channels : (j0 + l) / taps;
      const Seen s = viewed ? view.see(p_, tap_of[l]) : see(p_, r, tap_of[l]);
      lanes[l] = {s.src + c * p_.channel_stride * p_.element, int32_t(s.lo), int32_t(s.hi)};
      if (s.lo < s.hi) stride = s.stride;
    }
    for (int l = columns; l < ld; l++) lanes[l] = {p_.data, 0, 0};
    kernels_.transpose[size](rows, ld, lanes, ld, stride, r.length);
  }
}

}  // namespace fastnn
