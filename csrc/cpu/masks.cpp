// Dropout masks, format 1: out = x o mask * 65536/T.
#include "apply.hpp"
#include "bitmap.hpp"

namespace dropscope {
namespace {

template <class T>
void apply(ConstMatrix x, Matrix out, MaskSource source, int threads) {
  const auto scale = static_cast<typename Wide<T>::type>(65536.0 / source.threshold);
  const bool contiguous = x.stride == x.cols && out.stride == out.cols;
  for_each_piece(x.rows, x.cols, contiguous, source, threads,
                 [&](int64_t row, int64_t unit, int64_t count, const uint8_t* bits) {
                   apply_bits(static_cast<const T*>(x.data) + row * x.stride + unit,
                              static_cast<T*>(out.data) + row * out.stride + unit, count, bits, scale);
                 });
}

void apply_mask(ConstMatrix x, Matrix out, MaskSource source, Launch launch) {
  switch (x.dtype) {
    case DType::f32:
      return apply<float>(x, out, source, launch.threads);
    case DType::f64:
      return apply<double>(x, out, source, launch.threads);
    case DType::bf16:
      return apply<BFloat16>(x, out, source, launch.threads);
    case DType::f16:
      return apply<Float16>(x, out, source, launch.threads);
  }
}

void keep_mask(uint8_t* out, int64_t rows, int64_t units, MaskSource source, Launch launch) {
  for_each_piece(rows, units, true, source, launch.threads,
                 [&](int64_t row, int64_t unit, int64_t count, const uint8_t* bits) {
                   uint8_t* to = out + row * units + unit;
                   int64_t i = 0;
                   for (; i + 8 <= count; i += 8) {
                     const uint64_t bytes = spread(bits[i / 8]);
                     std::memcpy(to + i, &bytes, 8);
                   }
                   for (; i < count; ++i) to[i] = bits[i / 8] >> (i % 8) & 1;
                 });
}

}  // namespace

namespace DROPSCOPE_ISA {
const MaskKernels masks{apply_mask, keep_mask};
}

}  // namespace dropscope
