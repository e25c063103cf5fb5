// open_sets and remap_ids on the CPU.
#include "open_sets.h"

#include <algorithm>
#include <atomic>

namespace gatepack {
namespace {

void write_open_set(const bool* mask, int32_t n, int32_t* out) {
  const int32_t count = static_cast<int32_t>(std::count(mask, mask + n, true));
  int32_t* slots[2] = {out + count, out};  // of the next closed and of the next open unit
  for (int32_t unit = 0; unit < n; ++unit) *slots[mask[unit]]++ = unit;
  out[n] = count;
}

template <class Id>
Tensor remap(const Tensor& ids, const Tensor& table) {
  Tensor out = torch::stable::new_empty(ids, ids.sizes(), ids.scalar_type());
  const Id* from = static_cast<const Id*>(ids.const_data_ptr());
  Id* to = static_cast<Id*>(out.mutable_data_ptr());
  const int32_t* names = static_cast<const int32_t*>(table.const_data_ptr());
  const int64_t size = table.numel(), n = ids.numel();
  std::atomic<int64_t> refused{n};
  torch::stable::parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = from[i];
      to[i] = id >= 0 && id < size ? names[id] : -1;
      if (to[i] >= 0) continue;
      int64_t first = refused.load();
      while (i < first && !refused.compare_exchange_weak(first, i)) {
      }
      return;
    }
  });
  const int64_t at = refused.load();
  if (at < n) {
    const int64_t id = from[at];
    const bool inside = id >= 0 && id < size;
    require(!inside, "remap_ids: ids must be kept ones, got ", id, " at position ", at,
            ", which table drops: encode the text with the packed tokenizer");
    require(inside, "remap_ids: ids must be in [0, ", size, "), got ", id, " at position ", at);
  }
  return out;
}

}  // namespace

Tensors open_sets_cpu(const Tensors& masks) {
  check_masks(masks);
  Tensors out;
  for (const Tensor& mask : masks) out.push_back(new_open_set(mask));
  torch::stable::parallel_for(
      0, static_cast<int64_t>(masks.size()), 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          write_open_set(static_cast<const bool*>(masks[i].const_data_ptr()),
                         static_cast<int32_t>(masks[i].numel()),
                         static_cast<int32_t*>(out[i].mutable_data_ptr()));
        }
      });
  return out;
}

Tensor remap_ids_cpu(const Tensor& ids, const Tensor& table) {
  check_remap(ids, table);
  return ids.scalar_type() == ScalarType::Long ? remap<int64_t>(ids, table)
                                               : remap<int32_t>(ids, table);
}

}  // namespace gatepack
