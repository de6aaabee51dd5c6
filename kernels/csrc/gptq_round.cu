// Codes rounded with error feedback (dvdquant/quantize/gptq.py): from left to right, each column passes its error on to those after it.
//
// One warp holds 32 rows of one block of columns in shared memory, a row per lane, and goes through the columns; nothing is
// passed on between blocks. Row i of the factors, unit upper triangular, says how the columns after i move with its error;
// all lanes read the same of it. Sums are fp32: an error is below one step, and a column takes up at most 255 of them.
#include "device.cuh"
#include "error.h"
#include "search_grid.h"

namespace dvdq {
namespace gptq {
namespace {

constexpr int kRows = 32;
constexpr int kPitch = kRows + 1;  // both ways of walking the block then touch every bank once

struct Params {
  const float* weight;  // [n, k]
  signed char* codes;   // [n, k]
  const float* scale;   // [n]
  const unsigned char* group_scale;  // [n, groups]
  const float* row_zero;        // [n], or
  const unsigned char* byte_zero;  // [n, groups]; the other one is null
  const float* factors;            // [k / block, block, block]
  int64_t n;
  int k, groups, size, block;  // size = k / groups
};

__global__ void __launch_bounds__(32) round_rows(const Params p) {
  float* const left = reinterpret_cast<float*>(dynamic_shared());  // [block][kPitch]
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int first = static_cast<int>(blockIdx.y) * p.block, lane = lane_id();
  const int rows = p.n - first_row < kRows ? static_cast<int>(p.n - first_row) : kRows;
  for (int r = 0; r < kRows; ++r) {
    const float* const from = p.weight + (first_row + r) * p.k + first;
    for (int j = lane; j < p.block; j += 32) left[j * kPitch + r] = r < rows ? from[j] : 0.0f;
  }
  sync_warp();
  const float* const factors = p.factors + static_cast<int64_t>(blockIdx.y) * p.block * p.block;
  const int64_t row = first_row + (lane < rows ? lane : 0);
  const float scale = p.scale[row];
  float step = 0.0f, zero = 0.0f;
  int group = -1;
#pragma unroll 1
  for (int i = 0; i < p.block; ++i) {
    if ((first + i) / p.size != group) {
      group = (first + i) / p.size;
      const int64_t at = row * p.groups + group;
      step = multiply(scale, divide(int_to_float(p.group_scale[at]), 255.0f));
      zero = p.byte_zero != nullptr ? multiply_add(int_to_float(p.byte_zero[at]), 0.0625f, -8.0f) : p.row_zero[row];
    }
    const float value = left[i * kPitch + lane];
    const float code = clamp(round_half_even(add(divide(value, step), zero)), -8.0f, 7.0f);
    const float error = multiply_add(-step, add(code, -zero), value);
    left[i * kPitch + lane] = code;
    const float* const passed = factors + static_cast<int64_t>(i) * p.block;
#pragma unroll 8
    for (int j = i + 1; j < p.block; ++j) {
      left[j * kPitch + lane] = multiply_add(-passed[j], error, left[j * kPitch + lane]);
    }
  }
  sync_warp();
  for (int r = 0; r < rows; ++r) {
    signed char* const to = p.codes + (first_row + r) * p.k + first;
    for (int j = lane; j < p.block; j += 32) to[j] = static_cast<signed char>(static_cast<int>(left[j * kPitch + r]));
  }
}

}  // namespace
}  // namespace gptq

int64_t gptq_shared_bytes(int64_t block) { return 4 * block * gptq::kPitch; }

dvdq_status gptq_round(const dvdq_grid& grid, const float* weight, const dvdq_grid_out& out, const float* factors,
                           int64_t block, cudaStream_t stream) {
  gptq::Params p{};
  p.weight = weight;
  p.codes = static_cast<signed char*>(out.codes);
  p.scale = out.scale;
  p.group_scale = static_cast<const unsigned char*>(out.group_scale);
  const bool float_zero = grid.zero_point == DVDQ_ZERO_FLOAT;
  p.row_zero = float_zero ? nullptr : static_cast<const float*>(out.zero);
  p.byte_zero = float_zero ? static_cast<const unsigned char*>(out.zero) : nullptr;
  p.factors = factors;
  p.n = grid.n;
  p.k = static_cast<int>(grid.k);
  p.groups = static_cast<int>(grid.groups);
  p.size = p.k / p.groups;
  p.block = static_cast<int>(block);
  const dim3 blocks(static_cast<unsigned>((grid.n + gptq::kRows - 1) / gptq::kRows), static_cast<unsigned>(grid.k / block));
  const size_t shared = static_cast<size_t>(gptq_shared_bytes(block));
  return check_cuda(launch(gptq::round_rows, blocks, dim3(32), shared, stream, p), "gptq_round");
}

}  // namespace dvdq
