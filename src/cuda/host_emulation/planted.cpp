// Kernels with planted bugs, each of which the emulation must find, beside the same kernel without
// it: `planted NAME` prints what was found and exits with 1, or prints "right" and exits with 0.
// tests/cuda/test_emulation.py runs them all.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/host_emulation/planted.hpp"
#include "cuda/ptx.cuh"

using namespace fastnn;

namespace {

constexpr int kThreads = 64, kElements = 64;
enum Bug {
  kNone,
  kNoBarrier,
  kNoWait,
  kRefillTooSoon,
  kOverrunShared,
  kOverrunStatic,
  kOverrunGlobal,
  kWrongMask,
  kDivergentBarrier,
  kDivergentWarp,
  kDeadlock,
  kMisaligned
};

// Each thread's element, and its neighbour's from another warp, through shared memory.
void neighbours(const float* in, float* out, Bug bug) {
  auto* shared = dynamic_shared<float>();
  const int i = int(threadIdx.x);
  shared[bug == kOverrunShared ? i + 1 : i] = in[i];
  if (bug == kDivergentBarrier) {
    if (i < 32)
      __syncthreads();
    else
      __syncthreads();
  } else if (bug == kDeadlock) {
    if (i >= 32)
      fastnn::emulation::barrier(1, 64, false, "bar.sync 1", std::source_location::current());
  } else if (bug != kNoBarrier) {
    __syncthreads();
  }
  out[bug == kOverrunGlobal ? i + 1 : i] = shared[(i + 40) % kThreads] + shared[i];
}

void totals(const float* in, float* out, Bug bug) {
  FASTNN_SHARED(float, sums, [2]);
  const int i = int(threadIdx.x);
  float x = in[i];
  if (bug == kDivergentWarp && i % 2)
    x += __shfl_xor_sync(~0u, x, 16);
  else
    x += __shfl_xor_sync(bug == kWrongMask ? 0xFFFFu : ~0u, x, 16);
  for (int distance = 8; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  if (i % 32 == 0) sums[i / 32 + (bug == kOverrunStatic)] = x;
  __syncthreads();
  out[i] = sums[0] + sums[1];
}

// Two stages of copies that end later.
void staged(const float* in, float* out, Bug bug) {
  auto* shared = dynamic_shared<float>();
  const int i = int(threadIdx.x);
  float sum = 0;
  ptx::cp_async<4>(shared + i, in + i);
  ptx::cp_async_commit();
  for (int step = 0; step < 4; step++) {
    if (bug == kNoWait)
      ptx::cp_async_wait<1>();
    else
      ptx::cp_async_wait<0>();
    __syncthreads();
    const int next = (step + 1) % 2;
    if (step < 3) {
      // Into the stage that is being read, instead of the other.
      float* to = shared + (bug == kRefillTooSoon ? 1 - next : next) * kThreads + i;
      ptx::cp_async<4>(
          bug == kMisaligned ? reinterpret_cast<float*>(reinterpret_cast<char*>(to) + 2) : to,
          in + (step + 1) * kThreads + i);
    }
    ptx::cp_async_commit();
    sum += shared[step % 2 * kThreads + (i + 33) % kThreads];
    if (bug == kRefillTooSoon) __syncthreads();
  }
  out[i] = sum;
}

struct Example {
  void (*kernel)(const float*, float*, Bug);
  size_t shared;
  Bug bug;
};

const std::map<std::string, Example> kExamples = {
    {"neighbours", {neighbours, kThreads * 4, kNone}},
    {"totals", {totals, 0, kNone}},
    {"staged", {staged, 2 * kThreads * 4, kNone}},
    {"no-barrier", {neighbours, kThreads * 4, kNoBarrier}},
    {"overrun-shared", {neighbours, kThreads * 4, kOverrunShared}},
    {"overrun-static", {totals, 0, kOverrunStatic}},
    {"overrun-global", {neighbours, kThreads * 4, kOverrunGlobal}},
    {"divergent-barrier", {neighbours, kThreads * 4, kDivergentBarrier}},
    {"deadlock", {neighbours, kThreads * 4, kDeadlock}},
    {"wrong-mask", {totals, 0, kWrongMask}},
    {"divergent-warp", {totals, 0, kDivergentWarp}},
    {"no-wait", {staged, 2 * kThreads * 4, kNoWait}},
    {"refill-too-soon", {staged, 2 * kThreads * 4, kRefillTooSoon}},
    {"misaligned", {staged, 2 * kThreads * 4, kMisaligned}},
};

float expected(const Example& e, const std::vector<float>& in, int i) {
  float sum = 0;
  if (e.kernel == neighbours) return in[(i + 40) % kThreads] + in[i];
  if (e.kernel == totals) {
    for (int j = 0; j < kThreads; j++) sum += in[j];
    return sum;
  }
  for (int step = 0; step < 4; step++) sum += in[step * kThreads + (i + 33) % kThreads];
  return sum;
}

std::string run(const Example& example) {
  std::vector<float> in(4 * kElements), out(kElements);
  for (size_t i = 0; i < in.size(); i++) in[i] = float(i % 37);
  launch(example.kernel, dim3(1), dim3(kThreads), example.shared, nullptr,
         static_cast<const float*>(in.data()), out.data(), example.bug);
  for (int i = 0; i < kThreads; i++)
    if (!(out[i] == expected(example, in, i)))  // NaN is wrong, too
      return planted::wrong_result(i, out[i], expected(example, in, i));
  return "";
}

}  // namespace

std::string planted::wrong_result(int element, float is, float expected) {
  char text[100];
  std::snprintf(text, sizeof text, "wrong result: element %d is %g instead of %g", element, is,
                expected);
  return text;
}

int main(int argc, char** argv) {
  std::map<std::string, std::function<std::string()>> all = planted::kSm90;
  for (const auto& [name, example] : kExamples)
    all[name] = [&example = example] { return run(example); };
  const auto found = all.find(argc == 2 ? argv[1] : "");
  if (found == all.end()) {
    for (const auto& [name, run] : all) std::printf("%s\n", name.c_str());
    return 2;
  }
  for (int seed = 0; seed < 4; seed++) {
    emulation::set_seed(uint64_t(seed));
    try {
      const std::string wrong = found->second();
      if (wrong.empty()) continue;
      std::printf("%s\n", wrong.c_str());
    } catch (const emulation::Fault& fault) {
      std::printf("%s\n", fault.what());
    }
    return 1;
  }
  std::printf("right\n");
  return 0;
}
