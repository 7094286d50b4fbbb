// Launches: a grid that strides over the work, on the caller's stream, never waiting for the device.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dropscope {
namespace {

constexpr int threads_per_block = 256;

inline unsigned blocks_for(int64_t threads) {
  constexpr int64_t most = 4096;  // fills the largest devices several times over
  const int64_t blocks = (threads + threads_per_block - 1) / threads_per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

inline void check_launch(const char* name) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

}  // namespace
}  // namespace dropscope
