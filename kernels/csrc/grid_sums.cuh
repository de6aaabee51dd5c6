// What a 4-bit grid makes of a segment of weights, and reductions over a warp and a block, for search_grid.cu.
//
// A segment lies in shared memory, divided by a power of two that brings the largest weight of its row into [1, 2). One
// thread scores one grid (step Δ, zero-point z) over the whole segment: all lanes read the same weights, 16 bytes at a time.
//
//   c = round(clamp(w / Δ + z, -8, 7))      s0 = Σ c   s1 = Σ c²   s2 = Σ c·w
//   t1 = ⟨c − z, w⟩ = s2 − z·Σw             t2 = ⟨c − z, c − z⟩ = s1 − 2 z s0 + n z²
//
// For given codes the best step is t1 / t2, which leaves ‖w‖² − t1² / t2: the gain t1² / t2 ranks grids.
#pragma once

#include "device.cuh"

namespace dvdq {
namespace search {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 128;  // weights summed before the sum goes into the total: keeps fp32 sums of long rows exact enough
constexpr float kTiny = 1e-30f;

// round(clamp(x, -8, 7)), half to even: the code that is stored.
DVDQ_DEVICE float nearest_code(float x) { return round_half_even(clamp(x, -8.0f, 7.0f)); }

// The same for scoring, three instructions in place of five, two of which run at half the rate and one at an eighth: the
// multiply-add that clamps to [0, 1] takes w to a fifteenth of the range, the next one goes back and rounds, because 1.5 * 2^23
// is added in it. A weight within 10^-6 of a step from a rounding boundary may get the neighbouring code.
struct Scored {
  float slope, offset;  // of w -> (w / step + zero + 8) / 15
  DVDQ_DEVICE Scored(float step, float zero)
      : slope(divide(1.0f, multiply(15.0f, step))), offset(divide(add(zero, 8.0f), 15.0f)) {}
  DVDQ_DEVICE float code(float value) const {
    const float along = multiply_add_saturate(value, slope, offset);
    return add(multiply_add(along, 15.0f, 12582904.0f), -12582912.0f);
  }
};

struct Statistics {
  float total, energy, low, high;  // Σw, Σw², min(w, 0), max(w, 0)
};

struct Sums {
  float s0, s1, s2;
};

struct Gain {
  float step, zero, gain;
};

// Sums of the nearest codes of (step, zero) over w[0..n), n a multiple of 4.
DVDQ_DEVICE Sums sums_of(const float* w, int n, float step, float zero) {
  const Scored grid(step, zero);
  Sums total = {0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (int start = 0; start < n; start += kChunk) {
    const int stop = start + kChunk < n ? start + kChunk : n;
    Sums part = {0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (int i = start; i < stop; i += 4) {
      const uint4 four = load_16(w + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = bits_float(word(four, j));
        const float code = grid.code(value);
        part.s0 = add(part.s0, code);
        part.s1 = multiply_add(code, code, part.s1);
        part.s2 = multiply_add(code, value, part.s2);
      }
    }
    total.s0 = add(total.s0, part.s0);
    total.s1 = add(total.s1, part.s1);
    total.s2 = add(total.s2, part.s2);
  }
  return total;
}

// ‖w − step·(c − zero)‖² of the nearest codes.
DVDQ_DEVICE float error_of(const float* w, int n, float step, float zero) {
  const Scored grid(step, zero);
  const float offset = multiply(step, zero);
  float total = 0.0f;
#pragma unroll 1
  for (int start = 0; start < n; start += kChunk) {
    const int stop = start + kChunk < n ? start + kChunk : n;
    float part = 0.0f;
#pragma unroll 2
    for (int i = start; i < stop; i += 4) {
      const uint4 four = load_16(w + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = bits_float(word(four, j));
        const float code = grid.code(value);
        const float away = multiply_add(-step, code, add(value, offset));
        part = multiply_add(away, away, part);
      }
    }
    total = add(total, part);
  }
  return total;
}

// The grid of least error for the codes of (step, zero), and its gain; z is fitted too with `float_zero`.
DVDQ_DEVICE Gain regress(const float* w, int n, const Statistics& of, float step, float zero, bool float_zero) {
  const Sums s = sums_of(w, n, step, zero);
  const float count = int_to_float(n);
  float moved = zero;
  if (float_zero) {
    const float along = add(s.s2, -divide(multiply(s.s0, of.total), count));
    const float across = add(s.s1, -divide(multiply(s.s0, s.s0), count));
    if (along > kTiny && across > kTiny) {
      const float slope = divide(along, across);
      moved = clamp(divide(add(s.s0, -divide(of.total, slope)), count), -8.0f, 7.9375f);
    }
  }
  const float t1 = multiply_add(-moved, of.total, s.s2);
  const float t2 = multiply_add(moved, multiply_add(moved, count, multiply(-2.0f, s.s0)), s.s1);
  if (!(t1 > kTiny) || !(t2 > kTiny)) return {step, zero, -1.0f};
  return {divide(t1, t2), moved, divide(multiply(t1, t1), t2)};
}

// ---- over a warp ----------------------------------------------------------------------------------------------------

DVDQ_DEVICE Statistics statistics_of(const float* w, int n, int first, int apart) {
  Statistics of = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int i = first; i < n; i += apart) {
    const float value = w[i];
    of.total = add(of.total, value);
    of.energy = multiply_add(value, value, of.energy);
    of.low = value < of.low ? value : of.low;
    of.high = value > of.high ? value : of.high;
  }
  return of;
}

DVDQ_DEVICE Statistics join(const Statistics& a, const Statistics& b) {
  return {add(a.total, b.total), add(a.energy, b.energy), a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}

DVDQ_DEVICE Statistics over_warp(Statistics of) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const Statistics other = {shuffle_xor(of.total, mask), shuffle_xor(of.energy, mask), shuffle_xor(of.low, mask),
                              shuffle_xor(of.high, mask)};
    of = join(of, other);
  }
  return of;
}

// The highest gain of the warp in every lane; of equals the one of the smaller step, so that all lanes agree.
DVDQ_DEVICE bool better(const Gain& a, const Gain& b) { return a.gain > b.gain || (a.gain == b.gain && a.step < b.step); }

DVDQ_DEVICE Gain best_of_warp(Gain mine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const Gain other = {shuffle_xor(mine.step, mask), shuffle_xor(mine.zero, mask), shuffle_xor(mine.gain, mask)};
    if (better(other, mine)) mine = other;
  }
  return mine;
}

// ---- over a block: `shared` holds 4 * kWarps floats; every thread gets the result --------------------------------------

DVDQ_DEVICE Statistics over_block(Statistics of, float* shared) {
  of = over_warp(of);
  barrier();
  if (lane_id() == 0) {
    float* const slot = shared + 4 * warp_id();
    slot[0] = of.total, slot[1] = of.energy, slot[2] = of.low, slot[3] = of.high;
  }
  barrier();
  of = {shared[0], shared[1], shared[2], shared[3]};
  for (int i = 1; i < kWarps; ++i) of = join(of, {shared[4 * i], shared[4 * i + 1], shared[4 * i + 2], shared[4 * i + 3]});
  return of;
}

DVDQ_DEVICE Gain best_of_block(Gain mine, float* shared) {
  mine = best_of_warp(mine);
  barrier();
  if (lane_id() == 0) {
    float* const slot = shared + 4 * warp_id();
    slot[0] = mine.step, slot[1] = mine.zero, slot[2] = mine.gain;
  }
  barrier();
  mine = {shared[0], shared[1], shared[2]};
  for (int i = 1; i < kWarps; ++i) {
    const Gain other = {shared[4 * i], shared[4 * i + 1], shared[4 * i + 2]};
    if (better(other, mine)) mine = other;
  }
  return mine;
}

}  // namespace search
}  // namespace dvdq
