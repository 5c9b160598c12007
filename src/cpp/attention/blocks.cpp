#include "attention/blocks.hpp"

#include <algorithm>
#include <cstring>

#include "common/caches.hpp"
#include "common/integers.hpp"
#include "common/kernels_of.hpp"
#include "common/philox.hpp"

namespace fastnn {

const AttentionKernels& attention_kernels() { return FASTNN_KERNELS_OF(attention); }

namespace attention_parts {

namespace {

// A block of so many keys by a panel of lanes is half of L1.
constexpr int64_t kKeys = 126;

const char* at(const AttentionOperand& x, DType type, int64_t batch, int64_t head, int64_t row) {
  return x.data + (batch * x.strides[0] + head * x.strides[1] + row * x.strides[2]) *
                      int64_t(dtype_size(type));
}

}  // namespace

int64_t Arithmetic::panel_b(int64_t k) const {
  return round_up(k, tiles->k_step) * tiles->nr * tiles->b_bytes;
}

Arithmetic arithmetic_of(DType type, bool exact) {
  Arithmetic a{};
  a.loops = &attention_kernels();
  a.source = a.type = type;
  a.wide = type == DType::f64;
  const bool half = type == DType::bf16 || type == DType::f16;
  const Kernel* found = &tile_kernel(type, exact);
  // Without instructions for its type a half is made float32 once, instead of in every tile.
  const bool hardware_tiles = found->enter != nullptr;
  if (half && !found->direct_a && !hardware_tiles) {
    a.type = DType::f32;
    found = &tile_kernel(DType::f32, true);
  }
  a.tiles = found;
  a.packs = hardware_tiles;
  a.pairs = !a.packs && found->k_word == 2;
  if (a.packs) {
    const Kernel& numbers = numbers_kernel(*found);
    a.pack_numbers = numbers.pack_b, a.pack_numbers_a = numbers.pack_a;
  }
  return a;
}

KeyBlocks::KeyBlocks(const Arithmetic& a, int64_t keys) : length(keys) {
  // Blocks of equal size, of which dropout takes four keys at a time, and some kernels words.
  const int64_t step = std::max<int64_t>(4, a.packs ? a.tiles->k_step : a.tiles->k_word);
  const int64_t near = std::max<int64_t>(1, (keys + kKeys / 2) / kKeys);
  size = std::max<int64_t>(step, round_up(ceil_div(keys, near), step));
  count = ceil_div(keys, size);
}

Panels::Panels(const Arithmetic& a, int64_t lanes)
    : n(lanes), size(a.packs ? a.tiles->mr : ceil_div(lanes, ceil_div(lanes, a.tiles->mr))) {}

static_assert(kKeys * 3 / 2 + 64 <= kMostKeys);

// ---- keys and values ---------------------------------------------------------------------------

int64_t rows_bytes(const Arithmetic& a, const KeyBlocks& blocks, int64_t n) {
  const Kernel& k = *a.tiles;
  if (a.packs)
    return blocks.count * ceil_div(blocks.size, k.mr) * k.mr * round_up(n, k.k_step) * k.a_bytes;
  return blocks.length * round_up(n, k.k_word) * int64_t(dtype_size(a.type));
}

int64_t columns_bytes(const Arithmetic& a, const KeyBlocks& blocks, int64_t n) {
  const Kernel& k = *a.tiles;
  if (a.packs)
    return blocks.count * ceil_div(n, k.mr) * k.mr * round_up(blocks.size, k.k_step) * k.a_bytes;
  return round_up(blocks.length, k.k_word) * n * int64_t(dtype_size(a.type));
}

Side rows_side(const Arithmetic& a, const KeyBlocks& blocks, const AttentionOperand& x,
               int64_t batch, int64_t head, int64_t n, int64_t first, int64_t last, char* memory,
               unsigned& flags) {
  const Kernel& k = *a.tiles;
  const int64_t size = int64_t(dtype_size(a.type)), key0 = blocks.begin(first);
  const int64_t keys = std::min(blocks.begin(last), blocks.length) - key0;
  const int64_t row = x.strides[2], step = x.strides[3];
  const char* from = at(x, a.source, batch, head, key0);
  const Panels panels(a, blocks.size);
  Side side;
  side.first_block = first;
  if (a.packs) {
    side.data = memory;
    side.panel = k.mr * round_up(n, k.k_step) * k.a_bytes;
    side.block = panels.count() * side.panel;
    for (int64_t b = first; b < last; b++)
      for (int64_t p = 0; p * k.mr < blocks.keys(b); p++)
        flags |= k.pack_a(memory + (b - first) * side.block + p * side.panel,
                          at(x, a.source, batch, head, blocks.begin(b) + p * k.mr), row, step,
                          panels.rows(p, blocks.keys(b)), n);
    return side;
  }
  side.word = k.k_word * size;
  if (a.source == a.type && step == 1 && n % k.k_word == 0 &&
      (row == n || !rows_collide(row * size, panels.size))) {
    side.data = from, side.row = row * size;
  } else {
    const int64_t to_row = round_up(n, k.k_word);
    a.loops->copy_rows[int(a.source)][int(a.type)]({from, row, step, memory, to_row, keys, n});
    side.data = memory, side.row = to_row * size;
  }
  side.panel = panels.size * side.row, side.block = blocks.size * side.row;
  return side;
}

Side columns_side(const Arithmetic& a, const KeyBlocks& blocks, const AttentionOperand& x,
                  int64_t batch, int64_t head, int64_t n, int64_t first, int64_t last, char* memory,
                  unsigned& flags) {
  const Kernel& k = *a.tiles;
  const int64_t size = int64_t(dtype_size(a.type)), key0 = blocks.begin(first);
  const int64_t keys = std::min(blocks.begin(last), blocks.length) - key0;
  const int64_t row = x.strides[2], step = x.strides[3];
  const char* from = at(x, a.source, batch, head, key0);
  const Panels panels(a, n);
  Side side;
  side.first_block = first;
  side.data = memory;
  if (a.packs) {
    side.panel = k.mr * round_up(blocks.size, k.k_step) * k.a_bytes;
    side.block = panels.count() * side.panel;
    for (int64_t b = first; b < last; b++)
      for (int64_t p = 0; p < panels.count(); p++)
        flags |= k.pack_a(memory + (b - first) * side.block + p * side.panel,
                          at(x, a.source, batch, head, blocks.begin(b)) +
                              p * k.mr * step * int64_t(dtype_size(a.source)),
                          step, row, panels.rows(p, n), blocks.keys(b));
    return side;
  }
  side.row = k.k_word * size;
  side.panel = panels.size * side.row;
  if (a.pairs) {
    a.loops->pair_rows({from, row, step, memory, n, keys, n});
    side.word = n * side.row;
  } else if (a.source == a.type && step == 1 &&
             (row == n || !rows_collide(row * size, blocks.size))) {
    side.data = from, side.word = row * size;
  } else {
    a.loops->copy_rows[int(a.source)][int(a.type)]({from, row, step, memory, n, keys, n});
    side.word = n * size;
  }
  side.block = blocks.size / k.k_word * side.word;
  return side;
}

// ---- queries -----------------------------------------------------------------------------------

Lanes::Lanes(const Attention& call, const Arithmetic& a, int64_t batch, int64_t kv_head,
             int64_t row)
    : call_(call), a_(a), batch_(batch), head0_(kv_head * (call.heads / call.kv_heads)), row_(row) {
  const int64_t rows = call.heads / call.kv_heads * call.q_length;
  count_ = int(std::min<int64_t>(a.lanes(), rows - row));
  int64_t least = call.q_length, most = 0;
  each_head([&](int, int n, int64_t, int64_t query) {
    least = std::min(least, query), most = std::max(most, query + n - 1);
  });
  first_ = std::max<int64_t>(0, least + call.low);
  last_ = std::min(call.k_length, most + call.high + 1);
  all_from_ = most + call.low, all_to_ = least + call.high + 1;
}

unsigned Lanes::pack(const AttentionOperand& x, int64_t n, char* to, char* rows) const {
  const Kernel& k = *a_.tiles;
  const bool one_head = row_ % call_.q_length + count_ <= call_.q_length;
  if (one_head && a_.source == a_.type) {
    const char* from =
        at(x, a_.source, batch_, head0_ + row_ / call_.q_length, row_ % call_.q_length);
    return k.pack_b(to, from, x.strides[2], x.strides[3], count_, n);
  }
  copy(x, n, rows);
  return k.pack_b(to, rows, n, 1, count_, n);
}

void Lanes::copy(const AttentionOperand& x, int64_t n, char* rows) const {
  const int64_t size = int64_t(dtype_size(a_.type));
  each_head([&](int lane, int count, int64_t head, int64_t query) {
    a_.loops->copy_rows[int(a_.source)][int(a_.type)]({at(x, a_.source, batch_, head, query),
                                                       x.strides[2], x.strides[3],
                                                       rows + lane * n * size, n, count, n});
  });
}

bool Lanes::biased(int64_t begin, int64_t end) const {
  return call_.mask.data || call_.slopes || begin < all_from_ || end > all_to_;
}

void Lanes::bias(int64_t begin, int64_t end, void* to) const {
  alignas(64) char numbers[2][kMostLanes * 8];
  const char* masks[kMostLanes];
  const int lanes = a_.lanes();
  auto set = [&](void* array, int lane, double value) {
    if (a_.wide)
      static_cast<double*>(array)[lane] = value;
    else
      static_cast<float*>(array)[lane] = float(value);
  };
  const int64_t* m = call_.mask.strides;
  const int64_t size = int64_t(dtype_size(call_.mask_type));
  int heads = 0;
  each_head([&](int lane, int count, int64_t head, int64_t query) {
    heads++;
    for (int l = lane; l < lane + count; l++) {
      set(numbers[0], l, double(begin - (query + l - lane)));
      if (call_.slopes)
        set(numbers[1], l, call_.slopes[batch_ * call_.slopes_batch + head * call_.slopes_head]);
      masks[l] = call_.mask.data +
                 (batch_ * m[0] + head * m[1] + (query + l - lane) * m[2] + begin * m[3]) * size;
    }
  });
  for (int l = count_; l < lanes; l++) {  // empty lanes do as the first
    masks[l] = masks[0];
    for (auto& array : numbers) std::memcpy(array + l * a_.number(), array, size_t(a_.number()));
  }
  BiasBlock b{};
  b.bias = to, b.keys = end - begin, b.lanes = lanes;
  if (call_.mask.data) b.mask = masks;
  b.mask_type = call_.mask_type, b.mask_step = m[3];
  b.one_mask = m[2] == 0 && (heads == 1 || m[1] == 0);
  b.distance = numbers[0], b.slope = call_.slopes ? numbers[1] : nullptr;
  b.shift = double(call_.shift);
  b.bounded = begin < all_from_ || end > all_to_;
  b.low = double(call_.low), b.high = double(call_.high);
  a_.loops->bias[a_.wide](b);
}

void Lanes::drop(int64_t begin, int64_t end, void* to) const {
  uint64_t first[kMostLanes] = {};
  const int64_t row = round_up(call_.k_length, 4);
  each_head([&](int lane, int count, int64_t head, int64_t query) {
    for (int l = 0; l < count; l++)
      first[lane + l] =
          uint64_t(((batch_ * call_.heads + head) * call_.q_length + query + l) * row + begin);
  });
  a_.loops->drop[a_.wide]({to, end - begin, a_.lanes(), first, *call_.seed,
                           dropout_threshold(call_.dropout),
                           call_.dropout < 1 ? 1 / (1 - call_.dropout) : 0});
}

void Lanes::store(const void* numbers, int64_t n, const AttentionOperand& to,
                  bool as_numbers) const {
  const DType type = as_numbers ? (a_.wide ? DType::f64 : DType::f32) : a_.source;
  each_head([&](int lane, int count, int64_t head, int64_t query) {
    store_turned(static_cast<const char*>(numbers) + lane * a_.number(), n, count,
                 at(to, type, batch_, head, query), to.strides[3], to.strides[2], type);
  });
}

void Lanes::store_scores(const void* numbers, int64_t key, int64_t keys,
                         const AttentionOperand& to) const {
  const DType type = a_.wide ? DType::f64 : DType::f32;
  each_head([&](int lane, int count, int64_t head, int64_t query) {
    store_turned(static_cast<const char*>(numbers) + lane * a_.number(), keys, count,
                 at(to, type, batch_, head, query) + key * to.strides[3] * a_.number(),
                 to.strides[3], to.strides[2], type);
  });
}

void Lanes::store_turned(const char* numbers, int64_t rows, int count, const char* to,
                         int64_t row_stride, int64_t lane_stride, DType type) const {
  Store s{};
  s.c = const_cast<char*>(to), s.c_rs = row_stride, s.c_cs = lane_stride;
  s.type = type;
  s.plain = true, s.alpha = 1, s.alpha64 = 1;
  constexpr int64_t kRows = 32;
  for (int64_t i = 0; i < rows; i += kRows)
    a_.tiles->store(numbers + i * a_.lanes() * a_.number(), a_.lanes(),
                    int(std::min(kRows, rows - i)), count, s, i, 0);
}

NumbersAsB numbers_as_b(const Arithmetic& a, const void* numbers, int64_t keys, char* to) {
  const int lanes = a.lanes();
  const int64_t words = ceil_div(keys, a.tiles->k_word);
  if (a.pack_numbers) {
    const unsigned flags = a.pack_numbers(to, numbers, 1, lanes, lanes, keys);
    return {to, round_up(keys, a.tiles->k_step) / a.tiles->k_word, flags};
  }
  if (!a.pairs) return {static_cast<const char*>(numbers), words, 0};
  a.loops->pair_keys(static_cast<const float*>(numbers), keys, lanes,
                     reinterpret_cast<uint32_t*>(to));
  return {to, words, 0};
}

}  // namespace attention_parts
}  // namespace fastnn
