// The choice of instruction set, made once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace dropscope {
namespace {

#define DROPSCOPE_TABLE(isa) {isa::masks, isa::factors, isa::spectral}

struct Isa {
  const char* name;
  bool supported;
  Kernels kernels;
};

struct Isas {
  Isa list[DROPSCOPE_ISAS];
};

const Isas& isas() {
#if DROPSCOPE_ISAS > 1
  __builtin_cpu_init();
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  static const Isas all = {{
      {"generic", true, DROPSCOPE_TABLE(generic)},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), DROPSCOPE_TABLE(avx2)},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("bmi2"),
       DROPSCOPE_TABLE(avx512)},
  }};
#else
  static const Isas all = {{{"generic", true, DROPSCOPE_TABLE(generic)}}};
#endif
  return all;
}

const Isa& choose() {
  const char* forced = std::getenv("DROPSCOPE_ISA");
  const Isa* best = nullptr;
  std::string names;
  for (const Isa& isa : isas().list) {
    if (!isa.supported) continue;
    if (forced && std::string(forced) == isa.name) return isa;
    best = &isa;
    names += std::string(names.empty() ? "" : ", ") + isa.name;
  }
  if (forced && *forced)
    throw std::invalid_argument("DROPSCOPE_ISA must be one of " + names + " on this CPU, got '" + forced +
                                "'");
  return *best;
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

const Kernels& cpu_kernels() { return chosen().kernels; }
const char* isa_in_use() { return chosen().name; }

bool isa_supported(const char* name) {
  for (const Isa& isa : isas().list)
    if (std::string(isa.name) == name) return isa.supported;
  return false;
}

}  // namespace dropscope
