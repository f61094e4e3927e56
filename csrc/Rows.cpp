#include "Rows.h"

#include <memory>

#include "binding.h"

namespace mimdet {
namespace {

const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

// A number out of range would read or write outside of the tensor; the check costs microseconds.
void check_index(const Tensor& index, int64_t least, int64_t rows, const char* name, const char* size) {
  const int64_t* at = integers(index);
  for (int64_t i = 0; i < index.numel(); ++i) {
    STD_TORCH_CHECK(at[i] >= least && at[i] < rows, name, " holds ", at[i], ", outside of ", least, " .. ", size,
                    " - 1 with ", size, " = ", rows);
  }
}

void check_ids_restore(const Tensor& ids_restore, int64_t rows) {
  const bool padded = ids_restore.size(1) > rows;
  check_index(ids_restore, padded ? -1 : 0, rows, "scatter_fill: ids_restore", "K + F");
}

// y (B, L, C) from rows of first (B, K, C) and second (B, F, C): see gather_rows.
void gather(const Tensor& first, const Tensor& second, const int64_t* index, const void* pos, bool pos_at_source,
            const Tensor& y) {
  const RowSources sources{rows(first),  first.stride(0),  first.stride(1), first.size(1),
                           rows(second), second.stride(0), second.stride(1)};
  const int64_t length = y.size(1), channels = y.size(2);
  const bool sources_bf16 = is_bfloat16(first), y_bf16 = is_bfloat16(y);
  void* y_at = rows(y);
  const auto run = MIMDET_PICK_ISA(gather_rows);
  torch::stable::parallel_for(0, y.size(0) * length, kGrain / (channels + 1) + 1, [=](int64_t begin, int64_t end) {
    run(sources, sources_bf16, index, pos, pos_at_source, y_at, y_bf16, length, channels, begin, end);
  });
}

// dy (B, L, C), contiguous -> row index[b, l] of cat([first, second], 1)[b] = dy[b, l]; rows without an index are zero.
void scatter(const Tensor& dy, const Tensor& index, const Tensor& first, const Tensor* second) {
  const int64_t batch = dy.size(0), length = dy.size(1);
  const int64_t first_rows = first.size(1), second_rows = second == nullptr ? 0 : second->size(1);
  const int64_t of_first = batch * first_rows, count = of_first + batch * second_rows;
  // Inverted index, so that threads write each row once.
  const std::unique_ptr<int64_t[]> source(new int64_t[count]);
  for (int64_t i = 0; i < count; ++i) source[i] = -1;
  for (int64_t i = 0; i < batch * length; ++i) {
    const int64_t b = i / length, row = integers(index)[i];
    if (row < 0) continue;
    source[row < first_rows ? b * first_rows + row : of_first + b * second_rows + row - first_rows] = i % length;
  }
  gather(dy, dy, source.get(), nullptr, false, first);
  if (second_rows > 0) gather(dy, dy, source.get() + of_first, nullptr, false, *second);
}

// x (B, L, C) with contiguous rows, pos (L, C) in y's dtype or none, index (B, K) int64 -> y (B, K, C).
void gather_add_pos_fwd(const Tensor& x, OptionalTensor pos, const Tensor& index, Tensor y) {
  check_index(index, 0, x.size(1), "gather_add_pos: index", "L");
  gather(x, x, integers(index), pos ? rows(*pos) : nullptr, true, y);
}

// dy (B, K, C), index (B, K) int64 -> dx (B, L, C).
void gather_add_pos_bwd(const Tensor& dy, const Tensor& index, Tensor dx) {
  check_index(index, 0, dx.size(1), "gather_add_pos: index", "L");
  scatter(dy, index, dx, nullptr);
}

// kept (B, K, D) and fill (B, F, D) of one dtype with contiguous rows, ids_restore (B, L) int64, pos (L, D) in y's
// dtype -> y (B, L, D).
void scatter_fill_fwd(const Tensor& kept, const Tensor& fill, const Tensor& ids_restore, const Tensor& pos, Tensor y) {
  check_ids_restore(ids_restore, kept.size(1) + fill.size(1));
  gather(kept, fill, integers(ids_restore), rows(pos), false, y);
}

// dy (B, L, D), ids_restore (B, L) int64 -> dkept (B, K, D), dfill (B, F, D).
void scatter_fill_bwd(const Tensor& dy, const Tensor& ids_restore, Tensor dkept, Tensor dfill) {
  check_ids_restore(ids_restore, dkept.size(1) + dfill.size(1));
  scatter(dy, ids_restore, dkept, &dfill);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("gather_add_pos_fwd(Tensor x, Tensor? pos, Tensor index, Tensor(a!) y) -> ()");
  m.def("gather_add_pos_bwd(Tensor dy, Tensor index, Tensor(a!) dx) -> ()");
  m.def("scatter_fill_fwd(Tensor kept, Tensor fill, Tensor ids_restore, Tensor pos, Tensor(a!) y) -> ()");
  m.def("scatter_fill_bwd(Tensor dy, Tensor ids_restore, Tensor(a!) dkept, Tensor(b!) dfill) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("gather_add_pos_fwd", TORCH_BOX(&gather_add_pos_fwd));
  m.impl("gather_add_pos_bwd", TORCH_BOX(&gather_add_pos_bwd));
  m.impl("scatter_fill_fwd", TORCH_BOX(&scatter_fill_fwd));
  m.impl("scatter_fill_bwd", TORCH_BOX(&scatter_fill_bwd));
}

}  // namespace mimdet
