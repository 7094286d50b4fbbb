// Products of the rows of a basis with a vector, and their removal from it: in double, or in float where
// basis and vector are float32 or bfloat16.
#pragma once
#include <type_traits>

#include "floats.hpp"

namespace dropscope {
namespace {

constexpr int64_t run_cols = 256;  // summed in float: 16 products a lane

// Rows are read four to seven at a time; the hardware loses their tracks at the ends of pages.
inline void fetch_ahead(const void* line) {
#if defined(__GNUC__)
  __builtin_prefetch(static_cast<const char*>(line) + 2048);
#else
  (void)line;
#endif
}

// Rows whose sums the registers hold.
constexpr int most_rows = Floats::count > 2 ? 2 : 7;

// Whether a chunk of w is kept with even and odd places apart, 16 of each in turn, as load_pair gives rows of
// TQ.
template <class Real, class TQ>
constexpr bool apart = std::is_same_v<Real, float> && std::is_same_v<TQ, BFloat16>;

template <class T>
void set_apart(float* v, const T* w, int64_t count) {
  int64_t j = 0;
  for (; j + 32 <= count; j += 32)
    for (int i = 0; i < 16; ++i) v[j + i] = widen(w[j + 2 * i]), v[j + 16 + i] = widen(w[j + 2 * i + 1]);
  if (j == count) return;
  std::memset(v + j, 0, 32 * sizeof *v);
  for (int i = 0; i < count - j; ++i) v[j + i / 2 + 16 * (i % 2)] = widen(w[j + i]);
}
// w = v in the order of w, and v rounded to what was written.
template <class T>
void put_together(T* w, float* v, int64_t count) {
  int64_t j = 0;
  for (; j + 32 <= count; j += 32)
    for (int i = 0; i < 16; ++i)
      w[j + 2 * i] = narrow<T>(v[j + i]), w[j + 2 * i + 1] = narrow<T>(v[j + 16 + i]);
  for (int i = 0; i < count - j; ++i) w[j + i] = narrow<T>(v[j + i / 2 + 16 * (i % 2)]);
  if (!std::is_same_v<T, float>) set_apart(v, w, count);
}

template <class T>
double sq_norm(const T* w, int64_t count) {
  Doubles sums[2] = {splat8(0.0), splat8(0.0)};
  int64_t j = 0;
  for (; j + 16 <= count; j += 16)
    for (int i = 0; i < 2; ++i) sums[i] = add_product(sums[i], load8(w + j + 8 * i), load8(w + j + 8 * i));
  double rest = 0.0;
  for (; j < count; ++j) rest += static_cast<double>(w[j]) * static_cast<double>(w[j]);
  return total(sums[0]) + total(sums[1]) + rest;
}

// out[r] = <q + r*stride, w>, R rows at once so that w is loaded once for all.
template <int R, class T>
void dots(const T* q, int64_t stride, const double* w, int64_t count, double* out) {
  Doubles sums[R];
  for (int r = 0; r < R; ++r) sums[r] = splat8(0.0);
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    const Doubles v = load8(w + j);
    for (int r = 0; r < R; ++r) sums[r] = add_product(sums[r], load8(q + r * stride + j), v);
  }
  if (j < count) {
    const Doubles v = load_rest(w + j, count - j);
    for (int r = 0; r < R; ++r) sums[r] = add_product(sums[r], load_rest(q + r * stride + j, count - j), v);
  }
  for (int r = 0; r < R; ++r) out[r] = total(sums[r]);
}
template <int R>
void dots(const float* q, int64_t stride, const float* w, int64_t count, double* out) {
  if constexpr (R > most_rows) {
    dots<most_rows>(q, stride, w, count, out);
    return dots<R - most_rows>(q + most_rows * stride, stride, w, count, out + most_rows);
  }
  Doubles sums[R];
  for (int r = 0; r < R; ++r) sums[r] = splat8(0.0);
  for (int64_t j = 0; j < count;) {
    const int64_t end = count - j < run_cols ? count : j + run_cols;
    Floats run[R];
    for (int r = 0; r < R; ++r) run[r] = splat16(0.0f);
    for (; j + 16 <= end; j += 16) {
      const Floats v = load16(w + j);
      for (int r = 0; r < R; ++r) {
        fetch_ahead(q + r * stride + j);
        run[r] = add_product(run[r], load16(q + r * stride + j), v);
      }
    }
    if (j < end) {
      const Floats v = load_rest16(w + j, end - j);
      for (int r = 0; r < R; ++r) run[r] = add_product(run[r], load_rest16(q + r * stride + j, end - j), v);
      j = end;
    }
    for (int r = 0; r < R; ++r) sums[r] = add_halves(sums[r], run[r]);
  }
  for (int r = 0; r < R; ++r) out[r] = total(sums[r]);
}

// Rows in bfloat16 at one multiple of 32 columns: in place or, of fewer columns, a copy filled up with zeros.
template <int R>
struct Rows32 {
  const BFloat16* at[R];
  BFloat16 rest[R][32];

  Rows32(const BFloat16* q, int64_t stride, int64_t count) {
    for (int r = 0; r < R; ++r) {
      at[r] = q + r * stride;
      fetch_ahead(at[r]);
    }
    if (count >= 32) return;
    std::memset(rest, 0, sizeof rest);
    for (int r = 0; r < R; ++r) {
      std::memcpy(rest[r], at[r], static_cast<size_t>(count) * sizeof(BFloat16));
      at[r] = rest[r];
    }
  }
};

// Adds the products of up to 256 columns of R rows to their sums.
template <int R>
inline void add_run(const BFloat16* q, int64_t stride, const float* w, int64_t count, Doubles* sums) {
  if constexpr (R > most_rows) {  // while this piece of w is in the first cache
    add_run<most_rows>(q, stride, w, count, sums);
    return add_run<R - most_rows>(q + most_rows * stride, stride, w, count, sums + most_rows);
  }
  Floats run[R];
  for (int r = 0; r < R; ++r) run[r] = splat16(0.0f);
  for (int64_t j = 0; j < count; j += 32) {
    const Rows32<R> rows(q + j, stride, count - j);
    for (int i = 0; i < Floats::count; ++i) {
      const Floats::Register even = load_floats(w + j + i * Floats::width);
      const Floats::Register odd = load_floats(w + j + 16 + i * Floats::width);
      for (int r = 0; r < R; ++r) {
        const Pair x = load_pair(rows.at[r] + 2 * i * Floats::width);
        run[r].r[i] = (run[r].r[i] + x.even * even) + x.odd * odd;
      }
    }
  }
  for (int r = 0; r < R; ++r) sums[r] = add_halves(sums[r], run[r]);
}
// The rows in bfloat16, w set apart.
template <int R>
void dots(const BFloat16* q, int64_t stride, const float* w, int64_t count, double* out) {
  Doubles sums[R];
  for (int r = 0; r < R; ++r) sums[r] = splat8(0.0);
  for (int64_t j = 0; j < count; j += run_cols)
    add_run<R>(q + j, stride, w + j, count - j < run_cols ? count - j : run_cols, sums);
  for (int r = 0; r < R; ++r) out[r] = total(sums[r]);
}

// w -= sum_r c[r] * (q + r*stride).
template <int R, class T>
void remove(const T* q, int64_t stride, double* w, int64_t count, const double* c) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    Doubles v = load8(w + j);
    for (int r = 0; r < R; ++r) v = subtract_product(v, splat8(c[r]), load8(q + r * stride + j));
    store8(w + j, v);
  }
  if (j == count) return;
  Doubles v = load_rest(w + j, count - j);
  for (int r = 0; r < R; ++r) v = subtract_product(v, splat8(c[r]), load_rest(q + r * stride + j, count - j));
  store_rest(w + j, v, count - j);
}
// A coefficient is the sum of two floats: rounded to one, it would leave 2^-24 of itself in w.
template <int R>
inline void split(const double* c, Floats (&high)[R], Floats (&low)[R]) {
  for (int r = 0; r < R; ++r) {
    const float rounded = static_cast<float>(c[r]);
    high[r] = splat16(rounded), low[r] = splat16(static_cast<float>(c[r] - rounded));
  }
}
template <int R>
void remove(const float* q, int64_t stride, float* w, int64_t count, const double* c) {
  Floats high[R], low[R];
  split<R>(c, high, low);
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) {
    Floats v = load16(w + j), rest = splat16(0.0f);
    for (int r = 0; r < R; ++r) {
      const Floats x = load16(q + r * stride + j);
      fetch_ahead(q + r * stride + j);
      v = subtract_product(v, high[r], x), rest = subtract_product(rest, low[r], x);
    }
    v = add(v, rest);
    store16(w + j, v);
  }
  if (j == count) return;
  Floats v = load_rest16(w + j, count - j), rest = splat16(0.0f);
  for (int r = 0; r < R; ++r) {
    const Floats x = load_rest16(q + r * stride + j, count - j);
    v = subtract_product(v, high[r], x), rest = subtract_product(rest, low[r], x);
  }
  store_rest16(w + j, add(v, rest), count - j);
}
// A register at a time, so that few hold what they need.
template <int R>
void remove(const BFloat16* q, int64_t stride, float* w, int64_t count, const double* c) {
  Floats high[R], low[R];
  split<R>(c, high, low);
  for (int64_t j = 0; j < count; j += 32) {
    const Rows32<R> rows(q + j, stride, count - j);
    for (int i = 0; i < Floats::count; ++i) {
      float* at = w + j + i * Floats::width;
      Pair v{load_floats(at), load_floats(at + 16)}, rest{splat_floats(0.0f), splat_floats(0.0f)};
      for (int r = 0; r < R; ++r) {
        const Pair x = load_pair(rows.at[r] + 2 * i * Floats::width);
        v = {v.even - high[r].r[0] * x.even, v.odd - high[r].r[0] * x.odd};
        rest = {rest.even - low[r].r[0] * x.even, rest.odd - low[r].r[0] * x.odd};
      }
      store_floats(at, v.even + rest.even), store_floats(at + 16, v.odd + rest.odd);
    }
  }
}

}  // namespace
}  // namespace dropscope
