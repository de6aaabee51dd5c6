// The quantizer's part of the C ABI: checks, then the launchers of search_grid.h.
#include <stdint.h>

#include "dvdquant/kernels.h"
#include "error.h"
#include "search_grid.h"

namespace dvdq {
namespace {

// Of every SM since 8.0 (8.6, 8.9 and 12.0 have the least).
constexpr int64_t kSharedBytes = 99 * 1024;
constexpr int64_t kMaxFeatures = 20480, kMaxGroup = 256, kMaxBlock = 256;

dvdq_status check_grid(const char* function, const dvdq_grid* grid) {
  if (grid == nullptr) return fail(DVDQ_BAD_ARGUMENT, "%s: grid is null", function);
  const int64_t n = grid->n, k = grid->k, groups = grid->groups;
  if (n < 0 || n > INT32_MAX || k < 16 || k > kMaxFeatures || k % 16)
    return fail(DVDQ_BAD_ARGUMENT, "%s: %lld x %lld weights; rows up to 2^31-1 of 16 to %lld columns in multiples of 16", function,
                static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(kMaxFeatures));
  if (groups < 1 || k % groups || (groups > 1 && (k / groups % 16 || k / groups > kMaxGroup)))
    return fail(DVDQ_BAD_ARGUMENT, "%s: %lld groups of %lld columns; groups of 16 to %lld columns in multiples of 16", function,
                static_cast<long long>(groups), static_cast<long long>(k), static_cast<long long>(kMaxGroup));
  if (grid->zero_point < DVDQ_ZERO_MIDRISE || grid->zero_point > DVDQ_ZERO_FLOAT || grid->solver < DVDQ_SOLVER_MINMAX ||
      grid->solver > DVDQ_SOLVER_SEARCH)
    return fail(DVDQ_BAD_ARGUMENT, "%s: zero_point %d or solver %d is unknown", function, grid->zero_point, grid->solver);
  return DVDQ_OK;
}

dvdq_status check_buffers(const char* function, const dvdq_grid& grid, const void* weight, const dvdq_grid_out* out) {
  if (out == nullptr || weight == nullptr || out->codes == nullptr || out->scale == nullptr || out->group_scale == nullptr ||
      out->zero == nullptr)
    return fail(DVDQ_BAD_ARGUMENT, "%s: a buffer is null", function);
  const bool bytes = grid.zero_point == DVDQ_ZERO_FLOAT;
  const uintptr_t words = reinterpret_cast<uintptr_t>(weight) | reinterpret_cast<uintptr_t>(out->scale) |
                          (bytes ? 0 : reinterpret_cast<uintptr_t>(out->zero));
  if (words % 4) return fail(DVDQ_BAD_ARGUMENT, "%s: a buffer of floats is not aligned to 4 bytes", function);
  return DVDQ_OK;
}

}  // namespace
}  // namespace dvdq

using namespace dvdq;

extern "C" {

dvdq_status dvdq_search_grid(const dvdq_grid* grid, const float* weight, const dvdq_grid_out* out, dvdq_stream stream) {
  dvdq_status status = check_grid("dvdq_search_grid", grid);
  if (status != DVDQ_OK || grid->n == 0) return status;
  status = check_buffers("dvdq_search_grid", *grid, weight, out);
  if (status != DVDQ_OK) return status;
  if (search_shared_bytes(grid->k, grid->groups) > kSharedBytes)
    return fail(DVDQ_UNSUPPORTED, "dvdq_search_grid: a row of %lld columns in %lld groups needs %lld bytes of shared memory, "
                "and there are %lld", static_cast<long long>(grid->k), static_cast<long long>(grid->groups),
                static_cast<long long>(search_shared_bytes(grid->k, grid->groups)), static_cast<long long>(kSharedBytes));
  return search_grid(*grid, weight, *out, static_cast<cudaStream_t>(stream));
}

dvdq_status dvdq_gptq_round(const dvdq_grid* grid, const float* weight, const dvdq_grid_out* out, const float* factors,
                                int64_t block, dvdq_stream stream) {
  dvdq_status status = check_grid("dvdq_gptq_round", grid);
  if (status != DVDQ_OK) return status;
  if (block < 16 || block > kMaxBlock || grid->k % block)
    return fail(DVDQ_BAD_ARGUMENT, "dvdq_gptq_round: blocks of %lld of %lld columns; 16 to %lld that divide them",
                static_cast<long long>(block), static_cast<long long>(grid->k), static_cast<long long>(kMaxBlock));
  if (grid->n == 0) return status;
  status = check_buffers("dvdq_gptq_round", *grid, weight, out);
  if (status != DVDQ_OK) return status;
  if (factors == nullptr || reinterpret_cast<uintptr_t>(factors) % 4)
    return fail(DVDQ_BAD_ARGUMENT, "dvdq_gptq_round: factors is null or not aligned to 4 bytes");
  return gptq_round(*grid, weight, *out, factors, block, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
