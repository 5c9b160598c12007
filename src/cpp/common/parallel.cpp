#include "common/parallel.hpp"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <thread>

namespace fastnn {

namespace {
// libgomp keeps a thread's pool in that thread's local storage. The threads of the pool do not
// survive a fork, but the record of them does, and a region started on it in the child waits for
// ever. A thread born after the fork has no such record: there, regions are started from one.
std::atomic<bool> forked{false};
const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

void region(int threads, void (*body)(void*, int, int), void* context) {
#pragma omp parallel num_threads(threads)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}
}  // namespace

int max_threads() {
  (void)fork_handler;
  return omp_in_parallel() ? 1 : omp_get_max_threads();
}

void run_on_threads(int threads, void (*body)(void*, int, int), void* context) {
  if (forked.load(std::memory_order_relaxed)) {
    std::thread([=] { region(threads, body, context); }).join();
    return;
  }
  region(threads, body, context);
}

void barrier() {
#pragma omp barrier
}

}  // namespace fastnn
