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
// Gates are counted per kept row and column. With LoRA factors a [r, I] and b [O, r], each element
// of w is first replaced by
//
//      w[i, j] + s·(((b[i, 0]·a[0, j] + b[i, 1]·a[1, j]) + b[i, 2]·a[2, j]) + ...)
//
// Everything is taken in fp32 (fp64 when w is fp64), in exactly this order, each operation rounded
// by itself (the build turns contraction to FMA off), and the result is rounded once: every backend
// writes the same bytes. Only the payload of a NaN is left open.
//
// Padding follows the last kept row and column with zeros, up to a multiple:
//
//      row_multiple = 2, col_multiple = 4        b  e  0  0
//                                                l  o  0  0
//                                                q  t  0  0
//                                                0  0  0  0
//
// e4m3: row i has one fp32 scale, its largest magnitude / 448 (1 for a row of zeros), and holds
// value / scale, rounded to nearest even.
//
// A matrix with unit stride in one dimension is a stack of lines; a line is a run of lanes:
//
//      row-major      line = row       lane = column     first factor: z_out, per line
//      column-major   line = column    lane = row        first factor: z_out, per lane
//
// Kernels know lines and lanes only. The result has the majorness of its input unless another order
// is asked for ("crossed"): then lines and lanes change places in memory, not in meaning.
#pragma once

#include "values.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace gatepack {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using OptTensors = std::vector<OptTensor>;
using Ints = std::vector<int64_t>;

struct Index {
  const void* data = nullptr;  // null: every line or lane is kept
  bool wide = false;           // int64, else int32
};

struct Gate {
  const void* data = nullptr;  // null: all ones
  bool wide = false;           // fp64, else fp32
};

// One side of a low-rank update: element (unit, k) at unit * unit_stride + k * rank_stride.
struct Factor {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t unit_stride = 0, rank_stride = 0;
};

struct Call {
  bool row_major;
  int64_t lines, lanes;            // of the full matrix
  int64_t kept_lines, kept_lanes;  // of the compact one
  int64_t stride;                  // elements from one line of the input to the next
  Index line_index, lane_index;
  Gate line_gate, lane_gate;
  bool lane_first;  // lane_gate is z_out: multiply by it before line_gate
  // Packing only:
  int64_t out_lines, out_lanes;  // kept ones with padding
  bool crossed;                  // the result has the other majorness
  int64_t rank;                  // of the update; 0: none
  double lora_scale;
  Factor line_factor, lane_factor;
};

enum Order : int64_t { kKeepOrder = 0, kRowMajor = 1, kColumnMajor = 2 };

// What pack_tensors adds to the arguments of fold_pack.
struct Extras {
  OptTensor lora_a, lora_b;
  double lora_scale = 1;
  int64_t row_multiple = 1, col_multiple = 1, order = kKeepOrder;
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
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

// The op, and the place in its lists: rows of the fourth matrix are "rows[3]". Text is made of it
// only once something is refused: strings for every check would cost a small matrix 0.5 us.
struct Where {
  const char* op;
  int64_t place = -1;  // none

  struct Name {
    const Where& where;
    const char* name;
  };
  Name operator()(const char* name) const { return {*this, name}; }
};

inline std::ostream& operator<<(std::ostream& text, const Where::Name& of) {
  text << of.where.op << ": " << of.name;
  return of.where.place < 0 ? text : text << '[' << of.where.place << ']';
}

inline void require_device(const Where& where, const char* name, const Tensor& v,
                           const Tensor& like) {
  require(v.is_cuda() == like.is_cuda() && v.get_device_index() == like.get_device_index(),
          where(name), " must be on the device of the matrix");
}

inline void require_vector(const Where& where, const char* name, const Tensor& v,
                           const Tensor& like) {
  require(v.dim() == 1, where(name), " must have 1 dimension, got ", v.dim());
  require(v.numel() < 2 || v.stride(0) == 1, where(name), " must have stride 1, got ", v.stride(0));
  require_device(where, name, v, like);
}

inline Index read_index(const Where& where, const char* name, const OptTensor& index,
                        const Tensor& like) {
  if (!index) return {};
  require_vector(where, name, *index, like);
  const ScalarType t = index->scalar_type();
  require(t == ScalarType::Long || t == ScalarType::Int, where(name),
          " must be int64 or int32, got ", dtype_name(t));
  // An empty tensor may own no memory, and a null pointer means "all".
  static const int64_t nothing = 0;
  return {index->numel() ? index->data_ptr() : &nothing, t == ScalarType::Long};
}

inline Gate read_gate(const Where& where, const char* name, const OptTensor& gate,
                      const Tensor& like, int64_t kept) {
  if (!gate) return {};
  require_vector(where, name, *gate, like);
  const ScalarType t = gate->scalar_type();
  const bool wide = like.scalar_type() == ScalarType::Double;
  require(t == ScalarType::Float || (wide && t == ScalarType::Double), where(name),
          " must be float32", wide ? " or float64" : "", ", got ", dtype_name(t));
  require(gate->numel() == kept, where(name), " must have one value per kept unit (", kept,
          "), got ", gate->numel());
  return {gate->data_ptr(), t == ScalarType::Double};
}

inline Factor read_factor(const Where& where, const char* name, const Tensor& factor,
                          const Tensor& like, int64_t m, int64_t n, int unit_dim) {
  require(factor.dim() == 2 && factor.size(0) == m && factor.size(1) == n, where(name), " must be ",
          m, " x ", n, ", got ", factor.dim() == 2 ? factor.size(0) : -1, " x ",
          factor.dim() == 2 ? factor.size(1) : -1);
  require(is_supported(factor.scalar_type()), where(name),
          " must be float32, float64, float16 or bfloat16, got ",
          dtype_name(factor.scalar_type()));
  require_device(where, name, factor, like);
  return {factor.numel() ? factor.data_ptr() : nullptr, factor.scalar_type(),
          factor.stride(unit_dim), factor.stride(1 - unit_dim)};
}

inline int64_t rounded_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Checks everything that can be known without reading an index, and turns rows and columns into
// lines and lanes. `matrix` is the full one [O, I] or, for the adjoint, the compact one [|R|, |C|].
inline Call describe(const Where& where, const char* name, const Tensor& matrix,
                     const OptTensor& rows, const OptTensor& cols, const OptTensor& z_out,
                     const OptTensor& z_in, int64_t full_rows, int64_t full_cols,
                     const Extras& extras = {}) {
  require(full_rows <= std::numeric_limits<int32_t>::max() &&
              full_cols <= std::numeric_limits<int32_t>::max(),
          where(name), " must have fewer than 2^31 rows and columns, got ", full_rows, " x ",
          full_cols);
  const int64_t m = matrix.size(0), n = matrix.size(1);
  const bool row_major = matrix.stride(1) == 1 || n <= 1;
  require(row_major || matrix.stride(0) == 1 || m <= 1, where(name),
          " must have stride 1 in one dimension, got strides ", matrix.stride(0), " and ",
          matrix.stride(1));

  const Index r = read_index(where, "rows", rows, matrix);
  const Index c = read_index(where, "cols", cols, matrix);
  const int64_t kept_rows = rows ? rows->numel() : full_rows;
  const int64_t kept_cols = cols ? cols->numel() : full_cols;
  const Gate out = read_gate(where, "z_out", z_out, matrix, kept_rows);
  const Gate in = read_gate(where, "z_in", z_in, matrix, kept_cols);

  require(extras.row_multiple >= 1 && extras.col_multiple >= 1, where("row_multiple"),
          " and col_multiple must be at least 1, got ", extras.row_multiple, " and ",
          extras.col_multiple);
  require(extras.order >= kKeepOrder && extras.order <= kColumnMajor, where("order"),
          " must be 0, 1 or 2, got ", extras.order);
  require(extras.lora_a.has_value() == extras.lora_b.has_value(), where("lora_a"),
          " and lora_b must come together");
  Factor a, b;
  int64_t rank = 0;
  if (extras.lora_a) {
    rank = extras.lora_a->dim() == 2 ? extras.lora_a->size(0) : 0;
    a = read_factor(where, "lora_a", *extras.lora_a, matrix, rank, full_cols, 1);
    b = read_factor(where, "lora_b", *extras.lora_b, matrix, full_rows, rank, 0);
  }
  const int64_t out_rows = rounded_up(kept_rows, extras.row_multiple);
  const int64_t out_cols = rounded_up(kept_cols, extras.col_multiple);
  const bool crossed =
      extras.order != kKeepOrder && (extras.order == kRowMajor) != row_major;
  if (row_major) {
    return {true,     full_rows, full_cols, kept_rows, kept_cols, matrix.stride(0), r, c, out, in,
            false,    out_rows,  out_cols,  crossed,   rank,      extras.lora_scale, b, a};
  }
  return {false,    full_cols, full_rows, kept_cols, kept_rows, matrix.stride(1), c, r, in, out,
          true,     out_cols,  out_rows,  crossed,   rank,      extras.lora_scale, a, b};
}

inline Call describe_pack(const Where& where, const Tensor& w, const OptTensor& rows,
                          const OptTensor& cols, const OptTensor& z_out, const OptTensor& z_in,
                          std::optional<ScalarType> dtype, bool e4m3 = false,
                          const Extras& extras = {}) {
  require(w.dim() == 2, where("w"), " must have 2 dimensions, got ", w.dim());
  require(is_supported(w.scalar_type()), where("w"),
          " must be float32, float64, float16 or bfloat16, got ", dtype_name(w.scalar_type()));
  require(!dtype || is_supported(*dtype) || (e4m3 && *dtype == ScalarType::Float8_e4m3fn),
          where.op, ": dtype must be float32, float64, float16", e4m3 ? ", bfloat16" : " or bfloat16",
          e4m3 ? " or float8_e4m3fn" : "");
  return describe(where, "w", w, rows, cols, z_out, z_in, w.size(0), w.size(1), extras);
}

inline Call describe_adjoint(const Where& where, const Tensor& g, const OptTensor& rows,
                             const OptTensor& cols, const OptTensor& z_out, const OptTensor& z_in,
                             int64_t O, int64_t I, std::optional<ScalarType> dtype) {
  require(g.dim() == 2, where("g"), " must have 2 dimensions, got ", g.dim());
  const bool e4m3 = g.scalar_type() == ScalarType::Float8_e4m3fn && dtype;
  require(is_supported(g.scalar_type()) || e4m3, where("g"),
          " must be float32, float64, float16 or bfloat16 (or float8_e4m3fn, with a dtype), got ",
          dtype_name(g.scalar_type()));
  require(!dtype || is_supported(*dtype), where.op,
          ": dtype must be float32, float64, float16 or bfloat16");
  require(O >= 0 && I >= 0, where("O"), " and I must not be negative, got ", O, " and ", I);
  const Call call = describe(where, "g", g, rows, cols, z_out, z_in, O, I);
  const int64_t kept_rows = call.row_major ? call.kept_lines : call.kept_lanes;
  const int64_t kept_cols = call.row_major ? call.kept_lanes : call.kept_lines;
  require(g.size(0) == kept_rows && g.size(1) == kept_cols, where("g"), " must be ", kept_rows,
          " x ", kept_cols, ", got ", g.size(0), " x ", g.size(1));
  return call;
}

inline Where at_place(const char* op, size_t i) { return {op, static_cast<int64_t>(i)}; }

// Results that a caller brings, in the order of the matrices; null: memory of their own.
struct Results {
  const Tensors* out = nullptr;
  const Tensors* scales = nullptr;

  OptTensor out_of(size_t i) const { return out ? OptTensor((*out)[i]) : std::nullopt; }
  OptTensor scales_of(size_t i) const {
    return scales && i < scales->size() ? OptTensor((*scales)[i]) : std::nullopt;
  }
};

// `lines` lines of `lanes` seen as rows and columns again, dense, in memory of their own or in
// `given`. Not by way of new_empty: a call of the dispatcher is 1 us, which a small matrix feels.
inline Tensor result(const Where& where, const Call& call, const Tensor& like, int64_t lines,
                     int64_t lanes, ScalarType dtype, const OptTensor& given) {
  const int64_t m = call.row_major ? lines : lanes, n = call.row_major ? lanes : lines;
  const bool by_rows = call.row_major != call.crossed;
  const int64_t sizes[] = {m, n};
  const int64_t strides[] = {by_rows ? std::max<int64_t>(n, 1) : 1,
                             by_rows ? 1 : std::max<int64_t>(m, 1)};
  if (!given) {
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        2, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        device, like.get_device_index(), &handle));
    return Tensor(handle);
  }
  require(given->dim() == 2 && given->size(0) == m && given->size(1) == n, where("out"),
          " must be ", m, " x ", n, ", got ", given->dim() == 2 ? given->size(0) : -1, " x ",
          given->dim() == 2 ? given->size(1) : -1);
  require(given->scalar_type() == dtype, where("out"), " must be ", dtype_name(dtype), ", got ",
          dtype_name(given->scalar_type()));
  const auto fits = [&](int d) {
    return given->stride(d) == strides[d] || sizes[d] <= 1 || m == 0 || n == 0;
  };
  require(fits(0) && fits(1), where("out"), " must have strides ", strides[0], " and ", strides[1],
          ", got ", given->stride(0), " and ", given->stride(1));
  require_device(where, "out", *given, like);
  return *given;
}

// The scales of e4m3, one for each row of a result.
inline Tensor result_scales(const Where& where, const Call& call, const Tensor& like,
                            const OptTensor& given) {
  const int64_t rows = call.row_major ? call.out_lines : call.out_lanes;
  if (!given) return torch::stable::new_empty(like, {rows}, ScalarType::Float);
  require_vector(where, "scales", *given, like);
  require(given->scalar_type() == ScalarType::Float && given->numel() == rows, where("scales"),
          " must be float32 with one value per row (", rows, "), got ", given->numel(), " of ",
          dtype_name(given->scalar_type()));
  return *given;
}

// That the lists of results are complete, and that no result shares memory with another tensor.
inline void require_results(const char* op, const Tensors& in, const Results& results, bool e4m3) {
  const auto check = [&](const char* name, size_t got, size_t want) {
    require(got == want, op, ": ", name, " must have one entry per matrix (", want, "), got ", got);
  };
  check("out", results.out->size(), in.size());
  if (results.scales) check("scales", results.scales->size(), e4m3 ? in.size() : 0);
  struct Range {
    uintptr_t begin, end;
    bool written;
  };
  std::vector<Range> ranges;
  const auto add = [&](const Tensors& tensors, bool written) {
    for (const Tensor& t : tensors) {
      if (t.numel() == 0) continue;
      int64_t last = 0;
      for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
      const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
      ranges.push_back({begin, begin + (last + 1) * t.element_size(), written});
    }
  };
  add(in, false);
  add(*results.out, true);
  if (results.scales) add(*results.scales, true);
  std::sort(ranges.begin(), ranges.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  uintptr_t any = 0, written = 0;  // ends of what lies before
  for (const Range& range : ranges) {
    require(range.begin >= (range.written ? any : written), op,
            ": out must share no memory with the matrices or with itself");
    any = std::max(any, range.end);
    if (range.written) written = std::max(written, range.end);
  }
}

}  // namespace gatepack
