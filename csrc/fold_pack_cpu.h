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

std::tuple<Tensors, Tensors> pack_tensors_cpu(
    const Tensors& w, const OptTensors& rows, const OptTensors& cols, const OptTensors& z_out,
    const OptTensors& z_in, const OptTensors& lora_a, const OptTensors& lora_b,
    const std::vector<double>& lora_scale, const Ints& row_multiple, const Ints& col_multiple,
    const Ints& order, std::optional<ScalarType> dtype);

void pack_tensors_out_cpu(const Tensors& w, const OptTensors& rows, const OptTensors& cols,
                          const OptTensors& z_out, const OptTensors& z_in, const OptTensors& lora_a,
                          const OptTensors& lora_b, const std::vector<double>& lora_scale,
                          const Ints& row_multiple, const Ints& col_multiple, const Ints& order,
                          std::optional<ScalarType> dtype, const Tensors& out,
                          const Tensors& scales);

Tensors unpack_tensors_cpu(const Tensors& g, const OptTensors& rows, const OptTensors& cols,
                           const OptTensors& z_out, const OptTensors& z_in, const Ints& O,
                           const Ints& I, std::optional<ScalarType> dtype);

void unpack_tensors_out_cpu(const Tensors& g, const OptTensors& rows, const OptTensors& cols,
                            const OptTensors& z_out, const OptTensors& z_in, const Ints& O,
                            const Ints& I, std::optional<ScalarType> dtype, const Tensors& out);

// The instruction set in use: "avx512", "avx2" or "scalar".
const char* simd_level();

// Uses the named instruction set from here on. Every set writes the same bytes; tests compare them.
void set_simd_level(const std::string& name);

}  // namespace gatepack
