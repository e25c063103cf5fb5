// Passes over activations on the CPU, where torch's own leave bandwidth unused:
//
//   swiglu           h = silu(a) * u * z, and its gradients, in one pass each; z [n] or none
//   gate_lanes       y = x * z, z for each of `lanes` lanes, and its gradients, in one pass each
//   column_products  y[n] = sum_t a[t, n] * b[t, n]
//
// Sixteen fp32 lanes at a time, whatever the registers are: every instruction set adds in the same
// order and writes the same bytes. No product is contracted into an addition.
#pragma once

#include "layout.h"

#include <algorithm>
#include <cstring>

namespace gatepack {

constexpr int kLanes = 16;
constexpr int64_t kGrain = 1 << 16;   // bytes of the input for one piece of work
constexpr int64_t kRun = 64;          // tokens in a sum of its own
constexpr int64_t kGatedLanes = 128;  // lanes of a gated pass for one thread at a time

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define GATEPACK_INLINED __attribute__((always_inline))
#define GATEPACK_INLINE inline GATEPACK_INLINED

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
GATEPACK_INLINE void store_some(bf16* to, const Floats& from, int64_t count) {
  float lane[kLanes];
  store(lane, from);
  for (int64_t i = 0; i < count; ++i) narrow(lane[i], to[i]);
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

// y += the sums of a run of tokens, for lanes begin .. end - 1.
GATEPACK_INLINE void add_run(const Floats* sum, float* y, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kLanes, ++sum) {
    const int64_t count = std::min<int64_t>(kLanes, end - n);
    Floats total;
    load_some(total, y + n, count);
    total += *sum;
    store_some(y + n, total, count);
  }
}

// take(i, n, count, sum) for `count` lanes from n on of each token, at i in a tensor of `width` lanes
// a token: a short sum for each run of kRun tokens, and a sum of those in y.
template <class Take>
GATEPACK_INLINE void sum_runs(int64_t tokens, int64_t width, int64_t begin, int64_t end, float* y,
                              const Take& take) {
  Floats run[kGatedLanes / kLanes];
  for (int64_t first = 0; first < tokens; first += kRun) {
    const int64_t last = std::min(first + kRun, tokens);
    std::fill(std::begin(run), std::end(run), Floats{});
    for (int64_t t = first; t < last; ++t) {
      Floats* sum = run;
      for (int64_t n = begin; n < end; n += kLanes, ++sum) {
        take(t * width + n, n, std::min<int64_t>(kLanes, end - n), *sum);
      }
    }
    add_run(run, y, begin, end);
  }
}

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

inline void require_like(const char* op, const char* name, const Tensor& x, const char* like_name,
                         const Tensor& like) {
  require_dense(op, name, x, like);
  require(x.dim() == like.dim() && x.sizes().equals(like.sizes()), op, ": ", name,
          " must have the shape of ", like_name);
}

inline bool require_float_or_bf16(const char* op, const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": ", name,
          " must be float32 or bfloat16, got ", dtype_name(type));
  return type == ScalarType::Float;
}

// run(begin, end) for n lanes of some tokens, kGatedLanes or less at a time.
template <class Run>
void over_lanes(int64_t n, int64_t tokens, const Run& run) {
  const int64_t pieces = (n + kGatedLanes - 1) / kGatedLanes;
  const int64_t each = kGatedLanes * std::max<int64_t>(1, tokens);
  const int64_t grain = std::max<int64_t>(1, kGrain / 2 / each);
  torch::stable::parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run(i * kGatedLanes, std::min(n, (i + 1) * kGatedLanes));
    }
  });
}

Tensor swiglu_cpu(const Tensor& a, const Tensor& u, const OptTensor& z);
std::tuple<Tensor, Tensor, Tensor> swiglu_backward_cpu(const Tensor& dh, const Tensor& a,
                                                       const Tensor& u, const OptTensor& z);
Tensor gate_lanes_cpu(const Tensor& x, const Tensor& z, int64_t lanes);
std::tuple<Tensor, Tensor> gate_lanes_backward_cpu(const Tensor& dy, const Tensor& x,
                                                   const Tensor& z, int64_t lanes);
Tensor column_products_cpu(const Tensor& a, const Tensor& b);

}  // namespace gatepack
