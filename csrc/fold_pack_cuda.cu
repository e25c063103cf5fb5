// fold_pack and its adjoint on CUDA: one launch each, no host sync, the bytes of the CPU.
//
// Shapes and dtypes are checked on the host. Index values are not read there: a value out of range
// prints a line and traps on the device (the context is then lost, as with torch's own indexing),
// and the order of an index is a contract that only the CPU op checks.
#include "layout.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

namespace gatepack {
namespace {

constexpr int kThreads = 256;
constexpr int kLinesPerBlock = 8;  // one read of the lane index and gate serves this many lines

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(bf16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
__device__ inline float widen(f16 v) { return __half2float(__ushort_as_half(v.bits)); }

__device__ inline void narrow(double v, double& out) { out = v; }
__device__ inline void narrow(double v, float& out) { out = __double2float_rn(v); }
__device__ inline void narrow(float v, double& out) { out = v; }
__device__ inline void narrow(float v, float& out) { out = v; }
// In integers, like the CPU: the intrinsic returns another NaN.
__device__ inline void narrow(float v, bf16& out) {
  const uint32_t bits = __float_as_uint(v);
  out.bits = isnan(v) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
__device__ inline void narrow(float v, f16& out) {
  out.bits = __half_as_ushort(__float2half_rn(v));
}
__device__ inline void narrow(double v, bf16& out) { narrow(__double2float_rn(v), out); }
__device__ inline void narrow(double v, f16& out) { narrow(__double2float_rn(v), out); }

template <class In>
using compute_t = std::conditional_t<std::is_same_v<In, double>, double, float>;

__device__ inline int64_t index_at(Index index, int64_t i) {
  if (!index.data) return i;
  return index.wide ? static_cast<const int64_t*>(index.data)[i]
                    : static_cast<const int32_t*>(index.data)[i];
}

__device__ inline int64_t checked_index_at(Index index, int64_t i, int64_t bound) {
  const int64_t v = index_at(index, i);
  if (v < 0 || v >= bound) {
    printf("fold_pack: index must be in [0, %lld), got %lld at position %lld\n",
           static_cast<long long>(bound), static_cast<long long>(v), static_cast<long long>(i));
    __trap();
  }
  return v;
}

// The place of `value` in a sorted index of n, or -1.
__device__ inline int64_t find(Index index, int64_t n, int64_t value) {
  if (!index.data) return value;
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (index_at(index, middle) < value) low = middle + 1;
    else high = middle;
  }
  return low < n && index_at(index, low) == value ? low : -1;
}

template <class T>
__device__ inline T gate_at(Gate gate, int64_t i) {
  if (!gate.data) return T(1);
  return gate.wide ? static_cast<T>(static_cast<const double*>(gate.data)[i])
                   : static_cast<T>(static_cast<const float*>(gate.data)[i]);
}

template <class T>
__device__ inline T apply(T v, T line, T lane, bool lane_first) {
  return lane_first ? (v * lane) * line : (v * line) * lane;
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// src [lines, lanes], stride call.stride -> dst [kept_lines, kept_lanes].
// Each thread owns N neighbouring kept lanes of kLinesPerBlock lines.
template <class In, class Out, int N>
__global__ void __launch_bounds__(kThreads)
    fold_pack_kernel(Call call, const In* __restrict__ src, Out* __restrict__ dst) {
  using T = compute_t<In>;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (j >= call.kept_lanes) return;
  int64_t lane[N];
  T lane_gate[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    lane[k] = checked_index_at(call.lane_index, j + k, call.lanes);
    lane_gate[k] = gate_at<T>(call.lane_gate, j + k);
  }
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kLinesPerBlock;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kLinesPerBlock;
  for (int64_t base = first; base < call.kept_lines; base += stride) {
    const int64_t end = min(base + kLinesPerBlock, call.kept_lines);
    for (int64_t i = base; i < end; ++i) {
      const In* line = src + checked_index_at(call.line_index, i, call.lines) * call.stride;
      const T line_gate = gate_at<T>(call.line_gate, i);
      Pack<In, N> in;
      if (call.lane_index.data || N == 1) {
#pragma unroll
        for (int k = 0; k < N; ++k) in.v[k] = line[lane[k]];
      } else {
        in = *reinterpret_cast<const Pack<In, N>*>(line + j);
      }
      Pack<Out, N> out;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        narrow(apply<T>(widen(in.v[k]), line_gate, lane_gate[k], call.lane_first), out.v[k]);
      }
      *reinterpret_cast<Pack<Out, N>*>(dst + i * call.kept_lanes + j) = out;
    }
  }
}

// src [kept_lines, kept_lanes], stride call.stride -> dst [lines, lanes]. Threads own lanes of the
// full matrix and look their kept lane up once, so every element is written once, zeros included.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    fold_pack_adjoint_kernel(Call call, const In* __restrict__ src, Out* __restrict__ dst) {
  using T = compute_t<In>;
  const int64_t lane = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (lane >= call.lanes) return;
  const int64_t j = find(call.lane_index, call.kept_lanes, lane);
  const T lane_gate = j < 0 ? T(0) : gate_at<T>(call.lane_gate, j);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kLinesPerBlock;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kLinesPerBlock;
  for (int64_t base = first; base < call.lines; base += stride) {
    const int64_t end = min(base + kLinesPerBlock, call.lines);
    for (int64_t l = base; l < end; ++l) {
      const int64_t i = find(call.line_index, call.kept_lines, l);
      Out out;
      narrow(T(0), out);
      if (i >= 0 && j >= 0) {
        const T v = widen(src[i * call.stride + j]);
        narrow(apply<T>(v, gate_at<T>(call.line_gate, i), lane_gate, call.lane_first), out);
      }
      dst[l * call.lanes + lane] = out;
    }
  }
}

template <class In, class Out>
void launch(bool adjoint, const Call& call, const void* src, void* dst, cudaStream_t stream) {
  // As many lanes for each thread as fill 16 bytes, where every line allows it.
  constexpr int N = 16 / std::max(sizeof(In), sizeof(Out));
  const bool whole_lanes = !call.lane_index.data;
  const bool aligned = call.kept_lanes % N == 0 &&
      (!whole_lanes ||
       (call.stride % N == 0 && reinterpret_cast<uintptr_t>(src) % (N * sizeof(In)) == 0));
  const int64_t lanes = adjoint ? call.lanes : call.kept_lanes;
  const int64_t lines = adjoint ? call.lines : call.kept_lines;
  const int64_t per_block = kThreads * (adjoint || !aligned ? 1 : N);
  const dim3 grid(static_cast<unsigned>((lanes + per_block - 1) / per_block),
                  static_cast<unsigned>(std::min<int64_t>(
                      (lines + kLinesPerBlock - 1) / kLinesPerBlock, 65535)));
  const In* in = static_cast<const In*>(src);
  Out* out = static_cast<Out*>(dst);
  if (adjoint) fold_pack_adjoint_kernel<In, Out><<<grid, kThreads, 0, stream>>>(call, in, out);
  else if (aligned) fold_pack_kernel<In, Out, N><<<grid, kThreads, 0, stream>>>(call, in, out);
  else fold_pack_kernel<In, Out, 1><<<grid, kThreads, 0, stream>>>(call, in, out);
}

using Launch = void (*)(bool, const Call&, const void*, void*, cudaStream_t);

template <class In>
Launch choose_out(ScalarType out) {
  switch (out) {
    case ScalarType::Float: return launch<In, float>;
    case ScalarType::Double: return launch<In, double>;
    case ScalarType::Half: return launch<In, f16>;
    default: return launch<In, bf16>;
  }
}

Launch choose(ScalarType in, ScalarType out) {
  switch (in) {
    case ScalarType::Float: return choose_out<float>(out);
    case ScalarType::Double: return choose_out<double>(out);
    case ScalarType::Half: return choose_out<f16>(out);
    default: return choose_out<bf16>(out);
  }
}

Tensor run(const char* op, bool adjoint, const Call& call, const Tensor& in,
           std::optional<ScalarType> dtype) {
  const torch::stable::accelerator::DeviceGuard guard(in.get_device_index());
  const ScalarType out_type = dtype.value_or(in.scalar_type());
  const int64_t lines = adjoint ? call.lines : call.kept_lines;
  const int64_t lanes = adjoint ? call.lanes : call.kept_lanes;
  Tensor out = allocate(call, in, lines, lanes, out_type);
  if (lines == 0 || lanes == 0) return out;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(in.get_device_index(), &stream));
  choose(in.scalar_type(), out_type)(adjoint, call, in.const_data_ptr(), out.mutable_data_ptr(),
                                     static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
  return out;
}

Tensor fold_pack_cuda(const Tensor& w, const OptTensor& rows, const OptTensor& cols,
                      const OptTensor& z_out, const OptTensor& z_in,
                      std::optional<ScalarType> dtype) {
  return run("fold_pack", false, describe_pack(w, rows, cols, z_out, z_in, dtype), w, dtype);
}

Tensor fold_pack_adjoint_cuda(const Tensor& g, const OptTensor& rows, const OptTensor& cols,
                              const OptTensor& z_out, const OptTensor& z_in, int64_t O, int64_t I,
                              std::optional<ScalarType> dtype) {
  return run("fold_pack_adjoint", true,
             describe_adjoint(g, rows, cols, z_out, z_in, O, I, dtype), g, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatepack, CUDA, m) {
  m.impl("fold_pack", TORCH_BOX(&fold_pack_cuda));
  m.impl("fold_pack_adjoint", TORCH_BOX(&fold_pack_adjoint_cuda));
}

}  // namespace gatepack
