// fold_pack, its adjoint and their multi-tensor forms on the CPU: one pass over every matrix,
// threaded by torch's own pool across all of them.
#include "fold_pack_cpu.h"

#include "fold_pack_cover.h"
#include "fold_pack_vec.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gatepack {
namespace {

constexpr int64_t kGrain = 32 << 10;  // elements for each thread, as in torch
// For each thread. Below this it takes one piece, always the same one: what it wrote last is still
// in its core's caches.
constexpr int64_t kCachedBytes = 2 << 20;
// What is streamed passes through the L1 cache in pieces; small results gain nothing.
constexpr int64_t kStagedBytes = 16 << 10;
constexpr int64_t kLeastStreamed = 256 << 10;

// What is larger than the last cache is not in it when it is read next. Written past the caches, it
// need not be fetched first: rows of 40 MB took 0.85 ms against 1.5 ms, but rows of 20 MB 0.37 ms
// against 0.33 ms (AMD EPYC with 32 MB of cache, 2 threads, memory in use).
constexpr int64_t kStreamedBytes = 32 << 20;

std::vector<const Isa*> supported_isas() {
  std::vector<const Isa*> isas = {&scalar::kIsa};
#if GATEPACK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    isas.push_back(&avx2::kIsa);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      isas.push_back(&avx512::kIsa);
    }
  }
#endif
  return isas;
}

std::atomic<const Isa*>& current_isa() {
  static std::atomic<const Isa*> isa{supported_isas().back()};
  return isa;
}

template <class T>
void copy_gate(Gate gate, int64_t n, T* out) {
  if (!gate.data) std::fill_n(out, n, T(1));
  else if (gate.wide) std::copy_n(static_cast<const double*>(gate.data), n, out);
  else std::copy_n(static_cast<const float*>(gate.data), n, out);
}

// Gates in the compute type, with padding so that a full vector can be read at the last of them.
std::vector<CacheLine> padded_gate(Gate gate, int64_t n, bool fp64) {
  constexpr int64_t kPadding = 16;
  auto out = cache_lines((n + kPadding) * (fp64 ? sizeof(double) : sizeof(float)));
  if (fp64) copy_gate(gate, n, reinterpret_cast<double*>(out.data()));
  else copy_gate(gate, n, reinterpret_cast<float*>(out.data()));
  return out;
}

#if defined(__linux__)
// Fresh memory arrives page by page, and at 4 KiB the faults cost three times the copy (4096 x
// 14336 fp32, 60 % of the rows: 98 ms against 24 ms; benchmarks/bench_fold_pack.py). Huge pages are
// zeroed by the kernel before they are written, a second pass that only memory in use escapes.
// Below two of them nothing is asked: memory of that size is often in use, and asking takes 3 us.
void prefer_huge_pages(const void* out, int64_t bytes) {
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out);
  const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (begin + bytes) & ~(kHuge - 1);
  // Refusal is harmless: the kernel may be built without transparent huge pages.
  if (last < first + 2 * kHuge) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
#else
void prefer_huge_pages(const void*, int64_t) {}
#endif

template <class T>
T read_factor_at(const Factor& factor, int64_t unit, int64_t k) {
  const int64_t at = unit * factor.unit_stride + k * factor.rank_stride;
  switch (factor.type) {
    case ScalarType::Float: return static_cast<T>(static_cast<const float*>(factor.data)[at]);
    case ScalarType::Double: return static_cast<T>(static_cast<const double*>(factor.data)[at]);
    case ScalarType::Half: return widen(static_cast<const f16*>(factor.data)[at]);
    default: return widen(static_cast<const bf16*>(factor.data)[at]);
  }
}

// One side of the update for the kept units, element (i, k) at i * unit_stride + k * rank_stride.
template <class T>
void copy_factor(const Factor& factor, const Units& kept, int64_t rank, int64_t unit_stride,
                 int64_t rank_stride, T* out) {
  for (int64_t i = 0; i < kept.size(); ++i) {
    for (int64_t k = 0; k < rank; ++k) {
      out[i * unit_stride + k * rank_stride] = read_factor_at<T>(factor, kept[i], k);
    }
  }
}

std::vector<CacheLine> compact_factor(const Factor& factor, const Units& kept, int64_t rank,
                                      int64_t unit_stride, int64_t rank_stride, bool fp64) {
  auto out = cache_lines((kept.size() + 16) * rank * (fp64 ? sizeof(double) : sizeof(float)));
  if (fp64) {
    copy_factor(factor, kept, rank, unit_stride, rank_stride,
                reinterpret_cast<double*>(out.data()));
  } else {
    copy_factor(factor, kept, rank, unit_stride, rank_stride, reinterpret_cast<float*>(out.data()));
  }
  return out;
}

// One matrix of a call: everything its kernel needs. Making one checks its indices and writes
// nothing; a list of matrices is made whole before the first byte of it is written.
class Work {
 public:
  Work(const Where& where, bool adjoint, const Call& call, const Tensor& in,
       std::optional<ScalarType> dtype, const OptTensor& out_given = {},
       const OptTensor& scales_given = {}, bool streams = false)
      : call_(call),
        in_(in),
        adjoint_(adjoint),
        in_type_(in.scalar_type()),
        out_type_(dtype.value_or(in_type_)),
        streams_(streams),
        fresh_(!out_given),
        lines_(where, call.row_major ? "rows" : "cols", call.line_index, call.kept_lines,
               call.lines, fresh_),
        lanes_(where, call.row_major ? "cols" : "rows", call.lane_index, call.kept_lanes,
               call.lanes, fresh_),
        out(result(where, call, in, adjoint ? call.lines : call.out_lines,
                   adjoint ? call.lanes : call.out_lanes, out_type_, out_given)) {
    if (out_type_ == ScalarType::Float8_e4m3fn) {
      scales = result_scales(where, call, in, scales_given);
    }
  }

  int64_t bytes() const { return out.numel() * static_cast<int64_t>(out.element_size()); }

  // Everything that is small; run() fills the lines of the result. total: bytes of all results.
  void prepare(int64_t total) {
    const int64_t out_lines = adjoint_ ? call_.lines : call_.out_lines;
    const int64_t out_lanes = adjoint_ ? call_.lanes : call_.out_lanes;
    const bool e4m3 = out_type_ == ScalarType::Float8_e4m3fn;
    units = out_lanes == 0 ? 0 : out_lines;
    unit_bytes = out_lanes * static_cast<int64_t>(out.element_size());
    if (units == 0) {
      if (e4m3) std::fill_n(static_cast<float*>(scales->mutable_data_ptr()), scales->numel(), 1.0f);
      return;
    }
    if (fresh_) prefer_huge_pages(out.const_data_ptr(), bytes());
    if (units * unit_bytes < kLeastStreamed || torch::stable::get_num_threads() == 1) {
      streams_ = false;
    }

    const bool fp64 = in_type_ == ScalarType::Double;
    // An index that keeps every lane costs no more than none.
    const bool some_closed = call_.lane_index.data && call_.kept_lanes < call_.lanes;
    const size_t moved_size = adjoint_ ? out.element_size() : in_.element_size();
    const Isa* isa = current_isa();
    if (some_closed && call_.lanes < isa->geometry(moved_size).span) isa = &scalar::kIsa;
    if (some_closed) cover_.emplace(lanes_, call_.lanes, isa->geometry(moved_size), adjoint_);

    const bool gated = call_.line_gate.data || call_.lane_gate.data;
    const bool staged = !adjoint_ && (e4m3 || call_.crossed || call_.rank > 0);
    const bool move_only = !staged && !gated && in_type_ == out_type_;
    if (!move_only) {
      line_gate_ = padded_gate(call_.line_gate, call_.kept_lines, fp64);
      lane_gate_ = padded_gate(call_.lane_gate, call_.kept_lanes, fp64);
    }
    const int64_t pitch = call_.kept_lanes + 16;  // a full vector can be read at the last lane
    if (call_.rank > 0) {
      line_factor_ = compact_factor(call_.line_factor, lines_, call_.rank, call_.rank, 1, fp64);
      lane_factor_ = compact_factor(call_.lane_factor, lanes_, call_.rank, 1, pitch, fp64);
    }
    if (adjoint_ && lines_.data()) {
      inverse_.assign(call_.lines, -1);
      for (int64_t i = 0; i < call_.kept_lines; ++i) inverse_[lines_[i]] = i;
    }
    job_ = {in_.const_data_ptr(),
            out.mutable_data_ptr(),
            call_.stride,
            call_.crossed ? out_lines : out_lanes,
            call_.lanes,
            call_.kept_lanes,
            call_.kept_lines,
            out_lanes,
            inverse_.empty() ? lines_.data() : inverse_.data(),
            cover_ ? cover_->blocks().data() : nullptr,
            cover_ ? cover_->blocks().data() + cover_->blocks().size() : nullptr,
            cover_ ? cover_->patterns() : nullptr,
            line_gate_.data(),
            lane_gate_.data(),
            call_.lane_first,
            total > kStreamedBytes,
            staged ? isa->choose_stage(in_type_) : nullptr,
            call_.crossed,
            call_.rank,
            pitch,
            call_.lora_scale,
            line_factor_.data(),
            lane_factor_.data(),
            nullptr,
            nullptr};
    kernel_ = staged ? isa->choose_staged(in_type_, out_type_)
                     : isa->choose(adjoint_, move_only, in_type_, out_type_);
    if (e4m3 && call_.row_major) {
      job_.line_scales = static_cast<float*>(scales->mutable_data_ptr());
    } else if (e4m3) {
      measure_lanes(isa, fp64);
    }
  }

  void run(int64_t begin, int64_t end) const {
    if (!streams_) return kernel_(job_, begin, end);
    const int64_t most = std::max<int64_t>(1, kStagedBytes / unit_bytes);
    auto staged = cache_lines(std::min(most, end - begin) * unit_bytes);
    char* const result = static_cast<char*>(job_.dst);
    Job job = job_;
    job.past_caches = false;
    for (int64_t i = begin; i < end; i += most) {
      const int64_t last = std::min(i + most, end);
      const uintptr_t start = reinterpret_cast<uintptr_t>(staged.data());
      job.dst = reinterpret_cast<void*>(start - i * unit_bytes);  // line i goes to dst + i lines
      kernel_(job, i, last);
      stream(result + i * unit_bytes, staged.data()->bytes, (last - i) * unit_bytes);
    }
    end_of_stream();
  }

  // Lines of a piece, of which there are at most 16 for each thread, and one where all is small:
  // whole cache lines across where lines become columns, and whole groups of gather_lines.
  int64_t step(int64_t total, int64_t threads) const {
    const int64_t pieces = total > threads * kCachedBytes ? 16 * threads : threads;
    const int64_t lines = (total / pieces + unit_bytes) / std::max<int64_t>(1, unit_bytes);
    return rounded_up(std::max<int64_t>(1, lines), call_.crossed ? 64 : 4);
  }

  // Lines of a piece where the matrix is the only one. Lines that cost the same need no sharing:
  // each thread takes one piece, and in the next call finds in its caches what it wrote in this.
  int64_t step_alone(int64_t total, int64_t threads) const {
    if (adjoint_ || cover_ || call_.crossed || job_.past_caches) return step(total, threads);
    return std::max<int64_t>(1, (units + threads - 1) / threads);
  }

 private:
  // e4m3 of a column-major matrix: its rows are lanes, so their scales need a pass of their own.
  void measure_lanes(const Isa* isa, bool fp64) {
    std::vector<uint32_t> largest(call_.out_lanes, 0);
    std::mutex guard;
    const int64_t grain = std::max<int64_t>(1, kGrain / (call_.kept_lanes + 1));
    torch::stable::parallel_for(0, call_.kept_lines, grain, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> mine(call_.out_lanes, 0);
      isa->largest_per_lane(job_, fp64, begin, end, mine.data());
      const std::lock_guard<std::mutex> lock(guard);
      for (size_t j = 0; j < mine.size(); ++j) largest[j] = std::max(largest[j], mine[j]);
    });
    float* const per_lane = static_cast<float*>(scales->mutable_data_ptr());
    std::transform(largest.begin(), largest.end(), per_lane, e4m3_scale);
    job_.lane_scales = per_lane;
  }

  Call call_;
  Tensor in_;
  bool adjoint_;
  ScalarType in_type_, out_type_;
  bool streams_;
  bool fresh_;  // whether this call allocated the result
  Units lines_, lanes_;
  std::vector<int64_t> inverse_;  // adjoint: line -> kept line or -1
  std::optional<Cover> cover_;
  std::vector<CacheLine> line_gate_, lane_gate_, line_factor_, lane_factor_;
  Job job_{};
  Kernel kernel_ = nullptr;

 public:
  Tensor out;
  OptTensor scales;
  int64_t units = 0;       // lines to run
  int64_t unit_bytes = 0;  // of the result, each
};

// Runs pieces 0 .. n - 1 on torch's threads: each takes those of its own share, which are
// neighbours in memory, then what others have left: pieces do not cost the same, and cores are
// shared.
template <class Run>
void share_out(int64_t n, int64_t threads, const Run& run) {
  const auto run_some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  };
  if (threads == 1) return run_some(0, n);
  if (n <= threads) return torch::stable::parallel_for(0, n, 1, run_some);
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = n * t / threads;
    shares[t].end = n * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t t = 0; t < threads; ++t) {
      Share& share = shares[(own + t) % threads];
      for (int64_t i = share.next++; i < share.end; i = share.next++) run(i);
    }
  });
}

int64_t threads_for(int64_t elements) {
  const int64_t most = torch::stable::get_num_threads();
  return std::clamp<int64_t>((elements + kGrain - 1) / kGrain, 1, most);
}

void run_all(std::deque<Work>& works) {
  struct Piece {
    const Work* work;
    int64_t begin, end;
  };
  int64_t total = 0, elements = 0;
  for (const Work& work : works) total += work.bytes(), elements += work.out.numel();
  const int64_t threads = threads_for(elements);
  std::vector<Piece> pieces;
  for (Work& work : works) {
    work.prepare(total);
    const int64_t step = work.step(total, threads);
    for (int64_t i = 0; i < work.units; i += step) {
      pieces.push_back({&work, i, std::min(i + step, work.units)});
    }
  }
  share_out(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i) {
    pieces[i].work->run(pieces[i].begin, pieces[i].end);
  });
}

Tensor run_one(Work work) {
  const int64_t total = work.bytes(), threads = threads_for(work.out.numel());
  work.prepare(total);
  const int64_t step = work.step_alone(total, threads);
  share_out((work.units + step - 1) / step, threads, [&](int64_t i) {
    work.run(i * step, std::min((i + 1) * step, work.units));
  });
  return work.out;
}

// Rows of a row-major matrix by an int64 index, with few calls of torch: 0.3 us less than by way of
// Work. Empty where anything is otherwise, larger or refused: that is for fold_pack_cpu.
std::optional<Tensor> pack_plain_rows(const Tensor& w, const Tensor& rows) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), int64 = aoti_torch_dtype_int64();
  static const int32_t supported[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                      aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  int32_t device, rows_device, type, rows_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(w.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(rows.get(), &rows_device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(w.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(rows.get(), &rows_type));
  if (device != cpu || rows_device != cpu || rows_type != int64 || w.dim() != 2 ||
      rows.dim() != 1 || std::find(supported, std::end(supported), type) == std::end(supported)) {
    return {};
  }
  const int64_t m = w.size(0), n = w.size(1), stride = w.stride(0), kept = rows.numel();
  const int64_t size = static_cast<int64_t>(aoti_torch_dtype_element_size(type));
  const auto* index = static_cast<const int64_t*>(rows.const_data_ptr());
  if (kept == 0 || n == 0 || w.stride(1) != 1 || (kept > 1 && rows.stride(0) != 1) ||
      kept * n * size > kStreamedBytes || !is_increasing(index, kept) || index[0] < 0 ||
      index[kept - 1] >= m) {
    return {};
  }
  const int64_t sizes[] = {kept, n}, strides[] = {n, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, type, device, -1, &handle));
  Tensor out(handle);
  prefer_huge_pages(out.mutable_data_ptr(), kept * n * size);
  Job job{};
  job.src = w.const_data_ptr();
  job.dst = out.mutable_data_ptr();
  job.src_stride = stride;
  job.dst_stride = job.lanes = job.kept_lanes = job.out_lanes = n;
  job.kept_lines = kept;
  job.line_map = index;
  const ScalarType alike = size == 2   ? ScalarType::Half
                           : size == 4 ? ScalarType::Float
                                       : ScalarType::Double;
  const Kernel kernel = current_isa().load()->choose(false, true, alike, alike);
  const int64_t threads = threads_for(kept * n), step = (kept + threads - 1) / threads;
  share_out((kept + step - 1) / step, threads, [&](int64_t i) {
    kernel(job, i * step, std::min((i + 1) * step, kept));
  });
  return out;
}

}  // namespace

Tensor fold_pack_cpu(const Tensor& w, const OptTensor& rows, const OptTensor& cols,
                     const OptTensor& z_out, const OptTensor& z_in,
                     std::optional<ScalarType> dtype, bool stream) {
  const Where where{"fold_pack"};
  const Call call = describe_pack(where, w, rows, cols, z_out, z_in, dtype);
  return run_one({where, false, call, w, dtype, {}, {}, stream});
}

Tensor pack_rows_cpu(const Tensor& w, const Tensor& rows) {
  const std::optional<Tensor> out = pack_plain_rows(w, rows);
  return out ? *out : fold_pack_cpu(w, rows, {}, {}, {}, {}, false);
}

Tensor fold_pack_adjoint_cpu(const Tensor& g, const OptTensor& rows, const OptTensor& cols,
                             const OptTensor& z_out, const OptTensor& z_in, int64_t O, int64_t I,
                             std::optional<ScalarType> dtype) {
  const Where where{"fold_pack_adjoint"};
  const Call call = describe_adjoint(where, g, rows, cols, z_out, z_in, O, I, dtype);
  return run_one({where, true, call, g, dtype});
}

std::tuple<Tensors, Tensors> run_cpu(const char* op, bool adjoint, const std::vector<Call>& calls,
                                     const Tensors& in, std::optional<ScalarType> dtype,
                                     const Results& results) {
  if (results.out) require_results(op, in, results, dtype == ScalarType::Float8_e4m3fn);
  std::deque<Work> works;
  for (size_t i = 0; i < in.size(); ++i) {
    works.emplace_back(at_place(op, i), adjoint, calls[i], in[i], dtype, results.out_of(i),
                       results.scales_of(i));
  }
  run_all(works);
  Tensors out, scales;
  for (const Work& work : works) {
    out.push_back(work.out);
    if (work.scales) scales.push_back(*work.scales);
  }
  return {out, scales};
}

const char* simd_level() { return current_isa().load()->name; }

void set_simd_level(const std::string& name) {
  std::string known;
  for (const Isa* isa : supported_isas()) {
    if (name == isa->name) {
      current_isa() = isa;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + isa->name;
  }
  require(false, "set_simd_level: level must be one of ", known, " on this machine, got ", name);
}

}  // namespace gatepack
