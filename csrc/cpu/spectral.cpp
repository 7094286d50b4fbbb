// Krylov bases and probes: the same bits for every thread count and instruction set, as all sums run over
// chunks of fixed size in fixed lanes. Sums run in double; where basis and vector are float32 or bfloat16,
// orthogonalize adds runs of 16 products a lane in float first, which keeps up with memory where conversions
// of every element do not. A coefficient is then off by at most 17 * 2^-24 |w| = 1e-6 |w| and, rounding being
// random, by about 2^-24 |w| / sqrt(dim), as from the rounding of w itself. Products that underflow in float
// are lost.
#include <cmath>
#include <type_traits>

#include "apply.hpp"
#include "dots.hpp"
#include "keep.hpp"
#include "normals.hpp"
#include "signs.hpp"

namespace dropscope {
namespace {

// Columns a chunk: 64 KiB of w, which stay in the second cache, and pieces of rows long enough for the
// hardware to see them coming.
template <class Real>
constexpr int64_t chunk_cols = (1 << 16) / sizeof(Real);

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

int64_t orthogonalize_scratch(int64_t rows, int64_t cols) {
  return divide_up(cols, chunk_cols<double>) * (rows + 1);
}

// A chunk of w in Real and in the order that rows of TQ want: itself, or a copy in the buffer, filled up with
// zeros.
template <class Real, class TQ, class T>
Real* widened(T* w, Real* buffer, int64_t count) {
  if constexpr (apart<Real, TQ>) {
    set_apart(buffer, w, count);
    return buffer;
  } else if constexpr (std::is_same_v<Real, T>) {
    (void)buffer, (void)count;
    return w;
  } else {
    for (int64_t j = 0; j < count; ++j) buffer[j] = static_cast<Real>(widen(w[j]));
    return buffer;
  }
}
// Writes the copy back and rounds it to what was written.
template <class Real, class TQ, class T>
void write_back(T* w, Real* v, int64_t count) {
  if constexpr (apart<Real, TQ>) {
    put_together(w, v, count);
  } else if constexpr (!std::is_same_v<Real, T>) {
    for (int64_t j = 0; j < count; ++j) {
      w[j] = narrow<T>(static_cast<float>(v[j]));
      v[j] = static_cast<Real>(widen(w[j]));
    }
  } else {
    (void)w, (void)v, (void)count;
  }
}

// f(first, rows) for groups of four rows, the last of up to seven: a row alone would cost a pass over w.
template <class F>
void by_rows(int64_t m, const F& f) {
  int64_t i = 0;
  for (; m - i >= 8; i += 4) f(i, std::integral_constant<int, 4>{});
  switch (m - i) {
    case 1:
      return f(i, std::integral_constant<int, 1>{});
    case 2:
      return f(i, std::integral_constant<int, 2>{});
    case 3:
      return f(i, std::integral_constant<int, 3>{});
    case 4:
      return f(i, std::integral_constant<int, 4>{});
    case 5:
      return f(i, std::integral_constant<int, 5>{});
    case 6:
      return f(i, std::integral_constant<int, 6>{});
    case 7:
      return f(i, std::integral_constant<int, 7>{});
    default:
      return;
  }
}

template <class Real, class TQ, class T>
int orthogonalize_in(ConstMatrix Q, T* w, int64_t dim, bool force, double* c, double* norm, double* partial,
                     int threads) {
  constexpr int64_t cols = chunk_cols<Real>;
  const int64_t m = Q.rows, chunks = divide_up(dim, cols);
  const auto length = [&](int64_t chunk) { return dim - chunk * cols < cols ? dim - chunk * cols : cols; };

  parallel_for(chunks, dim * (m + 1), threads, [&](int64_t chunk) {
    alignas(64) Real buffer[cols];
    const int64_t first = chunk * cols, count = length(chunk);
    double* sums = partial + chunk * (m + 1);
    const Real* v = widened<Real, TQ>(w + first, buffer, count);
    const TQ* q = static_cast<const TQ*>(Q.data) + first;
    by_rows(m, [&](int64_t i, auto rows) {
      dots<decltype(rows)::value>(q + i * Q.stride, Q.stride, v, count, sums + i);
    });
    sums[m] = sq_norm(v, apart<Real, TQ> ? divide_up(count, 32) * 32 : count);
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

  parallel_for(chunks, dim * (m + 1), threads, [&](int64_t k) {
    alignas(64) Real buffer[cols];
    const int64_t chunk = chunks - 1 - k;  // backwards: what was read last is still in cache
    const int64_t first = chunk * cols, count = length(chunk);
    Real* v = widened<Real, TQ>(w + first, buffer, count);
    const TQ* q = static_cast<const TQ*>(Q.data) + first;
    by_rows(m, [&](int64_t i, auto rows) {
      remove<decltype(rows)::value>(q + i * Q.stride, Q.stride, v, count, c + i);
    });
    write_back<Real, TQ>(w + first, v, count);
    partial[chunk] = sq_norm(v, apart<Real, TQ> ? divide_up(count, 32) * 32 : count);
  });
  square = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) square += partial[chunk];
  *norm = std::sqrt(square);
  return 2;
}

// c = Q w, norm = |w|; then, where asked for or where a |c_i| > 1e-5 |w|, w -= Q^T c and its norm again.
// result: c, the norm and the reads of Q, 1 or 2. partial: double (chunks, rows + 1).
void orthogonalize(ConstMatrix Q, Matrix w, bool force, double* result, double* partial, Launch launch) {
  double *norm = result + Q.rows, *reads = norm + 1;
  by_dtype(Q.dtype, [&](auto of_basis) {
    by_dtype(w.dtype, [&](auto of_vector) {
      using TQ = decltype(of_basis);
      using T = decltype(of_vector);
      constexpr bool wide = std::is_same_v<TQ, double> || std::is_same_v<T, double>;
      using Real = std::conditional_t<wide, double, float>;
      *reads = orthogonalize_in<Real, TQ>(Q, static_cast<T*>(w.data), w.cols, force, result, norm, partial,
                                          launch.threads);
    });
  });
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

// +1 where the top bit of the unit's lane is 0, else -1.
void rademacher(Matrix out, uint64_t stream, uint64_t seed, uint64_t site, int threads) {
  const int64_t streams = static_cast<int64_t>(stream);
  for_each_piece(
      1, out.cols, true, {&streams, seed, site, 1 << 15}, threads,
      [](int64_t, int64_t, int64_t) { return Fetch{}; },
      [&](int64_t, int64_t unit, int64_t count, const Kept* kept) {
        by_dtype(out.dtype,
                 [&](auto type) { signs(static_cast<decltype(type)*>(out.data) + unit, kept, count); });
      });
}

// The same double whatever the dtype, rounded to it.
void normal(Matrix out, uint64_t stream, uint64_t seed, uint64_t site, int threads) {
  const Keys keys = make_keys({nullptr, seed, site, 1});
  parallel_for(divide_up(out.cols, 4 * tile), out.cols, threads, [&](int64_t chunk) {
    alignas(64) uint32_t words[4 * (tile + step)];
    alignas(64) double units[4 * tile];
    const int64_t first = chunk * 4 * tile, left = out.cols - first,
                  count = left < 4 * tile ? left : 4 * tile;
    fill_row(words, chunk * tile, divide_up(count, 4), stream, keys, Fetch{});
    normals(units, words, divide_up(count, 2));
    by_dtype(out.dtype,
             [&](auto type) { narrow_row(static_cast<decltype(type)*>(out.data) + first, units, count); });
  });
}

void probe(Matrix out, uint64_t stream, uint64_t seed, uint64_t site, bool gaussian, Launch launch) {
  return (gaussian ? normal : rademacher)(out, stream, seed, site, launch.threads);
}

}  // namespace

namespace DROPSCOPE_ISA {
const SpectralKernels spectral{orthogonalize_scratch, orthogonalize, rotate, probe};
}

}  // namespace dropscope
