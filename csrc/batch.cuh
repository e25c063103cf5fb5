// One launch for many tasks: they travel as the parameter of a kernel whose blocks walk their tiles.
#pragma once

#include "layout.h"

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

namespace gatepack {

constexpr int kThreads = 256;

// Up to as many tasks as fit the parameters of a kernel (4 KiB before CUDA 12.1).
template <class Task>
struct Batch {
#if CUDART_VERSION >= 12010
  static constexpr int kParameterBytes = 32000;
#else
  static constexpr int kParameterBytes = 4000;
#endif
  static constexpr int kMost = kParameterBytes / static_cast<int>(sizeof(Task) + sizeof(uint32_t));
  static constexpr int64_t kMostTiles = 1 << 30;

  // 32 bits, because a division of 64 is a call, and calls make kernels spill.
  int count = 0;
  uint32_t tiles = 0;
  uint32_t first_tile[kMost];
  Task tasks[kMost];

  // False when the batch is full.
  bool add(const Task& task, int64_t tiles_of_task) {
    if (count == kMost || tiles_of_task > kMostTiles - tiles) return false;
    first_tile[count] = tiles;
    tasks[count++] = task;
    tiles += static_cast<uint32_t>(tiles_of_task);
    return true;
  }

  // The task that a tile belongs to, and the tile's number in it.
  __device__ const Task& task_of(uint32_t tile, uint32_t& local) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_tile[middle] <= tile) low = middle;
      else high = middle - 1;
    }
    local = tile - first_tile[low];
    return tasks[low];
  }
};

// The device and stream that torch would use, until the end of the scope.
class Device {
 public:
  explicit Device(int32_t index) : guard_(index) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
  }

  cudaStream_t stream;
  int processors = 1;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Persistent: as many blocks as the device holds at once walk over all tiles.
template <class Task>
void launch(const char* op, void (*kernel)(Batch<Task>), const Batch<Task>& batch,
            const Device& device) {
  if (batch.tiles == 0) return;
  int blocks = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
  const int64_t most = static_cast<int64_t>(device.processors) * std::max(blocks, 1);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(batch.tiles, most)));
  config.blockDim = dim3(kThreads);
  config.stream = device.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, batch);
  STD_TORCH_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace gatepack
