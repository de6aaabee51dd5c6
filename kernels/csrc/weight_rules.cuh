// How a 4-bit code becomes the code that a path multiplies: the rules of prepared.h, once for all kernels that expand weights.
#pragma once

#include "codes.cuh"
#include "device.cuh"
#include "dvdquant/kernels.h"

namespace dvdq {

// Code 0..7 of a word of nibbles, -8..7.
DVDQ_DEVICE int nibble(uint32_t packed, int i) { return static_cast<int>(packed << (28 - 4 * i)) >> 28; }

// The zero-point that a byte stands for.
DVDQ_DEVICE float zero_of_byte(unsigned char byte) { return add(multiply(int_to_float(byte), 0.0625f), -8.0f); }

DVDQ_DEVICE float scaled_step(float scale, unsigned char group_scale) { return multiply(scale, divide(int_to_float(group_scale), 255.0f)); }

DVDQ_DEVICE bool is_integer(float value) { return value == round_half_even(value); }

// The e4m3 byte nearest to value (ties to even), |value| <= 448; smallest step 2^-9.
DVDQ_DEVICE uint32_t to_e4m3(float value) {
  const uint32_t sign = float_bits(value) >> 31 << 7;
  const float size = magnitude(value);
  if (size < 0.015625f) return sign | static_cast<uint32_t>(round_half_even(size * 512.0f));
  uint32_t bits = float_bits(size);
  bits += 0x7ffffu + ((bits >> 20) & 1u);
  return sign | ((bits >> 20) - (120u << 3));
}

// How a row is expanded: code = round(d * grow * shrink), or round(d * step / unit) with a step per group; d = c - z.
struct RowRule {
  bool by_step;
  float grow, shrink, unit;
  float row_scale;
};

// The rule of a row with one scale, where its zero-point alone decides it; false where the row's largest weight does.
DVDQ_DEVICE bool rule_of_zero(bool e4m3, float zero, float step, RowRule* rule) {
  const float half = multiply(step, 0.5f);
  // Of any code -8..7, not of those that the row happens to hold: the rule is a matter of the zero-point alone.
  const float reach = max_nan(magnitude(add(-8.0f, -zero)), magnitude(add(7.0f, -zero)));
  const float limit = e4m3 ? 16.0f : 127.0f;
  if (is_integer(zero) && reach <= limit) return *rule = {false, 1.0f, 1.0f, 1.0f, step}, true;
  if (is_integer(multiply(zero, 2.0f)) && 2.0f * reach <= limit) return *rule = {false, 2.0f, 1.0f, 1.0f, half}, true;
  if (!e4m3) return false;
  const float shrink = 2.0f * reach <= 448.0f ? 1.0f : divide(448.0f, 2.0f * reach);
  return *rule = {false, 2.0f, shrink, 1.0f, divide(half, shrink)}, true;
}

DVDQ_DEVICE uint32_t expand(const RowRule& rule, bool e4m3, float zero, float step, int code) {
  float value = add(int_to_float(code), -zero);
  if (rule.by_step) {
    value = divide(multiply(value, step), rule.unit);
  } else {
    value = multiply(multiply(value, rule.grow), rule.shrink);
  }
  if (e4m3) {
    if (magnitude(value) > 448.0f) value = value < 0.0f ? -448.0f : 448.0f;
    return to_e4m3(value);
  }
  float rounded = round_half_even(value);
  if (magnitude(rounded) > 127.0f) rounded = rounded < 0.0f ? -127.0f : 127.0f;
  return static_cast<uint32_t>(static_cast<int>(rounded)) & 255u;
}

// The stored weight that the kernels read; zero-points are `row_zero` [n] or `byte_zero` [n, groups], the other one is null.
struct StoredWeight {
  const unsigned char* packed;  // [n, k / 2]
  const float* scale;           // [n]
  const unsigned char* group_scale;  // [n, groups]
  const float* row_zero;
  const unsigned char* byte_zero;
  int k, groups, width;  // width = k / groups
};

inline StoredWeight stored_weight(const dvdq_layer& layer, const dvdq_weight& weight) {
  StoredWeight w{};
  w.packed = static_cast<const unsigned char*>(weight.codes);
  w.scale = weight.scale;
  w.group_scale = static_cast<const unsigned char*>(weight.group_scale);
  w.row_zero = layer.float_zero_point ? nullptr : static_cast<const float*>(weight.zero);
  w.byte_zero = layer.float_zero_point ? static_cast<const unsigned char*>(weight.zero) : nullptr;
  w.k = static_cast<int>(layer.k);
  w.groups = static_cast<int>(layer.weight_groups);
  w.width = w.k / w.groups;
  return w;
}

DVDQ_DEVICE float zero_of(const StoredWeight& w, int64_t row, int group) {
  return w.byte_zero == nullptr ? w.row_zero[row] : zero_of_byte(w.byte_zero[row * w.groups + group]);
}

DVDQ_DEVICE float step_of(const StoredWeight& w, int64_t row, int group) {
  return scaled_step(w.scale[row], w.group_scale[row * w.groups + group]);
}

// Copies bytes by all threads of a block of Threads.
template <int Threads>
DVDQ_DEVICE void copy_bytes(unsigned char* to, const unsigned char* from, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += Threads) to[i] = from[i];
}

// The int8 or e4m3 rule of a row, for every thread of a block of Threads; `shared` is a word that they share.
template <int Threads>
DVDQ_DEVICE RowRule choose_rule(const StoredWeight& w, bool e4m3, int64_t row, uint32_t* shared) {
  RowRule rule;
  if (w.groups == 1 && rule_of_zero(e4m3, zero_of(w, row, 0), step_of(w, row, 0), &rule)) return rule;
  // Greatest |W| of the row.
  if (threadIdx.x == 0) *shared = 0u;
  barrier();
  float most = 0.0f;
  const unsigned char* const from = w.packed + row * (w.k / 2);
  for (int k = 8 * static_cast<int>(threadIdx.x); k < w.k; k += 8 * Threads) {
    const uint32_t packed = *reinterpret_cast<const uint32_t*>(from + k / 2);
    const float zero = zero_of(w, row, k / w.width), step = step_of(w, row, k / w.width);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      most = max_magnitude(most, multiply(add(int_to_float(nibble(packed, i)), -zero), step));
    }
  }
  atomic_max_shared(shared, float_bits(most));
  barrier();
  most = bits_float(*shared);
  if (most < kAmaxFloor) most = kAmaxFloor;
  const float unit = divide(most, 127.0f);
  return {true, 1.0f, 1.0f, unit, unit};
}

}  // namespace dvdq
