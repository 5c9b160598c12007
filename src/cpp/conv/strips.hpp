// The patches of an image as the rows of a matrix, read where they lie: in an image whose channels
// are neighbours, what neighbouring taps of a row see of it are neighbours too.
#pragma once
#include "conv/patches.hpp"

namespace fastnn {

// Rows (n, o), columns (t, c), with c up to `padded_channels`. Lines are rows of positions; a
// strip's input is copied with the zeros around it and its channels innermost, unless it lies so
// already.
class PatchStrips final : public StripSource {
 public:
  // Whether a tile reads some rows of a line at once, or sums over them one by one.
  enum class Lines { together, summed };
  // Channels are padded with zeros to a multiple of `step`.
  PatchStrips(const Patches& p, int64_t step, Lines lines = Lines::together);
  // Whether it is faster than PatchColumns, where the product has so many filters; `packed`: before
  // this call.
  static bool pays(const Patches& p, int64_t filters, bool batch_invariant, bool packed = false);
  // The same where lines are summed, against PatchRows.
  static bool pays_summed(const Patches& p, int64_t filters);
  static int64_t padded_channels(const Patches& p, int64_t step) {
    return (p.channels + step - 1) / step * step;
  }
  int64_t bytes(int64_t count) const override;
  const char* fill(char* memory, int64_t first, int64_t count) const override;

 private:
  int64_t input_rows(int64_t count) const;
  void copy_row(char* to, const char* from) const;

  const Patches& p_;
  int64_t lowest_[kSpatial];           // what the first position sees at least
  int64_t padded_;                     // channels
  int64_t columns_, pixel_, row_ = 0;  // of a strip: pixels of a row; elements to the next of each
  bool in_place_;
};

}  // namespace fastnn
