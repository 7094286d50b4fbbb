// Eight doubles, whatever registers hold them: so that sums have the same lanes, and the same bits, on every
// instruction set. Products and sums are not fused for the same reason.
#pragma once
#include "half.hpp"

namespace dropscope {
namespace {

struct Doubles {
#if defined(__AVX512F__)
  using Register = __m512d;
#elif defined(__AVX2__)
  using Register = __m256d;
#elif defined(__SSE2__)
  using Register = __m128d;
#else
  using Register = double;
#endif
  static constexpr int width = sizeof(Register) / sizeof(double), count = 8 / width;
  Register r[count];
};

#if defined(__AVX512F__)

inline Doubles splat8(double x) { return {{_mm512_set1_pd(x)}}; }
inline Doubles load8(const double* x) { return {{_mm512_loadu_pd(x)}}; }
inline Doubles load8(const float* x) { return {{_mm512_cvtps_pd(_mm256_loadu_ps(x))}}; }
inline Doubles load8(const BFloat16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return {{_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)))}};
}
inline void store8(double* out, Doubles a) { _mm512_storeu_pd(out, a.r[0]); }
inline void store8(float* out, Doubles a) { _mm256_storeu_ps(out, _mm512_cvtpd_ps(a.r[0])); }

#elif defined(__AVX2__)

inline Doubles splat8(double x) { return {{_mm256_set1_pd(x), _mm256_set1_pd(x)}}; }
inline Doubles load8(const double* x) { return {{_mm256_loadu_pd(x), _mm256_loadu_pd(x + 4)}}; }
inline Doubles load8(const float* x) {
  return {{_mm256_cvtps_pd(_mm_loadu_ps(x)), _mm256_cvtps_pd(_mm_loadu_ps(x + 4))}};
}
inline Doubles load8(const BFloat16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const __m256 f = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(f)), _mm256_cvtps_pd(_mm256_extractf128_ps(f, 1))}};
}
inline void store8(double* out, Doubles a) {
  _mm256_storeu_pd(out, a.r[0]), _mm256_storeu_pd(out + 4, a.r[1]);
}
inline void store8(float* out, Doubles a) {
  _mm_storeu_ps(out, _mm256_cvtpd_ps(a.r[0])), _mm_storeu_ps(out + 4, _mm256_cvtpd_ps(a.r[1]));
}

#elif defined(__SSE2__)

inline Doubles splat8(double x) {
  const __m128d s = _mm_set1_pd(x);
  return {{s, s, s, s}};
}
inline Doubles load8(const double* x) {
  return {{_mm_loadu_pd(x), _mm_loadu_pd(x + 2), _mm_loadu_pd(x + 4), _mm_loadu_pd(x + 6)}};
}
inline Doubles widen8(__m128 a, __m128 b) {
  return {{_mm_cvtps_pd(a), _mm_cvtps_pd(_mm_movehl_ps(a, a)), _mm_cvtps_pd(b),
           _mm_cvtps_pd(_mm_movehl_ps(b, b))}};
}
inline Doubles load8(const float* x) { return widen8(_mm_loadu_ps(x), _mm_loadu_ps(x + 4)); }
inline Doubles load8(const BFloat16* x) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), zero = _mm_setzero_si128();
  return widen8(_mm_castsi128_ps(_mm_unpacklo_epi16(zero, v)), _mm_castsi128_ps(_mm_unpackhi_epi16(zero, v)));
}
inline void store8(double* out, Doubles a) {
  for (int i = 0; i < 4; ++i) _mm_storeu_pd(out + 2 * i, a.r[i]);
}
inline void store8(float* out, Doubles a) {
  _mm_storeu_ps(out, _mm_movelh_ps(_mm_cvtpd_ps(a.r[0]), _mm_cvtpd_ps(a.r[1])));
  _mm_storeu_ps(out + 4, _mm_movelh_ps(_mm_cvtpd_ps(a.r[2]), _mm_cvtpd_ps(a.r[3])));
}

#else

inline Doubles splat8(double x) { return {{x, x, x, x, x, x, x, x}}; }
template <class T>
inline Doubles load8(const T* x) {
  Doubles a;
  for (int i = 0; i < 8; ++i) a.r[i] = static_cast<double>(widen(x[i]));
  return a;
}
inline void store8(double* out, Doubles a) { std::memcpy(out, a.r, sizeof a.r); }
inline void store8(float* out, Doubles a) {
  for (int i = 0; i < 8; ++i) out[i] = static_cast<float>(a.r[i]);
}

#endif

// Rounded to float on the way, as torch does.
inline void store8(BFloat16* out, Doubles a) {
  float f[8];
  store8(f, a);
  for (int i = 0; i < 8; ++i) out[i] = narrow<BFloat16>(f[i]);
}

// Operators of gcc and clang on their vector types; on double itself where there are none.
inline Doubles add_product(Doubles sum, Doubles a, Doubles b) {
  for (int i = 0; i < Doubles::count; ++i) sum.r[i] = sum.r[i] + a.r[i] * b.r[i];
  return sum;
}
inline Doubles subtract_product(Doubles sum, Doubles a, Doubles b) {
  for (int i = 0; i < Doubles::count; ++i) sum.r[i] = sum.r[i] - a.r[i] * b.r[i];
  return sum;
}
inline double total(Doubles a) {
  double x[8];
  store8(x, a);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// The last count < 8 elements, filled up with zeros.
template <class T>
inline Doubles load_rest(const T* x, int64_t count) {
  T rest[8] = {};
  std::memcpy(rest, x, static_cast<size_t>(count) * sizeof(T));
  return load8(rest);
}
template <class T>
inline void store_rest(T* out, Doubles a, int64_t count) {
  T rest[8];
  store8(rest, a);
  std::memcpy(out, rest, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace
}  // namespace dropscope
