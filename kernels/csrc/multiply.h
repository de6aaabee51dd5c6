// What the two entries of a product share: a prepared weight in one buffer (api.cpp), and one that stays packed (packed_api.cpp).
#pragma once

#include <stdint.h>

#include "dvdquant/kernels.h"
#include "plan.h"
#include "prepared.h"

namespace dvdq {

struct Named {
  const char* name;
  const void* pointer;
  bool optional;
  unsigned alignment;
};

dvdq_status check_pointers(const char* function, const Named* pointers, int count);

template <int Count>
dvdq_status check_pointers(const char* function, const Named (&pointers)[Count]) {
  return check_pointers(function, pointers, Count);
}

dvdq_status check_tokens(const char* function, int64_t m);

// The tensors of a stored weight, and the buffer `to` that something is made of them in.
dvdq_status check_stored(const char* function, const dvdq_layer& layer, const dvdq_weight* weight, const char* name,
                         const void* to);

// What RQ left in the workspace of a call, and the part of it that is for the product.
struct Quantized {
  const void* codes;
  const float *scales, *sums;  // sums may be null
  void* gemm;                  // null where gemm_bytes is 0
  int64_t gemm_bytes;
};

// RQ, with a prologue or not, into a workspace that is laid out by `at` and of which the call needs `needed` bytes. m >= 1.
dvdq_status quantize_into(const char* function, const dvdq_layer* layer, const dvdq_plan& plan, int32_t sm,
                          const dvdq_prologue* prologue, const void* x, const void* pre_quant, const float* outer_matrix,
                          int64_t m, const WorkspaceLayout& at, int64_t needed, void* workspace, int64_t workspace_bytes,
                          dvdq_stream stream, Quantized* to);

// The parts of a weight as the launchers take them (gemm.h); group_scale and group_zero may be null.
struct WeightView {
  const void* weight;
  const float *row_scale, *row_zero, *bias;
  const uint8_t* group_scale;
  const void* group_zero;
};

// The parts of a prepared weight, which lie in one buffer.
inline WeightView view_of(const void* prepared, const PreparedLayout& at) {
  const unsigned char* const base = static_cast<const unsigned char*>(prepared);
  WeightView view{};
  view.weight = prepared;
  view.row_scale = reinterpret_cast<const float*>(base + at.row_scale);
  view.row_zero = reinterpret_cast<const float*>(base + at.row_zero);
  view.bias = reinterpret_cast<const float*>(base + at.bias);
  view.group_scale = at.group_scale < 0 ? nullptr : base + at.group_scale;
  view.group_zero = at.group_zero < 0 ? nullptr : base + at.group_zero;
  return view;
}

// QL of checked weight pointers: checks the others, and launches. m >= 1.
dvdq_status multiply(const dvdq_layer& layer, const dvdq_plan& plan, int32_t sm, const void* codes, const float* scales,
                     const float* sums, const WeightView& weight, void* y, int64_t m, void* workspace,
                     int64_t workspace_bytes, dvdq_stream stream);

}  // namespace dvdq
