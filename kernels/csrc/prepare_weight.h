// Launcher of prepare_weight; arguments are checked by the caller (api.cpp).
#pragma once

#include "dvdquant/kernels.h"
#include "runtime.h"

namespace dvdq {

dvdq_status prepare_weight(const dvdq_layer& layer, const dvdq_plan& plan, const dvdq_weight& weight, void* prepared,
                           cudaStream_t stream);

}  // namespace dvdq
