// A handful of vector operations per instruction set. Philox runs on 64-bit lanes that hold 32-bit words: the
// 32x32-bit product reads the low half of a lane only, so the upper half may hold anything and is never
// cleared.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dropscope {
namespace {

#if defined(__AVX512BW__)
using Lanes = __m512i;
#elif defined(__AVX2__)
using Lanes = __m256i;
#elif defined(__SSE2__)
using Lanes = __m128i;
#else
using Lanes = uint64_t;
#endif

// The words of the counters in counter order, four words each.
struct InOrder {
  Lanes first, second;
};

// What a tile remembers of a unit, kept or not: a bit where there are registers of masks, 16 ones or zeros
// elsewhere. Of a counter: one byte, or eight lanes.
#if defined(__AVX512BW__)
using Kept = uint8_t;
#else
using Kept = uint16_t;
#endif

// Elements of an output that a counter fills: what is kept of its units, or its words.
template <class Out>
constexpr int of_counter = sizeof(Out) == 1   ? 1
                           : sizeof(Out) == 2 ? 8
                                              : 4;

#if defined(__AVX512BW__)

constexpr int lanes = 8;
// Counter order 0 4 1 5 2 6 3 7: in_order then needs no permutation of its own.
inline Lanes iota() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline Lanes load(const uint64_t* p) { return _mm512_permutexvar_epi64(iota(), _mm512_loadu_si512(p)); }
inline Lanes splat(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
// A shuffle, as shifts wait for the port that multiplies.
inline Lanes high(Lanes a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0xF5)); }
inline Lanes xor2(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// Words high(p) ^ c ^ k and p of a counter, in this order.
inline Lanes last_words(Lanes p, Lanes c, Lanes k) {
  const Lanes swapped = _mm512_shuffle_epi32(p, static_cast<_MM_PERM_ENUM>(0xB1));
  return _mm512_mask_ternarylogic_epi32(swapped, 0x5555, c, k, 0x96);
}
inline InOrder in_order(Lanes w01, Lanes w23) {
  return {_mm512_unpacklo_epi64(w01, w23), _mm512_unpackhi_epi64(w01, w23)};
}
inline void put(Kept* out, InOrder words, uint32_t limit) {
  const __m512i most = _mm512_set1_epi16(static_cast<short>(limit));
  const __mmask32 bits[2] = {_mm512_cmple_epu16_mask(words.first, most),
                             _mm512_cmple_epu16_mask(words.second, most)};
  std::memcpy(out, bits, sizeof bits);
}
inline void store(void* out, Lanes a) { _mm512_storeu_si512(out, a); }

#elif defined(__AVX2__)

constexpr int lanes = 4;
inline Lanes iota() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline Lanes load(const uint64_t* p) {
  return _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const Lanes*>(p)), 0xD8);
}
inline Lanes splat(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
inline Lanes xor2(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

inline Lanes last_words(Lanes p, Lanes c, Lanes k) {
  const Lanes other = _mm256_blend_epi32(_mm256_xor_si256(c, k), _mm256_setzero_si256(), 0xAA);
  return _mm256_xor_si256(_mm256_shuffle_epi32(p, 0xB1), other);
}
inline InOrder in_order(Lanes w01, Lanes w23) {
  return {_mm256_unpacklo_epi64(w01, w23), _mm256_unpackhi_epi64(w01, w23)};
}
// No unsigned comparison: x <= limit <=> the saturated difference is 0.
inline Lanes at_most(Lanes a, uint32_t limit) {
  const Lanes over = _mm256_subs_epu16(a, _mm256_set1_epi16(static_cast<short>(limit)));
  return _mm256_cmpeq_epi16(over, _mm256_setzero_si256());
}
inline void store(void* out, Lanes a) { _mm256_storeu_si256(static_cast<Lanes*>(out), a); }

#elif defined(__SSE2__)

constexpr int lanes = 2;
inline Lanes iota() { return _mm_set_epi64x(1, 0); }
inline Lanes load(const uint64_t* p) { return _mm_loadu_si128(reinterpret_cast<const Lanes*>(p)); }
inline Lanes splat(uint64_t x) { return _mm_set1_epi64x(static_cast<long long>(x)); }
inline Lanes add(Lanes a, Lanes b) { return _mm_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
inline Lanes high(Lanes a) { return _mm_srli_epi64(a, 32); }
inline Lanes xor2(Lanes a, Lanes b) { return _mm_xor_si128(a, b); }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm_xor_si128(_mm_xor_si128(a, b), c); }

inline Lanes last_words(Lanes p, Lanes c, Lanes k) {
  const Lanes other = _mm_and_si128(_mm_xor_si128(c, k), _mm_set1_epi64x(0xFFFFFFFF));
  return _mm_xor_si128(_mm_shuffle_epi32(p, 0xB1), other);
}
inline InOrder in_order(Lanes w01, Lanes w23) {
  return {_mm_unpacklo_epi64(w01, w23), _mm_unpackhi_epi64(w01, w23)};
}
inline Lanes at_most(Lanes a, uint32_t limit) {
  const Lanes over = _mm_subs_epu16(a, _mm_set1_epi16(static_cast<short>(limit)));
  return _mm_cmpeq_epi16(over, _mm_setzero_si128());
}
inline void store(void* out, Lanes a) { _mm_storeu_si128(static_cast<Lanes*>(out), a); }

#else

constexpr int lanes = 1;
inline Lanes iota() { return 0; }
inline Lanes load(const uint64_t* p) { return *p; }
inline Lanes splat(uint64_t x) { return x; }
inline Lanes add(Lanes a, Lanes b) { return a + b; }
inline Lanes multiply(Lanes a, Lanes b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
inline Lanes high(Lanes a) { return a >> 32; }
inline Lanes xor2(Lanes a, Lanes b) { return a ^ b; }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }

inline Lanes last_words(Lanes p, Lanes c, Lanes k) { return (p >> 32 ^ ((c ^ k) & 0xFFFFFFFF)) | p << 32; }
inline InOrder in_order(Lanes w01, Lanes w23) { return {w01, w23}; }
inline Lanes at_most(Lanes a, uint32_t limit) {
  Lanes ones = 0;
  for (int shift = 0; shift < 64; shift += 16)
    if ((a >> shift & 0xFFFF) <= limit) ones |= Lanes(0xFFFF) << shift;
  return ones;
}
inline void store(void* out, Lanes a) { std::memcpy(out, &a, sizeof a); }

#endif

#if !defined(__AVX512BW__)
inline void put(Kept* out, InOrder words, uint32_t limit) {
  store(out, at_most(words.first, limit));
  store(out + 4 * lanes, at_most(words.second, limit));
}
#endif

inline void put(uint32_t* out, InOrder words, uint32_t) {
  store(out, words.first), store(out + 2 * lanes, words.second);
}

}  // namespace
}  // namespace dropscope
