#include "cuda/device.hpp"

#include "cuda/device.cuh"

namespace fastnn::cuda {

#ifdef __CUDACC__

OnDevice::OnDevice(int device) {
  int current;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  before_ = current;
}
OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}
int devices() {
  int count = 0;
  // Without a driver, or without a device, this is an error.
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}
bool emulated() { return false; }

#else

OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() = default;
int devices() { return 1; }
bool emulated() { return true; }

#endif

}  // namespace fastnn::cuda
