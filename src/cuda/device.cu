#include "cuda/device.hpp"

#include <algorithm>
#include <atomic>
#include <limits>

#include "cuda/device.cuh"

namespace fastnn::cuda {

static int device_capability();
// In the emulation it is tests that ask for the kernels of later devices.
static std::atomic<int> capability_limit = emulated() ? 80 : std::numeric_limits<int>::max();
int capability() { return std::min(device_capability(), capability_limit.load()); }
int limit_capability(int most) { return capability_limit.exchange(most); }

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
static int attribute(cudaDeviceAttr which) {
  int device, value;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}
static int device_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
         attribute(cudaDevAttrComputeCapabilityMinor);
}
int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
bool emulated() { return false; }

#else

OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() = default;
int devices() { return 1; }
static int device_capability() { return kHopper; }
int multiprocessors() { return 3; }  // few, so that persistent blocks have more than one tile
bool emulated() { return true; }

#endif

}  // namespace fastnn::cuda
