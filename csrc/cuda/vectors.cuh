// Storage types, and vectors of them that one instruction loads and stores.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.hpp"

namespace dropscope {
namespace {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
template <class Real, class T>
__device__ inline T narrow(Real x) {
  T to;
  narrow(static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(x), to);
  return to;
}

// Two values in one conversion, the first in the lower half.
__device__ inline uint32_t narrow_pair(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ inline uint32_t narrow_pair(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// What values of type T are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// V elements, aligned to their size but to 16 bytes at most.
template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T x[V];
};

// The first `left` elements of the V at `from`, zeros after them.
template <int V, class T>
__device__ inline Pack<T, V> load(const T* from, int64_t left) {
  if (left >= V) return *reinterpret_cast<const Pack<T, V>*>(from);
  Pack<T, V> pack{};
#pragma unroll
  for (int e = 0; e < V - 1; ++e)
    if (e < left) pack.x[e] = from[e];
  return pack;
}

template <int V, class T>
__device__ inline void store(T* to, int64_t left, const Pack<T, V>& pack) {
  if (left >= V) {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int e = 0; e < V - 1; ++e)
    if (e < left) to[e] = pack.x[e];
}

// How many elements every row of the views may be read at a time, from its start on: a power of two.
inline int64_t alignment_of(const void* data, int64_t rows, int64_t stride, int64_t size) {
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(rows > 1 ? stride * size : 0);
  const int64_t bytes = places ? static_cast<int64_t>(places & -places) : 16;
  return bytes < size ? 1 : bytes / size;
}
inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
template <class View>
int64_t alignment_of(const View& m) {
  return m.data ? alignment_of(m.data, m.rows, m.stride, size_of(m.dtype)) : 16;
}

// f(integral_constant<int, V>) with the largest power of two V <= widest that divides all of `alignments`.
template <int widest, class F>
void by_width(int64_t alignment, const F& f) {
  if constexpr (widest > 1) {
    if (alignment % widest) return by_width<widest / 2>(alignment, f);
  }
  f(std::integral_constant<int, widest>{});
}

// The same with V = widest or 1 alone, where a width between them would not pay for its compilation.
template <int widest, class F>
void by_widest(int64_t alignment, const F& f) {
  alignment % widest ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, widest>{});
}

template <class T>
constexpr int widest_of = 16 / sizeof(T);

// f(T{}) for the element type T: f32, f64 or bf16.
template <class F>
void by_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::f64) return f(double{});
  f(__nv_bfloat16{});
}

}  // namespace
}  // namespace dropscope
