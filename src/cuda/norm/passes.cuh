// What the passes of batch and group norm hand on to each other, and how they are started.
#pragma once
#include "cuda/norm/layout.cuh"

namespace fastnn::cuda {

// A pass over the operands: to find sums, to write results from what was made of them, or both in
// one where a unit fits the registers of a group of threads.
enum class Stage { sums, results, both };

struct Pass {
  NormLayout layout;
  DType type;
  Stage stage;
  int threads;            // of a group that holds a chunk
  int64_t chunk, chunks;  // elements of a unit, across: rows
  float share;            // see Count
  PerChannel weight, bias;
  int64_t channel_share;  // channels of a group
  Divisor by_channel;     // elements of a unit that belong to one channel
  double *mean, *var, *by_weight, *by_bias;
  double eps;
  bool relu, training;
  Pair* partials;              // of each chunk of each unit
  Coefficients* coefficients;  // of each channel of each image
};

// Of a chunk in planes: elements in the registers of a thread, and the groups of threads there are.
constexpr int kForwardElements = 32, kBackwardElements = 16;
constexpr int kPlaneThreads[] = {32, 256, 512};
constexpr int kAcrossThreads = 256, kAcrossRows = 8;
// Of a row across channels, that a block reads: a power of two up to a warp.
inline int across_lanes(int64_t channels, int64_t item) {
  int lanes = 1;
  while (lanes < 32 && lanes * 16 / item < channels) lanes *= 2;
  return lanes;
}

void planes_forward(const Pass& pass, void* stream);
void planes_backward(const Pass& pass, void* stream);
void across_forward(const Pass& pass, void* stream);
void across_backward(const Pass& pass, void* stream);

}  // namespace fastnn::cuda
