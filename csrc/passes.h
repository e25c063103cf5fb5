// Passes over activations on the CPU, where torch's own leave bandwidth unused:
//
//   swiglu           h = silu(a) * u * z, and its gradients, in one pass each; z [n] or none
//   gate_lanes       y = x * z, z for each of `lanes` lanes, and its gradients, in one pass each
//   column_products  y[n] = sum_t a[t, n] * b[t, n]
//
// Each lane has sums of its own, added token by token whatever the registers are: every instruction
// set writes the same bytes. No product is contracted into an addition.
#pragma once

#include "lanes.h"

#include <algorithm>

namespace gatepack {

constexpr int64_t kGrain = 1 << 16;   // bytes of the input for one piece of work
constexpr int64_t kRun = 64;          // tokens in a sum of its own
constexpr int64_t kGatedLanes = 128;  // lanes of a gated pass for one thread at a time

// take(n, count) for lanes begin .. end - 1, a register or what is left of them at a time.
template <int kBytes, class Take>
GATEPACK_INLINE void over_registers(int64_t begin, int64_t end, const Take& take) {
  constexpr int64_t lanes = Register<kBytes>::kLanes;
  int64_t n = begin;
  for (; n + lanes <= end; n += lanes) take(n, lanes);
  if (n < end) take(n, end - n);
}

// y += the sums of a run of tokens.
GATEPACK_INLINE void add_run(const float* sums, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += sums[i];
}

// take(i, n, count, sum) for `count` lanes from n on of each token, at i in a tensor of `width`
// lanes a token: a short sum for each run of kRun tokens, and a sum of those in y.
template <int kBytes, class Take>
GATEPACK_INLINE void sum_runs(int64_t tokens, int64_t width, int64_t begin, int64_t end, float* y,
                              const Take& take) {
  for (int64_t first = 0; first < tokens; first += kRun) {
    const int64_t last = std::min(first + kRun, tokens);
    alignas(64) float run[kGatedLanes];
    over_registers<kBytes>(0, kGatedLanes, [&](int64_t n, int64_t) GATEPACK_INLINED {
      store(run + n, Floats<kBytes>{});
    });
    for (int64_t t = first; t < last; ++t) {
      over_registers<kBytes>(begin, end, [&](int64_t n, int64_t count) GATEPACK_INLINED {
        Floats<kBytes> sum;
        load(sum, run + (n - begin));
        take(t * width + n, n, count, sum);
        store(run + (n - begin), sum);
      });
    }
    add_run(run, end - begin, y + begin);
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
