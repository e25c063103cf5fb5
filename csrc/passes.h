// Passes over activations on the CPU, where torch's own leave bandwidth unused:
//
//   swiglu           h = silu(a) * u * z, and its gradients, in one pass each; z [n] or none
//   column_products  y[n] = sum_t a[t, n] * b[t, n]
//
// Sixteen fp32 lanes at a time, whatever the registers are: every instruction set adds in the same
// order and writes the same bytes. No product is contracted into an addition.
#pragma once

#include "layout.h"

#include <cstring>

namespace gatepack {

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define GATEPACK_INLINE inline __attribute__((always_inline))

// Loads and stores as references: a vector by value has another ABI in each instruction set.
GATEPACK_INLINE void load(Floats& to, const float* from) { std::memcpy(&to, from, sizeof to); }
GATEPACK_INLINE void load(Floats& to, const bf16* from) {
  Halves raw;
  std::memcpy(&raw, from, sizeof raw);
  const Ints32 bits = __builtin_convertvector(raw, Ints32) << 16;
  std::memcpy(&to, &bits, sizeof to);
}
GATEPACK_INLINE void store(float* to, const Floats& from) { std::memcpy(to, &from, sizeof from); }

// The first `count` of sixteen lanes, zero behind them.
template <class T>
GATEPACK_INLINE void load_some(Floats& to, const T* from, int64_t count) {
  if (count == kLanes) return load(to, from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  load(to, padded);
}

GATEPACK_INLINE void store_some(float* to, const Floats& from, int64_t count) {
  if (count == kLanes) return store(to, from);
  std::memcpy(to, &from, count * sizeof(float));
}

// Calls kernel<T>(arguments) compiled for the instruction set in use (simd_level).
#if defined(__x86_64__)
#define GATEPACK_AVX512 "avx512f,avx512bw,avx512vl,avx512dq"
#define GATEPACK_AVX2 "avx2,f16c"
#define GATEPACK_COMPILE(name, kernel)                                                       \
  template <class T, class... Arguments>                                                     \
  __attribute__((target(GATEPACK_AVX512))) void name##_avx512(                               \
      const Arguments&... arguments) {                                                       \
    kernel<T>(arguments...);                                                                 \
  }                                                                                          \
  template <class T, class... Arguments>                                                     \
  __attribute__((target(GATEPACK_AVX2))) void name##_avx2(const Arguments&... arguments) {   \
    kernel<T>(arguments...);                                                                 \
  }                                                                                          \
  template <class T, class... Arguments>                                                     \
  void name(const char* level, const Arguments&... arguments) {                              \
    if (!std::strcmp(level, "avx512")) return name##_avx512<T>(arguments...);                \
    if (!std::strcmp(level, "avx2")) return name##_avx2<T>(arguments...);                    \
    kernel<T>(arguments...);                                                                 \
  }
#else
#define GATEPACK_COMPILE(name, kernel)                                                       \
  template <class T, class... Arguments>                                                     \
  void name(const char*, const Arguments&... arguments) {                                    \
    kernel<T>(arguments...);                                                                 \
  }
#endif

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

inline void require_dense(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  require(x.scalar_type() == like.scalar_type(), op, ": ", name, " must be ",
          dtype_name(like.scalar_type()), ", got ", dtype_name(x.scalar_type()));
  require(x.is_contiguous(), op, ": ", name, " must be contiguous");
  require(!x.is_cuda(), op, ": ", name, " must be on the CPU");
}

Tensor swiglu_cpu(const Tensor& a, const Tensor& u, const OptTensor& z);
std::tuple<Tensor, Tensor, Tensor> swiglu_backward_cpu(const Tensor& dh, const Tensor& a,
                                                       const Tensor& u, const OptTensor& z);
Tensor column_products_cpu(const Tensor& a, const Tensor& b);

}  // namespace gatepack
