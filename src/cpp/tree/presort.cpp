// A radix sort, least significant digit first: stable, and its time does not depend on the values.
#include "tree/presort.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "common/parallel.hpp"

namespace fastnn {
namespace {

// Unsigned integers in the order of the floats.
inline uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0xffffffffu;
  if (bits == 0x80000000u) bits = 0;
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

inline float value_of(uint32_t key) {
  const uint32_t bits = key ^ (uint32_t(int32_t(~key) >> 31) | 0x80000000u);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Keys of columns [first, last), a block of rows at a time, so that a cache line of rows that lie
// together serves all the columns it holds.
void transpose_keys(const FloatMatrix& x, int64_t first, int64_t last, uint32_t* keys) {
  constexpr int64_t kBlock = 64;
  for (int64_t begin = 0; begin < x.rows; begin += kBlock) {
    const int64_t end = std::min(x.rows, begin + kBlock);
    for (int64_t f = first; f < last; f++) {
      const float* from = x.data + f * x.column_stride;
      uint32_t* to = keys + f * x.rows;
      for (int64_t r = begin; r < end; r++) to[r] = key_of(from[r * x.row_stride]);
    }
  }
}

template <int kBits>
struct Digits {
  static constexpr int kCount = (32 + kBits - 1) / kBits, kValues = 1 << kBits;
  static uint32_t at(uint32_t key, int digit) {
    return key >> (digit * kBits) & uint32_t(kValues - 1);
  }
};

// Sorts one column whose keys lie where its values shall. `a` and `b` hold n records each.
template <int kBits>
int64_t sort_column(int64_t n, uint32_t* keys_and_values, uint32_t* order, uint64_t* a,
                    uint64_t* b) {
  using D = Digits<kBits>;
  uint32_t place[D::kCount][D::kValues];
  std::memset(place, 0, sizeof place);
  for (int64_t i = 0; i < n; i++)
    for (int d = 0; d < D::kCount; d++) place[d][D::at(keys_and_values[i], d)]++;
  for (int64_t i = 0; i < n; i++) a[i] = uint64_t(keys_and_values[i]) << 32 | uint64_t(i);
  for (int d = 0; d < D::kCount; d++) {
    uint32_t* p = place[d];
    if (p[D::at(keys_and_values[0], d)] == n) continue;  // all the same
    uint32_t sum = 0;
    for (int i = 0; i < D::kValues; i++) {
      const uint32_t count = p[i];
      p[i] = sum, sum += count;
    }
    for (int64_t i = 0; i < n; i++) b[p[D::at(uint32_t(a[i] >> 32), d)]++] = a[i];
    std::swap(a, b);
  }
  auto* values = reinterpret_cast<float*>(keys_and_values);
  int64_t missing = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t key = uint32_t(a[i] >> 32);
    missing += key == 0xffffffffu;
    const float value = value_of(key);
    std::memcpy(values + i, &value, 4);
    order[i] = uint32_t(a[i]);
  }
  return missing;
}

// Numbers of the different keys of a column, in the order in which they are met.
class FewKeys {
 public:
  FewKeys() { std::memset(number_, kNone, sizeof number_); }
  // kMostFewValues when there are too many.
  int number(uint32_t key) {
    for (uint32_t at = key * 0x9e3779b1u >> 25;; at = (at + 1) & 127) {
      const int found = number_[at];
      if (found == kNone) {
        if (count_ == kMostFewValues) return kMostFewValues;
        key_[at] = key, number_[at] = uint8_t(count_);
        keys_[count_] = key;
        return count_++;
      }
      if (key_[at] == key) return found;
    }
  }
  int count() const { return count_; }
  uint32_t key(int number) const { return keys_[number]; }

 private:
  static constexpr int kNone = 255;
  uint32_t key_[128], keys_[kMostFewValues];
  uint8_t number_[128];
  int count_ = 0;
};

// Whether some rows of a column have few values.
bool looks_few(const FloatMatrix& x, int64_t column) {
  constexpr int64_t kSome = 4 * kMostFewValues;
  const int64_t some = std::min(x.rows, kSome);
  const float* of = x.data + column * x.column_stride;
  FewKeys keys;
  for (int64_t i = 0; i < some; i++) {
    const float value = of[i * x.rows / some * x.row_stride];
    if (value != value || keys.number(key_of(value)) == kMostFewValues) return false;
  }
  return true;
}

// Sorts a column of few values by counting: their number, or 0 and nothing is done where they are
// too many, too near to each other, or missing.
int sort_few(int64_t n, uint32_t* keys_and_values, uint32_t* order, uint8_t* codes, float* few) {
  FewKeys keys;
  uint32_t counts[kMostFewValues] = {};
  for (int64_t i = 0; i < n; i++) {
    const int number = keys.number(keys_and_values[i]);
    if (number == kMostFewValues) return 0;
    codes[i] = uint8_t(number);
    counts[number]++;
  }
  int by_key[kMostFewValues];
  for (int i = 0; i < keys.count(); i++) by_key[i] = i;
  std::sort(by_key, by_key + keys.count(), [&](int a, int b) { return keys.key(a) < keys.key(b); });
  for (int i = 0; i < keys.count(); i++) {
    few[i] = value_of(keys.key(by_key[i]));
    if (few[i] != few[i] || (i && !(few[i] > few[i - 1] + kFeatureThreshold))) return 0;
  }
  auto* values = reinterpret_cast<float*>(keys_and_values);
  uint8_t code_of[kMostFewValues];
  uint32_t place[kMostFewValues], sum = 0;
  for (int i = 0; i < keys.count(); i++) {
    const uint32_t count = counts[by_key[i]];
    code_of[by_key[i]] = uint8_t(i), place[i] = sum;
    std::fill(values + sum, values + sum + count, few[i]);
    sum += count;
  }
  for (int64_t i = 0; i < n; i++) {
    const uint8_t code = code_of[codes[i]];
    codes[i] = code;
    order[place[code]++] = uint32_t(i);
  }
  return keys.count();
}

}  // namespace

int threads_worth(double elements, double picoseconds, int most) {
  constexpr double kWorthAThread = 20e6;
  return int(std::clamp<double>(elements * picoseconds / kWorthAThread, 1, most));
}

Presort::Presort(const FloatMatrix& x, int threads)
    : rows(x.rows), columns(x.columns), missing(size_t(x.columns)) {
  few.counts.resize(size_t(columns));
  few.codes.resize(size_t(columns));
  const int64_t all = rows * columns;
  memory = Memory(size_t(all) * 8);
  values = memory.as<float>();
  order = reinterpret_cast<uint32_t*>(values + all);
  if (!all) return;
  auto* keys = reinterpret_cast<uint32_t*>(values);
  threads = std::min<int>(threads_worth(double(all), 10000, threads), int(columns));
  constexpr int64_t kTogether = 16;  // columns in a cache line
  const int64_t group =
      x.row_stride == 1 ? 1 : std::clamp<int64_t>(columns / threads, 1, kTogether);
  std::vector<int64_t> codes_at(size_t(columns), -1);
  few.stride = (rows + 3 + 63) / 64 * 64;
  int64_t looking = 0;
  for (int64_t f = 0; f < columns; f++)
    if (looks_few(x, f)) codes_at[size_t(f)] = few.stride * looking++;
  if (looking) {
    few.memory = Memory(size_t(few.stride * looking));
    few.values.resize(size_t(columns * kMostFewValues));
  }
  const Memory records(size_t(rows) * 16 * size_t(threads));
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int thread, int) {
    uint64_t* a = records.as<uint64_t>() + thread * rows * 2;
    for (int64_t f; (f = next.fetch_add(group)) < columns;) {
      const int64_t last = std::min(columns, f + group);
      transpose_keys(x, f, last, keys);
      for (int64_t c = f; c < last; c++) {
        uint32_t *of = keys + c * rows, *to = order + c * rows;
        if (codes_at[size_t(c)] >= 0) {
          uint8_t* codes = few.memory.as<uint8_t>() + codes_at[size_t(c)];
          std::memset(codes + rows, 0, size_t(few.stride - rows));
          few.counts[size_t(c)] =
              sort_few(rows, of, to, codes, few.values.data() + c * kMostFewValues);
          few.codes[size_t(c)] = codes;
          if (few.counts[size_t(c)]) continue;
        }
        missing[size_t(c)] =
            (rows < 8192 ? sort_column<8> : sort_column<11>)(rows, of, to, a, a + rows);
      }
    }
  });
  few.all = std::all_of(few.counts.begin(), few.counts.end(), [](int count) { return count > 0; });
}

const Presort::Ranks& Presort::ranks(int threads) const {
  std::call_once(ranked_, [&] {
    const int64_t all = rows * columns;
    const bool both = all < int64_t(1) << 27;
    Ranks r;
    r.memory = Memory(size_t(all) * (both ? 12 : 4));
    Entry* by_row = both ? r.memory.as<Entry>() : nullptr;
    uint32_t* by_column =
        both ? reinterpret_cast<uint32_t*>(by_row + all) : r.memory.as<uint32_t>();
    r.by_column = by_column, r.by_row = by_row;
    const int most = int(std::max<int64_t>(columns, 1));
    threads = std::min<int>(threads_worth(double(all), 4000, threads), most);
    std::atomic<int64_t> next{0}, next_block{0};
    constexpr int64_t kBlock = 64;
    parallel(threads, [&](int, int) {
      for (int64_t f; (f = next.fetch_add(1)) < columns;) {
        const uint32_t* of = order + f * rows;
        uint32_t* to = by_column + f * rows;
        for (int64_t i = 0; i < rows; i++) to[of[i]] = uint32_t(i);
      }
    });
    if (both)
      parallel(threads, [&](int, int) {
        for (int64_t block; (block = next_block.fetch_add(kBlock)) < rows;)
          for (int64_t f = 0; f < columns; f++)
            for (int64_t i = block; i < std::min(rows, block + kBlock); i++) {
              const uint32_t rank = by_column[f * rows + i];
              by_row[i * columns + f] = {rank, values[f * rows + rank]};
            }
      });
    ranks_ = std::move(r);
  });
  return ranks_;
}

}  // namespace fastnn
