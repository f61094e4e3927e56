#include "cuda_move.h"

namespace mimdet {
namespace {

template <int V, class In, class Out>
__global__ void scatter_fill_kernel(const In* kept, int64_t kept_batch_stride, int64_t kept_row_stride, const In* fill,
                                    int64_t fill_batch_stride, int64_t fill_row_stride, const int64_t* ids_restore,
                                    const Out* pos, Out* out, int64_t rows, int64_t kept_rows, int64_t length,
                                    int64_t channels) {
  const int64_t r = warp_row();
  if (r >= rows) return;
  const int64_t b = r / length, row = ids_restore[r];
  if (row < 0) return clear_row<V>(out + r * channels, channels);
  const In* from = row < kept_rows ? kept + b * kept_batch_stride + row * kept_row_stride
                                   : fill + b * fill_batch_stride + (row - kept_rows) * fill_row_stride;
  move_row<V>(from, pos + (r - b * length) * channels, out + r * channels, channels);
}

template <int V, class In, class Out>
__global__ void scatter_fill_backward_kernel(const In* dy, const int64_t* ids_restore, Out* kept, Out* fill,
                                             int64_t rows, int64_t kept_rows, int64_t fill_rows, int64_t length,
                                             int64_t channels) {
  const int64_t r = warp_row();
  if (r >= rows) return;
  const int64_t b = r / length, row = ids_restore[r];
  if (row < 0) return;
  Out* to = row < kept_rows ? kept + (b * kept_rows + row) * channels
                            : fill + (b * fill_rows + row - kept_rows) * channels;
  move_row<V>(dy + r * channels, static_cast<const Out*>(nullptr), to, channels);
}

}  // namespace
}  // namespace mimdet

using namespace mimdet;

// kept: kept_rows rows an image, fill: the others, each at two strides; ids_restore: (rows,), -1 for zeros; pos:
// (length, channels).
MIMDET_CUDA_API int mimdet_scatter_fill_fwd(
    const void* kept, const void* fill, const int64_t* ids_restore, const void* pos, void* y, int64_t kept_batch_stride,
    int64_t kept_row_stride, int64_t fill_batch_stride, int64_t fill_row_stride, int64_t rows, int64_t kept_rows,
    int64_t length, int64_t channels, int64_t kept_type, int64_t y_type, cudaStream_t stream) {
  return dispatch(kept_type, y_type, [&](auto from_type, auto to_type) {
    using In = decltype(from_type);
    using Out = decltype(to_type);
    constexpr int V = kPack<In, Out>;
    const auto* a = static_cast<const In*>(kept);
    const auto* b = static_cast<const In*>(fill);
    const auto* shift = static_cast<const Out*>(pos);
    auto* to = static_cast<Out*>(y);
    const bool packed = packs<V>(a, kept_batch_stride, kept_row_stride) &&
                        packs<V>(b, fill_batch_stride, fill_row_stride) && packs<V>(shift, channels) &&
                        packs<V>(to, channels);
    by_pack<V>(packed, [&](auto pack) {
      scatter_fill_kernel<decltype(pack)::value><<<row_grid(rows), row_block(), 0, stream>>>(
          a, kept_batch_stride, kept_row_stride, b, fill_batch_stride, fill_row_stride, ids_restore, shift, to, rows,
          kept_rows, length, channels);
    });
  });
}

// dy: (rows, channels); ids_restore: (rows); dkept and dfill contiguous.
MIMDET_CUDA_API int mimdet_scatter_fill_bwd(
    const void* dy, const int64_t* ids_restore, void* dkept, void* dfill, int64_t rows, int64_t kept_rows,
    int64_t fill_rows, int64_t length, int64_t channels, int64_t dy_type, int64_t dkept_type, cudaStream_t stream) {
  return dispatch(dy_type, dkept_type, [&](auto in_type, auto to_type) {
    using In = decltype(in_type);
    using Out = decltype(to_type);
    constexpr int V = kPack<In, Out>;
    const auto* from = static_cast<const In*>(dy);
    auto *a = static_cast<Out*>(dkept), *b = static_cast<Out*>(dfill);
    by_pack<V>(packs<V>(from, channels) && packs<V>(a, channels) && packs<V>(b, channels), [&](auto pack) {
      scatter_fill_backward_kernel<decltype(pack)::value><<<row_grid(rows), row_block(), 0, stream>>>(
          from, ids_restore, a, b, rows, kept_rows, fill_rows, length, channels);
    });
  });
}
