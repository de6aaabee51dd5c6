// The C ABI of weights that stay packed: the codes as the files hold them, expanded just before a product where its path
// multiplies 8 bits. Plain C++.
#include <stdint.h>

#include "dvdquant/kernels.h"
#include "error.h"
#include "multiply.h"
#include "packed_weight.h"
#include "plan.h"
#include "prepared.h"

namespace dvdq {
namespace {

// Workspace of dvdq_packed_linear: that of dvdq_quant_linear, and behind it what the weight is expanded into.
struct PackedWorkspace {
  WorkspaceLayout before;
  int64_t expanded, bytes;  // expanded == bytes where the path multiplies the packed codes themselves
};

dvdq_status packed_workspace(const dvdq_layer& layer, const dvdq_plan& plan, int32_t sm, int64_t m, PackedWorkspace* at) {
  const dvdq_status status = workspace_layout(layer, plan, sm, m, &at->before);
  if (status != DVDQ_OK) return status;
  at->expanded = is_s4(plan.path) ? at->before.bytes : align_up(at->before.bytes);
  at->bytes = at->expanded + (is_s4(plan.path) ? 0 : plan.prepared_bytes);
  return DVDQ_OK;
}

// Codes are read by rows of k / 2 bytes, which are multiples of 16; group scales and zero-points byte by byte.
dvdq_status check_weight(const char* function, const dvdq_layer& layer, const dvdq_weight* weight, const void* rows) {
  if (weight == nullptr) return fail(DVDQ_BAD_ARGUMENT, "%s: weight is null", function);
  const bool grouped = layer.weight_groups > 1;
  const Named pointers[] = {{"weight.codes", weight->codes, false, 16},
                            {"weight.group_scale", weight->group_scale, !grouped, 1},
                            {"weight.zero", weight->zero, !grouped || !layer.float_zero_point, 1},
                            {"rows", rows, false, 256}};
  return check_pointers(function, pointers);
}

// The parts of a packed weight as S4 paths multiply them.
WeightView view_of_packed(const dvdq_layer& layer, const dvdq_weight& weight, const void* rows) {
  const unsigned char* const base = static_cast<const unsigned char*>(rows);
  const RowsLayout at = rows_layout(layer);
  const PackedGroups groups = packed_groups(layer, weight);
  WeightView view{};
  view.weight = weight.codes;
  view.row_scale = reinterpret_cast<const float*>(base + at.row_scale);
  view.row_zero = reinterpret_cast<const float*>(base + at.row_zero);
  view.bias = reinterpret_cast<const float*>(base + at.bias);
  view.group_scale = groups.group_scale;
  view.group_zero = groups.zero;
  return view;
}

// RQ, with a prologue or not, and QL on a packed weight.
dvdq_status run_packed(const char* function, const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                       const void* pre_quant, const float* outer_matrix, const dvdq_weight* weight, const void* rows, void* y,
                       int64_t m, void* workspace, int64_t workspace_bytes, dvdq_stream stream) {
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status == DVDQ_OK) status = check_tokens(function, m);
  if (status != DVDQ_OK || m == 0) return status;
  PackedWorkspace at{};
  status = packed_workspace(*layer, plan, sm, m, &at);
  if (status == DVDQ_OK) status = check_weight(function, *layer, weight, rows);
  if (status != DVDQ_OK) return status;
  Quantized q{};
  status = quantize_into(function, layer, plan, sm, prologue, x, pre_quant, outer_matrix, m, at.before, at.bytes, workspace,
                         workspace_bytes, stream, &q);
  if (status != DVDQ_OK) return status;
  if (is_s4(plan.path)) {
    const WeightView view = view_of_packed(*layer, *weight, rows);
    return multiply(*layer, plan, sm, q.codes, q.scales, q.sums, view, y, m, q.gemm, q.gemm_bytes, stream);
  }
  // After the codes, so that the product finds what fits of the weight in the L2 cache.
  unsigned char* const expanded = static_cast<unsigned char*>(workspace) + at.expanded;
  status = expand_packed(*layer, plan, *weight, rows, expanded, static_cast<cudaStream_t>(stream));
  if (status != DVDQ_OK) return status;
  return dvdq_linear_gemm(layer, sm, q.codes, q.scales, q.sums, expanded, y, m, q.gemm, q.gemm_bytes, stream);
}

}  // namespace
}  // namespace dvdq

using namespace dvdq;

extern "C" {

dvdq_status dvdq_rows_bytes(const dvdq_layer* layer, int32_t sm, int64_t* bytes) {
  if (bytes == nullptr) return fail(DVDQ_BAD_ARGUMENT, "dvdq_rows_bytes: a null pointer");
  dvdq_plan plan;
  const dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status == DVDQ_OK) *bytes = rows_layout(*layer).bytes;
  return status;
}

dvdq_status dvdq_make_rows(const dvdq_layer* layer, int32_t sm, const dvdq_weight* weight, void* rows, int64_t rows_bytes,
                           dvdq_stream stream) {
  int64_t needed = 0;
  dvdq_status status = dvdq_rows_bytes(layer, sm, &needed);
  if (status == DVDQ_OK) status = check_stored("dvdq_make_rows", *layer, weight, "rows", rows);
  if (status != DVDQ_OK) return status;
  if (rows_bytes < needed)
    return fail(DVDQ_WORKSPACE, "the rows of the weight need %lld bytes, the buffer has %lld", static_cast<long long>(needed),
                static_cast<long long>(rows_bytes));
  return make_rows(*layer, *weight, rows, static_cast<cudaStream_t>(stream));
}

dvdq_status dvdq_expand_weight(const dvdq_layer* layer, int32_t sm, const dvdq_weight* weight, const void* rows, void* prepared,
                               int64_t prepared_bytes, dvdq_stream stream) {
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status == DVDQ_OK) status = check_weight("dvdq_expand_weight", *layer, weight, rows);
  const Named pointers[] = {{"prepared", prepared, false, 256}};
  if (status == DVDQ_OK) status = check_pointers("dvdq_expand_weight", pointers);
  if (status != DVDQ_OK) return status;
  if (is_s4(plan.path))
    return fail(DVDQ_UNSUPPORTED, "path %s multiplies the packed weight itself: there is nothing to expand",
                dvdq_path_name(plan.path));
  if (prepared_bytes < plan.prepared_bytes)
    return fail(DVDQ_WORKSPACE, "the expanded weight needs %lld bytes, the buffer has %lld",
                static_cast<long long>(plan.prepared_bytes), static_cast<long long>(prepared_bytes));
  return expand_packed(*layer, plan, *weight, rows, prepared, static_cast<cudaStream_t>(stream));
}

dvdq_status dvdq_packed_workspace_bytes(const dvdq_layer* layer, int32_t sm, int64_t m, int64_t* bytes) {
  if (bytes == nullptr) return fail(DVDQ_BAD_ARGUMENT, "dvdq_packed_workspace_bytes: a null pointer");
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  PackedWorkspace at{};
  if (status == DVDQ_OK) status = packed_workspace(*layer, plan, sm, m, &at);
  if (status == DVDQ_OK) *bytes = at.bytes;
  return status;
}

dvdq_status dvdq_packed_linear(const dvdq_layer* layer, int32_t sm, const void* x, const void* pre_quant,
                               const float* outer_matrix, const dvdq_weight* weight, const void* rows, void* y, int64_t m,
                               void* workspace, int64_t workspace_bytes, dvdq_stream stream) {
  return run_packed("dvdq_packed_linear", layer, sm, nullptr, x, pre_quant, outer_matrix, weight, rows, y, m, workspace,
                    workspace_bytes, stream);
}

dvdq_status dvdq_packed_fused_linear(const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                                     const void* pre_quant, const dvdq_weight* weight, const void* rows, void* y, int64_t m,
                                     void* workspace, int64_t workspace_bytes, dvdq_stream stream) {
  if (prologue == nullptr) return fail(DVDQ_BAD_ARGUMENT, "dvdq_packed_fused_linear: the prologue is null");
  return run_packed("dvdq_packed_fused_linear", layer, sm, prologue, x, pre_quant, nullptr, weight, rows, y, m, workspace,
                    workspace_bytes, stream);
}

}  // extern "C"
