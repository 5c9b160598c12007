// What the bindings ask of the device, without CUDA's headers.
#pragma once

namespace fastnn::cuda {

// The kernels launched in its lifetime run on this device.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// How many devices there are; 0 where there is no driver.
int devices();
// Of the device that is current: its compute capability, 10 times major plus minor, or the limit
// where that is less; and how many multiprocessors it has.
int capability();
int multiprocessors();
constexpr int kHopper = 90;  // wgmma and the copy engine: code for sm_90a runs on this one alone
// Sets the limit, so that one device tests the kernels of earlier ones; returns what it was.
int limit_capability(int most);
// Whether the CPU plays the device.
bool emulated();

}  // namespace fastnn::cuda
