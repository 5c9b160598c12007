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
// Whether the CPU plays the device.
bool emulated();

}  // namespace fastnn::cuda
