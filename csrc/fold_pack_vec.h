// What a line kernel needs from an instruction set, for three of them, chosen at run time (a build
// never needs -march):
//   Vec<T>    W lanes of the compute type: load with widening, multiply, store with one rounding
//   Mover<E>  W elements of a width in bytes: gather open lanes to the front (gather_front stores
//             `count` of them and nothing behind), or spread them out
//   stream_cache_line  64 bytes to the start of a cache line, past the caches
#pragma once

#include "layout.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#define GATEPACK_X86 1
#include <immintrin.h>
#endif

namespace gatepack {

// One vector of a line whose lanes are partly closed. Pack: `count` open lanes among those from
// `start` go to the front of the next compact vector. Adjoint: the next `count` compact lanes are
// spread over the vector at `start`, zero between them.
struct Block {
  int32_t start;
  int32_t count;
};

// How a Mover wants its shuffle patterns: for each lane of the result `per_lane` entries of `unit`
// bytes, entry e = lane of the source * per_lane + e, all ones for zero. No pattern when unit is 0.
struct Geometry {
  int width;  // lanes of the result
  int span;   // lanes read by a gather
  int unit;
  int per_lane;
};
constexpr int kPatternBytes = 64;

// Scratch in whole cache lines: an unaligned 64-byte access costs two.
struct alignas(64) CacheLine {
  uint8_t bytes[64];
};
inline std::vector<CacheLine> cache_lines(size_t bytes) {
  return std::vector<CacheLine>(bytes / sizeof(CacheLine) + 1);
}

#if GATEPACK_X86
// Copies past the caches, in whole cache lines. To write a line that another core has read, its
// copy must be called back first: 480 us for the 2.1 MB of 922 rows of 576 fp32 that a matmul on 2
// threads has read, 76 us past the caches (AMD EPYC).
inline void stream(char* to, const uint8_t* from, int64_t bytes) {
  const int64_t ragged = (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64;
  int64_t i = std::min(bytes, ragged);
  std::memcpy(to, from, i);
  for (; i + 64 <= bytes; i += 64) {
    for (int64_t j = i; j < i + 64; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
    }
  }
  std::memcpy(to + i, from + i, bytes - i);
}

inline void end_of_stream() { _mm_sfence(); }
#else
inline void stream(char* to, const uint8_t* from, int64_t bytes) { std::memcpy(to, from, bytes); }
inline void end_of_stream() {}
#endif

struct Job;
using Kernel = void (*)(const Job&, int64_t begin, int64_t end);
using Stage = void (*)(const Job&, int64_t i, void* gathered, void* values);

struct Job {
  const void* src;
  void* dst;
  int64_t src_stride, dst_stride;  // elements between lines; of a crossed dst, between lanes
  int64_t lanes, kept_lanes;
  int64_t kept_lines, out_lanes;  // pack: from these on, padding
  const int64_t* line_map;  // pack: kept line -> line; adjoint: line -> kept line or -1; null: same
  const Block* blocks;      // null: every lane is kept
  const Block* blocks_end;
  const uint8_t* patterns;  // kPatternBytes for each block
  const void* line_gate;    // compute type, one per kept line
  const void* lane_gate;    // compute type, one per kept lane, padded to a full vector
  bool lane_first;
  bool past_caches;  // how lines that stay whole are copied
  // Staged packing: a kept line in the compute type first, then what becomes of it.
  Stage stage;
  bool crossed;
  int64_t rank, factor_pitch;
  double lora_scale;
  const void* line_factor;  // compute type, [kept_lines, rank]
  const void* lane_factor;  // compute type, [rank, factor_pitch], padded to a full vector
  float* line_scales;       // e4m3: written here, one per line of the result, or
  const float* lane_scales; // read from here, one per lane of it
};

// The kernels of an instruction set. largest_per_lane: the bits of the largest magnitude of each
// lane among kept lines begin .. end - 1, combined with what `largest` holds.
struct Isa {
  const char* name;
  Geometry (*geometry)(size_t element_size);
  Kernel (*choose)(bool adjoint, bool move_only, ScalarType in, ScalarType out);
  Kernel (*choose_staged)(ScalarType in, ScalarType out);
  Stage (*choose_stage)(ScalarType in);
  void (*largest_per_lane)(const Job&, bool fp64, int64_t begin, int64_t end, uint32_t* largest);
};

template <class T>
using bits_t = std::conditional_t<
    sizeof(T) == 1, uint8_t,
    std::conditional_t<sizeof(T) == 2, uint16_t,
                       std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

// A type that no instruction converts.
inline void widen_lanes(const f8* p, int n, float* lanes) {
  for (int k = 0; k < n; ++k) lanes[k] = widen(p[k]);
}

namespace scalar {
#define GATEPACK_TARGET
#define GATEPACK_ISA "scalar"
template <class T>
struct Vec {
  using Reg = T;
  static constexpr int W = 1;
  template <class In>
  static Reg load(const In* p) { return widen(*p); }
  template <class Out>
  static void store(Out* p, Reg v) { narrow(v, *p); }
  static Reg set1(T v) { return v; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg add(Reg a, Reg b) { return a + b; }
};

template <class E>
struct Mover {
  static constexpr Geometry kGeometry = {1, 1, 0, 0};
  struct Pattern {};
  static Pattern pattern(const uint8_t*) { return {}; }
  static void gather(const E* src, Pattern, E* dst) { *dst = *src; }
  static void gather_front(const E* src, Pattern, int, E* dst) { *dst = *src; }
  static void spread(const E* src, Pattern, int count, E* dst) { *dst = count ? *src : 0; }
};

inline void stream_cache_line(const uint8_t* src, uint8_t* dst) {
  std::memcpy(dst, src, sizeof(CacheLine));
}
#include "fold_pack_lines.h"
#undef GATEPACK_TARGET
#undef GATEPACK_ISA
}  // namespace scalar

#if GATEPACK_X86

namespace avx2 {
#define GATEPACK_TARGET __attribute__((target("avx2,f16c")))
#define GATEPACK_ISA "avx2"

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using Reg = __m256;
  static constexpr int W = 8;
  GATEPACK_TARGET static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  GATEPACK_TARGET static Reg load(const f8* p) {
    float lanes[W];
    widen_lanes(p, W, lanes);
    return load(lanes);
  }
  GATEPACK_TARGET static Reg load(const bf16* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  GATEPACK_TARGET static Reg load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  GATEPACK_TARGET static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  GATEPACK_TARGET static void store(double* p, Reg v) {
    _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  }
  GATEPACK_TARGET static void store(bf16* p, Reg v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x88);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  GATEPACK_TARGET static void store(f16* p, Reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  GATEPACK_TARGET static Reg set1(float v) { return _mm256_set1_ps(v); }
  GATEPACK_TARGET static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  GATEPACK_TARGET static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
};

template <>
struct Vec<double> {
  using Reg = __m256d;
  static constexpr int W = 4;
  GATEPACK_TARGET static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  GATEPACK_TARGET static void store(double* p, Reg v) { _mm256_storeu_pd(p, v); }
  GATEPACK_TARGET static void store(float* p, Reg v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
  template <class Out>
  GATEPACK_TARGET static void store(Out* p, Reg v) {
    float lanes[W];
    store(lanes, v);
    for (int k = 0; k < W; ++k) narrow(lanes[k], p[k]);
  }
  GATEPACK_TARGET static Reg set1(double v) { return _mm256_set1_pd(v); }
  GATEPACK_TARGET static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  GATEPACK_TARGET static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
};

template <class E>
struct Mover {
  static constexpr Geometry kGeometry = {32 / sizeof(E), 32 / sizeof(E), 4, sizeof(E) / 4};
  using Pattern = __m256i;
  GATEPACK_TARGET static Pattern pattern(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  GATEPACK_TARGET static __m256i shuffle(const E* src, Pattern p) {
    return _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)),
                                       p);
  }
  GATEPACK_TARGET static void gather(const E* src, Pattern p, E* dst) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), shuffle(src, p));
  }
  GATEPACK_TARGET static void gather_front(const E* src, Pattern p, int count, E* dst) {
    E lanes[kGeometry.width];
    gather(src, p, lanes);
    std::memcpy(dst, lanes, count * sizeof(E));
  }
  GATEPACK_TARGET static void spread(const E* src, Pattern p, int, E* dst) {
    const __m256i closed = _mm256_srai_epi32(p, 31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                        _mm256_andnot_si256(closed, shuffle(src, p)));
  }
};

// Bytes: a set top bit makes pshufb write zero, which is what a closed lane asks for.
template <>
struct Mover<uint16_t> {
  static constexpr Geometry kGeometry = {8, 8, 1, 2};
  using Pattern = __m128i;
  GATEPACK_TARGET static Pattern pattern(const uint8_t* p) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(p));
  }
  GATEPACK_TARGET static void gather(const uint16_t* src, Pattern p, uint16_t* dst) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_shuffle_epi8(v, p));
  }
  GATEPACK_TARGET static void gather_front(const uint16_t* src, Pattern p, int count,
                                           uint16_t* dst) {
    uint16_t lanes[kGeometry.width];
    gather(src, p, lanes);
    std::memcpy(dst, lanes, count * sizeof(uint16_t));
  }
  GATEPACK_TARGET static void spread(const uint16_t* src, Pattern p, int, uint16_t* dst) {
    gather(src, p, dst);
  }
};

GATEPACK_TARGET inline void stream_cache_line(const uint8_t* src, uint8_t* dst) {
  const auto* from = reinterpret_cast<const __m256i*>(src);
  auto* to = reinterpret_cast<__m256i*>(dst);
  const __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
  _mm256_stream_si256(to, low);
  _mm256_stream_si256(to + 1, high);
}
#include "fold_pack_lines.h"
#undef GATEPACK_TARGET
#undef GATEPACK_ISA
}  // namespace avx2

namespace avx512 {
#define GATEPACK_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
#define GATEPACK_ISA "avx512"
template <class T>
struct Vec;

template <>
struct Vec<float> {
  using Reg = __m512;
  static constexpr int W = 16;
  GATEPACK_TARGET static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  GATEPACK_TARGET static Reg load(const f8* p) {
    float lanes[W];
    widen_lanes(p, W, lanes);
    return load(lanes);
  }
  GATEPACK_TARGET static Reg load(const bf16* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  GATEPACK_TARGET static Reg load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  GATEPACK_TARGET static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  GATEPACK_TARGET static void store(double* p, Reg v) {
    _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    _mm512_storeu_pd(p + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
  }
  GATEPACK_TARGET static void store(bf16* p, Reg v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_set1_epi32(rounded, nan, 0x7fc0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
  }
  GATEPACK_TARGET static void store(f16* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  GATEPACK_TARGET static Reg set1(float v) { return _mm512_set1_ps(v); }
  GATEPACK_TARGET static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  GATEPACK_TARGET static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
};

template <>
struct Vec<double> {
  using Reg = __m512d;
  static constexpr int W = 8;
  GATEPACK_TARGET static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  GATEPACK_TARGET static void store(double* p, Reg v) { _mm512_storeu_pd(p, v); }
  GATEPACK_TARGET static void store(float* p, Reg v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
  template <class Out>
  GATEPACK_TARGET static void store(Out* p, Reg v) {
    float lanes[W];
    store(lanes, v);
    for (int k = 0; k < W; ++k) narrow(lanes[k], p[k]);
  }
  GATEPACK_TARGET static Reg set1(double v) { return _mm512_set1_pd(v); }
  GATEPACK_TARGET static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  GATEPACK_TARGET static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
};

// A gather shuffles two vectors of the line at once: down to half the lanes open, every store is a
// full and aligned one. Compress instructions move one vector and leave the store to straddle.
template <class E>
struct Mover {
  static constexpr Geometry kGeometry = {64 / sizeof(E), 128 / sizeof(E), sizeof(E), 1};
  using Pattern = __m512i;
  GATEPACK_TARGET static Pattern pattern(const uint8_t* p) { return _mm512_load_si512(p); }
  GATEPACK_TARGET static __m512i gathered(const E* src, Pattern p) {
    const __m512i a = _mm512_loadu_si512(src), b = _mm512_loadu_si512(src + kGeometry.width);
    if constexpr (sizeof(E) == 2) return _mm512_permutex2var_epi16(a, p, b);
    else if constexpr (sizeof(E) == 4) return _mm512_permutex2var_epi32(a, p, b);
    else return _mm512_permutex2var_epi64(a, p, b);
  }
  GATEPACK_TARGET static void gather(const E* src, Pattern p, E* dst) {
    _mm512_storeu_si512(dst, gathered(src, p));
  }
  GATEPACK_TARGET static void gather_front(const E* src, Pattern p, int count, E* dst) {
    const __m512i v = gathered(src, p);
    const uint64_t lanes = (uint64_t{1} << count) - 1;
    if constexpr (sizeof(E) == 2) _mm512_mask_storeu_epi16(dst, static_cast<__mmask32>(lanes), v);
    else if constexpr (sizeof(E) == 4) _mm512_mask_storeu_epi32(dst, static_cast<__mmask16>(lanes), v);
    else _mm512_mask_storeu_epi64(dst, static_cast<__mmask8>(lanes), v);
  }
  GATEPACK_TARGET static void spread(const E* src, Pattern p, int, E* dst) {
    const __m512i a = _mm512_loadu_si512(src);
    __m512i v;
    if constexpr (sizeof(E) == 2) {
      v = _mm512_maskz_permutexvar_epi16(~_mm512_movepi16_mask(p), p, a);
    } else if constexpr (sizeof(E) == 4) {
      v = _mm512_maskz_permutexvar_epi32(~_mm512_movepi32_mask(p), p, a);
    } else {
      v = _mm512_maskz_permutexvar_epi64(~_mm512_movepi64_mask(p), p, a);
    }
    _mm512_storeu_si512(dst, v);
  }
};

GATEPACK_TARGET inline void stream_cache_line(const uint8_t* src, uint8_t* dst) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), _mm512_loadu_si512(src));
}
#include "fold_pack_lines.h"
#undef GATEPACK_TARGET
#undef GATEPACK_ISA
}  // namespace avx512

#endif  // GATEPACK_X86

}  // namespace gatepack
