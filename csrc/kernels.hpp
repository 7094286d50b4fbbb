// The contract between the bindings and the kernels: views of memory that the caller owns, and one table of
// functions per device. Nothing here knows of torch or Python.
#pragma once
#include <cstdint>

namespace dropscope {

// i32 holds products of 8-bit integers, and is met by hadamard on the CPU alone.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, i32 = 4 };

// Rows of contiguous elements; stride counts elements from one row to the next.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, cols, stride;
};
struct ConstMatrix {
  const void* data;
  DType dtype;
  int64_t rows, cols, stride;
};

// A CPU table reads `threads`, a device's table reads `stream`.
struct Launch {
  int threads;
  void* stream;
};

// Mask format 1: streams[row] = draw << 32 | sample; keep <=> lane < threshold.
struct MaskSource {
  const int64_t* streams;
  uint64_t seed, site;
  uint32_t threshold;
};

// Row r of a result reads row (skip + r) / group of its operand: `group` consecutive rows share one.
struct RowSharing {
  int64_t group, skip;
};

struct MaskKernels {
  // out = x o mask * 65536 / threshold; out may be x where each row has its own.
  void (*apply_mask)(ConstMatrix x, RowSharing sharing, Matrix out, MaskSource source, Launch launch);
  // out[row, unit] = 1 where kept, else 0; a byte each, contiguous.
  void (*keep_mask)(uint8_t* out, int64_t rows, int64_t units, MaskSource source, Launch launch);
};

// The product of two tiles: v[i, j] = sum_ts (P[i / row_group, t; j / col_group, s] + shift) Q[i, t; j, s]
// over the row_steps by col_steps entries of a block. A null P stands for 1. Where there are scales, one for
// each row and column of P and of Q, an entry stands for itself times those of its row and column; steps are
// then 1.
struct Hadamard {
  ConstMatrix P, Q;
  int64_t row_group, col_group, row_steps, col_steps;
  double shift;
  const float *p_rows, *p_cols, *q_rows, *q_cols;
};

// B has rows sample * steps + step. `group` consecutive samples share a row of the other operand.
struct FactorKernels {
  // out[i, k] += sum_t <P[(i / group) * steps + t, block k], B[i * steps + t, :]>, block k the k-th run of
  // B.cols.
  void (*row_dots)(ConstMatrix P, ConstMatrix B, Matrix out, int64_t group, int64_t steps, Launch launch);
  // out[i * steps + t, block k] = sum_{m < group} S[i * group + m, k] B[(i * group + m) * steps + t, :].
  void (*scale_rows)(ConstMatrix B, ConstMatrix S, Matrix out, int64_t group, int64_t steps, Launch launch);
  // out += v and, where mirror has memory, mirror += v^T; a mirror that is out takes the lower triangle for
  // both.
  void (*hadamard)(Hadamard operands, Matrix out, Matrix mirror, Launch launch);
  // X[i * draws + m, :] = scale (X[i * draws + m, :] - mean over m).
  void (*center)(Matrix X, int64_t draws, double scale, Launch launch);
};

struct SpectralKernels {
  // Doubles of scratch that orthogonalize wants, in the memory of its device, as is `result`.
  int64_t (*orthogonalize_scratch)(int64_t rows, int64_t cols);
  // c = Q w, norm = |w|; then, when forced or when a |c_i| > 1e-5 |w|, w -= Q^T c and norm anew.
  // result: c (rows of Q), norm, and the reads of Q, 1 or 2.
  void (*orthogonalize)(ConstMatrix Q, Matrix w, bool force, double* result, double* scratch, Launch launch);
  // First k rows of Q <- S^T Q; S: (Q.rows, k), k <= Q.rows <= 2048.
  void (*rotate)(Matrix Q, const double* S, int64_t k, Launch launch);
  // One row of +1 and -1, or of normal numbers.
  void (*probe)(Matrix out, uint64_t stream, uint64_t seed, uint64_t site, bool normal, Launch launch);
};

struct Kernels {
  MaskKernels masks;
  FactorKernels factors;
  SpectralKernels spectral;
};

// isa.cpp: the table of the instruction set in use, probed once; DROPSCOPE_ISA forces one.
const Kernels& cpu_kernels();
const char* isa_in_use();
bool isa_supported(const char* name);

namespace cuda {
bool built();
const Kernels& kernels();
}  // namespace cuda

// One set per instruction set, defined in cpu/*.cpp, and one in cuda/*.cu.
#define DROPSCOPE_DECLARE_ISA(name)      \
  namespace name {                       \
  extern const MaskKernels masks;        \
  extern const FactorKernels factors;    \
  extern const SpectralKernels spectral; \
  }
DROPSCOPE_DECLARE_ISA(generic)
DROPSCOPE_DECLARE_ISA(avx2)
DROPSCOPE_DECLARE_ISA(avx512)
DROPSCOPE_DECLARE_ISA(cuda)
#undef DROPSCOPE_DECLARE_ISA

}  // namespace dropscope
