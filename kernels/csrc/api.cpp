// The C ABI: checks, then the launchers. Plain C++; the device code is behind rotate_quantize.h, prepare_weight.h, gemm.h.
#include <stdint.h>

#include "dvdquant/kernels.h"
#include "error.h"
#include "fused_quantize.h"
#include "gemm.h"
#include "multiply.h"
#include "plan.h"
#include "prepare_weight.h"
#include "prepared.h"
#include "rotate_quantize.h"

namespace dvdq {
namespace {

dvdq_status run_path(int32_t path, const GemmArgs& args) {
  switch (path) {
    case DVDQ_PATH_S4_TOKEN: return gemm_s4_token(args);
    case DVDQ_PATH_S4_GROUP: return gemm_s4_group(args);
    case DVDQ_PATH_S8_TOKEN: return gemm_s8_token(args);
    case DVDQ_PATH_S8_GROUP: return gemm_s8_group(args);
    case DVDQ_PATH_S8_WGMMA: return gemm_s8_wgmma(args);
    case DVDQ_PATH_E4M3_GROUP: return gemm_e4m3_group(args);
    default: return fail(DVDQ_BAD_ARGUMENT, "path %d is unknown", path);
  }
}

}  // namespace

dvdq_status check_pointers(const char* function, const Named* pointers, int count) {
  for (int i = 0; i < count; ++i) {
    const Named& p = pointers[i];
    if (p.pointer == nullptr) {
      if (p.optional) continue;
      return fail(DVDQ_BAD_ARGUMENT, "%s: %s is null", function, p.name);
    }
    if (reinterpret_cast<uintptr_t>(p.pointer) % p.alignment)
      return fail(DVDQ_BAD_ARGUMENT, "%s: %s is not aligned to %u bytes", function, p.name, p.alignment);
  }
  return DVDQ_OK;
}

dvdq_status check_tokens(const char* function, int64_t m) {
  if (m < 0 || m > INT32_MAX)
    return fail(DVDQ_BAD_ARGUMENT, "%s: %lld tokens; 0 to 2^31-1", function, static_cast<long long>(m));
  return DVDQ_OK;
}

dvdq_status check_stored(const char* function, const dvdq_layer& layer, const dvdq_weight* weight, const char* name,
                         const void* to) {
  if (weight == nullptr) return fail(DVDQ_BAD_ARGUMENT, "%s: weight is null", function);
  const unsigned zero_alignment = layer.float_zero_point ? 1 : 4;
  const Named pointers[] = {{"weight.codes", weight->codes, false, 16}, {"weight.scale", weight->scale, false, 4},
                            {"weight.group_scale", weight->group_scale, false, 1}, {"weight.zero", weight->zero, false, zero_alignment},
                            {"weight.bias", weight->bias, true, 4},      {name, to, false, 256}};
  return check_pointers(function, pointers);
}

dvdq_status quantize_into(const char* function, const dvdq_layer* layer, const dvdq_plan& plan, int32_t sm,
                          const dvdq_prologue* prologue, const void* x, const void* pre_quant, const float* outer_matrix,
                          int64_t m, const WorkspaceLayout& at, int64_t needed, void* workspace, int64_t workspace_bytes,
                          dvdq_stream stream, Quantized* to) {
  const Named pointers[] = {{"workspace", workspace, false, 256}};
  const dvdq_status status = check_pointers(function, pointers);
  if (status != DVDQ_OK) return status;
  if (workspace_bytes < needed)
    return fail(DVDQ_WORKSPACE, "%lld tokens need %lld bytes of workspace, the buffer has %lld", static_cast<long long>(m),
                static_cast<long long>(needed), static_cast<long long>(workspace_bytes));
  unsigned char* const base = static_cast<unsigned char*>(workspace);
  float* const scales = reinterpret_cast<float*>(base + at.scales);
  float* const sums = plan.needs_sums ? reinterpret_cast<float*>(base + at.sums) : nullptr;
  const int64_t left = at.bytes - at.gemm;
  *to = {base, scales, sums, left ? base + at.gemm : nullptr, left};
  return prologue == nullptr ? dvdq_rotate_quantize(layer, sm, x, pre_quant, outer_matrix, base, scales, sums, m, stream)
                             : dvdq_fused_quantize(layer, sm, prologue, x, pre_quant, base, scales, sums, m, stream);
}

dvdq_status multiply(const dvdq_layer& layer, const dvdq_plan& plan, int32_t sm, const void* codes, const float* scales,
                     const float* sums, const WeightView& weight, void* y, int64_t m, void* workspace,
                     int64_t workspace_bytes, dvdq_stream stream) {
  const int64_t needed = gemm_workspace_bytes(static_cast<dvdq_path>(plan.path), m, layer.n, layer.k, sm);
  const Named pointers[] = {{"codes", codes, false, 16},
                            {"scales", scales, false, 4},
                            {"sums", sums, !plan.needs_sums, 4},
                            {"y", y, false, 16},
                            {"workspace", workspace, needed == 0, 16}};
  const dvdq_status status = check_pointers("dvdq_linear_gemm", pointers);
  if (status != DVDQ_OK) return status;
  if (workspace_bytes < needed)
    return fail(DVDQ_WORKSPACE, "path %s needs %lld bytes of workspace, the buffer has %lld", dvdq_path_name(plan.path),
                static_cast<long long>(needed), static_cast<long long>(workspace_bytes));
  GemmArgs args{};
  args.codes = codes;
  args.scales = scales;
  args.sums = sums;
  args.weight = weight.weight;
  args.row_scale = weight.row_scale;
  args.row_zero = weight.row_zero;
  args.bias = weight.bias;
  args.group_scale = weight.group_scale;
  args.group_zero = weight.group_zero;
  args.y = y;
  args.m = m;
  args.n = layer.n;
  args.k = layer.k;
  args.act_group = layer.act_group;
  args.weight_groups = layer.weight_groups;
  args.float_zero_point = layer.float_zero_point != 0;
  args.dtype = static_cast<dvdq_dtype>(layer.dtype);
  args.workspace = workspace;
  args.workspace_bytes = workspace_bytes;
  args.stream = static_cast<cudaStream_t>(stream);
  args.sm = sm;
  return run_path(plan.path, args);
}

namespace {

// Fields of a prologue that no layer could have, and layers that have none.
dvdq_status check_prologue(const dvdq_layer& layer, const dvdq_prologue* f) {
  if (f == nullptr) return fail(DVDQ_BAD_ARGUMENT, "the prologue is null");
  const Named pointers[] = {{"prologue.y", f->y, true, 16},
                            {"prologue.gate", f->gate, true, 16},
                            {"prologue.multiplier", f->multiplier, true, 16},
                            {"prologue.addend", f->addend, true, 16},
                            {"prologue.hidden", f->hidden, true, 16}};
  const dvdq_status status = check_pointers("a prologue", pointers);
  if (status != DVDQ_OK) return status;
  if (f->norm < DVDQ_NORM_NONE || f->norm > DVDQ_NORM_RMS)
    return fail(DVDQ_BAD_ARGUMENT, "norm %d: 0 (none), 1 (layer) or 2 (RMS)", f->norm);
  if (!(f->eps >= 0.0f)) return fail(DVDQ_BAD_ARGUMENT, "a norm's eps is not negative");
  if (f->gelu && (f->norm || f->y || f->gate || f->multiplier || f->addend || f->hidden))
    return fail(DVDQ_BAD_ARGUMENT, "a prologue is gelu alone, or without gelu");
  if (!f->y && (f->gate || f->hidden)) return fail(DVDQ_BAD_ARGUMENT, "a prologue without y has no gate and no hidden");
  const int64_t counts[] = {f->gate_tokens, f->modulate_tokens}, strides[] = {f->gate_stride, f->modulate_stride};
  for (int i = 0; i < 2; ++i) {
    if (counts[i] < 0 || counts[i] > INT32_MAX || strides[i] < 0 || strides[i] % 4)
      return fail(DVDQ_BAD_ARGUMENT, "rows of a prologue: 0 to 2^31-1 tokens each, strides a multiple of 4");
  }
  if (layer.outer != 1)
    return fail(DVDQ_UNSUPPORTED, "rotation with an outer factor of %d: a prologue is fused without one", layer.outer);
  if (layer.k > kMaxTokenChannels)
    return fail(DVDQ_UNSUPPORTED, "a prologue over k = %lld: the kernels hold rows of up to %lld",
                static_cast<long long>(layer.k), static_cast<long long>(kMaxTokenChannels));
  return DVDQ_OK;
}

// RQ, with a prologue or not, and QL in one call, with the codes in the workspace.
dvdq_status run_layer(const char* function, const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                      const void* pre_quant, const float* outer_matrix, const void* prepared, void* y, int64_t m,
                      void* workspace, int64_t workspace_bytes, dvdq_stream stream) {
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status == DVDQ_OK) status = check_tokens(function, m);
  if (status != DVDQ_OK || m == 0) return status;
  WorkspaceLayout at{};
  status = workspace_layout(*layer, plan, sm, m, &at);
  if (status != DVDQ_OK) return status;
  Quantized q{};
  status = quantize_into(function, layer, plan, sm, prologue, x, pre_quant, outer_matrix, m, at, at.bytes, workspace,
                         workspace_bytes, stream, &q);
  if (status != DVDQ_OK) return status;
  return dvdq_linear_gemm(layer, sm, q.codes, q.scales, q.sums, prepared, y, m, q.gemm, q.gemm_bytes, stream);
}

}  // namespace
}  // namespace dvdq

using namespace dvdq;

extern "C" {

dvdq_status dvdq_prepare_weight(const dvdq_layer* layer, int32_t sm, const dvdq_weight* weight, void* prepared,
                                int64_t prepared_bytes, dvdq_stream stream) {
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status == DVDQ_OK) status = check_stored("dvdq_prepare_weight", *layer, weight, "prepared", prepared);
  if (status != DVDQ_OK) return status;
  if (prepared_bytes < plan.prepared_bytes)
    return fail(DVDQ_WORKSPACE, "the prepared weight needs %lld bytes, the buffer has %lld",
                static_cast<long long>(plan.prepared_bytes), static_cast<long long>(prepared_bytes));
  return prepare_weight(*layer, plan, *weight, prepared, static_cast<cudaStream_t>(stream));
}

dvdq_status dvdq_rotate_quantize(const dvdq_layer* layer, int32_t sm, const void* x, const void* pre_quant,
                                 const float* outer_matrix, void* codes, float* scales, float* sums, int64_t m,
                                 dvdq_stream stream) {
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status == DVDQ_OK) status = check_tokens("dvdq_rotate_quantize", m);
  if (status != DVDQ_OK || m == 0) return status;
  const Named pointers[] = {{"x", x, false, 16},
                            {"pre_quant", pre_quant, true, 16},
                            {"outer_matrix", outer_matrix, layer->outer == 1, 16},
                            {"codes", codes, false, 16},
                            {"scales", scales, false, 4},
                            {"sums", sums, true, 4}};
  status = check_pointers("dvdq_rotate_quantize", pointers);
  if (status != DVDQ_OK) return status;
  const RotateArgs args = {x, pre_quant, outer_matrix, codes, scales, sums, m, static_cast<cudaStream_t>(stream)};
  return rotate_quantize(*layer, plan, args);
}

dvdq_status dvdq_linear_gemm(const dvdq_layer* layer, int32_t sm, const void* codes, const float* scales, const float* sums,
                             const void* prepared, void* y, int64_t m, void* workspace, int64_t workspace_bytes,
                             dvdq_stream stream) {
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status == DVDQ_OK) status = check_tokens("dvdq_linear_gemm", m);
  if (status != DVDQ_OK || m == 0) return status;
  const Named pointers[] = {{"prepared", prepared, false, 256}};
  status = check_pointers("dvdq_linear_gemm", pointers);
  if (status != DVDQ_OK) return status;
  const WeightView weight = view_of(prepared, prepared_layout(*layer, plan.path));
  return multiply(*layer, plan, sm, codes, scales, sums, weight, y, m, workspace, workspace_bytes, stream);
}

dvdq_status dvdq_fused_quantize(const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                                const void* pre_quant, void* codes, float* scales, float* sums, int64_t m,
                                dvdq_stream stream) {
  dvdq_plan plan;
  dvdq_status status = dvdq_plan_layer(layer, sm, &plan);
  if (status == DVDQ_OK) status = check_prologue(*layer, prologue);
  if (status == DVDQ_OK) status = check_tokens("dvdq_fused_quantize", m);
  if (status != DVDQ_OK || m == 0) return status;
  const Named pointers[] = {{"x", x, false, 16},
                            {"pre_quant", pre_quant, true, 16},
                            {"codes", codes, false, 16},
                            {"scales", scales, false, 4},
                            {"sums", sums, true, 4}};
  status = check_pointers("dvdq_fused_quantize", pointers);
  if (status != DVDQ_OK) return status;
  if (prologue->hidden == x || (prologue->hidden != nullptr && prologue->hidden == prologue->y))
    return fail(DVDQ_BAD_ARGUMENT, "dvdq_fused_quantize: prologue.hidden is x or y");
  const RotateArgs args = {x, pre_quant, nullptr, codes, scales, sums, m, static_cast<cudaStream_t>(stream)};
  return fused_quantize(*layer, plan, *prologue, args);
}

dvdq_status dvdq_quant_linear(const dvdq_layer* layer, int32_t sm, const void* x, const void* pre_quant,
                              const float* outer_matrix, const void* prepared, void* y, int64_t m, void* workspace,
                              int64_t workspace_bytes, dvdq_stream stream) {
  return run_layer("dvdq_quant_linear", layer, sm, nullptr, x, pre_quant, outer_matrix, prepared, y, m, workspace,
                   workspace_bytes, stream);
}

dvdq_status dvdq_fused_linear(const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                              const void* pre_quant, const void* prepared, void* y, int64_t m, void* workspace,
                              int64_t workspace_bytes, dvdq_stream stream) {
  if (prologue == nullptr) return fail(DVDQ_BAD_ARGUMENT, "dvdq_fused_linear: the prologue is null");
  return run_layer("dvdq_fused_linear", layer, sm, prologue, x, pre_quant, nullptr, prepared, y, m, workspace,
                   workspace_bytes, stream);
}

}  // extern "C"
