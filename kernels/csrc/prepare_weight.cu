// Packed weight -> prepared weight (prepared.h holds the rules). One block per output row, once per layer at load time.
#include "prepare_weight.h"

#include "codes.cuh"
#include "device.cuh"
#include "error.h"
#include "prepared.h"

namespace dvdq {
namespace {

constexpr int kThreads = 128;

struct Params {
  const unsigned char* packed;  // [n, k / 2]
  const float* scale;
  const unsigned char* factor;  // [n, groups]
  const float* row_zero;        // [n], or
  const unsigned char* byte_zero;  // [n, groups]; the other one is null
  const float* bias;            // may be null
  unsigned char* codes;
  float *to_scale, *to_zero, *to_bias;
  unsigned char *to_factor, *to_group_zero;  // null where the path has none
  int k, groups, width, path;  // width = k / groups
};

// Code 0..7 of a word of nibbles, -8..7.
DVDQ_DEVICE int nibble(uint32_t packed, int i) { return static_cast<int>(packed << (28 - 4 * i)) >> 28; }

DVDQ_DEVICE float zero_of(const Params& p, int64_t row, int group) {
  if (p.byte_zero == nullptr) return p.row_zero[row];
  return add(multiply(int_to_float(p.byte_zero[row * p.groups + group]), 0.0625f), -8.0f);
}

DVDQ_DEVICE float step_of(const Params& p, int64_t row, int group) {
  return multiply(p.scale[row], divide(int_to_float(p.factor[row * p.groups + group]), 255.0f));
}

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

// Greatest |W| of a row, for every thread of the block.
DVDQ_DEVICE float row_maximum(const Params& p, int64_t row, uint32_t* shared) {
  if (threadIdx.x == 0) *shared = 0u;
  barrier();
  float most = 0.0f;
  const unsigned char* const from = p.packed + row * (p.k / 2);
  for (int k = 8 * static_cast<int>(threadIdx.x); k < p.k; k += 8 * kThreads) {
    const uint32_t packed = *reinterpret_cast<const uint32_t*>(from + k / 2);
    const float zero = zero_of(p, row, k / p.width), step = step_of(p, row, k / p.width);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      most = max_magnitude(most, multiply(add(int_to_float(nibble(packed, i)), -zero), step));
    }
  }
  atomic_max_shared(shared, float_bits(most));
  barrier();
  return bits_float(*shared);
}

DVDQ_DEVICE RowRule choose_rule(const Params& p, int64_t row, uint32_t* shared) {
  if (p.groups == 1) {
    const float zero = zero_of(p, row, 0), step = step_of(p, row, 0), half = multiply(step, 0.5f);
    const bool e4m3 = p.path == DVDQ_PATH_E4M3_GROUP;
    // Of any code -8..7, not of those that the row happens to hold: the rule is a matter of the zero-point alone.
    const float reach = max_nan(magnitude(add(-8.0f, -zero)), magnitude(add(7.0f, -zero)));
    const float limit = e4m3 ? 16.0f : 127.0f;
    if (is_integer(zero) && reach <= limit) return {false, 1.0f, 1.0f, 1.0f, step};
    if (is_integer(multiply(zero, 2.0f)) && 2.0f * reach <= limit) return {false, 2.0f, 1.0f, 1.0f, half};
    if (e4m3) {
      const float shrink = 2.0f * reach <= 448.0f ? 1.0f : divide(448.0f, 2.0f * reach);
      return {false, 2.0f, shrink, 1.0f, divide(half, shrink)};
    }
  }
  float most = row_maximum(p, row, shared);
  if (most < kAmaxFloor) most = kAmaxFloor;
  const float unit = divide(most, 127.0f);
  return {true, 1.0f, 1.0f, unit, unit};
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

// Eight codes per step: 4 bytes in, 8 out.
DVDQ_DEVICE void expand_row(const Params& p, const RowRule& rule, int64_t row) {
  const unsigned char* const from = p.packed + row * (p.k / 2);
  for (int k = 8 * static_cast<int>(threadIdx.x); k < p.k; k += 8 * kThreads) {
    const uint32_t packed = *reinterpret_cast<const uint32_t*>(from + k / 2);
    const float zero = zero_of(p, row, k / p.width), step = step_of(p, row, k / p.width);
    uint32_t words[2] = {0u, 0u};
    // Not unrolled: a load-time kernel, and eight copies of a division would not fit the registers.
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const uint32_t byte = expand(rule, p.path == DVDQ_PATH_E4M3_GROUP, zero, step, nibble(packed, i));
      if (i < 4) words[0] |= byte << (8 * i);
      else words[1] |= byte << (8 * (i - 4));
    }
    store_8(p.codes + row * p.k + k, make_uint2(words[0], words[1]));
  }
}

DVDQ_DEVICE void copy_bytes(unsigned char* to, const unsigned char* from, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

DVDQ_DEVICE void copy_row(const Params& p, int64_t row) {
  const int bytes = p.k / 2;
  for (int i = 16 * static_cast<int>(threadIdx.x); i < bytes; i += 16 * kThreads) {
    store_16(p.codes + row * bytes + i, load_16(p.packed + row * bytes + i));
  }
  if (p.to_factor != nullptr) copy_bytes(p.to_factor + row * p.groups, p.factor + row * p.groups, p.groups);
  if (p.to_group_zero != nullptr) copy_bytes(p.to_group_zero + row * p.groups, p.byte_zero + row * p.groups, p.groups);
}

__global__ void __launch_bounds__(kThreads) expand_weight(const Params p) {
  const int64_t row = blockIdx.x;
  uint32_t* const shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  float scale = p.scale[row], zero = 0.0f;
  if (p.path == DVDQ_PATH_S4_TOKEN || p.path == DVDQ_PATH_S4_GROUP) {
    copy_row(p, row);
    if (p.groups == 1) scale = step_of(p, row, 0);
    if (p.to_group_zero == nullptr) zero = zero_of(p, row, 0);
  } else {
    const RowRule rule = choose_rule(p, row, shared);
    expand_row(p, rule, row);
    scale = rule.row_scale;
  }
  if (threadIdx.x == 0) {
    p.to_scale[row] = scale;
    p.to_zero[row] = zero;
    p.to_bias[row] = p.bias == nullptr ? 0.0f : p.bias[row];
  }
}

}  // namespace

dvdq_status prepare_weight(const dvdq_layer& layer, const dvdq_plan& plan, const dvdq_weight& weight, void* prepared,
                           cudaStream_t stream) {
  const PreparedLayout at = prepared_layout(layer, plan.path);
  unsigned char* const base = static_cast<unsigned char*>(prepared);
  Params p{};
  p.packed = static_cast<const unsigned char*>(weight.codes);
  p.scale = weight.scale;
  p.factor = static_cast<const unsigned char*>(weight.factor);
  p.row_zero = layer.float_zero_point ? nullptr : static_cast<const float*>(weight.zero);
  p.byte_zero = layer.float_zero_point ? static_cast<const unsigned char*>(weight.zero) : nullptr;
  p.bias = weight.bias;
  p.codes = base;
  p.to_scale = reinterpret_cast<float*>(base + at.row_scale);
  p.to_zero = reinterpret_cast<float*>(base + at.row_zero);
  p.to_bias = reinterpret_cast<float*>(base + at.bias);
  p.to_factor = at.factor < 0 ? nullptr : base + at.factor;
  p.to_group_zero = at.group_zero < 0 ? nullptr : base + at.group_zero;
  p.k = static_cast<int>(layer.k);
  p.groups = static_cast<int>(layer.weight_groups);
  p.width = p.k / p.groups;
  p.path = plan.path;
  return check_cuda(launch(expand_weight, dim3(static_cast<unsigned>(layer.n)), dim3(kThreads), 16, stream, p), "prepare_weight");
}

}  // namespace dvdq
