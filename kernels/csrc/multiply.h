// What the two entries of a product share: a prepared weight in one buffer (api.cpp), and one that stays packed (packed_api.cpp).
#pragma once

#include <stdint.h>

#include "dvdquant/kernels.h"

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

// The parts of a weight as the launchers take them (gemm.h); factor and group_zero may be null.
struct WeightView {
  const void* weight;
  const float *row_scale, *row_zero, *bias;
  const uint8_t* factor;
  const void* group_zero;
};

// QL of checked weight pointers: checks the others, and launches. m >= 1.
dvdq_status multiply(const dvdq_layer& layer, const dvdq_plan& plan, int32_t sm, const void* codes, const float* scales,
                     const float* sums, const WeightView& weight, void* y, int64_t m, void* workspace,
                     int64_t workspace_bytes, dvdq_stream stream);

}  // namespace dvdq
