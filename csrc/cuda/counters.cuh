// Philox counters over a warp. A lane makes one counter, the bits of eight units, and the warp's memory is
// then cut into vectors that lie side by side over the lanes: a lane stores what its neighbour's bits decide.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"
#include "philox.hpp"

namespace dropscope {
namespace {

// The counters of a matrix: those of a row are its columns eight by eight. A warp's 32 are consecutive.
inline Walk counters(int64_t rows, int64_t units, unsigned grid) {
  return Walk(rows, 1, divide_up(units, 8), static_cast<int64_t>(grid) * threads_per_block);
}

// Where vector k of a lane lies: `unit` of the counter that lane `owner` made.
template <int V>
struct Share {
  int owner, unit;

  __device__ explicit Share(int k) {
    constexpr int vectors = 8 / V;  // a counter
    const int place = threadIdx.x % 32 + 32 * k;
    owner = place / vectors, unit = place % vectors * V;
  }
  template <class T>
  __device__ T of(T mine) const {
    return V == 8 ? mine : __shfl_sync(0xffffffffu, mine, owner);
  }
};

// out[row, unit] = kept or dropped, as the bit of the unit says.
template <class T, int V>
__global__ void fill_kernel(T* out, int64_t stride, int64_t units, T kept, T dropped, MaskSource source,
                            uint64_t stream, Walk walk) {
  const PhiloxKey key(source.seed, source.site);
  const int lane = threadIdx.x % 32;
  int64_t i = global_thread();
  for (Place place(i, walk); i - lane < walk.total; i += walk.stride, place.advance(walk)) {
    const int64_t unit = place.col * 8;
    const int count = i >= walk.total ? 0 : units - unit < 8 ? static_cast<int>(units - unit) : 8;
    uint32_t bits = 0;
    if (count) {
      const uint64_t id = source.streams ? static_cast<uint64_t>(source.streams[place.row]) : stream;
      bits = keep_bits(philox(static_cast<uint32_t>(place.col), id, key), source.threshold);
    }
#pragma unroll
    for (int k = 0; k < 8 / V; ++k) {
      const Share<V> share(k);
      const uint32_t mine = share.of(bits) >> share.unit;
      const int64_t to = share.of(place.row * stride + unit) + share.unit;
      Pack<T, V> pack;
#pragma unroll
      for (int e = 0; e < V; ++e) pack.x[e] = mine >> e & 1 ? kept : dropped;
      const int left = share.of(count) - share.unit;
      if (left > 0) store<V>(out + to, left, pack);
    }
  }
}

template <class T>
void fill(const char* name, T* out, int64_t rows, int64_t units, T kept, T dropped, MaskSource source,
          uint64_t stream, void* queue) {
  if (rows == 0 || units == 0) return;
  const unsigned grid = blocks_for(rows * divide_up(units, 8));
  by_width<(widest_of<T> < 8 ? widest_of<T> : 8)>(alignment_of(out, rows, units, sizeof(T)), [&](auto width) {
    launch(name, queue, grid, fill_kernel<T, decltype(width)::value>, out, units, units, kept, dropped,
           source, stream, counters(rows, units, grid));
  });
}

}  // namespace
}  // namespace dropscope
