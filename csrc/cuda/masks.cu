// Dropout masks, format 1, on CUDA: the bits of the CPU. A thread makes one counter and uses its eight units.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.cuh"
#include "kernels.hpp"
#include "philox.hpp"

namespace dropscope {
namespace {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }

template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

template <class T>
struct alignas(16) Eight {
  T x[8];
};

// A position (row, block) that strides over all counters with one division, on the host.
struct Walk {
  int64_t total, blocks, row_step, block_step;

  __device__ int64_t first() const { return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; }
  __device__ int64_t stride() const { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
  __device__ void advance(int64_t& row, int64_t& block) const {
    row += row_step;
    block += block_step;
    if (block >= blocks) block -= blocks, ++row;
  }
};

Walk walk(int64_t rows, int64_t units, unsigned grid) {
  const int64_t blocks = (units + 7) / 8, stride = static_cast<int64_t>(grid) * threads_per_block;
  return {rows * blocks, blocks, stride / blocks, stride % blocks};
}

// x: (rows, units) with row stride x_stride; out likewise. `vector`: rows start at multiples of 16 bytes.
template <class T>
__global__ void apply_kernel(const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t units,
                             bool vector, typename Wide<T>::type scale, MaskSource source, Walk walk) {
  const PhiloxKey key(source.seed, source.site);
  const T zero{};
  int64_t i = walk.first();
  int64_t row = i / walk.blocks, block = i - row * walk.blocks;
  for (; i < walk.total; i += walk.stride(), walk.advance(row, block)) {
    const uint32_t bits =
        keep_bits(philox(static_cast<uint32_t>(block), static_cast<uint64_t>(source.streams[row]), key),
                  source.threshold);
    const T* from = x + row * x_stride + block * 8;
    T* to = out + row * out_stride + block * 8;
    const int64_t count = units - block * 8;
    if (vector && count >= 8) {
      Eight<T> eight = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        narrow(widen(eight.x[j]) * scale, eight.x[j]);
        if (!(bits >> j & 1)) eight.x[j] = zero;
      }
      *reinterpret_cast<Eight<T>*>(to) = eight;
    } else {
      for (int j = 0; j < 8 && j < count; ++j) {
        T product;
        narrow(widen(from[j]) * scale, product);
        to[j] = bits >> j & 1 ? product : zero;
      }
    }
  }
}

template <class T>
bool starts_aligned(const void* data, int64_t rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride * sizeof(T) % 16 == 0);
}

template <class T>
void apply(ConstMatrix x, Matrix out, MaskSource source, void* stream) {
  const auto scale = static_cast<typename Wide<T>::type>(65536.0 / source.threshold);
  const unsigned grid = blocks_for(x.rows * ((x.cols + 7) / 8));
  const bool vector =
      starts_aligned<T>(x.data, x.rows, x.stride) && starts_aligned<T>(out.data, x.rows, out.stride);
  apply_kernel<T><<<grid, threads_per_block, 0, stream_of(stream)>>>(
      static_cast<const T*>(x.data), x.stride, static_cast<T*>(out.data), out.stride, x.cols, vector, scale,
      source, walk(x.rows, x.cols, grid));
  check_launch("apply_mask");
}

void apply_mask(ConstMatrix x, Matrix out, MaskSource source, Launch launch) {
  if (x.rows == 0 || x.cols == 0) return;
  switch (x.dtype) {
    case DType::f32:
      return apply<float>(x, out, source, launch.stream);
    case DType::f64:
      return apply<double>(x, out, source, launch.stream);
    case DType::bf16:
      return apply<__nv_bfloat16>(x, out, source, launch.stream);
    case DType::f16:
      return apply<__half>(x, out, source, launch.stream);
  }
}

__global__ void keep_kernel(uint8_t* out, int64_t units, MaskSource source, Walk walk) {
  const PhiloxKey key(source.seed, source.site);
  int64_t i = walk.first();
  int64_t row = i / walk.blocks, block = i - row * walk.blocks;
  for (; i < walk.total; i += walk.stride(), walk.advance(row, block)) {
    const uint32_t bits =
        keep_bits(philox(static_cast<uint32_t>(block), static_cast<uint64_t>(source.streams[row]), key),
                  source.threshold);
    uint8_t* to = out + row * units + block * 8;
    if (units % 8 == 0) {
      *reinterpret_cast<uint64_t*>(to) = spread(bits);
    } else {
      for (int j = 0; j < 8 && block * 8 + j < units; ++j) to[j] = bits >> j & 1;
    }
  }
}

void keep_mask(uint8_t* out, int64_t rows, int64_t units, MaskSource source, Launch launch) {
  if (rows == 0 || units == 0) return;
  const unsigned grid = blocks_for(rows * ((units + 7) / 8));
  keep_kernel<<<grid, threads_per_block, 0, stream_of(launch.stream)>>>(out, units, source,
                                                                        walk(rows, units, grid));
  check_launch("keep_mask");
}

}  // namespace

namespace cuda {

bool built() { return true; }

const Kernels& kernels() {
  static const Kernels table{{apply_mask, keep_mask}, {}, {}};
  return table;
}

}  // namespace cuda

}  // namespace dropscope
