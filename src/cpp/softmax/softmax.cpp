// All dimensions but the one that is summed over are positions; those that lie densely together
// become one. Either a position's elements are neighbours in the result (rows), or its positions
// are (columns). What is laid out otherwise in an operand goes through a small copy, a few
// positions at a time. No position's result depends on how they are shared out.
#include "softmax/softmax.hpp"

#include <algorithm>

#include "common/caches.hpp"
#include "common/cpu_features.hpp"
#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {
namespace {

const SoftmaxKernels& kernels() {
  switch (active_isa()) {
    case Isa::portable:
      break;
#ifdef FASTNN_HAS_AVX2
    case Isa::avx2:
      return avx2_softmax();
#endif
#ifdef FASTNN_HAS_AVX512
    case Isa::avx512:
    case Isa::amx:
    case Isa::amx_emulated:
      return avx512_softmax();
#endif
    default:
      break;
  }
  return portable_softmax();
}

constexpr int kMost = 3;  // operands, the last of them the result
// Positions that are copied together: a cache line of the smallest type.
constexpr int64_t kCopied = 32;

struct Layout {
  int operands;
  int64_t item;
  char* data[kMost];
  int64_t n, step[kMost];  // along the dimension
  int outer = 0;
  int64_t size[kMaxSoftmaxDims], stride[kMost][kMaxSoftmaxDims];
  int64_t inner = 1, inner_stride[kMost] = {};
  int64_t positions = 1;
  bool columns;
  bool direct[kMost];  // no copy
  bool copies = false;
  int64_t together;  // positions of one call of a kernel
  bool around_caches;
};

Layout make_layout(const SoftmaxCall& call, const SoftmaxOperand* operands, int count) {
  Layout l;
  l.operands = count;
  l.item = int64_t(dtype_size(call.type));
  l.n = call.shape[call.dim];
  int order[kMaxSoftmaxDims], used = 0;
  for (int d = 0; d < call.dims; d++) {
    if (d == call.dim) continue;
    l.positions *= call.shape[d];
    if (call.shape[d] != 1) order[used++] = d;
  }
  for (int o = 0; o < count; o++) {
    l.data[o] = static_cast<char*>(operands[o].data);
    l.step[o] = operands[o].strides[call.dim];
  }
  const int64_t* by = operands[count - 1].strides;
  std::stable_sort(order, order + used, [&](int a, int b) { return by[a] > by[b]; });
  int kept = 0;
  for (int i = 0; i < used; i++) {
    const int d = order[i];
    bool together = kept > 0;
    for (int o = 0; o < count; o++)
      together = together && l.stride[o][kept - 1] == operands[o].strides[d] * call.shape[d];
    if (!together) l.size[kept++] = 1;
    l.size[kept - 1] *= call.shape[d];
    for (int o = 0; o < count; o++) l.stride[o][kept - 1] = operands[o].strides[d];
  }
  if (kept > 0) {
    l.inner = l.size[--kept];
    for (int o = 0; o < count; o++) l.inner_stride[o] = l.stride[o][kept];
  }
  l.outer = kept;
  const int last = count - 1;
  l.columns = l.n > 1 && l.step[last] != 1 && l.inner > 1 && l.inner_stride[last] == 1;
  for (int o = 0; o < count; o++) {
    l.direct[o] = l.columns ? l.inner_stride[o] == 1 : l.n == 1 || l.step[o] == 1;
    l.copies = l.copies || !l.direct[o];
  }
  // What is gone over several times stays in a core's own cache.
  const int64_t in_cache = core_cache_bytes() / 2 / (l.n * l.item * count);
  constexpr int64_t pitch = SoftmaxKernels::kPitch;
  l.together =
      l.columns ? std::clamp<int64_t>(in_cache / pitch * pitch, pitch, SoftmaxKernels::kMostColumns)
                : l.inner;
  if (l.copies) l.together = std::min(l.together, std::clamp<int64_t>(in_cache, 1, kCopied));
  bool in_place = false;
  for (int o = 0; o < last; o++) in_place = in_place || l.data[o] == l.data[last];
  // The result will have left the caches before anyone reads it, and its lines need not be read
  // before they are written.
  l.around_caches = !l.columns && l.direct[last] && !in_place && l.n * l.item >= 512 &&
                    l.positions * l.n * l.item > last_cache_bytes();
  return l;
}

// to[i * to_i + j * to_j] = from[...] of `item` bytes, j along what is nearer in the one that is
// further apart.
template <class T>
void copy(const char* from, int64_t from_i, int64_t from_j, char* to, int64_t to_i, int64_t to_j,
          int64_t ni, int64_t nj) {
  const T* f = reinterpret_cast<const T*>(from);
  T* t = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < ni; i++)
    for (int64_t j = 0; j < nj; j++) t[i * to_i + j * to_j] = f[i * from_i + j * from_j];
}
void copy(int64_t item, const char* from, int64_t from_i, int64_t from_j, char* to, int64_t to_i,
          int64_t to_j, int64_t ni, int64_t nj) {
  (item == 8   ? copy<int64_t>
   : item == 4 ? copy<int32_t>
               : copy<int16_t>)(from, from_i, from_j, to, to_i, to_j, ni, nj);
}

using Family = SoftmaxKernels::Family;

// A kernel on `count` positions, operand o of the first of them at at[o].
void run_block(const Layout& l, const Family& f, bool backward, char* const* at, int64_t count,
               void* work, char* copies) {
  const int last = l.operands - 1;
  char* data[kMost];
  int64_t step[kMost], position[kMost];
  for (int o = 0; o < l.operands; o++) {
    data[o] = at[o], step[o] = l.step[o], position[o] = l.inner_stride[o];
    if (l.direct[o]) continue;
    data[o] = copies + o * l.together * l.n * l.item;
    step[o] = l.columns ? count : 1, position[o] = l.columns ? 1 : l.n;
    if (o < last)
      copy(l.item, at[o], l.step[o], l.inner_stride[o], data[o], step[o], position[o], l.n, count);
  }
  if (l.columns) {
    SoftmaxKernels::Columns k;
    for (int o = 0; o < last; o++) k.x[o] = data[o], k.step[o] = step[o];
    k.out = data[last], k.out_step = step[last], k.columns = count, k.n = l.n, k.work = work;
    (backward ? f.columns_backward : f.columns)(k);
  } else {
    SoftmaxKernels::Rows r;
    for (int o = 0; o < last; o++) r.x[o] = data[o], r.x_row[o] = position[o];
    r.out = data[last], r.out_row = position[last], r.rows = count, r.n = l.n, r.work = work;
    r.around_caches = l.around_caches;
    (backward ? f.rows_backward : f.rows)(r);
  }
  if (!l.direct[last])
    copy(l.item, data[last], step[last], position[last], at[last], l.step[last],
         l.inner_stride[last], l.n, count);
}

void run(const SoftmaxCall& call, const SoftmaxOperand* operands, int count, bool backward) {
  const Layout l = make_layout(call, operands, count);
  const SoftmaxKernels& k = kernels();
  const Family& f = k.family[int(call.type)][call.log];
  // Picoseconds an element, with data in the caches: only to decide on threads.
  const double cost = call.type == DType::f64 ? 3000 : backward ? 400 : 1000;
  constexpr double kWorthAThread = 10e6;  // 10 us: a region costs about 5
  const double elements = double(l.positions) * double(l.n);
  const int threads = int(std::clamp<double>(elements * cost / kWorthAThread, 1, max_threads()));
  const int64_t number = call.type == DType::f64 ? 8 : 4;
  const int64_t wide = l.columns ? round_up(l.together, SoftmaxKernels::kPitch) : 1;
  const int64_t work_bytes = backward ? 0 : round_up(l.n * number * wide, 64);
  const int64_t copies_bytes = l.copies ? round_up(count * l.together * l.n * l.item, 64) : 0;
  char* memory =
      static_cast<char*>(scratch(Scratch::misc, size_t((work_bytes + copies_bytes) * threads)));
  parallel(threads, [&](int thread, int all) {
    char* work = memory + thread * (work_bytes + copies_bytes);
    char* copies = work + work_bytes;
    const int64_t grain = l.columns ? std::min(SoftmaxKernels::kPitch, l.together) : 1;
    Range r = share_of(l.positions, grain, thread, all);
    while (r.begin < r.end) {
      int64_t outer = r.begin / l.inner;
      const int64_t within = r.begin - outer * l.inner;
      const int64_t block = std::min({l.inner - within, r.end - r.begin, l.together});
      char* at[kMost];
      for (int o = 0; o < count; o++) at[o] = l.data[o] + within * l.inner_stride[o] * l.item;
      for (int d = l.outer - 1; d >= 0; d--) {
        for (int o = 0; o < count; o++) at[o] += outer % l.size[d] * l.stride[o][d] * l.item;
        outer /= l.size[d];
      }
      run_block(l, f, backward, at, block, work, copies);
      r.begin += block;
    }
    if (l.around_caches) k.end_stream();
  });
  scratch_trim();
}

}  // namespace

void softmax(const SoftmaxCall& call, SoftmaxOperand x, SoftmaxOperand out) {
  const SoftmaxOperand operands[] = {x, out};
  run(call, operands, 2, false);
}

void softmax_backward(const SoftmaxCall& call, SoftmaxOperand grad, SoftmaxOperand saved,
                      SoftmaxOperand grad_x) {
  const SoftmaxOperand operands[] = {grad, saved, grad_x};
  run(call, operands, 3, true);
}

}  // namespace fastnn
