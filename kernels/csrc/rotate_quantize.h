// Launcher of RQ; arguments are checked by the caller (api.cpp).
#pragma once

#include "dvdquant/kernels.h"
#include "runtime.h"

namespace dvdq {

struct RotateArgs {
  const void* x;              // [m, k] of layer.dtype, 16-byte aligned
  const void* pre_quant;        // [k / 8, 2, 8] of layer.dtype, 16-byte aligned; or null
  const float* outer_matrix;  // [p, p]; null when layer.outer == 1
  void* codes;                // as plan.codes, 16-byte aligned
  float* scales;              // [plan.scale_rows, m]
  float* sums;                // as scales, or null
  int64_t m;                  // >= 1
  cudaStream_t stream;
};

dvdq_status rotate_quantize(const dvdq_layer& layer, const dvdq_plan& plan, const RotateArgs& args);

}  // namespace dvdq
