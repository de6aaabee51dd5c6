// cudaStream_t and friends: from the CUDA runtime, from the emulator, or declared here for host-only builds.
#pragma once

#if defined(DVDQ_EMULATE)
#include "../emulator/emulator.h"
#elif defined(DVDQ_HOST_ONLY)
typedef struct CUstream_st* cudaStream_t;
#else
#include <cuda_runtime.h>
#endif
