// Threads as contexts that a scheduler runs in a random order from barrier to barrier, so that a result that
// needs an order which no barrier makes comes out differently from run to run. DROPSCOPE_EMULATION_SEED sets
// it.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/half.hpp"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "kernels.hpp"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  uint64_t given[2];  // at the last barrier and the one before
  int barriers;
};

constexpr size_t stack_bytes = 64 << 10;
jmp_buf scheduler;
Fiber* running;
std::vector<Fiber> fibers;
std::vector<std::vector<char>> stacks;
const std::function<void()>* body;

// Nothing with a destructor may live in a frame that is left by a jump.
void body_of_fiber() {
  (*body)();
  running->state = State::done;
  _longjmp(scheduler, 1);
}

void wait(State at, uint64_t mine) {
  Fiber& self = *running;
  self.given[self.barriers++ % 2] = mine;
  self.state = at;
  if (!_setjmp(self.resume)) _longjmp(scheduler, 1);
}

void resume(size_t number) {
  Fiber& fiber = fibers[number];
  running = &fiber;
  threadIdx = dim3(static_cast<unsigned>(number), 0, 0);
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Whether all of fibers [first, last) stand at this barrier; they may then go on.
bool release(size_t first, size_t last, State at) {
  for (size_t i = first; i < last; ++i)
    if (fibers[i].state != at) return false;
  for (size_t i = first; i < last; ++i) fibers[i].state = State::ready;
  return true;
}

void run_block(std::mt19937& random) {
  const size_t count = blockDim.x;
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = false, fiber.state = State::ready, fiber.barriers = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks[i].data();
    fiber.start.uc_stack.ss_size = stack_bytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, body_of_fiber, 0);
  }
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i : order)
      if (fibers[i].state == State::ready) resume(i), moved = true;
    for (size_t warp = 0; warp < count; warp += 32) moved |= release(warp, warp + 32, State::at_warp);
    moved |= release(0, count, State::at_block);
  }
  for (const Fiber& fiber : fibers)
    if (fiber.state != State::done)
      throw std::runtime_error("deadlock: some threads wait where others of the block or warp never come");
}

}  // namespace

uint64_t exchange(uint64_t mine, int lane) {
  Fiber* self = running;
  wait(State::at_warp, mine);
  const size_t warp = static_cast<size_t>(self - fibers.data()) / 32 * 32;
  return fibers[warp + lane].given[(self->barriers - 1) % 2];
}

bool any(bool mine) {
  Fiber* self = running;
  wait(State::at_block, mine);
  bool result = false;
  for (const Fiber& fiber : fibers) result |= fiber.given[(self->barriers - 1) % 2] != 0;
  return result;
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  if (grid.x == 0 || grid.x > 0x7FFFFFFF || grid.y == 0 || grid.y > 65535 || threads.x == 0 || threads.x % 32)
    return cudaErrorInvalidConfiguration;
  gridDim = grid, blockDim = threads, body = &kernel;
  fibers.resize(threads.x);
  stacks.resize(threads.x);
  for (auto& stack : stacks) stack.resize(stack_bytes);
  static std::mt19937 random(
      std::getenv("DROPSCOPE_EMULATION_SEED") ? std::atoi(std::getenv("DROPSCOPE_EMULATION_SEED")) : 0);
  std::vector<unsigned> blocks(size_t{grid.x} * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (unsigned number : blocks) {
    blockIdx = dim3(number % grid.x, number / grid.x, 0);
    run_block(random);
  }
  return cudaSuccess;
}

}  // namespace emulation

float __bfloat162float(__nv_bfloat16 x) { return dropscope::widen(dropscope::BFloat16{x.bits}); }
__nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 y;
  y.bits = dropscope::narrow<dropscope::BFloat16>(x).bits;
  return y;
}
float __half2float(__half x) { return dropscope::widen(dropscope::Float16{x.bits}); }
__half __float2half_rn(float x) { return {dropscope::narrow<dropscope::Float16>(x).bits}; }

// The extension with these kernels in the place of the CPU's.
namespace dropscope {
const Kernels& cpu_kernels() { return cuda::kernels(); }
const char* isa_in_use() { return "emulated CUDA"; }
bool isa_supported(const char* name) { return std::string(name) == isa_in_use(); }
}  // namespace dropscope
