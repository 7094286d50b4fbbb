// Epilogues of the products of per-sample gradient factors: the gradient of sample i is sum_t b_it a_it^T,
// row i*steps + t of B and of A. The products themselves are torch's; these passes run on tiles that are
// still in cache. Every output element is summed by one thread in one order: the bits do not depend on the
// thread count.
#include <cstring>

#include "kernels.hpp"
#include "parallel.hpp"

namespace dropscope::DROPSCOPE_ISA {
namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(int32_t x) { return static_cast<float>(x); }
inline float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
inline T narrow(decltype(widen(T{})) x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : even)};
}

template <class T>
using Wide = decltype(widen(T{}));

template <class T>
const T* row(const ConstMatrix& m, int64_t i) {
  return static_cast<const T*>(m.data) + i * m.stride;
}
template <class T>
T* row(const Matrix& m, int64_t i) {
  return static_cast<T*>(m.data) + i * m.stride;
}

// Lanes are fixed, so that every instruction set sums in the same order; fp32 only within a block of 512.
constexpr int64_t lanes = 32, dot_block = 512;

// Factors come from memory: the next ones are asked for here, as the hardware stops at the end of each page.
template <class T>
inline void fetch_ahead(const T* x) {
#if defined(__GNUC__)
  const char* at = reinterpret_cast<const char*>(x) + 4096;
  for (size_t line = 0; line < lanes * sizeof(T); line += 64) __builtin_prefetch(at + line);
#else
  (void)x;
#endif
}

template <class P, class T>
double dot(const P* __restrict x, const T* __restrict y, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += dot_block) {
    const int64_t stop = start + dot_block < n ? start + dot_block : n;
    Wide<T> sums[lanes] = {};
    int64_t j = start;
    for (; j + lanes <= stop; j += lanes) {
      fetch_ahead(y + j);
      for (int64_t l = 0; l < lanes; ++l) sums[l] += widen(x[j + l]) * widen(y[j + l]);
    }
    for (int64_t l = 0; j + l < stop; ++l) sums[l] += widen(x[j + l]) * widen(y[j + l]);
    for (int64_t half = lanes / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
    total += sums[0];
  }
  return total;
}

// out[i, k] += sum_t <P[(i / group) * steps + t, block k], B[i * steps + t, :]>, block k the k-th run of
// B.cols. P is of the type of B, or wider: a product in float of factors held in bfloat16.
template <class T, class Out, class Product = T>
void row_dots(ConstMatrix P, ConstMatrix B, Matrix out, int64_t group, int64_t steps, Launch launch) {
  const int64_t chunk_rows = steps < 16 ? divide_up(16, steps) : 1;
  parallel_for(divide_up(out.rows, chunk_rows), B.rows * P.cols, launch.threads, [&](int64_t chunk) {
    const int64_t stop = (chunk + 1) * chunk_rows < out.rows ? (chunk + 1) * chunk_rows : out.rows;
    for (int64_t i = chunk * chunk_rows; i < stop; ++i)
      for (int64_t k = 0; k < out.cols; ++k) {
        double total = 0;
        for (int64_t t = 0; t < steps; ++t)
          total += dot(row<Product>(P, i / group * steps + t) + k * B.cols, row<T>(B, i * steps + t), B.cols);
        row<Out>(out, i)[k] += static_cast<Out>(total);
      }
  });
}

template <class T, class Out>
void scale_row(const T* __restrict x, Wide<T> s, int64_t n, Out* __restrict to) {
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    fetch_ahead(x + j);
    for (int64_t l = 0; l < lanes; ++l) to[j + l] = narrow<Out>(s * widen(x[j + l]));
  }
  for (; j < n; ++j) to[j] = narrow<Out>(s * widen(x[j]));
}

// out[i * steps + t, k * B.cols + j] = sum_m S[i * group + m, k] B[(i * group + m) * steps + t, j], m <
// group. out is of the type of B, or wider.
template <class T, class Out = T>
void scale_rows(ConstMatrix B, ConstMatrix S, Matrix out, int64_t group, int64_t steps, Launch launch) {
  constexpr int64_t chunk_rows = 16, width = 256;
  parallel_for(divide_up(out.rows, chunk_rows), B.rows * S.cols * B.cols, launch.threads, [&](int64_t chunk) {
    const int64_t stop = (chunk + 1) * chunk_rows < out.rows ? (chunk + 1) * chunk_rows : out.rows;
    for (int64_t r = chunk * chunk_rows; r < stop; ++r) {
      const int64_t first = r / steps * group, t = r % steps;
      for (int64_t k = 0; k < S.cols; ++k) {
        if (group == 1) {
          scale_row(row<T>(B, r), row<Wide<T>>(S, first)[k], B.cols, row<Out>(out, r) + k * B.cols);
          continue;
        }
        for (int64_t start = 0; start < B.cols; start += width) {
          const int64_t n = B.cols - start < width ? B.cols - start : width;
          Wide<T> sums[width];
          const Wide<T> s = row<Wide<T>>(S, first)[k];
          const T* b = row<T>(B, first * steps + t) + start;
          for (int64_t j = 0; j < n; ++j) sums[j] = s * widen(b[j]);
          for (int64_t m = 1; m < group; ++m) {
            const Wide<T> sm = row<Wide<T>>(S, first + m)[k];
            const T* bm = row<T>(B, (first + m) * steps + t) + start;
            for (int64_t j = 0; j < n; ++j) sums[j] += sm * widen(bm[j]);
          }
          Out* to = row<Out>(out, r) + k * B.cols + start;
          for (int64_t j = 0; j < n; ++j) to[j] = narrow<Out>(sums[j]);
        }
      }
    }
  });
}

// One block of values: v[i, j] = sum_ts (P[..] + shift) Q[..]; rows and columns of P are shared by groups.
constexpr int64_t block_rows = 16, block_cols = 128;

// to[j] = from[(j0 + j) / group] + shift, after scaling by the row's and the columns' scales, if any.
template <class T>
void spread(const T* from, int64_t j0, int64_t cols, int64_t group, Wide<T> shift, float row_scale,
            const float* col_scales, Wide<T>* to) {
  if (group == 1 && !col_scales) {
    for (int64_t j = 0; j < cols; ++j) to[j] = widen(from[j0 + j]) + shift;
    return;
  }
  if (group == 1) {
    for (int64_t j = 0; j < cols; ++j) to[j] = widen(from[j0 + j]) * (row_scale * col_scales[j0 + j]) + shift;
    return;
  }
  int64_t c = j0 / group, left = group - j0 % group;
  for (int64_t j = 0; j < cols; left = group, ++c) {
    const Wide<T> value = widen(from[c]) * (col_scales ? row_scale * col_scales[c] : 1.0f) + shift;
    const int64_t stop = j + left < cols ? j + left : cols;
    for (; j < stop; ++j) to[j] = value;
  }
}

template <class T>
void hadamard_block(const Hadamard& h, int64_t i0, int64_t rows, int64_t j0, int64_t cols, Wide<T>* values) {
  const Wide<T> shift = static_cast<Wide<T>>(h.shift);
  Wide<T> p[block_cols];
  for (int64_t i = 0; i < rows; ++i) {
    Wide<T>* v = values + i * block_cols;
    if (h.row_steps == 1 && h.col_steps == 1) {
      const T* q = row<T>(h.Q, i0 + i) + j0;
      if (!h.P.data) {
        for (int64_t j = 0; j < cols; ++j) v[j] = widen(q[j]);
        continue;
      }
      if (i == 0 || (i0 + i) % h.row_group == 0) {
        const int64_t r = (i0 + i) / h.row_group;
        spread(row<T>(h.P, r), j0, cols, h.col_group, shift, h.p_rows ? h.p_rows[r] : 1.0f, h.p_cols, p);
      }
      if (h.q_rows) {
        const float scale = h.q_rows[i0 + i];
        for (int64_t j = 0; j < cols; ++j) v[j] = p[j] * (widen(q[j]) * (scale * h.q_cols[j0 + j]));
      } else {
        for (int64_t j = 0; j < cols; ++j) v[j] = p[j] * widen(q[j]);
      }
      continue;
    }
    for (int64_t j = 0; j < cols; ++j) {
      Wide<T> total = 0;
      for (int64_t t = 0; t < h.row_steps; ++t) {
        const T* q = row<T>(h.Q, (i0 + i) * h.row_steps + t) + (j0 + j) * h.col_steps;
        const T* a =
            row<T>(h.P, (i0 + i) / h.row_group * h.row_steps + t) + (j0 + j) / h.col_group * h.col_steps;
        Wide<T> partial[lanes] = {};
        int64_t s = 0;
        for (; s + lanes <= h.col_steps; s += lanes)
          for (int64_t l = 0; l < lanes; ++l) partial[l] += (widen(a[s + l]) + shift) * widen(q[s + l]);
        for (int64_t l = 0; s + l < h.col_steps; ++l)
          partial[l] += (widen(a[s + l]) + shift) * widen(q[s + l]);
        for (int64_t half = lanes / 2; half > 0; half /= 2)
          for (int64_t l = 0; l < half; ++l) partial[l] += partial[l + half];
        total += partial[0];
      }
      v[j] = total;
    }
  }
}

// out += v and, where `mirror` has memory, mirror += v^T. A mirror that is out itself makes out symmetric to
// the bit from the lower triangle of v.
template <class T, class Out>
void hadamard(const Hadamard& h, Matrix out, Matrix mirror, Launch launch) {
  const bool lower = mirror.data == out.data;
  parallel_for(divide_up(out.rows, block_rows), h.Q.rows * h.Q.cols, launch.threads, [&](int64_t chunk) {
    Wide<T> values[block_rows * block_cols];
    const int64_t i0 = chunk * block_rows, rows = out.rows - i0 < block_rows ? out.rows - i0 : block_rows;
    const int64_t reach = lower && i0 + rows < out.cols ? i0 + rows : out.cols;
    for (int64_t j0 = 0; j0 < reach; j0 += block_cols) {
      const int64_t cols = reach - j0 < block_cols ? reach - j0 : block_cols;
      hadamard_block<T>(h, i0, rows, j0, cols, values);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = lower && i0 + i + 1 - j0 < cols ? i0 + i + 1 - j0 : cols;
        Out* to = row<Out>(out, i0 + i) + j0;
        const Wide<T>* v = values + i * block_cols;
        for (int64_t j = 0; j < n; ++j) to[j] += static_cast<Out>(v[j]);
      }
      if (!mirror.data) continue;
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t first = lower && j0 + j + 1 > i0 ? j0 + j + 1 - i0 : 0;
        Out* to = row<Out>(mirror, j0 + j) + i0;
        for (int64_t i = first; i < rows; ++i) to[i] += static_cast<Out>(values[i * block_cols + j]);
      }
    }
  });
}

// X[i * draws + m, :] <- scale (X[i * draws + m, :] - mean over m).
template <class T>
void center(Matrix X, int64_t draws, double scale, Launch launch) {
  constexpr int64_t width = 64;
  const int64_t chunk_groups = 64;
  const int64_t groups = X.rows / draws;
  parallel_for(divide_up(groups, chunk_groups), X.rows * X.cols, launch.threads, [&](int64_t chunk) {
    const int64_t stop = (chunk + 1) * chunk_groups < groups ? (chunk + 1) * chunk_groups : groups;
    for (int64_t g = chunk * chunk_groups; g < stop; ++g)
      for (int64_t start = 0; start < X.cols; start += width) {
        const int64_t n = X.cols - start < width ? X.cols - start : width;
        double mean[width] = {};
        for (int64_t m = 0; m < draws; ++m) {
          const T* x = row<T>(X, g * draws + m) + start;
          for (int64_t j = 0; j < n; ++j) mean[j] += x[j];
        }
        for (int64_t j = 0; j < n; ++j) mean[j] /= static_cast<double>(draws);
        for (int64_t m = 0; m < draws; ++m) {
          T* x = row<T>(X, g * draws + m) + start;
          for (int64_t j = 0; j < n; ++j) x[j] = static_cast<T>(scale * (x[j] - mean[j]));
        }
      }
  });
}

// The table's entries: one template per pair of types.

#define DROPSCOPE_BY_TYPE(dtype, call) \
  switch (dtype) {                     \
    case DType::f32: {                 \
      using T = float;                 \
      call;                            \
      break;                           \
    }                                  \
    case DType::f64: {                 \
      using T = double;                \
      call;                            \
      break;                           \
    }                                  \
    case DType::bf16: {                \
      using T = bfloat16;              \
      call;                            \
      break;                           \
    }                                  \
    default:                           \
      break;                           \
  }

void row_dots_of(ConstMatrix P, ConstMatrix B, Matrix out, int64_t group, int64_t steps, Launch launch) {
  const bool wide = out.dtype == DType::f64;
  if (P.dtype != B.dtype) {
    (wide ? row_dots<bfloat16, double, float> : row_dots<bfloat16, float, float>)(P, B, out, group, steps,
                                                                                  launch);
    return;
  }
  DROPSCOPE_BY_TYPE(B.dtype,
                    (wide ? row_dots<T, double> : row_dots<T, float>)(P, B, out, group, steps, launch))
}

void scale_rows_of(ConstMatrix B, ConstMatrix S, Matrix out, int64_t group, int64_t steps, Launch launch) {
  if (out.dtype != B.dtype) {
    scale_rows<bfloat16, float>(B, S, out, group, steps, launch);
    return;
  }
  DROPSCOPE_BY_TYPE(B.dtype, scale_rows<T>(B, S, out, group, steps, launch))
}

void hadamard_of(Hadamard h, Matrix out, Matrix mirror, Launch launch) {
  const bool wide = out.dtype == DType::f64;
  if (h.Q.dtype == DType::i32) {
    (wide ? hadamard<int32_t, double> : hadamard<int32_t, float>)(h, out, mirror, launch);
    return;
  }
  DROPSCOPE_BY_TYPE(h.Q.dtype, (wide ? hadamard<T, double> : hadamard<T, float>)(h, out, mirror, launch))
}

void center_of(Matrix X, int64_t draws, double scale, Launch launch) {
  if (X.dtype == DType::f64)
    center<double>(X, draws, scale, launch);
  else
    center<float>(X, draws, scale, launch);
}

}  // namespace

const FactorKernels factors{row_dots_of, scale_rows_of, hadamard_of, center_of};

}  // namespace dropscope::DROPSCOPE_ISA
