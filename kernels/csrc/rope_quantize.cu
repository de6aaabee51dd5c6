// q or k on its way to attention: a norm, rope, a Hadamard matrix over each head, and e4m3 codes or 16 bits; one read, one write.
//
// A CUDA block holds one token. A vector is 8 consecutive channels, and vector i is thread i % threads's, so that the vectors of a
// head lie in neighbouring lanes (head / 8 of them, a power of two): its sums and the upper stages of its Hadamard matrix are
// shuffles, the lower three stages and rope's pairs are within a thread. Arithmetic is fp32, and rounded once, at the end.
#include "rope_quantize.h"

#include "error.h"
#include "fused_strip.cuh"

namespace dvdq {
namespace {

struct RopeParams {
  const uint16_t* x;
  void* out;
  const float* weight;   // [channels] or [head]; null: ones
  const float* bias;     // the same; null: zeros
  const float* cosines;  // [rope_tokens, rope_channels / 2], or rope_channels where per_channel; null: no rope
  const float* sines;
  const float* bound;    // null: 16 bits out
  int64_t stride;        // of x
  uint32_t period;
  uint32_t rope_first;   // the token of a sample that the tables' first row is for
  uint32_t rope_tokens;
  uint32_t vectors;      // of a token
  uint32_t head_lanes;
  uint32_t weight_channels;
  uint32_t rope_channels;
  int norm;
  int rotated;
  int per_channel;
  float channels;        // that the norm is over
  float rest;            // 1 / sqrt(head) where rotated, else 1
  float eps;
};

// e4m3 of a number, to the nearest, ties to even, held to 448; NaN stays NaN. Numbers below 2^-6 are multiples of 2^-9.
DVDQ_DEVICE uint32_t to_e4m3(float value) {
  const uint32_t bits = float_bits(value), sign = (bits >> 24) & 0x80u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7fu;
  const float held = smaller(bits_float(size), 448.0f);
  if (held < 0.015625f) return sign | (float_bits(add(multiply(held, 512.0f), kRounder)) & 0xffu);
  const uint32_t exact = float_bits(held);
  return sign | (((exact + 0x7ffffu + ((exact >> 20) & 1u)) >> 20) - (120u << 3));
}

DVDQ_DEVICE float sum_over_lanes(float value, uint32_t lanes) {
  for (uint32_t mask = 1; mask < lanes; mask *= 2) value = add(value, shuffle_xor(value, static_cast<int>(mask)));
  return value;
}

// Takes the mean of its head from a vector, and returns the sum of the squares that are left of it.
DVDQ_DEVICE float take_mean(const RopeParams& p, float (&v)[8]) {
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int e = 0; e < 8; ++e) sum = add(sum, v[e]);
  const float mean = divide(sum_over_lanes(sum, p.head_lanes), p.channels);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    v[e] = add(v[e], -mean);
    squares = multiply_add(v[e], v[e], squares);
  }
  return squares;
}

DVDQ_DEVICE float inverse_deviation(const RopeParams& p, float squares) {
  return divide(1.0f, square_root(add(divide(squares, p.channels), p.eps)));
}

// The same of every channel's own cosine and sine.
DVDQ_DEVICE void turn_channels(const RopeParams& p, int64_t at, float (&v)[8]) {
  float cosines[8], sines[8];
  strip::load_8(p.cosines + at, cosines);
  strip::load_8(p.sines + at, sines);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float first = v[i], second = v[i + 1];
    v[i] = add(multiply(first, cosines[i]), -multiply(second, sines[i]));
    v[i + 1] = add(multiply(second, cosines[i + 1]), multiply(first, sines[i + 1]));
  }
}

// x1 cos - x2 sin, x2 cos + x1 sin of the four pairs of a vector.
DVDQ_DEVICE void turn_pairs(const RopeParams& p, uint32_t row, uint32_t channel, float (&v)[8]) {
  const int64_t whole = static_cast<int64_t>(row) * p.rope_channels + channel % p.rope_channels, at = whole / 2;
  if (p.per_channel) return turn_channels(p, whole, v);
  const uint4 cosines = load_16(p.cosines + at), sines = load_16(p.sines + at);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float c = bits_float(word(cosines, i)), s = bits_float(word(sines, i));
    const float first = v[2 * i], second = v[2 * i + 1];
    v[2 * i] = add(multiply(first, c), -multiply(second, s));
    v[2 * i + 1] = add(multiply(second, c), multiply(first, s));
  }
}

DVDQ_DEVICE void mix_head(const RopeParams& p, float (&v)[8]) {
#pragma unroll
  for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if ((e & bit) == 0) strip::butterfly(v[e], v[e | bit]);
    }
  }
  for (uint32_t mask = 1; mask < p.head_lanes; mask *= 2) {
    const float sign = (static_cast<uint32_t>(lane_id()) & mask) ? -1.0f : 1.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = multiply_add(v[e], sign, shuffle_xor(v[e], static_cast<int>(mask)));
  }
}

template <bool Half, int Vectors>
__global__ void __launch_bounds__(kRopeThreads) rope_quantize_kernel(const RopeParams p) {
  float* const partial = reinterpret_cast<float*>(dynamic_shared());
  const int64_t token = blockIdx.x;
  // Wraps around for tokens before the first, so that they lie beyond the last.
  const uint32_t row = blockIdx.x % p.period - p.rope_first, threads = blockDim.x;
  const bool turned = p.cosines != nullptr && row < p.rope_tokens;
  float v[Vectors][8];
  float squares[Vectors];
  float all = 0.0f;
#pragma unroll
  for (int i = 0; i < Vectors; ++i) {
    const uint32_t vector = threadIdx.x + static_cast<uint32_t>(i) * threads;
    uint4 raw = make_uint4(0u, 0u, 0u, 0u);
    if (vector < p.vectors) raw = load_once_16(p.x + token * p.stride + 8 * vector);
    strip::unpack_8<Half>(raw, v[i]);
    squares[i] = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) squares[i] = multiply_add(v[i][e], v[i][e], squares[i]);
    all = add(all, squares[i]);
  }
  if (p.norm == DVDQ_ROPE_NORM_ALL) {
    all = sum_over_lanes(all, 32);
    if (lane_id() == 0) partial[warp_id()] = all;
    barrier();
    all = 0.0f;
    for (uint32_t warp = 0; warp < threads / 32; ++warp) all = add(all, partial[warp]);
  }
  const float factor = p.bound == nullptr ? p.rest : multiply(divide(448.0f, larger(*p.bound, 1e-30f)), p.rest);
#pragma unroll
  for (int i = 0; i < Vectors; ++i) {
    const uint32_t vector = threadIdx.x + static_cast<uint32_t>(i) * threads, channel = 8 * vector;
    const bool inside = vector < p.vectors;
    if (p.norm != DVDQ_ROPE_NORM_NONE) {
      if (p.norm == DVDQ_ROPE_NORM_LAYER) squares[i] = take_mean(p, v[i]);
      const float sum = p.norm == DVDQ_ROPE_NORM_ALL ? all : sum_over_lanes(squares[i], p.head_lanes);
      const float inverse = inverse_deviation(p, sum);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[i][e] = multiply(v[i][e], inverse);
      if (p.weight != nullptr && inside) {
        float weight[8];
        strip::load_8(p.weight + channel % p.weight_channels, weight);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[i][e] = multiply(v[i][e], weight[e]);
      }
      if (p.bias != nullptr && inside) {
        float bias[8];
        strip::load_8(p.bias + channel % p.weight_channels, bias);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[i][e] = add(v[i][e], bias[e]);
      }
    }
    if (turned && inside) turn_pairs(p, row, channel, v[i]);
    if (p.rotated) mix_head(p, v[i]);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[i][e] = multiply(v[i][e], factor);
    if (!inside) continue;
    const int64_t to = 8 * (token * p.vectors + vector);
    if (p.bound == nullptr) {
      store_16(static_cast<uint16_t*>(p.out) + to, strip::pack_8<Half>(v[i]));
    } else {
      uint32_t words[2] = {0u, 0u};
#pragma unroll
      for (int e = 0; e < 8; ++e) words[e / 4] |= to_e4m3(v[i][e]) << (8 * (e % 4));
      store_8(static_cast<unsigned char*>(p.out) + to, make_uint2(words[0], words[1]));
    }
  }
}

template <bool Half>
dvdq_status start(const RopeParams& p, int64_t m, cudaStream_t stream) {
  const uint32_t each = p.vectors <= kRopeThreads ? 1 : p.vectors <= 2 * kRopeThreads ? 2 : kRopeVectors;
  const unsigned threads = ((p.vectors + each - 1) / each + 31) / 32 * 32;
  const auto kernel = each == 1   ? rope_quantize_kernel<Half, 1>
                      : each == 2 ? rope_quantize_kernel<Half, 2>
                                  : rope_quantize_kernel<Half, kRopeVectors>;
  return check_cuda(launch(kernel, dim3(static_cast<unsigned>(m)), dim3(threads), sizeof(float) * 32, stream, p), "rope_quantize");
}

}  // namespace

dvdq_status rope_quantize(const dvdq_rope& rope, const void* x, void* out, int64_t m, cudaStream_t stream) {
  RopeParams p{};
  p.x = static_cast<const uint16_t*>(x);
  p.out = out;
  p.weight = rope.weight;
  p.bias = rope.bias;
  p.cosines = rope.rope_channels == 0 ? nullptr : rope.cosines;
  p.sines = rope.sines;
  p.bound = rope.bound;
  p.stride = rope.stride;
  p.period = static_cast<uint32_t>(rope.period);
  p.rope_first = static_cast<uint32_t>(rope.rope_first);
  p.rope_tokens = static_cast<uint32_t>(rope.rope_tokens);
  p.vectors = static_cast<uint32_t>(rope.channels / 8);
  p.head_lanes = static_cast<uint32_t>(rope.head / 8);
  const bool over_all = rope.norm == DVDQ_ROPE_NORM_ALL;
  p.weight_channels = static_cast<uint32_t>(over_all ? rope.channels : rope.head);
  p.rope_channels = static_cast<uint32_t>(rope.rope_channels);
  p.norm = rope.norm;
  p.rotated = rope.rotated;
  p.per_channel = rope.per_channel;
  p.channels = static_cast<float>(p.weight_channels);
  p.rest = 1.0f;
  if (rope.rotated) {
    for (int32_t order = rope.head; order > 1; order /= 2) p.rest *= 0.70710678118654752f;
  }
  p.eps = rope.eps;
  return rope.dtype == DVDQ_FP16 ? start<true>(p, m, stream) : start<false>(p, m, stream);
}

}  // namespace dvdq
