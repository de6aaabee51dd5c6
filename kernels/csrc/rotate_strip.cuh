// RQ without an outer factor: one read of x, one write of the codes, the row in registers in between.
//
// Work is cut into units, a unit being a strip of 256 channels of one token; a warp takes 8 units. Within a strip the
// bits of a channel's number are mixed in two steps, which also turn the layout from one that loads well into one that
// stores well, without a shuffle:
//
//   load      lane (g, t) reads unit g: channel bits 0-2 in a 16-byte vector, 3-4 = t, 5-7 over its 8 vectors
//   tensor    bits 3, 4, 6, 7 are mixed by a 16 x 16 Hadamard matrix times 16 x 8 values of 8 units (fp32 sums of exact
//             products); one product per value of bits 0-2 and 5
//   add       bits 0, 1, 2, 5 by butterflies in registers
//   blocks of 512, 1024, 2048 mix strips: neighbouring units lie in a register pair, then in lanes t
//   store     lane (g, t) holds units 2t and 2t + 1: channel bits 0-3 and 5 in registers, g = bits 4, 6, 7
//
// A bit beyond the block is left alone: the matrix is the identity there, and its butterflies are skipped. Products with
// its zeros spread a NaN or an Inf over the strip; y of such a token is not finite anywhere anyway.
#pragma once

#include "codes.cuh"
#include "rotate_quantize.h"

namespace dvdq {
namespace strip {

constexpr int kUnitChannels = 256;
constexpr int kWarpUnits = 8;
constexpr int kMaxWarps = 16;
// Room for 20 warps per SM on SM 8 and 9, where the compiler would take 104 registers by itself; on SM 10 and 12, 96 spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRegisters = 104;
#else
constexpr int kRegisters = 96;
#endif

struct Params {
  const uint16_t* x;
  const uint16_t* pre_quant;  // [channels / 8, 2, 8]: scales, offsets; null: none
  unsigned char* codes;
  float* scales;
  float* sums;        // null: none
  int64_t tokens;     // m
  int channels;       // k
  uint32_t strips;    // per token
  uint32_t block_tokens;  // tokens of a CUDA block; grouped scales: 0, units run through the whole matrix
  int log2_block;
  int act_group;      // 64, 128; 0 = token
  float qmax;
};

// One entry of the tensor step's matrix as 16 bits: ±2^-floor(log2_block / 2) or 0. Its bits 0, 1, 2, 3 are:
// output i: channel bits 4, 6, 7, 3 (rows g of a lane, then the register); input j: channel bits 6, 3, 4, 7.
template <bool Half>
DVDQ_DEVICE uint32_t matrix_entry(int i, int j, int log2_block) {
  const int out = ((i & 8) >> 0) | ((i & 1) << 4) | ((i & 6) << 5);  // bits 3, 4, 6 and 7 of the channel
  const int in = ((j & 1) << 6) | ((j & 6) << 2) | ((j & 8) << 4);
  const int mixed = (1 << log2_block) - 1;
  if (((out ^ in) & ~mixed & 0xd8) != 0) return 0;
  const int shift = log2_block >> 1;
  const uint32_t one = Half ? static_cast<uint32_t>(15 - shift) << 10 : static_cast<uint32_t>(127 - shift) << 7;
  return one | ((popcount(static_cast<uint32_t>(out & in & mixed)) & 1) ? 0x8000u : 0u);
}

template <bool Half>
DVDQ_DEVICE void make_matrix(uint32_t (&a)[4], int log2_block) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int i = g + 8 * (r & 1), j = 2 * t + 8 * (r >> 1);
    a[r] = matrix_entry<Half>(i, j, log2_block) | (matrix_entry<Half>(i, j + 1, log2_block) << 16);
  }
}

DVDQ_DEVICE void butterfly(float& a, float& b) {
  const float sum = add(a, b);
  b = add(a, -b);
  a = sum;
}

// v[bit 5][bits 0-2][unit bit 0 | bit 3 << 1]; mixes channel bits 0, 1, 2, 5 and 8, 9, 10.
DVDQ_DEVICE void mix_registers(float (&v)[2][8][4], int log2_block) {
#pragma unroll
  for (int bit = 0; bit < 3; ++bit) {
    if (log2_block <= bit) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e & (1 << bit)) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) butterfly(v[i >> 2][e][i & 3], v[i >> 2][e | (1 << bit)][i & 3]);
    }
  }
  if (log2_block > 5) {
#pragma unroll
    for (int i = 0; i < 32; ++i) butterfly(v[0][i >> 2][i & 3], v[1][i >> 2][i & 3]);
  }
  if (log2_block > 8) {
#pragma unroll
    for (int i = 0; i < 32; ++i) butterfly(v[i >> 4][(i >> 1) & 7][2 * (i & 1)], v[i >> 4][(i >> 1) & 7][2 * (i & 1) + 1]);
  }
  for (int lane_bit = 1; lane_bit <= 2; lane_bit *= 2) {
    if (log2_block <= 8 + lane_bit) continue;
    const float sign = (lane_id() & lane_bit) ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      float& own = v[i >> 5][(i >> 2) & 7][i & 3];
      own = multiply_add(own, sign, shuffle_xor(own, lane_bit));
    }
  }
}

// Where a unit lies: its token and the first channel of its strip. A unit past the end has token -1.
struct Place {
  int64_t token;
  int channel;
};

DVDQ_DEVICE Place place_unit(const Params& p, int64_t first_token, uint32_t unit) {
  const uint32_t token = unit / p.strips;
  const bool inside = first_token + token < p.tokens && (p.block_tokens == 0 || token < p.block_tokens);
  return {inside ? first_token + token : -1, static_cast<int>((unit - token * p.strips) * kUnitChannels)};
}

// Loads a warp's 8 units: vector i of a lane holds the 8 channels from place.channel + 32 i + 8 t. Zeros past the end.
DVDQ_DEVICE void load_units(const Params& p, const Place& place, uint4 (&raw)[8]) {
  const int t = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int channel = place.channel + 32 * i + 8 * t;
    raw[i] = make_uint4(0u, 0u, 0u, 0u);
    if (place.token >= 0 && channel < p.channels) raw[i] = load_once_16(p.x + place.token * p.channels + channel);
  }
}

// Balances loaded units and runs both steps.
template <bool Half>
DVDQ_DEVICE void rotate_units(const Params& p, const Place& place, uint4 (&raw)[8], float (&v)[2][8][4]) {
  const int t = lane_id() & 3;
  uint32_t a[4];
  make_matrix<Half>(a, p.log2_block);
#pragma unroll
  for (int bit5 = 0; bit5 < 2; ++bit5) {
    // Half of the vectors at a time, which is what the registers carry.
#pragma unroll
    for (int i = bit5; i < 8; i += 2) {
      const int channel = place.channel + 32 * i + 8 * t;
      if (p.pre_quant != nullptr && channel < p.channels) pre_quant_8<Half>(raw[i], p.pre_quant + 2 * channel);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      // Input bit 0 (a register's halves) = channel bit 6, input bit 3 (the two registers) = channel bit 7.
      const uint32_t selector = (e & 1) ? 0x7632u : 0x5410u;
      const uint32_t b[2] = {byte_permute(word(raw[bit5], e >> 1), word(raw[bit5 + 2], e >> 1), selector),
                             byte_permute(word(raw[bit5 + 4], e >> 1), word(raw[bit5 + 6], e >> 1), selector)};
#pragma unroll
      for (int i = 0; i < 4; ++i) v[bit5][e][i] = 0.0f;
      mma_16bit_16x8x16<Half>(v[bit5][e], a, b);
    }
  }
  mix_registers(v, p.log2_block);
}

// Quantizes the 16 channels of unit bit `c` and channel bit 5 that this thread holds, stores them, returns their sum.
template <int Codes>
DVDQ_DEVICE int store_codes(const float (&v)[8][4], int c, const Quantizer& q, unsigned char* to) {
  uint32_t words[4];
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Channel bit 3 is bit 1 of the accumulator's number.
    const int r = c + 2 * (i >> 1), e = 4 * (i & 1);
    words[i] = quantize4(v[e][r], v[e + 1][r], v[e + 2][r], v[e + 3][r], q);
    sum = dot4(words[i], 0x01010101u, sum);
    if constexpr (Codes == DVDQ_CODES_E4M3) words[i] = codes_to_e4m3(words[i]);
  }
  if (to == nullptr) return 0;
  if constexpr (Codes == DVDQ_CODES_S4) {
    store_8(to, make_uint2(pack_nibbles(words[0], words[1]), pack_nibbles(words[2], words[3])));
  } else {
    store_16(to, make_uint4(words[0], words[1], words[2], words[3]));
  }
  return sum;
}

DVDQ_DEVICE uint32_t amax_of(const float (&v)[2][8][4], int c) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 32; ++i) amax = max_magnitude(amax, v[i >> 4][(i >> 1) & 7][c + 2 * (i & 1)]);
  return float_bits(amax);
}

// Over the lanes of a group of channels: g bit 0 is channel bit 4, g bit 1 bit 6, g bit 2 bit 7.
DVDQ_DEVICE uint32_t max_over_lanes(uint32_t value, int act_group) {
#pragma unroll
  for (int mask = 4; mask <= 16; mask *= 2) {
    if (act_group != 0 && act_group < 16 * mask) continue;
    const uint32_t other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}
DVDQ_DEVICE int sum_over_lanes(int value, int act_group) {
#pragma unroll
  for (int mask = 4; mask <= 16; mask *= 2) {
    if (act_group != 0 && act_group < 16 * mask) continue;
    value += shuffle_xor(value, mask);
  }
  return value;
}

// Channel of this thread's first value with channel bit 5 = 0, within its strip.
DVDQ_DEVICE int own_channel() {
  const int g = lane_id() >> 2;
  return ((g & 1) << 4) | ((g & 6) << 5);
}

template <int Codes>
DVDQ_DEVICE unsigned char* code_address(const Params& p, const Place& place, int bit5) {
  const int channel = place.channel + own_channel() + 32 * bit5;
  if (place.token < 0 || channel >= p.channels) return nullptr;
  const int64_t element = place.token * p.channels + channel;
  return p.codes + (Codes == DVDQ_CODES_S4 ? element / 2 : element);
}

// One scale per token. A block holds block_tokens tokens, a warp 8 of their strips.
template <bool Half, int Codes>
__global__ void __maxnreg__(kRegisters) rotate_quantize_token(const Params p) {
  uint32_t* amax = reinterpret_cast<uint32_t*>(dynamic_shared());
  int* sums = reinterpret_cast<int*>(amax + p.block_tokens);
  const uint32_t tid = threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.block_tokens;
  if (tid < p.block_tokens) {
    amax[tid] = 0u;
    sums[tid] = 0;
  }
  barrier();
  float v[2][8][4];
  uint4 raw[8];
  const uint32_t unit = static_cast<uint32_t>(warp_id()) * kWarpUnits, lane = static_cast<uint32_t>(lane_id());
  const Place loaded = place_unit(p, first, unit + (lane >> 2));
  load_units(p, loaded, raw);
  rotate_units<Half>(p, loaded, raw, v);
  // 1/sqrt(2) of odd powers; the power of two is in the matrix.
  const float rest = (p.log2_block & 1) ? 0.70710678118654752f : 1.0f;
  Place place[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    place[c] = place_unit(p, first, unit + 2 * (lane & 3u) + static_cast<uint32_t>(c));
    const uint32_t most = max_over_lanes(amax_of(v, c), 0);
    if (lane < 4 && place[c].token >= 0) atomic_max_shared(amax + (place[c].token - first), most);
  }
  barrier();
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const bool inside = place[c].token >= 0;
    const Quantizer q = make_quantizer(inside ? amax[place[c].token - first] : 0u, p.qmax, rest);
    int sum = store_codes<Codes>(v[0], c, q, code_address<Codes>(p, place[c], 0)) +
              store_codes<Codes>(v[1], c, q, code_address<Codes>(p, place[c], 1));
    if (p.sums != nullptr) {
      sum = sum_over_lanes(sum, 0);
      if (lane < 4 && inside) atomic_add_shared(sums + (place[c].token - first), sum);
    }
  }
  if (p.sums != nullptr) barrier();
  if (tid < p.block_tokens && first + tid < p.tokens) {
    p.scales[first + tid] = make_quantizer(amax[tid], p.qmax, rest).scale;
    if (p.sums != nullptr) p.sums[first + tid] = int_to_float(sums[tid]);
  }
}

// One scale per 64 or 128 channels: every warp is on its own.
template <bool Half, int Codes>
__global__ void __maxnreg__(kRegisters) rotate_quantize_group(const Params p) {
  const uint32_t unit = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * kWarpUnits;
  const uint32_t lane = static_cast<uint32_t>(lane_id());
  float v[2][8][4];
  uint4 raw[8];
  const Place loaded = place_unit(p, 0, unit + (lane >> 2));
  load_units(p, loaded, raw);
  rotate_units<Half>(p, loaded, raw, v);
  const float rest = (p.log2_block & 1) ? 0.70710678118654752f : 1.0f;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const Place place = place_unit(p, 0, unit + 2 * (lane & 3u) + static_cast<uint32_t>(c));
    const Quantizer q = make_quantizer(max_over_lanes(amax_of(v, c), p.act_group), p.qmax, rest);
    unsigned char* const to = code_address<Codes>(p, place, 0);
    int sum = store_codes<Codes>(v[0], c, q, to) + store_codes<Codes>(v[1], c, q, code_address<Codes>(p, place, 1));
    sum = sum_over_lanes(sum, p.act_group);
    // The first lane of each group writes for it.
    if (to != nullptr && (lane >> 2 & (p.act_group == 64 ? 1u : 3u)) == 0) {
      const int64_t at = int64_t{(place.channel + own_channel()) / p.act_group} * p.tokens + place.token;
      p.scales[at] = q.scale;
      if (p.sums != nullptr) p.sums[at] = int_to_float(sum);
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------------------------

inline int log2_of(int power) {
  int exponent = 0;
  while ((1 << exponent) < power) ++exponent;
  return exponent;
}

// Tokens per CUDA block: few idle units in its last warp, and at least 4 warps to share the wait for memory.
inline uint32_t choose_block_tokens(uint32_t strips) {
  uint32_t best = 1;
  double most = 0.0;
  for (uint32_t tokens = 1; tokens <= 16; ++tokens) {
    const uint32_t units = tokens * strips, warps = (units + kWarpUnits - 1) / kWarpUnits;
    if (warps > kMaxWarps || (tokens > 1 && warps > 8)) break;
    const double used = static_cast<double>(units) / (warps * kWarpUnits) * (warps < 4 ? 0.25 * warps : 1.0);
    if (used > most + 1e-9) {
      most = used;
      best = tokens;
    }
  }
  return best;
}

// block_tokens is set where whole tokens share a CUDA block.
inline Params make_params(const dvdq_layer& layer, const RotateArgs& args, float qmax, bool whole_tokens) {
  Params p{};
  p.x = static_cast<const uint16_t*>(args.x);
  p.pre_quant = static_cast<const uint16_t*>(args.pre_quant);
  p.codes = static_cast<unsigned char*>(args.codes);
  p.scales = args.scales;
  p.sums = args.sums;
  p.tokens = args.m;
  p.channels = static_cast<int>(layer.k);
  p.strips = static_cast<uint32_t>((layer.k + kUnitChannels - 1) / kUnitChannels);
  p.block_tokens = whole_tokens ? choose_block_tokens(p.strips) : 0;
  p.log2_block = log2_of(layer.block);
  p.act_group = layer.act_group;
  p.qmax = qmax;
  return p;
}

}  // namespace strip
}  // namespace dvdq
