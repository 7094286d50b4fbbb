// Mask format 1: lane j of a counter (block, sample, draw, site) of Philox4x32-10 keeps its unit <=> it is
// below T. A tile of what is kept is made in a buffer that stays in cache, then used. While Philox computes,
// the memory that the tile will be used on is fetched.
#pragma once
#include <type_traits>

#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"
#include "simd.hpp"

namespace dropscope {
namespace {

constexpr int64_t tile = 256;               // counters a tile
constexpr int chains = lanes == 8 ? 4 : 5;  // vectors of counters in flight: one alone waits for its products
constexpr int step = chains * lanes;
constexpr int64_t tile_kept = of_counter<Kept> * (tile + step);

struct Keys {
  Lanes k0[10], k1[10];
  uint32_t limit;  // the largest lane that is kept
};

Keys make_keys(MaskSource source) {
  const PhiloxKey key(source.seed, source.site);
  Keys keys;
  keys.limit = source.threshold - 1;
  for (uint32_t round = 0; round < 10; ++round) {
    keys.k0[round] = splat(key.k0 + round * philox_w0);
    keys.k1[round] = splat(key.k1 + round * philox_w1);
  }
  keys.k1[0] = xor2(keys.k1[0], splat(key.site));  // the two meet in the first round only
  return keys;
}

// The first two rounds never multiply what depends on the block with what depends on the stream: each is made
// for itself, once for all counters that share it, and c = of the stream ^ of the block.
struct OfStream {
  Lanes c0, c2, c3;
};
struct OfBlock {
  Lanes c0, c1, c2;
};
inline OfStream of_stream(Lanes stream, const Keys& keys) {
  const Lanes p1 = multiply(high(stream), splat(philox_m1));
  const Lanes p0 = multiply(xor3(high(p1), stream, keys.k0[0]), splat(philox_m0));
  return {xor2(p1, keys.k0[1]), xor2(high(p0), keys.k1[1]), p0};
}
inline OfBlock of_block(Lanes block, const Keys& keys) {
  const Lanes p0 = multiply(block, splat(philox_m0));
  const Lanes p1 = multiply(xor2(high(p0), keys.k1[0]), splat(philox_m1));
  return {high(p1), p1, p0};
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

// What is kept by `step` counters or, where Out is uint32_t, their words.
template <class Out>
inline void generate(Out* out, const OfBlock (&block)[chains], const OfStream (&stream)[chains],
                     const Keys& keys) {
  const Lanes m0 = splat(philox_m0), m1 = splat(philox_m1);
  Lanes c0[chains], c1[chains], c2[chains], c3[chains];
  for (int i = 0; i < chains; ++i) {
    c0[i] = xor2(block[i].c0, stream[i].c0), c1[i] = block[i].c1;
    c2[i] = xor2(block[i].c2, stream[i].c2), c3[i] = stream[i].c3;
  }
#pragma GCC unroll 8
  for (int round = 2; round < 9; ++round)
    for (int i = 0; i < chains; ++i) {
      const Lanes p0 = multiply(c0[i], m0), p1 = multiply(c2[i], m1);
      c0[i] = xor3(high(p1), c1[i], keys.k0[round]);
      c1[i] = p1;
      c2[i] = xor3(high(p0), c3[i], keys.k1[round]);
      c3[i] = p0;
    }
  for (int i = 0; i < chains; ++i) {
    const Lanes p0 = multiply(c0[i], m0), p1 = multiply(c2[i], m1);
    const Lanes w01 = last_words(p1, c1[i], keys.k0[9]), w23 = last_words(p0, c3[i], keys.k1[9]);
    put(out + of_counter<Out> * i * lanes, in_order(w01, w23), keys.limit);
  }
}

// Counters block .. block+count-1 of one stream; may write up to step-1 counters more.
template <class Out>
void fill_row(Out* out, int64_t block, int64_t count, uint64_t stream, const Keys& keys, Fetch fetch) {
  OfBlock blocks[chains];
  OfStream streams[chains];
  for (int c = 0; c < chains; ++c) streams[c] = of_stream(splat(stream), keys);
  fetch.begin(count);
  for (int64_t i = 0; i < count; i += step) {
    for (int c = 0; c < chains; ++c)
      blocks[c] = of_block(add(splat(static_cast<uint64_t>(block + i + c * lanes)), iota()), keys);
    generate(out + of_counter<Out> * i, blocks, streams, keys);
    fetch.next();
  }
}

// Blocks 0 .. blocks-1 again and again, as tiles of short rows want them.
struct Blocks {
  // With AVX2 the loads of what is made for a block would cost more than making it again.
  struct Number {
    Lanes block;
  };
  using Of = std::conditional_t<lanes == 4, Number, OfBlock>;
  Of of[(tile + step) / lanes];

  Blocks(int64_t blocks, int64_t counters, const Keys& keys) {
    uint64_t block_of[tile + step];
    for (int64_t i = 0, block = 0; i < counters + step; ++i, block = block + 1 < blocks ? block + 1 : 0)
      block_of[i] = static_cast<uint64_t>(block);
    for (int64_t i = 0; i < counters; i += lanes) held(of[i / lanes], load(block_of + i), keys);
    for (int64_t i = divide_up(counters, lanes); i < (tile + step) / lanes; ++i) of[i] = of[0];
  }
  OfBlock at(int64_t i, const Keys& keys) const { return made(of[i], keys); }

 private:
  static void held(OfBlock& to, Lanes block, const Keys& keys) { to = of_block(block, keys); }
  static void held(Number& to, Lanes block, const Keys&) { to.block = block; }
  static OfBlock made(const OfBlock& of, const Keys&) { return of; }
  static OfBlock made(const Number& of, const Keys& keys) { return of_block(of.block, keys); }
};

// Counters 0 .. blocks-1 of each of `rows` streams, packed so that short rows leave no lane idle.
void fill_rows(Kept* kept, const int64_t* streams, int64_t rows, int64_t blocks, const Blocks& table,
               const Keys& keys, Fetch fetch) {
  uint64_t stream_of[tile + step];
  uint64_t* to = stream_of;
  if (blocks == 1) {
    for (int64_t row = 0; row < rows; ++row) *to++ = static_cast<uint64_t>(streams[row]);
  } else if (blocks == 2) {
    for (int64_t row = 0; row < rows; ++row, to += 2) to[0] = to[1] = static_cast<uint64_t>(streams[row]);
  } else {
    for (int64_t row = 0; row < rows; ++row, to += blocks)
      for (int64_t block = 0; block < blocks; block += lanes)
        store(to + block, splat(static_cast<uint64_t>(streams[row])));
  }
  std::memset(to, 0, step * sizeof *to);
  fetch.begin(rows * blocks);
  for (int64_t i = 0; i < rows * blocks; i += step) {
    OfBlock of_blocks[chains];
    OfStream of_streams[chains];
    for (int c = 0; c < chains; ++c) {
      of_blocks[c] = table.at(i / lanes + c, keys);
      of_streams[c] = of_stream(load(stream_of + i + c * lanes), keys);
    }
    generate(kept + of_counter<Kept> * i, of_blocks, of_streams, keys);
    fetch.next();
  }
}

// What is kept of rows that end inside a block, moved together: unit u of row r to r*units + u.
#if defined(__AVX512BW__)

const Kept* pack(const Kept* kept, Kept* packed, int64_t rows, int64_t units, int64_t blocks) {
  uint64_t held = 0;
  int64_t at = 0;
  const auto append = [&](uint64_t bits, int64_t count) {  // at most 56, as up to 7 are held back
    held |= bits << (at & 7);
    std::memcpy(packed + (at >> 3), &held, sizeof held);
    const int64_t end = at + count;
    held >>= 8 * ((end >> 3) - (at >> 3));
    at = end;
  };
  const auto eight = [&](int64_t counter) {
    uint64_t bits;
    std::memcpy(&bits, kept + counter, sizeof bits);
    return bits;
  };
  if (units <= 56) {
    const int64_t fit = 8 / blocks < 56 / units ? 8 / blocks : 56 / units;
    uint64_t wanted = 0;
    for (int64_t row = 0; row < fit; ++row) wanted |= ((uint64_t(1) << units) - 1) << (8 * blocks * row);
    for (int64_t row = 0; row < rows; row += fit) append(_pext_u64(eight(row * blocks), wanted), fit * units);
    return packed;
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t unit = 0; unit < units; unit += 56) {
      const int64_t count = units - unit < 56 ? units - unit : 56;
      append(eight(row * blocks + unit / 8) & ((uint64_t(1) << count) - 1), count);
    }
  return packed;
}

#else

template <int N>
inline void move_lanes(Kept* to, const Kept* from) {
  Kept some[N];
  std::memcpy(some, from, sizeof some);
  std::memcpy(to, some, sizeof some);
}

const Kept* pack(Kept* kept, Kept*, int64_t rows, int64_t units, int64_t blocks) {
  for (int64_t row = 1; row < rows; ++row) {
    const Kept* from = kept + row * 8 * blocks;
    Kept* to = kept + row * units;
    int64_t unit = 0;
    for (; unit + 32 <= units; unit += 32) move_lanes<32>(to + unit, from + unit);
    for (; unit < units; unit += 8) move_lanes<8>(to + unit, from + unit);
  }
  return kept;
}

#endif

// use(row, unit, count, kept) for every piece of the rows; fetch(row, unit, count) tells its memory
// beforehand. A piece starts at a multiple of 8 units of its row; where rows are `contiguous` it may run over
// the ends of rows. Behind what is kept of a piece there are `step` counters more that may be read.
template <class Memory, class Use>
void for_each_piece(int64_t rows, int64_t units, bool contiguous, MaskSource source, int threads,
                    const Memory& fetch, const Use& use) {
  const int64_t blocks = divide_up(units, 8);
  if (rows == 0 || blocks == 0) return;
  const Keys keys = make_keys(source);
  if (blocks > tile / 4) {
    const int64_t pieces = divide_up(blocks, tile);
    parallel_for(rows * pieces, rows * units, threads, [&](int64_t chunk) {
      alignas(64) Kept kept[tile_kept];
      const int64_t row = chunk / pieces, block = (chunk - row * pieces) * tile;
      const int64_t blocks_left = blocks - block < tile ? blocks - block : tile;
      const int64_t count = units - block * 8 < tile * 8 ? units - block * 8 : tile * 8;
      fill_row(kept, block, blocks_left, static_cast<uint64_t>(source.streams[row]), keys,
               fetch(row, block * 8, count));
      use(row, block * 8, count, kept);
    });
  } else {
    const int64_t group = tile / blocks;
    const Blocks table(blocks, blocks * (rows < group ? rows : group), keys);
    parallel_for(divide_up(rows, group), rows * units, threads, [&](int64_t chunk) {
      alignas(64) Kept kept[tile_kept], packed[tile_kept];
      const int64_t first = chunk * group, count = rows - first < group ? rows - first : group;
      fill_rows(kept, source.streams + first, count, blocks, table, keys,
                fetch(first, 0, contiguous ? count * units : units));
      if (contiguous) {
        use(first, 0, count * units, units % 8 ? pack(kept, packed, count, units, blocks) : kept);
      } else {
        for (int64_t row = 0; row < count; ++row)
          use(first + row, 0, units, kept + row * of_counter<Kept> * blocks);
      }
    });
  }
}

}  // namespace
}  // namespace dropscope
