// Dropout masks, format 1: out = x o mask * 65536/T.
#include "apply.hpp"
#include "keep.hpp"

namespace dropscope {
namespace {

// `own`: each row of out has its own of x; known when this is compiled.
template <class T, bool own>
void apply_rows(ConstMatrix x, RowSharing sharing, Matrix out, MaskSource source, int threads) {
  const auto scale = static_cast<typename Wide<T>::type>(65536.0 / source.threshold);
  const bool contiguous = own && x.stride == x.cols && out.stride == out.cols;
  const auto from = [&](int64_t row, int64_t unit) {
    const int64_t of = own ? row : (sharing.skip + row) / sharing.group;
    return static_cast<const T*>(x.data) + of * x.stride + unit;
  };
  const auto to = [&](int64_t row, int64_t unit) {
    return static_cast<T*>(out.data) + row * out.stride + unit;
  };
  for_each_piece(
      out.rows, out.cols, contiguous, source, threads,
      [&](int64_t row, int64_t unit, int64_t count) {
        return Fetch{reinterpret_cast<const char*>(from(row, unit)),
                     reinterpret_cast<const char*>(to(row, unit)), count * int64_t(sizeof(T))};
      },
      [&](int64_t row, int64_t unit, int64_t count, const Kept* kept) {
        apply_kept(from(row, unit), to(row, unit), count, kept, scale);
      });
}

template <class T>
void apply(ConstMatrix x, RowSharing sharing, Matrix out, MaskSource source, int threads) {
  if (sharing.group == 1) return apply_rows<T, true>(x, sharing, out, source, threads);
  apply_rows<T, false>(x, sharing, out, source, threads);
}

void apply_mask(ConstMatrix x, RowSharing sharing, Matrix out, MaskSource source, Launch launch) {
  switch (x.dtype) {
    case DType::f32:
      return apply<float>(x, sharing, out, source, launch.threads);
    case DType::f64:
      return apply<double>(x, sharing, out, source, launch.threads);
    case DType::bf16:
      return apply<BFloat16>(x, sharing, out, source, launch.threads);
    case DType::f16:
      return apply<Float16>(x, sharing, out, source, launch.threads);
    case DType::i32:
      return;  // refused before
  }
}

// Bytes of 1 and 0, from bits or from lanes.
inline void mark(uint8_t* out, const uint8_t* bits, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const uint64_t bytes = spread(bits[i / 8]);
    std::memcpy(out + i, &bytes, sizeof bytes);
  }
  for (; i < count; ++i) out[i] = bits[i / 8] >> (i & 7) & 1;
}
inline void mark(uint8_t* out, const uint16_t* lanes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = lanes[i] & 1;
}

void keep_mask(uint8_t* out, int64_t rows, int64_t units, MaskSource source, Launch launch) {
  for_each_piece(
      rows, units, true, source, launch.threads, [](int64_t, int64_t, int64_t) { return Fetch{}; },
      [&](int64_t row, int64_t unit, int64_t count, const Kept* kept) {
        mark(out + row * units + unit, kept, count);
      });
}

}  // namespace

namespace DROPSCOPE_ISA {
const MaskKernels masks{apply_mask, keep_mask};
}

}  // namespace dropscope
