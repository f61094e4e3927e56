#include "ScatterFill.h"

#include "binding.h"

namespace mimdet {
namespace {

// A row out of range would write outside of the tensor; the check costs microseconds.
void check_ids_restore(const Tensor& ids_restore, int64_t rows) {
  const auto* at = static_cast<const int64_t*>(ids_restore.data_ptr());
  const int64_t least = ids_restore.size(1) > rows ? -1 : 0;  // padding
  for (int64_t i = 0; i < ids_restore.numel(); ++i) {
    STD_TORCH_CHECK(at[i] >= least && at[i] < rows, "scatter_fill: ids_restore holds ", at[i], ", outside of ", least,
                    " .. K + F - 1 with K + F = ", rows);
  }
}

// kept (B, K, D) and fill (B, F, D) of one dtype with contiguous rows, ids_restore (B, L) int64, pos (L, D) in y's
// dtype -> y (B, L, D).
void fwd(const Tensor& kept, const Tensor& fill, const Tensor& ids_restore, const Tensor& pos, Tensor y) {
  const int64_t kept_rows = kept.size(1), length = ids_restore.size(1), channels = kept.size(2);
  const int64_t kept_batch = kept.stride(0), kept_row = kept.stride(1);
  const int64_t fill_batch = fill.stride(0), fill_row = fill.stride(1);
  const auto* ids_restore_at = static_cast<const int64_t*>(ids_restore.data_ptr());
  check_ids_restore(ids_restore, kept_rows + fill.size(1));
  const bool sources_bf16 = is_bfloat16(kept), y_bf16 = is_bfloat16(y);
  const void *kept_at = rows(kept), *fill_at = rows(fill), *pos_at = rows(pos);
  void* y_at = rows(y);
  const auto run = MIMDET_PICK_ISA(scatter_fill_rows);
  torch::stable::parallel_for(0, ids_restore.numel(), kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(kept_at, kept_batch, kept_row, fill_at, fill_batch, fill_row, sources_bf16, ids_restore_at, pos_at, y_at,
        y_bf16, kept_rows, length, channels, begin, end);
  });
}

// dy (B, L, D), ids_restore (B, L) int64 -> dkept (B, K, D), dfill (B, F, D).
void bwd(const Tensor& dy, const Tensor& ids_restore, Tensor dkept, Tensor dfill) {
  const int64_t kept_rows = dkept.size(1), fill_rows = dfill.size(1), length = dy.size(1), channels = dy.size(2);
  const auto* ids_restore_at = static_cast<const int64_t*>(ids_restore.data_ptr());
  check_ids_restore(ids_restore, kept_rows + fill_rows);
  const bool dy_bf16 = is_bfloat16(dy), out_bf16 = is_bfloat16(dkept);
  const void* dy_at = rows(dy);
  void *dkept_at = rows(dkept), *dfill_at = rows(dfill);
  const auto run = MIMDET_PICK_ISA(scatter_fill_backward_rows);
  torch::stable::parallel_for(0, ids_restore.numel(), kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(dy_at, dy_bf16, ids_restore_at, dkept_at, dfill_at, out_bf16, kept_rows, fill_rows, length, channels, begin,
        end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("scatter_fill_fwd(Tensor kept, Tensor fill, Tensor ids_restore, Tensor pos, Tensor(a!) y) -> ()");
  m.def("scatter_fill_bwd(Tensor dy, Tensor ids_restore, Tensor(a!) dkept, Tensor(b!) dfill) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("scatter_fill_fwd", TORCH_BOX(&fwd));
  m.impl("scatter_fill_bwd", TORCH_BOX(&bwd));
}

}  // namespace mimdet
