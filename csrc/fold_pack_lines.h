// Line kernels over the Vec and Mover of the enclosing namespace. Included once per instruction
// set, inside its namespace, with GATEPACK_TARGET and GATEPACK_ISA defined: hence no include guard
// and no includes.

// dst[j] = src[j] under the gates of kept line i, for every kept lane j.
template <class In, class Out>
GATEPACK_TARGET void scale_line(const Job& job, int64_t i, const In* src, Out* dst) {
  using T = compute_t<In>;
  using V = Vec<T>;
  const auto line = V::set1(static_cast<const T*>(job.line_gate)[i]);
  const T* lane = static_cast<const T*>(job.lane_gate);
  const bool lane_first = job.lane_first;
  const auto scale = [&](auto v, int64_t j) GATEPACK_TARGET {
    const auto z = V::load(lane + j);
    return lane_first ? V::mul(V::mul(v, z), line) : V::mul(V::mul(v, line), z);
  };
  const int64_t n = job.kept_lanes;
  int64_t j = 0;
  for (; j + V::W <= n; j += V::W) V::store(dst + j, scale(V::load(src + j), j));
  if (j < n) {
    In rest[V::W] = {};
    Out scaled[V::W];
    std::memcpy(rest, src + j, (n - j) * sizeof(In));
    V::store(scaled, scale(V::load(rest), j));
    std::memcpy(dst + j, scaled, (n - j) * sizeof(Out));
  }
}

// N lines at once: their loads from memory overlap, and a pattern is read once for all of them.
template <class E, int N>
GATEPACK_TARGET void gather_lines(const Job& job, const E* const (&src)[N], E* const (&dst)[N]) {
  using M = Mover<E>;
  constexpr int W = M::kGeometry.width;
  const uint8_t* at = job.patterns;
  const Block *b = job.blocks, *const end = job.blocks_end;
  int64_t j = 0;
  // A whole vector is stored for each block and the next block overwrites the surplus, as long as
  // the surplus stays inside this line: the line after it may belong to another thread.
  for (; b != end && j + W <= job.kept_lanes; j += b->count, ++b, at += kPatternBytes) {
    const auto pattern = M::pattern(at);
    for (int k = 0; k < N; ++k) M::gather(src[k] + b->start, pattern, dst[k] + j);
  }
  for (; b != end; j += b->count, ++b, at += kPatternBytes) {
    const auto pattern = M::pattern(at);
    for (int k = 0; k < N; ++k) M::gather_front(src[k] + b->start, pattern, b->count, dst[k] + j);
  }
}

template <class E>
GATEPACK_TARGET void gather_line(const Job& job, const E* src, E* dst) {
  gather_lines<E, 1>(job, {src}, {dst});
}

template <class E>
GATEPACK_TARGET void spread_line(const Job& job, const E* src, E* dst) {
  using M = Mover<E>;
  constexpr int W = M::kGeometry.width;
  const E* const src_end = src + job.kept_lanes;
  const int64_t last = job.lanes - W;
  const uint8_t* at = job.patterns;
  const Block *b = job.blocks, *const end = job.blocks_end;
  for (; b != end && src + W <= src_end && b->start <= last;
       src += b->count, ++b, at += kPatternBytes) {
    M::spread(src, M::pattern(at), b->count, dst + b->start);
  }
  for (; b != end; src += b->count, ++b, at += kPatternBytes) {
    E front[W] = {}, out[W];
    if (b->count > 0) std::memcpy(front, src, b->count * sizeof(E));
    M::spread(front, M::pattern(at), b->count, out);
    std::memcpy(dst + b->start, out, std::min<int64_t>(W, job.lanes - b->start) * sizeof(E));
  }
}

template <class In>
inline const In* source_line(const Job& job, int64_t i) {
  return static_cast<const In*>(job.src) + (job.line_map ? job.line_map[i] : i) * job.src_stride;
}

// Zeros from lane `from` on of line i of the result.
template <class Out>
inline void pad_line(const Job& job, int64_t from, Out* line) {
  if (from == job.out_lanes) return;
  std::memset(static_cast<void*>(line + from), 0, (job.out_lanes - from) * sizeof(Out));
}

// dst = src, past the caches. What lies kAhead bytes further on, past the end of src in `next`, is
// asked for by hand, as in copy_lines.
GATEPACK_TARGET inline void stream_line(const uint8_t* src, const uint8_t* next, int64_t n,
                                        uint8_t* dst) {
  constexpr int64_t kLine = sizeof(CacheLine), kAhead = 4096;
  const int64_t head = std::min<int64_t>(n, -reinterpret_cast<uintptr_t>(dst) % kLine);
  if (head > 0) std::memcpy(dst, src, head);
  int64_t at = head;
  const int64_t turn = std::max<int64_t>(0, n - kAhead);
  for (; at < turn; at += kLine) {
    __builtin_prefetch(src + at + kAhead, 0, 0);
    stream_cache_line(src + at, dst + at);
  }
  for (; at + kLine <= n; at += kLine) {
    __builtin_prefetch(next + at - turn, 0, 0);
    stream_cache_line(src + at, dst + at);
  }
  if (at < n) std::memcpy(dst + at, src + at, n - at);
}

// Whole lines, neighbours on both sides as one. While a piece is copied, the start of the next is
// asked for by hand: the CPU's own prefetcher stops at the end of a page and cannot know which line
// is kept next (out of memory 1.05 to 1.25 times as fast; AMD EPYC).
template <class E>
inline void copy_lines(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 16 << 10, kLine = sizeof(CacheLine);
  const int64_t n = job.lanes * sizeof(E), pitch = job.src_stride * sizeof(E);
  const int64_t* const map = job.line_map;
  const uint8_t* const src = static_cast<const uint8_t*>(job.src);
  uint8_t* const dst = static_cast<uint8_t*>(job.dst);
  const int64_t dst_pitch = job.dst_stride * sizeof(E);
  const bool dense = pitch == n && dst_pitch == n;
  for (int64_t i = begin, last; i < end; i = last) {
    const int64_t line = map ? map[i] : i;
    last = i + 1;
    if (dense) {
      while (last < end && (!map || map[last] == line + last - i)) ++last;
    }
    const uint8_t* from = src + line * pitch;
    uint8_t* to = dst + i * dst_pitch;
    const uint8_t* const next = map && last < end ? src + map[last] * pitch : from;
    for (int64_t left = (last - i) * n; left > 0;) {
      const int64_t to_boundary = kPiece - reinterpret_cast<uintptr_t>(from) % kPiece;
      const int64_t size = std::min(left, to_boundary);
      const uint8_t* const ahead = size < left ? from + size : next;
      for (int k = 0; k < 4; ++k) __builtin_prefetch(ahead + k * kLine);
      std::memcpy(to, from, size);
      from += size;
      to += size;
      left -= size;
    }
  }
}

template <class E>
GATEPACK_TARGET void stream_lines(const Job& job, int64_t begin, int64_t end) {
  const int64_t n = job.lanes * sizeof(E);
  for (int64_t i = begin; i < end; ++i) {
    const E* const next = source_line<E>(job, std::min(i + 1, job.kept_lines - 1));
    stream_line(reinterpret_cast<const uint8_t*>(source_line<E>(job, i)),
                reinterpret_cast<const uint8_t*>(next), n,
                reinterpret_cast<uint8_t*>(static_cast<E*>(job.dst) + i * job.dst_stride));
  }
#if GATEPACK_X86
  // Other threads see these stores before what this one does next.
  _mm_sfence();
#endif
}

template <class E>
GATEPACK_TARGET void pack_moved(const Job& job, int64_t begin, int64_t end) {
  E* const dst = static_cast<E*>(job.dst);
  const bool padded = job.kept_lanes < job.out_lanes;
  for (int64_t i = padded ? begin : std::max(begin, job.kept_lines); i < end; ++i) {
    pad_line(job, i < job.kept_lines ? job.kept_lanes : 0, dst + i * job.dst_stride);
  }
  end = std::min(end, job.kept_lines);
  if (!job.blocks) {
    return job.past_caches ? stream_lines<E>(job, begin, end) : copy_lines<E>(job, begin, end);
  }
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    const E* const from[] = {source_line<E>(job, i), source_line<E>(job, i + 1),
                             source_line<E>(job, i + 2), source_line<E>(job, i + 3)};
    E* const first = dst + i * job.dst_stride;
    gather_lines<E, 4>(job, from, {first, first + job.dst_stride, first + 2 * job.dst_stride,
                                   first + 3 * job.dst_stride});
  }
  for (; i < end; ++i) gather_line(job, source_line<E>(job, i), dst + i * job.dst_stride);
}

template <class E>
GATEPACK_TARGET void unpack_moved(const Job& job, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; ++l) {
    E* dst = static_cast<E*>(job.dst) + l * job.dst_stride;
    const int64_t i = job.line_map ? job.line_map[l] : l;
    if (i < 0) {
      std::memset(dst, 0, job.lanes * sizeof(E));
      continue;
    }
    const E* src = static_cast<const E*>(job.src) + i * job.src_stride;
    if (job.blocks) spread_line(job, src, dst);
    else std::memcpy(dst, src, job.lanes * sizeof(E));
  }
}

// With closed lanes a line passes through a buffer that stays in cache: gathered, then scaled.
template <class In, class Out>
GATEPACK_TARGET void pack_scaled(const Job& job, int64_t begin, int64_t end) {
  using E = bits_t<In>;
  auto scratch = cache_lines(job.blocks ? job.kept_lanes * sizeof(E) : 0);
  E* const buffer = reinterpret_cast<E*>(scratch.data());
  for (int64_t i = begin; i < end; ++i) {
    Out* dst = static_cast<Out*>(job.dst) + i * job.dst_stride;
    pad_line(job, i < job.kept_lines ? job.kept_lanes : 0, dst);
    if (i >= job.kept_lines) continue;
    const In* src = source_line<In>(job, i);
    if (job.blocks) {
      gather_line(job, reinterpret_cast<const E*>(src), buffer);
      src = reinterpret_cast<const In*>(buffer);
    }
    scale_line(job, i, src, dst);
  }
}

template <class In, class Out>
GATEPACK_TARGET void unpack_scaled(const Job& job, int64_t begin, int64_t end) {
  using E = bits_t<Out>;
  auto scratch = cache_lines(job.blocks ? job.kept_lanes * sizeof(E) : 0);
  E* const buffer = reinterpret_cast<E*>(scratch.data());
  for (int64_t l = begin; l < end; ++l) {
    Out* dst = static_cast<Out*>(job.dst) + l * job.dst_stride;
    const int64_t i = job.line_map ? job.line_map[l] : l;
    if (i < 0) {
      std::memset(static_cast<void*>(dst), 0, job.lanes * sizeof(Out));
      continue;
    }
    const In* src = static_cast<const In*>(job.src) + i * job.src_stride;
    if (job.blocks) {
      scale_line(job, i, src, reinterpret_cast<Out*>(buffer));
      spread_line<E>(job, buffer, reinterpret_cast<E*>(dst));
    } else {
      scale_line(job, i, src, dst);
    }
  }
}

template <class In>
Kernel choose_scaled(bool adjoint, ScalarType out) {
  switch (out) {
    case ScalarType::Float: return adjoint ? unpack_scaled<In, float> : pack_scaled<In, float>;
    case ScalarType::Double: return adjoint ? unpack_scaled<In, double> : pack_scaled<In, double>;
    case ScalarType::Half: return adjoint ? unpack_scaled<In, f16> : pack_scaled<In, f16>;
    default: return adjoint ? unpack_scaled<In, bf16> : pack_scaled<In, bf16>;
  }
}

inline Kernel choose_kernel(bool adjoint, bool move_only, ScalarType in, ScalarType out) {
  switch (in) {
    case ScalarType::Float8_e4m3fn: return choose_scaled<f8>(adjoint, out);
    case ScalarType::Float:
      if (move_only) return adjoint ? unpack_moved<uint32_t> : pack_moved<uint32_t>;
      return choose_scaled<float>(adjoint, out);
    case ScalarType::Double:
      if (move_only) return adjoint ? unpack_moved<uint64_t> : pack_moved<uint64_t>;
      return choose_scaled<double>(adjoint, out);
    default:
      if (move_only) return adjoint ? unpack_moved<uint16_t> : pack_moved<uint16_t>;
      return in == ScalarType::Half ? choose_scaled<f16>(adjoint, out)
                                    : choose_scaled<bf16>(adjoint, out);
  }
}

#include "fold_pack_staged.h"

inline Geometry geometry(size_t element_size) {
  switch (element_size) {
    case 2: return Mover<uint16_t>::kGeometry;
    case 4: return Mover<uint32_t>::kGeometry;
    default: return Mover<uint64_t>::kGeometry;
  }
}

inline constexpr Isa kIsa = {GATEPACK_ISA,        geometry,     choose_kernel,
                             choose_staged,       choose_stage, largest_per_lane};
