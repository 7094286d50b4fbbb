// The table of the CUDA kernels; no_cuda.cpp has the same symbols for a build without nvcc.
#include "kernels.hpp"

namespace dropscope::cuda {

bool built() { return true; }

const Kernels& kernels() {
  static const Kernels table{masks, factors, spectral};
  return table;
}

}  // namespace dropscope::cuda
