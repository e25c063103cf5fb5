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
#include <memory>

namespace gatepack {

constexpr int64_t kGrain = 1 << 16;  // bytes of the input for one piece of work
constexpr int64_t kRun = 64;         // tokens of a tile, and in a sum of its own
constexpr int64_t kNarrow = 64;      // lanes of the narrowest tile

// Tokens first .. last - 1, which are the run-th kRun of all, and lanes begin .. end - 1 of them.
struct Tile {
  int64_t run, first, last, begin, end;
};

// take(n, count) for lanes begin .. end - 1, a register or what is left of them at a time.
template <int kBytes, class Take>
GATEPACK_INLINE void over_registers(int64_t begin, int64_t end, const Take& take) {
  constexpr int64_t lanes = Register<kBytes>::kLanes;
  int64_t n = begin;
  for (; n + lanes <= end; n += lanes) take(n, lanes);
  if (n < end) take(n, end - n);
}

// take(i, n, count, sum) for `count` lanes from n on of each token of a tile, at i in a tensor of
// `width` lanes a token. sums [runs, width] gets the tile's part of its run.
template <int kBytes, class Take>
GATEPACK_INLINE void sum_tile(const Tile& tile, int64_t width, float* sums, const Take& take) {
  float* const run = sums + tile.run * width;
  std::fill(run + tile.begin, run + tile.end, 0.0f);
  for (int64_t t = tile.first; t < tile.last; ++t) {
    over_registers<kBytes>(tile.begin, tile.end, [&](int64_t n, int64_t count) GATEPACK_INLINED {
      Floats<kBytes> sum;
      load(sum, run + n, count);
      take(t * width + n, n, count, sum);
      store(run + n, sum, count);
    });
  }
}

inline int64_t runs_of(int64_t tokens) { return (tokens + kRun - 1) / kRun; }

// run(tile) for all tokens and n lanes. A tile is as wide as leaves each thread four: whole tokens
// lie one behind the other in memory, where 128 lanes of each take up to three times as long.
template <class Run>
void over_tiles(int64_t tokens, int64_t n, const Run& run) {
  if (tokens == 0 || n == 0) return;
  const int64_t runs = runs_of(tokens), pieces = 4 * torch::stable::get_num_threads();
  const int64_t wanted = (pieces + runs - 1) / runs;
  const int64_t width = ((n + wanted - 1) / wanted + kNarrow - 1) / kNarrow * kNarrow;
  const int64_t stripes = (n + width - 1) / width, each = width * std::min(tokens, kRun);
  const int64_t grain = std::max<int64_t>(1, kGrain / 2 / each);
  torch::stable::parallel_for(0, runs * stripes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / stripes * kRun, lane = i % stripes * width;
      run(Tile{i / stripes, first, std::min(first + kRun, tokens), lane, std::min(lane + width, n)});
    }
  });
}

// y [n] = what fill(sums) writes to sums [runs, n], added run by run.
template <class Fill>
void sum_over_runs(int64_t tokens, int64_t n, float* y, const Fill& fill) {
  const int64_t runs = runs_of(tokens);
  const std::unique_ptr<float[]> sums(new float[runs * n]);
  fill(sums.get());
  std::fill(y, y + n, 0.0f);
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t i = 0; i < n; ++i) y[i] += sums[run * n + i];
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

Tensor swiglu_cpu(const Tensor& a, const Tensor& u, const OptTensor& z);
std::tuple<Tensor, Tensor, Tensor> swiglu_backward_cpu(const Tensor& dh, const Tensor& a,
                                                       const Tensor& u, const OptTensor& z);
Tensor gate_lanes_cpu(const Tensor& x, const Tensor& z, int64_t lanes);
std::tuple<Tensor, Tensor> gate_lanes_backward_cpu(const Tensor& dy, const Tensor& x,
                                                   const Tensor& z, int64_t lanes);
Tensor column_products_cpu(const Tensor& a, const Tensor& b);

}  // namespace gatepack
