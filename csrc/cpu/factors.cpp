// Kernels on per-sample gradient factors.
#include "kernels.hpp"
#include "parallel.hpp"

namespace dropscope::DROPSCOPE_ISA {

const FactorKernels factors{nullptr};

}  // namespace dropscope::DROPSCOPE_ISA
