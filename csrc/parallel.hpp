// parallel_for over OpenMP. Work is cut into chunks whose size does not depend on the thread count, so that
// sums over chunks are the same for every thread count. Internal linkage: each instruction set compiles its
// own copy.
#pragma once
#include <cstdint>

namespace dropscope {
namespace {

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t serial_elements = 1 << 15;

// body(chunk) for chunk = 0 .. chunks-1; `elements` is the whole work.
template <class Body>
void parallel_for(int64_t chunks, int64_t elements, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && chunks > 1 && elements > serial_elements) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
    return;
  }
#endif
  (void)elements, (void)threads;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace dropscope
