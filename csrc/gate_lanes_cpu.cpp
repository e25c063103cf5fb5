// gate_lanes and its gradients on the CPU.
#include "fold_pack_cpu.h"
#include "passes.h"

#include <vector>

namespace gatepack {
namespace {

template <class T>
struct Gated {
  const T *x, *dy;
  T* out;          // y or dx
  const float* z;  // one for each of `lanes` of n lanes
  float* sums;     // dz of each lane
  int64_t tokens, n, lanes;
};

// Gate values of up to kGatedLanes lanes from `begin` on, one for each of them.
template <class T>
GATEPACK_INLINE void spread_gates(const Gated<T>& job, int64_t begin, int64_t end, float* z) {
  int64_t unit = begin / job.lanes, left = job.lanes - begin % job.lanes;
  for (int64_t n = begin; n < end; ++n) {
    *z++ = job.z[unit];
    if (--left == 0) ++unit, left = job.lanes;
  }
}

// Lanes begin .. end - 1 of every token; closed ones give 0 whatever x holds.
template <class T, int kBytes>
GATEPACK_INLINE void multiply_lanes(Gated<T> job, int64_t begin, int64_t end) {
  alignas(64) float gates[kGatedLanes];
  spread_gates(job, begin, end, gates);
  for (int64_t t = 0; t < job.tokens; ++t) {
    over_registers<kBytes>(begin, end, [&](int64_t n, int64_t count) GATEPACK_INLINED {
      const int64_t i = t * job.n + n;
      Floats<kBytes> x, z;
      load(x, job.x + i, count);
      load(z, gates + (n - begin), count);
      const Floats<kBytes> y = z == 0.0f ? Floats<kBytes>{} : x * z;
      store(job.out + i, y, count);
    });
  }
}

// dx, and dz of each lane.
template <class T, int kBytes>
GATEPACK_INLINE void lane_gradients(Gated<T> job, int64_t begin, int64_t end) {
  alignas(64) float gates[kGatedLanes];
  spread_gates(job, begin, end, gates);
  const auto take = [&](int64_t i, int64_t n, int64_t count, Floats<kBytes>& sum) GATEPACK_INLINED {
    Floats<kBytes> dy, x, z;
    load(dy, job.dy + i, count);
    load(x, job.x + i, count);
    load(z, gates + (n - begin), count);
    const Floats<kBytes> none = {};
    const Floats<kBytes> dx = z == 0.0f ? none : dy * z;
    sum += z == 0.0f ? none : dy * x;
    store(job.out + i, dx, count);
  };
  sum_runs<kBytes>(job.tokens, job.n, begin, end, job.sums, take);
}

GATEPACK_COMPILE(run_lanes, multiply_lanes)
GATEPACK_COMPILE(run_lane_gradients, lane_gradients)

// The job of gate_lanes or of its gradients, but for dy and the results.
template <class T>
Gated<T> lanes_job(const Tensor& x, const Tensor& z, int64_t lanes) {
  Gated<T> job{};
  job.x = data<T>(x), job.z = data<float>(z);
  job.n = z.numel() * lanes, job.lanes = lanes;
  job.tokens = job.n ? x.numel() / job.n : 0;
  return job;
}

void require_units(const char* op, const Tensor& x, const Tensor& z, int64_t lanes) {
  require_dense(op, "x", x, x);
  require(z.scalar_type() == ScalarType::Float && z.is_contiguous() && !z.is_cuda(), op,
          ": z must be float32, contiguous and on the CPU");
  require(lanes >= 1, op, ": lanes must be at least 1, got ", lanes);
  require(x.dim() > 0 && z.dim() == 1 && z.size(0) * lanes == x.size(x.dim() - 1), op,
          ": z must have one value for every ", lanes, " of the last dimension of x");
}

template <class T>
void multiply(const Tensor& x, const Tensor& z, int64_t lanes, Tensor& y) {
  Gated<T> job = lanes_job<T>(x, z, lanes);
  job.out = static_cast<T*>(y.mutable_data_ptr());
  const char* const level = simd_level();
  over_lanes(job.n, job.tokens, [&](int64_t begin, int64_t end) {
    run_lanes<T>(level, job, begin, end);
  });
}

template <class T>
void lane_gradients_of(const Tensor& dy, const Tensor& x, const Tensor& z, int64_t lanes,
                       Tensor& dx, Tensor& dz) {
  Gated<T> job = lanes_job<T>(x, z, lanes);
  std::vector<float> sums(job.n);
  job.dy = data<T>(dy);
  job.out = static_cast<T*>(dx.mutable_data_ptr());
  job.sums = sums.data();
  const char* const level = simd_level();
  over_lanes(job.n, job.tokens, [&](int64_t begin, int64_t end) {
    run_lane_gradients<T>(level, job, begin, end);
  });
  float* const of_units = static_cast<float*>(dz.mutable_data_ptr());
  for (int64_t unit = 0; unit < z.numel(); ++unit) {
    for (int64_t i = 0; i < lanes; ++i) of_units[unit] += sums[unit * lanes + i];
  }
}

}  // namespace

Tensor gate_lanes_cpu(const Tensor& x, const Tensor& z, int64_t lanes) {
  const bool wide = require_float_or_bf16("gate_lanes", "x", x);
  require_units("gate_lanes", x, z, lanes);
  Tensor y = torch::stable::new_empty(x, x.sizes(), x.scalar_type());
  if (wide) {
    multiply<float>(x, z, lanes, y);
  } else {
    multiply<bf16>(x, z, lanes, y);
  }
  return y;
}

std::tuple<Tensor, Tensor> gate_lanes_backward_cpu(const Tensor& dy, const Tensor& x,
                                                   const Tensor& z, int64_t lanes) {
  const char* const op = "gate_lanes_backward";
  const bool wide = require_float_or_bf16(op, "x", x);
  require_units(op, x, z, lanes);
  require_like(op, "dy", dy, "x", x);
  Tensor dx = torch::stable::new_empty(x, x.sizes(), x.scalar_type());
  Tensor dz = torch::stable::new_zeros(z, {z.numel()}, ScalarType::Float);
  if (wide) {
    lane_gradients_of<float>(dy, x, z, lanes, dx, dz);
  } else {
    lane_gradients_of<bf16>(dy, x, z, lanes, dx, dz);
  }
  return {dx, dz};
}

}  // namespace gatepack
