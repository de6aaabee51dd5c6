// S4_GROUP and S8_GROUP, and the fallback of the per-token paths for n that is not a multiple of 8.
#include "mma_grouped.cuh"

#include "gemm.h"

namespace dvdq {
namespace {

using grouped::Kind;
using grouped::Params;

// Checks what both code widths need, and fills the kernel's parameters. `bits` of a code.
dvdq_status prepare(const GemmArgs& args, int bits, const char* name, Params* params) {
  const int64_t group = args.act_group > 0 ? args.act_group : args.k;
  const int step = 32 * 8 / bits;  // channels of one mma
  // A group ends where an mma ends; a single one may end anywhere, the rest of its last mma is zeros.
  if (args.k % 32 != 0 || args.k % group != 0 || (group != args.k && group % step != 0)) {
    return fail(DVDQ_UNSUPPORTED,
                "%s runs k that is a multiple of 32 and of the group, and groups that are multiples of %d; not k %lld "
                "in groups of %lld",
                name, step, static_cast<long long>(args.k), static_cast<long long>(group));
  }
  const int64_t blocks =
      ((args.m + grouped::kTile - 1) / grouped::kTile) * ((args.n + grouped::kTile - 1) / grouped::kTile);
  if (blocks > INT32_MAX || args.k > INT32_MAX) {
    return fail(DVDQ_UNSUPPORTED, "%s: m %lld by n %lld is more than 2^31 tiles of 128 x 128", name,
                static_cast<long long>(args.m), static_cast<long long>(args.n));
  }
  params->codes = static_cast<const unsigned char*>(args.codes);
  params->weight = static_cast<const unsigned char*>(args.weight);
  params->scales = args.scales;
  params->sums = args.sums;
  params->row_scale = args.row_scale;
  params->row_zero = args.row_zero;
  params->bias = args.bias;
  params->group_scale = args.group_scale;
  params->group_zero = args.float_zero_point ? static_cast<const uint8_t*>(args.group_zero) : nullptr;
  params->y = static_cast<uint16_t*>(args.y);
  params->m = args.m;
  params->n = args.n;
  params->row_bytes = args.k * bits / 8;
  params->weight_groups = args.weight_groups;
  params->group_steps = static_cast<int>((group + step - 1) / step);
  params->groups_per_weight_group = static_cast<int>(args.k / args.weight_groups / group);
  params->half = args.dtype == DVDQ_FP16;
  return DVDQ_OK;
}

template <Kind kind>
dvdq_status start(const GemmArgs& args, const Params& params, const char* name) {
  const int64_t blocks =
      ((args.m + grouped::kTile - 1) / grouped::kTile) * ((args.n + grouped::kTile - 1) / grouped::kTile);
  return check_cuda(launch(grouped::gemm<kind>, dim3(static_cast<unsigned>(blocks)), dim3(grouped::kThreads),
                           grouped::kSharedBytes, args.stream, params),
                    name);
}

constexpr int64_t kSmallLimit = int64_t{1} << 22;  // see grouped::to_float

}  // namespace

dvdq_status grouped_s4(const GemmArgs& args) {
  if (args.sm < 80 || args.sm >= 90) {
    return fail(DVDQ_UNSUPPORTED,
                "s4 tensor cores exist on SM 8.0 to 8.9, not on SM %d.%d; s8 paths can run this layer", args.sm / 10,
                args.sm % 10);
  }
  const int64_t group = args.act_group > 0 ? args.act_group : args.k;
  if (args.weight_groups < 1 || args.k % args.weight_groups != 0 || (args.k / args.weight_groups) % group != 0) {
    return fail(DVDQ_UNSUPPORTED,
                "s4_group runs weight groups that are multiples of the activation group, not %lld of %lld channels "
                "with %lld; s8_group can run this layer",
                static_cast<long long>(args.weight_groups), static_cast<long long>(args.k),
                static_cast<long long>(group));
  }
  if (group * 8 * 8 >= kSmallLimit) {
    return fail(DVDQ_UNSUPPORTED, "s4_group runs groups below 65536 channels, not %lld", static_cast<long long>(group));
  }
  Params params{};
  const dvdq_status status = prepare(args, 4, "s4_group", &params);
  if (status != DVDQ_OK) return status;
  return args.weight_groups > 1 ? start<Kind::kS4Weighted>(args, params, "s4_group")
                                : start<Kind::kS4>(args, params, "s4_group");
}

dvdq_status grouped_s8(const GemmArgs& args) {
  const int64_t group = args.act_group > 0 ? args.act_group : args.k;
  if (group * 128 * 128 >= int64_t{1} << 31) {
    return fail(DVDQ_UNSUPPORTED, "s8_group runs groups below 131072 channels, not %lld",
                static_cast<long long>(group));
  }
  Params params{};
  GemmArgs plain = args;  // the weights are expanded: one scale per row, no zero-point
  plain.weight_groups = 1;
  plain.sums = nullptr;
  const dvdq_status status = prepare(plain, 8, "s8_group", &params);
  if (status != DVDQ_OK) return status;
  return group * 128 * 128 < kSmallLimit ? start<Kind::kS8Small>(args, params, "s8_group")
                                         : start<Kind::kS8>(args, params, "s8_group");
}

dvdq_status gemm_s4_group(const GemmArgs& args) { return grouped_s4(args); }
dvdq_status gemm_s8_group(const GemmArgs& args) { return grouped_s8(args); }

}  // namespace dvdq
