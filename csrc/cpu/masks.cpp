// Dropout masks, format 1.
#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"

namespace dropscope {
namespace {

void apply_mask(ConstMatrix x, Matrix out, MaskSource source, Launch launch) {
  const PhiloxKey key(source.seed, source.site);
  const float scale = static_cast<float>(65536.0 / source.threshold);
  if (x.dtype != DType::f32) return;
  parallel_for(x.rows, x.rows * x.cols, launch.threads, [&](int64_t row) {
    const float* in = static_cast<const float*>(x.data) + row * x.stride;
    float* to = static_cast<float*>(out.data) + row * out.stride;
    const uint64_t stream = static_cast<uint64_t>(source.streams[row]);
    for (int64_t unit = 0; unit < x.cols; ++unit) {
      const Words words = philox(static_cast<uint32_t>(unit / 8), stream, key);
      to[unit] = lane(words, unit % 8) < source.threshold ? in[unit] * scale : 0.0f;
    }
  });
}

void keep_mask(uint8_t* out, int64_t rows, int64_t units, MaskSource source, Launch launch) {
  const PhiloxKey key(source.seed, source.site);
  parallel_for(rows, rows * units, launch.threads, [&](int64_t row) {
    const uint64_t stream = static_cast<uint64_t>(source.streams[row]);
    for (int64_t unit = 0; unit < units; ++unit) {
      const Words words = philox(static_cast<uint32_t>(unit / 8), stream, key);
      out[row * units + unit] = lane(words, unit % 8) < source.threshold;
    }
  });
}

}  // namespace

namespace DROPSCOPE_ISA {
const MaskKernels masks{apply_mask, keep_mask};
}

}  // namespace dropscope
