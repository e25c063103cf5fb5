// fold_pack, its adjoint and their multi-tensor forms on CUDA: a launch for a whole list of
// matrices of one dtype, no host sync, the bytes of the CPU.
//
// Shapes and dtypes are checked on the host. Index values are not read there: a value out of range
// prints a line and traps on the device (the context is then lost, as with torch's own indexing;
// the adjoint, which looks its indices up, leaves it out), and the order of an index is a contract
// that only the CPU op checks.
#include "batch.cuh"
#include "layout.h"
#include "multi_tensor.h"

#include <algorithm>
#include <array>
#include <tuple>

namespace gatepack {
namespace {

constexpr int kLinesPerTile = 8;  // one read of the lane index and gate serves this many lines
constexpr int kSide = 32;         // of the square tiles of a crossed result
// Left alone, ptxas takes 64 registers for four blocks on a processor, and spills.
constexpr int kBlocks = 2;

__device__ inline int64_t index_at(Index index, int64_t i) {
  if (!index.data) return i;
  return index.wide ? static_cast<const int64_t*>(index.data)[i]
                    : static_cast<const int32_t*>(index.data)[i];
}

// Out of line: a call of printf takes stack and registers from every kernel that it is part of.
__device__ __attribute__((noinline)) void refuse_index(int64_t v, int64_t bound, int64_t i) {
  printf("fold_pack: index must be in [0, %lld), got %lld at position %lld\n",
         static_cast<long long>(bound), static_cast<long long>(v), static_cast<long long>(i));
  __trap();
}

__device__ inline int64_t checked_index_at(Index index, int64_t i, int64_t bound) {
  const int64_t v = index_at(index, i);
  if (v < 0 || v >= bound) refuse_index(v, bound, i);
  return v;
}

// For a pass whose successor refuses the index: only memory is kept safe, and registers free of a
// call.
__device__ inline int64_t clamped_index_at(Index index, int64_t i, int64_t bound) {
  return max(int64_t(0), min(index_at(index, i), bound - 1));
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
__device__ inline T factor_at(const Factor& factor, int64_t unit, int64_t k) {
  const int64_t at = unit * factor.unit_stride + k * factor.rank_stride;
  switch (factor.type) {
    case ScalarType::Float: return static_cast<T>(static_cast<const float*>(factor.data)[at]);
    case ScalarType::Double: return static_cast<T>(static_cast<const double*>(factor.data)[at]);
    case ScalarType::Half: return widen(static_cast<const f16*>(factor.data)[at]);
    default: return widen(static_cast<const bf16*>(factor.data)[at]);
  }
}

// A kept element in the compute type, its update added and its gates applied.
template <class T>
__device__ inline T folded(const Call& call, T v, int64_t line, int64_t lane, T line_gate,
                           T lane_gate) {
  if (call.rank > 0) {
    T sum = factor_at<T>(call.line_factor, line, 0) * factor_at<T>(call.lane_factor, lane, 0);
    for (int64_t k = 1; k < call.rank; ++k) {
      sum = sum + factor_at<T>(call.line_factor, line, k) * factor_at<T>(call.lane_factor, lane, k);
    }
    v = v + static_cast<T>(call.lora_scale) * sum;
  }
  return call.lane_first ? (v * lane_gate) * line_gate : (v * line_gate) * lane_gate;
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// One matrix of a launch.
struct Task {
  Call call;
  const void* src;
  void* dst;
  uint32_t* largest;  // e4m3: bits of the largest magnitude of each row
  float* scales;      // e4m3: one per row of the result
  bool aligned;       // lines and lanes allow accesses of 16 bytes
  uint32_t lane_tiles;
};

// Kept element (i, j) at (line, lane) of the full matrix.
template <class In, class T>
__device__ inline T value_at(const Task& task, int64_t i, int64_t j, int64_t line, int64_t lane) {
  const Call& call = task.call;
  return folded<T>(call, widen(static_cast<const In*>(task.src)[line * call.stride + lane]), line,
                   lane, gate_at<T>(call.line_gate, i), gate_at<T>(call.lane_gate, j));
}

// The value of element (i, j) of the result, stored as Out. In e4m3 the first element of a row also
// stores its scale.
template <class T, class Out>
__device__ inline Out stored(const Task& task, T v, int64_t i, int64_t j) {
  Out out;
  if constexpr (std::is_same_v<Out, f8>) {
    const bool by_line = task.call.row_major;
    const int64_t row = by_line ? i : j;
    const float scale = e4m3_scale(task.largest[row]);
    if ((by_line ? j : i) == 0) task.scales[row] = scale;
    narrow(static_cast<float>(v) / scale, out);
  } else {
    narrow(v, out);
  }
  return out;
}

// Lanes are dealt out one by one, so that a warp reads and writes neighbours.
template <class In, class Out, int N>
__device__ void pack_lanes(const Task& task, int64_t first_line, int64_t first_lane) {
  using T = compute_t<In>;
  const Call& call = task.call;
  const int64_t end = min(first_line + kLinesPerTile, call.out_lines);
  for (int k = 0; k < N; ++k) {
    const int64_t j = first_lane + k * kThreads + threadIdx.x;
    if (j >= call.out_lanes) return;
    const bool kept = j < call.kept_lanes;
    const int64_t lane = kept ? checked_index_at(call.lane_index, j, call.lanes) : 0;
    const T lane_gate = kept ? gate_at<T>(call.lane_gate, j) : T(0);
    for (int64_t i = first_line; i < end; ++i) {
      T v = T(0);
      if (kept && i < call.kept_lines) {
        const int64_t line = checked_index_at(call.line_index, i, call.lines);
        v = folded<T>(call, widen(static_cast<const In*>(task.src)[line * call.stride + lane]),
                      line, lane, gate_at<T>(call.line_gate, i), lane_gate);
      }
      static_cast<Out*>(task.dst)[i * call.out_lanes + j] = stored<T, Out>(task, v, i, j);
    }
  }
}

// Every lane kept, 16 bytes at a time: each thread owns N neighbours.
template <class In, class Out, int N>
__device__ void pack_whole(const Task& task, int64_t first_line, int64_t first_lane) {
  using T = compute_t<In>;
  const Call& call = task.call;
  const int64_t j = first_lane + static_cast<int64_t>(threadIdx.x) * N;
  if (j >= call.out_lanes) return;
  T lane_gate[N];
#pragma unroll
  for (int k = 0; k < N; ++k) lane_gate[k] = gate_at<T>(call.lane_gate, j + k);
  const int64_t end = min(first_line + kLinesPerTile, call.out_lines);
  for (int64_t i = first_line; i < end; ++i) {
    Pack<Out, N> out;
    if (i < call.kept_lines) {
      const int64_t line = checked_index_at(call.line_index, i, call.lines);
      const T line_gate = gate_at<T>(call.line_gate, i);
      const Pack<In, N> in = *reinterpret_cast<const Pack<In, N>*>(
          static_cast<const In*>(task.src) + line * call.stride + j);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        out.v[k] = stored<T, Out>(
            task, folded<T>(call, widen(in.v[k]), line, j + k, line_gate, lane_gate[k]), i, j + k);
      }
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) out.v[k] = stored<T, Out>(task, T(0), i, j + k);
    }
    *reinterpret_cast<Pack<Out, N>*>(static_cast<Out*>(task.dst) + i * call.out_lanes + j) = out;
  }
}

// A square of the result in the other majorness, turned in shared memory so that both sides are
// read and written in order.
template <class In, class Out>
__device__ void pack_crossed(const Task& task, int64_t first_line, int64_t first_lane) {
  using T = compute_t<In>;
  __shared__ Out square[kSide][kSide + 1];
  const Call& call = task.call;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  for (int row = y; row < kSide; row += kThreads / kSide) {
    const int64_t i = first_line + row, j = first_lane + x;
    if (i >= call.out_lines || j >= call.out_lanes) continue;
    T v = T(0);
    if (i < call.kept_lines && j < call.kept_lanes) {
      const int64_t line = checked_index_at(call.line_index, i, call.lines);
      const int64_t lane = checked_index_at(call.lane_index, j, call.lanes);
      v = value_at<In, T>(task, i, j, line, lane);
    }
    square[row][x] = stored<T, Out>(task, v, i, j);
  }
  __syncthreads();
  for (int row = y; row < kSide; row += kThreads / kSide) {
    const int64_t i = first_line + x, j = first_lane + row;
    if (i < call.out_lines && j < call.out_lanes) {
      static_cast<Out*>(task.dst)[j * call.out_lines + i] = square[x][row];
    }
  }
  __syncthreads();
}

// Lanes of one thread: as many as fill 16 bytes.
template <class In, class Out>
constexpr int kLanes = 16 / std::max(sizeof(In), sizeof(Out));

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pack_kernel(const __grid_constant__ Batch<Task> batch) {
  constexpr int N = kLanes<In, Out>;
  for (uint32_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    uint32_t local;
    const Task& task = batch.task_of(tile, local);
    const int64_t x = local % task.lane_tiles, y = local / task.lane_tiles;
    if (task.call.crossed) pack_crossed<In, Out>(task, y * kSide, x * kSide);
    else if (task.aligned) pack_whole<In, Out, N>(task, y * kLinesPerTile, x * kThreads * N);
    else pack_lanes<In, Out, N>(task, y * kLinesPerTile, x * kThreads * N);
  }
}

template <class In>
__device__ inline uint32_t magnitude_at(const Task& task, int64_t i, int64_t j) {
  const int64_t line = clamped_index_at(task.call.line_index, i, task.call.lines);
  const int64_t lane = clamped_index_at(task.call.lane_index, j, task.call.lanes);
  return magnitude_bits(value_at<In, compute_t<In>>(task, i, j, line, lane));
}

// e4m3, first pass: the largest magnitude of each row. A maximum does not depend on the order of
// its arguments, so neither do the bytes.
template <class In>
__global__ void __launch_bounds__(kThreads, kBlocks)
    largest_kernel(const __grid_constant__ Batch<Task> batch) {
  for (uint32_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    uint32_t local;
    const Task& task = batch.task_of(tile, local);
    const Call& call = task.call;
    const int64_t x = local % task.lane_tiles, y = local / task.lane_tiles;
    const int lanes = call.crossed ? kSide : kThreads * kLanes<In, f8>;
    const int lines = call.crossed ? kSide : kLinesPerTile;
    const int64_t line_end = min((y + 1) * lines, call.kept_lines);
    const int64_t lane_end = min((x + 1) * lanes, call.kept_lanes);
    if (call.row_major) {
      for (int64_t i = y * lines; i < line_end; ++i) {
        uint32_t of_line = 0;
        for (int64_t j = x * lanes + threadIdx.x; j < lane_end; j += kThreads) {
          of_line = max(of_line, magnitude_at<In>(task, i, j));
        }
        // Most threads find a larger value there already: reading it first saves their atomics.
        if (of_line > task.largest[i]) atomicMax(task.largest + i, of_line);
      }
    } else {
      for (int64_t j = x * lanes + threadIdx.x; j < lane_end; j += kThreads) {
        uint32_t of_lane = 0;
        for (int64_t i = y * lines; i < line_end; ++i) {
          of_lane = max(of_lane, magnitude_at<In>(task, i, j));
        }
        if (of_lane > task.largest[j]) atomicMax(task.largest + j, of_lane);
      }
    }
  }
}

// src [kept_lines, kept_lanes] -> dst [lines, lanes]. Threads own lanes of the full matrix and look
// their kept lane up once for every tile, so each element is written once, zeros included.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads, kBlocks)
    unpack_kernel(const __grid_constant__ Batch<Task> batch) {
  using T = compute_t<In>;
  for (uint32_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    uint32_t local;
    const Task& task = batch.task_of(tile, local);
    const Call& call = task.call;
    const int64_t lane = int64_t(local % task.lane_tiles) * kThreads + threadIdx.x;
    if (lane >= call.lanes) continue;
    const int64_t first = int64_t(local / task.lane_tiles) * kLinesPerTile;
    const int64_t end = min(first + kLinesPerTile, call.lines);
    const int64_t j = find(call.lane_index, call.kept_lanes, lane);
    const T lane_gate = j < 0 ? T(0) : gate_at<T>(call.lane_gate, j);
    for (int64_t l = first; l < end; ++l) {
      const int64_t i = find(call.line_index, call.kept_lines, l);
      Out out;
      narrow(T(0), out);
      if (i >= 0 && j >= 0) {
        const T v = widen(static_cast<const In*>(task.src)[i * call.stride + j]);
        const T line_gate = gate_at<T>(call.line_gate, i);
        narrow(call.lane_first ? (v * lane_gate) * line_gate : (v * line_gate) * lane_gate, out);
      }
      static_cast<Out*>(task.dst)[l * call.lanes + lane] = out;
    }
  }
}

using Kernel = void (*)(Batch<Task>);
struct Choice {
  Kernel kernel;
  int lanes;        // of a tile that is not crossed
  Kernel measure;   // the first pass of e4m3, else null
};

template <class In, class Out>
Choice chosen(bool adjoint) {
  if constexpr (std::is_same_v<Out, f8>) {
    return {pack_kernel<In, f8>, kThreads * kLanes<In, f8>, largest_kernel<In>};
  } else if constexpr (std::is_same_v<In, f8>) {
    return {unpack_kernel<f8, Out>, kThreads, nullptr};
  } else if (adjoint) {
    return {unpack_kernel<In, Out>, kThreads, nullptr};
  } else {
    return {pack_kernel<In, Out>, kThreads * kLanes<In, Out>, nullptr};
  }
}

template <class In>
Choice choose_out(bool adjoint, ScalarType out) {
  switch (out) {
    case ScalarType::Float: return chosen<In, float>(adjoint);
    case ScalarType::Double: return chosen<In, double>(adjoint);
    case ScalarType::Half: return chosen<In, f16>(adjoint);
    case ScalarType::BFloat16: return chosen<In, bf16>(adjoint);
    default:
      if constexpr (std::is_same_v<In, f8>) return {};
      else return chosen<In, f8>(adjoint);
  }
}

Choice choose(bool adjoint, ScalarType in, ScalarType out) {
  switch (in) {
    case ScalarType::Float: return choose_out<float>(adjoint, out);
    case ScalarType::Double: return choose_out<double>(adjoint, out);
    case ScalarType::Half: return choose_out<f16>(adjoint, out);
    case ScalarType::Float8_e4m3fn: return choose_out<f8>(adjoint, out);
    default: return choose_out<bf16>(adjoint, out);
  }
}

bool allows_16_bytes(const Call& call, const void* src, size_t in_size, const void* dst,
                     size_t out_size) {
  const int64_t lanes = 16 / static_cast<int64_t>(std::max(in_size, out_size));
  return !call.lane_index.data && call.kept_lanes == call.out_lanes &&
      call.kept_lanes % lanes == 0 && call.stride % lanes == 0 &&
      reinterpret_cast<uintptr_t>(src) % (lanes * in_size) == 0 &&
      reinterpret_cast<uintptr_t>(dst) % (lanes * out_size) == 0;
}

int64_t out_rows(const Call& call) { return call.row_major ? call.out_lines : call.out_lanes; }

int64_t tiles_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Run of multi_tensor.h.
std::tuple<Tensors, Tensors> run(const char* op, bool adjoint, const std::vector<Call>& calls,
                                 const Tensors& in, std::optional<ScalarType> dtype,
                                 const Results& results = {}) {
  Tensors out, scales;
  const bool e4m3 = dtype == ScalarType::Float8_e4m3fn;
  if (results.out) require_results(op, in, results, e4m3);
  if (in.empty()) return {out, scales};
  const Device device(in[0].get_device_index());
  std::optional<Tensor> largest;  // of every row of every matrix
  uint32_t* next_largest = nullptr;
  if (e4m3) {
    int64_t rows = 0;
    for (const Call& call : calls) rows += out_rows(call);
    largest = torch::stable::new_zeros(in[0], {rows}, ScalarType::Int);
    next_largest = static_cast<uint32_t*>(largest->mutable_data_ptr());
  }
  // One launch for each dtype, and for as many matrices as its parameters hold.
  std::vector<std::pair<ScalarType, Batch<Task>>> batches;
  for (size_t m = 0; m < in.size(); ++m) {
    const Call& call = calls[m];
    require(in[m].get_device_index() == in[0].get_device_index(), op,
            ": every matrix must be on the same device");
    const ScalarType in_type = in[m].scalar_type(), out_type = dtype.value_or(in_type);
    const int64_t lines = adjoint ? call.lines : call.out_lines;
    const int64_t lanes = adjoint ? call.lanes : call.out_lanes;
    const Where where = at_place(op, m);
    out.push_back(result(where, call, in[m], lines, lanes, out_type, results.out_of(m)));
    Task task = {call,    in[m].const_data_ptr(), out.back().mutable_data_ptr(),
                 nullptr, nullptr,                false,
                 0};
    if (e4m3) {
      scales.push_back(result_scales(where, call, in[m], results.scales_of(m)));
      task.scales = static_cast<float*>(scales.back().mutable_data_ptr());
      task.largest = next_largest;
      next_largest += out_rows(call);
      if (lanes == 0 || lines == 0) torch::stable::fill_(scales.back(), 1.0);
    }
    if (lines == 0 || lanes == 0) continue;
    task.aligned = allows_16_bytes(call, task.src, in[m].element_size(), task.dst,
                                   out.back().element_size());
    const Choice choice = choose(adjoint, in_type, out_type);
    task.lane_tiles =
        static_cast<uint32_t>(tiles_of(lanes, call.crossed ? kSide : choice.lanes));
    const int64_t tiles = int64_t(task.lane_tiles) * tiles_of(lines, call.crossed ? kSide : kLinesPerTile);
    auto batch = std::find_if(batches.rbegin(), batches.rend(),
                              [&](const auto& other) { return other.first == in_type; });
    if (batch == batches.rend() || !batch->second.add(task, tiles)) {
      batches.emplace_back(in_type, Batch<Task>());
      batches.back().second.add(task, tiles);
    }
  }
  for (const auto& [in_type, batch] : batches) {
    const Choice choice = choose(adjoint, in_type, dtype.value_or(in_type));
    if (choice.measure) launch(op, choice.measure, batch, device);
    launch(op, choice.kernel, batch, device);
  }
  return {out, scales};
}

Tensor fold_pack_cuda(const Tensor& w, const OptTensor& rows, const OptTensor& cols,
                      const OptTensor& z_out, const OptTensor& z_in,
                      std::optional<ScalarType> dtype, bool /*stream*/) {
  const Where where{"fold_pack"};
  const Call call = describe_pack(where, w, rows, cols, z_out, z_in, dtype);
  return std::get<0>(run(where.op, false, {call}, {w}, dtype))[0];
}

Tensor pack_rows_cuda(const Tensor& w, const Tensor& rows) {
  return fold_pack_cuda(w, rows, {}, {}, {}, {}, false);
}

Tensor fold_pack_adjoint_cuda(const Tensor& g, const OptTensor& rows, const OptTensor& cols,
                              const OptTensor& z_out, const OptTensor& z_in, int64_t O, int64_t I,
                              std::optional<ScalarType> dtype) {
  const Where where{"fold_pack_adjoint"};
  const Call call = describe_adjoint(where, g, rows, cols, z_out, z_in, O, I, dtype);
  return std::get<0>(run(where.op, true, {call}, {g}, dtype))[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatepack, CUDA, m) {
  m.impl("fold_pack", TORCH_BOX(&fold_pack_cuda));
  m.impl("pack_rows", TORCH_BOX(&pack_rows_cuda));
  m.impl("fold_pack_adjoint", TORCH_BOX(&fold_pack_adjoint_cuda));
  m.impl("pack_tensors", TORCH_BOX(&pack_tensors<run>));
  m.impl("pack_tensors_out", TORCH_BOX(&pack_tensors_out<run>));
  m.impl("unpack_tensors", TORCH_BOX(&unpack_tensors<run>));
  m.impl("unpack_tensors_out", TORCH_BOX(&unpack_tensors_out<run>));
}

}  // namespace gatepack
