// Rotates tokens and rounds them to their activation grid, as dvdquant/numerics/hadamard.py and dvdquant/numerics/activation_grid.py do in fp32. What a
// simulated layer spends most of its time on when every step is a tensor operation of its own.
//
// A Sylvester matrix of order b is H(b/16) ⊗ H(16): the inner factor as 16 broadcast products of one vector, the outer one
// as stages of sums and differences of whole vectors.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Vec& vec(float* p) { return *reinterpret_cast<Vec*>(p); }

void sylvester(Vec* h) {
  for (unsigned i = 0; i < kLanes; ++i) {
    for (unsigned j = 0; j < kLanes; ++j) h[i][j] = std::popcount(i & j) % 2 ? -1.0f : 1.0f;
  }
}

// y = x (I ⊗ H16); n is a multiple of 64.
void inner_factor(const float* x, float* y, int n, const Vec* h) {
  for (int i = 0; i < n; i += 4 * kLanes) {
    Vec sum[4];
    for (int j = 0; j < 4; ++j) sum[j] = h[0] * x[i + j * kLanes];
    for (int k = 1; k < kLanes; ++k) {
      for (int j = 0; j < 4; ++j) sum[j] += h[k] * x[i + j * kLanes + k];
    }
    for (int j = 0; j < 4; ++j) vec(y + i + j * kLanes) = sum[j];
  }
}

void outer_factor(float* y, int n, int block) {
  for (int h = kLanes; h < block; h *= 2) {
    for (int i = 0; i < n; i += 2 * h) {
      for (int j = i; j < i + h; j += kLanes) {
        const Vec a = vec(y + j), b = vec(y + j + h);
        vec(y + j) = a + b;
        vec(y + j + h) = a - b;
      }
    }
  }
}

float largest(float* v, int n) {
  Vec top = {};
  for (int i = 0; i < n; i += kLanes) {
    const Vec x = vec(v + i), size = x < 0 ? -x : x;
    top = size > top ? size : top;
  }
  float amax = 0x1p-100f;  // AMAX_FLOOR of dvdquant/numerics/activation_grid.py
  for (int lane = 0; lane < kLanes; ++lane) amax = std::max(amax, top[lane]);
  return amax;
}

inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

inline float to_bf16_value(float x) { return to_float(to_bf16(x)); }

// The blocks' largest value over 6 · 1/2688 as e4m3: three bits of mantissa, steps of 2^-9 below 2^-6; at most 448.
inline float to_e4m3(float x) {
  if (x < 0x1p-6f) return std::nearbyint(x * 512.0f) * 0x1p-9f;
  uint32_t bits = std::bit_cast<uint32_t>(x);
  bits += 0x7FFFF + ((bits >> 20) & 1);
  return std::min(std::bit_cast<float>(bits & ~0xFFFFFu), 448.0f);
}

inline double to_e2m1(double x) {
  const double low = std::nearbyint(x * 2.0) * 0.5, middle = std::nearbyint(x), high = std::nearbyint(x * 0.5) * 2.0;
  return std::min(x < 2.0 ? low : x < 4.0 ? middle : high, 6.0);
}

// As nvfp4.py, in double where bf16 values make ties: what goes into the product, in bf16 relative to the token's largest value, which goes to `amax`.
template <typename Input>
void run_nvfp4(const Input* x, const float* shift, const float* scale, int64_t tokens, int k, int block, float power,
               uint16_t* out, float* amax) {
  constexpr float kUnit = static_cast<float>(1.0 / 2688.0);
  Vec h[kLanes];
  sylvester(h);
  std::vector<float> first(k), second(k);
  for (int64_t t = 0; t < tokens; ++t, x += k, out += k) {
    float* v = first.data();
    for (int i = 0; i < k; ++i) v[i] = to_bf16_value(to_float(x[i]));
    if (shift != nullptr) {
      for (int i = 0; i < k; ++i) v[i] = to_bf16_value(v[i] - shift[i]);
    }
    if (scale != nullptr) {
      for (int i = 0; i < k; ++i) v[i] *= scale[i];
    }
    if (block > 1) {
      inner_factor(first.data(), second.data(), k, h);
      v = second.data();
      outer_factor(v, k, block);
      for (int i = 0; i < k; ++i) v[i] = to_bf16_value(v[i] * power);
    }
    amax[t] = largest(v, k);
    for (int g = 0; g < k; g += kLanes) {
      float unit[kLanes], top = 0.0f;
      for (int i = 0; i < kLanes; ++i) {
        unit[i] = to_bf16_value(v[g + i] / amax[t]);
        top = std::max(top, std::fabs(unit[i]));
      }
      const float scale8 = to_e4m3(static_cast<float>(top / 6.0 / kUnit));
      const double step = static_cast<double>(scale8) * kUnit, down = std::max(step, 0x1p-30);
      for (int i = 0; i < kLanes; ++i) {
        const double code = std::copysign(to_e2m1(std::fabs(unit[i] / down)), static_cast<double>(unit[i]));
        out[g + i] = to_bf16(static_cast<float>(code) * (scale8 * kUnit));
      }
    }
  }
}

template <typename Input>
void run(const Input* x, const float* shift, const float* divide, int64_t tokens, int k, int block, int group, float qmax,
         uint16_t* out) {
  Vec h[kLanes];
  sylvester(h);
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  std::vector<float> first(k), second(k);
  for (int64_t t = 0; t < tokens; ++t, x += k, out += k) {
    float* v = first.data();
    for (int i = 0; i < k; ++i) v[i] = to_float(x[i]);
    if (shift != nullptr) {
      for (int i = 0; i < k; ++i) v[i] -= shift[i];
    }
    if (divide != nullptr) {
      for (int i = 0; i < k; ++i) v[i] /= divide[i];
    }
    if (block > 1) {
      inner_factor(first.data(), second.data(), k, h);
      v = second.data();
      outer_factor(v, k, block);
      for (int i = 0; i < k; i += kLanes) vec(v + i) *= norm;
    }
    for (int g = 0; g < k; g += group) {
      const float amax = largest(v + g, group), up = qmax / amax, scale = amax / qmax;
      for (int i = g; i < g + group; ++i) {
        const float code = std::nearbyint(v[i] * up);
        out[i] = to_bf16(std::min(std::max(code, -qmax), qmax) * scale);
      }
    }
  }
}

}  // namespace

// x [tokens, k] fp32 or bf16, shift and divide [k] or null, out [tokens, k] bf16; 64 divides k, 16 divides block (or it is 1)
// and group.
extern "C" void quality_grid(const void* x, int bf16, const float* shift, const float* divide, int64_t tokens, int k, int block,
                             int group, float qmax, uint16_t* out) {
  if (bf16) {
    run(static_cast<const uint16_t*>(x), shift, divide, tokens, k, block, group, qmax, out);
  } else {
    run(static_cast<const float*>(x), shift, divide, tokens, k, block, group, qmax, out);
  }
}

// As quality_grid, with scale (by which channels are multiplied) and power, a power of two, in the place of divide and the
// rotation's norm; amax [tokens] fp32.
extern "C" void quality_nvfp4(const void* x, int bf16, const float* shift, const float* scale, int64_t tokens, int k, int block,
                              float power, uint16_t* out, float* amax) {
  if (bf16) {
    run_nvfp4(static_cast<const uint16_t*>(x), shift, scale, tokens, k, block, power, out, amax);
  } else {
    run_nvfp4(static_cast<const float*>(x), shift, scale, tokens, k, block, power, out, amax);
  }
}
