// RQ with an outer factor: x̃ = outerᵀ @ (x @ hadamard) per block of p · b channels, one CUDA block per token, the row in
// shared memory as fp32 (K <= 20480). The outer product is p multiply-adds per channel on the ordinary cores: this path
// is for the full-row rotations of recipe `paper`, not for speed.
#pragma once

#include "codes.cuh"

namespace dvdq {
namespace outer {

// A thread computes tiles of Rows x Columns values of the outer product (Rows divides p, Columns divides b), kTileValues
// in all, and holds them until the whole block has read the row.
constexpr int kTileValues = 32;
constexpr int kMaxThreads = 640;

struct Params {
  const uint16_t* x;
  const uint16_t* pre_quant;  // [channels / 8, 2, 8]: scales, offsets; null: none
  const float* matrix;  // [p, p]
  unsigned char* codes;
  float* scales;
  float* sums;          // null: none
  int64_t tokens;
  int channels, padded_channels, log2_block, order, groups;  // order = p; groups = scales per token
  float qmax;
};

// Padding that keeps strided passes off the same banks: 8 floats per 128.
DVDQ_DEVICE int padded(int channel) { return channel + (channel >> 7) * 8; }

// Eight neighbouring channels per step: load, convert, normalize, mix bits 0 to 2.
template <bool Half>
DVDQ_DEVICE void load_row(const Params& p, int64_t token, float* row) {
  const uint16_t* const from = p.x + token * p.channels;
  // The power of two of 1/sqrt(b): exact.
  const float unit = bits_float(static_cast<uint32_t>(127 - (p.log2_block >> 1)) << 23);
  for (int channel = 8 * static_cast<int>(threadIdx.x); channel < p.channels; channel += 8 * static_cast<int>(blockDim.x)) {
    uint4 raw = load_once_16(from + channel);
    if (p.pre_quant != nullptr) pre_quant_8<Half>(raw, p.pre_quant + 2 * channel);
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = static_cast<uint16_t>(word(raw, i >> 1) >> (16 * (i & 1)));
      v[i] = multiply(Half ? fp16_to_float(bits) : bf16_to_float(bits), unit);
    }
#pragma unroll
    for (int bit = 0; bit < 3; ++bit) {
      if (p.log2_block <= bit) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i & (1 << bit)) continue;
        const float sum = add(v[i], v[i | (1 << bit)]);
        v[i | (1 << bit)] = add(v[i], -v[i | (1 << bit)]);
        v[i] = sum;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) row[padded(channel) + i] = v[i];
  }
}

// Mixes channel bits first .. first + Bits - 1 in place.
template <int Bits>
DVDQ_DEVICE void mix_bits(const Params& p, float* row, int first) {
  constexpr int kCount = 1 << Bits;
  const int low = (1 << first) - 1;
  for (int item = static_cast<int>(threadIdx.x); item < p.channels / kCount; item += static_cast<int>(blockDim.x)) {
    const int start = ((item & ~low) << Bits) | (item & low);
    float v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = row[padded(start + (i << first))];
#pragma unroll
    for (int bit = 0; bit < Bits; ++bit) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i & (1 << bit)) continue;
        const float sum = add(v[i], v[i | (1 << bit)]);
        v[i | (1 << bit)] = add(v[i], -v[i | (1 << bit)]);
        v[i] = sum;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) row[padded(start + (i << first))] = v[i];
  }
}

DVDQ_DEVICE void mix_inner(const Params& p, float* row) {
  int first = 3;
  while (first < p.log2_block) {
    const int bits = p.log2_block - first;
    if (bits >= 4) {
      mix_bits<4>(p, row, first);
    } else if (bits == 3) {
      mix_bits<3>(p, row, first);
    } else if (bits == 2) {
      mix_bits<2>(p, row, first);
    } else {
      mix_bits<1>(p, row, first);
    }
    barrier();
    first += 4;
  }
}

// Count (1, 2 or 4) neighbouring floats, aligned to their size.
template <int Count>
DVDQ_DEVICE void load_floats(const float* from, float (&v)[Count]) {
  if constexpr (Count == 4) {
    const uint4 bits = load_16(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = bits_float(word(bits, i));
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i) v[i] = from[i];
  }
}

// First channel of a tile in block 0 of its rotation, and its first row: tiles run over channels of b, rows of p, blocks.
template <int Rows, int Columns>
DVDQ_DEVICE void place_tile(const Params& p, int tile, int* start, int* first_row) {
  const int columns = (1 << p.log2_block) / Columns, chunks = p.order / Rows;
  *first_row = tile / columns % chunks * Rows;
  *start = tile / columns / chunks * (p.order << p.log2_block) + tile % columns * Columns;
}

template <int Rows, int Columns>
DVDQ_DEVICE void multiply_outer(const Params& p, float* row) {
  constexpr int kTiles = kTileValues / (Rows * Columns);
  const int tiles = p.channels / (Rows * Columns);
  float sum[kTiles][Rows][Columns];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Rows * Columns; ++j) sum[i][j / Columns][j % Columns] = 0.0f;
    const int tile = static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x);
    if (tile >= tiles) continue;
    int start, first_row;
    place_tile<Rows, Columns>(p, tile, &start, &first_row);
    for (int k = 0; k < p.order; ++k) {
      float w[Rows], v[Columns];
      load_floats(p.matrix + k * p.order + first_row, w);
      load_floats(row + padded(start + (k << p.log2_block)), v);
#pragma unroll
      for (int j = 0; j < Rows * Columns; ++j) {
        float& at = sum[i][j / Columns][j % Columns];
        at = multiply_add(w[j / Columns], v[j % Columns], at);
      }
    }
  }
  barrier();
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int tile = static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x);
    if (tile >= tiles) continue;
    int start, first_row;
    place_tile<Rows, Columns>(p, tile, &start, &first_row);
#pragma unroll
    for (int j = 0; j < Rows * Columns; ++j) {
      row[padded(start + ((first_row + j / Columns) << p.log2_block)) + j % Columns] = sum[i][j / Columns][j % Columns];
    }
  }
  barrier();
}

// amax of every group into shared memory, as bits.
DVDQ_DEVICE void find_amax(const Params& p, const float* row, uint32_t* amax) {
  const int width = p.channels / p.groups;
  uint32_t whole = 0u;
  for (int channel = 8 * static_cast<int>(threadIdx.x); channel < p.channels; channel += 8 * static_cast<int>(blockDim.x)) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = max_magnitude(most, row[padded(channel) + i]);
    if (p.groups > 1) {
      atomic_max_shared(amax + channel / width, float_bits(most));
    } else {
      whole = float_bits(most) > whole ? float_bits(most) : whole;
    }
  }
  if (p.groups == 1) atomic_max_shared(amax, whole);
}

template <int Codes>
DVDQ_DEVICE void quantize_row(const Params& p, int64_t token, const float* row, const uint32_t* amax, int* sums, float rest) {
  const int width = p.channels / p.groups;
  int whole = 0;
  for (int channel = 8 * static_cast<int>(threadIdx.x); channel < p.channels; channel += 8 * static_cast<int>(blockDim.x)) {
    const float* const v = row + padded(channel);
    const Quantizer q = make_quantizer(amax[channel / width], p.qmax, rest);
    uint32_t low = quantize4(v[0], v[1], v[2], v[3], q), high = quantize4(v[4], v[5], v[6], v[7], q);
    const int sum = dot4(low, 0x01010101u, dot4(high, 0x01010101u, 0));
    if (p.groups > 1 && p.sums != nullptr) atomic_add_shared(sums + channel / width, sum);
    whole += sum;
    const int64_t element = token * p.channels + channel;
    if constexpr (Codes == DVDQ_CODES_S4) {
      *reinterpret_cast<uint32_t*>(p.codes + element / 2) = pack_nibbles(low, high);
    } else {
      if constexpr (Codes == DVDQ_CODES_E4M3) {
        low = codes_to_e4m3(low);
        high = codes_to_e4m3(high);
      }
      store_8(p.codes + element, make_uint2(low, high));
    }
  }
  if (p.groups == 1 && p.sums != nullptr) atomic_add_shared(sums, whole);
}

template <bool Half, int Codes, int Rows, int Columns>
__global__ void __launch_bounds__(kMaxThreads, 1) rotate_quantize_outer(const Params p) {
  float* const row = reinterpret_cast<float*>(dynamic_shared());
  uint32_t* const amax = reinterpret_cast<uint32_t*>(row + p.padded_channels);
  int* const sums = reinterpret_cast<int*>(amax + p.groups);
  const int64_t token = blockIdx.x;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int i = tid; i < p.groups; i += threads) {
    amax[i] = 0u;
    sums[i] = 0;
  }
  load_row<Half>(p, token, row);
  barrier();
  mix_inner(p, row);
  multiply_outer<Rows, Columns>(p, row);
  find_amax(p, row, amax);
  barrier();
  const float rest = (p.log2_block & 1) ? 0.70710678118654752f : 1.0f;
  quantize_row<Codes>(p, token, row, amax, sums, rest);
  barrier();
  for (int i = tid; i < p.groups; i += threads) {
    const int64_t at = i * p.tokens + token;
    p.scales[at] = make_quantizer(amax[i], p.qmax, rest).scale;
    if (p.sums != nullptr) p.sums[at] = int_to_float(sums[i]);
  }
}

}  // namespace outer
}  // namespace dvdq
