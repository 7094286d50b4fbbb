// +1 for a unit that is kept, -1 for one that is not.
#pragma once
#include <type_traits>

#include "apply.hpp"

namespace dropscope {
namespace {

#if defined(__AVX512BW__)

inline void sign_vector(float* out, __mmask16 kept, __mmask16 wanted) {
  const __m512 signs = _mm512_mask_blend_ps(kept, _mm512_set1_ps(-1.0f), _mm512_set1_ps(1.0f));
  _mm512_mask_storeu_ps(out, wanted, signs);
}
inline void sign_vector(double* out, __mmask8 kept, __mmask8 wanted) {
  const __m512d signs = _mm512_mask_blend_pd(kept, _mm512_set1_pd(-1.0), _mm512_set1_pd(1.0));
  _mm512_mask_storeu_pd(out, wanted, signs);
}
inline void sign_vector(BFloat16* out, __mmask32 kept, __mmask32 wanted) {
  const __m512i one = _mm512_set1_epi16(0x3F80), minus = _mm512_set1_epi16(static_cast<short>(0xBF80));
  _mm512_mask_storeu_epi16(out, wanted, _mm512_mask_blend_epi16(kept, minus, one));
}

template <class T>
void signs(T* out, const Kept* kept, int64_t count) {
  using Bits =
      std::conditional_t<sizeof(T) == 2, __mmask32, std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>>;
  constexpr int64_t units = vector_units<T>;
  for (int64_t i = 0; i < count; i += units) {
    const int64_t spare = count - i < units ? units - (count - i) : 0;
    sign_vector(out + i, load_bits<Bits>(kept + i / 8), static_cast<Bits>(Bits(-1) >> spare));
  }
}

#else

template <class T>
void signs(T* out, const Kept* kept, int64_t count) {
  using Bits =
      std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  const Bits one = bit_cast<Bits>(narrow<T>(typename Wide<T>::type(1)));
  for (int64_t i = 0; i < count; ++i) {
    const Bits minus = static_cast<Bits>(~kept[i] & 0x8000);
    out[i] = bit_cast<T>(static_cast<Bits>(one | minus << (8 * sizeof(Bits) - 16)));
  }
}

#endif

}  // namespace
}  // namespace dropscope
