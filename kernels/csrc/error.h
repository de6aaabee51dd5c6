// The error text of the calling thread, and the two ways to fail.
#pragma once

#include "dvdquant/kernels.h"

namespace dvdq {

// Sets dvdq_last_error's text (printf format, cut at 511 characters) and returns `status`.
__attribute__((format(printf, 2, 3))) dvdq_status fail(dvdq_status status, const char* format, ...);

// The status of a code of the CUDA runtime that is not cudaSuccess: DVDQ_OUT_OF_MEMORY for cudaErrorMemoryAllocation.
inline dvdq_status cuda_failure(int error) { return error == 2 ? DVDQ_OUT_OF_MEMORY : DVDQ_CUDA_ERROR; }

// DVDQ_OK for cudaSuccess; otherwise the status of `cuda_failure` with "`what`: text of the runtime (name)".
dvdq_status check_cuda(int error, const char* what);

}  // namespace dvdq
