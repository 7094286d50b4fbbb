// The only file that knows Python: integers to views, size checks for memory safety, the GIL released in one
// place. The contract of every argument is checked in python/dropscope/kernels, with better messages.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace py = pybind11;

namespace dropscope {
namespace {

enum Device : int { cpu = 0, cuda_device = 1 };

const Kernels& kernels_of(int device) { return device == cuda_device ? cuda::kernels() : cpu_kernels(); }

// `launch`: the thread count on the CPU, the stream's handle on a device.
Launch launch_of(int device, uintptr_t launch) {
  if (device == cuda_device) return {0, reinterpret_cast<void*>(launch)};
  return {static_cast<int>(launch), nullptr};
}

template <class Function, class... Args>
auto run(const char* name, Function* function, Args... args) {
  if (!function) throw std::runtime_error(std::string(name) + ": there is no kernel for this device");
  py::gil_scoped_release release;
  return function(args...);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A matrix argument: (address, dtype, rows, cols, stride).

template <class View>
View view(const py::tuple& t, DType last = DType::f16) {
  require(t.size() == 5, "a matrix is (address, dtype, rows, cols, stride)");
  View m{};
  m.data = pointer<void>(t[0].cast<uintptr_t>());
  const int dtype = t[1].cast<int>();
  m.rows = t[2].cast<int64_t>(), m.cols = t[3].cast<int64_t>(), m.stride = t[4].cast<int64_t>();
  require(dtype >= 0 && dtype <= static_cast<int>(last), "unknown dtype");
  m.dtype = static_cast<DType>(dtype);
  require(m.rows >= 0 && m.cols >= 0, "negative size");
  require(m.rows <= 1 || m.stride >= m.cols, "rows overlap");
  require(m.data || m.rows == 0 || m.cols == 0, "null pointer");
  return m;
}

MaskSource source_of(uintptr_t streams, int64_t rows, int64_t units, uint64_t seed, uint64_t site,
                     uint32_t threshold) {
  require(streams || rows == 0, "null pointer");
  require(threshold > 0 && threshold < 65536, "threshold must be in 1..65535");
  require(units <= int64_t(1) << 35, "more than 2^35 units in a row");
  return {pointer<const int64_t>(streams), seed, site, threshold};
}

void bind_masks(py::module_& m) {
  m.def(
      "apply_mask",
      [](int device, const py::tuple& x, const py::tuple& out, uintptr_t streams, uint64_t seed,
         uint64_t site, uint32_t threshold, int64_t group, int64_t skip, uintptr_t launch) {
        const ConstMatrix in = view<ConstMatrix>(x);
        const Matrix to = view<Matrix>(out);
        require(in.cols == to.cols && in.dtype == to.dtype, "x and out differ");
        require(group > 0 && skip >= 0 && skip < group &&
                    (to.rows == 0 || (skip + to.rows - 1) / group < in.rows),
                "rows of x");
        const MaskSource source = source_of(streams, to.rows, to.cols, seed, site, threshold);
        run("apply_mask", kernels_of(device).masks.apply_mask, in, RowSharing{group, skip}, to, source,
            launch_of(device, launch));
      },
      py::arg("device"), py::arg("x"), py::arg("out"), py::arg("streams"), py::arg("seed"), py::arg("site"),
      py::arg("threshold"), py::arg("group"), py::arg("skip"), py::arg("launch"));
  m.def(
      "keep_mask",
      [](int device, uintptr_t out, int64_t rows, int64_t units, uintptr_t streams, uint64_t seed,
         uint64_t site, uint32_t threshold, uintptr_t launch) {
        require(rows >= 0 && units >= 0, "negative size");
        require(out || rows == 0 || units == 0, "null pointer");
        const MaskSource source = source_of(streams, rows, units, seed, site, threshold);
        run("keep_mask", kernels_of(device).masks.keep_mask, pointer<uint8_t>(out), rows, units, source,
            launch_of(device, launch));
      },
      py::arg("device"), py::arg("out"), py::arg("rows"), py::arg("units"), py::arg("streams"),
      py::arg("seed"), py::arg("site"), py::arg("threshold"), py::arg("launch"));
}

bool factor_dtype(DType dtype) { return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16; }
bool sum_dtype(DType dtype) { return dtype == DType::f32 || dtype == DType::f64; }
DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// One float for each of n rows or columns.
const float* scale_of(const py::handle& argument, int64_t n) {
  const auto scale = view<ConstMatrix>(argument.cast<py::tuple>());
  require(scale.dtype == DType::f32 && scale.rows == 1 && scale.cols == n, "hadamard: scales");
  return static_cast<const float*>(scale.data);
}

void bind_factors(py::module_& m) {
  m.def(
      "row_dots",
      [](int device, const py::tuple& p, const py::tuple& b, const py::tuple& out, int64_t group,
         int64_t steps, uintptr_t launch) {
        const auto P = view<ConstMatrix>(p), B = view<ConstMatrix>(b);
        const auto to = view<Matrix>(out);
        require(factor_dtype(B.dtype) && sum_dtype(to.dtype), "row_dots: dtypes");
        // On the CPU the products of bfloat16 factors may come in float.
        require(P.dtype == B.dtype || (device != cuda_device && P.dtype == wide(B.dtype)),
                "row_dots: dtypes");
        require(group > 0 && steps > 0 && B.rows == to.rows * steps && P.rows * group == B.rows &&
                    to.rows % group == 0,
                "row_dots: rows");
        require(P.cols == B.cols * to.cols, "row_dots: columns");
        run("row_dots", kernels_of(device).factors.row_dots, P, B, to, group, steps,
            launch_of(device, launch));
      },
      py::arg("device"), py::arg("P"), py::arg("B"), py::arg("out"), py::arg("group"), py::arg("steps"),
      py::arg("launch"));
  m.def(
      "scale_rows",
      [](int device, const py::tuple& b, const py::tuple& s, const py::tuple& out, int64_t group,
         int64_t steps, uintptr_t launch) {
        const auto B = view<ConstMatrix>(b), S = view<ConstMatrix>(s);
        const auto to = view<Matrix>(out);
        require(factor_dtype(B.dtype) && S.dtype == wide(B.dtype), "scale_rows: dtypes");
        require(to.dtype == B.dtype || (device != cuda_device && to.dtype == S.dtype), "scale_rows: dtypes");
        require(group > 0 && steps > 0 && B.rows == S.rows * steps && to.rows * group == B.rows &&
                    S.rows % group == 0,
                "scale_rows: rows");
        require(to.cols == B.cols * S.cols, "scale_rows: columns");
        run("scale_rows", kernels_of(device).factors.scale_rows, B, S, to, group, steps,
            launch_of(device, launch));
      },
      py::arg("device"), py::arg("B"), py::arg("S"), py::arg("out"), py::arg("group"), py::arg("steps"),
      py::arg("launch"));
  m.def(
      "hadamard",
      [](int device, const py::tuple& p, const py::tuple& q, const py::tuple& out, const py::tuple& mirror,
         int64_t row_group, int64_t col_group, int64_t row_steps, int64_t col_steps, double shift,
         const py::tuple& scales, uintptr_t launch) {
        const DType last = device == cuda_device ? DType::f16 : DType::i32;
        const auto P = view<ConstMatrix>(p, last), Q = view<ConstMatrix>(q, last);
        const auto to = view<Matrix>(out), back = view<Matrix>(mirror);
        require(row_group > 0 && col_group > 0 && row_steps > 0 && col_steps > 0,
                "hadamard: groups and steps");
        require((factor_dtype(Q.dtype) || Q.dtype == DType::i32) && sum_dtype(to.dtype), "hadamard: dtypes");
        require(Q.rows == to.rows * row_steps && Q.cols == to.cols * col_steps, "hadamard: Q and out");
        require(to.rows % row_group == 0 && to.cols % col_group == 0, "hadamard: groups");
        require(P.data ? P.dtype == Q.dtype && P.rows * row_group == Q.rows && P.cols * col_group == Q.cols
                       : row_steps == 1 && col_steps == 1,
                "hadamard: P and Q");
        require(!back.data || (back.dtype == to.dtype && back.rows == to.cols && back.cols == to.rows),
                "hadamard: mirror");
        Hadamard operands{P,     Q,       row_group, col_group, row_steps, col_steps,
                          shift, nullptr, nullptr,   nullptr,   nullptr};
        if (scales.size() > 0) {
          require(device != cuda_device && scales.size() == 4 && P.data && row_steps == 1 && col_steps == 1,
                  "hadamard: scales");
          operands.p_rows = scale_of(scales[0], P.rows), operands.p_cols = scale_of(scales[1], P.cols);
          operands.q_rows = scale_of(scales[2], Q.rows), operands.q_cols = scale_of(scales[3], Q.cols);
        }
        run("hadamard", kernels_of(device).factors.hadamard, operands, to, back, launch_of(device, launch));
      },
      py::arg("device"), py::arg("P"), py::arg("Q"), py::arg("out"), py::arg("mirror"), py::arg("row_group"),
      py::arg("col_group"), py::arg("row_steps"), py::arg("col_steps"), py::arg("shift"), py::arg("scales"),
      py::arg("launch"));
  m.def(
      "center",
      [](int device, const py::tuple& x, int64_t draws, double scale, uintptr_t launch) {
        const auto X = view<Matrix>(x);
        require(sum_dtype(X.dtype) && draws > 0 && X.rows % draws == 0, "center: dtype or draws");
        run("center", kernels_of(device).factors.center, X, draws, scale, launch_of(device, launch));
      },
      py::arg("device"), py::arg("X"), py::arg("draws"), py::arg("scale"), py::arg("launch"));
}

void bind_spectral(py::module_& m) {
  m.def(
      "orthogonalize_scratch",
      [](int device, int64_t rows, int64_t cols) {
        require(rows >= 0 && cols >= 0, "negative size");
        return run("orthogonalize_scratch", kernels_of(device).spectral.orthogonalize_scratch, rows, cols);
      },
      py::arg("device"), py::arg("rows"), py::arg("cols"));
  m.def(
      "orthogonalize",
      [](int device, const py::tuple& basis, const py::tuple& vector, bool force, uintptr_t result,
         uintptr_t scratch, uintptr_t launch) {
        const ConstMatrix Q = view<ConstMatrix>(basis);
        const Matrix w = view<Matrix>(vector);
        require(w.rows == 1 && w.cols == Q.cols, "w must have the length of a row of Q");
        require(Q.dtype != DType::f16 && w.dtype != DType::f16, "float16 is not served");
        require(result && (scratch || w.cols == 0), "null pointer");
        run("orthogonalize", kernels_of(device).spectral.orthogonalize, Q, w, force, pointer<double>(result),
            pointer<double>(scratch), launch_of(device, launch));
      },
      py::arg("device"), py::arg("Q"), py::arg("w"), py::arg("force"), py::arg("result"), py::arg("scratch"),
      py::arg("launch"));
  m.def(
      "rotate",
      [](int device, const py::tuple& basis, uintptr_t S, int64_t k, uintptr_t launch) {
        const Matrix Q = view<Matrix>(basis);
        require(k >= 0 && k <= Q.rows && Q.rows <= 2048, "k <= rows of Q <= 2048");
        require(S || k == 0, "null pointer");
        require(Q.dtype != DType::f16, "float16 is not served");
        run("rotate", kernels_of(device).spectral.rotate, Q, pointer<const double>(S), k,
            launch_of(device, launch));
      },
      py::arg("device"), py::arg("Q"), py::arg("S"), py::arg("k"), py::arg("launch"));
  m.def(
      "probe",
      [](int device, const py::tuple& vector, uint64_t stream, uint64_t seed, uint64_t site, bool normal,
         uintptr_t launch) {
        const Matrix out = view<Matrix>(vector);
        require(out.rows == 1 && out.cols <= int64_t(1) << 34, "out must be one row of at most 2^34 units");
        require(out.dtype != DType::f16, "float16 is not served");
        run("probe", kernels_of(device).spectral.probe, out, stream, seed, site, normal,
            launch_of(device, launch));
      },
      py::arg("device"), py::arg("out"), py::arg("stream"), py::arg("seed"), py::arg("site"),
      py::arg("normal"), py::arg("launch"));
}

}  // namespace
}  // namespace dropscope

// Nothing here changes after the import: no GIL is needed.
PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  using namespace dropscope;
  cpu_kernels();  // a DROPSCOPE_ISA that cannot be is refused here
  m.def("isa", &isa_in_use);
  m.def("isa_supported", &isa_supported);
  m.def("cuda_built", &cuda::built);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  bind_masks(m);
  bind_factors(m);
  bind_spectral(m);
}
