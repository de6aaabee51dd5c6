// Checks of a layer and the choice of its path; host only.
#pragma once

#include "dvdquant/kernels.h"

namespace dvdq {

// The row of a token lies in registers (no outer factor) or in shared memory (outer factor); see rotate_quantize.cu.
constexpr int64_t kMaxTokenChannels = 32768;
constexpr int64_t kMaxOuterChannels = 20480;

// Workspace of dvdq_quant_linear: parts at multiples of 256 bytes, offsets in bytes.
struct WorkspaceLayout {
  int64_t scales, sums, gemm, bytes;  // codes start at 0; sums == gemm where the plan needs none
};

dvdq_status workspace_layout(const dvdq_layer& layer, const dvdq_plan& plan, int32_t sm, int64_t m,
                             WorkspaceLayout* layout);

}  // namespace dvdq
