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
inline Floats load16(const BFloat16* x) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))}};
#else
  float f[16];
  for (int i = 0; i < 16; ++i) f[i] = widen(x[i]);
  return load16(f);
#endif
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

// The last count < 16 elements, filled up with zeros.
template <class T>
inline Floats load_rest16(const T* x, int64_t count) {
  T rest[16] = {};
  std::memcpy(rest, x, static_cast<size_t>(count) * sizeof(T));
  return load16(rest);
}
inline void store_rest16(float* out, Floats a, int64_t count) {
  float rest[16];
  store16(rest, a);
  std::memcpy(out, rest, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace
}  // namespace dropscope
