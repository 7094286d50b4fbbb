// Sixteen floats, whatever registers hold them: the same lanes, and so the same bits, on every instruction
// set. Products and sums are not fused for the same reason.
#pragma once
#include "doubles.hpp"

namespace dropscope {
namespace {

struct Floats {
#if defined(__AVX512F__)
  using Register = __m512;
#elif defined(__AVX2__)
  using Register = __m256;
#elif defined(__SSE2__)
  using Register = __m128;
#else
  using Register = float;
#endif
  static constexpr int width = sizeof(Register) / sizeof(float), count = 16 / width;
  Register r[count];
};

// A register from memory or from one number.
inline Floats::Register load_floats(const float* x) {
#if defined(__AVX512F__)
  return _mm512_loadu_ps(x);
#elif defined(__AVX2__)
  return _mm256_loadu_ps(x);
#elif defined(__SSE2__)
  return _mm_loadu_ps(x);
#else
  return *x;
#endif
}
inline Floats::Register splat_floats(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#elif defined(__SSE2__)
  return _mm_set1_ps(x);
#else
  return x;
#endif
}

inline Floats splat16(float x) {
  Floats a;
  for (int i = 0; i < Floats::count; ++i) a.r[i] = splat_floats(x);
  return a;
}
inline Floats load16(const float* x) {
  Floats a;
  for (int i = 0; i < Floats::count; ++i) a.r[i] = load_floats(x + i * Floats::width);
  return a;
}
inline void store16(float* out, Floats a) { std::memcpy(out, a.r, sizeof a.r); }

inline Floats add_product(Floats sum, Floats a, Floats b) {
  for (int i = 0; i < Floats::count; ++i) sum.r[i] = sum.r[i] + a.r[i] * b.r[i];
  return sum;
}
inline Floats subtract_product(Floats sum, Floats a, Floats b) {
  for (int i = 0; i < Floats::count; ++i) sum.r[i] = sum.r[i] - a.r[i] * b.r[i];
  return sum;
}
inline Floats add(Floats a, Floats b) {
  for (int i = 0; i < Floats::count; ++i) a.r[i] = a.r[i] + b.r[i];
  return a;
}

// sum += both halves of a, in double.
inline Doubles add_halves(Doubles sum, Floats a) {
  float x[16];
  store16(x, a);
  const Doubles low = load8(x), high = load8(x + 8);
  for (int i = 0; i < Doubles::count; ++i) sum.r[i] = (sum.r[i] + low.r[i]) + high.r[i];
  return sum;
}

inline void store_floats(float* out, Floats::Register a) { std::memcpy(out, &a, sizeof a); }

// Two registers of bfloat16, those at even places and those at odd ones: halves of a word, each a shift or a
// mask away from its float.
struct Pair {
  Floats::Register even, odd;
};
inline Pair load_pair(const BFloat16* x) {
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_loadu_si512(x), upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, upper))};
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, upper))};
#elif defined(__SSE2__)
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return {_mm_castsi128_ps(_mm_slli_epi32(pairs, 16)),
          _mm_castsi128_ps(_mm_and_si128(pairs, _mm_set1_epi32(static_cast<int>(0xFFFF0000))))};
#else
  return {widen(x[0]), widen(x[1])};
#endif
}

// The last count elements, too few for a vector, filled up with zeros.
inline Floats load_rest16(const float* x, int64_t count) {
  float rest[16] = {};
  std::memcpy(rest, x, static_cast<size_t>(count) * sizeof(float));
  return load16(rest);
}
inline void store_rest16(float* out, Floats a, int64_t count) {
  float rest[16];
  store16(rest, a);
  std::memcpy(out, rest, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace
}  // namespace dropscope
