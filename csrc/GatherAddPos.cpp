#include "GatherAddPos.h"

#include <memory>
#include <optional>

#include "binding.h"

namespace mimdet {
namespace {

// Reading outside of a tensor is worse than the few microseconds that this takes.
void check_index(const int64_t* index, int64_t n, int64_t length) {
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < length, "gather_add_pos: index holds ", index[i],
                    ", outside of 0 .. L - 1 with L = ", length);
  }
}

// x (B, L, C) with contiguous rows, pos (L, C) in out's dtype or none, index (B, K) int64 -> out (B, K, C).
void gather_add_pos(const Tensor& x, std::optional<Tensor> pos, const Tensor& index, Tensor out) {
  const int64_t count = index.size(1), channels = x.size(2);
  const int64_t batch_stride = x.stride(0), row_stride = x.stride(1);
  const auto* index_at = static_cast<const int64_t*>(index.data_ptr());
  check_index(index_at, index.numel(), x.size(1));
  const bool x_bf16 = is_bfloat16(x), out_bf16 = is_bfloat16(out);
  const void *x_at = rows(x), *pos_at = pos ? rows(*pos) : nullptr;
  void* out_at = rows(out);
  const auto run = MIMDET_PICK_ISA(gather_add_pos_rows);
  torch::stable::parallel_for(0, index.numel(), kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(x_at, x_bf16, batch_stride, row_stride, pos_at, index_at, out_at, out_bf16, count, channels, begin, end);
  });
}

// grad (B, K, C), index (B, K) int64 -> out (B, L, C).
void gather_add_pos_backward(const Tensor& grad, const Tensor& index, Tensor out) {
  const int64_t batch = out.size(0), length = out.size(1), channels = out.size(2), count = index.size(1);
  const auto* index_at = static_cast<const int64_t*>(index.data_ptr());
  check_index(index_at, index.numel(), length);
  // With the row that each token's gradient comes from, every row of the result is written once.
  const std::unique_ptr<int64_t[]> source(new int64_t[batch * length]);
  for (int64_t i = 0; i < batch * length; ++i) source[i] = -1;
  for (int64_t i = 0; i < batch * count; ++i) source[i / count * length + index_at[i]] = i;
  const int64_t* source_at = source.get();
  const bool grad_bf16 = is_bfloat16(grad), out_bf16 = is_bfloat16(out);
  const void* grad_at = rows(grad);
  void* out_at = rows(out);
  const auto run = MIMDET_PICK_ISA(gather_add_pos_backward_rows);
  torch::stable::parallel_for(0, batch * length, kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(grad_at, grad_bf16, source_at, out_at, out_bf16, channels, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("gather_add_pos(Tensor x, Tensor? pos, Tensor index, Tensor(a!) out) -> ()");
  m.def("gather_add_pos_backward(Tensor grad, Tensor index, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("gather_add_pos", TORCH_BOX(&gather_add_pos));
  m.impl("gather_add_pos_backward", TORCH_BOX(&gather_add_pos_backward));
}

}  // namespace mimdet
