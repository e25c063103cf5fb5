// swiglu, swiglu_backward and column_products on the CPU.
#include "passes.h"

#include "fold_pack_cpu.h"

#include <algorithm>

namespace gatepack {
namespace {

// 1 / (1 + exp(-a)): exp by 2^i * p(r), r in [-ln 2 / 2, ln 2 / 2], p as in Cephes' expf (1 ulp).
template <class Floats>
GATEPACK_INLINE void sigmoid(Floats& out, const Floats& a) {
  const Floats minus = -a;
  Floats x = minus > 88.0f ? Floats{} + 88.0f : minus;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats whole = shifted - magic;
  const Floats r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  typename Register<sizeof(Floats)>::Words bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // the integer stands in the low bits of `shifted`
  Floats scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const Floats exponential =
      minus > 88.0f ? Floats{} + std::numeric_limits<float>::infinity() : p * scale;
  out = 1.0f / (1.0f + exponential);
}

struct Gated {
  const float *dh, *a, *u;
  float *first, *second;  // h, or da and du
  // With gates, one for each of n lanes, closed lanes give 0 whatever a and u hold.
  const float* z;
  float* dz;
  int64_t tokens, n;
};

template <class T, int kBytes>
GATEPACK_INLINE void swiglu_lanes(Gated job, int64_t begin, int64_t end) {
  over_registers<kBytes>(begin, end, [&](int64_t i, int64_t count) GATEPACK_INLINED {
    Floats<kBytes> a, u, s;
    load(a, job.a + i, count);
    load(u, job.u + i, count);
    sigmoid(s, a);
    const Floats<kBytes> h = a * s * u;
    store(job.first + i, h, count);
  });
}

template <class T, int kBytes>
GATEPACK_INLINE void swiglu_gradients(Gated job, int64_t begin, int64_t end) {
  over_registers<kBytes>(begin, end, [&](int64_t i, int64_t count) GATEPACK_INLINED {
    Floats<kBytes> dh, a, u, s;
    load(dh, job.dh + i, count);
    load(a, job.a + i, count);
    load(u, job.u + i, count);
    sigmoid(s, a);
    const Floats<kBytes> da = dh * u * (s * (1.0f + a * (1.0f - s)));
    const Floats<kBytes> du = dh * (a * s);
    store(job.first + i, da, count);
    store(job.second + i, du, count);
  });
}

// Lanes begin .. end - 1 of every token.
template <class T, int kBytes>
GATEPACK_INLINE void gated_lanes(Gated job, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < job.tokens; ++t) {
    over_registers<kBytes>(begin, end, [&](int64_t n, int64_t count) GATEPACK_INLINED {
      const int64_t i = t * job.n + n;
      Floats<kBytes> a, u, s, z;
      load(a, job.a + i, count);
      load(u, job.u + i, count);
      load(z, job.z + n, count);
      sigmoid(s, a);
      const Floats<kBytes> h = z == 0.0f ? Floats<kBytes>{} : a * s * u * z;
      store(job.first + i, h, count);
    });
  }
}

// The same, and dz.
template <class T, int kBytes>
GATEPACK_INLINE void gated_gradients(Gated job, int64_t begin, int64_t end) {
  const auto take = [&](int64_t i, int64_t n, int64_t count, Floats<kBytes>& sum) GATEPACK_INLINED {
    Floats<kBytes> dh, a, u, s, z;
    load(dh, job.dh + i, count);
    load(a, job.a + i, count);
    load(u, job.u + i, count);
    load(z, job.z + n, count);
    sigmoid(s, a);
    const Floats<kBytes> none = {};
    sum += z == 0.0f ? none : dh * (a * s * u);
    const Floats<kBytes> da = z == 0.0f ? none : dh * z * u * (s * (1.0f + a * (1.0f - s)));
    const Floats<kBytes> du = z == 0.0f ? none : dh * z * (a * s);
    store(job.first + i, da, count);
    store(job.second + i, du, count);
  };
  sum_runs<kBytes>(job.tokens, job.n, begin, end, job.dz, take);
}

template <class T>
struct Columns {
  const T *a, *b;
  float* y;
  int64_t tokens, n;
};

// A short sum for each run of kRun tokens, and a sum of those.
template <class T, int kBytes>
GATEPACK_INLINE void column_sums(Columns<T> job, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < job.tokens; t += kRun) {
    const int64_t last = std::min(t + kRun, job.tokens);
    for (int64_t n = begin; n < end; n += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, end - n);
      Lanes<kBytes> sum = {};
      for (int64_t i = t; i < last; ++i) {
        Lanes<kBytes> a, b;
        load(a, job.a + i * job.n + n, count);
        load(b, job.b + i * job.n + n, count);
        sum.add_product(a, b);
      }
      float run[kLanes];
      store(run, sum);
      add_run(run, count, job.y + n);
    }
  }
}

GATEPACK_COMPILE(run_swiglu, swiglu_lanes)
GATEPACK_COMPILE(run_gradients, swiglu_gradients)
GATEPACK_COMPILE(run_gated, gated_lanes)
GATEPACK_COMPILE(run_gated_gradients, gated_gradients)
GATEPACK_COMPILE(run_columns, column_sums)

// The job of swiglu or of its gradients, but for the results.
Gated gated_job(const char* op, const Tensor& a, const Tensor& u, const OptTensor& z) {
  require(a.scalar_type() == ScalarType::Float, op, ": a must be float32, got ",
          dtype_name(a.scalar_type()));
  require_dense(op, "a", a, a);
  require_like(op, "u", u, "a", a);
  Gated job{};
  job.a = data<float>(a), job.u = data<float>(u);
  if (!z) return job;
  require_dense(op, "z", *z, a);
  require(a.dim() > 0 && z->dim() == 1 && z->size(0) == a.size(a.dim() - 1), op,
          ": z must have one value for each of the last dimension of a");
  job.z = data<float>(*z);
  job.n = z->numel();
  job.tokens = job.n ? a.numel() / job.n : 0;
  return job;
}

// whole(begin, end) for the elements of a job without gates, lanes(begin, end) for the lanes of one
// with them.
template <class Whole, class Lane>
void run_job(const Gated& job, int64_t elements, const Whole& whole, const Lane& lanes) {
  if (job.z) return over_lanes(job.n, job.tokens, lanes);
  torch::stable::parallel_for(0, elements, kGrain / 4, whole);
}

}  // namespace

Tensor swiglu_cpu(const Tensor& a, const Tensor& u, const OptTensor& z) {
  Gated job = gated_job("swiglu", a, u, z);
  Tensor h = torch::stable::new_empty(a, a.sizes(), ScalarType::Float);
  job.first = static_cast<float*>(h.mutable_data_ptr());
  const char* const level = simd_level();
  run_job(
      job, a.numel(),
      [&](int64_t begin, int64_t end) { run_swiglu<float>(level, job, begin, end); },
      [&](int64_t begin, int64_t end) { run_gated<float>(level, job, begin, end); });
  return h;
}

std::tuple<Tensor, Tensor, Tensor> swiglu_backward_cpu(const Tensor& dh, const Tensor& a,
                                                       const Tensor& u, const OptTensor& z) {
  Gated job = gated_job("swiglu_backward", a, u, z);
  require_like("swiglu_backward", "dh", dh, "a", a);
  Tensor da = torch::stable::new_empty(a, a.sizes(), ScalarType::Float);
  Tensor du = torch::stable::new_empty(a, a.sizes(), ScalarType::Float);
  Tensor dz = torch::stable::new_zeros(a, {z ? z->numel() : 0}, ScalarType::Float);
  job.dh = data<float>(dh);
  job.first = static_cast<float*>(da.mutable_data_ptr());
  job.second = static_cast<float*>(du.mutable_data_ptr());
  job.dz = static_cast<float*>(dz.mutable_data_ptr());
  const char* const level = simd_level();
  run_job(
      job, a.numel(),
      [&](int64_t begin, int64_t end) { run_gradients<float>(level, job, begin, end); },
      [&](int64_t begin, int64_t end) { run_gated_gradients<float>(level, job, begin, end); });
  return {da, du, dz};
}

Tensor column_products_cpu(const Tensor& a, const Tensor& b) {
  const char* const op = "column_products";
  const bool wide = require_float_or_bf16(op, "a", a);
  require(a.dim() == 2, op, ": a must have 2 dimensions, got ", a.dim());
  require_dense(op, "a", a, a);
  require_like(op, "b", b, "a", a);
  const int64_t tokens = a.size(0), n = a.size(1);
  Tensor y = torch::stable::new_empty(a, {n}, ScalarType::Float);
  float* const out = static_cast<float*>(y.mutable_data_ptr());
  const char* const level = simd_level();
  // Whole cache lines of the result, and at least two pages of a row at a time.
  torch::stable::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0f);
    if (wide) {
      const Columns<float> job{data<float>(a), data<float>(b), out, tokens, n};
      run_columns<float>(level, job, begin, end);
    } else {
      const Columns<bf16> job{data<bf16>(a), data<bf16>(b), out, tokens, n};
      run_columns<bf16>(level, job, begin, end);
    }
  });
  return y;
}

}  // namespace gatepack
