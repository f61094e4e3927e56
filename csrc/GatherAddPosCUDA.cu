#include "cuda_move.h"

namespace mimdet {
namespace {

template <int V, class In, class Out>
__global__ void gather_add_pos_kernel(const In* x, int64_t batch_stride, int64_t row_stride, const Out* pos,
                                      const int64_t* index, Out* out, int64_t rows, int64_t count, int64_t channels) {
  const int64_t r = warp_row();
  if (r >= rows) return;
  const int64_t i = index[r];
  move_row<V>(x + r / count * batch_stride + i * row_stride, pos == nullptr ? nullptr : pos + i * channels,
              out + r * channels, channels);
}

template <int V, class In, class Out>
__global__ void gather_add_pos_backward_kernel(const In* dy, const int64_t* index, Out* out, int64_t rows,
                                               int64_t count, int64_t length, int64_t channels) {
  const int64_t r = warp_row();
  if (r >= rows) return;
  move_row<V>(dy + r * channels, static_cast<const Out*>(nullptr),
              out + (r / count * length + index[r]) * channels, channels);
}

}  // namespace
}  // namespace mimdet

using namespace mimdet;

// x: B x L rows of `channels` at two strides; pos: (L, channels) or null; index: (B, count); y: (B, count, channels).
MIMDET_CUDA_API int mimdet_gather_add_pos_fwd(
    const void* x, const void* pos, const int64_t* index, void* y, int64_t batch_stride, int64_t row_stride,
    int64_t rows, int64_t count, int64_t channels, int64_t x_type, int64_t y_type, cudaStream_t stream) {
  return dispatch(x_type, y_type, [&](auto in_type, auto to_type) {
    using In = decltype(in_type);
    using Out = decltype(to_type);
    constexpr int V = kPack<In, Out>;
    const auto *from = static_cast<const In*>(x);
    const auto *shift = static_cast<const Out*>(pos);
    auto* to = static_cast<Out*>(y);
    const bool packed = packs<V>(from, batch_stride, row_stride) && packs<V>(shift, channels) && packs<V>(to, channels);
    by_pack<V>(packed, [&](auto pack) {
      gather_add_pos_kernel<decltype(pack)::value><<<row_grid(rows), row_block(), 0, stream>>>(
          from, batch_stride, row_stride, shift, index, to, rows, count, channels);
    });
  });
}

// dy: (B, count, channels); index: (B, count), unique in each row; dx: (B, length, channels), zeros.
MIMDET_CUDA_API int mimdet_gather_add_pos_bwd(
    const void* dy, const int64_t* index, void* dx, int64_t rows, int64_t count, int64_t length, int64_t channels,
    int64_t dy_type, int64_t dx_type, cudaStream_t stream) {
  return dispatch(dy_type, dx_type, [&](auto in_type, auto to_type) {
    using In = decltype(in_type);
    using Out = decltype(to_type);
    constexpr int V = kPack<In, Out>;
    const auto* from = static_cast<const In*>(dy);
    auto* to = static_cast<Out*>(dx);
    by_pack<V>(packs<V>(from, channels) && packs<V>(to, channels), [&](auto pack) {
      gather_add_pos_backward_kernel<decltype(pack)::value>
          <<<row_grid(rows), row_block(), 0, stream>>>(from, index, to, rows, count, length, channels);
    });
  });
}
