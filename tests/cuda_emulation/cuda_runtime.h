// CUDA's execution model on the host, for the tests: the kernels of csrc/cuda compile with a C++ compiler
// against this header and run, one block after another, each thread a context of its own. It shows wrong
// answers, missing barriers, divergent collectives and deadlocks; it shows nothing of speed, and nothing of
// memory ordering between blocks.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
// Waits for the warp or the block; the value that lane (or, for `any`, every thread) gave at this barrier.
uint64_t exchange(uint64_t mine, int lane);
bool any(bool mine);
}  // namespace emulation

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  return emulation::run(*config, [&] { kernel(args...); });
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

inline void __syncthreads() { emulation::any(false); }
inline int __syncthreads_or(int mine) { return emulation::any(mine != 0); }
inline void __syncwarp() { emulation::exchange(0, 0); }

template <class T>
T __shfl_sync(unsigned, T mine, int lane) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof mine);
  bits = emulation::exchange(bits, lane & 31);
  std::memcpy(&mine, &bits, sizeof mine);
  return mine;
}
template <class T>
T __shfl_xor_sync(unsigned all, T mine, int mask) {
  return __shfl_sync(all, mine, static_cast<int>(threadIdx.x % 32) ^ mask);
}

inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(3.14159265358979323846 * x), *cosine = std::cos(3.14159265358979323846 * x);
}
