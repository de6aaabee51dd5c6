// Launcher of RQ with a prologue; arguments are checked by the caller (api.cpp).
#pragma once

#include "dvdquant/kernels.h"
#include "rotate_quantize.h"

namespace dvdq {

// args.outer_matrix is null: the prologue needs the row in registers.
dvdq_status fused_quantize(const dvdq_layer& layer, const dvdq_plan& plan, const dvdq_prologue& prologue,
                           const RotateArgs& args);

}  // namespace dvdq
