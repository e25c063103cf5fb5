// fold_pack and its adjoint on the CPU: one pass over the matrix, threaded by torch's own pool.
#include "fold_pack_cpu.h"

#include "fold_pack_vec.h"

#include <algorithm>
#include <atomic>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gatepack {
namespace {

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

// The index as int64, after proof that it is strictly increasing and inside [0, bound).
std::vector<int64_t> checked(const char* op, const char* name, Index index, int64_t n,
                             int64_t bound) {
  std::vector<int64_t> out(n);
  if (index.wide) std::copy_n(static_cast<const int64_t*>(index.data), n, out.data());
  else std::copy_n(static_cast<const int32_t*>(index.data), n, out.data());
  bool increasing = true;
  for (int64_t i = 1; i < n; ++i) increasing &= out[i - 1] < out[i];
  if (!increasing) {
    const int64_t i =
        std::adjacent_find(out.begin(), out.end(), [](auto a, auto b) { return a >= b; }) -
        out.begin();
    require(false, op, ": ", name, " must be strictly increasing, got ", name, "[", i + 1,
            "] = ", out[i + 1], " after ", name, "[", i, "] = ", out[i]);
  }
  if (n > 0) {
    const int64_t worst = out.front() < 0 ? out.front() : out.back();
    require(worst >= 0 && worst < bound, op, ": ", name, " must be in [0, ", bound, "), got ",
            worst);
  }
  return out;
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

// The blocks of a line and their shuffle patterns.
class Cover {
 public:
  Cover(const std::vector<int64_t>& kept, int64_t lanes, Geometry geometry, bool adjoint)
      : geometry_(geometry) {
    const int64_t n = static_cast<int64_t>(kept.size());
    const int64_t most = adjoint ? lanes / geometry.width + 1 : n / geometry.width + 1;
    blocks_.reserve(most);
    if (geometry.unit) patterns_.reserve(most);
    if (adjoint) {
      for (int64_t j = 0, start = 0; start < lanes; start += geometry.width) {
        CacheLine& pattern = add(start);
        for (; j < n && kept[j] < start + geometry.width; ++j) {
          set(pattern, kept[j] - start, blocks_.back().count++);
        }
      }
    } else {
      // Greedy: a block starts at the first lane not yet covered, so closed stretches are skipped;
      // the last ones move back to stay inside the line.
      for (int64_t j = 0; j < n;) {
        const int64_t start = std::min(kept[j], lanes - geometry.span);
        CacheLine& pattern = add(start);
        for (int k = 0; k < geometry.width && j < n && kept[j] < start + geometry.span; ++k, ++j) {
          set(pattern, blocks_.back().count++, kept[j] - start);
        }
      }
    }
  }

  const std::vector<Block>& blocks() const { return blocks_; }
  const uint8_t* patterns() const { return reinterpret_cast<const uint8_t*>(patterns_.data()); }

 private:
  CacheLine& add(int64_t start) {
    blocks_.push_back({static_cast<int32_t>(start), 0});
    if (geometry_.unit) patterns_.emplace_back();
    CacheLine& pattern = geometry_.unit ? patterns_.back() : unused_;
    std::memset(pattern.bytes, 0xff, kPatternBytes);
    return pattern;
  }

  // Little-endian entries, as on every machine that has a pattern-driven Mover.
  void set(CacheLine& pattern, int64_t lane, int64_t source) {
    for (int e = 0; e < geometry_.per_lane; ++e) {
      const int64_t entry = source * geometry_.per_lane + e;
      std::memcpy(pattern.bytes + (lane * geometry_.per_lane + e) * geometry_.unit, &entry,
                  geometry_.unit);
    }
  }

  Geometry geometry_;
  std::vector<Block> blocks_;
  std::vector<CacheLine> patterns_;
  CacheLine unused_;
};

#if defined(__linux__)
// Fresh memory of this size arrives page by page, and at 4 KiB the faults cost three times the
// copy (4096 x 14336 fp32, 60 % of the rows: 98 ms against 24 ms; benchmarks/bench_fold_pack.py).
void prefer_huge_pages(const Tensor& out) {
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (begin + out.numel() * out.element_size()) & ~(kHuge - 1);
  // Refusal is harmless: the kernel may be built without transparent huge pages.
  if (last < first + 4 * kHuge) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
#else
void prefer_huge_pages(const Tensor&) {}
#endif

Tensor run(const char* op, bool adjoint, const Call& call, const Tensor& in,
           std::optional<ScalarType> dtype) {
  const char* line_name = call.row_major ? "rows" : "cols";
  const char* lane_name = call.row_major ? "cols" : "rows";
  std::vector<int64_t> lines, lanes;
  if (call.line_index.data) {
    lines = checked(op, line_name, call.line_index, call.kept_lines, call.lines);
  }
  if (call.lane_index.data) {
    lanes = checked(op, lane_name, call.lane_index, call.kept_lanes, call.lanes);
  }

  const ScalarType in_type = in.scalar_type(), out_type = dtype.value_or(in_type);
  const int64_t out_lines = adjoint ? call.lines : call.kept_lines;
  const int64_t out_lanes = adjoint ? call.lanes : call.kept_lanes;
  Tensor out = allocate(call, in, out_lines, out_lanes, out_type);
  if (out_lines == 0 || out_lanes == 0) return out;
  prefer_huge_pages(out);

  const bool fp64 = in_type == ScalarType::Double;
  // An index that keeps every lane costs no more than none.
  const bool some_closed = call.lane_index.data && call.kept_lanes < call.lanes;
  const size_t moved_size = adjoint ? out.element_size() : in.element_size();
  const Isa* isa = current_isa();
  if (some_closed && call.lanes < isa->geometry(moved_size).span) isa = &scalar::kIsa;
  std::optional<Cover> cover;
  if (some_closed) cover.emplace(lanes, call.lanes, isa->geometry(moved_size), adjoint);

  std::vector<int64_t> line_map = std::move(lines);
  if (adjoint && call.line_index.data) {
    std::vector<int64_t> inverse(call.lines, -1);
    for (int64_t i = 0; i < call.kept_lines; ++i) inverse[line_map[i]] = i;
    line_map = std::move(inverse);
  }
  const bool move_only = !call.line_gate.data && !call.lane_gate.data && in_type == out_type;
  std::vector<CacheLine> line_gate, lane_gate;
  if (!move_only) {
    line_gate = padded_gate(call.line_gate, call.kept_lines, fp64);
    lane_gate = padded_gate(call.lane_gate, call.kept_lanes, fp64);
  }

  const Job job = {in.const_data_ptr(),
                   out.mutable_data_ptr(),
                   call.stride,
                   out_lanes,
                   call.lanes,
                   call.kept_lanes,
                   call.line_index.data ? line_map.data() : nullptr,
                   cover ? cover->blocks().data() : nullptr,
                   cover ? cover->blocks().data() + cover->blocks().size() : nullptr,
                   cover ? cover->patterns() : nullptr,
                   line_gate.data(),
                   lane_gate.data(),
                   call.lane_first};
  const Kernel kernel = isa->choose(adjoint, move_only, in_type, out_type);
  constexpr int64_t kGrainBytes = 128 << 10;  // below this a second thread costs more than it saves
  const int64_t line_bytes = call.lanes * static_cast<int64_t>(out.element_size());
  torch::stable::parallel_for(0, out_lines, std::max<int64_t>(1, kGrainBytes / line_bytes),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  return out;
}

}  // namespace

Tensor fold_pack_cpu(const Tensor& w, const OptTensor& rows, const OptTensor& cols,
                     const OptTensor& z_out, const OptTensor& z_in,
                     std::optional<ScalarType> dtype) {
  return run("fold_pack", false, describe_pack(w, rows, cols, z_out, z_in, dtype), w, dtype);
}

Tensor fold_pack_adjoint_cpu(const Tensor& g, const OptTensor& rows, const OptTensor& cols,
                             const OptTensor& z_out, const OptTensor& z_in, int64_t O, int64_t I,
                             std::optional<ScalarType> dtype) {
  return run("fold_pack_adjoint", true,
             describe_adjoint(g, rows, cols, z_out, z_in, O, I, dtype), g, dtype);
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
