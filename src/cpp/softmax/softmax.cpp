// Either a position's elements are neighbours in the result (rows), or its positions are (columns):
// see positions.hpp. No position's result depends on how they are shared out.
#include "softmax/softmax.hpp"

#include <algorithm>

#include "common/caches.hpp"
#include "common/integers.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "softmax/positions.hpp"

namespace fastnn {
namespace {

const SoftmaxKernels& kernels() { return FASTNN_KERNELS_OF(softmax); }

void run(const SoftmaxCall& call, const SoftmaxOperand* operands, int count, bool backward) {
  const int64_t item = int64_t(dtype_size(call.type)), items[] = {item, item, item};
  const int last = count - 1;
  const Positions all(call, operands, items, count, last, last);
  const SoftmaxKernels& k = kernels();
  const SoftmaxKernels::Family& f = k.family[int(call.type)][call.log];
  bool in_place = false;
  for (int o = 0; o < last; o++) in_place = in_place || operands[o].data == operands[last].data;
  // The result will have left the caches before anyone reads it, and its lines need not be read
  // before they are written.
  const bool around_caches = !all.columns && all.direct[last] && !in_place && all.n * item >= 512 &&
                             all.count * all.n * item > last_cache_bytes();
  // Picoseconds an element, with data in the caches: only to decide on threads.
  const double cost = call.type == DType::f64 ? 3000 : backward ? 400 : 1000;
  constexpr double kWorthAThread = 10e6;  // 10 us: a region costs about 5
  const double elements = double(all.count) * double(all.n);
  const int threads = int(std::clamp<double>(elements * cost / kWorthAThread, 1, max_threads()));
  const int64_t number = call.type == DType::f64 ? 8 : 4;
  const int64_t wide = all.columns ? round_up(all.together, SoftmaxKernels::kPitch) : 1;
  const int64_t work_bytes = backward ? 0 : round_up(all.n * number * wide, 64);
  const int64_t bytes = work_bytes + all.copies_bytes();
  char* memory = static_cast<char*>(scratch(Scratch::misc, size_t(bytes * threads)));
  parallel(threads, [&](int thread, int of) {
    char* work = memory + thread * bytes;
    const Range r = share_of(all.count, all.grain(), thread, of);
    all.for_each_block(r.begin, r.end, last, work + work_bytes, [&](const Positions::Block& block) {
      if (all.columns) {
        SoftmaxKernels::Columns c;
        for (int o = 0; o < last; o++) c.x[o] = block.data[o], c.step[o] = block.step[o];
        c.out = block.data[last], c.out_step = block.step[last];
        c.columns = block.count, c.n = all.n, c.work = work;
        (backward ? f.columns_backward : f.columns)(c);
      } else {
        SoftmaxKernels::Rows rows;
        for (int o = 0; o < last; o++) rows.x[o] = block.data[o], rows.x_row[o] = block.position[o];
        rows.out = block.data[last], rows.out_row = block.position[last];
        rows.rows = block.count, rows.n = all.n, rows.work = work;
        rows.around_caches = around_caches;
        (backward ? f.rows_backward : f.rows)(rows);
      }
    });
    if (around_caches) k.end_stream();
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
