// One CUDA thread: a stack of its own, and the switch from one to another.
#pragma once
#include <cstddef>

namespace fastnn::emulation {

// Stacks are mapped once and used again by block after block: a thread of the next block starts at
// the top of what an earlier one left.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Makes it begin with entry(), which never returns, when it is next switched to.
  void start(void (*entry)());
  // Goes on in `to`, where that left off, until something switches back.
  void switch_to(Fiber& to);

 private:
  static constexpr size_t kStackBytes =
#ifdef __SANITIZE_ADDRESS__
      256 << 10;
#else
      64 << 10;
#endif
  void* stack_ = nullptr;  // none: the thread that the host's program runs on
  void* pointer_ = nullptr;
  // What AddressSanitizer asks for where a program changes its stack.
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void arrived();
  friend void fiber_begins();
};

}  // namespace fastnn::emulation
