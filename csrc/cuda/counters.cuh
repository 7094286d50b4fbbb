// Philox counters over a warp. A lane makes one counter, the bits of eight units, and the warp's memory is
// then cut into vectors that lie side by side over the lanes: a lane stores what its neighbour's bits decide.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"
#include "philox.hpp"

namespace dropscope {
namespace {

// The counters of a matrix: those of a row are its columns eight by eight. A warp's 32 are consecutive; a
// thread visits them `stride` apart.
struct Counters {
  int64_t total, cols, stride, row_step, col_step;

  Counters(int64_t rows, int64_t units, unsigned grid)
      : total(rows * divide_up(units, 8)),
        cols(divide_up(units, 8)),
        stride(static_cast<int64_t>(grid) * threads_per_block),
        row_step(stride / cols),
        col_step(stride % cols) {}
};

struct Counter {
  int64_t row, col;

  __device__ Counter(int64_t number, const Counters& all)
      : row(number / all.cols), col(number - row * all.cols) {}

  // Whether it went one row further than row_step.
  __device__ bool advance(const Counters& all) {
    row += all.row_step, col += all.col_step;
    const bool further = col >= all.cols;
    if (further) col -= all.cols, ++row;
    return further;
  }
};

// The keys of the ten rounds, made by the host: the kernel's parameters, where an operation reads them at no
// cost, instead of two additions a round.
struct RoundKeys {
  uint32_t k0[10], k1[10], site;

  RoundKeys(uint64_t seed, uint64_t site_) {
    PhiloxKey key(seed, site_);
    for (int round = 0; round < 10; ++round, key.k0 += philox_w0, key.k1 += philox_w1)
      k0[round] = key.k0, k1[round] = key.k1;
    site = key.site;
  }
};

// philox.hpp's function.
__device__ inline Words philox(uint32_t block, uint64_t stream, const RoundKeys& keys) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(stream), c2 = static_cast<uint32_t>(stream >> 32),
           c3 = keys.site;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(philox_m0) * c0, p1 = static_cast<uint64_t>(philox_m1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys.k0[round];
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys.k1[round];
    c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

// Whether lane j is below the threshold, which is given in the upper half of `top`: one comparison, and for
// a lower half a shift that the multiplier makes.
__device__ inline bool kept(const Words& words, int j, uint32_t top) {
  const uint32_t word = words.w[j >> 1];
  return (j & 1 ? word : word << 16) < top;
}
__device__ inline uint32_t kept_bits(const Words& words, uint32_t top) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) bits |= kept(words, j, top) ? 1u << j : 0u;
  return bits;
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

// out[row, unit] = one where the unit is kept, else the other; stream is that of every row without streams.
template <class T, int V>
__global__ void fill_kernel(T* out, int64_t stride, int64_t units, T one, T other, const int64_t* streams,
                            uint64_t stream, uint32_t top, RoundKeys keys, Counters all) {
  const int lane = threadIdx.x % 32;
  int64_t i = global_thread();
  for (Counter place(i, all); i - lane < all.total; i += all.stride, place.advance(all)) {
    const int64_t unit = place.col * 8;
    const int count = i >= all.total ? 0 : units - unit < 8 ? static_cast<int>(units - unit) : 8;
    uint32_t bits = 0;
    if (count) {
      const uint64_t id = streams ? static_cast<uint64_t>(streams[place.row]) : stream;
      bits = kept_bits(philox(static_cast<uint32_t>(place.col), id, keys), top);
    }
#pragma unroll
    for (int k = 0; k < 8 / V; ++k) {
      const Share<V> share(k);
      const uint32_t mine = share.of(bits) >> share.unit;
      const int64_t to = share.of(place.row * stride + unit) + share.unit;
      Pack<T, V> pack;
#pragma unroll
      for (int e = 0; e < V; ++e) pack.x[e] = mine >> e & 1 ? one : other;
      const int left = share.of(count) - share.unit;
      if (left > 0) store<V>(out + to, left, pack);
    }
  }
}

template <class T>
void fill(const char* name, T* out, int64_t rows, int64_t units, T one, T other, MaskSource source,
          uint64_t stream, void* queue) {
  if (rows == 0 || units == 0) return;
  const unsigned grid = blocks_for(rows * divide_up(units, 8));
  by_width<(widest_of<T> < 8 ? widest_of<T> : 8)>(alignment_of(out, rows, units, sizeof(T)), [&](auto width) {
    launch(name, queue, grid, fill_kernel<T, decltype(width)::value>, out, units, units, one, other,
           source.streams, stream, source.threshold << 16, RoundKeys(source.seed, source.site),
           Counters(rows, units, grid));
  });
}

}  // namespace
}  // namespace dropscope
