// Dropout masks, format 1: out = x o mask * 65536/T with keep <=> lane < T, lanes from Philox4x32-10 at the counter
// (block, sample, draw, site). A tile's bitmap is made first, one byte a counter, in a buffer that stays in cache.
#include "half.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"
#include "simd.hpp"

namespace dropscope {
namespace {

constexpr int64_t tile = 512;  // counters a tile

struct Keys {
  Lanes k0[10], k1[10], site;
  uint32_t limit;  // the largest lane that is kept
};

Keys make_keys(MaskSource source) {
  PhiloxKey key(source.seed, source.site);
  Keys keys;
  keys.site = splat(key.site);
  keys.limit = source.threshold - 1;
  for (int round = 0; round < 10; ++round) {
    keys.k0[round] = splat(key.k0 + round * philox_w0);
    keys.k1[round] = splat(key.k1 + round * philox_w1);
  }
  return keys;
}

// Bitmap of `lanes` counters.
inline void keep(uint8_t* bits, Lanes block, Lanes stream, const Keys& keys) {
  const Lanes m0 = splat(philox_m0), m1 = splat(philox_m1);
  Lanes c0 = block, c1 = stream, c2 = high(stream), c3 = keys.site;
  for (int round = 0; round < 10; ++round) {
    const Lanes p0 = multiply(c0, m0), p1 = multiply(c2, m1);
    c0 = xor3(high(p1), c1, keys.k0[round]);
    c1 = p1;
    c2 = xor3(high(p0), c3, keys.k1[round]);
    c3 = p0;
  }
  keep_bytes(bits, c0, c1, c2, c3, keys.limit);
}

// Counters block .. block+count-1 of one stream; may write up to lanes-1 bytes more.
void fill_row(uint8_t* bits, int64_t block, int64_t count, uint64_t stream, const Keys& keys) {
  const Lanes streams = splat(stream);
  for (int64_t i = 0; i < count; i += lanes) keep(bits + i, add(splat(block + i), iota()), streams, keys);
}

// Counters 0 .. blocks-1 of each of `rows` streams, packed so that short rows leave no lane idle.
void fill_rows(uint8_t* bits, const int64_t* streams, int64_t rows, int64_t blocks, const Keys& keys) {
  alignas(64) uint64_t block_of[tile + lanes], stream_of[tile + lanes];
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = 0; block < blocks; ++block, ++count) {
      block_of[count] = static_cast<uint64_t>(block);
      stream_of[count] = static_cast<uint64_t>(streams[row]);
    }
  for (int i = 0; i < lanes; ++i) block_of[count + i] = stream_of[count + i] = 0;
  for (int64_t i = 0; i < count; i += lanes) keep(bits + i, load(block_of + i), load(stream_of + i), keys);
}

// use(row, unit, count, bits) for every piece of every row; a piece starts at a multiple of 8 units.
template <class Use>
void for_each_piece(int64_t rows, int64_t units, MaskSource source, int threads, const Use& use) {
  const int64_t blocks = divide_up(units, 8);
  if (rows == 0 || blocks == 0) return;
  const Keys keys = make_keys(source);
  if (blocks % lanes == 0 || blocks >= 8 * lanes) {
    const int64_t pieces = divide_up(blocks, tile);
    parallel_for(rows * pieces, rows * units, threads, [&](int64_t chunk) {
      uint8_t bits[tile + lanes];
      const int64_t row = chunk / pieces, block = (chunk - row * pieces) * tile;
      const int64_t count = blocks - block < tile ? blocks - block : tile;
      fill_row(bits, block, count, static_cast<uint64_t>(source.streams[row]), keys);
      use(row, block * 8, units - block * 8 < tile * 8 ? units - block * 8 : tile * 8, bits);
    });
  } else {
    const int64_t group = tile / blocks;
    parallel_for(divide_up(rows, group), rows * units, threads, [&](int64_t chunk) {
      uint8_t bits[tile + lanes];
      const int64_t first = chunk * group, count = rows - first < group ? rows - first : group;
      fill_rows(bits, source.streams + first, count, blocks, keys);
      for (int64_t row = 0; row < count; ++row) use(first + row, 0, units, bits + row * blocks);
    });
  }
}

template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Wide = float;
  using Bits = uint32_t;
};
template <>
struct Traits<double> {
  using Wide = double;
  using Bits = uint64_t;
};
template <>
struct Traits<BFloat16> {
  using Wide = float;
  using Bits = uint16_t;
};
template <>
struct Traits<Float16> {
  using Wide = float;
  using Bits = uint16_t;
};

// The product is made for dropped units too, and cleared by the mask: +0 even where x is NaN or negative.
template <class T>
inline T masked(T x, typename Traits<T>::Wide scale, bool kept) {
  using Bits = typename Traits<T>::Bits;
  const Bits mask = kept ? static_cast<Bits>(-1) : Bits(0);
  return bit_cast<T>(static_cast<Bits>(bit_cast<Bits>(narrow<T>(widen(x) * scale)) & mask));
}

template <class T>
void apply_bits(const T* x, T* out, int64_t count, const uint8_t* bits, typename Traits<T>::Wide scale) {
  static constexpr uint8_t bit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const uint8_t byte = bits[i / 8];
    T kept[8];  // out may be x: read all before writing any, which also lets the loop become vectors
    for (int j = 0; j < 8; ++j) kept[j] = masked(x[i + j], scale, byte & bit[j]);
    for (int j = 0; j < 8; ++j) out[i + j] = kept[j];
  }
  for (; i < count; ++i) out[i] = masked(x[i], scale, bits[i / 8] & bit[i % 8]);
}

template <class T>
void apply(ConstMatrix x, Matrix out, MaskSource source, int threads) {
  const auto scale = static_cast<typename Traits<T>::Wide>(65536.0 / source.threshold);
  for_each_piece(x.rows, x.cols, source, threads, [&](int64_t row, int64_t unit, int64_t count, const uint8_t* bits) {
    apply_bits(static_cast<const T*>(x.data) + row * x.stride + unit,
               static_cast<T*>(out.data) + row * out.stride + unit, count, bits, scale);
  });
}

void apply_mask(ConstMatrix x, Matrix out, MaskSource source, Launch launch) {
  switch (x.dtype) {
    case DType::f32: return apply<float>(x, out, source, launch.threads);
    case DType::f64: return apply<double>(x, out, source, launch.threads);
    case DType::bf16: return apply<BFloat16>(x, out, source, launch.threads);
    case DType::f16: return apply<Float16>(x, out, source, launch.threads);
  }
}

void keep_mask(uint8_t* out, int64_t rows, int64_t units, MaskSource source, Launch launch) {
  for_each_piece(rows, units, source, launch.threads,
                 [&](int64_t row, int64_t unit, int64_t count, const uint8_t* bits) {
                   uint8_t* to = out + row * units + unit;
                   for (int64_t i = 0; i < count; ++i) to[i] = bits[i / 8] >> (i % 8) & 1;
                 });
}

}  // namespace

namespace DROPSCOPE_ISA {
const MaskKernels masks{apply_mask, keep_mask};
}

}  // namespace dropscope
