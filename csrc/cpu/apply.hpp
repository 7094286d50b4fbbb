// x o mask * scale for the units of one vector. The product is
// made for dropped units too and cleared by the mask: +0 even where x is NaN or negative. Storage and
// rounding: half.hpp.
#pragma once
#include "half.hpp"
#include "simd.hpp"

namespace dropscope {
namespace {

template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

// Units that apply_vector takes at once.
template <class T>
constexpr int vector_units = 8;

#if defined(__AVX512BW__)

template <>
constexpr int vector_units<float> = 16;
template <>
constexpr int vector_units<BFloat16> = 32;

template <class Bits>
inline Bits load_bits(const Kept* kept) {
  Bits bits;
  std::memcpy(&bits, kept, sizeof bits);
  return bits;
}

inline void apply_vector(const float* x, float* out, const Kept* kept, float scale) {
  _mm512_storeu_ps(
      out, _mm512_maskz_mul_ps(load_bits<__mmask16>(kept), _mm512_loadu_ps(x), _mm512_set1_ps(scale)));
}
inline void apply_vector(const double* x, double* out, const Kept* kept, double scale) {
  _mm512_storeu_pd(out, _mm512_maskz_mul_pd(*kept, _mm512_loadu_pd(x), _mm512_set1_pd(scale)));
}
// Products of even and odd units apart. Their upper halves, rounded up where the lower half is above one half
// of the last place, or is one half and the last place is odd: where lower half - (last place is even) >=
// 0x8000. A NaN stays one: its payload lies in the upper half, nothing carries into it.
inline void apply_vector(const BFloat16* x, BFloat16* out, const Kept* kept, float scale) {
  const __m512i units = _mm512_loadu_si512(x), upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m512 s = _mm512_set1_ps(scale);
  const __m512i even =
      _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(units, 16)), s));
  const __m512i odd =
      _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(units, upper)), s));
  const __m512i high = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(even, 16), odd);
  const __m512i low = _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, 16));
  const __m512i last_even = _mm512_andnot_si512(high, _mm512_set1_epi16(1));
  const __m512i up = _mm512_srli_epi16(_mm512_subs_epu16(low, last_even), 15);
  _mm512_storeu_si512(out, _mm512_maskz_add_epi16(load_bits<__mmask32>(kept), high, up));
}

#elif defined(__AVX2__)

template <>
constexpr int vector_units<BFloat16> = 16;

inline void apply_vector(const float* x, float* out, const Kept* kept, float scale) {
  const __m256i mask = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kept)));
  const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale));
  _mm256_storeu_ps(out, _mm256_and_ps(product, _mm256_castsi256_ps(mask)));
}
inline void apply_vector(const double* x, double* out, const Kept* kept, double scale) {
  for (int i = 0; i < 8; i += 4) {
    const __m256i mask = _mm256_cvtepi16_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kept + i)));
    const __m256d product = _mm256_mul_pd(_mm256_loadu_pd(x + i), _mm256_set1_pd(scale));
    _mm256_storeu_pd(out + i, _mm256_and_pd(product, _mm256_castsi256_pd(mask)));
  }
}
inline void apply_vector(const BFloat16* x, BFloat16* out, const Kept* kept, float scale) {
  const __m256i units = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m256 s = _mm256_set1_ps(scale);
  const __m256i even =
      _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(units, 16)), s));
  const __m256i odd =
      _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(units, upper)), s));
  const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
  const __m256i low = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
  const __m256i last_even = _mm256_andnot_si256(high, _mm256_set1_epi16(1));
  const __m256i up = _mm256_srli_epi16(_mm256_subs_epu16(low, last_even), 15);
  const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kept));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_and_si256(_mm256_add_epi16(high, up), mask));
}

#elif defined(__SSE2__)

inline void apply_vector(const float* x, float* out, const Kept* kept, float scale) {
  const __m128i mask = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kept));
  const __m128 masks[2] = {_mm_castsi128_ps(_mm_unpacklo_epi16(mask, mask)),
                           _mm_castsi128_ps(_mm_unpackhi_epi16(mask, mask))};
  for (int i = 0; i < 2; ++i) {
    const __m128 product = _mm_mul_ps(_mm_loadu_ps(x + 4 * i), _mm_set1_ps(scale));
    _mm_storeu_ps(out + 4 * i, _mm_and_ps(product, masks[i]));
  }
}
inline void apply_vector(const double* x, double* out, const Kept* kept, double scale) {
  const __m128i mask = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kept));
  const __m128i halves[2] = {_mm_unpacklo_epi16(mask, mask), _mm_unpackhi_epi16(mask, mask)};
  for (int i = 0; i < 4; ++i) {
    const __m128i pair = i % 2 ? _mm_unpackhi_epi32(halves[i / 2], halves[i / 2])
                               : _mm_unpacklo_epi32(halves[i / 2], halves[i / 2]);
    const __m128d product = _mm_mul_pd(_mm_loadu_pd(x + 2 * i), _mm_set1_pd(scale));
    _mm_storeu_pd(out + 2 * i, _mm_and_pd(product, _mm_castsi128_pd(pair)));
  }
}
inline void apply_vector(const BFloat16* x, BFloat16* out, const Kept* kept, float scale) {
  const __m128i units = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  const __m128i upper = _mm_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m128 s = _mm_set1_ps(scale);
  const __m128i even = _mm_castps_si128(_mm_mul_ps(_mm_castsi128_ps(_mm_slli_epi32(units, 16)), s));
  const __m128i odd = _mm_castps_si128(_mm_mul_ps(_mm_castsi128_ps(_mm_and_si128(units, upper)), s));
  const __m128i high = _mm_or_si128(_mm_srli_epi32(even, 16), _mm_and_si128(odd, upper));
  const __m128i low = _mm_or_si128(_mm_andnot_si128(upper, even), _mm_slli_epi32(odd, 16));
  const __m128i last_even = _mm_andnot_si128(high, _mm_set1_epi16(1));
  const __m128i up = _mm_srli_epi16(_mm_subs_epu16(low, last_even), 15);
  const __m128i mask = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kept));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_and_si128(_mm_add_epi16(high, up), mask));
}

#endif

#if defined(__AVX2__)

inline __m128i times(const Float16* x, float scale) {
  const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_cvtps_ph(_mm256_mul_ps(wide, _mm256_set1_ps(scale)), _MM_FROUND_TO_NEAREST_INT);
}
inline void apply_vector(const Float16* x, Float16* out, const Kept* kept, float scale) {
#if defined(__AVX512BW__)
  const __m128i result = _mm_maskz_mov_epi16(*kept, times(x, scale));
#else
  const __m128i mask = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kept));
  const __m128i result = _mm_and_si128(times(x, scale), mask);
#endif
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), result);
}

#endif

#if !defined(__AVX512BW__)

template <class T>
inline void apply_vector(const T* x, T* out, const Kept* kept, typename Wide<T>::type scale) {
  for (int j = 0; j < 8; ++j) {
    const T product = narrow<T>(widen(x[j]) * scale);
    out[j] = kept[j] ? product : T{};
  }
}

#endif

// Reads kept up to the end of its last vector.
template <class T>
inline void apply_kept(const T* x, T* out, int64_t count, const Kept* kept, typename Wide<T>::type scale) {
  constexpr int units = vector_units<T>;
  int64_t i = 0;
  const auto at = [kept](int64_t unit) { return kept + unit / 8 * of_counter<Kept>; };
  for (; i + units <= count; i += units) apply_vector(x + i, out + i, at(i), scale);
  if (i == count) return;
  T rest[units] = {};
  std::memcpy(rest, x + i, (count - i) * sizeof(T));
  apply_vector(rest, rest, at(i), scale);
  std::memcpy(out + i, rest, (count - i) * sizeof(T));
}

}  // namespace
}  // namespace dropscope
