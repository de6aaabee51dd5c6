// The multiplication of one layer, one launcher per path; arguments are checked by the caller (api.cpp).
//
// A launcher enqueues its kernel on `stream` and returns: no allocation, no synchronisation, no exception.
#pragma once

#include <stdint.h>

#include "dvdquant/kernels.h"
#include "error.h"
#include "runtime.h"

namespace dvdq {

// Pointers are to device memory; layouts as in dvdquant/kernels.h and prepared.h.
struct GemmArgs {
  const void* codes;       // [m, k] as the plan's codes: int8, e4m3, or packed int4 [m, k / 2]
  const float* scales;     // [m], or group-major [k / act_group, m]
  const float* sums;       // as scales; null unless the plan needs sums
  const void* weight;      // [n, k] int8 or e4m3, or packed int4 [n, k / 2]
  const float* row_scale;  // [n]
  const float* row_zero;   // [n]; zeros where the codes carry the zero-point
  const float* bias;       // [n]; zeros where the layer has none
  const uint8_t* group_scale;  // S4_GROUP with weight_groups > 1: [n, weight_groups], 255 = 1; else null
  const void* group_zero;  // S4_GROUP with float_zero_point: uint8 [n, weight_groups], z = byte / 16 - 8; else null
  void* y;                 // [m, n] of dtype
  int64_t m, n, k;
  int32_t act_group;       // channels per activation scale; 0 = whole token
  int64_t weight_groups;
  bool float_zero_point;
  dvdq_dtype dtype;
  void* workspace;         // gemm_workspace_bytes(...) bytes, 256-byte aligned; may be null when that is 0
  int64_t workspace_bytes;
  cudaStream_t stream;
  int sm;                  // major * 10 + minor of the current device
};

// m >= 1. DVDQ_OK means launched; failures set the thread's error text through fail (error.h). acc is the exact int32 dot
// product of codes, of a whole row or of group g; s and sum are the activation's scales and sums of codes.
//
// SM 8.x: y = row_scale[n] * (s[m] * (acc - row_zero[n] * sum[m])) + bias[n].
dvdq_status gemm_s4_token(const GemmArgs& args);
// SM 8.x: y = row_scale[n] * sum_g s[m, g] * f[n, g] / 255 * (acc_g - z[n, g] * sum[m, g]) + bias[n].
dvdq_status gemm_s4_group(const GemmArgs& args);
// Everywhere but SM 9.0: y = row_scale[n] * (s[m] * acc) + bias[n].
dvdq_status gemm_s8_token(const GemmArgs& args);
// SM 8.0 and later: y = row_scale[n] * sum_g s[m, g] * acc_g + bias[n].
dvdq_status gemm_s8_group(const GemmArgs& args);
// SM 9.0: as gemm_s8_token, on wgmma.
dvdq_status gemm_s8_wgmma(const GemmArgs& args);
// SM 9.0: as gemm_s8_group with groups of 128 and codes held as e4m3, on wgmma; n a multiple of 8.
dvdq_status gemm_e4m3_group(const GemmArgs& args);

// The mma.sync kernel behind gemm_s4_group and gemm_s8_group; the per-token launchers fall back to it where n is not a
// multiple of 8 (its stores can be scalar). act_group 0 = one group of k channels.
dvdq_status grouped_s4(const GemmArgs& args);
dvdq_status grouped_s8(const GemmArgs& args);

// Scratch that the launcher of a path needs. Host only and must not ask a device.
int64_t gemm_workspace_bytes(dvdq_path path, int64_t m, int64_t n, int64_t k, int sm);

}  // namespace dvdq
