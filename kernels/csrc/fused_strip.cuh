// RQ of what the operations before a layer make of x, in the same pass: a gated residual, a norm, a modulation; or GELU.
//
// Units, lanes and the rotation are those of rotate_strip.cuh. A CUDA block holds whole tokens, so that a norm needs one
// barrier: each unit of 256 channels gives its mean and its squared deviations from that mean, and every thread puts those of
// its token together in the same order. Arithmetic is fp32; values are rounded to 16 bits where the definition
// (dvdquant/ops/fused.py) says so, which is where the operations apart would have rounded them last.
#pragma once

#include "rotate_strip.cuh"

namespace dvdq {
namespace strip {

// With fewer, the tensor step spills behind the loads of y and the rows; with more, GELU's does on SM 12.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFusedRegisters = 120;
#else
constexpr int kFusedRegisters = 112;
#endif
constexpr int kGeluRegisters = 112;

struct Prologue {
  const uint16_t* y;        // [m, k], added to x; null: none
  const float* gate;        // rows of [k]; null: ones
  const float* multiplier;  // rows of [k]; null: ones
  const float* addend;      // rows of [k]; null: zeros
  uint16_t* hidden;         // [m, k], x + gate * y; null: not stored
  int64_t gate_stride, modulate_stride;
  uint32_t gate_tokens, modulate_tokens;  // tokens per row; 0 = one row for all
  float eps;
  int norm;
};

template <bool Half>
DVDQ_DEVICE void unpack_2(uint32_t pair, float& low, float& high) {
  if constexpr (Half) {
    low = fp16_to_float(static_cast<uint16_t>(pair));
    high = fp16_to_float(static_cast<uint16_t>(pair >> 16));
  } else {
    low = bits_float(pair << 16);
    high = bits_float(pair & 0xffff0000u);
  }
}

template <bool Half>
DVDQ_DEVICE void unpack_8(const uint4& vector, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_2<Half>(word(vector, i), values[2 * i], values[2 * i + 1]);
}

template <bool Half>
DVDQ_DEVICE uint32_t pack_2(float low, float high) {
  if constexpr (Half) return pack_fp16(low, high);
  return pack_bf16(low, high);
}

template <bool Half>
DVDQ_DEVICE uint4 pack_8(const float (&values)[8]) {
  return make_uint4(pack_2<Half>(values[0], values[1]), pack_2<Half>(values[2], values[3]),
                    pack_2<Half>(values[4], values[5]), pack_2<Half>(values[6], values[7]));
}

DVDQ_DEVICE void load_8(const float* from, float (&values)[8]) {
  const uint4 low = load_16(from), high = load_16(from + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = bits_float(word(low, i));
    values[4 + i] = bits_float(word(high, i));
  }
}

// The row of `rows` that a token reads.
DVDQ_DEVICE const float* row_of(const float* rows, int64_t stride, uint32_t tokens, int64_t token) {
  return tokens == 0u ? rows : rows + static_cast<int64_t>(static_cast<uint32_t>(token) / tokens) * stride;
}

DVDQ_DEVICE bool holds(const Params& p, const Place& place, int vector) {
  return place.token >= 0 && place.channel + 32 * vector + 8 * (lane_id() & 3) < p.channels;
}

// x + gate * y, rounded; stored where it is wanted.
template <bool Half>
DVDQ_DEVICE void add_residual(const Params& p, const Prologue& f, const Place& place, uint4 (&raw)[8]) {
  const int64_t first = place.token * p.channels + place.channel + 8 * (lane_id() & 3);
  uint4 other[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    other[i] = make_uint4(0u, 0u, 0u, 0u);
    if (holds(p, place, i)) other[i] = load_once_16(f.y + first + 32 * i);
  }
  const float* const gate = f.gate == nullptr ? nullptr : row_of(f.gate, f.gate_stride, f.gate_tokens, place.token);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!holds(p, place, i)) continue;
    float x[8], y[8];
    unpack_8<Half>(raw[i], x);
    unpack_8<Half>(other[i], y);
    if (gate != nullptr) {
      float factor[8];
      load_8(gate + place.channel + 32 * i + 8 * (lane_id() & 3), factor);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = add(x[e], multiply(y[e], factor[e]));
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = add(x[e], y[e]);
    }
    raw[i] = pack_8<Half>(x);
    if (f.hidden != nullptr) store_16(f.hidden + first + 32 * i, raw[i]);
  }
}

DVDQ_DEVICE float sum_over_quad(float value) {
  value = add(value, shuffle_xor(value, 1));
  return add(value, shuffle_xor(value, 2));
}

// Mean (layer norm) or 0 (RMS norm), and the squared deviations from it, of one unit.
template <bool Half>
DVDQ_DEVICE float2 unit_moments(const Params& p, const Prologue& f, const Place& place, const uint4 (&raw)[8]) {
  float mean = 0.0f;
  if (f.norm == DVDQ_NORM_LAYER) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float x[8];
      unpack_8<Half>(raw[i], x);  // zeros past the end
#pragma unroll
      for (int e = 0; e < 8; ++e) mean = add(mean, x[e]);
    }
    const int left = p.channels - place.channel;
    mean = divide(sum_over_quad(mean), int_to_float(left < kUnitChannels ? left : kUnitChannels));
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!holds(p, place, i)) continue;
    float x[8];
    unpack_8<Half>(raw[i], x);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float deviation = add(x[e], -mean);
      squares = multiply_add(deviation, deviation, squares);
    }
  }
  return make_float2(mean, sum_over_quad(squares));
}

// Mean and 1 / standard deviation of a token from the moments of its units, in the order of its channels.
DVDQ_DEVICE float2 token_moments(const Params& p, const Prologue& f, const float2* moments) {
  const float channels = int_to_float(p.channels);
  const int last = p.channels - (static_cast<int>(p.strips) - 1) * kUnitChannels;
  float mean = 0.0f;
  if (f.norm == DVDQ_NORM_LAYER) {
    for (uint32_t s = 0; s < p.strips; ++s) {
      const float size = s + 1 == p.strips ? int_to_float(last) : static_cast<float>(kUnitChannels);
      mean = multiply_add(moments[s].x, size, mean);
    }
    mean = divide(mean, channels);
  }
  float squares = 0.0f;
  for (uint32_t s = 0; s < p.strips; ++s) {
    const float size = s + 1 == p.strips ? int_to_float(last) : static_cast<float>(kUnitChannels);
    const float deviation = add(moments[s].x, -mean);
    squares = add(squares, multiply_add(multiply(deviation, deviation), size, moments[s].y));
  }
  return make_float2(mean, divide(1.0f, square_root(add(divide(squares, channels), f.eps))));
}

// multiplier * (x - mean) * inverse + addend, rounded.
template <bool Half>
DVDQ_DEVICE void modulate(const Params& p, const Prologue& f, const Place& place, float2 moments, uint4 (&raw)[8]) {
  const int64_t token = place.token < 0 ? 0 : place.token;
  const int own = place.channel + 8 * (lane_id() & 3);
  const float* const multiplier = row_of(f.multiplier, f.modulate_stride, f.modulate_tokens, token);
  const float* const addend = row_of(f.addend, f.modulate_stride, f.modulate_tokens, token);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!holds(p, place, i)) continue;
    float x[8], factor[8];
    unpack_8<Half>(raw[i], x);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = multiply(add(x[e], -moments.x), moments.y);
    if (f.multiplier != nullptr) {
      load_8(multiplier + own + 32 * i, factor);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = multiply(x[e], factor[e]);
    }
    if (f.addend != nullptr) {
      load_8(addend + own + 32 * i, factor);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = add(x[e], factor[e]);
    }
    raw[i] = pack_8<Half>(x);
  }
}

// GELU by tanh, as x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): no cancellation where x is negative.
DVDQ_DEVICE float gelu(float x) {
  constexpr float kLinear = 2.302208198f, kCubic = 0.1029432397f;  // 2 log2(e) sqrt(2 / pi), and 0.044715 times it
  const float exponent = multiply(x, multiply_add(multiply(x, x), kCubic, kLinear));
  return divide_approximately(x, add(1.0f, power_of_two(-exponent)));
}

template <bool Half>
DVDQ_DEVICE void apply_gelu(uint4 (&raw)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float x[8];
    unpack_8<Half>(raw[i], x);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = gelu(x[e]);
    raw[i] = pack_8<Half>(x);
  }
}

// A block holds block_tokens tokens, a warp 8 of their strips; scales per token or per group.
template <bool Half, int Codes, bool Gelu>
__global__ void __maxnreg__(Gelu ? kGeluRegisters : kFusedRegisters) fused_quantize(const Params p, const Prologue f) {
  uint32_t* const amax = reinterpret_cast<uint32_t*>(dynamic_shared());
  int* const sums = reinterpret_cast<int*>(amax + p.block_tokens);
  float2* const moments = reinterpret_cast<float2*>(sums + p.block_tokens);
  const uint32_t tid = threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.block_tokens;
  if (tid < p.block_tokens) {
    amax[tid] = 0u;
    sums[tid] = 0;
  }
  const uint32_t unit = static_cast<uint32_t>(warp_id()) * kWarpUnits, lane = static_cast<uint32_t>(lane_id());
  const uint32_t own_unit = unit + (lane >> 2);
  const Place loaded = place_unit(p, first, own_unit);
  uint4 raw[8];
  load_units(p, loaded, raw);
  if constexpr (Gelu) {
    apply_gelu<Half>(raw);
    barrier();
  } else {
    if (f.y != nullptr) add_residual<Half>(p, f, loaded, raw);
    float2 token = make_float2(0.0f, 1.0f);
    if (f.norm != DVDQ_NORM_NONE) {
      const float2 own = unit_moments<Half>(p, f, loaded, raw);
      if ((lane & 3u) == 0u && loaded.token >= 0) moments[own_unit] = own;
    }
    barrier();
    if (f.norm != DVDQ_NORM_NONE && loaded.token >= 0) token = token_moments(p, f, moments + own_unit / p.strips * p.strips);
    modulate<Half>(p, f, loaded, token, raw);
  }
  float v[2][8][4];
  rotate_units<Half>(p, loaded, raw, v);
  // 1/sqrt(2) of odd powers; the power of two is in the matrix.
  const float rest = (p.log2_block & 1) ? 0.70710678118654752f : 1.0f;
  Place place[2];
  uint32_t most[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    place[c] = place_unit(p, first, unit + 2 * (lane & 3u) + static_cast<uint32_t>(c));
    most[c] = max_over_lanes(amax_of(v, c), p.act_group);
    if (p.act_group == 0 && lane < 4 && place[c].token >= 0) atomic_max_shared(amax + (place[c].token - first), most[c]);
  }
  if (p.act_group == 0) barrier();
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const bool inside = place[c].token >= 0;
    if (p.act_group == 0) most[c] = inside ? amax[place[c].token - first] : 0u;
    const Quantizer q = make_quantizer(most[c], p.qmax, rest);
    unsigned char* const to = code_address<Codes>(p, place[c], 0);
    int sum = store_codes<Codes>(v[0], c, q, to) + store_codes<Codes>(v[1], c, q, code_address<Codes>(p, place[c], 1));
    sum = sum_over_lanes(sum, p.act_group);
    if (p.act_group == 0) {
      if (lane < 4 && inside) atomic_add_shared(sums + (place[c].token - first), sum);
    } else if (to != nullptr && (lane >> 2 & (p.act_group == 64 ? 1u : 3u)) == 0) {
      // The first lane of each group writes for it.
      const int64_t at = int64_t{(place[c].channel + own_channel()) / p.act_group} * p.tokens + place[c].token;
      p.scales[at] = q.scale;
      if (p.sums != nullptr) p.sums[at] = int_to_float(sum);
    }
  }
  if (p.act_group != 0) return;
  if (p.sums != nullptr) barrier();
  if (tid < p.block_tokens && first + tid < p.tokens) {
    p.scales[first + tid] = make_quantizer(amax[tid], p.qmax, rest).scale;
    if (p.sums != nullptr) p.sums[first + tid] = int_to_float(sums[tid]);
  }
}

}  // namespace strip
}  // namespace dvdq
