// Launches on the caller's stream that never wait for the device, and the walk of a grid over its work.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dropscope {
namespace {

constexpr int threads_per_block = 256, warps_per_block = threads_per_block / 32;

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks of a grid, with its blocks striding over the work beyond them. Many waves of blocks keep the
// last one, which leaves multiprocessors idle, short. The emulation of the tests takes few, so that blocks do
// stride.
#ifndef DROPSCOPE_MOST_BLOCKS
#define DROPSCOPE_MOST_BLOCKS (1 << 14)
#endif
inline unsigned at_most(int64_t blocks) {
  constexpr int64_t most = DROPSCOPE_MOST_BLOCKS;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}
inline unsigned blocks_for(int64_t threads) { return at_most(divide_up(threads, threads_per_block)); }

template <class... Parameters, class... Args>
void launch(const char* name, void* stream, dim3 grid, void (*kernel)(Parameters...), Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads_per_block);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...);
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is told here, not to whoever asks next
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("dropscope: no CUDA device");
  }
  return count;
}

__device__ inline int64_t global_thread() {
  return blockIdx.x * static_cast<int64_t>(threads_per_block) + threadIdx.x;
}

// Places (row, middle, col) of a box, numbered with col fastest, that a thread visits `stride` apart: one
// division at the start, carries after it.
struct Walk {
  int64_t total, middles, cols, stride, row_step, middle_step, col_step;

  Walk(int64_t rows, int64_t middles_, int64_t cols_, int64_t stride_)
      : total(rows * middles_ * cols_),
        middles(middles_),
        cols(cols_),
        stride(stride_),
        row_step(stride / (middles * cols)),
        middle_step(stride / cols % middles),
        col_step(stride % cols) {}
};

struct Place {
  int64_t row, middle, col;

  __device__ Place(int64_t number, const Walk& walk)
      : row(number / (walk.middles * walk.cols)),
        middle(number / walk.cols % walk.middles),
        col(number % walk.cols) {}

  __device__ void advance(const Walk& walk) {
    row += walk.row_step, middle += walk.middle_step, col += walk.col_step;
    if (col >= walk.cols) col -= walk.cols, ++middle;
    if (middle >= walk.middles) middle -= walk.middles, ++row;
  }
};

// The sum over the `width` threads that share threadIdx.x / width, a power of two up to 32, in each of them.
__device__ inline double sum_lanes(double x, int width = 32) {
  for (int half = width / 2; half > 0; half /= 2) x += __shfl_xor_sync(0xffffffffu, x, half);
  return x;
}

// The sum over the block in thread 0; every thread calls it.
__device__ inline double sum_block(double x) {
  __shared__ double sums[warps_per_block];
  x = sum_lanes(x);
  __syncthreads();  // the sums of the call before are read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < warps_per_block; ++warp) total += sums[warp];
  return total;
}

}  // namespace
}  // namespace dropscope
