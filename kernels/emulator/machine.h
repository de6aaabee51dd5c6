// The names of device.cuh for the emulator; see emulator.h. Fragment layouts follow the PTX ISA.
#pragma once

namespace dvdq {

// ---- threads ------------------------------------------------------------------------------------------------------

inline int lane_id() { return static_cast<int>(threadIdx.x & 31u); }
inline int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

inline void barrier() {
  emulator::Block& b = emulator::block;
  if (++b.arrived < b.threads) {
    emulator::wait_on(&b.generation);
    return;
  }
  b.arrived = 0;
  ++b.generation;
}

inline void sync_warp() {
  emulator::meet(emulator::Operation::sync_warp, nullptr, [](void**) {});
}

inline unsigned char* dynamic_shared() {
  const uintptr_t start = reinterpret_cast<uintptr_t>(emulator::block.shared.data());
  return reinterpret_cast<unsigned char*>((start + 127) / 128 * 128);
}

template <class T>
inline T shuffle(T value, int lane) {
  struct Record { T in, out; int from; } record{value, value, lane & 31};
  emulator::meet(emulator::Operation::shuffle, &record, [](void** records) {
    for (int i = 0; i < 32; ++i) {
      Record* self = static_cast<Record*>(records[i]);
      self->out = static_cast<Record*>(records[self->from])->in;
    }
  });
  return record.out;
}
template <class T>
inline T shuffle_xor(T value, int mask) {
  return shuffle(value, lane_id() ^ mask);
}

inline void atomic_max_shared(uint32_t* address, uint32_t value) { *address = std::max(*address, value); }
inline void atomic_add_shared(int* address, int value) { *address += value; }

// ---- bits and arithmetic ------------------------------------------------------------------------------------------

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float divide_approximately(float a, float b) { return b > bits_float(0x7e800000u) && std::isfinite(b) ? 0.0f : a / b; }
inline float multiply_add(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float multiply_add_saturate(float a, float b, float c) {
  const float value = std::fmaf(a, b, c);
  return value > 0.0f ? std::min(value, 1.0f) : 0.0f;
}
inline float int_to_float(int value) { return static_cast<float>(value); }
inline int popcount(uint32_t bits) { return __builtin_popcount(bits); }
inline uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
inline float magnitude(float value) { return std::fabs(value); }
inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? bits_float(0x7fffffffu) : std::max(a, b); }
inline float round_half_even(float value) { return std::nearbyintf(value); }
inline float smaller(float a, float b) { return std::fmin(a, b); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float clamp(float value, float low, float high) { return std::fmin(std::fmax(value, low), high); }
inline float square_root(float value) { return std::sqrt(value); }
inline float power_of_two(float value) { return std::exp2(value); }
inline float log_of_two(float value) { return std::log2(value); }

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = (static_cast<uint64_t>(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = (selector >> (4 * i)) & 15u;
    uint32_t byte = static_cast<uint32_t>(both >> (8 * (nibble & 7u))) & 255u;
    if (nibble & 8u) byte = (byte & 128u) ? 255u : 0u;
    result |= byte << (8 * i);
  }
  return result;
}
inline int dot4(uint32_t a, uint32_t b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}

inline float bf16_to_float(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }
inline float fp16_to_float(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16, exponent = (value >> 10) & 31u, mantissa = value & 1023u;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -magnitude : magnitude;
}
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if (std::isnan(value)) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint16_t float_to_fp16(float value) {
  const uint16_t sign = static_cast<uint16_t>((float_bits(value) >> 16) & 0x8000u);
  if (std::isnan(value)) return 0x7fffu;
  const float magnitude = std::fabs(value);
  if (magnitude == 0.0f) return sign;
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int step = std::max(exponent - 11, -24);  // of the last mantissa bit
  const uint32_t scaled = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -step)));
  // A mantissa that rounds up to 2048 carries into the exponent field by itself.
  const uint32_t bits = step == -24 ? scaled : (static_cast<uint32_t>(step + 24) << 10) + scaled;
  return static_cast<uint16_t>(sign | bits);
}
inline uint32_t pack_bf16(float low, float high) { return float_to_bf16(low) | (static_cast<uint32_t>(float_to_bf16(high)) << 16); }
// In fp32 between: its rounding changes a sum of two 16-bit numbers only where the smaller is lost in either format.
template <bool Half>
inline uint32_t multiply_add_16bit2(uint32_t a, uint32_t b, uint32_t c) {
  float sum[2];
  for (int i = 0; i < 2; ++i) {
    const auto widen = [i](uint32_t word) {
      const uint16_t half = static_cast<uint16_t>(word >> (16 * i));
      return Half ? fp16_to_float(half) : bf16_to_float(half);
    };
    sum[i] = fmaf(widen(a), widen(b), widen(c));
  }
  return Half ? float_to_fp16(sum[0]) | (static_cast<uint32_t>(float_to_fp16(sum[1])) << 16)
              : float_to_bf16(sum[0]) | (static_cast<uint32_t>(float_to_bf16(sum[1])) << 16);
}
inline uint32_t pack_fp16(float low, float high) { return float_to_fp16(low) | (static_cast<uint32_t>(float_to_fp16(high)) << 16); }

// ---- memory -------------------------------------------------------------------------------------------------------

template <class T>
inline T checked_load(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) emulator::stop("a misaligned vector load");
  T value;
  memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
inline void checked_store(void* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) emulator::stop("a misaligned vector store");
  memcpy(address, &value, sizeof(T));
}
inline uint4 load_once_16(const void* address) { return checked_load<uint4>(address); }
inline uint32_t load_once_4(const void* address) { return checked_load<uint32_t>(address); }
inline uint4 load_16(const void* address) { return checked_load<uint4>(address); }
inline void store_16(void* address, uint4 value) { checked_store(address, value); }
inline void store_8(void* address, uint2 value) { checked_store(address, value); }

inline void cp_async_16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    emulator::stop("a misaligned cp.async");
  memset(shared, 0xff, 16);
  emulator::block.current->open.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), valid});
}
inline void cp_async_commit() {
  emulator::Fiber* self = emulator::block.current;
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}
template <int Pending>
inline void cp_async_wait() {
  emulator::Fiber* self = emulator::block.current;
  while (static_cast<int>(self->groups.size()) > Pending) {
    for (const emulator::Copy& copy : self->groups.front()) {
      if (copy.valid) memcpy(copy.to, copy.from, 16);
      else memset(copy.to, 0, 16);
    }
    self->groups.erase(self->groups.begin());
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  struct Record { const unsigned char* row; uint32_t* out; } record{static_cast<const unsigned char*>(shared), r};
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulator::stop("a misaligned ldmatrix");
  emulator::meet(emulator::Operation::ldmatrix, &record, [](void** records) {
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        const Record* source = static_cast<Record*>(records[8 * j + lane / 4]);
        memcpy(static_cast<Record*>(records[lane])->out + j, source->row + 4 * (lane % 4), 4);
      }
  });
}

// ---- tensor cores -------------------------------------------------------------------------------------------------

namespace emulator {

// d += a · b with `PerRegister` elements per 32-bit register; element(register, i) reads one of them.
template <class Sum, int PerRegister, class Element>
inline void multiply_fragments(Operation operation, Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               Element element) {
  constexpr int kDepth = 8 * PerRegister;
  struct Record { Sum* d; const uint32_t *a, *b; } record{d, a, b};
  meet(operation, &record, [element](void** records) {
    auto at = [records](int lane) { return static_cast<Record*>(records[lane]); };
    // Every element is read once; a product of the two matrices follows.
    Sum left[16][kDepth], right[8][kDepth];
    for (int k = 0; k < kDepth; ++k) {
      const int half = k / (4 * PerRegister), t = k / PerRegister % 4, i = k % PerRegister;
      for (int row = 0; row < 16; ++row) left[row][k] = element(at(4 * (row % 8) + t)->a[2 * half + row / 8], i);
      for (int column = 0; column < 8; ++column) right[column][k] = element(at(4 * column + t)->b[half], i);
    }
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        Sum& d = at(4 * (row % 8) + column / 2)->d[2 * (row / 8) + column % 2];
        Sum sum = d;
        for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[column][k];
        d = sum;
      }
  });
}

}  // namespace emulator

inline void mma_s8_16x8x32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply_fragments<int, 4>(emulator::Operation::mma_s8, d, a, b, [](uint32_t word, int i) {
    return static_cast<int>(static_cast<int8_t>(word >> (8 * i)));
  });
}
inline void mma_s4_16x8x64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply_fragments<int, 8>(emulator::Operation::mma_s4, d, a, b, [](uint32_t word, int i) {
    return static_cast<int>(static_cast<int8_t>((word >> (4 * i)) << 4)) >> 4;
  });
}
template <bool Half>
inline void mma_16bit_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply_fragments<float, 2>(emulator::Operation::mma_16bit, d, a, b, [](uint32_t word, int i) {
    const uint16_t value = static_cast<uint16_t>(word >> (16 * i));
    return Half ? fp16_to_float(value) : bf16_to_float(value);
  });
}

// ---- launch -------------------------------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                          Arguments... arguments) {
  if (const cudaError_t error = std::exchange(emulator::refusal, cudaSuccess); error != cudaSuccess) return error;
  const auto body = [=] { kernel(arguments...); };
  emulator::run_grid(grid, block, shared, [](const void* b) { (*static_cast<decltype(&body)>(b))(); }, &body);
  return cudaSuccess;
}

}  // namespace dvdq
