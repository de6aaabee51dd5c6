// Integer GEMM with one activation scale per token and group of channels, on mma.sync (SM 8.0 and later).
//
//   s8:  y = row_scale[n] * Σ_g s[g, m] * acc_g + bias[n]
//   s4:  y = row_scale[n] * Σ_g s[g, m] * f[n, g] / 255 * (acc_g - z[n, g] * sum[g, m]) + bias[n]
//
// acc_g is the exact int32 dot product of group g; it is promoted to an fp32 accumulator when the group ends. CUTLASS
// has no such main loop for mma.sync, and promotion is what decides the speed here: see Promote.
//
// K is counted in bytes: one mma step takes 32 bytes of K per row, 32 channels of s8 or 64 of s4, so one tile shape
// serves both. Codes past the end of K, M and N are read as zeros.
#pragma once

#include "device.cuh"

namespace dvdq::grouped {

constexpr int kTile = 128;       // rows of M, and of N, per block
constexpr int kThreads = 256;    // 8 warps, 2 along M and 4 along N: 64 x 32 each
constexpr int kStageBytes = 64;  // of K, per row and stage
constexpr int kStepBytes = 32;   // of K, per mma
constexpr int kStages = 4;
constexpr int kOperandBytes = kTile * kStageBytes;
constexpr int kSharedBytes = kStages * 2 * kOperandBytes;  // 64 KiB
constexpr int kTilesM = 4, kTilesN = 4;                    // 16 x 8 mma tiles per warp
constexpr int kRasterRows = 8;                             // tiles of M walked before the next tile of N, for L2

enum class Kind {
  kS8,          // group sums may reach 2^31
  kS8Small,     // group sums below 2^22
  kS4,          // one weight group per row: the zero-point is corrected once, at the end
  kS4Weighted,  // group scales and zero-points per weight group, in the loop
};

struct Params {
  const unsigned char* codes;   // [m, row_bytes]
  const unsigned char* weight;  // [n, row_bytes]
  const float* scales;          // [groups, m]
  const float* sums;            // [groups, m]; s4 only, null = no correction
  const float* row_scale;
  const float* row_zero;
  const float* bias;
  const uint8_t* group_scale;  // [n, weight_groups] or null
  const uint8_t* group_zero;  // [n, weight_groups] or null: z = byte / 16 - 8
  uint16_t* y;
  int64_t m, n, row_bytes, weight_groups;
  int group_steps;              // mma steps per activation group
  int groups_per_weight_group;  // activation groups per weight group
  bool half;                    // fp16 output, else bf16
};

// Where the 16-byte chunk `chunk` of row `row` lies in an operand's stage. The exclusive-or spreads the eight rows that
// one ldmatrix phase reads over all banks.
DVDQ_DEVICE int chunk_offset(int row, int chunk) { return row * kStageBytes + ((chunk ^ ((row >> 1) & 3)) << 4); }

// Starts the copy of one operand's stage: rows [first, first + 128) of a matrix of `rows` rows, bytes from `from` on.
DVDQ_DEVICE void copy_operand(unsigned char* stage, const unsigned char* matrix, int64_t first, int64_t rows,
                              int64_t from, int64_t row_bytes) {
#pragma unroll
  for (int i = 0; i < kOperandBytes / 16 / kThreads; ++i) {
    const int item = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = item >> 2, chunk = item & 3;
    const int64_t byte = from + chunk * 16;
    const bool valid = first + row < rows && byte < row_bytes;
    cp_async_16(stage + chunk_offset(row, chunk), valid ? matrix + (first + row) * row_bytes + byte : matrix, valid);
  }
}

// int -> float. Adding 1.5 * 2^23 in the integer domain and taking it off in fp32 is exact below 2^22 and runs at the
// full rate, where the conversion instruction has a quarter of it or less.
template <bool Small>
DVDQ_DEVICE float to_float(int value) {
  if constexpr (Small) {
    return add(bits_float(static_cast<uint32_t>(value) + 0x4B400000u), -12582912.0f);
  } else {
    return int_to_float(value);
  }
}

// What the promotion of a group needs of its 8 rows and, weighted, 8 columns of this thread.
template <Kind kind>
struct Group {
  static constexpr bool kWeighted = kind == Kind::kS4Weighted;
  static constexpr bool kSums = kind == Kind::kS4 || kind == Kind::kS4Weighted;
  static constexpr int kColumns = kWeighted ? 2 * kTilesN : 1;
  float scale[2 * kTilesM];
  float sum[kSums ? 2 * kTilesM : 1];
  float group_scale[kColumns], zero[kColumns];

  // row0, column0: first row and column of this thread; rows 8 apart, columns in pairs 8 apart.
  DVDQ_DEVICE void load(const Params& p, int group, int64_t row0, int64_t column0) {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const int64_t row = row0 + i * 8;
      const int64_t at = static_cast<int64_t>(group) * p.m + row;
      scale[i] = row < p.m ? p.scales[at] : 0.0f;
      if constexpr (kSums) {
        sum[i] = row < p.m && p.sums != nullptr ? p.sums[at] : 0.0f;
      }
    }
    if constexpr (kWeighted) {
      load_columns(p, group / p.groups_per_weight_group, column0);
    }
  }

  DVDQ_DEVICE void load_columns(const Params& p, int weight_group, int64_t column0) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int64_t column = column0 + (i >> 1) * 8 + (i & 1);
      const int64_t at = column * p.weight_groups + weight_group;
      group_scale[i] = 1.0f;
      zero[i] = 0.0f;
      if (column < p.n) {
        if (p.group_scale != nullptr) group_scale[i] = divide(int_to_float(p.group_scale[at]), 255.0f);
        zero[i] = p.group_zero != nullptr ? add(multiply(int_to_float(p.group_zero[at]), 0.0625f), -8.0f)
                                          : p.row_zero[column];
      }
    }
  }
};

// The accumulators of one thread: mma layout, [tile of M][tile of N][(row, column pair)].
template <Kind kind>
struct Accumulators {
  static constexpr bool kSmall = kind != Kind::kS8;
  int partial[kTilesM][kTilesN][4];
  float total[kTilesM][kTilesN][4];
  float token[kind == Kind::kS4 ? 2 * kTilesM : 1];  // Σ_g s[g, m] * sum[g, m]

  DVDQ_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          partial[i][j][e] = 0;
          total[i][j][e] = 0.0f;
        }
      }
    }
    for (float& value : token) value = 0.0f;
  }

  // total += the finished group; partial = 0.
  DVDQ_DEVICE void promote(const Group<kind>& group) {
    if constexpr (kind == Kind::kS4) {
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) token[i] = multiply_add(group.scale[i], group.sum[i], token[i]);
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 2 * i + (e >> 1);
          float value = to_float<kSmall>(partial[i][j][e]);
          float scale = group.scale[row];
          if constexpr (Group<kind>::kWeighted) {
            const int column = 2 * j + (e & 1);
            value = multiply_add(-group.zero[column], group.sum[row], value);
            scale = multiply(scale, group.group_scale[column]);
          }
          total[i][j][e] = multiply_add(scale, value, total[i][j][e]);
          partial[i][j][e] = 0;
        }
      }
    }
  }
};

// partial += the products of one mma step of a stage.
template <Kind kind>
DVDQ_DEVICE void multiply_step(Accumulators<kind>& acc, const unsigned char* a, const unsigned char* b, int step,
                               int warp_row, int warp_column) {
  const int lane = lane_id(), matrix = lane >> 3, row = lane & 7;
  uint32_t weight[kTilesN][2];
#pragma unroll
  for (int j = 0; j < kTilesN; j += 2) {
    uint32_t r[4];
    ldmatrix_x4(r, b + chunk_offset(warp_column + j * 8 + (matrix >> 1) * 8 + row, 2 * step + (matrix & 1)));
    weight[j][0] = r[0], weight[j][1] = r[1], weight[j + 1][0] = r[2], weight[j + 1][1] = r[3];
  }
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    uint32_t code[4];
    ldmatrix_x4(code, a + chunk_offset(warp_row + i * 16 + (matrix & 1) * 8 + row, 2 * step + (matrix >> 1)));
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      if constexpr (kind == Kind::kS8 || kind == Kind::kS8Small) {
        mma_s8_16x8x32(acc.partial[i][j], code, weight[j]);
      } else {
        mma_s4_16x8x64(acc.partial[i][j], code, weight[j]);
      }
    }
  }
}

// Correction, row scale, bias, rounding and stores of one column pair; scalar where n is odd or the pair is cut.
template <Kind kind>
DVDQ_DEVICE void store_columns(const Params& p, const Accumulators<kind>& acc, int j, int64_t row0, int64_t column) {
  float scale[2] = {0.0f, 0.0f}, zero[2] = {0.0f, 0.0f}, bias[2] = {0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    if (column + c >= p.n) continue;
    scale[c] = p.row_scale[column + c];
    bias[c] = p.bias[column + c];
    if constexpr (kind == Kind::kS4) {
      if (p.group_scale != nullptr) scale[c] = multiply(scale[c], divide(int_to_float(p.group_scale[column + c]), 255.0f));
      zero[c] = p.group_zero != nullptr ? add(multiply(int_to_float(p.group_zero[column + c]), 0.0625f), -8.0f)
                                        : p.row_zero[column + c];
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int64_t row = row0 + i * 8;
    if (row >= p.m || column >= p.n) continue;
    float value[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      value[c] = acc.total[i >> 1][j][2 * (i & 1) + c];
      if constexpr (kind == Kind::kS4) value[c] = multiply_add(-zero[c], acc.token[i], value[c]);
      value[c] = multiply_add(scale[c], value[c], bias[c]);
    }
    const uint32_t pair = p.half ? pack_fp16(value[0], value[1]) : pack_bf16(value[0], value[1]);
    uint16_t* to = p.y + row * p.n + column;
    if ((p.n & 1) == 0) {
      *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
      to[0] = static_cast<uint16_t>(pair);
      if (column + 1 < p.n) to[1] = static_cast<uint16_t>(pair >> 16);
    }
  }
}

// Tile of this block: bands of kRasterRows tiles of M, walked along N.
DVDQ_DEVICE void block_tile(const Params& p, int64_t& tile_m, int64_t& tile_n) {
  const int64_t tiles_m = (p.m + kTile - 1) / kTile, tiles_n = (p.n + kTile - 1) / kTile;
  const int64_t block = blockIdx.x, band = block / (kRasterRows * tiles_n);
  const int64_t left = tiles_m - band * kRasterRows, rows = left < kRasterRows ? left : kRasterRows;
  const int64_t within = block - band * kRasterRows * tiles_n;
  tile_m = band * kRasterRows + within % rows;
  tile_n = within / rows;
}

template <Kind kind>
DVDQ_DEVICE void multiply_tile(const Params& p) {
  unsigned char* shared = dynamic_shared();
  int64_t tile_m, tile_n;
  block_tile(p, tile_m, tile_n);
  const int64_t first_m = tile_m * kTile, first_n = tile_n * kTile;
  const int warp = warp_id(), warp_row = (warp & 1) * 64, warp_column = (warp >> 1) * 32;
  const int64_t row0 = first_m + warp_row + (lane_id() >> 2), column0 = first_n + warp_column + 2 * (lane_id() & 3);
  const int stages = static_cast<int>((p.row_bytes + kStageBytes - 1) / kStageBytes);
  const int steps = static_cast<int>((p.row_bytes + kStepBytes - 1) / kStepBytes);

  const auto copy_stage = [&](int stage) {
    if (stage < stages) {
      unsigned char* to = shared + (stage % kStages) * 2 * kOperandBytes;
      const int64_t from = static_cast<int64_t>(stage) * kStageBytes;
      copy_operand(to, p.codes, first_m, p.m, from, p.row_bytes);
      copy_operand(to + kOperandBytes, p.weight, first_n, p.n, from, p.row_bytes);
    }
    cp_async_commit();  // an empty group too: the wait below counts groups
  };
  for (int stage = 0; stage < kStages - 1; ++stage) copy_stage(stage);

  Accumulators<kind> acc;
  acc.clear();
  Group<kind> group;
  int index = 0, in_group = 0;
  group.load(p, 0, row0, column0);

  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<kStages - 2>();
    barrier();  // this stage has arrived for all, and all have read the stage that is overwritten next
    copy_stage(stage + kStages - 1);
    const unsigned char* a = shared + (stage % kStages) * 2 * kOperandBytes;
#pragma unroll
    for (int step = 0; step < kStageBytes / kStepBytes; ++step) {
      multiply_step(acc, a, a + kOperandBytes, step, warp_row, warp_column);
      if (++in_group == p.group_steps) {
        acc.promote(group);
        in_group = 0;
        ++index;
        // The next group's scales arrive while its products are summed.
        if (index * p.group_steps < steps) group.load(p, index, row0, column0);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kTilesN; ++j) store_columns(p, acc, j, row0, column0 + j * 8);
}

// s4 mma is a tensor-core instruction on SM 8.x alone; elsewhere the compiler would expand it to a long sequence.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kNativeS4 = false;
#else
constexpr bool kNativeS4 = true;
#endif

template <Kind kind>
__global__ void __launch_bounds__(kThreads, 1) gemm(const Params p) {
  if constexpr (kNativeS4 || kind == Kind::kS8 || kind == Kind::kS8Small) multiply_tile<kind>(p);
}

}  // namespace dvdq::grouped
