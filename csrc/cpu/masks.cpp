// Dropout masks, format 1: out = x o mask * 65536/T.
#include "apply.hpp"
#include "keep.hpp"

namespace dropscope {
namespace {

template <class T>
void apply(ConstMatrix x, Matrix out, MaskSource source, int threads) {
  const auto scale = static_cast<typename Wide<T>::type>(65536.0 / source.threshold);
  const bool contiguous = x.stride == x.cols && out.stride == out.cols;
  const auto from = [&](int64_t row, int64_t unit) {
    return static_cast<const T*>(x.data) + row * x.stride + unit;
  };
  const auto to = [&](int64_t row, int64_t unit) {
    return static_cast<T*>(out.data) + row * out.stride + unit;
  };
  for_each_piece(
      x.rows, x.cols, contiguous, source, threads,
      [&](int64_t row, int64_t unit, int64_t count) {
        return Fetch{reinterpret_cast<const char*>(from(row, unit)),
                     reinterpret_cast<const char*>(to(row, unit)), count * int64_t(sizeof(T))};
      },
      [&](int64_t row, int64_t unit, int64_t count, const uint16_t* kept) {
        apply_kept(from(row, unit), to(row, unit), count, kept, scale);
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
  for_each_piece(
      rows, units, true, source, launch.threads, [](int64_t, int64_t, int64_t) { return Fetch{}; },
      [&](int64_t row, int64_t unit, int64_t count, const uint16_t* kept) {
        uint8_t* to = out + row * units + unit;
        for (int64_t i = 0; i < count; ++i) to[i] = kept[i] & 1;
      });
}

}  // namespace

namespace DROPSCOPE_ISA {
const MaskKernels masks{apply_mask, keep_mask};
}

}  // namespace dropscope
