// Kernels on Krylov bases.
#include "kernels.hpp"
#include "parallel.hpp"

namespace dropscope::DROPSCOPE_ISA {

const SpectralKernels spectral{nullptr};

}  // namespace dropscope::DROPSCOPE_ISA
