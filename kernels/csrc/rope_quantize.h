// Launcher of what comes between the layer of q or k and attention; arguments are checked by rope_api.cpp.
#pragma once

#include "dvdquant/kernels.h"
#include "runtime.h"

namespace dvdq {

// A thread holds up to 4 vectors of 8 channels, a block has up to 256 threads.
constexpr int kRopeThreads = 256, kRopeVectors = 4;
constexpr int64_t kRopeChannels = 8 * kRopeThreads * kRopeVectors;

dvdq_status rope_quantize(const dvdq_rope& rope, const void* x, void* out, int64_t m, cudaStream_t stream);

}  // namespace dvdq
