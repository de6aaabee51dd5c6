// Packed weight -> prepared weight (prepared.h holds the rules). One block per output row, once per layer at load time.
#include "prepare_weight.h"

#include "device.cuh"
#include "error.h"
#include "prepared.h"
#include "weight_rules.cuh"

namespace dvdq {
namespace {

constexpr int kThreads = 128;

struct Params {
  StoredWeight stored;
  const float* bias;  // may be null
  unsigned char* codes;
  float *to_scale, *to_zero, *to_bias;
  unsigned char *to_group_scale, *to_group_zero;  // null where the path has none
  int path;
};

// Eight codes per step: 4 bytes in, 8 out.
DVDQ_DEVICE void expand_row(const Params& p, const RowRule& rule, int64_t row) {
  const StoredWeight& w = p.stored;
  const unsigned char* const from = w.packed + row * (w.k / 2);
  for (int k = 8 * static_cast<int>(threadIdx.x); k < w.k; k += 8 * kThreads) {
    const uint32_t packed = *reinterpret_cast<const uint32_t*>(from + k / 2);
    const float zero = zero_of(w, row, k / w.width), step = step_of(w, row, k / w.width);
    uint32_t words[2] = {0u, 0u};
    // Not unrolled: a load-time kernel, and eight copies of a division would not fit the registers.
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const uint32_t byte = expand(rule, p.path == DVDQ_PATH_E4M3_GROUP, zero, step, nibble(packed, i));
      if (i < 4) words[0] |= byte << (8 * i);
      else words[1] |= byte << (8 * (i - 4));
    }
    store_8(p.codes + row * w.k + k, make_uint2(words[0], words[1]));
  }
}

DVDQ_DEVICE void copy_row(const Params& p, int64_t row) {
  const StoredWeight& w = p.stored;
  const int bytes = w.k / 2;
  for (int i = 16 * static_cast<int>(threadIdx.x); i < bytes; i += 16 * kThreads) {
    store_16(p.codes + row * bytes + i, load_16(w.packed + row * bytes + i));
  }
  if (p.to_group_scale != nullptr) copy_bytes<kThreads>(p.to_group_scale + row * w.groups, w.group_scale + row * w.groups, w.groups);
  if (p.to_group_zero != nullptr) copy_bytes<kThreads>(p.to_group_zero + row * w.groups, w.byte_zero + row * w.groups, w.groups);
}

__global__ void __launch_bounds__(kThreads) expand_weight(const Params p) {
  const int64_t row = blockIdx.x;
  uint32_t* const shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  float scale = p.stored.scale[row], zero = 0.0f;
  if (p.path == DVDQ_PATH_S4_TOKEN || p.path == DVDQ_PATH_S4_GROUP) {
    copy_row(p, row);
    if (p.stored.groups == 1) scale = step_of(p.stored, row, 0);
    if (p.to_group_zero == nullptr) zero = zero_of(p.stored, row, 0);
  } else {
    const RowRule rule = choose_rule<kThreads>(p.stored, p.path == DVDQ_PATH_E4M3_GROUP, row, shared);
    expand_row(p, rule, row);
    scale = rule.row_scale;
  }
  if (threadIdx.x == 0) {
    p.to_scale[row] = scale;
    p.to_zero[row] = zero;
    p.to_bias[row] = p.bias == nullptr ? 0.0f : p.bias[row];
  }
}

}  // namespace

dvdq_status prepare_weight(const dvdq_layer& layer, const dvdq_plan& plan, const dvdq_weight& weight, void* prepared,
                           cudaStream_t stream) {
  const PreparedLayout at = prepared_layout(layer, plan.path);
  unsigned char* const base = static_cast<unsigned char*>(prepared);
  Params p{};
  p.stored = stored_weight(layer, weight);
  p.bias = weight.bias;
  p.codes = base;
  p.to_scale = reinterpret_cast<float*>(base + at.row_scale);
  p.to_zero = reinterpret_cast<float*>(base + at.row_zero);
  p.to_bias = reinterpret_cast<float*>(base + at.bias);
  p.to_group_scale = at.group_scale < 0 ? nullptr : base + at.group_scale;
  p.to_group_zero = at.group_zero < 0 ? nullptr : base + at.group_zero;
  p.path = plan.path;
  return check_cuda(launch(expand_weight, dim3(static_cast<unsigned>(layer.n)), dim3(kThreads), 16, stream, p), "prepare_weight");
}

}  // namespace dvdq
