#pragma once
#include <cstdint>

struct __half {
  uint16_t bits;
};
float __half2float(__half x);
__half __float2half_rn(float x);

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
