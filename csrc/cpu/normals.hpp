// Normal numbers from the words of a stream of Philox4x32-10, counter `block` giving words 4*block ..
// 4*block+3. Plain loops that the compiler vectorises; products and sums are not fused, so every instruction
// set gives the same bits.
#pragma once
#include <cmath>

#include "half.hpp"
#include "keep.hpp"

namespace dropscope {
namespace {

struct Turn {
  double cosine, sine;
};

// Of the angle 2 pi w / 2^32, to 2e-16: the nearest quarter turn, exactly, and power series of what is left,
// at most pi / 4.
inline Turn turn(uint32_t w) {
  const double x = static_cast<double>(static_cast<int32_t>(w << 2)) * (6.283185307179586476925287 * 0x1p-34);
  const double z = x * x;
  double s = 1.0 / 1307674368000.0, c = 1.0 / 20922789888000.0;
  s = 1.0 / 6227020800.0 - z * s, c = 1.0 / 87178291200.0 - z * c;
  s = 1.0 / 39916800.0 - z * s, c = 1.0 / 479001600.0 - z * c;
  s = 1.0 / 362880.0 - z * s, c = 1.0 / 3628800.0 - z * c;
  s = 1.0 / 5040.0 - z * s, c = 1.0 / 40320.0 - z * c;
  s = 1.0 / 120.0 - z * s, c = 1.0 / 720.0 - z * c;
  s = 1.0 / 6.0 - z * s, c = 1.0 / 24.0 - z * c;
  s = x - x * (z * s), c = 1.0 - (0.5 * z - z * z * c);
  const uint64_t quarter = (w + (1u << 29)) >> 30;
  const uint64_t cosine = bit_cast<uint64_t>(c), sine = bit_cast<uint64_t>(s);
  const uint64_t differ = (cosine ^ sine) & (0 - (quarter & 1));  // the two change places in odd quarters
  return {bit_cast<double>((cosine ^ differ) ^ ((quarter + 1) & 2) << 62),
          bit_cast<double>((sine ^ differ) ^ (quarter & 2) << 62)};
}

// -2 log((w + 1) / 2^32), to 4e-16 of itself: w + 1 = 2^e f with f in [0.707, 1.414], and with
// s = (f - 1) / (f + 1), log f = 2 (s + s^3/3 + s^5/5 + ...).
inline double minus_two_log(uint32_t w) {
  const double m = static_cast<double>(static_cast<int32_t>(w ^ 0x80000000u)) + 2147483649.0;
  const uint64_t bits = bit_cast<uint64_t>(m), e = (bits - 0x3FE6A09E00000000u) >> 52;
  const double f = bit_cast<double>(bits - (e << 52));
  const double exponent = bit_cast<double>(e | 0x4330000000000000u) - (0x1p52 + 32.0);
  const double s = (f - 1.0) / (f + 1.0), z = s * s;
  double p = 1.0 / 21.0;
  p = 1.0 / 19.0 + z * p;
  p = 1.0 / 17.0 + z * p;
  p = 1.0 / 15.0 + z * p;
  p = 1.0 / 13.0 + z * p;
  p = 1.0 / 11.0 + z * p;
  p = 1.0 / 9.0 + z * p;
  p = 1.0 / 7.0 + z * p;
  p = 1.0 / 5.0 + z * p;
  p = 1.0 / 3.0 + z * p;
  return exponent * (-2.0 * 0.693147180559945309417232) - 4.0 * (s + s * (z * p));
}

// Box-Muller: words 2q and 2q+1 give units 2q and 2q+1.
inline void normals(double* units, const uint32_t* words, int64_t pairs) {
  for (int64_t q = 0; q < pairs; ++q) {
    const double radius = std::sqrt(minus_two_log(words[2 * q]));
    const Turn angle = turn(words[2 * q + 1]);
    units[2 * q] = radius * angle.cosine;
    units[2 * q + 1] = radius * angle.sine;
  }
}

}  // namespace
}  // namespace dropscope
