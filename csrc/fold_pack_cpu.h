// The CPU side of the ops, as ops.cpp registers it.
#pragma once

#include "layout.h"

#include <string>
#include <tuple>

namespace gatepack {

Tensor fold_pack_cpu(const Tensor& w, const OptTensor& rows, const OptTensor& cols,
                     const OptTensor& z_out, const OptTensor& z_in,
                     std::optional<ScalarType> dtype, bool stream);

Tensor pack_rows_cpu(const Tensor& w, const Tensor& rows);

Tensor fold_pack_adjoint_cpu(const Tensor& g, const OptTensor& rows, const OptTensor& cols,
                             const OptTensor& z_out, const OptTensor& z_in, int64_t O, int64_t I,
                             std::optional<ScalarType> dtype);

// Run of multi_tensor.h.
std::tuple<Tensors, Tensors> run_cpu(const char* op, bool adjoint, const std::vector<Call>& calls,
                                     const Tensors& in, std::optional<ScalarType> dtype,
                                     const Results& results);

// The instruction set in use: "avx512", "avx2" or "scalar".
const char* simd_level();

// Uses the named instruction set from here on. Every set writes the same bytes; tests compare them.
void set_simd_level(const std::string& name);

}  // namespace gatepack
