// x o mask * scale for the 8 units of one counter; bit j of `byte` keeps unit j. The product is made for
// dropped units too and cleared by the mask: +0 even where x is NaN or negative. Storage and rounding:
// half.hpp.
#pragma once
#include "half.hpp"

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

#if defined(__AVX512BW__)

// The mask is expanded and not applied to the product: the compiler would fold the load into the masked
// product, and masked loads are slow from memory.
inline __m256i expand(uint8_t byte) { return _mm256_movm_epi32(byte); }
inline void apply8(const float* x, float* out, const uint8_t& byte, float scale) {
  const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale));
  _mm256_storeu_ps(out, _mm256_and_ps(product, _mm256_castsi256_ps(expand(byte))));
}
inline void apply8(const double* x, double* out, const uint8_t& byte, double scale) {
  const __m512d product = _mm512_mul_pd(_mm512_loadu_pd(x), _mm512_set1_pd(scale));
  _mm512_storeu_pd(out, _mm512_and_pd(product, _mm512_castsi512_pd(_mm512_movm_epi64(byte))));
}

#elif defined(__AVX2__)

inline __m256i expand(const uint8_t& byte) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi8(static_cast<char>(byte)), bit), bit);
}
inline void apply8(const float* x, float* out, const uint8_t& byte, float scale) {
  const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale));
  _mm256_storeu_ps(out, _mm256_and_ps(product, _mm256_castsi256_ps(expand(byte))));
}
inline void apply8(const double* x, double* out, const uint8_t& byte, double scale) {
  const __m256i mask = expand(byte);
  const __m256i halves[2] = {_mm256_cvtepi32_epi64(_mm256_castsi256_si128(mask)),
                             _mm256_cvtepi32_epi64(_mm256_extracti128_si256(mask, 1))};
  const __m256d s = _mm256_set1_pd(scale);
  const __m256d low = _mm256_mul_pd(_mm256_loadu_pd(x), s), high = _mm256_mul_pd(_mm256_loadu_pd(x + 4), s);
  _mm256_storeu_pd(out, _mm256_and_pd(low, _mm256_castsi256_pd(halves[0])));
  _mm256_storeu_pd(out + 4, _mm256_and_pd(high, _mm256_castsi256_pd(halves[1])));
}

#elif defined(__SSE2__)

inline __m128i expand4(uint8_t byte, int shift) {
  const __m128i bit = _mm_setr_epi32(1 << shift, 2 << shift, 4 << shift, 8 << shift);
  return _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(byte), bit), bit);
}
inline void apply8(const float* x, float* out, uint8_t byte, float scale) {
  const __m128 s = _mm_set1_ps(scale);
  const __m128 low = _mm_mul_ps(_mm_loadu_ps(x), s), high = _mm_mul_ps(_mm_loadu_ps(x + 4), s);
  _mm_storeu_ps(out, _mm_and_ps(low, _mm_castsi128_ps(expand4(byte, 0))));
  _mm_storeu_ps(out + 4, _mm_and_ps(high, _mm_castsi128_ps(expand4(byte, 4))));
}

#endif

#if defined(__AVX2__)

// Eight 32-bit lanes whose upper halves are 0, packed to 16 bits.
inline void store16(void* out, __m256i lanes32) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes32, lanes32), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}
inline void apply8(const BFloat16* x, BFloat16* out, const uint8_t& byte, float scale) {
  const __m256i wide =
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16);
  const __m256 product = _mm256_mul_ps(_mm256_castsi256_ps(wide), _mm256_set1_ps(scale));
  const __m256i bits = _mm256_castps_si256(product), one = _mm256_set1_epi32(1);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), even);
  const __m256 nan = _mm256_cmp_ps(product, product, _CMP_UNORD_Q);
  const __m256i result =
      _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), _mm256_castps_si256(nan));
  store16(out, _mm256_and_si256(result, expand(byte)));
}
inline void apply8(const Float16* x, Float16* out, const uint8_t& byte, float scale) {
  const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const __m256 product = _mm256_mul_ps(wide, _mm256_set1_ps(scale));
  const __m256 kept = _mm256_and_ps(product, _mm256_castsi256_ps(expand(byte)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(kept, _MM_FROUND_TO_NEAREST_INT));
}

#endif

template <class T>
inline void apply8(const T* x, T* out, const uint8_t& byte, typename Wide<T>::type scale) {
  for (int j = 0; j < 8; ++j) {
    const T product = narrow<T>(widen(x[j]) * scale);
    out[j] = byte >> j & 1 ? product : T{};
  }
}

template <class T>
inline void apply_bits(const T* x, T* out, int64_t count, const uint8_t* bits, typename Wide<T>::type scale) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) apply8(x + i, out + i, bits[i / 8], scale);
  if (i == count) return;
  T rest[8] = {};
  std::memcpy(rest, x + i, (count - i) * sizeof(T));
  apply8(rest, rest, bits[i / 8], scale);
  std::memcpy(out + i, rest, (count - i) * sizeof(T));
}

}  // namespace
}  // namespace dropscope
