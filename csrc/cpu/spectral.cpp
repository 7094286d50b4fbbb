// Krylov bases and probes. Sums run in double over chunks of fixed size, in fixed lanes: the same bits for
// every thread count and instruction set.
#include <cmath>

#include "apply.hpp"
#include "bitmap.hpp"
#include "doubles.hpp"

namespace dropscope {
namespace {

constexpr int64_t chunk_cols = 4096;  // of w in double: 32 KiB, which stay in the first cache

// f(T{}) for the element type T: f32, f64 or bf16.
template <class F>
void by_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::f64) return f(double{});
  f(BFloat16{});
}

// to[0..count) = from, the rest of the last eight 0.
template <class T>
void widen_row(double* to, const T* from, int64_t count) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) store8(to + j, load8(from + j));
  if (j < count) store8(to + j, load_rest(from + j, count - j));
}
template <class T>
void narrow_row(T* to, const double* from, int64_t count) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) store8(to + j, load8(from + j));
  if (j < count) store_rest(to + j, load8(from + j), count - j);
}

double sq_norm(const double* w, int64_t count) {
  Doubles sum = splat8(0.0);
  for (int64_t j = 0; j < count; j += 8) sum = add_product(sum, load8(w + j), load8(w + j));
  return total(sum);
}

// out[r] = <q + r*stride, w>, R rows at once so that w is loaded once for all. The rows `ahead` come next:
// pieces of rows are too short for the hardware to see them coming. They may lie past the end: a prefetch
// does not fault.
template <int R, class T>
void dots(const T* q, const T* ahead, int64_t stride, const double* w, int64_t count, double* out) {
  Doubles sums[R];
  for (int r = 0; r < R; ++r) sums[r] = splat8(0.0);
  constexpr int64_t line = 64 / sizeof(T);
  int64_t j = 0;
  for (; j + line <= count; j += line) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * stride + j);
    for (int64_t i = j; i < j + line; i += 8) {
      const Doubles v = load8(w + i);
      for (int r = 0; r < R; ++r) sums[r] = add_product(sums[r], load8(q + r * stride + i), v);
    }
  }
  for (; j + 8 <= count; j += 8)
    for (int r = 0; r < R; ++r) sums[r] = add_product(sums[r], load8(q + r * stride + j), load8(w + j));
  if (j < count)
    for (int r = 0; r < R; ++r)
      sums[r] = add_product(sums[r], load_rest(q + r * stride + j, count - j), load8(w + j));
  for (int r = 0; r < R; ++r) out[r] = total(sums[r]);
}

// w -= sum_r c[r] * (q + r*stride); `ahead` as in dots.
template <int R, class T>
void remove(const T* q, const T* ahead, int64_t stride, double* w, int64_t count, const double* c) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    if (j % line == 0)
      for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * stride + j);
    Doubles v = load8(w + j);
    for (int r = 0; r < R; ++r) v = subtract_product(v, splat8(c[r]), load8(q + r * stride + j));
    store8(w + j, v);
  }
  if (j == count) return;
  Doubles v = load8(w + j);
  for (int r = 0; r < R; ++r) v = subtract_product(v, splat8(c[r]), load_rest(q + r * stride + j, count - j));
  store8(w + j, v);
}

int64_t orthogonalize_chunks(int64_t cols) { return divide_up(cols, chunk_cols); }

// c = Q w, norm = |w|; then, where asked for or where a |c_i| > 1e-5 |w|, w -= Q^T c and its norm again.
// Returns the reads of Q, 1 or 2. partial: double (chunks, rows + 1).
int orthogonalize(ConstMatrix Q, Matrix w, bool force, double* c, double* norm, double* partial,
                  Launch launch) {
  const int64_t m = Q.rows, dim = w.cols, chunks = orthogonalize_chunks(dim);
  const auto length = [&](int64_t chunk) {
    return dim - chunk * chunk_cols < chunk_cols ? dim - chunk * chunk_cols : chunk_cols;
  };

  parallel_for(chunks, dim * (m + 1), launch.threads, [&](int64_t chunk) {
    alignas(64) double v[chunk_cols];
    const int64_t first = chunk * chunk_cols, count = length(chunk);
    double* sums = partial + chunk * (m + 1);
    by_dtype(w.dtype, [&](auto type) { widen_row(v, static_cast<decltype(type)*>(w.data) + first, count); });
    by_dtype(Q.dtype, [&](auto type) {
      const auto* q = static_cast<const decltype(type)*>(Q.data) + first;
      int64_t i = 0;
      for (; i + 4 <= m; i += 4)
        dots<4>(q + i * Q.stride, i + 4 < m ? q + (i + 4) * Q.stride : q + chunk_cols, Q.stride, v, count,
                sums + i);
      for (; i < m; ++i)
        dots<1>(q + i * Q.stride, i + 1 < m ? q + (i + 1) * Q.stride : q + chunk_cols, Q.stride, v, count,
                sums + i);
    });
    sums[m] = sq_norm(v, count);
  });
  double square = 0.0;
  for (int64_t i = 0; i < m; ++i) c[i] = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < m; ++i) c[i] += partial[chunk * (m + 1) + i];
    square += partial[chunk * (m + 1) + m];
  }
  *norm = std::sqrt(square);
  bool needed = force;
  for (int64_t i = 0; i < m; ++i) needed |= !(std::fabs(c[i]) <= 1e-5 * *norm);  // a NaN counts as large
  if (!needed) return 1;

  parallel_for(chunks, dim * (m + 1), launch.threads, [&](int64_t k) {
    alignas(64) double v[chunk_cols];
    const int64_t chunk = chunks - 1 - k;  // backwards: what was read last is still in cache
    const int64_t first = chunk * chunk_cols, count = length(chunk);
    by_dtype(w.dtype, [&](auto type) { widen_row(v, static_cast<decltype(type)*>(w.data) + first, count); });
    by_dtype(Q.dtype, [&](auto type) {
      const auto* q = static_cast<const decltype(type)*>(Q.data) + first;
      int64_t i = 0;
      for (; i + 4 <= m; i += 4)
        remove<4>(q + i * Q.stride, i + 4 < m ? q + (i + 4) * Q.stride : q + chunk_cols, Q.stride, v, count,
                  c + i);
      for (; i < m; ++i)
        remove<1>(q + i * Q.stride, i + 1 < m ? q + (i + 1) * Q.stride : q + chunk_cols, Q.stride, v, count,
                  c + i);
    });
    by_dtype(w.dtype, [&](auto type) {
      auto* out = static_cast<decltype(type)*>(w.data) + first;
      narrow_row(out, v, count);
      widen_row(v, out, count);
    });
    partial[chunk] = sq_norm(v, count);
  });
  square = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) square += partial[chunk];
  *norm = std::sqrt(square);
  return 2;
}

constexpr int64_t rotate_buffer = 1 << 14;  // doubles: 128 KiB
constexpr int64_t rotate_widest = 512;      // columns a block

// out(R, cols) = S[:, j..j+R)^T buffer, eight columns at a time; rows of buffer and out are `pitch` apart.
template <int R>
void combine(const double* buffer, int64_t pitch, int64_t cols, const double* S, int64_t m, int64_t k,
             double* out) {
  for (int64_t col = 0; col < cols; col += 8) {
    Doubles sums[R];
    for (int r = 0; r < R; ++r) sums[r] = splat8(0.0);
    for (int64_t i = 0; i < m; ++i) {
      const Doubles q = load8(buffer + i * pitch + col);
      for (int r = 0; r < R; ++r) sums[r] = add_product(sums[r], splat8(S[i * k + r]), q);
    }
    for (int r = 0; r < R; ++r) store8(out + r * pitch + col, sums[r]);
  }
}

template <class T>
void rotate_as(T* Q, int64_t stride, int64_t m, int64_t dim, const double* S, int64_t k, int threads) {
  const int64_t fit = rotate_buffer / m / 8 * 8, pitch = fit < rotate_widest ? fit : rotate_widest;
  parallel_for(divide_up(dim, pitch), dim * m, threads, [&](int64_t chunk) {
    alignas(64) double buffer[rotate_buffer];
    alignas(64) double out[4 * rotate_widest];
    const int64_t first = chunk * pitch, count = dim - first < pitch ? dim - first : pitch;
    for (int64_t i = 0; i < m; ++i) widen_row(buffer + i * pitch, Q + i * stride + first, count);
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) {
      combine<4>(buffer, pitch, count, S + j, m, k, out);
      for (int r = 0; r < 4; ++r) narrow_row(Q + (j + r) * stride + first, out + r * pitch, count);
    }
    for (; j < k; ++j) {
      combine<1>(buffer, pitch, count, S + j, m, k, out);
      narrow_row(Q + j * stride + first, out, count);
    }
  });
}

// First k rows of Q <- S^T Q in place, by blocks of columns; S: double (m, k), m <= rotate_buffer / 8.
void rotate(Matrix Q, const double* S, int64_t k, Launch launch) {
  if (Q.rows == 0 || k == 0) return;
  by_dtype(Q.dtype, [&](auto type) {
    rotate_as(static_cast<decltype(type)*>(Q.data), Q.stride, Q.rows, Q.cols, S, k, launch.threads);
  });
}

template <class T>
inline T sign(bool plus) {
  return narrow<T>(static_cast<typename Wide<T>::type>(plus ? 1 : -1));
}

// +1 where the top bit of the unit's lane is 0, else -1.
void rademacher(Matrix out, uint64_t stream, uint64_t seed, uint64_t site, int threads) {
  const int64_t streams = static_cast<int64_t>(stream);
  for_each_piece(1, out.cols, true, {&streams, seed, site, 1 << 15}, threads,
                 [&](int64_t, int64_t unit, int64_t count, const uint8_t* bits) {
                   by_dtype(out.dtype, [&](auto type) {
                     using T = decltype(type);
                     const T signs[2] = {sign<T>(false), sign<T>(true)};
                     T* to = static_cast<T*>(out.data) + unit;
                     for (int64_t i = 0; i < count; ++i) to[i] = signs[bits[i / 8] >> (i % 8) & 1];
                   });
                 });
}

// Box-Muller in double: words 2q and 2q+1 of the stream give units 2q and 2q+1.
void normal(Matrix out, uint64_t stream, uint64_t seed, uint64_t site, int threads) {
  constexpr int64_t span = 1024;  // counters a chunk, four units each
  constexpr double turn = 0x1p-32, two_pi = 6.283185307179586476925287;
  const PhiloxKey key(seed, site);
  parallel_for(divide_up(out.cols, 4 * span), out.cols, threads, [&](int64_t chunk) {
    double units[4 * span];
    const int64_t first = chunk * 4 * span, left = out.cols - first,
                  count = left < 4 * span ? left : 4 * span;
    for (int64_t i = 0; i < divide_up(count, 4); ++i) {
      const Words words = philox(static_cast<uint32_t>(chunk * span + i), stream, key);
      for (int q = 0; q < 2; ++q) {
        const double radius = std::sqrt(-2.0 * std::log((words.w[2 * q] + 1.0) * turn));
        const double angle = two_pi * words.w[2 * q + 1] * turn;
        units[4 * i + 2 * q] = radius * std::cos(angle);
        units[4 * i + 2 * q + 1] = radius * std::sin(angle);
      }
    }
    by_dtype(out.dtype,
             [&](auto type) { narrow_row(static_cast<decltype(type)*>(out.data) + first, units, count); });
  });
}

void probe(Matrix out, uint64_t stream, uint64_t seed, uint64_t site, bool gaussian, Launch launch) {
  return (gaussian ? normal : rademacher)(out, stream, seed, site, launch.threads);
}

}  // namespace

namespace DROPSCOPE_ISA {
const SpectralKernels spectral{orthogonalize_chunks, orthogonalize, rotate, probe};
}

}  // namespace dropscope
