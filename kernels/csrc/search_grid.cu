// BGR on a device: the 4-bit grid of least squared error of every row, or of every group of a row. One block per row.
//
// A GPU has arithmetic to spare: where the CPU sorts candidates and descends from a few, this scores them all. Some
// thousand instructions a weight are less than the time it takes to read the weight from a disk, on any GPU since SM 8.0.
//
//   row, midrise or symmetric   128 steps from the whole range down, one regression each; 128 around the best of them
//   row, float zero-point       96 steps x 8 places, four regressions each; closer around four of them; the stored zero-points
//   groups (a warp each)        96 steps (float zero-point: 32 x 8 places), closer around the best; then, with the row's scale known,
//                               every 8-bit group scale there is (float zero-point: 32 group scales x 8 zero-points around the best)
//
// The min-max grid, stored the same way, is scored as well and wins ties: no row is worse than with it.
#include "search_grid.h"

#include "error.h"
#include "grid_sums.cuh"

namespace dvdq {
namespace search {
namespace {

constexpr float kScaleFloor = 0x1p-118f;  // SCALE_FLOOR of dvdquant/quantize/backends/numba_search.py
constexpr int kScratch = 4 * kWarps;

struct Params {
  const float* weight;  // [n, k]
  signed char* codes;   // [n, k]
  float* scale;         // [n]
  unsigned char* group_scale;  // [n, groups]
  float* row_zero;        // [n], or
  unsigned char* byte_zero;  // [n, groups]; the other one is null
  int k, groups, size;       // size = k / groups
  float zero;                // of every grid whose zero-point is fixed
  bool searches;
};

// The row in shared memory, what is found of it, and a place to reduce in.
struct Row {
  float* w;
  float* step;  // [groups]: phase 1 the step of a group; then its stored step
  float* zero;  // [groups]
  float* scratch;
  float unit;  // the power of two that w was divided by
};

DVDQ_DEVICE Statistics segment_statistics(const float* w, int n) { return over_warp(statistics_of(w, n, lane_id(), 32)); }

// The step whose ends lie on the extremes of the segment, and for a float zero-point where that puts zero.
DVDQ_DEVICE Gain min_max(const Statistics& of, bool float_zero, float zero) {
  if (float_zero) {
    const float step = larger(divide(add(of.high, -of.low), 15.0f), kTiny);
    return {step, add(-8.0f, -divide(of.low, step)), 0.0f};
  }
  return {larger(divide(larger(-of.low, of.high), add(7.0f, -zero)), kTiny), zero, 0.0f};
}

// Where a scan of steps begins and ends. No 16-level grid is best below about 0.2 rms, unless the range itself is short.
DVDQ_DEVICE float2 scan_range(const Statistics& of, int n, bool float_zero, float zero) {
  const float rms = square_root(divide(of.energy, int_to_float(n)));
  const float widest = min_max(of, float_zero, zero).step;
  const float top = multiply(widest, float_zero ? 1.1f : n <= 32 ? 1.4f : n <= 256 ? 1.25f : 1.07f);
  const float bottom = float_zero && n <= 256 ? multiply(0.45f, top) : smaller(multiply(float_zero ? 0.12f : 0.2f, rms), multiply(0.6f, top));
  return make_float2(top, larger(bottom, kTiny));
}

// Step `i` of `count` in a geometric row from range.x down to range.y.
DVDQ_DEVICE float scanned_step(float2 range, int i, int count) {
  const float along = divide(int_to_float(i), int_to_float(count - 1));
  return multiply(range.x, power_of_two(multiply(along, log_of_two(divide(range.y, range.x)))));
}

// Place `i` of `count` of a float zero-point, between the segment's low end on code -8 and its high end on code 7.
DVDQ_DEVICE float scanned_zero(const Statistics& of, float step, int i, int count) {
  const float a = add(-8.0f, -divide(of.low, step)), b = add(7.0f, -divide(of.high, step));
  const float first = add(smaller(a, b), -0.5f), last = add(larger(a, b), 0.5f);
  const float along = divide(add(int_to_float(i), 0.5f), int_to_float(count));
  return clamp(multiply_add(add(last, -first), along, first), -8.0f, 7.9375f);
}

DVDQ_DEVICE float stored_zero(float zero) {
  const float byte = clamp(round_half_even(multiply(add(zero, 8.0f), 16.0f)), 0.0f, 255.0f);
  return multiply_add(byte, 0.0625f, -8.0f);
}

DVDQ_DEVICE Gain descend(const float* w, int n, const Statistics& of, Gain from, bool float_zero, int steps) {
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    const Gain next = regress(w, n, of, from.step, from.zero, float_zero);
    if (next.gain > from.gain) from = next;
  }
  return from;
}

// ---- one grid for the whole row, found by the block ------------------------------------------------------------------

DVDQ_DEVICE Gain search_row(const Params& p, const Row& row, const Statistics& of) {
  const int t = static_cast<int>(threadIdx.x);
  const float2 range = scan_range(of, p.k, false, p.zero);
  Gain best = regress(row.w, p.k, of, scanned_step(range, t, kThreads), p.zero, false);
  best = best_of_block(best, row.scratch);
  // A neighbour of the scan on either side of the best, in 128 steps.
  const float apart = power_of_two(divide(log_of_two(divide(range.y, range.x)), int_to_float(kThreads - 1)));
  const float2 near = make_float2(divide(best.step, apart), multiply(best.step, apart));
  Gain mine = regress(row.w, p.k, of, scanned_step(near, t, kThreads), p.zero, false);
  return best_of_block(better(best, mine) ? best : mine, row.scratch);
}

DVDQ_DEVICE Gain search_float_row(const Params& p, const Row& row, const Statistics& of) {
  const int t = static_cast<int>(threadIdx.x);
  const float2 range = scan_range(of, p.k, true, 0.0f);
  Gain mine = {range.x, 0.0f, -1.0f};
#pragma unroll 1
  for (int i = 0; i < 6; ++i) {
    const float step = scanned_step(range, 6 * (t >> 3) + i, 6 * kThreads / 8);
    const Gain first = regress(row.w, p.k, of, step, scanned_zero(of, step, t & 7, 8), true);
    const Gain next = descend(row.w, p.k, of, first, true, 3);
    if (better(next, mine)) mine = next;
  }
  // Every warp goes on from the best of its own quarter of the steps: there is more than one minimum.
  Gain best = best_of_warp(mine);
#pragma unroll 1
  for (int zoom = 0; zoom < 4; ++zoom) {  // 4 steps x 8 zero-points, 2 % and a third of a level apart at first
    const float width = zoom == 0 ? 1.0f : zoom == 1 ? 0.35f : zoom == 2 ? 0.12f : 0.04f;
    const float across = multiply(multiply(0.02f, width), add(int_to_float(lane_id() >> 3), -1.5f));
    const float along = multiply(multiply(0.33f, width), int_to_float((lane_id() & 7) - 4));
    mine = regress(row.w, p.k, of, multiply(best.step, add(1.0f, across)), clamp(add(best.zero, along), -8.0f, 7.9375f), true);
    best = best_of_warp(better(best, mine) ? best : mine);
  }
  best = best_of_block(best, row.scratch);
  // The stored zero-points around it, 8 steps each.
  const float zero = clamp(add(stored_zero(best.zero), multiply(0.0625f, int_to_float((t & 15) - 8))), -8.0f, 7.9375f);
  mine = {multiply(best.step, add(1.0f, multiply(0.002f, int_to_float((t >> 4) - 4)))), zero, -1.0f};
  mine = descend(row.w, p.k, of, mine, false, 2);
  mine.zero = zero;
  return best_of_block(mine, row.scratch);
}

// Leaves the stored step and zero-point of the row.
DVDQ_DEVICE void solve_row(const Params& p, const Row& row, const Statistics& of, bool float_zero) {
  Gain base = min_max(of, float_zero, p.zero);
  if (float_zero) base.zero = stored_zero(base.zero);
  Gain found = base;
  if (p.searches) {
    found = float_zero ? search_float_row(p, row, of) : search_row(p, row, of);
    // Thread 0 scores what was found, thread 32 min-max: two warps, so that they run side by side.
    const bool first = threadIdx.x == 0;
    if (lane_id() == 0 && warp_id() < 2) {
      const Gain& grid = first ? found : base;
      row.scratch[kScratch + warp_id()] = error_of(row.w, p.k, grid.step, grid.zero);
    }
    barrier();
    if (!(row.scratch[kScratch] < row.scratch[kScratch + 1]) || !(found.gain > 0.0f)) found = base;
  }
  if (threadIdx.x == 0) {
    row.step[0] = found.step;
    row.zero[0] = found.zero;
  }
}

// ---- a grid per group, found by a warp ---------------------------------------------------------------------------------

DVDQ_DEVICE Gain search_group(const float* w, int n, const Statistics& of, float zero) {
  const float2 range = scan_range(of, n, false, zero);
  Gain mine = {range.x, zero, -1.0f};
#pragma unroll 1
  for (int i = lane_id(); i < 96; i += 32) {
    const Gain next = regress(w, n, of, scanned_step(range, i, 96), zero, false);
    if (better(next, mine)) mine = next;
  }
  return best_of_warp(descend(w, n, of, mine, false, 2));
}

DVDQ_DEVICE Gain search_float_group(const float* w, int n, const Statistics& of) {
  const float2 range = scan_range(of, n, true, 0.0f);
  const float step = scanned_step(range, lane_id(), 32);
  Gain mine = {step, 0.0f, -1.0f};
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const Gain next = regress(w, n, of, step, scanned_zero(of, step, i, 8), true);
    if (better(next, mine)) mine = next;
  }
  return best_of_warp(descend(w, n, of, mine, true, 6));
}

// Error, group scale and zero-point of one stored grid of a group.
struct Stored {
  float error;
  int group_scale;
  float zero;
};

DVDQ_DEVICE Stored least_of_warp(Stored mine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const Stored other = {shuffle_xor(mine.error, mask), shuffle_xor(mine.group_scale, mask), shuffle_xor(mine.zero, mask)};
    const bool less = other.error < mine.error || (other.error == mine.error && (other.group_scale < mine.group_scale ||
                      (other.group_scale == mine.group_scale && other.zero < mine.zero)));
    if (less) mine = other;
  }
  return mine;
}

DVDQ_DEVICE float group_step(float scale, int group_scale) { return multiply(scale, divide(int_to_float(group_scale), 255.0f)); }

DVDQ_DEVICE int nearest_group_scale(float step, float scale) {
  const float near = round_half_even(divide(multiply(255.0f, step), scale));
  return static_cast<int>(clamp(near, 1.0f, 255.0f));
}

DVDQ_DEVICE Stored search_stored(const float* w, int n, float scale, Gain found, bool float_zero) {
  Stored mine = {3.0e38f, 255, found.zero};
  if (float_zero) {
    const int group_scale = nearest_group_scale(found.step, scale) + lane_id() - 16;
    const float zero = stored_zero(found.zero);
    mine.group_scale = group_scale < 1 ? 1 : group_scale > 255 ? 255 : group_scale;
    mine.zero = zero;
#pragma unroll 1
    for (int i = -4; i < 4; ++i) {
      const float other = clamp(multiply_add(int_to_float(i), 0.0625f, zero), -8.0f, 7.9375f);
      const float error = error_of(w, n, group_step(scale, mine.group_scale), other);
      if (error < mine.error) mine.error = error, mine.zero = other;
    }
  } else {
#pragma unroll 1
    for (int group_scale = 1 + lane_id(); group_scale <= 255; group_scale += 32) {
      const float error = error_of(w, n, group_step(scale, group_scale), found.zero);
      if (error < mine.error) mine.error = error, mine.group_scale = group_scale;
    }
  }
  return least_of_warp(mine);
}

// The largest step of all groups, at least what the format holds, in units of the row.
DVDQ_DEVICE float row_scale(const Row& row, float largest) {
  row.scratch[kScratch + warp_id()] = largest;
  barrier();
  float scale = row.scratch[kScratch];
  for (int i = 1; i < kWarps; ++i) scale = larger(scale, row.scratch[kScratch + i]);
  barrier();
  return larger(scale, divide(kScaleFloor, row.unit));
}

DVDQ_DEVICE float sum_of_groups(const Row& row, float mine) {
  row.scratch[kScratch + warp_id()] = mine;
  barrier();
  float total = row.scratch[kScratch];
  for (int i = 1; i < kWarps; ++i) total = add(total, row.scratch[kScratch + i]);
  barrier();
  return total;
}

// Chooses group scales and zero-points of all groups under `scale`, by search or by min-max, and returns the error of the row.
// Keeps: leaves them in row.step (as group scales) and row.zero.
template <bool Searches, bool Keeps>
DVDQ_DEVICE float store_groups(const Params& p, const Row& row, float scale, bool float_zero) {
  float total = 0.0f;
#pragma unroll 1
  for (int g = warp_id(); g < p.groups; g += kWarps) {
    const float* const w = row.w + g * p.size;
    const Statistics of = segment_statistics(w, p.size);
    if (!(of.energy > 0.0f)) {  // of a group of zeros, the levels next to zero
      const float level = float_zero ? 0.0f : multiply(group_step(scale, 1), p.zero);
      total = multiply_add(int_to_float(p.size), multiply(level, level), total);
      if (Keeps && lane_id() == 0) row.step[g] = 1.0f, row.zero[g] = float_zero ? 0.0f : p.zero;
      continue;
    }
    Stored chosen;
    if constexpr (Searches) {
      chosen = search_stored(w, p.size, scale, {row.step[g], row.zero[g], 0.0f}, float_zero);
    } else {
      const Gain base = min_max(of, float_zero, p.zero);
      chosen.group_scale = nearest_group_scale(base.step, scale);
      chosen.zero = float_zero ? stored_zero(base.zero) : base.zero;
      chosen.error = error_of(w, p.size, group_step(scale, chosen.group_scale), chosen.zero);
    }
    total = add(total, chosen.error);
    sync_warp();
    if (Keeps && lane_id() == 0) row.step[g] = int_to_float(chosen.group_scale), row.zero[g] = chosen.zero;
  }
  return sum_of_groups(row, total);
}

// Leaves the group scales and zero-points of the groups in row.step and row.zero; returns the row's scale in its units.
DVDQ_DEVICE float solve_groups(const Params& p, const Row& row, bool float_zero) {
  float largest = 0.0f, largest_base = 0.0f;
#pragma unroll 1
  for (int g = warp_id(); g < p.groups; g += kWarps) {
    const float* const w = row.w + g * p.size;
    const Statistics of = segment_statistics(w, p.size);
    const Gain base = min_max(of, float_zero, p.zero);
    Gain found = base;
    if (of.energy > 0.0f && p.searches) {
      found = float_zero ? search_float_group(w, p.size, of) : search_group(w, p.size, of, p.zero);
      if (!(found.gain > 0.0f)) found = base;
    }
    if (of.energy > 0.0f) largest = larger(largest, found.step), largest_base = larger(largest_base, base.step);
    if (lane_id() == 0) row.step[g] = found.step, row.zero[g] = found.zero;
  }
  const float base_scale = row_scale(row, largest_base);
  if (!p.searches) {
    store_groups<false, true>(p, row, base_scale, float_zero);
    return base_scale;
  }
  const float scale = row_scale(row, largest);
  const float base = store_groups<false, false>(p, row, base_scale, float_zero);
  if (store_groups<true, true>(p, row, scale, float_zero) < base) return scale;
  store_groups<false, true>(p, row, base_scale, float_zero);
  return base_scale;
}

// ---- the kernel --------------------------------------------------------------------------------------------------------

// The power of two at or below `value`.
DVDQ_DEVICE float power_below(float value) {
  const uint32_t bits = float_bits(value) & 0x7f800000u;
  return bits == 0u ? 0x1p-126f : bits_float(bits);
}

DVDQ_DEVICE void write_row(const Params& p, const Row& row, int64_t n, float scale, bool float_zero) {
  // As stored, in fp32: every reader multiplies scale by group_scale / 255 first.
  const float stored = p.groups > 1 ? larger(multiply(scale, row.unit), kScaleFloor) : larger(multiply(row.step[0], row.unit), kScaleFloor);
  for (int g = static_cast<int>(threadIdx.x); g < p.groups; g += kThreads) {
    p.group_scale[n * p.groups + g] = p.groups > 1 ? static_cast<unsigned char>(static_cast<int>(row.step[g])) : 255;
    if (float_zero) {
      p.byte_zero[n * p.groups + g] = static_cast<unsigned char>(static_cast<int>(multiply(add(row.zero[g], 8.0f), 16.0f)));
    }
  }
  if (threadIdx.x == 0) {
    p.scale[n] = stored;
    if (!float_zero) p.row_zero[n] = p.zero;
  }
  for (int i = static_cast<int>(threadIdx.x); i < p.k; i += kThreads) {
    const int g = i / p.size;
    const float step = divide(p.groups > 1 ? group_step(stored, static_cast<int>(row.step[g])) : stored, row.unit);
    const float code = nearest_code(multiply_add(row.w[i], divide(1.0f, step), row.zero[g]));
    p.codes[n * p.k + i] = static_cast<signed char>(static_cast<int>(code));
  }
}

// Of a row of zeros, or too small for any grid: exactly zero.
DVDQ_DEVICE void write_nothing(const Params& p, int64_t n, bool float_zero) {
  for (int g = static_cast<int>(threadIdx.x); g < p.groups; g += kThreads) {
    p.group_scale[n * p.groups + g] = 255;
    if (float_zero) p.byte_zero[n * p.groups + g] = 128;
  }
  for (int i = static_cast<int>(threadIdx.x); i < p.k; i += kThreads) p.codes[n * p.k + i] = 0;
  if (threadIdx.x == 0) {
    p.scale[n] = kScaleFloor;
    if (!float_zero) p.row_zero[n] = 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) search_rows(const Params p) {
  const int64_t n = blockIdx.x;
  const bool float_zero = p.byte_zero != nullptr;
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  Row row{shared + kScratch + kWarps + 4, nullptr, nullptr, shared, 1.0f};
  row.step = row.w + p.k;
  row.zero = row.step + p.groups;
  const float* const from = p.weight + n * p.k;
  for (int i = static_cast<int>(threadIdx.x); i < p.k; i += kThreads) row.w[i] = from[i];
  barrier();
  const Statistics raw = over_block(statistics_of(row.w, p.k, static_cast<int>(threadIdx.x), kThreads), row.scratch);
  const float amax = larger(-raw.low, raw.high);
  if (amax < kScaleFloor) {
    write_nothing(p, n, float_zero);
    return;
  }
  row.unit = power_below(amax);
  barrier();
  for (int i = static_cast<int>(threadIdx.x); i < p.k; i += kThreads) row.w[i] = divide(row.w[i], row.unit);
  barrier();
  float scale = 0.0f;
  if (p.groups == 1) {
    const Statistics of = over_block(statistics_of(row.w, p.k, static_cast<int>(threadIdx.x), kThreads), row.scratch);
    solve_row(p, row, of, float_zero);
  } else {
    scale = solve_groups(p, row, float_zero);
  }
  barrier();
  write_row(p, row, n, scale, float_zero);
}

}  // namespace
}  // namespace search

int64_t search_shared_bytes(int64_t k, int64_t groups) {
  return 4 * (search::kScratch + search::kWarps + 4 + k + 2 * groups);
}

dvdq_status search_grid(const dvdq_grid& grid, const float* weight, const dvdq_grid_out& out, cudaStream_t stream) {
  search::Params p{};
  p.weight = weight;
  p.codes = static_cast<signed char*>(out.codes);
  p.scale = out.scale;
  p.group_scale = static_cast<unsigned char*>(out.group_scale);
  const bool float_zero = grid.zero_point == DVDQ_ZERO_FLOAT;
  p.row_zero = float_zero ? nullptr : static_cast<float*>(out.zero);
  p.byte_zero = float_zero ? static_cast<unsigned char*>(out.zero) : nullptr;
  p.k = static_cast<int>(grid.k);
  p.groups = static_cast<int>(grid.groups);
  p.size = p.k / p.groups;
  p.zero = grid.zero_point == DVDQ_ZERO_MIDRISE ? -0.5f : 0.0f;
  p.searches = grid.solver == DVDQ_SOLVER_SEARCH;
  const size_t shared = static_cast<size_t>(search_shared_bytes(grid.k, grid.groups));
  return check_cuda(launch(search::search_rows, dim3(static_cast<unsigned>(grid.n)), dim3(search::kThreads), shared, stream, p),
                    "search_grid");
}

}  // namespace dvdq
