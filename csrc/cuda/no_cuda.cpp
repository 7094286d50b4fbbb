// The symbols of cuda/*.cu in a build without nvcc.
#include <stdexcept>

#include "kernels.hpp"

namespace dropscope::cuda {

bool built() { return false; }

const Kernels& kernels() {
  throw std::runtime_error("dropscope was built without CUDA: rebuild it where nvcc is found");
}

}  // namespace dropscope::cuda
