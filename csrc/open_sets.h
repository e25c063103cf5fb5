// open_sets: bool masks [n] -> int32 [n + 1], as triton_kernels/open_sets.py draws it:
//
//      [ open units, ascending | closed units, ascending | number of open units ]
//        0 .. count-1            count .. n-1              n
//
// remap_ids: table[ids], where table [V] says what each old id is called now, or -1 if it is gone.
#pragma once

#include "layout.h"

namespace gatepack {

inline void check_masks(const Tensors& masks) {
  for (size_t i = 0; i < masks.size(); ++i) {
    const Where where = at_place("open_sets", i);
    require(masks[i].scalar_type() == ScalarType::Bool, where("masks"), " must be bool, got ",
            dtype_name(masks[i].scalar_type()));
    require_vector(where, "masks", masks[i], masks[0]);
    require(masks[i].numel() < std::numeric_limits<int32_t>::max(), where("masks"),
            " must have fewer than 2^31 - 1 units, got ", masks[i].numel());
  }
}

inline Tensor new_open_set(const Tensor& mask) {
  return torch::stable::new_empty(mask, {mask.numel() + 1}, ScalarType::Int);
}

inline void check_remap(const Tensor& ids, const Tensor& table) {
  const Where where{"remap_ids"};
  const ScalarType t = ids.scalar_type();
  require(t == ScalarType::Long || t == ScalarType::Int, where("ids"),
          " must be int64 or int32, got ", dtype_name(t));
  require(ids.is_contiguous(), where("ids"), " must be contiguous");
  require(table.scalar_type() == ScalarType::Int, where("table"), " must be int32, got ",
          dtype_name(table.scalar_type()));
  require_vector(where, "table", table, ids);
}

Tensors open_sets_cpu(const Tensors& masks);
Tensor remap_ids_cpu(const Tensor& ids, const Tensor& table);

}  // namespace gatepack
