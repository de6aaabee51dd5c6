// A CUDA block on a CPU: one fiber per CUDA thread, blocks one after another, warp-wide operations as rendezvous.
//
// It supplies the names of device.cuh and as much of the CUDA language as our own kernels use, to be compiled with
//   g++ -x c++ -std=c++17 -O1 -ffp-contract=off -DDVDQ_EMULATE
// Deliberately unkind: dynamic shared memory starts as NaN bytes, cp.async lands only when it is waited for, the order of
// threads between barriers is shuffled (set_schedule), a thread missing at a barrier or lanes meeting in different
// operations end the process with a message. It shows wrong indices, layouts, roundings and missing barriers; it says
// nothing about speed, memory ordering within a warp, or whether a real machine accepts the launch.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

// Every kernel's file reads these, so nothing that takes long to compile, such as <functional>, is among them.
#include <cmath>
#include <utility>
#include <vector>

// ---- language and runtime -----------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(n) __attribute__((aligned(n)))
#define DVDQ_DEVICE inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef struct emulated_stream* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;

namespace dvdq {
namespace emulator {

[[noreturn]] inline void stop(const char* what) {
  fprintf(stderr, "emulator: %s\n", what);
  abort();
}

enum class Operation : int { none, shuffle, sync_warp, mma_s8, mma_s4, mma_16bit, ldmatrix };

struct Warp {
  int arrived = 0;
  uint64_t generation = 0;
  Operation operation = Operation::none;
  void* records[32] = {};
};

struct Copy { unsigned char* to; const unsigned char* from; bool valid; };

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  unsigned char* stack = nullptr;
  dim3 thread;
  bool started = false, finished = false;
  const uint64_t* waits_for = nullptr;  // runnable once *waits_for != seen
  uint64_t seen = 0;
  std::vector<std::vector<Copy>> groups;  // committed cp.async groups, oldest first
  std::vector<Copy> open;

  ~Fiber() { delete[] stack; }
};

struct Block {
  dim3 grid, size, index;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;  // as many as the largest block had; they live as long as the library is loaded
  Fiber* current = nullptr;
  jmp_buf scheduler;
  int threads = 0, arrived = 0;
  uint64_t generation = 0;
  void (*call)(const void* body) = nullptr;
  const void* body = nullptr;

  ~Block() {
    for (Fiber* fiber : fibers) delete fiber;
  }
};

inline Block block;
inline uint64_t schedule_seed = 0;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;

inline cudaError_t refusal = cudaSuccess;

// Lets the next launch fail with a code of the CUDA runtime, and run nothing.
inline void refuse_next(cudaError_t error) { refusal = error; }

// 0 runs threads in order, other values shuffle them differently.
inline void set_schedule(uint64_t seed) { schedule_seed = seed; }

inline void wait_on(const uint64_t* generation) {
  Fiber* self = block.current;
  self->waits_for = generation;
  self->seen = *generation;
  if (_setjmp(self->state) == 0) _longjmp(block.scheduler, 1);
}

inline void entry() {
  block.call(block.body);
  block.current->finished = true;
  _longjmp(block.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  block.current = &fiber;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline int current_lane() { return static_cast<int>(block.current->thread.x & 31u); }
inline Warp& current_warp() { return block.warps[block.current->thread.x >> 5]; }

// All 32 lanes meet; the last one runs `combine` over the 32 records.
template <class Combine>
inline void meet(Operation operation, void* record, Combine combine) {
  Warp& warp = current_warp();
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) stop("lanes of a warp meet in different operations");
  warp.records[current_lane()] = record;
  if (++warp.arrived < 32) {
    wait_on(&warp.generation);
    return;
  }
  combine(warp.records);
  warp.arrived = 0;
  ++warp.generation;
}

inline void prepare_fibers(int threads) {
  while (static_cast<int>(block.fibers.size()) < threads) {
    Fiber* fiber = new Fiber;
    fiber->stack = new unsigned char[kStack];
    block.fibers.push_back(fiber);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
    fiber.thread = dim3(static_cast<unsigned>(i), 0, 0);
    fiber.started = fiber.finished = false;
    fiber.waits_for = nullptr;
    fiber.groups.clear();
    fiber.open.clear();
  }
}

inline void run_threads(int threads) {
  prepare_fibers(threads);
  std::vector<int> order(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) order[static_cast<size_t>(i)] = i;
  uint64_t random = schedule_seed * 6364136223846793005ull + 1442695040888963407ull;
  for (int i = threads - 1; schedule_seed != 0 && i > 0; --i) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>((random >> 33) % static_cast<uint64_t>(i + 1))]);
  }
  volatile int left = threads;
  while (left > 0) {
    volatile bool progress = false;
    for (volatile int i = 0; i < threads; i = i + 1) {
      Fiber& fiber = *block.fibers[static_cast<size_t>(order[static_cast<size_t>(i)])];
      if (fiber.finished || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) continue;
      fiber.waits_for = nullptr;
      resume(fiber);
      progress = true;
      if (block.current->finished) left = left - 1;
    }
    if (!progress) stop("threads wait at a barrier or in a warp operation that others never reach");
  }
}

// Runs call(body) once for every thread of every block.
inline void run_grid(dim3 grid, dim3 size, size_t shared, void (*call)(const void*), const void* body) {
  if (size.y != 1 || size.z != 1 || size.x % 32 != 0 || size.x == 0 || size.x > 1024) stop("block size is not 32..1024 in x");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) stop("grid size out of range");
  if (shared > 227 * 1024) stop("more dynamic shared memory than any machine has");
  block.grid = grid;
  block.size = size;
  block.threads = static_cast<int>(size.x);
  block.call = call;
  block.body = body;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = dim3(x, y, z);
        block.shared.assign(shared + kGuard + 128, 0xff);
        block.warps.assign(size.x / 32, Warp());
        block.arrived = 0;
        run_threads(block.threads);
        const unsigned char* end = block.shared.data() + block.shared.size();
        for (const unsigned char* p = end - kGuard; p < end; ++p)
          if (*p != 0xff) stop("a write past the end of dynamic shared memory");
      }
}

}  // namespace emulator
}  // namespace dvdq

#define threadIdx (::dvdq::emulator::block.current->thread)
#define blockIdx (::dvdq::emulator::block.index)
#define gridDim (::dvdq::emulator::block.grid)
#define blockDim (::dvdq::emulator::block.size)

#include "machine.h"
