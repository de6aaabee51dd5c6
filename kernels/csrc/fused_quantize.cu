// RQ with a prologue: chooses the kernel and its launch. The kernel is in fused_strip.cuh.
#include "fused_quantize.h"

#include "error.h"
#include "fused_strip.cuh"

namespace dvdq {
namespace {

template <bool Half, int Codes, bool Gelu>
dvdq_status start(const dvdq_layer& layer, const dvdq_prologue& prologue, const RotateArgs& args) {
  const strip::Params p = strip::make_params(layer, args, layer.act_bits == 4 ? 7.0f : 127.0f, true);
  strip::Prologue f{};
  f.y = static_cast<const uint16_t*>(prologue.y);
  f.gate = prologue.gate;
  f.multiplier = prologue.multiplier;
  f.addend = prologue.addend;
  f.hidden = static_cast<uint16_t*>(prologue.hidden);
  f.gate_stride = prologue.gate_stride;
  f.modulate_stride = prologue.modulate_stride;
  f.gate_tokens = static_cast<uint32_t>(prologue.gate_tokens);
  f.modulate_tokens = static_cast<uint32_t>(prologue.modulate_tokens);
  f.eps = prologue.eps;
  f.norm = prologue.norm;
  const uint32_t units = p.block_tokens * p.strips;
  const uint32_t warps = (units + strip::kWarpUnits - 1) / strip::kWarpUnits;
  const int64_t blocks = (args.m + p.block_tokens - 1) / p.block_tokens;
  return check_cuda(launch(strip::fused_quantize<Half, Codes, Gelu>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                           8 * (p.block_tokens + units), args.stream, p, f),
                    "fused_quantize");
}

template <bool Half, int Codes>
dvdq_status start_kind(const dvdq_layer& layer, const dvdq_prologue& prologue, const RotateArgs& args) {
  return prologue.gelu ? start<Half, Codes, true>(layer, prologue, args) : start<Half, Codes, false>(layer, prologue, args);
}

template <bool Half>
dvdq_status start_codes(const dvdq_layer& layer, const dvdq_plan& plan, const dvdq_prologue& prologue,
                        const RotateArgs& args) {
  switch (plan.codes) {
    case DVDQ_CODES_S4: return start_kind<Half, DVDQ_CODES_S4>(layer, prologue, args);
    case DVDQ_CODES_S8: return start_kind<Half, DVDQ_CODES_S8>(layer, prologue, args);
    default: return start_kind<Half, DVDQ_CODES_E4M3>(layer, prologue, args);
  }
}

}  // namespace

dvdq_status fused_quantize(const dvdq_layer& layer, const dvdq_plan& plan, const dvdq_prologue& prologue,
                           const RotateArgs& args) {
  return layer.dtype == DVDQ_FP16 ? start_codes<true>(layer, plan, prologue, args)
                                  : start_codes<false>(layer, plan, prologue, args);
}

}  // namespace dvdq
