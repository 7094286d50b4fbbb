// Keep-bitmaps of mask format 1: one byte a counter (block, sample, draw, site) of Philox4x32-10, bit j <=>
// lane j < T. A tile of them is made in a buffer that stays in cache, then used.
#pragma once
#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"
#include "simd.hpp"

namespace dropscope {
namespace {

constexpr int64_t tile = 256;  // counters a tile
constexpr int chains = 4;      // vectors of counters in flight: one alone waits for its own products
constexpr int step = chains * lanes;

struct Keys {
  Lanes k0[10], k1[10], site;
  uint32_t limit;  // the largest lane that is kept
};

Keys make_keys(MaskSource source) {
  const PhiloxKey key(source.seed, source.site);
  Keys keys;
  keys.site = splat(key.site);
  keys.limit = source.threshold - 1;
  for (uint32_t round = 0; round < 10; ++round) {
    keys.k0[round] = splat(key.k0 + round * philox_w0);
    keys.k1[round] = splat(key.k1 + round * philox_w1);
  }
  return keys;
}

// Bitmap of `step` counters.
inline void keep(uint8_t* bits, const Lanes (&block)[chains], const Lanes (&stream)[chains],
                 const Keys& keys) {
  const Lanes m0 = splat(philox_m0), m1 = splat(philox_m1);
  Lanes c0[chains], c1[chains], c2[chains], c3[chains];
  for (int i = 0; i < chains; ++i)
    c0[i] = block[i], c1[i] = stream[i], c2[i] = high(stream[i]), c3[i] = keys.site;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round)
    for (int i = 0; i < chains; ++i) {
      const Lanes p0 = multiply(c0[i], m0), p1 = multiply(c2[i], m1);
      c0[i] = xor3(high(p1), c1[i], keys.k0[round]);
      c1[i] = p1;
      c2[i] = xor3(high(p0), c3[i], keys.k1[round]);
      c3[i] = p0;
    }
  for (int i = 0; i < chains; ++i) keep_bytes(bits + i * lanes, c0[i], c1[i], c2[i], c3[i], keys.limit);
}

// Counters block .. block+count-1 of one stream; may write up to step-1 bytes more.
void fill_row(uint8_t* bits, int64_t block, int64_t count, uint64_t stream, const Keys& keys) {
  Lanes blocks[chains], streams[chains];
  for (int64_t i = 0; i < count; i += step) {
    for (int c = 0; c < chains; ++c) {
      blocks[c] = add(splat(static_cast<uint64_t>(block + i + c * lanes)), iota());
      streams[c] = splat(stream);
    }
    keep(bits + i, blocks, streams, keys);
  }
}

// Counters 0 .. blocks-1 of each of `rows` streams, packed so that short rows leave no lane idle. block_of
// repeats 0 .. blocks-1.
void fill_rows(uint8_t* bits, const int64_t* streams, int64_t rows, int64_t blocks, const uint64_t* block_of,
               const Keys& keys) {
  uint64_t stream_of[tile + step];
  uint64_t* to = stream_of;
  if (blocks == 1) {
    for (int64_t row = 0; row < rows; ++row) *to++ = static_cast<uint64_t>(streams[row]);
  } else if (blocks == 2) {
    for (int64_t row = 0; row < rows; ++row, to += 2) to[0] = to[1] = static_cast<uint64_t>(streams[row]);
  } else {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t block = 0; block < blocks; ++block) *to++ = static_cast<uint64_t>(streams[row]);
  }
  std::memset(to, 0, step * sizeof *to);
  for (int64_t i = 0; i < rows * blocks; i += step) {
    Lanes of_block[chains], of_stream[chains];
    for (int c = 0; c < chains; ++c) {
      of_block[c] = load(block_of + i + c * lanes);
      of_stream[c] = load(stream_of + i + c * lanes);
    }
    keep(bits + i, of_block, of_stream, keys);
  }
}

// Moves the bitmaps of rows that end inside a byte together: bit r*units + u of `flat` is bit u of row r.
void pack(uint8_t* flat, const uint8_t* bits, int64_t rows, int64_t units, int64_t blocks) {
  uint64_t pending = 0;
  int held = 0;  // bits in `pending`, fewer than 8
  const auto append = [&](const uint8_t* from, int count, uint64_t mask) {
    uint64_t piece;
    std::memcpy(&piece, from, 8);
    pending |= (piece & mask) << held;
    held += count;
    std::memcpy(flat, &pending, 8);
    flat += held / 8;
    pending >>= held & ~7;
    held &= 7;
  };
  const int64_t whole = (units - 1) / 56 * 56;
  const int rest = static_cast<int>(units - whole);
  const uint64_t all = (uint64_t(1) << 56) - 1, last = (uint64_t(1) << rest) - 1;
  for (int64_t row = 0; row < rows; ++row, bits += blocks) {
    for (int64_t unit = 0; unit < whole; unit += 56) append(bits + unit / 8, 56, all);
    append(bits + whole / 8, rest, last);
  }
}

// use(row, unit, count, bits) for every piece of the rows. A piece starts at a multiple of 8 units of its
// row; where rows are `contiguous` it may run over the ends of rows.
template <class Use>
void for_each_piece(int64_t rows, int64_t units, bool contiguous, MaskSource source, int threads,
                    const Use& use) {
  const int64_t blocks = divide_up(units, 8);
  if (rows == 0 || blocks == 0) return;
  const Keys keys = make_keys(source);
  if (blocks > tile / 4) {
    const int64_t pieces = divide_up(blocks, tile);
    parallel_for(rows * pieces, rows * units, threads, [&](int64_t chunk) {
      uint8_t bits[tile + step];
      const int64_t row = chunk / pieces, block = (chunk - row * pieces) * tile;
      const int64_t count = blocks - block < tile ? blocks - block : tile;
      fill_row(bits, block, count, static_cast<uint64_t>(source.streams[row]), keys);
      use(row, block * 8, units - block * 8 < tile * 8 ? units - block * 8 : tile * 8, bits);
    });
  } else {
    const int64_t group = tile / blocks;
    uint64_t block_of[tile + step];
    for (int64_t i = 0, block = 0; i < tile + step; ++i, block = block + 1 < blocks ? block + 1 : 0)
      block_of[i] = static_cast<uint64_t>(block);
    parallel_for(divide_up(rows, group), rows * units, threads, [&](int64_t chunk) {
      uint8_t bits[tile + step + 8], flat[tile + 8];
      const int64_t first = chunk * group, count = rows - first < group ? rows - first : group;
      fill_rows(bits, source.streams + first, count, blocks, block_of, keys);
      if (contiguous) {
        if (units % 8) pack(flat, bits, count, units, blocks);
        use(first, 0, count * units, units % 8 ? flat : bits);
      } else {
        for (int64_t row = 0; row < count; ++row) use(first + row, 0, units, bits + row * blocks);
      }
    });
  }
}

}  // namespace
}  // namespace dropscope
