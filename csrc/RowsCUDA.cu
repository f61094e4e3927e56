#include "cuda_move.h"

namespace mimdet {
namespace {

// Rows of an image: `first_rows` of one tensor, then those of another, each at two strides.
template <class T>
struct Rows {
  T* first;
  int64_t first_batch_stride, first_row_stride, first_rows;
  T* second;
  int64_t second_batch_stride, second_row_stride;

  __device__ __forceinline__ T* at(int64_t b, int64_t row) const {
    return row < first_rows ? first + b * first_batch_stride + row * first_row_stride
                            : second + b * second_batch_stride + (row - first_rows) * second_row_stride;
  }

  template <int V>
  bool pack() const {
    return packs<V>(first, first_batch_stride, first_row_stride) &&
           packs<V>(second, second_batch_stride, second_row_stride);
  }
};

template <int V, class In, class Out>
__global__ void gather_rows_kernel(Rows<const In> sources, const int64_t* index, const Out* pos, bool pos_at_source,
                                   Out* out, int64_t rows, int64_t length, int64_t channels) {
  const int64_t r = warp_row();
  if (r >= rows) return;
  const int64_t b = r / length, row = index[r];
  if (row < 0) return clear_row<V>(out + r * channels, channels);
  const Out* shift = pos == nullptr ? nullptr : pos + (pos_at_source ? row : r - b * length) * channels;
  move_row<V>(sources.at(b, row), shift, out + r * channels, channels);
}

template <int V, class In, class Out>
__global__ void scatter_rows_kernel(const In* dy, const int64_t* index, Rows<Out> to, int64_t rows, int64_t length,
                                    int64_t channels) {
  const int64_t r = warp_row();
  if (r >= rows) return;
  const int64_t row = index[r];
  if (row < 0) return;
  move_row<V>(dy + r * channels, static_cast<const Out*>(nullptr), to.at(r / length, row), channels);
}

// y (rows, channels): row index[r] of image r / length of the sources, + a row of pos unless that is null.
int gather(Rows<const void> sources, const int64_t* index, const void* pos, bool pos_at_source, void* y, int64_t rows,
           int64_t length, int64_t channels, int64_t in, int64_t out, cudaStream_t stream) {
  return dispatch(in, out, [&](auto in_type, auto out_type) {
    using In = decltype(in_type);
    using Out = decltype(out_type);
    constexpr int V = kPack<In, Out>;
    const Rows<const In> from{static_cast<const In*>(sources.first), sources.first_batch_stride,
                              sources.first_row_stride, sources.first_rows, static_cast<const In*>(sources.second),
                              sources.second_batch_stride, sources.second_row_stride};
    const auto* shift = static_cast<const Out*>(pos);
    auto* to = static_cast<Out*>(y);
    by_pack<V>(from.template pack<V>() && packs<V>(shift, channels) && packs<V>(to, channels), [&](auto pack) {
      gather_rows_kernel<decltype(pack)::value><<<row_grid(rows), row_block(), 0, stream>>>(
          from, index, shift, pos_at_source, to, rows, length, channels);
    });
  });
}

// Row index[r] of image r / length of first and second, both contiguous = dy[r]; nothing where the index is negative.
int scatter(const void* dy, const int64_t* index, void* first, int64_t first_rows, void* second, int64_t second_rows,
            int64_t rows, int64_t length, int64_t channels, int64_t in, int64_t out, cudaStream_t stream) {
  return dispatch(in, out, [&](auto in_type, auto out_type) {
    using In = decltype(in_type);
    using Out = decltype(out_type);
    constexpr int V = kPack<In, Out>;
    const auto* from = static_cast<const In*>(dy);
    const Rows<Out> to{static_cast<Out*>(first), first_rows * channels, channels, first_rows,
                       static_cast<Out*>(second), second_rows * channels, channels};
    by_pack<V>(packs<V>(from, channels) && to.template pack<V>(), [&](auto pack) {
      scatter_rows_kernel<decltype(pack)::value><<<row_grid(rows), row_block(), 0, stream>>>(
          from, index, to, rows, length, channels);
    });
  });
}

}  // namespace
}  // namespace mimdet

using namespace mimdet;

// x: B x L rows of `channels` at two strides; pos: (L, channels) or null; index: (B, count); y: (B, count, channels).
MIMDET_CUDA_API int mimdet_gather_add_pos_fwd(
    const void* x, const void* pos, const int64_t* index, void* y, int64_t batch_stride, int64_t row_stride,
    int64_t rows, int64_t count, int64_t length, int64_t channels, int64_t x_type, int64_t y_type,
    cudaStream_t stream) {
  return gather({x, batch_stride, row_stride, length, x, batch_stride, row_stride}, index, pos, true, y, rows, count,
                channels, x_type, y_type, stream);
}

// dy: (B, count, channels); index: (B, count), unique in each row; dx: (B, length, channels), zeros.
MIMDET_CUDA_API int mimdet_gather_add_pos_bwd(
    const void* dy, const int64_t* index, void* dx, int64_t rows, int64_t count, int64_t length, int64_t channels,
    int64_t dy_type, int64_t dx_type, cudaStream_t stream) {
  return scatter(dy, index, dx, length, dx, 0, rows, count, channels, dy_type, dx_type, stream);
}

// kept: kept_rows rows an image, fill: the others, each at two strides; ids_restore: (rows,), -1 for zeros; pos:
// (length, channels).
MIMDET_CUDA_API int mimdet_scatter_fill_fwd(
    const void* kept, const void* fill, const int64_t* ids_restore, const void* pos, void* y, int64_t kept_batch_stride,
    int64_t kept_row_stride, int64_t fill_batch_stride, int64_t fill_row_stride, int64_t rows, int64_t kept_rows,
    int64_t length, int64_t channels, int64_t kept_type, int64_t y_type, cudaStream_t stream) {
  return gather({kept, kept_batch_stride, kept_row_stride, kept_rows, fill, fill_batch_stride, fill_row_stride},
                ids_restore, pos, false, y, rows, length, channels, kept_type, y_type, stream);
}

// dy: (rows, channels); ids_restore: (rows); dkept and dfill contiguous.
MIMDET_CUDA_API int mimdet_scatter_fill_bwd(
    const void* dy, const int64_t* ids_restore, void* dkept, void* dfill, int64_t rows, int64_t kept_rows,
    int64_t fill_rows, int64_t length, int64_t channels, int64_t dy_type, int64_t dkept_type, cudaStream_t stream) {
  return scatter(dy, ids_restore, dkept, kept_rows, dfill, fill_rows, rows, length, channels, dy_type, dkept_type,
                 stream);
}
