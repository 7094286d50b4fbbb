// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011) and mask
// format 1. Integers only, so that host and device give the same bits.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define DROPSCOPE_HOST_DEVICE __host__ __device__
#else
#define DROPSCOPE_HOST_DEVICE
#endif

namespace dropscope {
namespace {

constexpr uint32_t philox_m0 = 0xD2511F53, philox_m1 = 0xCD9E8D57;
constexpr uint32_t philox_w0 = 0x9E3779B9, philox_w1 = 0xBB67AE85;

struct Words {
  uint32_t w[4];
};

// Key and fixed counter word of one (seed, site).
struct PhiloxKey {
  uint32_t k0, k1, site;
  DROPSCOPE_HOST_DEVICE PhiloxKey(uint64_t seed, uint64_t site_)
      : k0(static_cast<uint32_t>(seed)),
        k1(static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(site_ >> 32)),
        site(static_cast<uint32_t>(site_)) {}
};

DROPSCOPE_HOST_DEVICE inline Words philox(uint32_t block, uint64_t stream, PhiloxKey key) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(stream), c2 = static_cast<uint32_t>(stream >> 32),
           c3 = key.site;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(philox_m0) * c0, p1 = static_cast<uint64_t>(philox_m1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.k1;
    c3 = static_cast<uint32_t>(p0);
    key.k0 += philox_w0;
    key.k1 += philox_w1;
  }
  return {{c0, c1, c2, c3}};
}

// Byte j of the result is bit j: bit j is singled out in byte j, then carried to the top of it.
DROPSCOPE_HOST_DEVICE inline uint64_t spread(uint64_t byte) {
  const uint64_t single = byte * 0x0101010101010101u & 0x8040201008040201u;
  return (single + 0x00406070787C7E7Fu) >> 7 & 0x0101010101010101u;
}

}  // namespace
}  // namespace dropscope
