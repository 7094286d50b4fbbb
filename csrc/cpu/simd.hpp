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
constexpr int lanes = 8;
// Counter order 0 4 1 5 2 6 3 7: keep_lanes then needs no permutation of its own.
inline Lanes iota() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline Lanes load(const uint64_t* p) { return _mm512_permutexvar_epi64(iota(), _mm512_loadu_si512(p)); }
inline Lanes splat(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
// A shuffle, as shifts wait for the port that multiplies.
inline Lanes high(Lanes a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0xF5)); }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

inline Lanes join(Lanes low, Lanes high) {
  return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}

// Eight lanes a counter, in counter order: all ones where the 16-bit lane is at most `limit`, else 0.
inline void keep_lanes(uint16_t* out, Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint32_t limit) {
  const Lanes a = join(w0, w1), b = join(w2, w3), top = _mm512_set1_epi16(static_cast<short>(limit));
  const auto first = _mm512_cmple_epu16_mask(_mm512_unpacklo_epi64(a, b), top);
  const auto second = _mm512_cmple_epu16_mask(_mm512_unpackhi_epi64(a, b), top);
  _mm512_storeu_si512(out, _mm512_movm_epi16(first));
  _mm512_storeu_si512(out + 32, _mm512_movm_epi16(second));
}

#elif defined(__AVX2__)

using Lanes = __m256i;
constexpr int lanes = 4;
inline Lanes iota() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline Lanes load(const uint64_t* p) {
  return _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const Lanes*>(p)), 0xD8);
}
inline Lanes splat(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

inline Lanes join(Lanes low, Lanes high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}

inline void keep_lanes(uint16_t* out, Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint32_t limit) {
  const Lanes a = join(w0, w1), b = join(w2, w3), top = _mm256_set1_epi16(static_cast<short>(limit));
  const Lanes zero = _mm256_setzero_si256();
  // No unsigned comparison: x <= limit <=> the saturated difference is 0.
  const Lanes first = _mm256_cmpeq_epi16(_mm256_subs_epu16(_mm256_unpacklo_epi64(a, b), top), zero);
  const Lanes second = _mm256_cmpeq_epi16(_mm256_subs_epu16(_mm256_unpackhi_epi64(a, b), top), zero);
  _mm256_storeu_si256(reinterpret_cast<Lanes*>(out), first);
  _mm256_storeu_si256(reinterpret_cast<Lanes*>(out + 16), second);
}

#elif defined(__SSE2__)

using Lanes = __m128i;
constexpr int lanes = 2;
inline Lanes iota() { return _mm_set_epi64x(1, 0); }
inline Lanes load(const uint64_t* p) { return _mm_loadu_si128(reinterpret_cast<const Lanes*>(p)); }
inline Lanes splat(uint64_t x) { return _mm_set1_epi64x(static_cast<long long>(x)); }
inline Lanes add(Lanes a, Lanes b) { return _mm_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
inline Lanes high(Lanes a) { return _mm_srli_epi64(a, 32); }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm_xor_si128(_mm_xor_si128(a, b), c); }

inline void keep_lanes(uint16_t* out, Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint32_t limit) {
  const Lanes top = _mm_set1_epi16(static_cast<short>(limit)), zero = _mm_setzero_si128();
  const Lanes first = _mm_unpacklo_epi64(_mm_unpacklo_epi32(w0, w1), _mm_unpacklo_epi32(w2, w3));
  const Lanes second = _mm_unpacklo_epi64(_mm_unpackhi_epi32(w0, w1), _mm_unpackhi_epi32(w2, w3));
  Lanes* to = reinterpret_cast<Lanes*>(out);
  _mm_storeu_si128(to, _mm_cmpeq_epi16(_mm_subs_epu16(first, top), zero));
  _mm_storeu_si128(to + 1, _mm_cmpeq_epi16(_mm_subs_epu16(second, top), zero));
}

#else

using Lanes = uint64_t;
constexpr int lanes = 1;
inline Lanes iota() { return 0; }
inline Lanes load(const uint64_t* p) { return *p; }
inline Lanes splat(uint64_t x) { return x; }
inline Lanes add(Lanes a, Lanes b) { return a + b; }
inline Lanes multiply(Lanes a, Lanes b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
inline Lanes high(Lanes a) { return a >> 32; }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }

inline void keep_lanes(uint16_t* out, Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint32_t limit) {
  const Lanes words[4] = {w0, w1, w2, w3};
  for (int j = 0; j < 8; ++j)
    out[j] = static_cast<uint16_t>((words[j / 2] >> (16 * (j % 2)) & 0xFFFF) <= limit ? 0xFFFF : 0);
}

#endif

}  // namespace
}  // namespace dropscope
