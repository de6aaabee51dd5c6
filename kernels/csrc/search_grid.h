// Launchers of the quantizer's kernels; arguments are checked by the caller (quantizer_api.cpp).
#pragma once

#include "dvdquant/kernels.h"
#include "runtime.h"

namespace dvdq {

// Dynamic shared memory of search_grid: the row and two floats per group; of gptq_round: a block of 32 rows.
int64_t search_shared_bytes(int64_t k, int64_t groups);
int64_t gptq_shared_bytes(int64_t block);

dvdq_status search_grid(const dvdq_grid& grid, const float* weight, const dvdq_grid_out& out, cudaStream_t stream);
dvdq_status gptq_round(const dvdq_grid& grid, const float* weight, const dvdq_grid_out& out, const float* factors,
                           int64_t block, cudaStream_t stream);

}  // namespace dvdq
