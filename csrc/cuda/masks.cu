// Dropout masks, format 1, on CUDA: the bits of the CPU.
#include "cuda/counters.cuh"

namespace dropscope {
namespace {

// x * scale where keep(e), else +0; elements of two bytes by pairs.
template <class T, int V, class Keep>
__device__ inline Pack<T, V> masked(const Pack<T, V>& x, Wide<T> scale, const Keep& keep) {
  Pack<T, V> result;
  if constexpr (sizeof(T) == 2 && V > 1) {
#pragma unroll
    for (int e = 0; e < V; e += 2) {
      const uint32_t pair = narrow_pair(widen(x.x[e]) * scale, widen(x.x[e + 1]) * scale, T{}) &
                            ((keep(e) ? 0xFFFFu : 0u) | (keep(e + 1) ? 0xFFFF0000u : 0u));
      memcpy(&result.x[e], &pair, sizeof pair);
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) result.x[e] = keep(e) ? narrow<Wide<T>, T>(widen(x.x[e]) * scale) : T{};
  }
  return result;
}

// Rows of out that share a row of x, and the steps in x of a thread's step in out: carries, no division.
struct SharedRows {
  int64_t group, skip, row_step, rest_step;

  SharedRows(RowSharing sharing, const Counters& all)
      : group(sharing.group),
        skip(sharing.skip),
        row_step(all.row_step / group),
        rest_step(all.row_step % group) {}
};

struct SharedRow {
  int64_t row, rest;

  __device__ SharedRow(int64_t out_row, const SharedRows& all)
      : row((all.skip + out_row) / all.group), rest(all.skip + out_row - row * all.group) {}

  __device__ void advance(bool further, const SharedRows& all) {
    row += all.row_step, rest += all.rest_step + further;
    if (rest >= all.group) rest -= all.group, ++row;
  }
};

// out = x o mask * scale, V elements a load; `whole`: no row ends inside a vector; `shared`: rows of x serve
// several of out. A lane makes two counters before it stores where one asks for a single load.
template <class T, int V, bool whole, bool shared>
__global__ void __launch_bounds__(threads_per_block, V == 1 || (V == 8 && !whole) ? 2
                                                     : V == 8                     ? 4
                                                                                  : 3)
    apply_kernel(const T* x, int64_t x_stride, SharedRows sharing, T* out, int64_t out_stride, int64_t units,
                 Wide<T> scale, const int64_t* streams, uint32_t top, RoundKeys keys, Counters all) {
  constexpr int rounds = V == 8 ? 2 : 1;
  constexpr int vectors = 8 / V;
  const int lane = threadIdx.x % 32;
  int64_t i = global_thread();
  Counter place(i, all);
  SharedRow origin(shared ? place.row : 0, sharing);
  while (i - lane < all.total) {  // a warp stays together
    Pack<T, V> packs[rounds][vectors];
    int64_t to[rounds][vectors];
    int left[rounds][vectors];
    uint64_t stream[rounds];
    uint32_t block[rounds];
#pragma unroll
    for (int r = 0; r < rounds; ++r, i += all.stride) {
      const bool active = i < all.total;
      const int64_t unit = place.col * 8, rest = !active ? 0 : whole && V == 8 ? 8 : units - unit;
      const int count = rest < 8 ? static_cast<int>(rest) : 8;
      const int64_t x_row = shared ? origin.row : place.row;
      block[r] = static_cast<uint32_t>(place.col);
      stream[r] = active ? static_cast<uint64_t>(streams[place.row]) : 0;
#pragma unroll
      for (int k = 0; k < vectors; ++k) {
        const Share<V> share(k);
        const int64_t from = share.of(x_row * x_stride + unit) + share.unit;
        to[r][k] = share.of(place.row * out_stride + unit) + share.unit;
        left[r][k] = share.of(count) - share.unit;
        if (left[r][k] > 0) packs[r][k] = load<V>(x + from, whole ? V : left[r][k]);
      }
      const bool further = place.advance(all);
      if (shared) origin.advance(further, sharing);
    }
#pragma unroll
    for (int r = 0; r < rounds; ++r) {
      const Words words = philox(block[r], stream[r], keys);
      const uint32_t bits = V == 8 ? 0 : kept_bits(words, top);
#pragma unroll
      for (int k = 0; k < vectors; ++k) {
        const Share<V> share(k);
        const uint32_t mine = share.of(bits) >> share.unit;
        const Pack<T, V> result = masked<T, V>(
            packs[r][k], scale, [&](int e) { return V == 8 ? kept(words, e, top) : (mine >> e & 1) != 0; });
        if (left[r][k] > 0) store<V>(out + to[r][k], whole ? V : left[r][k], result);
      }
    }
  }
}

template <class T>
void apply(ConstMatrix x, RowSharing sharing, Matrix out, MaskSource source, void* stream) {
  const auto scale = static_cast<Wide<T>>(65536.0 / source.threshold);
  const unsigned grid = blocks_for(out.rows * divide_up(out.cols, 8));
  const Counters all(out.rows, out.cols, grid);
  by_width<widest_of<T>>(alignment_of(x) | alignment_of(out), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const bool whole = out.cols % V == 0;
    launch("apply_mask", stream, grid,
           !whole               ? apply_kernel<T, V, false, true>
           : sharing.group == 1 ? apply_kernel<T, V, true, false>
                                : apply_kernel<T, V, true, true>,
           static_cast<const T*>(x.data), x.stride, SharedRows(sharing, all), static_cast<T*>(out.data),
           out.stride, out.cols, scale, source.streams, source.threshold << 16,
           RoundKeys(source.seed, source.site), all);
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
