#include "ScatterFill.h"

#include "binding.h"

namespace mimdet {
namespace {

// Writing outside of a tensor is worse than the few microseconds that this takes.
void check_restore(const Tensor& restore, int64_t rows) {
  const auto* at = static_cast<const int64_t*>(restore.data_ptr());
  const int64_t least = restore.size(1) > rows ? -1 : 0;  // padding
  for (int64_t i = 0; i < restore.numel(); ++i) {
    STD_TORCH_CHECK(at[i] >= least && at[i] < rows, "scatter_fill: restore holds ", at[i], ", outside of ", least,
                    " .. K + F - 1 with K + F = ", rows);
  }
}

// kept (B, K, D) and fill (B, F, D) of one dtype with contiguous rows, restore (B, L) int64, pos (L, D) in out's
// dtype -> out (B, L, D).
void scatter_fill(const Tensor& kept, const Tensor& fill, const Tensor& restore, const Tensor& pos, Tensor out) {
  const int64_t kept_rows = kept.size(1), length = restore.size(1), channels = kept.size(2);
  const int64_t kept_batch = kept.stride(0), kept_row = kept.stride(1);
  const int64_t fill_batch = fill.stride(0), fill_row = fill.stride(1);
  const auto* restore_at = static_cast<const int64_t*>(restore.data_ptr());
  check_restore(restore, kept_rows + fill.size(1));
  const bool sources_bf16 = is_bfloat16(kept), out_bf16 = is_bfloat16(out);
  const void *kept_at = rows(kept), *fill_at = rows(fill), *pos_at = rows(pos);
  void* out_at = rows(out);
  const auto run = MIMDET_PICK_ISA(scatter_fill_rows);
  torch::stable::parallel_for(0, restore.numel(), kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(kept_at, kept_batch, kept_row, fill_at, fill_batch, fill_row, sources_bf16, restore_at, pos_at, out_at,
        out_bf16, kept_rows, length, channels, begin, end);
  });
}

// grad (B, L, D), restore (B, L) int64 -> kept (B, K, D), fill (B, F, D).
void scatter_fill_backward(const Tensor& grad, const Tensor& restore, Tensor kept, Tensor fill) {
  const int64_t kept_rows = kept.size(1), fill_rows = fill.size(1), length = grad.size(1), channels = grad.size(2);
  const auto* restore_at = static_cast<const int64_t*>(restore.data_ptr());
  check_restore(restore, kept_rows + fill_rows);
  const bool grad_bf16 = is_bfloat16(grad), out_bf16 = is_bfloat16(kept);
  const void* grad_at = rows(grad);
  void *kept_at = rows(kept), *fill_at = rows(fill);
  const auto run = MIMDET_PICK_ISA(scatter_fill_backward_rows);
  torch::stable::parallel_for(0, restore.numel(), kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(grad_at, grad_bf16, restore_at, kept_at, fill_at, out_bf16, kept_rows, fill_rows, length, channels, begin,
        end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("scatter_fill(Tensor kept, Tensor fill, Tensor restore, Tensor pos, Tensor(a!) out) -> ()");
  m.def("scatter_fill_backward(Tensor grad, Tensor restore, Tensor(a!) kept, Tensor(b!) fill) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("scatter_fill", TORCH_BOX(&scatter_fill));
  m.impl("scatter_fill_backward", TORCH_BOX(&scatter_fill_backward));
}

}  // namespace mimdet
