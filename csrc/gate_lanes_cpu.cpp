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
  const float* z;  // one for each of n lanes
  float* sums;     // dz of each lane and run of tokens
  int64_t tokens, n;
};

// Closed lanes give 0 whatever x holds.
template <class T, int kBytes>
GATEPACK_INLINE void multiply_lanes(Gated<T> job, Tile tile) {
  for (int64_t t = tile.first; t < tile.last; ++t) {
    over_registers<kBytes>(tile.begin, tile.end, [&](int64_t n, int64_t count) GATEPACK_INLINED {
      const int64_t i = t * job.n + n;
      Floats<kBytes> x, z;
      load(x, job.x + i, count);
      load(z, job.z + n, count);
      const Floats<kBytes> y = z == 0.0f ? Floats<kBytes>{} : x * z;
      store(job.out + i, y, count);
    });
  }
}

// dx, and dz of each lane.
template <class T, int kBytes>
GATEPACK_INLINE void lane_gradients(Gated<T> job, Tile tile) {
  const auto take = [&](int64_t i, int64_t n, int64_t count, Floats<kBytes>& sum) GATEPACK_INLINED {
    Floats<kBytes> dy, x, z;
    load(dy, job.dy + i, count);
    load(x, job.x + i, count);
    load(z, job.z + n, count);
    const Floats<kBytes> none = {};
    sum += z == 0.0f ? none : dy * x;
    const Floats<kBytes> dx = z == 0.0f ? none : dy * z;
    store(job.out + i, dx, count);
  };
  sum_tile<kBytes>(tile, job.n, job.sums, take);
}

GATEPACK_COMPILE(run_lanes, multiply_lanes)
GATEPACK_COMPILE(run_lane_gradients, lane_gradients)

// The job of gate_lanes or of its gradients, but for dy and the results; z one for each lane.
template <class T>
Gated<T> lanes_job(const Tensor& x, const std::vector<float>& z) {
  Gated<T> job{};
  job.x = data<T>(x), job.z = z.data();
  job.n = static_cast<int64_t>(z.size());
  job.tokens = job.n ? x.numel() / job.n : 0;
  return job;
}

// The gate of each lane.
std::vector<float> spread(const Tensor& z, int64_t lanes) {
  std::vector<float> gates(z.numel() * lanes);
  for (int64_t unit = 0; unit < z.numel(); ++unit) {
    std::fill_n(gates.begin() + unit * lanes, lanes, data<float>(z)[unit]);
  }
  return gates;
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
  const std::vector<float> gates = spread(z, lanes);
  Gated<T> job = lanes_job<T>(x, gates);
  job.out = static_cast<T*>(y.mutable_data_ptr());
  const char* const level = simd_level();
  over_tiles(job.tokens, job.n, [&](const Tile& tile) { run_lanes<T>(level, job, tile); });
}

template <class T>
void lane_gradients_of(const Tensor& dy, const Tensor& x, const Tensor& z, int64_t lanes,
                       Tensor& dx, Tensor& dz) {
  const std::vector<float> gates = spread(z, lanes);
  Gated<T> job = lanes_job<T>(x, gates);
  std::vector<float> of_lanes(job.n);
  job.dy = data<T>(dy);
  job.out = static_cast<T*>(dx.mutable_data_ptr());
  const char* const level = simd_level();
  sum_over_runs(job.tokens, job.n, of_lanes.data(), [&](float* sums) {
    job.sums = sums;
    over_tiles(job.tokens, job.n,
               [&](const Tile& tile) { run_lane_gradients<T>(level, job, tile); });
  });
  float* const of_units = static_cast<float*>(dz.mutable_data_ptr());
  for (int64_t unit = 0; unit < z.numel(); ++unit) {
    for (int64_t i = 0; i < lanes; ++i) of_units[unit] += of_lanes[unit * lanes + i];
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
