// fp32 lanes in the registers of an instruction set.
#pragma once

#include "layout.h"

#include <cstring>
#include <type_traits>

namespace gatepack {

constexpr int kLanes = 16;

#define GATEPACK_INLINED __attribute__((always_inline))
#define GATEPACK_INLINE inline GATEPACK_INLINED

// Vectors of 64, 32 or 16 bytes, one register each: a wider one than the instruction set has is
// taken apart in memory (swiglu of 64 bytes in AVX2: 6 times what 32 take; AMD EPYC).
template <int kBytes>
struct Register;
#define GATEPACK_REGISTER(bytes)                                     \
  template <>                                                        \
  struct Register<bytes> {                                           \
    static constexpr int64_t kLanes = bytes / 4;                     \
    typedef float Floats __attribute__((vector_size(bytes)));        \
    typedef uint32_t Words __attribute__((vector_size(bytes)));      \
    typedef uint16_t Halves __attribute__((vector_size(bytes / 2))); \
  };
GATEPACK_REGISTER(64)
GATEPACK_REGISTER(32)
GATEPACK_REGISTER(16)

template <int kBytes>
using Floats = typename Register<kBytes>::Floats;

// Sixteen lanes, for loops that keep many sums. Every width adds in the same order.
template <int kBytes>
struct Lanes {
  static constexpr int kParts = kLanes / Register<kBytes>::kLanes;
  static constexpr bool kWide = kBytes == 64;  // and then there are 32 registers, else 16
  Floats<kBytes> part[kParts];

  GATEPACK_INLINE void add_product(const Lanes& a, const Lanes& b) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) part[p] += a.part[p] * b.part[p];
  }
  GATEPACK_INLINE void add_product(const Lanes& a, float b) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) part[p] += a.part[p] * b;
  }

  GATEPACK_INLINE float total() const {
    typedef float Four __attribute__((vector_size(16)));
    Four four[4];
    std::memcpy(four, part, sizeof four);
    const Four sums = (four[0] + four[2]) + (four[1] + four[3]);
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  }
};

// Loads and stores as references: a vector by value has another ABI in each instruction set.
template <class V, class T>
GATEPACK_INLINE void load(V& to, const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&to, from, sizeof to);
  } else {
    using R = Register<sizeof(V)>;
    typename R::Halves raw;
    std::memcpy(&raw, from, sizeof raw);
    const typename R::Words bits = __builtin_convertvector(raw, typename R::Words) << 16;
    std::memcpy(&to, &bits, sizeof to);
  }
}
template <int kBytes, class T>
GATEPACK_INLINE void load(Lanes<kBytes>& to, const T* from) {
#pragma GCC unroll 4
  for (int p = 0; p < to.kParts; ++p) load(to.part[p], from + p * Register<kBytes>::kLanes);
}

template <class V>
GATEPACK_INLINE void store(float* to, const V& from) {
  std::memcpy(to, &from, sizeof from);
}
template <class V>
GATEPACK_INLINE void store(bf16* to, const V& from) {
  using R = Register<sizeof(V)>;
  typename R::Words bits;
  std::memcpy(&bits, &from, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = from != from ? typename R::Words{} + 0x7fc0 : bits;  // as narrow rounds
  const typename R::Halves raw = __builtin_convertvector(bits, typename R::Halves);
  std::memcpy(to, &raw, sizeof raw);
}

// The first `count` of the lanes; zero behind them in registers.
template <class V, class T>
GATEPACK_INLINE void load(V& to, const T* from, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  if (count == lanes) return load(to, from);
  T padded[lanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  load(to, padded);
}
template <class T, class V>
GATEPACK_INLINE void store(T* to, const V& from, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  if (count == lanes) return store(to, from);
  T padded[lanes];
  store(padded, from);
  std::memcpy(to, padded, count * sizeof(T));
}

// Calls kernel<T, bytes of a register>(job, begin, end) compiled for the instruction set in use
// (simd_level). A kernel that takes the job by value reads it once: no store can change it.
#if defined(__x86_64__)
#define GATEPACK_AVX512 "avx512f,avx512bw,avx512vl,avx512dq"
#define GATEPACK_AVX2 "avx2,f16c"
#define GATEPACK_COMPILE(name, kernel)                                                       \
  template <class T, class Job>                                                              \
  __attribute__((target(GATEPACK_AVX512))) void name##_avx512(const Job& job, int64_t begin, \
                                                              int64_t end) {                 \
    kernel<T, 64>(job, begin, end);                                                          \
  }                                                                                          \
  template <class T, class Job>                                                              \
  __attribute__((target(GATEPACK_AVX2))) void name##_avx2(const Job& job, int64_t begin,     \
                                                          int64_t end) {                     \
    kernel<T, 32>(job, begin, end);                                                          \
  }                                                                                          \
  template <class T, class Job>                                                              \
  void name(const char* level, const Job& job, int64_t begin, int64_t end) {                 \
    if (!std::strcmp(level, "avx512")) return name##_avx512<T>(job, begin, end);             \
    if (!std::strcmp(level, "avx2")) return name##_avx2<T>(job, begin, end);                 \
    kernel<T, 16>(job, begin, end);                                                          \
  }
#else
#define GATEPACK_COMPILE(name, kernel)                                                       \
  template <class T, class Job>                                                              \
  void name(const char*, const Job& job, int64_t begin, int64_t end) {                       \
    kernel<T, 16>(job, begin, end);                                                          \
  }
#endif

}  // namespace gatepack
