// The kernels of binning and histograms, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "tree/binning.inl"
// After it.
#include "isa/math.hpp"
#include "tree/gradients.inl"
#include "tree/histogram.inl"

namespace fastnn {
const BinningKernels& portable_binning() { return portable::binning_table; }
const HistogramKernels& portable_histogram() { return portable::histogram_table; }
}  // namespace fastnn
