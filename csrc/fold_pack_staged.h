// Packing with a LoRA update, into e4m3, or across: each kept line passes through a buffer in the
// compute type. Included by fold_pack_lines.h, once per instruction set.

// Kept line i in the compute type, its update added and its gates applied. `values` is padded to a
// full vector.
template <class In>
GATEPACK_TARGET void stage_line(const Job& job, int64_t i, void* gathered, void* values) {
  using T = compute_t<In>;
  using V = Vec<T>;
  using E = bits_t<In>;
  const In* src = source_line<In>(job, i);
  T* const out = static_cast<T*>(values);
  if (job.blocks) {
    gather_line(job, reinterpret_cast<const E*>(src), static_cast<E*>(gathered));
    src = static_cast<const In*>(gathered);
  }
  if (job.rank == 0) {
    scale_line(job, i, src, out);
    return;
  }
  const int64_t n = job.kept_lanes;
  int64_t j = 0;
  for (; j + V::W <= n; j += V::W) V::store(out + j, V::load(src + j));
  for (; j < n; ++j) out[j] = widen(src[j]);
  const T* line = static_cast<const T*>(job.line_factor) + i * job.rank;
  const T* lane = static_cast<const T*>(job.lane_factor);
  const auto scale = V::set1(static_cast<T>(job.lora_scale));
  for (j = 0; j < n; j += V::W) {
    auto sum = V::mul(V::set1(line[0]), V::load(lane + j));
    for (int64_t k = 1; k < job.rank; ++k) {
      sum = V::add(sum, V::mul(V::set1(line[k]), V::load(lane + k * job.factor_pitch + j)));
    }
    V::store(out + j, V::add(V::load(out + j), V::mul(scale, sum)));
  }
  scale_line(job, i, static_cast<const T*>(out), out);
}

template <class T, class Out>
GATEPACK_TARGET void narrow_values(const T* values, int64_t n, Out* out) {
  using V = Vec<T>;
  int64_t j = 0;
  for (; j + V::W <= n; j += V::W) V::store(out + j, V::load(values + j));
  for (; j < n; ++j) narrow(values[j], out[j]);
}

template <class T>
GATEPACK_TARGET void combine_largest(const T* values, int64_t n, uint32_t* largest) {
  for (int64_t j = 0; j < n; ++j) largest[j] = std::max(largest[j], magnitude_bits(values[j]));
}

// e4m3 of a line under one scale, which is returned, or under one for each lane.
template <class T>
GATEPACK_TARGET float quantise_line(const T* values, int64_t n, const float* lane_scales, f8* out) {
  if (lane_scales) {
    for (int64_t j = 0; j < n; ++j) narrow(static_cast<float>(values[j]) / lane_scales[j], out[j]);
    return 1.0f;
  }
  uint32_t largest = 0;
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, magnitude_bits(values[j]));
  const float scale = e4m3_scale(largest);
  for (int64_t j = 0; j < n; ++j) narrow(static_cast<float>(values[j]) / scale, out[j]);
  return scale;
}

// Lines of a tile start in different sets of the L1 cache: at multiples of 4 KiB, as in a matrix of
// 4096 or 14336 lanes, they would evict each other.
inline int64_t tile_pitch(int64_t lanes, int64_t size) {
  return (rounded_up(lanes * size, 4096) + 64) / size;
}

// dst[j, b] = tile[b, j]: `n` lines of a tile become columns of the result, at best a cache line of
// it at a time.
template <class E>
GATEPACK_TARGET void store_crossed(const E* tile, int64_t pitch, int64_t n, int64_t lanes, E* dst,
                                   int64_t dst_stride) {
  constexpr int64_t kTile = 64 / sizeof(E);
  for (int64_t j = 0; j < lanes; ++j) {
    E across[kTile];
    if (n == kTile) {
      for (int64_t b = 0; b < kTile; ++b) across[b] = tile[b * pitch + j];
      std::memcpy(dst + j * dst_stride, across, sizeof across);
    } else {
      for (int64_t b = 0; b < n; ++b) dst[j * dst_stride + b] = tile[b * pitch + j];
    }
  }
}

template <class T, class Out>
GATEPACK_TARGET void pack_staged(const Job& job, int64_t begin, int64_t end) {
  using E = bits_t<Out>;
  constexpr int64_t kTile = 64 / sizeof(Out);  // lines that fill a cache line across
  auto gathered = cache_lines(job.blocks ? job.kept_lanes * sizeof(T) : 0);
  auto values = cache_lines(job.kept_lanes * sizeof(T));
  const int64_t pitch = tile_pitch(job.out_lanes, sizeof(Out));
  auto tile = cache_lines(job.crossed ? kTile * pitch * sizeof(Out) : 0);
  T* const staged = reinterpret_cast<T*>(values.data());
  const int64_t step = job.crossed ? kTile : 1;
  for (int64_t base = begin; base < end; base += step) {
    const int64_t n = std::min(step, end - base);
    for (int64_t b = 0; b < n; ++b) {
      const int64_t i = base + b;
      Out* const out = job.crossed ? reinterpret_cast<Out*>(tile.data()) + b * pitch
                                   : static_cast<Out*>(job.dst) + i * job.dst_stride;
      float scale = 1.0f;
      if (i < job.kept_lines) {
        job.stage(job, i, gathered.data(), staged);
        if constexpr (std::is_same_v<Out, f8>) {
          scale = quantise_line(staged, job.kept_lanes, job.lane_scales, out);
        } else {
          narrow_values(staged, job.kept_lanes, out);
        }
      }
      pad_line(job, i < job.kept_lines ? job.kept_lanes : 0, out);
      if (job.line_scales) job.line_scales[i] = scale;
    }
    if (job.crossed) {
      store_crossed(reinterpret_cast<const E*>(tile.data()), pitch, n, job.out_lanes,
                    static_cast<E*>(job.dst) + base, job.dst_stride);
    }
  }
}

template <class T>
GATEPACK_TARGET void largest_of(const Job& job, int64_t begin, int64_t end, uint32_t* largest) {
  auto gathered = cache_lines(job.blocks ? job.kept_lanes * sizeof(T) : 0);
  auto values = cache_lines(job.kept_lanes * sizeof(T));
  T* const staged = reinterpret_cast<T*>(values.data());
  for (int64_t i = begin; i < std::min(end, job.kept_lines); ++i) {
    job.stage(job, i, gathered.data(), staged);
    combine_largest(staged, job.kept_lanes, largest);
  }
}

inline void largest_per_lane(const Job& job, bool fp64, int64_t begin, int64_t end,
                             uint32_t* largest) {
  if (fp64) largest_of<double>(job, begin, end, largest);
  else largest_of<float>(job, begin, end, largest);
}

template <class T>
Kernel choose_staged_out(ScalarType out) {
  switch (out) {
    case ScalarType::Float: return pack_staged<T, float>;
    case ScalarType::Double: return pack_staged<T, double>;
    case ScalarType::Half: return pack_staged<T, f16>;
    case ScalarType::Float8_e4m3fn: return pack_staged<T, f8>;
    default: return pack_staged<T, bf16>;
  }
}

inline Kernel choose_staged(ScalarType in, ScalarType out) {
  return in == ScalarType::Double ? choose_staged_out<double>(out) : choose_staged_out<float>(out);
}

inline Stage choose_stage(ScalarType in) {
  switch (in) {
    case ScalarType::Float: return stage_line<float>;
    case ScalarType::Double: return stage_line<double>;
    case ScalarType::Half: return stage_line<f16>;
    default: return stage_line<bf16>;
  }
}
