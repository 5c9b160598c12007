// Planes (rows that lie together) are worked on row by row. A row of the input is first split into
// phases, the elements that one tap of successive windows reads, so that any stride and padding
// becomes plain vector loads; it is reduced along the width, and what is left of the rows of a
// window then along height and depth. The first of equal maxima in each row and then the first of
// those is the first of all.
#pragma once
#include "pool/rows.inl"

namespace fastnn::FASTNN_TARGET {

// Row `row` of all planes together: where its plane is, and where in it.
struct Place {
  int64_t batch, channel, z, y;
  Place(const PoolPlan& p, int64_t row, int64_t depth, int64_t height) {
    y = row % height;
    row /= height;
    z = row % depth;
    row /= depth;
    channel = row % p.channels;
    batch = row / p.channels;
  }
  int64_t offset(const int64_t* stride) const {
    return batch * stride[0] + channel * stride[1] + z * stride[2] + y * stride[3];
  }
};

template <class T, int mode>
static void forward_planes(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t begin,
                           int64_t end, char* scratch) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  const T* x = reinterpret_cast<const T*>(x_);
  T* out = reinterpret_cast<T*>(out_);
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const int64_t length = p.phase_length, phase_count = p.segments ? 1 : wx.stride;
  Work work{scratch};
  C* phases = work.take<C>(phase_count * length);
  if (p.whole) {
    const C by = p.divisor != 0 ? C(p.divisor) : C(wx.divisor[0]);
    for (int64_t r = begin; r < end; r++) {
      const int64_t n = r / p.channels, c = r % p.channels;
      const C* row = dense_row(x + n * p.x[0] + c * p.x[1], p.x[4], wx.in, phases);
      C value;
      int64_t at;
      reduce_segment<mode, V>(row, wx.in, value, at);
      if constexpr (mode == kSum) value = value / by;
      from_any(out[n * p.out[0] + c * p.out[1]], value);
      if constexpr (mode == kMaxCodes) {
        const int64_t place = n * p.code[0] + c * p.code[1];
        if (p.wide_codes)
          reinterpret_cast<int32_t*>(codes)[place] = int32_t(at);
        else
          reinterpret_cast<uint8_t*>(codes)[place] = uint8_t(at);
      }
    }
    return;
  }
  const int64_t slot_size = mode == kMaxCodes ? 2 * p.row : p.row;
  C* slots = work.take<C>(p.ring_z * p.ring_y * slot_size);
  int64_t* owner = work.take<int64_t>(p.ring_z * p.ring_y);
  const C** rows = work.take<const C*>(p.window_rows);
  C* row_code = work.take<C>(p.window_rows);
  int64_t* offset = work.take<int64_t>(wx.kernel);
  C* first = work.take<C>(p.row);
  C* divisor = work.take<C>(p.row);
  C* result = work.take<C>(p.row);
  C* result_code = work.take<C>(p.row);

  fill(phases, phase_count * length, mode == kSum ? C(0) : C(kLowest));
  fill(owner, p.ring_z * p.ring_y, int64_t(-1));
  fill(first, p.row, C(0));
  fill(divisor, p.row, C(1));
  for (int64_t i = 0; i < wx.out; i++) {
    first[i] = C(wx.first[i]);
    divisor[i] = C(wx.divisor[i]);
  }
  if (!p.segments)
    for (int64_t k = 0; k < wx.kernel; k++)
      offset[k] = k * wx.dilation % wx.stride * length + k * wx.dilation / wx.stride;

  auto reduce_row = [&](const T* from, C* value) __attribute__((always_inline)) {
    C* code = value + p.row;
    if (p.segments) {
      const C* row = dense_row(from, p.x[4], wx.in, phases);
      for (int64_t o = 0; o < wx.out; o++) {
        int64_t at;
        reduce_segment<mode, V>(row + wx.begin[o] + wx.first[o], wx.count[o], value[o], at);
        if constexpr (mode == kMaxCodes) code[o] = C(at + wx.first[o]);
      }
      return;
    }
    split_row(from, p.x[4], wx, length, phases);
    const int count = int(wx.kernel);
    if (count == 2)
      reduce_taps<mode, 2, V>(phases, offset, 2, first, wx.out, value, code);
    else if (count == 3)
      reduce_taps<mode, 3, V>(phases, offset, 3, first, wx.out, value, code);
    else
      reduce_taps<mode, 0, V>(phases, offset, count, first, wx.out, value, code);
  };

  for (int64_t r = begin; r < end; r++) {
    const Place at(p, r, wz.out, wy.out);
    const int64_t plane = at.batch * p.channels + at.channel;
    const T* from = x + at.batch * p.x[0] + at.channel * p.x[1];
    int count = 0;
    for (int64_t i = 0; i < wz.count[at.z]; i++) {
      const int64_t kz = wz.first[at.z] + i, iz = wz.begin[at.z] + kz * wz.dilation;
      for (int64_t j = 0; j < wy.count[at.y]; j++) {
        const int64_t ky = wy.first[at.y] + j, iy = wy.begin[at.y] + ky * wy.dilation;
        const int64_t slot = iz % p.ring_z * p.ring_y + iy % p.ring_y;
        const int64_t id = (plane * wz.in + iz) * wy.in + iy;
        C* value = slots + slot * slot_size;
        if (owner[slot] != id) {
          reduce_row(from + iz * p.x[2] + iy * p.x[3], value);
          owner[slot] = id;
        }
        rows[count] = value;
        row_code[count++] = C((kz * wy.kernel + ky) * wx.kernel);
      }
    }
    T* to = out + at.offset(p.out);
    const int64_t code_place = at.offset(p.code);
    const V by = V::set1(p.divisor != 0 ? C(p.divisor) : C(wz.divisor[at.z] * wy.divisor[at.y]));
    for (int64_t i = 0; i < wx.out; i += V::width) {
      const int lanes = int(wx.out - i < V::width ? wx.out - i : V::width);
      V best = V::load(rows[0] + i), code = V::zero();
      if constexpr (mode == kMaxCodes) code = V::load(rows[0] + p.row + i) + V::set1(row_code[0]);
      for (int k = 1; k < count; k++) {
        V its_code = V::zero();
        if constexpr (mode == kMaxCodes)
          its_code = V::load(rows[k] + p.row + i) + V::set1(row_code[k]);
        take<mode>(best, code, V::load(rows[k] + i), its_code);
      }
      if constexpr (mode == kSum) best = best / (p.divisor != 0 ? by : by * V::load(divisor + i));
      if (p.out[4] == 1)
        store_lanes(to + i, best, lanes);
      else
        best.store(result + i);
      if constexpr (mode == kMaxCodes) {
        if (p.code[4] == 1)
          put_codes(codes, p.wide_codes, code_place + i, code, lanes);
        else
          code.store(result_code + i);
      }
    }
    if (p.out[4] != 1) store_row(result, to, p.out[4], wx.out);
    if (mode == kMaxCodes && p.code[4] != 1) {
      for (int64_t i = 0; i < wx.out; i++) {
        const int64_t place = code_place + i * p.code[4];
        if (p.wide_codes)
          reinterpret_cast<int32_t*>(codes)[place] = int32_t(result_code[i]);
        else
          reinterpret_cast<uint8_t*>(codes)[place] = uint8_t(result_code[i]);
      }
    }
  }
}

// Each element of the gradient gathers from the outputs that read it, in their order, so that the
// sums are those of a scatter in the order of the outputs.
template <class T, bool coded>
static void backward_planes(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t begin,
                            int64_t end, char* scratch) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  T* x = reinterpret_cast<T*>(x_);
  const T* out = reinterpret_cast<const T*>(out_);
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const int64_t length = p.phase_length, phase_count = p.segments ? 1 : wx.stride;
  Work work{scratch};
  C* phases = work.take<C>(phase_count * length);
  if constexpr (!coded) {
    if (p.whole) {
      const C by = p.divisor != 0 ? C(p.divisor) : C(wx.divisor[0]);
      for (int64_t r = begin; r < end; r++) {
        const int64_t n = r / p.channels, c = r % p.channels;
        const C value = wide(out[n * p.out[0] + c * p.out[1]]) / by;
        T* to = x + n * p.x[0] + c * p.x[1];
        if (p.x[4] == 1) {
          const V v = V::set1(value);
          int64_t i = 0;
          for (; i + V::width <= wx.in; i += V::width) v.store(to + i);
          if (i < wx.in) v.store_partial(to + i, int(wx.in - i));
        } else {
          for (int64_t i = 0; i < wx.in; i++) from_any(to[i * p.x[4]], value);
        }
      }
      return;
    }
  }
  const int64_t slot_size = coded ? 2 * p.row : p.row;
  C* slots = work.take<C>(p.ring_z * p.ring_y * slot_size);
  int64_t* owner = work.take<int64_t>(p.ring_z * p.ring_y);
  const C** rows = work.take<const C*>(p.window_rows);
  C* row_code = work.take<C>(p.window_rows);
  int64_t* shift = work.take<int64_t>(wx.kernel);
  C* number = work.take<C>(wx.kernel);
  int64_t* phase_taps = work.take<int64_t>(phase_count + 1);
  C* divisor = work.take<C>(p.row);
  C* sum = work.take<C>(p.row);

  // The padding around the rows: zeros, and codes that no tap has.
  for (int64_t s = 0; s < p.ring_z * p.ring_y; s++) {
    fill(slots + s * slot_size, p.row, C(0));
    if (coded) fill(slots + s * slot_size + p.row, p.row, C(-1));
  }
  fill(owner, p.ring_z * p.ring_y, int64_t(-1));
  fill(sum, p.row, C(0));
  for (int64_t i = 0; i < wx.out; i++) divisor[i] = C(wx.divisor[i]);
  // Taps by phase, the last first: its output is the earliest.
  int64_t taps = 0;
  for (int64_t f = 0; f < phase_count && !p.segments; f++) {
    phase_taps[f] = taps;
    for (int64_t k = wx.kernel - 1; k >= 0; k--) {
      if (k * wx.dilation % wx.stride != f) continue;
      shift[taps] = k * wx.dilation / wx.stride;
      number[taps++] = C(k);
    }
    phase_taps[f + 1] = taps;
  }
  const int64_t places = (wx.in + wx.padding + wx.stride - 1) / wx.stride;

  for (int64_t r = begin; r < end; r++) {
    const Place at(p, r, wz.in, wy.in);
    const int64_t plane = at.batch * p.channels + at.channel;
    const int64_t from = at.batch * p.out[0] + at.channel * p.out[1];
    const int64_t from_code = at.batch * p.code[0] + at.channel * p.code[1];
    int count = 0;
    for (int64_t i = wz.back_begin[at.z]; i < wz.back_begin[at.z + 1]; i++) {
      const PoolTap tz = wz.back[i];
      for (int64_t j = wy.back_begin[at.y]; j < wy.back_begin[at.y + 1]; j++) {
        const PoolTap ty = wy.back[j];
        const int64_t slot = tz.o % p.ring_z * p.ring_y + ty.o % p.ring_y;
        const int64_t id = (plane * wz.out + tz.o) * wy.out + ty.o;
        C* row = slots + slot * slot_size;
        if (owner[slot] != id) {
          owner[slot] = id;
          const T* g = out + from + tz.o * p.out[2] + ty.o * p.out[3];
          C* to = row + p.lead;
          const V by =
              V::set1(p.divisor != 0 ? C(p.divisor) : C(wz.divisor[tz.o] * wy.divisor[ty.o]));
          if (p.out[4] != 1)
            for (int64_t o = 0; o < wx.out; o++) to[o] = wide(g[o * p.out[4]]);
          for (int64_t o = 0; o < wx.out; o += V::width) {
            const int lanes = int(wx.out - o < V::width ? wx.out - o : V::width);
            V v = p.out[4] == 1 ? load_lanes<V>(g + o, lanes) : load_lanes<V>(to + o, lanes);
            if constexpr (!coded)
              v = v / (p.divisor != 0 ? by : by * load_lanes<V>(divisor + o, lanes));
            store_lanes(to + o, v, lanes);
          }
          if constexpr (coded) {
            C* to_code = to + p.row;
            const int64_t place = from_code + tz.o * p.code[2] + ty.o * p.code[3];
            if (p.code[4] != 1)
              for (int64_t o = 0; o < wx.out; o++)
                to_code[o] = C(code_at(codes, p.wide_codes, place + o * p.code[4]));
            else
              for (int64_t o = 0; o < wx.out; o += V::width) {
                const int lanes = int(wx.out - o < V::width ? wx.out - o : V::width);
                store_lanes(to_code + o, get_codes<V>(codes, p.wide_codes, place + o, lanes),
                            lanes);
              }
          }
        }
        rows[count] = row + p.lead;
        row_code[count++] = C((tz.k * wy.kernel + ty.k) * wx.kernel);
      }
    }
    T* to = x + at.offset(p.x);
    if constexpr (!coded) {
      for (int64_t o = 0; o < wx.out; o += V::width) {
        V v = V::zero();
        for (int k = 0; k < count; k++) v = v + V::load(rows[k] + o);
        const int lanes = int(wx.out - o < V::width ? wx.out - o : V::width);
        store_lanes(sum + p.lead + o, v, lanes);
      }
      rows[0] = sum + p.lead;
      if (p.segments) {
        fill(phases, wx.in, C(0));
        for (int64_t o = 0; o < wx.out; o++) {
          C* segment = phases + wx.begin[o] + wx.first[o];
          const C v = rows[0][o];
          for (int64_t i = 0; i < wx.count[o]; i++) segment[i] += v;
        }
        store_row(phases, to, p.x[4], wx.in);
        continue;
      }
      count = 1;
    }
    for (int64_t f = 0; f < phase_count; f++) {
      const int64_t t0 = phase_taps[f], t1 = phase_taps[f + 1];
      C* phase = phases + f * length;
      for (int64_t j = 0; j < places; j += V::width) {
        V v = V::zero();
        for (int k = 0; k < count; k++) {
          for (int64_t t = t0; t < t1; t++) {
            const C* g = rows[k] + j - shift[t];
            if constexpr (coded) {
              const auto hit = eq(V::load(g + p.row), V::set1(row_code[k] + number[t]));
              v = select(hit, v + V::load(g), v);
            } else {
              v = v + V::load(g);
            }
          }
        }
        v.store(phase + j);
      }
    }
    join_row(phases, wx, length, to, p.x[4]);
  }
}

}  // namespace fastnn::FASTNN_TARGET
