#include "GatherAddPos.h"

#include <memory>

#include "binding.h"

namespace mimdet {
namespace {

// An index out of range would read outside of the tensor; the check costs microseconds.
void check_index(const int64_t* index, int64_t n, int64_t length) {
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < length, "gather_add_pos: index holds ", index[i],
                    ", outside of 0 .. L - 1 with L = ", length);
  }
}

// x (B, L, C) with contiguous rows, pos (L, C) in y's dtype or none, index (B, K) int64 -> y (B, K, C).
void fwd(const Tensor& x, OptionalTensor pos, const Tensor& index, Tensor y) {
  const int64_t count = index.size(1), channels = x.size(2);
  const int64_t batch_stride = x.stride(0), row_stride = x.stride(1);
  const auto* index_at = static_cast<const int64_t*>(index.data_ptr());
  check_index(index_at, index.numel(), x.size(1));
  const bool x_bf16 = is_bfloat16(x), y_bf16 = is_bfloat16(y);
  const void *x_at = rows(x), *pos_at = pos ? rows(*pos) : nullptr;
  void* y_at = rows(y);
  const auto run = MIMDET_PICK_ISA(gather_add_pos_rows);
  torch::stable::parallel_for(0, index.numel(), kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(x_at, x_bf16, batch_stride, row_stride, pos_at, index_at, y_at, y_bf16, count, channels, begin, end);
  });
}

// dy (B, K, C), index (B, K) int64 -> dx (B, L, C).
void bwd(const Tensor& dy, const Tensor& index, Tensor dx) {
  const int64_t batch = dx.size(0), length = dx.size(1), channels = dx.size(2), count = index.size(1);
  const auto* index_at = static_cast<const int64_t*>(index.data_ptr());
  check_index(index_at, index.numel(), length);
  // Inverted index, so that threads write each row of dx once.
  const std::unique_ptr<int64_t[]> source(new int64_t[batch * length]);
  for (int64_t i = 0; i < batch * length; ++i) source[i] = -1;
  for (int64_t i = 0; i < batch * count; ++i) source[i / count * length + index_at[i]] = i;
  const int64_t* source_at = source.get();
  const bool dy_bf16 = is_bfloat16(dy), dx_bf16 = is_bfloat16(dx);
  const void* dy_at = rows(dy);
  void* dx_at = rows(dx);
  const auto run = MIMDET_PICK_ISA(gather_add_pos_backward_rows);
  torch::stable::parallel_for(0, batch * length, kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(dy_at, dy_bf16, source_at, dx_at, dx_bf16, channels, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("gather_add_pos_fwd(Tensor x, Tensor? pos, Tensor index, Tensor(a!) y) -> ()");
  m.def("gather_add_pos_bwd(Tensor dy, Tensor index, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("gather_add_pos_fwd", TORCH_BOX(&fwd));
  m.impl("gather_add_pos_bwd", TORCH_BOX(&bwd));
}

}  // namespace mimdet
