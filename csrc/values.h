// Storage types as bits, and the one way they widen and narrow, on the CPU and in CUDA kernels.
//
// torch's own classes convert implicitly, and a conversion nobody asked for would be a second
// rounding.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define GATEPACK_HD __host__ __device__
#else
#define GATEPACK_HD
#endif

namespace gatepack {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8 {  // e4m3: 4 bits of exponent, 3 of mantissa, no infinity, largest 448
  uint8_t bits;
};

template <class In>
using compute_t = std::conditional_t<std::is_same_v<In, double>, double, float>;

GATEPACK_HD inline uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
GATEPACK_HD inline float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

GATEPACK_HD inline float widen(float v) { return v; }
GATEPACK_HD inline double widen(double v) { return v; }
GATEPACK_HD inline float widen(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
GATEPACK_HD inline float widen(f16 v) {
  return torch::headeronly::Half(v.bits, torch::headeronly::Half::from_bits());
}
GATEPACK_HD inline float widen(f8 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x80) << 24, magnitude = v.bits & 0x7f;
  if (magnitude == 0x7f) return float_of(sign | 0x7fc00000);
  // 2^120 makes up for the difference of the biases, 127 and 7; exact, subnormals included.
  return float_of(sign | bits_of(float_of(magnitude << 20) * 0x1p120f));
}

// fp64 reaches a narrower type through fp32, as in torch.
GATEPACK_HD inline void narrow(double v, double& out) { out = v; }
GATEPACK_HD inline void narrow(double v, float& out) { out = static_cast<float>(v); }
GATEPACK_HD inline void narrow(float v, double& out) { out = v; }
GATEPACK_HD inline void narrow(float v, float& out) { out = v; }
GATEPACK_HD inline void narrow(float v, bf16& out) {
  const uint32_t bits = bits_of(v);
  out.bits = static_cast<uint16_t>(v != v ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
GATEPACK_HD inline void narrow(float v, f16& out) { out.bits = torch::headeronly::Half(v).x; }
GATEPACK_HD inline void narrow(float v, f8& out) {
  const uint32_t bits = bits_of(v), sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
  // Subnormals: adding 2^14 leaves their multiple of 2^-9, rounded, in the last bits.
  const uint32_t small = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
  const uint32_t large =
      (magnitude + (static_cast<uint32_t>(7 - 127) << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  const uint32_t finite = magnitude < (121u << 23) ? small : large;
  out.bits = static_cast<uint8_t>(sign | (magnitude >= (1087u << 20) ? 0x7f : finite));
}
template <class Out>
GATEPACK_HD inline void narrow(double v, Out& out) {
  narrow(static_cast<float>(v), out);
}

// The scale of a row of e4m3 from the bits of its largest magnitude: its largest value becomes 448.
// A row of zeros takes 1; below 2^-126 the scale would lose its precision, or be 0.
GATEPACK_HD inline float e4m3_scale(uint32_t largest) {
  if (largest == 0) return 1.0f;
  const float scale = float_of(largest) / 448.0f;
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}
GATEPACK_HD inline uint32_t magnitude_bits(float v) { return bits_of(v) & 0x7fffffff; }
GATEPACK_HD inline uint32_t magnitude_bits(double v) {
  return magnitude_bits(static_cast<float>(v));
}

}  // namespace gatepack
