#include "tree/watch.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "common/parallel.hpp"

namespace fastnn {
namespace {

constexpr int64_t kPiece = 1 << 18;  // for one thread at a time

// Fletcher's two sums, of 64-bit words and in eight lanes: of the words, and of the first sum after
// each. No change of a single word leaves both as they were.
std::array<uint64_t, 2> sums_of(const char* data, int64_t bytes) {
  constexpr int kLanes = 8;
  uint64_t first[kLanes] = {}, second[kLanes] = {}, word[kLanes];
  for (; bytes > 0; data += sizeof word, bytes -= int64_t(sizeof word)) {
    if (bytes < int64_t(sizeof word)) std::fill_n(word, kLanes, 0);
    std::memcpy(word, data, size_t(std::min<int64_t>(bytes, sizeof word)));
    for (int i = 0; i < kLanes; i++) first[i] += word[i], second[i] += first[i];
  }
  std::array<uint64_t, 2> out{};
  for (int i = 0; i < kLanes; i++) {
    out[0] += first[i] * uint64_t(2 * i + 1);
    out[1] += second[i] * uint64_t(2 * i + 1);
  }
  return out;
}

}  // namespace

TreeWatch::TreeWatch(std::vector<Part> parts) {
  for (const Part& part : parts)
    for (int64_t at = 0; at < part.bytes; at += kPiece)
      parts_.push_back(
          {static_cast<const char*>(part.data) + at, std::min(kPiece, part.bytes - at)});
  for (const Part& part : parts_) bytes_ += part.bytes;
  was_ = sums();
}

std::vector<TreeWatch::Sums> TreeWatch::sums() const {
  std::vector<Sums> out(parts_.size());
  // About 10 bytes a nanosecond; a region costs about 5 us.
  const int threads = int(std::clamp<int64_t>(bytes_ / 200'000, 1, max_threads()));
  std::atomic<size_t> next{0};
  parallel(threads, [&](int, int) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts_.size();)
      out[i] = sums_of(static_cast<const char*>(parts_[i].data), parts_[i].bytes);
  });
  return out;
}

bool TreeWatch::changed() const { return sums() != was_; }

}  // namespace fastnn
