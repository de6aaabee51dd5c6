// cudaStream_t: from the CUDA runtime, or declared here for builds without it (the emulator's name for it; host-only builds).
#pragma once

#if defined(DVDQ_EMULATE)
typedef struct emulated_stream* cudaStream_t;
#elif defined(DVDQ_HOST_ONLY)
typedef struct CUstream_st* cudaStream_t;
#else
#include <cuda_runtime.h>
#endif
