// The patches of an image that a filter sees, as a matrix that lies nowhere: panels of it are
// gathered for the matrix product just before their use.
#pragma once
#include <vector>

#include "conv/conv.hpp"
#include "conv/kernels.hpp"

namespace fastnn {

// One correlation, to which all three products of a convolution come down:
//
//   out[m, n, o] = sum over c, t of w[m, (c, t)] in[n, c, o * step + first + t * delta]
//
// (o, t and the constants in each of the three dimensions), with `in` zero outside of its bounds.
struct Patches {
  const char* data = nullptr;  // of `in`
  int64_t element = 4;         // bytes
  int64_t images = 0, channels = 0;
  int64_t image_stride = 0, channel_stride = 0;
  int64_t size[kSpatial], stride[kSpatial];  // of `in`
  int64_t out[kSpatial], step[kSpatial];     // positions of the filter
  int64_t taps[kSpatial], first[kSpatial], delta[kSpatial];
  // What lies outside, in every byte; 0 but for PatchStrips.
  int outside = 0;
  // Not 0: the elements of a row are sorted by their remainder to step[2], and those of the next
  // remainder are this far from each other. See SplitRows.
  int64_t remainder_stride = 0;
  // Whether the index (c, t) runs over channels fastest.
  bool channels_inner = false;

  int64_t tap_count() const { return taps[0] * taps[1] * taps[2]; }
  int64_t positions() const { return out[0] * out[1] * out[2]; }
  int64_t depth() const { return channels * tap_count(); }
  // Makes one line of all positions of an image where the filter is one element, which sees each,
  // and they are evenly apart. False, and nothing, where it is not so.
  bool join_lines();
};

// A copy of an image of few channels with its rows sorted by the remainder to the filter's step, so
// that what a tap sees of a row of positions are neighbours: a first layer's filter sees each
// element many times, and few channels are no work that gathering could hide behind.
class SplitRows {
 public:
  static bool pays(const Patches& p);
  // `p` reads the copy from here on, which lies in this thread's scratch memory.
  static void apply(Patches& p, int threads);
};

struct Tap {
  int64_t at[kSpatial];
};

// Rows (c, t), columns (n, o).
class PatchColumns final : public PanelSource {
 public:
  explicit PatchColumns(const Patches& p);
  void fill(void* dst, int64_t segment, int64_t k0, int64_t k, int64_t j0, int columns,
            int ld) const override;
  MatrixRows rows(int64_t segment, int64_t k0, int64_t j0, int64_t columns) const override;

 private:
  const Patches& p_;
  const ConvKernels& kernels_;
  std::vector<Tap> taps_;  // where there are few channels: found once, not by division for each row
};

// Rows o, columns (c, t); a segment is an image.
class PatchRows final : public PanelSource {
 public:
  explicit PatchRows(const Patches& p) : p_(p), kernels_(conv_kernels()) {}
  void fill(void* dst, int64_t segment, int64_t k0, int64_t k, int64_t j0, int columns,
            int ld) const override;

 private:
  const Patches& p_;
  const ConvKernels& kernels_;
};

}  // namespace fastnn
