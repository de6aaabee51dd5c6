// Thin names for what a kernel asks of the machine. nvcc gets the intrinsics below; a host compiler gets the same names
// from emulator/emulator.h (-DDVDQ_EMULATE), so the very source of our own kernels runs on a CPU in the tests.
//
// Fragment layouts are those of the PTX ISA: with g = lane / 4 and t = lane % 4, accumulators d[0..3] hold
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include <stdint.h>

#ifdef DVDQ_EMULATE
#include "../emulator/emulator.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DVDQ_DEVICE __device__ __forceinline__

namespace dvdq {

// ---- threads ------------------------------------------------------------------------------------------------------

DVDQ_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31u); }
DVDQ_DEVICE int warp_id() { return static_cast<int>(threadIdx.x >> 5); }
DVDQ_DEVICE void barrier() { __syncthreads(); }
DVDQ_DEVICE void sync_warp() { __syncwarp(); }

// The dynamic shared memory of the block, 16-byte aligned.
DVDQ_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dvdq_dynamic_shared[];
  return dvdq_dynamic_shared;
}

template <class T>
DVDQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
DVDQ_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

DVDQ_DEVICE void atomic_max_shared(uint32_t* address, uint32_t value) { atomicMax(address, value); }
DVDQ_DEVICE void atomic_add_shared(int* address, int value) { atomicAdd(address, value); }

// ---- bits and arithmetic: one rounding each, never contracted -----------------------------------------------------

DVDQ_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
DVDQ_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
DVDQ_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DVDQ_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DVDQ_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
// Good to 2 units in the last place; 0 where b is above 2^126.
DVDQ_DEVICE float divide_approximately(float a, float b) { return __fdividef(a, b); }
DVDQ_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// a * b + c, held to 0..1; NaN gives 0.
DVDQ_DEVICE float multiply_add_saturate(float a, float b, float c) {
  float result;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
}
DVDQ_DEVICE float int_to_float(int value) { return __int2float_rn(value); }
DVDQ_DEVICE int popcount(uint32_t bits) { return __popc(bits); }
// Word i of a vector; i is a constant of an unrolled loop.
DVDQ_DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DVDQ_DEVICE float magnitude(float value) { return fabsf(value); }
// max(a, b), NaN if either is (fmaxf would drop it).
DVDQ_DEVICE float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
DVDQ_DEVICE float round_half_even(float value) { return rintf(value); }
DVDQ_DEVICE float smaller(float a, float b) { return fminf(a, b); }
DVDQ_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DVDQ_DEVICE float clamp(float value, float low, float high) { return fminf(fmaxf(value, low), high); }
DVDQ_DEVICE float square_root(float value) { return __fsqrt_rn(value); }
// Good to some 2^-22: for where to look, not for what is stored.
DVDQ_DEVICE float power_of_two(float value) { return exp2f(value); }
DVDQ_DEVICE float log_of_two(float value) { return log2f(value); }
// prmt: byte i of the result is byte (selector >> 4i) & 7 of b:a; bit 3 of a nibble replicates that byte's sign.
DVDQ_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  // __byte_perm would mask the sign-replicating bit away.
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}
DVDQ_DEVICE int dot4(uint32_t a, uint32_t b, int c) { return __dp4a(static_cast<int>(a), static_cast<int>(b), c); }

// a * b + c of the two 16-bit floats in each word, rounded once.
template <bool Half>
DVDQ_DEVICE uint32_t multiply_add_16bit2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  if constexpr (Half) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}

DVDQ_DEVICE float bf16_to_float(uint16_t value) { return __uint_as_float(static_cast<uint32_t>(value) << 16); }
DVDQ_DEVICE float fp16_to_float(uint16_t value) { return __half2float(__ushort_as_half(value)); }
// Two floats to two 16-bit values, `low` in the low half; round to nearest even.
DVDQ_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
DVDQ_DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// ---- memory -------------------------------------------------------------------------------------------------------

// 16 bytes read once by this kernel; the address is 16-byte aligned.
DVDQ_DEVICE uint4 load_once_16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
// 4 bytes read once by this kernel.
DVDQ_DEVICE uint32_t load_once_4(const void* address) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}
DVDQ_DEVICE uint4 load_16(const void* address) { return *static_cast<const uint4*>(address); }
DVDQ_DEVICE void store_16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }
DVDQ_DEVICE void store_8(void* address, uint2 value) { *static_cast<uint2*>(address) = value; }

// Asynchronous 16 bytes from global to shared memory; zeros where !valid (the source is then not read).
DVDQ_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
DVDQ_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of the newest groups of this thread are still under way.
template <int Pending>
DVDQ_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned); r[j]
// of a lane holds bytes 4t..4t+3 of row g of matrix j.
DVDQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// ---- tensor cores: d += a · b -------------------------------------------------------------------------------------

// a: r[0] (g, 4t..4t+3), r[1] (g+8, 4t..), r[2] (g, 16+4t..), r[3] (g+8, 16+4t..); b: r[0] (4t.., g), r[1] (16+4t.., g).
DVDQ_DEVICE void mma_s8_16x8x32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// As above with eight 4-bit codes (low nibble first) per register: 8t.. in place of 4t.., 32 in place of 16.
DVDQ_DEVICE void mma_s4_16x8x64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// a: r[0] (g, 2t..2t+1), r[1] (g+8, 2t..), r[2] (g, 8+2t..), r[3] (g+8, 8+2t..); b: r[0] (2t.., g), r[1] (8+2t.., g).
// Half: fp16 in place of bf16. Products are exact, sums fp32.
template <bool Half>
DVDQ_DEVICE void mma_16bit_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (Half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// ---- launch -------------------------------------------------------------------------------------------------------

// Starts kernel(args...) with `shared` bytes of dynamic shared memory, raising the kernel's limit where needed.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                          Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t raised = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (raised != cudaSuccess) return raised;
  }
  kernel<<<grid, block, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace dvdq

#endif
