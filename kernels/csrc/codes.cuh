// From rotated fp32 values to codes: one definition for every rotate_quantize kernel (dvdquant/numerics/activation_grid.py).
//
//   amax = max(max|x|, 2^-100), scale = amax / qmax, code = clamp(rint(x * (qmax / amax)), -qmax, qmax)
//
// |x| <= amax makes |x * (qmax / amax)| <= qmax (1 + 2^-22), which rounds to at most qmax: the clamp never acts.
#pragma once

#include "device.cuh"
#include "dvdquant/kernels.h"

namespace dvdq {

// Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it as the low bits of the sum, in two's complement.
constexpr float kRounder = 12582912.0f;
constexpr float kAmaxFloor = 7.888609052210118e-31f;  // 2^-100

struct Quantizer {
  float scale;       // NaN or Inf where a value of the group is
  float multiplier;  // of a raw value
  uint32_t keep;     // all ones; zero where the scale is not finite, whose codes are 0
};

// raw_amax: bits of max|raw| (a NaN is larger than every number as bits); x = raw * rest.
DVDQ_DEVICE Quantizer make_quantizer(uint32_t raw_amax, float qmax, float rest) {
  float amax = multiply(bits_float(raw_amax), rest);
  if (amax < kAmaxFloor) amax = kAmaxFloor;
  const bool finite = (float_bits(amax) & 0x7f800000u) != 0x7f800000u;
  Quantizer q;
  q.scale = divide(amax, qmax);
  q.multiplier = finite ? multiply(divide(qmax, amax), rest) : 0.0f;
  q.keep = finite ? 0xffffffffu : 0u;
  return q;
}

// max(a, |x|) that keeps a NaN.
DVDQ_DEVICE float max_magnitude(float a, float x) { return max_nan(a, magnitude(x)); }

// Four int8 codes, the first in the low byte.
DVDQ_DEVICE uint32_t quantize4(float a, float b, float c, float d, const Quantizer& q) {
  const uint32_t i = float_bits(add(multiply(a, q.multiplier), kRounder));
  const uint32_t j = float_bits(add(multiply(b, q.multiplier), kRounder));
  const uint32_t k = float_bits(add(multiply(c, q.multiplier), kRounder));
  const uint32_t l = float_bits(add(multiply(d, q.multiplier), kRounder));
  return byte_permute(byte_permute(i, j, 0x0040), byte_permute(k, l, 0x0040), 0x5410) & q.keep;
}

// Eight int8 codes in -8..7 to eight nibbles, the first in the lowest.
DVDQ_DEVICE uint32_t pack_nibbles(uint32_t low, uint32_t high) {
  low &= 0x0f0f0f0fu;
  high &= 0x0f0f0f0fu;
  return byte_permute(low | (low >> 4), high | (high >> 4), 0x6420);
}

// Four int8 codes in -7..7 to e4m3: bytes of 0..7 looked up by magnitude, then the sign.
DVDQ_DEVICE uint32_t codes_to_e4m3(uint32_t codes) {
  const uint32_t negative = byte_permute(codes, 0u, 0xba98);  // 0xff where the code is negative
  const uint32_t magnitudes = (codes ^ negative) + (negative & 0x01010101u);
  const uint32_t pairs = magnitudes | (magnitudes >> 4);
  const uint32_t selector = byte_permute(pairs, 0u, 0x4420);
  // e4m3 of 0, 1, 2, 3 and of 4, 5, 6, 7.
  return byte_permute(0x44403800u, 0x4e4c4a48u, selector) | (negative & 0x80808080u);
}

// Eight channels of x times their scales plus their offsets, both at `pre_quant`.
template <bool Half>
DVDQ_DEVICE void pre_quant_8(uint4& x, const uint16_t* pre_quant) {
  const uint4 scale = load_16(pre_quant), offset = load_16(pre_quant + 8);
  x.x = multiply_add_16bit2<Half>(x.x, scale.x, offset.x);
  x.y = multiply_add_16bit2<Half>(x.y, scale.y, offset.y);
  x.z = multiply_add_16bit2<Half>(x.z, scale.z, offset.z);
  x.w = multiply_add_16bit2<Half>(x.w, scale.w, offset.w);
}

// Rounded codes of 8 consecutive channels as they are stored: one word of nibbles, or two words of bytes.
template <int Codes>
struct Stored {
  static constexpr int kBytesPer16 = Codes == DVDQ_CODES_S4 ? 8 : 16;
};

}  // namespace dvdq
