// Dropout masks, format 1, on CUDA: bit for bit those of the CPU.
#include <cuda_runtime.h>

#include <stdexcept>

#include "kernels.hpp"
#include "philox.hpp"

namespace dropscope {
namespace {

__global__ void keep_mask_kernel(uint8_t* out, int64_t rows, int64_t units, MaskSource source) {
  const PhiloxKey key(source.seed, source.site);
  const int64_t blocks = (units + 7) / 8, total = rows * blocks;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < total;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = i / blocks, block = i - row * blocks;
    const uint32_t bits =
        keep_bits(philox(static_cast<uint32_t>(block), source.streams[row], key), source.threshold);
    for (int64_t j = 0; j < 8 && block * 8 + j < units; ++j)
      out[row * units + block * 8 + j] = (bits >> j) & 1;
  }
}

void keep_mask(uint8_t* out, int64_t rows, int64_t units, MaskSource source, Launch launch) {
  if (rows == 0 || units == 0) return;
  keep_mask_kernel<<<1024, 256, 0, static_cast<cudaStream_t>(launch.stream)>>>(out, rows, units, source);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

}  // namespace

namespace cuda {
bool built() { return true; }
const Kernels& kernels() {
  static const Kernels table{{nullptr, keep_mask}, {}, {}};
  return table;
}
}  // namespace cuda

}  // namespace dropscope
