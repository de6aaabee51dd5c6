#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#if !defined(DVDQ_EMULATE) && !defined(DVDQ_HOST_ONLY)
#include <cuda_runtime.h>
#endif

namespace dvdq {
namespace {
thread_local char text[512] = "no error";
}

dvdq_status fail(dvdq_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return status;
}

dvdq_status check_cuda(int error, const char* what) {
  if (error == 0) return DVDQ_OK;
#if !defined(DVDQ_EMULATE) && !defined(DVDQ_HOST_ONLY)
  static_assert(cudaErrorMemoryAllocation == 2, "cuda_failure");
  const cudaError_t code = static_cast<cudaError_t>(error);
  return fail(cuda_failure(error), "%s: %s (%s)", what, cudaGetErrorString(code), cudaGetErrorName(code));
#else
  return fail(cuda_failure(error), "%s: CUDA error %d", what, error);
#endif
}

}  // namespace dvdq

extern "C" const char* dvdq_last_error(void) { return dvdq::text; }
