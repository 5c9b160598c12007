#include "cuda/host_emulation/fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace fastnn::emulation {

// The fiber that runs, and the one that it was switched to from.
static thread_local Fiber* running = nullptr;
static thread_local Fiber* left = nullptr;
static thread_local void (*entry_of_new)() = nullptr;

#ifdef __x86_64__
// Saves what a function must keep, exchanges the stack pointers, and returns on the other stack.
// (swapcontext asks the kernel for the signal mask each time: 300 ns instead of 3.)
extern "C" void fastnn_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl fastnn_emulation_switch
.hidden fastnn_emulation_switch
.type fastnn_emulation_switch, @function
fastnn_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastnn_emulation_switch, .-fastnn_emulation_switch
)");
#endif

void fiber_begins() {
  running->arrived();
  entry_of_new();
  __builtin_trap();  // an entry never returns
}

Fiber::~Fiber() {
#ifndef __x86_64__
  delete static_cast<ucontext_t*>(pointer_);
#endif
  if (stack_) munmap(stack_, kStackBytes);
}

void Fiber::start(void (*entry)()) {
  entry_of_new = entry;
  if (!stack_) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = memory;
    bottom_ = memory, size_ = kStackBytes;
    // The lowest page faults, instead of the neighbour's being overwritten.
    mprotect(memory, 4096, PROT_NONE);
  }
#ifdef __SANITIZE_ADDRESS__
  // What an abandoned thread had marked on it.
  __asan_unpoison_memory_region(static_cast<char*>(stack_) + 4096, kStackBytes - 4096);
  fake_stack_ = nullptr;
#endif
#ifdef __x86_64__
  auto top = reinterpret_cast<uintptr_t>(stack_) + kStackBytes;
  auto** frame = reinterpret_cast<void**>(top - 64);
  for (int i = 0; i < 6; i++) frame[i] = nullptr;
  frame[6] =
      reinterpret_cast<void*>(&fiber_begins);  // its return address lies 8 below a multiple of 16
  frame[7] = nullptr;
  pointer_ = frame;
#else
  if (!pointer_) pointer_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(pointer_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_, context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, &fiber_begins, 0);
#endif
}

void Fiber::arrived() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
  if (left && !left->stack_) left->bottom_ = bottom, left->size_ = size;
#endif
}

void Fiber::switch_to(Fiber& to) {
  left = this;
  running = &to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
#endif
#ifdef __x86_64__
  fastnn_emulation_switch(&pointer_, to.pointer_);
#else
  if (!pointer_) pointer_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(pointer_), static_cast<ucontext_t*>(to.pointer_));
#endif
  arrived();
}

}  // namespace fastnn::emulation
