// open_sets and remap_ids on CUDA: one launch each, no host sync.
#include "batch.cuh"
#include "open_sets.h"

namespace gatepack {
namespace {

struct Mask {
  const bool* open;
  int32_t* out;
  int32_t n;
};

// Sum of `value` over the threads up to this one, and over all of them in `total`.
__device__ int32_t inclusive_sum(int32_t value, int32_t& total) {
  __shared__ int32_t sums[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  sums[t] = value;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const int32_t before = t >= step ? sums[t - step] : 0;
    __syncthreads();
    sums[t] += before;
    __syncthreads();
  }
  total = sums[kThreads - 1];
  const int32_t sum = sums[t];
  __syncthreads();
  return sum;
}

// A block for each mask: it counts, then walks the units once more and gives each its slot.
__global__ void __launch_bounds__(kThreads)
    open_sets_kernel(const __grid_constant__ Batch<Mask> batch) {
  const int t = static_cast<int>(threadIdx.x);
  for (uint32_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    uint32_t local;
    const Mask& mask = batch.task_of(tile, local);
    int32_t mine = 0, count, chunk;
    for (int32_t unit = t; unit < mask.n; unit += kThreads) mine += mask.open[unit];
    inclusive_sum(mine, count);
    int32_t open_before = 0;
    for (int32_t first = 0; first < mask.n; first += kThreads) {
      const int32_t unit = first + t;
      const bool is_open = unit < mask.n && mask.open[unit];
      const int32_t until = open_before + inclusive_sum(is_open, chunk);
      if (unit < mask.n) mask.out[is_open ? until - 1 : count + unit - until] = unit;
      open_before += chunk;
    }
    if (t == 0) mask.out[mask.n] = count;
  }
}

Tensors open_sets_cuda(const Tensors& masks) {
  check_masks(masks);
  Tensors out;
  if (masks.empty()) return out;
  const Device device(masks[0].get_device_index());
  Batch<Mask> batch;
  for (const Tensor& mask : masks) {
    out.push_back(new_open_set(mask));
    const Mask task = {static_cast<const bool*>(mask.const_data_ptr()),
                       static_cast<int32_t*>(out.back().mutable_data_ptr()),
                       static_cast<int32_t>(mask.numel())};
    if (!batch.add(task, 1)) {
      launch("open_sets", open_sets_kernel, batch, device);
      batch = Batch<Mask>();
      batch.add(task, 1);
    }
  }
  launch("open_sets", open_sets_kernel, batch, device);
  return out;
}

struct Remap {
  const void* ids;
  void* out;
  const int32_t* table;
  int64_t n, size;
};

template <class Id>
__global__ void __launch_bounds__(kThreads)
    remap_ids_kernel(const __grid_constant__ Batch<Remap> batch) {
  const Remap& task = batch.tasks[0];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < task.n;
       i += stride) {
    const int64_t id = static_cast<const Id*>(task.ids)[i];
    const int32_t name = id >= 0 && id < task.size ? task.table[id] : -1;
    if (name < 0) {
      printf("remap_ids: ids must be kept ones in [0, %lld), got %lld at position %lld\n",
             static_cast<long long>(task.size), static_cast<long long>(id),
             static_cast<long long>(i));
      __trap();
    }
    static_cast<Id*>(task.out)[i] = name;
  }
}

Tensor remap_ids_cuda(const Tensor& ids, const Tensor& table) {
  check_remap(ids, table);
  const Device device(ids.get_device_index());
  Tensor out = torch::stable::new_empty(ids, ids.sizes(), ids.scalar_type());
  Batch<Remap> batch;
  batch.add({ids.const_data_ptr(), out.mutable_data_ptr(),
             static_cast<const int32_t*>(table.const_data_ptr()), ids.numel(), table.numel()},
            (ids.numel() + kThreads - 1) / kThreads);
  const bool wide = ids.scalar_type() == ScalarType::Long;
  launch("remap_ids", wide ? remap_ids_kernel<int64_t> : remap_ids_kernel<int32_t>, batch, device);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatepack, CUDA, m) {
  m.impl("open_sets", TORCH_BOX(&open_sets_cuda));
  m.impl("remap_ids", TORCH_BOX(&remap_ids_cuda));
}

}  // namespace gatepack
