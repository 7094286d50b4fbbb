// Dropout masks, format 1, on CUDA: the bits of the CPU.
#include "cuda/counters.cuh"

namespace dropscope {
namespace {

// out = x o mask * scale, V elements a load; a lane makes two counters before it stores where
// one asks for a single load.
template <class T, int V>
__global__ void __launch_bounds__(threads_per_block, V == 8   ? 4
                                                     : V == 1 ? 2
                                                              : 3)
    apply_kernel(const T* x, int64_t x_stride, RowSharing sharing, T* out, int64_t out_stride, int64_t units,
                 Wide<T> scale, MaskSource source, Walk walk) {
  constexpr int rounds = V == 8 ? 2 : 1;
  constexpr int vectors = 8 / V;
  const PhiloxKey key(source.seed, source.site);
  const int lane = threadIdx.x % 32;
  int64_t i = global_thread();
  Place place(i, walk);
  while (i - lane < walk.total) {  // a warp stays together
    Pack<T, V> packs[rounds][vectors];
    int64_t to[rounds][vectors];
    int left[rounds][vectors];
    uint64_t stream[rounds];
    uint32_t block[rounds];
#pragma unroll
    for (int r = 0; r < rounds; ++r, i += walk.stride, place.advance(walk)) {
      const bool active = i < walk.total;
      const int64_t unit = place.col * 8, rest = active ? units - unit : 0;
      const int count = rest < 8 ? static_cast<int>(rest) : 8;
      const int64_t x_row = sharing.group == 1 ? place.row : (sharing.skip + place.row) / sharing.group;
      block[r] = static_cast<uint32_t>(place.col);
      stream[r] = active ? static_cast<uint64_t>(source.streams[place.row]) : 0;
#pragma unroll
      for (int k = 0; k < vectors; ++k) {
        const Share<V> share(k);
        const int64_t from = share.of(x_row * x_stride + unit) + share.unit;
        to[r][k] = share.of(place.row * out_stride + unit) + share.unit;
        left[r][k] = share.of(count) - share.unit;
        if (left[r][k] > 0) packs[r][k] = load<V>(x + from, left[r][k]);
      }
    }
#pragma unroll
    for (int r = 0; r < rounds; ++r) {
      const uint32_t bits = keep_bits(philox(block[r], stream[r], key), source.threshold);
#pragma unroll
      for (int k = 0; k < vectors; ++k) {
        const Share<V> share(k);
        const uint32_t mine = share.of(bits) >> share.unit;
        Pack<T, V> result;
#pragma unroll
        for (int e = 0; e < V; ++e)
          result.x[e] = mine >> e & 1 ? narrow<Wide<T>, T>(widen(packs[r][k].x[e]) * scale) : T{};
        if (left[r][k] > 0) store<V>(out + to[r][k], left[r][k], result);
      }
    }
  }
}

template <class T>
void apply(ConstMatrix x, RowSharing sharing, Matrix out, MaskSource source, void* stream) {
  const auto scale = static_cast<Wide<T>>(65536.0 / source.threshold);
  const unsigned grid = blocks_for(out.rows * divide_up(out.cols, 8));
  by_width<widest_of<T>>(alignment_of(x) | alignment_of(out), [&](auto width) {
    launch("apply_mask", stream, grid, apply_kernel<T, decltype(width)::value>, static_cast<const T*>(x.data),
           x.stride, sharing, static_cast<T*>(out.data), out.stride, out.cols, scale, source,
           counters(out.rows, out.cols, grid));
  });
}

void apply_mask(ConstMatrix x, RowSharing sharing, Matrix out, MaskSource source, Launch launch) {
  if (out.rows == 0 || out.cols == 0) return;
  if (x.dtype == DType::f16) return apply<__half>(x, sharing, out, source, launch.stream);
  by_dtype(x.dtype, [&](auto type) { apply<decltype(type)>(x, sharing, out, source, launch.stream); });
}

void keep_mask(uint8_t* out, int64_t rows, int64_t units, MaskSource source, Launch launch) {
  fill<uint8_t>("keep_mask", out, rows, units, 1, 0, source, 0, launch.stream);
}

}  // namespace

namespace cuda {
const MaskKernels masks{apply_mask, keep_mask};
}

}  // namespace dropscope
