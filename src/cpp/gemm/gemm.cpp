// Which kernel runs a product, which way round, and on how many threads.
#include "gemm/gemm.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

#include "common/cpu_features.hpp"
#include "common/huge_pages.hpp"
#include "common/parallel.hpp"
#include "gemm/kernel.hpp"

namespace fastnn {

namespace {

// ---- kernels -----------------------------------------------------------------------------------

struct Query {
  DType a, b;
  Precision precision;
  int64_t rows;     // kernels for few rows are taken only for so few
  bool direct_b;    // and only where B can be read in place
  bool exact_only;  // no split products
  bool with_dot = false;
  int64_t channels = 0;  // not 0: only kernels that read so many where they lie, in runs
};

constexpr int kFewZeros = 4;  // channels that may be padded to a multiple of it

const Kernel* find_in(const Kernel* list, const Query& q) {
  for (; list && list->name; list++) {
    if (list->a != q.a || list->b != q.b) continue;
    if ((list->split && q.exact_only) || (q.with_dot && !list->dot)) continue;
    if (q.channels && !(list->direct_a && list->runs &&
                        (list->k_step <= kFewZeros || q.channels % list->k_step == 0)))
      continue;
    if (list->few_rows && !(q.rows <= list->mr && q.direct_b)) continue;
    return list;
  }
  return nullptr;
}

const Kernel* find_kernel(const Query& q) {
  const Isa isa = active_isa();
  const Kernel* found = nullptr;
  auto look = [&](const Kernel* list) { found = found ? found : find_in(list, q); };
#ifdef FASTNN_HAS_AMX
  if (isa == Isa::amx) look(amx_kernels(q.a, q.precision));
#endif
#ifdef FASTNN_HAS_AMX_EMULATED
  if (isa == Isa::amx_emulated) look(amx_emulated_kernels(q.a, q.precision));
#endif
#ifdef FASTNN_HAS_AVX512_DOT
  if (isa >= Isa::avx512 && cpu_features().avx512_bf16 && cpu_features().avx512_vnni)
    look(avx512_dot_kernels(q.a, q.precision));
#endif
#ifdef FASTNN_HAS_AVX512
  if (isa >= Isa::avx512) look(avx512_kernels());
#endif
#ifdef FASTNN_HAS_AVX2
  if (isa >= Isa::avx2) look(avx2_kernels());
#endif
  look(portable_kernels());
  (void)isa;
  return found;
}

// ---- counters ----------------------------------------------------------------------------------

// One slot a kernel name; a call costs one relaxed addition.
struct Counter {
  std::atomic<const char*> name{nullptr};
  std::atomic<int64_t> calls{0};
};
constexpr int kCounters = 256;  // more than there are names on all instruction sets together
Counter counters[kCounters];

}  // namespace

void count_call(const char* name) {
  for (Counter& c : counters) {
    const char* seen = c.name.load(std::memory_order_acquire);
    if (!seen && c.name.compare_exchange_strong(seen, name)) seen = name;
    if (seen == name) {
      c.calls.fetch_add(1, std::memory_order_relaxed);
      return;
    }
  }
}

namespace {

constexpr int64_t kStripsPackedLimit = int64_t(64) << 20;  // bytes of a B packed for strips

// ---- shape -------------------------------------------------------------------------------------

// C^T = B^T A^T: the same numbers with the sides exchanged.
void transpose(Gemm& g) {
  std::swap(g.m, g.n);
  std::swap(g.a, g.b);
  for (Matrix* x : {&g.a, &g.b, &g.c, &g.residual}) std::swap(x->rs, x->cs);
  if (g.bias_axis != BiasAxis::none)
    g.bias_axis = g.bias_axis == BiasAxis::row ? BiasAxis::column : BiasAxis::row;
  std::swap(g.row_scale, g.col_scale);
}

// A batch of A's against one B is one taller A, where the rows go on at the same distance.
void fold_batch(Gemm& g) {
  while (g.batch_dims > 0) {
    const int d = g.batch_dims - 1;
    const bool same_b = g.b.batch[d] == 0, no_row = g.bias_axis != BiasAxis::row && !g.row_scale;
    auto goes_on = [&](const Matrix& x) { return x.batch[d] == x.rs * g.m; };
    if (g.batch[d] != 1 && !(same_b && no_row && goes_on(g.a) && goes_on(g.c) &&
                             (!g.residual.data || goes_on(g.residual))))
      return;
    g.m *= g.batch[d];
    g.batch_dims--;
  }
}

// Threads are worth waking for about 20 microseconds of work.
int threads_for(double flops, double bytes) {
  const double microseconds = flops / 1e5 + bytes / 1.5e4;
  return microseconds < 20 ? 1 : max_threads();
}

bool overlaps(const Gemm& g) { return g.residual.data == g.c.data && g.beta != 0; }

// A product without batches.
void run_one(Gemm g, int threads) {
  const bool swappable = g.a.type == g.b.type && !g.packed;
  constexpr int64_t many = int64_t(1) << 40;
  Query q{g.a.type,
          g.b.type,
          g.precision,
          g.batch_invariant ? many : g.m,
          g.b.cs == 1 && !g.packed,
          g.batch_invariant};
  const Kernel* kn = g.packed ? g.packed->kernel : find_kernel(q);
  if (!kn) throw std::invalid_argument("gemm: no kernel for these types");

  // The small side of a product goes where it costs least. Under batch_invariant the number of
  // rows may not decide.
  if (!g.batch_invariant && swappable) {
    const bool along_k = g.a.cs == 1 && g.b.rs == 1;
    if (along_k && std::min(g.m, g.n) <= 2 * kDotRows && g.k >= 16) {
      if (const Kernel* dot = find_kernel({q.a, q.b, q.precision, many, false, true, true})) {
        if (g.n < g.m) transpose(g);
        count_call(dot->dot_name);
        run_dot(*dot, g, threads);
        return;
      }
    }
    // Splitting an operand costs about as much as 64 rows gain by it.
    if (kn->split && std::min(g.m, g.n) <= 64) {
      q.exact_only = true;
      kn = find_kernel(q);
    }
    const bool rows_in_place = g.m <= 2 * kn->nr && g.b.rs == 1 && g.n > g.m && kn->direct_a;
    const bool columns_first = g.c.rs == 1 && g.c.cs != 1 && g.m > kn->mr;
    if (rows_in_place || columns_first) transpose(g);
    if (rows_in_place || columns_first) {
      q.rows = g.m, q.direct_b = g.b.cs == 1;
      kn = find_kernel(q);
    }
  }
  if (kn->split && overlaps(g) && g.b.data) {
    // A refused split product starts again, so C must not be an input as well.
    q.exact_only = true;
    g.packed = nullptr;
    kn = find_kernel(q);
  }
  count_call(kn->name);
  if (run_blocked(*kn, g, threads)) return;

  if (!g.b.data)
    throw OperandGone(
        "gemm: b_ptr: needed beside `packed` where an operand has an infinity, a NaN or only tiny "
        "values");
  q.exact_only = true;
  Gemm again = g;
  again.packed = nullptr;
  const Kernel* exact = find_kernel(q);
  count_call(exact->name);
  run_blocked(*exact, again, threads);
}

}  // namespace

void gemm(const Gemm& in) {
  Gemm g = in;
  fold_batch(g);
  int64_t batches = 1;
  for (int d = 0; d < g.batch_dims; d++) batches *= g.batch[d];
  if (g.m == 0 || g.n == 0 || batches == 0) return;

  const double flops = 2.0 * g.m * g.n * g.k;
  const double bytes = double(dtype_size(g.a.type)) * (double(g.m) * g.k + double(g.k) * g.n) +
                       double(dtype_size(g.c.type)) * g.m * g.n;
  if (batches == 1) {
    run_one(g, threads_for(flops, bytes));
    return;
  }
  auto item = [&](int64_t index) {
    Gemm one = g;
    for (int d = g.batch_dims - 1; d >= 0; d--) {
      const int64_t i = index % g.batch[d];
      index /= g.batch[d];
      for (Matrix* x : {&one.a, &one.b, &one.c, &one.residual})
        if (x->data) x->data += i * x->batch[d] * int64_t(dtype_size(x->type));
    }
    return one;
  };
  const int threads = threads_for(flops * batches, bytes * batches);
  // Whole products to a thread, unless there are few of them and each is worth sharing.
  if (batches >= 4 * threads || threads_for(flops, bytes) == 1) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
    parallel(threads, [&](int, int) {
      try {
        for (int64_t i; (i = next.fetch_add(1)) < batches;) run_one(item(i), 1);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    });
    if (out_of_memory) throw std::bad_alloc();
  } else {
    for (int64_t i = 0; i < batches; i++) run_one(item(i), threads);
  }
}

const Kernel& integer_kernel(DType a) {
  return *find_kernel({a, DType::s8, Precision::highest, int64_t(1) << 40, false, false});
}

const Kernel& tile_kernel(DType type, bool exact_only) {
  return *find_kernel({type, type, Precision::highest, int64_t(1) << 40, false, exact_only});
}
const Kernel& exact_kernel(DType type) { return tile_kernel(type, true); }

const Kernel& numbers_kernel(const Kernel& kernel) {
  if (kernel.a == DType::f32) return kernel;
  // In as many parts as the kernel's own operands have.
  const Precision parts = kernel.a == DType::bf16 ? Precision::medium : Precision::high;
  return *find_kernel({DType::f32, DType::f32, parts, int64_t(1) << 40, false, false});
}

void gemm_panels(const Gemm& g, int threads) {
  if (g.m == 0 || g.n == 0) return;
  // A split product pays from about as many rows on as in run_one.
  Query q{g.a.type, g.b.type, g.precision, int64_t(1) << 40, false, g.batch_invariant || g.m <= 64};
  const Kernel* kn = find_kernel(q);
  if (!kn) throw std::invalid_argument("gemm: no kernel for these types");
  if (kn->split && overlaps(g)) {
    q.exact_only = true;
    kn = find_kernel(q);
  }
  count_call(kn->name);
  if (run_panels(*kn, g, threads)) return;
  q.exact_only = true;
  const Kernel* exact = find_kernel(q);
  count_call(exact->name);
  run_panels(*exact, g, threads);
}

const Kernel* runs_kernel(DType type, Precision precision, bool exact_only) {
  const Kernel* kn = find_kernel({type, type, precision, int64_t(1) << 40, false, exact_only});
  return kn && kn->finishes ? kn : nullptr;
}
const Kernel* strips_kernel(DType type, Precision precision, bool exact_only) {
  const Kernel* kn = runs_kernel(type, precision, exact_only);
  return kn && kn->direct_a ? kn : nullptr;
}

const Kernel& byte_strips_kernel(int64_t channels) {
  Query q{DType::u8, DType::s8, Precision::highest, int64_t(1) << 40, false, false};
  q.channels = channels;
  return *find_kernel(q);
}

int64_t strips_step(DType type, Precision precision, bool batch_invariant) {
  const Kernel* kn = strips_kernel(type, precision, batch_invariant);
  return kn ? kn->k_step : 0;
}

bool gemm_strips(const Gemm& g, int threads) {
  if (g.m == 0 || g.n == 0) return true;
  const Kernel* kn = strips_kernel(g.a.type, g.precision, g.batch_invariant);
  if (!kn || g.a_strips->run % kn->k_step != 0) return false;
  if (int64_t(packed_b_bytes(*kn, g.k, g.n)) > kStripsPackedLimit) return false;
  count_call(kn->name);
  run_strips(*kn, g, threads);
  return true;
}

bool gemm_strips_transposed(const Gemm& g, int threads) {
  if (g.m == 0 || g.n == 0) return true;
  const Kernel* kn = runs_kernel(g.a.type, g.precision, g.batch_invariant);
  if (!kn) return false;
  count_call(kn->name);
  run_strips_transposed(*kn, g, threads);
  return true;
}

std::unique_ptr<PackedOperand> pack_b(const Matrix& b, int64_t k, int64_t n, Precision precision) {
  const Kernel* kn = find_kernel({b.type == DType::u8 ? DType::s8 : b.type, b.type, precision,
                                  int64_t(1) << 40, false, false});
  if (!kn) throw std::invalid_argument("pack: no kernel for this type");
  auto out = std::make_unique<PackedOperand>();
  out->k = k, out->n = n, out->dtype = b.type, out->precision = precision, out->kernel = kn;
  out->isa = active_isa();
  out->bytes = packed_b_bytes(*kn, k, n);
  constexpr size_t beyond = 4096;  // where the last tiles may look ahead
  out->data = {static_cast<char*>(paged_memory(out->bytes + beyond)), std::free};
  std::atomic<unsigned> flags{0};
  parallel(threads_for(0, double(out->bytes)), [&](int thread, int came) {
    flags |= pack_all_b(*kn, b, k, n, out->data.get(), thread, came);
  });
  out->flags = flags;
  return out;
}

std::string packed_path(const PackedOperand& p) { return p.kernel->name; }

std::string gemm_path(DType ab, Precision precision) {
  const DType a = ab == DType::u8 ? DType::u8 : ab, b = ab == DType::u8 ? DType::s8 : ab;
  const Kernel* kn = find_kernel({a, b, precision, int64_t(1) << 40, false, false});
  return kn ? kn->name : "";
}

std::map<std::string, int64_t> gemm_counters() {
  std::map<std::string, int64_t> out;
  for (Counter& c : counters)
    if (const char* name = c.name.load()) out[name] += c.calls.load();
  return out;
}
void reset_gemm_counters() {
  for (Counter& c : counters) c.calls = 0;
}

double peak_flops(const std::string& kind, int threads, double seconds) {
  PeakFn best = portable_peak;
  [[maybe_unused]] const Isa isa = active_isa();
  [[maybe_unused]] auto prefer = [&](PeakFn f) {
    if (f(kind.c_str(), 0) >= 0) best = f;
  };
#ifdef FASTNN_HAS_AVX2
  if (isa >= Isa::avx2) prefer(avx2_peak);
#endif
#ifdef FASTNN_HAS_AVX512
  if (isa >= Isa::avx512) prefer(avx512_peak);
#endif
#ifdef FASTNN_HAS_AVX512_DOT
  if (isa >= Isa::avx512 && cpu_features().avx512_bf16 && cpu_features().avx512_vnni)
    prefer(avx512_dot_peak);
#endif
#ifdef FASTNN_HAS_AMX
  if (isa == Isa::amx) prefer(amx_peak);
#endif
  if (best(kind.c_str(), 0) < 0)
    throw std::invalid_argument("peak_flops: kind: expected f32, f64, bf16 or int8, got '" + kind +
                                "'");
  std::atomic<double> total{0};
  parallel(std::max(1, threads), [&](int, int) {
    const double rate = timed_rate(best, kind.c_str(), seconds);
    double seen = total.load();
    while (!total.compare_exchange_weak(seen, seen + rate)) {
    }
  });
  return total;
}

}  // namespace fastnn
