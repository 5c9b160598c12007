#include "conv/strips.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "common/caches.hpp"

namespace fastnn {

namespace {

constexpr int64_t kLeastFilters = 16;
constexpr int64_t kLeastRun = 8;
constexpr int kMostLanes = 128;
constexpr int64_t kTileRows = 14;  // the most that a tile of any kernel reads at once

}  // namespace

// `n` pixels of `bytes` each, as many as a Word has at most, become Words with zeros behind: three
// 16-bit channels are four.
template <class Word>
static void widen_pixels(char* to, const char* from, int64_t step, int64_t bytes, int64_t n) {
  constexpr int64_t size = sizeof(Word);
  Word pixel = 0;
  if (step >= bytes)  // what lies behind is read too, where there are pixels behind
    for (const Word mask = Word(~Word(0)) >> 8 * (size - bytes); n > size;
         n--, from += step, to += size) {
      std::memcpy(&pixel, from, sizeof pixel);
      pixel &= mask;
      std::memcpy(to, &pixel, sizeof pixel);
    }
  for (; n > 0; n--, from += step, to += size) {
    pixel = 0;
    std::memcpy(&pixel, from, size_t(bytes));
    std::memcpy(to, &pixel, sizeof pixel);
  }
}

bool PatchStrips::pays(const Patches& p, int64_t filters, bool batch_invariant, bool packed) {
  // Where channels are not neighbours already, turning them round pays if several taps see them.
  if (p.depth() == 0 || (p.channel_stride != 1 && p.tap_count() == 1)) return false;
  // The filters are packed in every call; a channels-last image need not be turned round, and
  // PatchColumns is slow there.
  const int64_t positions = p.positions() * (batch_invariant ? 1 : p.images);
  return filters >= kLeastFilters && p.channels * p.taps[2] >= kLeastRun &&
         (packed || positions * (p.channel_stride == 1 ? 8 : 1) >= filters);
}

bool PatchStrips::pays_summed(const Patches& p, int64_t filters) {
  if (p.depth() == 0 || p.images * p.positions() == 0) return false;
  // Where channels are not neighbours already, turning them round pays if several taps see them.
  if (p.channel_stride != 1 && p.tap_count() == 1) return false;
  return filters >= kLeastFilters && p.channels * p.taps[2] >= kLeastRun;
}

PatchStrips::PatchStrips(const Patches& p, int64_t step, Lines use)
    : p_(p), padded_(padded_channels(p, step)) {
  lines = p.images * p.out[0] * p.out[1], line = p.out[2];
  lines_together = p.out[1];

  bool inside = true;
  for (int d = 0; d < kSpatial; d++) {
    const int64_t far = (p.taps[d] - 1) * p.delta[d];
    lowest_[d] = p.first[d] + std::min<int64_t>(0, far);
    const int64_t highest = p.first[d] + std::max<int64_t>(0, far) + (p.out[d] - 1) * p.step[d];
    inside = inside && lowest_[d] >= 0 && highest < p.size[d];
    if (d == 2) columns_ = highest - lowest_[d] + 1;
  }

  const int64_t tile_rows = use == Lines::summed ? 1 : std::min<int64_t>(kTileRows, line);
  const bool neighbours = p.channel_stride == 1 || p.channels == 1;
  in_place_ = inside && neighbours && padded_ == p.channels &&
              !rows_collide(p.step[2] * p.stride[2] * p.element, tile_rows);
  int64_t apart[kSpatial];  // of taps
  if (in_place_) {
    pixel_ = p.stride[2];
    for (int d = 0; d < kSpatial; d++) apart[d] = p.delta[d] * p.stride[d];
    line_step = p.step[1] * p.stride[1];
  } else {
    // Row by row of the input, and in each the planes that the taps of the first dimension see.
    pixel_ = padded_;
    if (rows_collide(p.step[2] * pixel_ * p.element, tile_rows)) pixel_ += 64 / p.element;
    row_ = columns_ * pixel_;
    apart[0] = row_, apart[1] = p.delta[1] * p.taps[0] * row_, apart[2] = p.delta[2] * pixel_;
    line_step = p.step[1] * p.taps[0] * row_;
  }
  row_step = p.step[2] * pixel_;

  const bool along = p.delta[2] == 1 && pixel_ == padded_;
  run = along ? p.taps[2] * padded_ : padded_;
  auto offset = [&](int d, int64_t t) {
    return (apart[d] < 0 ? t - (p.taps[d] - 1) : t) * apart[d];
  };
  for (int64_t t0 = 0; t0 < p.taps[0]; t0++)
    for (int64_t t1 = 0; t1 < p.taps[1]; t1++)
      for (int64_t t2 = 0; t2 < (along ? 1 : p.taps[2]); t2++)
        runs.push_back(offset(0, t0) + offset(1, t1) + offset(2, t2));
}

int64_t PatchStrips::input_rows(int64_t count) const {
  return (count - 1) * p_.step[1] + (p_.taps[1] - 1) * std::abs(p_.delta[1]) + 1;
}

int64_t PatchStrips::bytes(int64_t count) const {
  return in_place_ ? 0 : input_rows(count) * p_.taps[0] * row_ * p_.element;
}

const char* PatchStrips::fill(char* memory, int64_t first, int64_t count) const {
  const int64_t o1 = first % p_.out[1], o0 = first / p_.out[1] % p_.out[0],
                image = first / p_.out[1] / p_.out[0];
  const char* from = p_.data + image * p_.image_stride * p_.element;
  const int64_t h0 = o1 * p_.step[1] + lowest_[1];
  if (in_place_)
    return from + ((o0 * p_.step[0] + lowest_[0]) * p_.stride[0] + h0 * p_.stride[1] +
                   lowest_[2] * p_.stride[2]) *
                      p_.element;
  char* to = memory;
  for (int64_t i = 0; i < input_rows(count); i++)
    for (int64_t t0 = 0; t0 < p_.taps[0]; t0++, to += row_ * p_.element) {
      if (p_.taps[1] == 1 && i % p_.step[1]) continue;  // no tap sees it
      const int64_t d = o0 * p_.step[0] + p_.first[0] + t0 * p_.delta[0], h = h0 + i;
      const bool inside = d >= 0 && d < p_.size[0] && h >= 0 && h < p_.size[1];
      if (inside)
        copy_row(to, from + (d * p_.stride[0] + h * p_.stride[1]) * p_.element);
      else
        std::memset(to, p_.outside, size_t(row_ * p_.element));
    }
  return memory;
}

// One row of the input, with the zeros beside it and the channels innermost.
void PatchStrips::copy_row(char* to, const char* from) const {
  const int64_t lo = std::clamp<int64_t>(-lowest_[2], 0, columns_),
                hi = std::clamp<int64_t>(p_.size[2] - lowest_[2], lo, columns_);
  const int64_t pixel = pixel_ * p_.element;
  from += lowest_[2] * p_.stride[2] * p_.element;
  if (p_.channel_stride != 1 && p_.channels > 1) {
    Lane lanes[kMostLanes];
    const auto transpose = conv_kernels().transpose[size_index(p_.element)];
    for (int64_t c0 = 0; c0 < padded_; c0 += kMostLanes) {
      const int count = int(std::min<int64_t>(kMostLanes, padded_ - c0));
      for (int c = 0; c < count; c++)
        lanes[c] = c0 + c < p_.channels ? Lane{from + (c0 + c) * p_.channel_stride * p_.element,
                                               int32_t(lo), int32_t(hi)}
                                        : Lane{from, 0, 0};
      if (padded_ <= kFewLanes && pixel_ == padded_ && p_.stride[2] == 1)
        conv_kernels().interleave[size_index(p_.element)](to, lanes, count, columns_);
      else
        transpose(to + c0 * p_.element, pixel_, lanes, count, p_.stride[2], columns_);
    }
    return;
  }
  if (padded_ != p_.channels)
    std::memset(to, p_.outside, size_t(columns_ * pixel));
  else
    std::memset(to, p_.outside, size_t(lo * pixel));
  if (p_.stride[2] == pixel_ && padded_ == p_.channels)
    std::memcpy(to + lo * pixel, from + lo * pixel, size_t((hi - lo) * pixel));
  else if (pixel == sizeof(uint64_t) && lo < hi)
    widen_pixels<uint64_t>(to + lo * pixel, from + lo * p_.stride[2] * p_.element,
                           p_.stride[2] * p_.element, p_.channels * p_.element, hi - lo);
  else if (pixel == sizeof(uint32_t) && lo < hi)
    widen_pixels<uint32_t>(to + lo * pixel, from + lo * p_.stride[2] * p_.element,
                           p_.stride[2] * p_.element, p_.channels * p_.element, hi - lo);
  else
    for (int64_t i = lo; i < hi; i++)
      std::memcpy(to + i * pixel, from + i * p_.stride[2] * p_.element,
                  size_t(p_.channels * p_.element));
  std::memset(to + hi * pixel, p_.outside, size_t((columns_ - hi) * pixel));
}

}  // namespace fastnn
