// Enough of CUDA to run csrc/*.cu on a CPU, under its sanitizers: a kernel's threads are threads of
// the system, one block after the other, and __syncthreads is a barrier. Forced into each .cu in
// place of the CUDA headers; its ops are registered for CPU tensors as gatepack_on_cpu.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <tuple>
#include <vector>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#define gatepack gatepack_on_cpu
#define CUDA CPU
#define DeviceGuard NoGuard

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define CUDART_VERSION 13000

using std::max;
using std::min;

struct dim3 {
  dim3(unsigned n = 1) : x(n) {}
  unsigned x;
};
inline thread_local dim3 blockIdx, threadIdx, gridDim;
inline pthread_barrier_t cuda_block;

inline void __syncthreads() { pthread_barrier_wait(&cuda_block); }
[[noreturn]] inline void __trap() { std::abort(); }
inline void atomicMax(uint32_t* at, uint32_t value) {
  uint32_t seen = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (seen < value &&
         !__atomic_compare_exchange_n(at, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 16;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline void cudaDeviceGetAttribute(int* value, int, int) { *value = 2; }
template <class Kernel>
void cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
}
// Declared by torch where it is built with CUDA.
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const unsigned threads = config->blockDim.x;
  pthread_barrier_init(&cuda_block, nullptr, threads);
  std::vector<std::thread> block;
  for (unsigned t = 0; t < threads; ++t) {
    block.emplace_back([&, t] {
      threadIdx = dim3(t);
      gridDim = config->gridDim;
      for (unsigned b = 0; b < gridDim.x; ++b) {
        blockIdx = dim3(b);
        kernel(arguments...);
        __syncthreads();
      }
    });
  }
  for (std::thread& thread : block) thread.join();
  pthread_barrier_destroy(&cuda_block);
  return cudaSuccess;
}
