// The compact layout, and the one description of a call that every kernel works from.
//
//   rows = {0, 2, 3}   cols = {1, 4}        w [O = 4, I = 5]  ->  packed [|R| = 3, |C| = 2]
//
//          0   1   2   3   4
//      0   .  [b]  .   .  [e]               (b·z_out[0])·z_in[0]   (e·z_out[0])·z_in[1]
//      1   .   .   .   .   .
//      2   .  [l]  .   .  [o]      ->       (l·z_out[1])·z_in[0]   (o·z_out[1])·z_in[1]
//      3   .  [q]  .   .  [t]               (q·z_out[2])·z_in[0]   (t·z_out[2])·z_in[1]
//
// Gates are counted per kept row and column. The product is taken in fp32 (fp64 when w is fp64), in
// exactly this order, and rounded once; there is no addition, so contraction to FMA cannot change a
// bit and every backend writes the same bytes. Only the payload of a NaN is left open.
//
// A matrix with unit stride in one dimension is a stack of lines; a line is a run of lanes:
//
//      row-major      line = row       lane = column     first factor: z_out, per line
//      column-major   line = column    lane = row        first factor: z_out, per lane
//
// Kernels know lines and lanes only. The result has the majorness of its input and no padding.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace gatepack {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// 16-bit floats as bits: torch's own classes convert implicitly, and a conversion nobody asked for
// would be a second rounding.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct Index {
  const void* data = nullptr;  // null: every line or lane is kept
  bool wide = false;           // int64, else int32
};

struct Gate {
  const void* data = nullptr;  // null: all ones
  bool wide = false;           // fp64, else fp32
};

struct Call {
  bool row_major;
  int64_t lines, lanes;            // of the full matrix
  int64_t kept_lines, kept_lanes;  // of the compact one
  int64_t stride;                  // elements from one line of the input to the next
  Index line_index, lane_index;
  Gate line_gate, lane_gate;
  bool lane_first;  // lane_gate is z_out: multiply by it before line_gate
};

// Reaches Python as ValueError (STD_TORCH_CHECK would be a RuntimeError).
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline bool is_supported(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half ||
      t == ScalarType::BFloat16;
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

inline void require_vector(const char* op, const char* name, const Tensor& v, const Tensor& like) {
  require(v.dim() == 1, op, ": ", name, " must have 1 dimension, got ", v.dim());
  require(v.numel() < 2 || v.stride(0) == 1, op, ": ", name, " must have stride 1, got ",
          v.stride(0));
  require(v.is_cuda() == like.is_cuda() && v.get_device_index() == like.get_device_index(), op,
          ": ", name, " must be on the device of the matrix");
}

inline Index read_index(const char* op, const char* name, const OptTensor& index,
                        const Tensor& like) {
  if (!index) return {};
  require_vector(op, name, *index, like);
  const ScalarType t = index->scalar_type();
  require(t == ScalarType::Long || t == ScalarType::Int, op, ": ", name,
          " must be int64 or int32, got ", dtype_name(t));
  // An empty tensor may own no memory, and a null pointer means "all".
  static const int64_t nothing = 0;
  return {index->numel() ? index->data_ptr() : &nothing, t == ScalarType::Long};
}

inline Gate read_gate(const char* op, const char* name, const OptTensor& gate, const Tensor& like,
                      int64_t kept) {
  if (!gate) return {};
  require_vector(op, name, *gate, like);
  const ScalarType t = gate->scalar_type();
  const bool wide = like.scalar_type() == ScalarType::Double;
  require(t == ScalarType::Float || (wide && t == ScalarType::Double), op, ": ", name,
          " must be float32", wide ? " or float64" : "", ", got ", dtype_name(t));
  require(gate->numel() == kept, op, ": ", name, " must have one value per kept unit (", kept,
          "), got ", gate->numel());
  return {gate->data_ptr(), t == ScalarType::Double};
}

// Checks everything that can be known without reading an index, and turns rows and columns into
// lines and lanes. `matrix` is the full one [O, I] or, for the adjoint, the compact one [|R|, |C|].
inline Call describe(const char* op, const char* name, const Tensor& matrix, const OptTensor& rows,
                     const OptTensor& cols, const OptTensor& z_out, const OptTensor& z_in,
                     std::optional<ScalarType> dtype, int64_t full_rows, int64_t full_cols) {
  require(is_supported(matrix.scalar_type()), op, ": ", name,
          " must be float32, float64, float16 or bfloat16, got ",
          dtype_name(matrix.scalar_type()));
  require(!dtype || is_supported(*dtype), op,
          ": dtype must be float32, float64, float16 or bfloat16");
  require(full_rows <= std::numeric_limits<int32_t>::max() &&
              full_cols <= std::numeric_limits<int32_t>::max(),
          op, ": ", name, " must have fewer than 2^31 rows and columns, got ", full_rows, " x ",
          full_cols);
  const int64_t m = matrix.size(0), n = matrix.size(1);
  const bool row_major = matrix.stride(1) == 1 || n <= 1;
  require(row_major || matrix.stride(0) == 1 || m <= 1, op, ": ", name,
          " must have stride 1 in one dimension, got strides ", matrix.stride(0), " and ",
          matrix.stride(1));

  const Index r = read_index(op, "rows", rows, matrix), c = read_index(op, "cols", cols, matrix);
  const int64_t kept_rows = rows ? rows->numel() : full_rows;
  const int64_t kept_cols = cols ? cols->numel() : full_cols;
  const Gate out = read_gate(op, "z_out", z_out, matrix, kept_rows);
  const Gate in = read_gate(op, "z_in", z_in, matrix, kept_cols);
  if (row_major) {
    return {true, full_rows, full_cols, kept_rows, kept_cols, matrix.stride(0), r, c, out, in,
            false};
  }
  return {false, full_cols, full_rows, kept_cols, kept_rows, matrix.stride(1), c, r, in, out, true};
}

inline Call describe_pack(const Tensor& w, const OptTensor& rows, const OptTensor& cols,
                          const OptTensor& z_out, const OptTensor& z_in,
                          std::optional<ScalarType> dtype) {
  require(w.dim() == 2, "fold_pack: w must have 2 dimensions, got ", w.dim());
  return describe("fold_pack", "w", w, rows, cols, z_out, z_in, dtype, w.size(0), w.size(1));
}

inline Call describe_adjoint(const Tensor& g, const OptTensor& rows, const OptTensor& cols,
                             const OptTensor& z_out, const OptTensor& z_in, int64_t O, int64_t I,
                             std::optional<ScalarType> dtype) {
  const char* op = "fold_pack_adjoint";
  require(g.dim() == 2, op, ": g must have 2 dimensions, got ", g.dim());
  require(O >= 0 && I >= 0, op, ": O and I must not be negative, got ", O, " and ", I);
  const Call call = describe(op, "g", g, rows, cols, z_out, z_in, dtype, O, I);
  const int64_t kept_rows = call.row_major ? call.kept_lines : call.kept_lanes;
  const int64_t kept_cols = call.row_major ? call.kept_lanes : call.kept_lines;
  require(g.size(0) == kept_rows && g.size(1) == kept_cols, op, ": g must be ", kept_rows, " x ",
          kept_cols, ", got ", g.size(0), " x ", g.size(1));
  return call;
}

// `lines` lines of `lanes`, without padding, seen as rows and columns again.
inline Tensor allocate(const Call& call, const Tensor& like, int64_t lines, int64_t lanes,
                       ScalarType dtype) {
  Tensor buffer = torch::stable::new_empty(like, {lines, lanes}, dtype);
  return call.row_major ? buffer : torch::stable::transpose(buffer, 0, 1);
}

}  // namespace gatepack
