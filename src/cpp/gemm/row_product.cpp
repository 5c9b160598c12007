#include "gemm/row_product.hpp"

#include "gemm/prepared.hpp"

namespace fastnn {

RowProduct::RowProduct(const Kernel& kernel, const Matrix& b, int64_t k, int64_t n,
                       Prepared& prepared, int threads, const StripSource* strips)
    : kernel_(kernel), n_(n), b_(layout_b(kernel, k, n)), run_(strips ? strips->run : 0) {
  b_.kc = even_blocks(kernel, k);
  if (strips)
    for (const int64_t at : strips->runs) runs_.push_back(at * int64_t(dtype_size(kernel.a)));
  packed_ = prepared.get("rows", &kernel, 0, 0, size_t(b_.total()), [&](char* to) {
    Prepared::want(b.data, k * n);
    parallel(threads, [&](int thread, int came) {
      pack(kernel.pack_b, nullptr, kernel.k_word, b_, to, b, b.cs, b.rs, n, thread, came);
    });
  });
}

int64_t RowProduct::sums_bytes(int64_t m) const {
  return Sums(kernel_, b_.blocks(), b_.kc, ceil_div(m, kernel_.mr)).bytes(kernel_);
}

void RowProduct::run(const Store& to, const Rows& r, int64_t q0, int64_t q1, char* memory) const {
  const int64_t size = dtype_size(kernel_.a), blocks = b_.blocks();
  const int64_t tiles_down = ceil_div(r.count, kernel_.mr);
  Source a{};
  a.packed = false;
  a.layout = layout_a(kernel_, r.count, b_.k);
  a.layout.lanes = panel_rows(r.count);  // even panels rather than a thin last one
  a.lane = r.row * size, a.word = kernel_.k_word * size;
  const Sums sums(kernel_, blocks, b_.kc, tiles_down * r.lines);
  const int64_t b_word = int64_t(kernel_.nr) * kernel_.b_bytes * kernel_.k_word;
  Tiles tiles(kernel_, to, a, sums, memory, r.count, n_, 0, 0);
  if (run_) tiles.runs(int64_t(runs_.size()), runs_.data());
  for (int64_t q = q0; q < q1; q++)
    for (int64_t block = 0; block < blocks; block++) {
      tiles.block(block, (run_ ? run_ : b_.padded(block)) / kernel_.k_word);
      tiles.panel(packed_ + b_.offset(block, q), true, b_word, q);
      // What the next call begins with, too, where it goes on.
      const bool goes_on = block + 1 < blocks || q + 1 < b_.panels;
      Ahead ahead(
          goes_on ? packed_ + (block + 1 < blocks ? b_.offset(block + 1, q) : b_.offset(0, q + 1))
                  : nullptr,
          b_.panel_bytes(block), tiles_down * r.lines);
      for (int64_t line = 0; line < r.lines; line++) {
        tiles.line(line * r.c_line, 0);
        const char* from = r.a + (line * r.line + b_.begin(block)) * size;
        for (int64_t p = 0; p < tiles_down; p++) {
          ahead.step();
          tiles.run(from + p * a.layout.lanes * r.row * size, p, line * tiles_down + p);
        }
      }
    }
}

}  // namespace fastnn
