// Epilogues of the products of per-sample gradient factors on CUDA, what cpu/factors.cpp is for the CPU.
// Every output element is summed in one order that no timing changes.
#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace dropscope {
namespace {

template <class T>
struct Rows {
  T* data;
  int64_t stride;
  template <class View>
  explicit Rows(const View& m) : data(static_cast<T*>(m.data)), stride(m.stride) {}
  __device__ T* operator[](int64_t i) const { return data + i * stride; }
};

// f(T{}, Out{}) for the element types of factors and sums.
template <class F>
void by_types(DType dtype, DType sums, const F& f) {
  by_dtype(dtype, [&](auto type) { sums == DType::f64 ? f(type, double{}) : f(type, float{}); });
}

// Threads for `work` vectors: a power of two within a warp, or the block where they are many.
inline int team_of(int64_t work) {
  if (work > 8 * threads_per_block) return threads_per_block;
  int team = 1;
  while (team < 32 && team < work) team *= 2;
  return team;
}

// A thread's sums over its team, in each of its threads (in thread 0 where the team is the block).
__device__ inline double sum_team(double x, int team) {
  return team == threads_per_block ? sum_block(x) : sum_lanes(x, team);
}

// out[i, k] += sum_t <P[(i / group) * steps + t, block k], B[i * steps + t, :]>; a team of threads for each
// (i, k), products summed in float 16 at a time.
template <class T, class Out, int V>
__global__ void row_dots_kernel(Rows<const T> P, Rows<const T> B, Rows<Out> out, int64_t width, int64_t group,
                                int64_t steps, int team, Walk walk) {
  const int member = threadIdx.x % team;
  int64_t i = global_thread() / team;
  for (Place place(i, walk); i - threadIdx.x / team < walk.total; i += walk.stride, place.advance(walk)) {
    const bool active = i < walk.total;
    double total = 0.0;
    for (int64_t t = 0; active && t < steps; ++t) {
      const T* p = P[place.row / group * steps + t] + place.col * width;
      const T* b = B[place.row * steps + t];
      for (int64_t j = member * V; j < width;) {
        Wide<T> run = 0;
#pragma unroll
        for (int vector = 0; vector < 16 / V; ++vector, j += team * V) {
          if (j >= width) continue;
          const Pack<T, V> x = load<V>(p + j, width - j), y = load<V>(b + j, width - j);
#pragma unroll
          for (int e = 0; e < V; ++e) run += widen(x.x[e]) * widen(y.x[e]);
        }
        total += run;
      }
    }
    total = sum_team(total, team);
    if (active && member == 0) out[place.row][place.col] += static_cast<Out>(total);
  }
}

void row_dots(ConstMatrix P, ConstMatrix B, Matrix out, int64_t group, int64_t steps, Launch to) {
  if (out.rows == 0 || out.cols == 0) return;
  const int64_t alignment = alignment_of(P) | alignment_of(B) | (out.cols > 1 ? B.cols : 0);
  by_types(B.dtype, out.dtype, [&](auto type, auto sums) {
    using T = decltype(type);
    using Out = decltype(sums);
    by_widest<widest_of<T>>(alignment, [&](auto width) {
      constexpr int V = decltype(width)::value;
      const int team = team_of(divide_up(B.cols, V));
      const unsigned grid = blocks_for(out.rows * out.cols * team);
      const Walk walk(out.rows, 1, out.cols, static_cast<int64_t>(grid) * (threads_per_block / team));
      launch("row_dots", to.stream, grid, row_dots_kernel<T, Out, V>, Rows<const T>(P), Rows<const T>(B),
             Rows<Out>(out), B.cols, group, steps, team, walk);
    });
  });
}

// out[i * steps + t, block k] = sum_{m < group} S[i * group + m, k] B[(i * group + m) * steps + t, :]; a
// thread for V columns.
template <class T, int V>
__global__ void scale_rows_kernel(Rows<const T> B, Rows<const Wide<T>> S, Rows<T> out, int64_t width,
                                  int64_t group, int64_t steps, Walk walk) {
  int64_t i = global_thread();
  for (Place place(i, walk); i < walk.total; i += walk.stride, place.advance(walk)) {
    const int64_t sample = steps == 1 ? place.row : place.row / steps, t = place.row - sample * steps;
    const int64_t column = place.col * V;
    Wide<T> sums[V] = {};
    for (int64_t m = 0; m < group; ++m) {
      const int64_t row = sample * group + m;
      const Wide<T> s = S[row][place.middle];
      const Pack<T, V> b = load<V>(B[row * steps + t] + column, width - column);
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e] += s * widen(b.x[e]);
    }
    Pack<T, V> result;
#pragma unroll
    for (int e = 0; e < V; ++e) result.x[e] = narrow<Wide<T>, T>(sums[e]);
    store<V>(out[place.row] + place.middle * width + column, width - column, result);
  }
}

void scale_rows(ConstMatrix B, ConstMatrix S, Matrix out, int64_t group, int64_t steps, Launch to) {
  if (out.rows == 0 || out.cols == 0) return;
  by_dtype(B.dtype, [&](auto type) {
    using T = decltype(type);
    by_widest<widest_of<T>>(alignment_of(B) | alignment_of(out) | (S.cols > 1 ? B.cols : 0), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const int64_t vectors = divide_up(B.cols, V);
      const unsigned grid = blocks_for(out.rows * S.cols * vectors);
      const Walk walk(out.rows, S.cols, vectors, static_cast<int64_t>(grid) * threads_per_block);
      launch("scale_rows", to.stream, grid, scale_rows_kernel<T, V>, Rows<const T>(B), Rows<const Wide<T>>(S),
             Rows<T>(out), B.cols, group, steps, walk);
    });
  });
}

// What both kernels of hadamard need; a null P stands for 1.
template <class T, class Out>
struct Tiles {
  Rows<const T> P, Q;
  Rows<Out> out, mirror;
  int64_t rows, cols, row_group, col_group, row_steps, col_steps;
  Wide<T> shift;
  bool lower;  // the mirror is out itself, and takes the lower triangle

  Tiles(const Hadamard& h, const Matrix& out_, const Matrix& mirror_)
      : P(h.P),
        Q(h.Q),
        out(out_),
        mirror(mirror_),
        rows(out_.rows),
        cols(out_.cols),
        row_group(h.row_group),
        col_group(h.col_group),
        row_steps(h.row_steps),
        col_steps(h.col_steps),
        shift(static_cast<Wide<T>>(h.shift)),
        lower(mirror_.data == out_.data) {}
};

constexpr int tile = 64;

// One step on each side: a block for a tile of outputs, V of a row at a time; the mirror is written from
// shared memory along its own rows. `vector_p`: columns of P are not shared.
template <class T, class Out, int V>
__global__ void __launch_bounds__(threads_per_block)
    hadamard_kernel(Tiles<T, Out> h, bool vector_p, int64_t tile_cols, int64_t tiles) {
  __shared__ Wide<T> values[tile][tile + 1];
  constexpr int across = tile / V, down = threads_per_block / across;
  const int column = threadIdx.x % across * V, first = threadIdx.x / across;
  for (int64_t number = blockIdx.x; number < tiles; number += gridDim.x) {
    const int64_t i0 = number / tile_cols * tile, j0 = number % tile_cols * tile, j = j0 + column;
    if (h.lower && j0 > i0) continue;
#pragma unroll
    for (int pass = 0; pass < tile / down; ++pass) {
      const int row = first + pass * down;
      const int64_t i = i0 + row;
      int64_t left = h.cols - j;
      if (h.lower && i + 1 - j < left) left = i + 1 - j;
      if (i >= h.rows || left <= 0) continue;
      const Pack<T, V> q = load<V>(h.Q[i] + j, left);
      Pack<T, V> p{};
      if (h.P.data) {
        const T* from = h.P[h.row_group == 1 ? i : i / h.row_group];
        if (vector_p) {
          p = load<V>(from + j, left);
        } else {
#pragma unroll
          for (int e = 0; e < V; ++e)
            if (e < left) p.x[e] = from[(j + e) / h.col_group];
        }
      }
      Pack<Out, V> sums = load<V>(h.out[i] + j, left);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const Wide<T> v = h.P.data ? (widen(p.x[e]) + h.shift) * widen(q.x[e]) : widen(q.x[e]);
        sums.x[e] += static_cast<Out>(v);
        values[row][column + e] = v;
      }
      store<V>(h.out[i] + j, left, sums);
    }
    if (!h.mirror.data) continue;
    __syncthreads();
    const int row = threadIdx.x % tile;
    const int64_t i = i0 + row;
#pragma unroll 4
    for (int col = threadIdx.x / tile; col < tile; col += threads_per_block / tile)
      if (i < h.rows && j0 + col < h.cols && (!h.lower || j0 + col < i))
        h.mirror[j0 + col][i] += static_cast<Out>(values[row][col]);
    __syncthreads();
  }
}

// Several steps: a team of threads for each output, which is a sum over a block of the products.
template <class T, class Out>
__global__ void hadamard_steps_kernel(Tiles<T, Out> h, int team, Walk walk) {
  const int lane = threadIdx.x % (team < 32 ? team : 32), lanes = team < 32 ? team : 32;
  const int warp = team == threads_per_block ? threadIdx.x / 32 : 0;
  const int64_t pieces = divide_up(h.col_steps, lanes);
  int64_t i = global_thread() / team;
  for (Place place(i, walk); i - threadIdx.x / team < walk.total; i += walk.stride, place.advance(walk)) {
    const bool active = i < walk.total && !(h.lower && place.col > place.row);
    double total = 0.0;
    const int64_t p_row = place.row / h.row_group * h.row_steps, q_row = place.row * h.row_steps;
    const int64_t p_col = place.col / h.col_group * h.col_steps, q_col = place.col * h.col_steps;
    int64_t t = 0, piece = warp;  // the block's warps take pieces of the steps in turn
    while (active) {
      while (piece >= pieces) piece -= pieces, ++t;
      if (t >= h.row_steps) break;
      const int64_t s = piece * lanes + lane;
      if (s < h.col_steps)
        total += static_cast<double>((widen(h.P[p_row + t][p_col + s]) + h.shift) *
                                     widen(h.Q[q_row + t][q_col + s]));
      piece += team / lanes;
    }
    total = sum_team(total, team);
    if (!active || threadIdx.x % team != 0) continue;
    const Out value = static_cast<Out>(total);
    h.out[place.row][place.col] += value;
    if (h.mirror.data && !(h.lower && place.col == place.row)) h.mirror[place.col][place.row] += value;
  }
}

void hadamard(Hadamard h, Matrix out, Matrix mirror, Launch to) {
  if (out.rows == 0 || out.cols == 0) return;
  by_types(h.Q.dtype, out.dtype, [&](auto type, auto sums) {
    using T = decltype(type);
    using Out = decltype(sums);
    const Tiles<T, Out> tiles(h, out, mirror);
    if (h.row_steps > 1 || h.col_steps > 1) {
      const int64_t products = h.row_steps * h.col_steps;
      const int team =
          products > 8 * threads_per_block ? threads_per_block : team_of(h.col_steps < 32 ? h.col_steps : 32);
      const unsigned grid = blocks_for(out.rows * out.cols * team);
      const Walk walk(out.rows, 1, out.cols, static_cast<int64_t>(grid) * (threads_per_block / team));
      return launch("hadamard", to.stream, grid, hadamard_steps_kernel<T, Out>, tiles, team, walk);
    }
    constexpr int widest = sizeof(T) == 8 || sizeof(Out) == 8 ? 2 : 4;
    const bool vector_p = h.P.data && h.col_group == 1;
    const int64_t tile_cols = divide_up(out.cols, tile), number = divide_up(out.rows, tile) * tile_cols;
    const unsigned grid = at_most(number);
    by_widest<widest>(alignment_of(h.Q) | alignment_of(out) | (vector_p ? alignment_of(h.P) : 0),
                      [&](auto width) {
                        launch("hadamard", to.stream, grid, hadamard_kernel<T, Out, decltype(width)::value>,
                               tiles, vector_p, tile_cols, number);
                      });
  });
}

// X[i * draws + m, :] = scale (X[i * draws + m, :] - mean over m); a thread for V columns of a sample.
template <class T, int V>
__global__ void center_kernel(Rows<T> X, int64_t cols, int64_t draws, double scale, Walk walk) {
  int64_t i = global_thread();
  for (Place place(i, walk); i < walk.total; i += walk.stride, place.advance(walk)) {
    const int64_t column = place.col * V, left = cols - column;
    double mean[V] = {};
    for (int64_t m = 0; m < draws; ++m) {
      const Pack<T, V> x = load<V>(X[place.row * draws + m] + column, left);
#pragma unroll
      for (int e = 0; e < V; ++e) mean[e] += x.x[e];
    }
#pragma unroll
    for (int e = 0; e < V; ++e) mean[e] /= static_cast<double>(draws);
    for (int64_t m = 0; m < draws; ++m) {
      T* row = X[place.row * draws + m] + column;
      Pack<T, V> x = load<V>(row, left);
#pragma unroll
      for (int e = 0; e < V; ++e) x.x[e] = static_cast<T>(scale * (x.x[e] - mean[e]));
      store<V>(row, left, x);
    }
  }
}

void center(Matrix X, int64_t draws, double scale, Launch to) {
  if (X.rows == 0 || X.cols == 0) return;
  const auto run = [&](auto type) {
    using T = decltype(type);
    by_widest<widest_of<T>>(alignment_of(X), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const int64_t samples = X.rows / draws, vectors = divide_up(X.cols, V);
      const unsigned grid = blocks_for(samples * vectors);
      const Walk walk(samples, 1, vectors, static_cast<int64_t>(grid) * threads_per_block);
      launch("center", to.stream, grid, center_kernel<T, V>, Rows<T>(X), X.cols, draws, scale, walk);
    });
  };
  X.dtype == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace

namespace cuda {
const FactorKernels factors{row_dots, scale_rows, hadamard, center};
}

}  // namespace dropscope
