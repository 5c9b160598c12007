// How a thread of the depthwise kernels holds neighbouring channels.
#pragma once
#include "cuda/conv/conv.hpp"
#include "cuda/device.cuh"

namespace fastnn::cuda {

template <class T, int count>
struct alignas(sizeof(T) * count) Lanes {
  T lane[count];

  __device__ static __forceinline__ Lanes at(const void* data, int64_t element) {
    return *reinterpret_cast<const Lanes*>(static_cast<const T*>(data) + element);
  }
};

// Of a type, how many channels are 16 bytes.
template <class T>
constexpr int kLanes = 16 / sizeof(T);

// Whether each 16 bytes of t's channels lie together.
inline bool has_lanes(const Tensor5& t, int64_t lanes) {
  bool yes =
      t.stride[1] == 1 && t.size[1] % lanes == 0 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (const int d : {0, 2, 3, 4}) yes = yes && (t.size[d] == 1 || t.stride[d] % lanes == 0);
  return yes;
}

}  // namespace fastnn::cuda
