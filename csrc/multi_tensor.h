// The ops on lists of matrices, once for all devices: every matrix is described, and `run` of the
// CPU or of CUDA does the work. Their long lists of arguments are those of schemas.h.
#pragma once

#include "layout.h"

#include <tuple>

namespace gatepack {

// Packs or unpacks every matrix: results, and for e4m3 the scales of their rows.
using Run = std::tuple<Tensors, Tensors>(const char* op, bool adjoint,
                                         const std::vector<Call>& calls, const Tensors& in,
                                         std::optional<ScalarType> dtype, const Results& results);

template <class... Lists>
void require_lengths(const char* op, size_t n, const Lists&... lists) {
  const auto check = [&](size_t length) {
    require(length == n, op, ": every list must have one entry per matrix (", n, "), got ", length);
  };
  (check(lists.size()), ...);
}

inline std::vector<Call> describe_packs(const Tensors& w, const OptTensors& rows,
                                        const OptTensors& cols, const OptTensors& z_out,
                                        const OptTensors& z_in, const OptTensors& lora_a,
                                        const OptTensors& lora_b,
                                        const std::vector<double>& lora_scale,
                                        const Ints& row_multiple, const Ints& col_multiple,
                                        const Ints& order, std::optional<ScalarType> dtype) {
  const char* op = "pack_tensors";
  require_lengths(op, w.size(), rows, cols, z_out, z_in, lora_a, lora_b, lora_scale, row_multiple,
                  col_multiple, order);
  std::vector<Call> calls;
  for (size_t i = 0; i < w.size(); ++i) {
    const Extras extras = {lora_a[i],       lora_b[i],       lora_scale[i],
                           row_multiple[i], col_multiple[i], order[i]};
    calls.push_back(describe_pack(at_place(op, i), w[i], rows[i], cols[i], z_out[i], z_in[i], dtype,
                                  true, extras));
  }
  return calls;
}

inline std::vector<Call> describe_unpacks(const Tensors& g, const OptTensors& rows,
                                          const OptTensors& cols, const OptTensors& z_out,
                                          const OptTensors& z_in, const Ints& O, const Ints& I,
                                          std::optional<ScalarType> dtype) {
  const char* op = "unpack_tensors";
  require_lengths(op, g.size(), rows, cols, z_out, z_in, O, I);
  std::vector<Call> calls;
  for (size_t i = 0; i < g.size(); ++i) {
    calls.push_back(describe_adjoint(at_place(op, i), g[i], rows[i], cols[i], z_out[i], z_in[i],
                                     O[i], I[i], dtype));
  }
  return calls;
}

template <Run* run>
std::tuple<Tensors, Tensors> pack_tensors(
    const Tensors& w, const OptTensors& rows, const OptTensors& cols, const OptTensors& z_out,
    const OptTensors& z_in, const OptTensors& lora_a, const OptTensors& lora_b,
    const std::vector<double>& lora_scale, const Ints& row_multiple, const Ints& col_multiple,
    const Ints& order, std::optional<ScalarType> dtype) {
  const auto calls = describe_packs(w, rows, cols, z_out, z_in, lora_a, lora_b, lora_scale,
                                    row_multiple, col_multiple, order, dtype);
  return run("pack_tensors", false, calls, w, dtype, {});
}

template <Run* run>
void pack_tensors_out(const Tensors& w, const OptTensors& rows, const OptTensors& cols,
                      const OptTensors& z_out, const OptTensors& z_in, const OptTensors& lora_a,
                      const OptTensors& lora_b, const std::vector<double>& lora_scale,
                      const Ints& row_multiple, const Ints& col_multiple, const Ints& order,
                      std::optional<ScalarType> dtype, const Tensors& out, const Tensors& scales) {
  const auto calls = describe_packs(w, rows, cols, z_out, z_in, lora_a, lora_b, lora_scale,
                                    row_multiple, col_multiple, order, dtype);
  run("pack_tensors", false, calls, w, dtype, {&out, &scales});
}

template <Run* run>
Tensors unpack_tensors(const Tensors& g, const OptTensors& rows, const OptTensors& cols,
                       const OptTensors& z_out, const OptTensors& z_in, const Ints& O,
                       const Ints& I, std::optional<ScalarType> dtype) {
  const auto calls = describe_unpacks(g, rows, cols, z_out, z_in, O, I, dtype);
  return std::get<0>(run("unpack_tensors", true, calls, g, dtype, {}));
}

template <Run* run>
void unpack_tensors_out(const Tensors& g, const OptTensors& rows, const OptTensors& cols,
                        const OptTensors& z_out, const OptTensors& z_in, const Ints& O,
                        const Ints& I, std::optional<ScalarType> dtype, const Tensors& out) {
  const auto calls = describe_unpacks(g, rows, cols, z_out, z_in, O, I, dtype);
  run("unpack_tensors", true, calls, g, dtype, {&out});
}

}  // namespace gatepack
