// What executes where. Host only: no CUDA header, so the table and its messages are tested without a device.
#include "plan.h"

#include <stdio.h>
#include <string.h>

#include "error.h"
#include "gemm.h"
#include "prepared.h"

namespace dvdq {
namespace {

enum Family { kNone, kAmpereAda, kHopper, kBlackwell };

Family family_of(int32_t sm) {
  switch (sm) {
    case 80: case 86: case 87: case 89: return kAmpereAda;
    case 90: return kHopper;
    case 100: case 103: case 110: case 120: case 121: return kBlackwell;
    // A GPU of a later day runs what every GPU runs, by the PTX that is in the library.
    default: return sm < 80 || (sm > 90 && sm < 100) ? kNone : sm < 90 ? kAmpereAda : kBlackwell;
  }
}

#ifndef DVDQ_ARCHITECTURES
#define DVDQ_ARCHITECTURES ""
#endif
// With the mark, a program can read from the file what the library was built for (dvdquant/system/plugin_file.py).
#define DVDQ_MARK "@dvdquant-kernels="
constexpr char kMark[] = DVDQ_MARK;
const char kBuiltFor[] = DVDQ_MARK DVDQ_ARCHITECTURES;

#define LL(value) static_cast<long long>(value)

// Fields that no device could make sense of.
dvdq_status check_layer(const dvdq_layer& layer) {
  const int64_t n = layer.n, k = layer.k;
  if (n < 1 || k < 1 || n > INT32_MAX || k > (1 << 20))
    return fail(DVDQ_BAD_ARGUMENT, "layer of %lld outputs and %lld inputs: n is 1 to 2^31-1, k is 1 to 2^20", LL(n), LL(k));
  if (k % 32) return fail(DVDQ_BAD_ARGUMENT, "k = %lld is no multiple of 32", LL(k));
  if (layer.block < 1 || layer.block > 2048 || (layer.block & (layer.block - 1)))
    return fail(DVDQ_BAD_ARGUMENT, "rotation block %d is no power of two from 1 to 2048", layer.block);
  if (layer.outer < 1 || layer.outer > k || k % (int64_t{layer.block} * layer.outer))
    return fail(DVDQ_BAD_ARGUMENT, "rotation of %d x %d channels does not divide k = %lld", layer.outer, layer.block, LL(k));
  if (layer.weight_groups < 1 || k % layer.weight_groups)
    return fail(DVDQ_BAD_ARGUMENT, "%lld weight groups do not divide k = %lld", LL(layer.weight_groups), LL(k));
  if (k / layer.weight_groups % 8)
    return fail(DVDQ_BAD_ARGUMENT, "weight groups of %lld channels: a multiple of 8 is needed", LL(k / layer.weight_groups));
  if (layer.act_group < 0 || (layer.act_group > 0 && k % layer.act_group))
    return fail(DVDQ_BAD_ARGUMENT, "activation groups of %d do not divide k = %lld", layer.act_group, LL(k));
  if (layer.dtype != DVDQ_BF16 && layer.dtype != DVDQ_FP16)
    return fail(DVDQ_BAD_ARGUMENT, "dtype %d is neither bf16 (0) nor fp16 (1)", layer.dtype);
  if (layer.float_zero_point != 0 && layer.float_zero_point != 1)
    return fail(DVDQ_BAD_ARGUMENT, "float_zero_point is 0 or 1, not %d", layer.float_zero_point);
  return DVDQ_OK;
}

// Valid layers that our kernels do not run anywhere.
dvdq_status check_supported(const dvdq_layer& layer) {
  if (layer.act_bits != 4 && layer.act_bits != 8)
    return fail(DVDQ_UNSUPPORTED, "%d-bit activations: the kernels run 4 and 8 bits", layer.act_bits);
  if (layer.act_group != 0 && layer.act_group != 64 && layer.act_group != 128)
    return fail(DVDQ_UNSUPPORTED, "activation groups of %d: the kernels run one scale per token (0), 64 or 128 channels",
                layer.act_group);
  // Hadamard matrices have order 1, 2 or a multiple of 4.
  if (layer.outer > 1 && layer.outer % 4 && (layer.outer != 2 || layer.block < 4))
    return fail(DVDQ_UNSUPPORTED, "rotation of %d x %d channels: the kernels run outer factors 2 (blocks from 4) and multiples of 4",
                layer.outer, layer.block);
  if (layer.outer > 1 && layer.k > kMaxOuterChannels)
    return fail(DVDQ_UNSUPPORTED, "rotation with an outer factor of %d over k = %lld: the kernels hold rows of up to %lld",
                layer.outer, LL(layer.k), LL(kMaxOuterChannels));
  if (layer.act_group == 0 && layer.k > kMaxTokenChannels)
    return fail(DVDQ_UNSUPPORTED, "one scale per token over k = %lld: the kernels hold rows of up to %lld; use groups",
                LL(layer.k), LL(kMaxTokenChannels));
  return DVDQ_OK;
}

dvdq_path choose(const dvdq_layer& layer, Family family) {
  const bool by_row = layer.weight_groups == 1;
  if (layer.act_group == 0) {
    if (family == kHopper) return DVDQ_PATH_S8_WGMMA;
    return family == kAmpereAda && layer.act_bits == 4 && by_row ? DVDQ_PATH_S4_TOKEN : DVDQ_PATH_S8_TOKEN;
  }
  if (layer.act_bits == 8) return DVDQ_PATH_S8_GROUP;
  // The epilogue of the e4m3 path writes 8 outputs at a time.
  const bool e4m3 = layer.act_group == 128 && by_row && layer.n % 8 == 0;
  if (family == kHopper) return e4m3 ? DVDQ_PATH_E4M3_GROUP : DVDQ_PATH_S8_GROUP;
  // One group scale of the weight per step of the loop: a weight group has to cover whole activation groups.
  const bool whole = by_row || layer.k / layer.weight_groups % layer.act_group == 0;
  return family == kAmpereAda && whole ? DVDQ_PATH_S4_GROUP : DVDQ_PATH_S8_GROUP;
}

}  // namespace

dvdq_status workspace_layout(const dvdq_layer& layer, const dvdq_plan& plan, int32_t sm, int64_t m,
                             WorkspaceLayout* layout) {
  if (m < 0 || m > INT32_MAX) return fail(DVDQ_BAD_ARGUMENT, "%lld tokens: 0 to 2^31-1", LL(m));
  const int64_t per_scale = align_up(m * plan.scale_rows * 4);
  layout->scales = align_up(m * plan.codes_bytes_per_token);
  layout->sums = layout->scales + per_scale;
  layout->gemm = layout->sums + (plan.needs_sums ? per_scale : 0);
  layout->bytes = layout->gemm + gemm_workspace_bytes(static_cast<dvdq_path>(plan.path), m, layer.n, layer.k, sm);
  return DVDQ_OK;
}

}  // namespace dvdq

using namespace dvdq;

extern "C" {

int32_t dvdq_abi_version(void) { return DVDQ_ABI_VERSION; }

const char* dvdq_architectures(void) { return kBuiltFor + sizeof kMark - 1; }

const char* dvdq_path_name(int32_t path) {
  static const char* const names[] = {"S4_TOKEN", "S4_GROUP", "S8_TOKEN", "S8_GROUP", "S8_WGMMA", "E4M3_GROUP"};
  return path >= 0 && path < 6 ? names[path] : "unknown";
}

dvdq_status dvdq_plan_layer(const dvdq_layer* layer, int32_t sm, dvdq_plan* plan) {
  if (layer == nullptr || plan == nullptr) return fail(DVDQ_BAD_ARGUMENT, "dvdq_plan_layer: a null pointer");
  dvdq_status status = check_layer(*layer);
  if (status != DVDQ_OK) return status;
  const Family family = family_of(sm);
  if (family == kNone)
    return fail(DVDQ_UNSUPPORTED, "SM %d.%d: the kernels run on SM 8.0 to 8.9, 9.0, and 10.0 and later",
                sm / 10, sm % 10);
  status = check_supported(*layer);
  if (status != DVDQ_OK) return status;
  const dvdq_path path = choose(*layer, family);
  memset(plan, 0, sizeof *plan);
  plan->path = path;
  plan->codes = is_s4(path) ? DVDQ_CODES_S4 : path == DVDQ_PATH_E4M3_GROUP ? DVDQ_CODES_E4M3 : DVDQ_CODES_S8;
  plan->scale_rows = layer->act_group ? static_cast<int32_t>(layer->k / layer->act_group) : 1;
  plan->needs_sums = is_s4(path);
  plan->prepared_bytes = prepared_layout(*layer, path).bytes;
  plan->codes_bytes_per_token = is_s4(path) ? layer->k / 2 : layer->k;
  return DVDQ_OK;
}

dvdq_status dvdq_workspace_bytes(const dvdq_layer* layer, int32_t sm, int64_t m, int64_t* bytes) {
  if (bytes == nullptr) return fail(DVDQ_BAD_ARGUMENT, "dvdq_workspace_bytes: a null pointer");
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status != DVDQ_OK) return status;
  WorkspaceLayout layout{};
  status = workspace_layout(*layer, plan, sm, m, &layout);
  if (status == DVDQ_OK) *bytes = layout.bytes;
  return status;
}

}  // extern "C"
