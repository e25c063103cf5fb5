// Sixteen fp32 lanes in the registers of an instruction set, for loops that keep many sums in them.
#pragma once

#include "passes.h"

namespace gatepack {

// A register of 64, 32 or 16 bytes of fp32, and bf16 read into it.
template <int kBytes>
struct Register;
#define GATEPACK_REGISTER(bytes)                                         \
  template <>                                                            \
  struct Register<bytes> {                                               \
    typedef float Floats __attribute__((vector_size(bytes)));            \
    typedef int32_t Ints __attribute__((vector_size(bytes)));            \
    typedef uint16_t Halves __attribute__((vector_size(bytes / 2)));     \
    static GATEPACK_INLINE void load(Floats& to, const float* from) {    \
      std::memcpy(&to, from, bytes);                                     \
    }                                                                    \
    static GATEPACK_INLINE void load(Floats& to, const bf16* from) {     \
      Halves raw;                                                        \
      std::memcpy(&raw, from, bytes / 2);                                \
      const Ints bits = __builtin_convertvector(raw, Ints) << 16;        \
      std::memcpy(&to, &bits, bytes);                                    \
    }                                                                    \
  };
GATEPACK_REGISTER(64)
GATEPACK_REGISTER(32)
GATEPACK_REGISTER(16)

// Sixteen lanes in registers of kBytes each. Every width adds in the same order.
template <int kBytes>
struct Lanes {
  static constexpr int kParts = 4 * kLanes / kBytes;
  static constexpr bool kWide = kBytes == 64;  // and then there are 32 registers, else 16
  typename Register<kBytes>::Floats part[kParts];

  template <class T>
  GATEPACK_INLINE void load(const T* from) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) Register<kBytes>::load(part[p], from + p * kBytes / 4);
  }
  GATEPACK_INLINE void store(float* to) const { std::memcpy(to, part, sizeof part); }

  // The first `count` of the lanes, zero behind them.
  template <class T>
  GATEPACK_INLINE void load(const T* from, int64_t count) {
    if (count == kLanes) return load(from);
    T padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(T));
    load(padded);
  }
  GATEPACK_INLINE void store(float* to, int64_t count) const {
    std::memcpy(to, part, count * sizeof(float));
  }

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

// Calls kernel<T, bytes of a register>(job, begin, end) compiled for the instruction set in use.
#if defined(__x86_64__)
#define GATEPACK_COMPILE_WIDTHS(name, kernel)                                             \
  template <class T, class Job>                                                           \
  __attribute__((target(GATEPACK_AVX512))) void name##_avx512(const Job& job, int64_t begin, \
                                                              int64_t end) {              \
    kernel<T, 64>(job, begin, end);                                                       \
  }                                                                                       \
  template <class T, class Job>                                                           \
  __attribute__((target(GATEPACK_AVX2))) void name##_avx2(const Job& job, int64_t begin,  \
                                                          int64_t end) {                  \
    kernel<T, 32>(job, begin, end);                                                       \
  }                                                                                       \
  template <class T, class Job>                                                           \
  void name(const char* level, const Job& job, int64_t begin, int64_t end) {              \
    if (!std::strcmp(level, "avx512")) return name##_avx512<T>(job, begin, end);          \
    if (!std::strcmp(level, "avx2")) return name##_avx2<T>(job, begin, end);              \
    kernel<T, 16>(job, begin, end);                                                       \
  }
#else
#define GATEPACK_COMPILE_WIDTHS(name, kernel)                                             \
  template <class T, class Job>                                                           \
  void name(const char*, const Job& job, int64_t begin, int64_t end) {                    \
    kernel<T, 16>(job, begin, end);                                                       \
  }
#endif

}  // namespace gatepack
