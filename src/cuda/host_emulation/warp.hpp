// What the lanes of a warp do together: shuffles, votes, matches, sums; and atomics.
#pragma once
#include "cuda/host_emulation/block.hpp"

namespace fastnn::emulation {

// The lane whose value a lane of a shuffle takes, or the lane itself where that lies outside of its
// segment of `width` lanes.
struct Source {
  enum Kind { kIndex, kUp, kDown, kXor } kind;
  int operand, width;
  int of(int lane) const {
    const int first = lane & ~(width - 1), last = first + width - 1;
    int from = lane;
    switch (kind) {
      case kIndex:
        return first + (operand & (width - 1));
      case kUp:
        from = lane - operand;
        return from < first ? lane : from;
      case kDown:
        from = lane + operand;
        return from > last ? lane : from;
      default:
        from = lane ^ operand;
        return from > last ? lane : from;
    }
  }
};

template <class T>
struct Shuffled {
  T value;
  Source source;
};

template <class T>
T shuffle(unsigned mask, T value, Source source, const char* name, const Where& where) {
  if (source.width < 1 || source.width > 32 || (source.width & (source.width - 1)))
    fault(where, std::string(name) + ": a width of " + std::to_string(source.width));
  const Shuffled<T> mine{value, source};
  T result;
  collective(
      mask, &mine, &result,
      [](Lanes& lanes) {
        for (int lane = 0; lane < 32; lane++)
          if (lanes.mask >> lane & 1) {
            const auto* own = static_cast<const Shuffled<T>*>(lanes.value[lane]);
            const int from = own->source.of(lane);
            auto* to = static_cast<T*>(lanes.result[lane]);
            // The value of a lane that does not take part is undefined.
            if (lanes.mask >> from & 1)
              *to = static_cast<const Shuffled<T>*>(lanes.value[from])->value;
            else
              poison(to, sizeof(T));
          }
      },
      name, where);
  return result;
}

template <class In, class Out, class Combine>
Out reduce(unsigned mask, In value, const char* name, const Where& where) {
  Out result;
  collective(
      mask, &value, &result,
      [](Lanes& lanes) {
        for (int lane = 0; lane < 32; lane++)
          if (lanes.mask >> lane & 1)
            *static_cast<Out*>(lanes.result[lane]) = Combine::of(lanes, lane);
      },
      name, where);
  return result;
}

template <class T>
T value_of(const Lanes& lanes, int lane) {
  return *static_cast<const T*>(lanes.value[lane]);
}

struct Ballot {
  static unsigned of(const Lanes& lanes, int) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++)
      if ((lanes.mask >> lane & 1) && value_of<int>(lanes, lane)) bits |= 1u << lane;
    return bits;
  }
};
template <class T>
struct Match {
  static unsigned of(const Lanes& lanes, int mine) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++)
      if ((lanes.mask >> lane & 1) && !std::memcmp(lanes.value[lane], lanes.value[mine], sizeof(T)))
        bits |= 1u << lane;
    return bits;
  }
};
template <class T, class Two>
struct Fold {
  static T of(const Lanes& lanes, int) {
    T sum{};
    bool first = true;
    for (int lane = 0; lane < 32; lane++)
      if (lanes.mask >> lane & 1) {
        sum = first ? value_of<T>(lanes, lane) : Two::of(sum, value_of<T>(lanes, lane));
        first = false;
      }
    return sum;
  }
};
#define FASTNN_TWO(name, expression) \
  struct name {                      \
    template <class T>               \
    static T of(T a, T b) {          \
      return expression;             \
    }                                \
  };
FASTNN_TWO(Sum, T(a + b))
FASTNN_TWO(Min, b < a ? b : a)
FASTNN_TWO(Max, a < b ? b : a)
FASTNN_TWO(And, T(a& b))
FASTNN_TWO(Or, T(a | b))
FASTNN_TWO(Xor, T(a ^ b))
#undef FASTNN_TWO

}  // namespace fastnn::emulation

#define FASTNN_HERE fastnn::emulation::Where where = fastnn::emulation::Where::current()

#define FASTNN_SHUFFLE(name, kind, operand_type)                                            \
  template <class T>                                                                        \
  T name(unsigned mask, T value, operand_type operand, int width = 32, FASTNN_HERE) {       \
    return fastnn::emulation::shuffle(                                                      \
        mask, value, {fastnn::emulation::Source::kind, int(operand), width}, #name, where); \
  }
FASTNN_SHUFFLE(__shfl_sync, kIndex, int)
FASTNN_SHUFFLE(__shfl_up_sync, kUp, unsigned)
FASTNN_SHUFFLE(__shfl_down_sync, kDown, unsigned)
FASTNN_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef FASTNN_SHUFFLE

#define FASTNN_REDUCE(name, Two)                                                                \
  template <class T>                                                                            \
  T name(unsigned mask, T value, FASTNN_HERE) {                                                 \
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, #name " is of 32-bit integers");     \
    return fastnn::emulation::reduce<T, T, fastnn::emulation::Fold<T, fastnn::emulation::Two>>( \
        mask, value, #name, where);                                                             \
  }
FASTNN_REDUCE(__reduce_add_sync, Sum)
FASTNN_REDUCE(__reduce_min_sync, Min)
FASTNN_REDUCE(__reduce_max_sync, Max)
FASTNN_REDUCE(__reduce_and_sync, And)
FASTNN_REDUCE(__reduce_or_sync, Or)
FASTNN_REDUCE(__reduce_xor_sync, Xor)
#undef FASTNN_REDUCE

inline unsigned __ballot_sync(unsigned mask, int vote, FASTNN_HERE) {
  return fastnn::emulation::reduce<int, unsigned, fastnn::emulation::Ballot>(
      mask, vote, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int vote, FASTNN_HERE) {
  return __ballot_sync(mask, vote, where) != 0;
}
inline int __all_sync(unsigned mask, int vote, FASTNN_HERE) {
  return __ballot_sync(mask, vote, where) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, FASTNN_HERE) {
  return fastnn::emulation::reduce<T, unsigned, fastnn::emulation::Match<T>>(
      mask, value, "__match_any_sync", where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FASTNN_HERE) {
  fastnn::emulation::reduce<int, unsigned, fastnn::emulation::Ballot>(mask, 1, "__syncwarp", where);
}

// ---- atomics: threads of one run never run at the same time ------------------------------------

#define FASTNN_ATOMIC(name, T, expression) \
  inline T name(T* at, T value) {          \
    const T old = *at;                     \
    *at = (expression);                    \
    return old;                            \
  }
#define FASTNN_INTEGER_ATOMICS(T)                        \
  FASTNN_ATOMIC(atomicAdd, T, old + value)               \
  FASTNN_ATOMIC(atomicMin, T, value < old ? value : old) \
  FASTNN_ATOMIC(atomicMax, T, old < value ? value : old) \
  FASTNN_ATOMIC(atomicAnd, T, old& value)                \
  FASTNN_ATOMIC(atomicOr, T, old | value)                \
  FASTNN_ATOMIC(atomicXor, T, old ^ value)               \
  FASTNN_ATOMIC(atomicExch, T, value)                    \
  inline T atomicCAS(T* at, T compare, T value) {        \
    const T old = *at;                                   \
    if (old == compare) *at = value;                     \
    return old;                                          \
  }
FASTNN_INTEGER_ATOMICS(int)
FASTNN_INTEGER_ATOMICS(unsigned)
using fastnn_u64 = unsigned long long;
FASTNN_INTEGER_ATOMICS(fastnn_u64)
FASTNN_ATOMIC(atomicAdd, float, old + value)
FASTNN_ATOMIC(atomicAdd, double, old + value)
FASTNN_ATOMIC(atomicExch, float, value)
FASTNN_ATOMIC(atomicSub, int, old - value)
FASTNN_ATOMIC(atomicSub, unsigned, old - value)
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}
inline unsigned atomicDec(unsigned* at, unsigned last) {
  const unsigned old = *at;
  *at = old == 0 || old > last ? last : old - 1;
  return old;
}
#undef FASTNN_INTEGER_ATOMICS
#undef FASTNN_ATOMIC
#undef FASTNN_HERE
