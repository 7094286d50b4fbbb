// Mask format 1: lane j of a counter (block, sample, draw, site) of Philox4x32-10 keeps its unit <=> it is
// below T. Kept lanes become 16 bits of ones, dropped ones 0: a tile of them is made in a buffer that stays
// in cache, then used. While Philox computes, the memory that the tile will be used on is fetched.
#pragma once
#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"
#include "simd.hpp"

namespace dropscope {
namespace {

constexpr int64_t tile = 256;               // counters a tile
constexpr int chains = lanes == 8 ? 4 : 5;  // vectors of counters in flight: one alone waits for its products
constexpr int step = chains * lanes;
constexpr int64_t tile_lanes = 8 * (tile + step);

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

// Two stretches of memory of a tile, fetched piece by piece: a fill calls next() after each of its steps.
struct Fetch {
  const char *from, *to;
  int64_t bytes, piece = 0, at = 0;

  void begin(int64_t counters) { piece = bytes * step / (counters + 1) + 1; }
  void next() {
#if defined(__GNUC__)
    for (const int64_t end = at + piece < bytes ? at + piece : bytes; at < end; at += 64)
      __builtin_prefetch(from + at), __builtin_prefetch(to + at, 1);
#endif
  }
};

// Lanes of `step` counters: kept or not or, for `Raw`, the words themselves, low half first.
template <bool Raw>
inline void generate(uint16_t* kept, const Lanes (&block)[chains], const Lanes (&stream)[chains],
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
  for (int i = 0; i < chains; ++i) {
    const InOrder words = in_order(c0[i], c1[i], c2[i], c3[i]);
    uint16_t* to = kept + 8 * i * lanes;
    store(to, Raw ? words.first : at_most(words.first, keys.limit));
    store(to + 4 * lanes, Raw ? words.second : at_most(words.second, keys.limit));
  }
}

// Counters block .. block+count-1 of one stream; may write up to step-1 counters more.
template <bool Raw = false>
void fill_row(uint16_t* kept, int64_t block, int64_t count, uint64_t stream, const Keys& keys, Fetch fetch) {
  Lanes blocks[chains], streams[chains];
  fetch.begin(count);
  for (int64_t i = 0; i < count; i += step) {
    for (int c = 0; c < chains; ++c) {
      blocks[c] = add(splat(static_cast<uint64_t>(block + i + c * lanes)), iota());
      streams[c] = splat(stream);
    }
    generate<Raw>(kept + 8 * i, blocks, streams, keys);
    fetch.next();
  }
}

// Counters 0 .. blocks-1 of each of `rows` streams, packed so that short rows leave no lane idle. block_of
// repeats 0 .. blocks-1.
void fill_rows(uint16_t* kept, const int64_t* streams, int64_t rows, int64_t blocks, const uint64_t* block_of,
               const Keys& keys, Fetch fetch) {
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
  fetch.begin(rows * blocks);
  for (int64_t i = 0; i < rows * blocks; i += step) {
    Lanes of_block[chains], of_stream[chains];
    for (int c = 0; c < chains; ++c) {
      of_block[c] = load(block_of + i + c * lanes);
      of_stream[c] = load(stream_of + i + c * lanes);
    }
    generate<false>(kept + 8 * i, of_block, of_stream, keys);
    fetch.next();
  }
}

template <int N>
inline void move_lanes(uint16_t* to, const uint16_t* from) {
  uint16_t some[N];
  std::memcpy(some, from, sizeof some);
  std::memcpy(to, some, sizeof some);
}

// Moves the lanes of rows that end inside a block together, in place: unit u of row r to r*units + u.
void pack(uint16_t* kept, int64_t rows, int64_t units, int64_t blocks) {
  for (int64_t row = 1; row < rows; ++row) {
    const uint16_t* from = kept + row * 8 * blocks;
    uint16_t* to = kept + row * units;
    int64_t unit = 0;
    for (; unit + 32 <= units; unit += 32) move_lanes<32>(to + unit, from + unit);
    for (; unit < units; unit += 8) move_lanes<8>(to + unit, from + unit);
  }
}

// use(row, unit, count, kept) for every piece of the rows; fetch(row, unit, count) tells its memory
// beforehand. A piece starts at a multiple of 8 units of its row; where rows are `contiguous` it may run over
// the ends of rows. Behind the lanes of a piece there are 8 * step more that may be read.
template <class Memory, class Use>
void for_each_piece(int64_t rows, int64_t units, bool contiguous, MaskSource source, int threads,
                    const Memory& fetch, const Use& use) {
  const int64_t blocks = divide_up(units, 8);
  if (rows == 0 || blocks == 0) return;
  const Keys keys = make_keys(source);
  if (blocks > tile / 4) {
    const int64_t pieces = divide_up(blocks, tile);
    parallel_for(rows * pieces, rows * units, threads, [&](int64_t chunk) {
      alignas(64) uint16_t kept[tile_lanes];
      const int64_t row = chunk / pieces, block = (chunk - row * pieces) * tile;
      const int64_t blocks_left = blocks - block < tile ? blocks - block : tile;
      const int64_t count = units - block * 8 < tile * 8 ? units - block * 8 : tile * 8;
      fill_row(kept, block, blocks_left, static_cast<uint64_t>(source.streams[row]), keys,
               fetch(row, block * 8, count));
      use(row, block * 8, count, kept);
    });
  } else {
    const int64_t group = tile / blocks;
    uint64_t block_of[tile + step];
    for (int64_t i = 0, block = 0; i < tile + step; ++i, block = block + 1 < blocks ? block + 1 : 0)
      block_of[i] = static_cast<uint64_t>(block);
    parallel_for(divide_up(rows, group), rows * units, threads, [&](int64_t chunk) {
      alignas(64) uint16_t kept[tile_lanes];
      const int64_t first = chunk * group, count = rows - first < group ? rows - first : group;
      fill_rows(kept, source.streams + first, count, blocks, block_of, keys,
                fetch(first, 0, contiguous ? count * units : units));
      if (contiguous) {
        if (units % 8) pack(kept, count, units, blocks);
        use(first, 0, count * units, kept);
      } else {
        for (int64_t row = 0; row < count; ++row) use(first + row, 0, units, kept + row * 8 * blocks);
      }
    });
  }
}

}  // namespace
}  // namespace dropscope
