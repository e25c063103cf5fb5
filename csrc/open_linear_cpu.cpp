// open_linear and its gradients on the CPU.
#include "open_linear.h"

#include "fold_pack_cover.h"
#include "fold_pack_cpu.h"
#include "passes.h"

#include <algorithm>

namespace gatepack {
namespace {

constexpr int64_t kValues = 1 << 13;  // activations for one piece of work
constexpr int64_t kPanel = 24;        // rows of w that stay in the caches for all tokens
constexpr int64_t kColumns = 3 * kLanes;
constexpr int64_t kStretch = 64;      // rows of w for all tokens, then the next ones
constexpr int64_t kAhead = 4;         // rows of w that are asked for before their turn

// The open rows of a weight.
template <class T>
struct Rows {
  const T* w;
  int64_t stride, k;
  const int64_t* open;  // null: all
  int64_t n;

  // The last one again past the end.
  GATEPACK_INLINE const T* at(int64_t i) const {
    i = std::min(i, n - 1);
    return w + (open ? open[i] : i) * stride;
  }
};

template <class T>
struct Dots {
  Rows<T> rows;
  const float* x;  // [tokens, k]
  int64_t tokens;
  const T* bias;   // of all rows, or null
  const float* z;  // [n], or null for 1
  T* y;            // [tokens, n]
};

// Rows i .. i + R - 1, of which those before `end` are written, for N tokens from t on.
template <class T, int kBytes, int R, int N>
GATEPACK_INLINE void dot_tile(const Dots<T>& job, int64_t i, int64_t end, int64_t t) {
  const T *row[R], *next[R];
  const float* x[N];
  for (int r = 0; r < R; ++r) row[r] = job.rows.at(i + r), next[r] = job.rows.at(i + R + r);
  for (int j = 0; j < N; ++j) x[j] = job.x + std::min(t + j, job.tokens - 1) * job.rows.k;
  Lanes<kBytes> sums[R][N] = {};
  int64_t k = 0;
  for (; k + kLanes <= job.rows.k; k += kLanes) {
    Lanes<kBytes> weight[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      load(weight[r], row[r] + k);
      // The hardware's prefetch ends with each page; this one asks for the rows that come next.
      if (t == 0) __builtin_prefetch(next[r] + k);
    }
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      Lanes<kBytes> in;
      load(in, x[j] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][j].add_product(in, weight[r]);
    }
  }
  if (k < job.rows.k) {
    const int64_t count = job.rows.k - k;
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      Lanes<kBytes> in, weight;
      load(in, x[j] + k, count);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        load(weight, row[r] + k, count);
        sums[r][j].add_product(in, weight);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (i + r >= end) break;
    const int64_t n = job.rows.open ? job.rows.open[i + r] : i + r;
    const float bias = job.bias ? widen(job.bias[n]) : 0.0f;
    const float z = job.z ? job.z[i + r] : 1.0f;
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      if (t + j >= job.tokens) break;
      narrow((sums[r][j].total() + bias) * z, job.y[(t + j) * job.rows.n + i + r]);
    }
  }
}

template <class T, int kBytes, int R, int N>
GATEPACK_INLINE void dot_tiles(const Dots<T>& job, int64_t begin, int64_t end, int64_t& t) {
  for (int64_t i = begin; i < end; i += R) dot_tile<T, kBytes, R, N>(job, i, end, t);
  t += N;
}

template <class T, int kBytes>
GATEPACK_INLINE void dots(const Dots<T>& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kPanel) {
    const int64_t last = std::min(i + kPanel, end);
    for (int64_t t = 0, left; (left = job.tokens - t) > 0;) {
      if constexpr (Lanes<kBytes>::kWide) {
        if (left > 8 || left == 6 || left == 5) dot_tiles<T, kBytes, 4, 6>(job, i, last, t);
        else if (left > 2) dot_tiles<T, kBytes, 6, 4>(job, i, last, t);
        else if (left > 1) dot_tiles<T, kBytes, 8, 2>(job, i, last, t);
        else dot_tiles<T, kBytes, 8, 1>(job, i, last, t);
      } else {
        if (left > 1) dot_tiles<T, kBytes, 2, 2>(job, i, last, t);
        else dot_tiles<T, kBytes, 4, 1>(job, i, last, t);
      }
    }
  }
}

template <class T>
struct Sums {
  Rows<T> rows;
  const float* dy;  // [tokens, n], times z
  int64_t tokens;
  float* dx;  // [tokens, k]
};

// A part of the columns, of the rows and of the tokens of a job.
struct Part {
  int64_t k, columns, i, end, t;
};

// V vectors from column k on (the last one may be cut off) for N tokens from t on.
template <class T, int kBytes, int N, int V>
GATEPACK_INLINE void sum_tile(const Sums<T>& job, const Part& part, int64_t k) {
  const int64_t count = std::min<int64_t>(kLanes, part.k + part.columns - k);
  const float* dy[N];
  float* dx[N];
  Lanes<kBytes> sums[N][V] = {};
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    const int64_t t = std::min(part.t + j, job.tokens - 1);
    dy[j] = job.dy + t * job.rows.n;
    dx[j] = job.dx + t * job.rows.k + k;
    if (part.i == 0) continue;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (V == 1) load(sums[j][v], dx[j], count);
      else load(sums[j][v], dx[j] + v * kLanes);
    }
  }
  for (int64_t i = part.i; i < part.end; ++i) {
    const T* const row = job.rows.at(i) + k;
    Lanes<kBytes> weight[V];
    if (part.t == 0) {
      const T* const ahead = job.rows.at(i + kAhead) + k;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) __builtin_prefetch(ahead + v * kLanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (V == 1) load(weight[v], row, count);
      else load(weight[v], row + v * kLanes);
    }
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const float g = dy[j][i];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[j][v].add_product(weight[v], g);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (V == 1) store(dx[j], sums[j][v], count);
      else store(dx[j] + v * kLanes, sums[j][v]);
    }
  }
}

template <class T, int kBytes, int N, int V>
GATEPACK_INLINE void sum_tiles(const Sums<T>& job, const Part& part) {
  int64_t k = part.k;
  const int64_t end = k + part.columns;
  for (; k + V * kLanes <= end; k += V * kLanes) sum_tile<T, kBytes, N, V>(job, part, k);
  for (; k < end; k += kLanes) sum_tile<T, kBytes, N, 1>(job, part, k);
}

// Columns begin .. end - 1 of dx.
template <class T, int kBytes>
GATEPACK_INLINE void column_sums(const Sums<T>& job, int64_t begin, int64_t end) {
  constexpr bool wide = Lanes<kBytes>::kWide;
  constexpr int64_t V = wide ? 6 : 3, N = wide ? 4 : 2;
  const int64_t run = job.tokens > N ? kStretch : job.rows.n;
  for (int64_t k = begin; k < end; k += V * kLanes) {
    const int64_t columns = std::min(V * kLanes, end - k);
    for (int64_t i = 0; i < job.rows.n; i += run) {
      for (int64_t t = 0, left; (left = job.tokens - t) > 0;) {
        const Part part{k, columns, i, std::min(i + run, job.rows.n), t};
        if (wide && left > 2) sum_tiles<T, kBytes, N, V>(job, part), t += N;
        else if (left > 1) sum_tiles<T, kBytes, 2, V>(job, part), t += 2;
        else sum_tiles<T, kBytes, 1, V>(job, part), t += 1;
      }
    }
  }
}

GATEPACK_COMPILE(run_dots, dots)
GATEPACK_COMPILE(run_sums, column_sums)

// Whether w is float32, else bfloat16.
bool require_weight(const char* op, const Tensor& w) {
  const bool wide = require_float_or_bf16(op, "w", w);
  require(w.dim() == 2 && (w.size(1) < 2 || w.stride(1) == 1), op,
          ": w must be a matrix with stride 1 along its rows");
  require(!w.is_cuda(), op, ": w must be on the CPU");
  return wide;
}

void require_matrix(const char* op, const char* name, const Tensor& x, const Tensor& w,
                    int64_t columns) {
  require_dense(op, name, x, w);
  require(x.dim() == 2 && x.size(1) == columns, op, ": ", name, " must be [T, ", columns, "]");
}

void require_bias(const char* op, const Tensor& bias, const Tensor& w) {
  require_dense(op, "bias", bias, w);
  require(bias.dim() == 1 && bias.size(0) == w.size(0), op, ": bias must have ", w.size(0),
          " values");
}

// The open lanes of one side of a weight, and what multiplies them.
class Side {
 public:
  Side(const Where& where, const char* name, const OptTensor& index, const char* gate_name,
       const OptTensor& gate, int64_t lanes, int64_t bound, const Tensor& w)
      : n_(index ? index->numel() : bound),
        lanes_(lanes),
        index_(where, name, read_index(where, name, index, w), n_, bound, true) {
    require(lanes >= 1 && n_ % lanes == 0, where(gate_name),
            " must have a whole number of lanes for each value, got ", lanes, " of ", n_);
    if (!gate) return;
    read_gate(where, gate_name, gate, w, n_ / lanes);
    units_ = data<float>(*gate);
    if (lanes == 1) return;
    for (int64_t i = 0; i < n_; ++i) spread_.push_back(units_[i / lanes]);
  }

  int64_t size() const { return n_; }
  const int64_t* open() const { return index_.data(); }  // null: all
  // One value for each lane, null: 1.
  const float* z() const { return spread_.empty() ? units_ : spread_.data(); }

  // dz of the units from colsum(y * dy) or colsum(x * dx) of their lanes: over z, 0 where z is 0.
  Tensor gradient(const Tensor& a, const Tensor& b) const {
    const Tensor products = column_products_cpu(a, b);
    Tensor dz = torch::stable::new_empty(products, {n_ / lanes_});
    const float* lane = data<float>(products);
    float* const out = static_cast<float*>(dz.mutable_data_ptr());
    for (int64_t unit = 0; unit < n_ / lanes_; ++unit) {
      float sum = 0.0f;
      for (int64_t i = 0; i < lanes_; ++i) sum += *lane++;
      out[unit] = units_[unit] > 0.0f ? sum / units_[unit] : 0.0f;
    }
    return dz;
  }

 private:
  int64_t n_, lanes_;
  Units index_;
  const float* units_ = nullptr;
  std::vector<float> spread_;
};

template <class T>
Rows<T> rows_of(const Tensor& w, const Side& out) {
  return {data<T>(w), w.stride(0), w.size(1), out.open(), out.size()};
}

template <class Function>
void parallel(int64_t n, int64_t values_each, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kValues / std::max<int64_t>(1, values_each));
  torch::stable::parallel_for(0, n, grain, function);
}

template <class T>
void multiply(const Dots<T>& job) {
  const char* const level = simd_level();
  const int64_t bytes = std::max<int64_t>(1, job.rows.k * sizeof(T));
  const int64_t grain = rounded_up(std::max<int64_t>(1, kGrain / bytes), 8);
  torch::stable::parallel_for(0, job.rows.n, grain, [&](int64_t begin, int64_t end) {
    run_dots<T>(level, job, begin, end);
  });
}

// x [tokens, n] as fp32 [tokens, k], times z, its columns at those of `open`, 0 at the others.
template <class T>
void spread_columns(const T* x, const int64_t* open, const float* z, int64_t n, int64_t tokens,
                    int64_t k, float* out) {
  parallel(tokens, k, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* const from = x + t * n;
      float* const to = out + t * k;
      if (open) std::fill(to, to + k, 0.0f);
      for (int64_t c = 0; c < n; ++c) {
        to[open ? open[c] : c] = z ? widen(from[c]) * z[c] : widen(from[c]);
      }
    }
  });
}

// The adjoint: dx = z * full at open columns.
template <class T>
void take_columns(const float* full, const Side& in, int64_t tokens, int64_t k, T* dx) {
  const int64_t* const open = in.open();
  const float* const z = in.z();
  const int64_t n = in.size();
  parallel(tokens, n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* const from = full + t * k;
      T* const to = dx + t * n;
      for (int64_t c = 0; c < n; ++c) {
        const float value = from[open ? open[c] : c];
        narrow(z ? value * z[c] : value, to[c]);
      }
    }
  });
}

template <class T>
Tensor forward(const Tensor& x, const Tensor& w, const OptTensor& bias, const Side& out,
               const Side& in) {
  const int64_t tokens = x.size(0), k = w.size(1);
  Tensor y = torch::stable::new_empty(x, {tokens, out.size()});
  if (!y.numel()) return y;
  Tensor full = x;
  if (in.open() || in.z() || !std::is_same_v<T, float>) {
    full = torch::stable::new_empty(x, {tokens, k}, ScalarType::Float);
    float* const to = static_cast<float*>(full.mutable_data_ptr());
    spread_columns(data<T>(x), in.open(), in.z(), in.size(), tokens, k, to);
  }
  multiply<T>({rows_of<T>(w, out), data<float>(full), tokens, bias ? data<T>(*bias) : nullptr,
               out.z(), static_cast<T*>(y.mutable_data_ptr())});
  return y;
}

template <class T>
void add_up(const Sums<T>& job) {
  const char* const level = simd_level();
  const int64_t bytes = std::max<int64_t>(1, job.rows.n * kColumns * sizeof(T));
  const int64_t grain = std::max<int64_t>(1, kGrain / bytes);
  const int64_t steps = (job.rows.k + kColumns - 1) / kColumns;
  torch::stable::parallel_for(0, steps, grain, [&](int64_t begin, int64_t end) {
    run_sums<T>(level, job, begin * kColumns, std::min(end * kColumns, job.rows.k));
  });
}

template <class T>
Tensor backward(const Tensor& dy, const Tensor& w, const Side& out, const Side& in) {
  const int64_t tokens = dy.size(0), k = w.size(1);
  Tensor dx = torch::stable::new_empty(dy, {tokens, in.size()});
  if (!dx.numel() || !dy.numel()) return torch::stable::fill_(dx, 0.0);
  Tensor scaled = dy;
  if (out.z() || !std::is_same_v<T, float>) {
    scaled = torch::stable::new_empty(dy, {tokens, out.size()}, ScalarType::Float);
    float* const to = static_cast<float*>(scaled.mutable_data_ptr());
    spread_columns(data<T>(dy), nullptr, out.z(), out.size(), tokens, out.size(), to);
  }
  const bool direct = !in.open() && !in.z() && std::is_same_v<T, float>;
  Tensor full =
      direct ? dx : torch::stable::new_empty(dy, {tokens, k}, ScalarType::Float);
  float* const sums = static_cast<float*>(full.mutable_data_ptr());
  add_up<T>({rows_of<T>(w, out), data<float>(scaled), tokens, sums});
  if (!direct) take_columns(sums, in, tokens, k, static_cast<T*>(dx.mutable_data_ptr()));
  return dx;
}

}  // namespace

Tensor open_linear_cpu(const Tensor& x, const Tensor& w, const OptTensor& bias,
                       const OptTensor& rows, const OptTensor& cols, const OptTensor& z_out,
                       const OptTensor& z_in, int64_t out_lanes, int64_t in_lanes) {
  const char* const op = "open_linear";
  const bool wide = require_weight(op, w);
  const Side out({op}, "rows", rows, "z_out", z_out, out_lanes, w.size(0), w);
  const Side in({op}, "cols", cols, "z_in", z_in, in_lanes, w.size(1), w);
  require_matrix(op, "x", x, w, in.size());
  if (bias) require_bias(op, *bias, w);
  return wide ? forward<float>(x, w, bias, out, in) : forward<bf16>(x, w, bias, out, in);
}

std::tuple<Tensor, Tensor, Tensor> open_linear_backward_cpu(
    const Tensor& dy, const OptTensor& x, const OptTensor& y, const Tensor& w,
    const OptTensor& rows, const OptTensor& cols, const OptTensor& z_out, const OptTensor& z_in,
    int64_t out_lanes, int64_t in_lanes) {
  const char* const op = "open_linear_backward";
  const bool wide = require_weight(op, w);
  const Side out({op}, "rows", rows, "z_out", z_out, out_lanes, w.size(0), w);
  const Side in({op}, "cols", cols, "z_in", z_in, in_lanes, w.size(1), w);
  require_matrix(op, "dy", dy, w, out.size());
  require(!x || z_in, op, ": x must be None where z_in is");
  require(!y || z_out, op, ": y must be None where z_out is");
  if (x) require_matrix(op, "x", *x, w, in.size());
  if (y) require_matrix(op, "y", *y, w, out.size());
  require((!x || x->size(0) == dy.size(0)) && (!y || y->size(0) == dy.size(0)), op,
          ": x and y must have as many tokens as dy");
  Tensor dx = wide ? backward<float>(dy, w, out, in) : backward<bf16>(dy, w, out, in);
  const auto none = [&] { return torch::stable::new_empty(dy, {0}, ScalarType::Float); };
  return {dx, y ? out.gradient(dy, *y) : none(), x ? in.gradient(*x, dx) : none()};
}

}  // namespace gatepack
