// Krylov bases and probes on CUDA. Sums run in a fixed order, which depends on the number of multiprocessors
// alone: in double, and where neither basis nor vector is double over eight products a thread in float first.
#include "cuda/counters.cuh"

namespace dropscope {
namespace {

constexpr int own = 8, span = own * threads_per_block;  // columns of a thread and of a block
constexpr int block_rows = 128;                         // rows whose sums a block keeps
constexpr int64_t most_blocks = 2048;

// Rows whose loads are on their way at once.
template <class TQ>
constexpr int rows_at_once = sizeof(TQ) == 8 ? 4 : 8;

// Eight columns of a row: V at a time, those of a block's threads side by side; zeros beyond `left`.
template <class T, int V>
struct Columns {
  Pack<T, V> packs[own / V];

  __device__ static int64_t offset(int piece) {
    return static_cast<int64_t>(piece) * V * threads_per_block + threadIdx.x * V;
  }
  __device__ void read(const T* from, int64_t left) {
#pragma unroll
    for (int piece = 0; piece < own / V; ++piece)
      packs[piece] = load<V>(from + offset(piece), left - offset(piece));
  }
  __device__ void write(T* to, int64_t left) const {
#pragma unroll
    for (int piece = 0; piece < own / V; ++piece)
      if (left > offset(piece)) store<V>(to + offset(piece), left - offset(piece), packs[piece]);
  }
  __device__ T& operator[](int j) { return packs[j / V].x[j % V]; }
};

// Sums of `together` values over a warp at once: half of the values cross at each step, until each lane holds
// one, which the rest of the steps then complete: value number lane / (32 / together).
template <int together>
__device__ inline double sum_together(double* values) {
  const int lane = threadIdx.x % 32;
  int bit = 16;
#pragma unroll
  for (int half = together / 2; half > 0; half /= 2, bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const double mine = upper ? values[r + half] : values[r];
      const double theirs = upper ? values[r] : values[r + half];
      values[r] = mine + __shfl_xor_sync(0xffffffffu, theirs, bit);
    }
  }
  for (; bit > 0; bit /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], bit);
  return values[0];
}

// partial[r, block] = <row r of Q, w> over the block's columns, partial[m, block] = |w|^2 of them. 104 to 126
// registers: two blocks a multiprocessor, with loads of at most 64 (bfloat16) or 128 KiB on their way.
template <class Real, class TQ, class T, int V>
__global__ void __launch_bounds__(threads_per_block, 2)
    dots_kernel(const TQ* Q, int64_t stride, int64_t m, const T* w, int64_t dim, double* partial) {
  constexpr int together = rows_at_once<TQ>, holders = 32 / together;
  __shared__ double sums[warps_per_block][block_rows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * block_rows;
  const int rows = m - first < block_rows ? static_cast<int>(m - first) : block_rows;
  for (int r = lane; r < block_rows; r += 32) sums[warp][r] = 0.0;
  __syncwarp();
  double square = 0.0;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * span; base < dim;
       base += static_cast<int64_t>(gridDim.x) * span) {
    Columns<T, V> v;
    v.read(w + base, dim - base);
#pragma unroll
    for (int j = 0; j < own; ++j)
      square += static_cast<double>(widen(v[j])) * static_cast<double>(widen(v[j]));
    const TQ* row = Q + first * stride + base;
    for (int r0 = 0; r0 < rows; r0 += together, row += together * stride) {
      Columns<TQ, V> q[together];
#pragma unroll
      for (int r = 0; r < together; ++r)
        if (r0 + r < rows) q[r].read(row + r * stride, dim - base);
      double dots[together];
#pragma unroll
      for (int r = 0; r < together; ++r) {
        Real run = 0;
#pragma unroll
        for (int j = 0; j < own; ++j)
          run += static_cast<Real>(widen(q[r][j])) * static_cast<Real>(widen(v[j]));
        dots[r] = r0 + r < rows ? static_cast<double>(run) : 0.0;
      }
      const double dot = sum_together<together>(dots);
      if (lane % holders == 0) sums[warp][r0 + lane / holders] += dot;
    }
  }
  square = sum_block(square);  // and every warp's sums are in place
  if (first == 0 && threadIdx.x == 0) partial[m * gridDim.x + blockIdx.x] = square;
  for (int r = threadIdx.x; r < rows; r += threads_per_block) {
    double total = 0.0;
    for (int k = 0; k < warps_per_block; ++k) total += sums[k][r];
    partial[(first + r) * gridDim.x + blockIdx.x] = total;
  }
}

// result[r] = the sum of row r of partial (rows, blocks), of the last row its root: c and |w|.
__global__ void reduce_kernel(const double* partial, int64_t blocks, double* result) {
  double total = 0.0;
  for (int64_t b = threadIdx.x; b < blocks; b += threads_per_block) total += partial[blockIdx.x * blocks + b];
  total = sum_block(total);
  if (threadIdx.x == 0) result[blockIdx.x] = blockIdx.x + 1 == gridDim.x ? sqrt(total) : total;
}

// Whether a second read is asked for or a |c_r| > 1e-5 |w|; a NaN counts as large. The whole block calls it.
__device__ inline bool must_remove(const double* result, int64_t m, bool force) {
  const double bound = 1e-5 * result[m];
  bool large = force;
  for (int64_t r = threadIdx.x; r < m; r += threads_per_block) large |= !(fabs(result[r]) <= bound);
  return __syncthreads_or(large) != 0;
}

// A coefficient is the sum of two floats: rounded to one, it would leave 2^-24 of itself in w.
template <class Real>
struct Coefficient {
  Real high, low;
};
__device__ inline void split(double c, Coefficient<double>& to) { to.high = c, to.low = 0.0; }
__device__ inline void split(double c, Coefficient<float>& to) {
  to.high = static_cast<float>(c), to.low = static_cast<float>(c - static_cast<double>(to.high));
}

// w -= Q^T c where must_remove, partial[block] = |w|^2 of what was written.
template <class Real, class TQ, class T, int V>
__global__ void __launch_bounds__(threads_per_block, 2)
    remove_kernel(const TQ* Q, int64_t stride, int64_t m, T* w, int64_t dim, bool force, const double* result,
                  double* partial) {
  constexpr int together = rows_at_once<TQ>;
  __shared__ Coefficient<Real> c[block_rows];
  if (!must_remove(result, m, force)) return;
  double square = 0.0;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * span; base < dim;
       base += static_cast<int64_t>(gridDim.x) * span) {
    Columns<T, V> stored;
    stored.read(w + base, dim - base);
    Real v[own], rest[own] = {};
#pragma unroll
    for (int j = 0; j < own; ++j) v[j] = static_cast<Real>(widen(stored[j]));
    for (int64_t first = 0; first < m; first += block_rows) {
      const int rows = m - first < block_rows ? static_cast<int>(m - first) : block_rows;
      __syncthreads();  // those of the rows before are used
      const int r = static_cast<int>(threadIdx.x);
      if (r < rows) split(result[first + r], c[r]);
      __syncthreads();
      const TQ* row = Q + first * stride + base;
      for (int r0 = 0; r0 < rows; r0 += together, row += together * stride) {
        Columns<TQ, V> q[together];
#pragma unroll
        for (int r = 0; r < together; ++r)
          if (r0 + r < rows) q[r].read(row + r * stride, dim - base);
#pragma unroll
        for (int r = 0; r < together; ++r) {
          if (r0 + r >= rows) break;
          const Coefficient<Real> a = c[r0 + r];
#pragma unroll
          for (int j = 0; j < own; ++j) {
            const Real x = static_cast<Real>(widen(q[r][j]));
            v[j] -= a.high * x;
            if (!std::is_same_v<Real, double>) rest[j] += a.low * x;
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < own; ++j) {
      stored[j] = narrow<Real, T>(v[j] - rest[j]);
      square += static_cast<double>(widen(stored[j])) * static_cast<double>(widen(stored[j]));
    }
    stored.write(w + base, dim - base);
  }
  square = sum_block(square);
  if (threadIdx.x == 0) partial[blockIdx.x] = square;
}

// The norm of what was written, and the reads that were made.
__global__ void finish_kernel(const double* partial, int64_t blocks, int64_t m, bool force, double* result) {
  const bool removed = must_remove(result, m, force);
  double total = 0.0;
  for (int64_t b = threadIdx.x; removed && b < blocks; b += threads_per_block) total += partial[b];
  total = sum_block(total);
  if (threadIdx.x != 0) return;
  if (removed) result[m] = sqrt(total);
  result[m + 1] = removed ? 2.0 : 1.0;
}

int64_t orthogonalize_scratch(int64_t rows, int64_t cols) {
  const int64_t blocks = divide_up(cols, span);
  return (blocks < most_blocks ? blocks + 1 : most_blocks) * (rows + 1);
}

// Eight blocks for each multiprocessor of the device, or one for each `span` columns.
int64_t column_blocks(int64_t cols) {
  int64_t blocks = divide_up(cols, span), most = 8 * multiprocessors();
  if (most > most_blocks) most = most_blocks;
  if (blocks > most) blocks = most;
  return blocks > 0 ? blocks : 1;
}

void orthogonalize(ConstMatrix Q, Matrix w, bool force, double* result, double* scratch, Launch to) {
  const char* name = "orthogonalize";
  const int64_t m = Q.rows, dim = w.cols, blocks = column_blocks(dim);
  const dim3 along(static_cast<unsigned>(blocks));
  const dim3 both(along.x, static_cast<unsigned>(m > 0 ? divide_up(m, block_rows) : 1));
  by_dtype(Q.dtype, [&](auto of_basis) {
    by_dtype(w.dtype, [&](auto of_vector) {
      using TQ = decltype(of_basis);
      using T = decltype(of_vector);
      using Real = std::conditional_t<std::is_same_v<TQ, double> || std::is_same_v<T, double>, double, float>;
      const TQ* basis = static_cast<const TQ*>(Q.data);
      T* vector = static_cast<T*>(w.data);
      constexpr int V = widest_of<TQ>;
      const int64_t whole = V * sizeof(T) < 16 ? V : widest_of<T>;  // elements of w that a load takes
      const bool aligned = alignment_of(Q) % V == 0 && alignment_of(w) % whole == 0;
      const auto passes = [&](auto width) {
        constexpr int W = decltype(width)::value;
        launch(name, to.stream, both, dots_kernel<Real, TQ, T, W>, basis, Q.stride, m, vector, dim, scratch);
        launch(name, to.stream, dim3(static_cast<unsigned>(m + 1)), reduce_kernel, scratch, blocks, result);
        launch(name, to.stream, along, remove_kernel<Real, TQ, T, W>, basis, Q.stride, m, vector, dim, force,
               result, scratch);
      };
      by_widest<V>(aligned ? V : 1, passes);
    });
  });
  launch(name, to.stream, dim3(1), finish_kernel, scratch, blocks, m, force, result);
}

constexpr int tile_bytes = 48 << 10, most_tile_cols = 256, batch = 8;

// First k rows of Q <- S^T Q by tiles of `cols` columns, all rows of which are read before any is written. A
// thread sums two columns of eight rows in double.
template <class T, int V>
__global__ void __launch_bounds__(threads_per_block)
    rotate_kernel(T* Q, int64_t stride, int m, int64_t dim, const double* S, int k, int cols) {
  alignas(16) __shared__ unsigned char bytes[tile_bytes];
  T* tile = reinterpret_cast<T*>(bytes);
  const int half = cols / 2, column = threadIdx.x % half, team = threadIdx.x / half;
  const int teams = threads_per_block / half, vectors = cols / V;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * cols; base < dim;
       base += static_cast<int64_t>(gridDim.x) * cols) {
    const int64_t left = dim - base;
#pragma unroll 4
    for (int e = threadIdx.x; e < m * vectors; e += threads_per_block) {
      const int row = e / vectors, col = e % vectors * V;
      *reinterpret_cast<Pack<T, V>*>(tile + row * cols + col) =
          load<V>(Q + row * stride + base + col, left - col);
    }
    __syncthreads();
    for (int j0 = team * batch; j0 < k; j0 += teams * batch) {
      double sums[batch][2] = {};
      for (int i = 0; i < m; ++i) {
        const double a = widen(tile[i * cols + column]), b = widen(tile[i * cols + column + half]);
#pragma unroll
        for (int r = 0; r < batch; ++r) {
          const double s = j0 + r < k ? S[static_cast<int64_t>(i) * k + j0 + r] : 0.0;
          sums[r][0] += s * a, sums[r][1] += s * b;
        }
      }
#pragma unroll
      for (int r = 0; r < batch; ++r) {
        T* to = Q + (j0 + r) * stride + base;
        if (j0 + r < k && column < left) to[column] = narrow<double, T>(sums[r][0]);
        if (j0 + r < k && column + half < left) to[column + half] = narrow<double, T>(sums[r][1]);
      }
    }
    __syncthreads();
  }
}

void rotate(Matrix Q, const double* S, int64_t k, Launch to) {
  if (Q.rows == 0 || Q.cols == 0 || k == 0) return;
  by_dtype(Q.dtype, [&](auto type) {
    using T = decltype(type);
    int cols = most_tile_cols;
    while (cols > 2 && cols * Q.rows * static_cast<int64_t>(sizeof(T)) > tile_bytes) cols /= 2;
    const unsigned grid = at_most(divide_up(Q.cols, cols));
    by_widest<widest_of<T>>(alignment_of(Q) | cols, [&](auto width) {
      launch("rotate", to.stream, grid, rotate_kernel<T, decltype(width)::value>, static_cast<T*>(Q.data),
             Q.stride, static_cast<int>(Q.rows), Q.cols, S, static_cast<int>(k), cols);
    });
  });
}

// Box-Muller in double: words 2q and 2q+1 of the stream give units 2q and 2q+1; a thread for a counter.
template <class T, int V>
__global__ void normal_kernel(T* out, int64_t dim, uint64_t stream, PhiloxKey key) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * threads_per_block;
  for (int64_t i = global_thread(); 4 * i < dim; i += stride) {
    const Words words = philox(static_cast<uint32_t>(i), stream, key);
    T units[4];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const double radius = sqrt(-2.0 * log((words.w[2 * q] + 1.0) * 0x1p-32));
      double sine, cosine;
      sincospi(words.w[2 * q + 1] * 0x1p-31, &sine, &cosine);
      units[2 * q] = narrow<double, T>(radius * cosine), units[2 * q + 1] = narrow<double, T>(radius * sine);
    }
#pragma unroll
    for (int piece = 0; piece < 4 / V; ++piece) {
      Pack<T, V> pack;
#pragma unroll
      for (int e = 0; e < V; ++e) pack.x[e] = units[piece * V + e];
      const int64_t at = 4 * i + piece * V;
      if (at < dim) store<V>(out + at, dim - at, pack);
    }
  }
}

void probe(Matrix out, uint64_t stream, uint64_t seed, uint64_t site, bool normal, Launch to) {
  if (out.cols == 0) return;
  by_dtype(out.dtype, [&](auto type) {
    using T = decltype(type);
    T* data = static_cast<T*>(out.data);
    if (!normal) {
      const MaskSource source{nullptr, seed, site, 1 << 15};
      return fill<T>("probe", data, 1, out.cols, static_cast<T>(1.0f), static_cast<T>(-1.0f), source, stream,
                     to.stream);
    }
    by_widest<(widest_of<T> < 4 ? widest_of<T> : 4)>(alignment_of(out), [&](auto width) {
      launch("probe", to.stream, blocks_for(divide_up(out.cols, 4)), normal_kernel<T, decltype(width)::value>,
             data, out.cols, stream, PhiloxKey(seed, site));
    });
  });
}

}  // namespace

namespace cuda {
const SpectralKernels spectral{orthogonalize_scratch, orthogonalize, rotate, probe};
}

}  // namespace dropscope
