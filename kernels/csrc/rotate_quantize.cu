// RQ: x [m, k] -> codes, scales, sums of codes. Chooses the kernel and its launch; the kernels are in the two headers.
#include "rotate_quantize.h"

#include "error.h"
#include "rotate_outer.cuh"
#include "rotate_strip.cuh"

namespace dvdq {
namespace {

template <bool Half, int Codes>
dvdq_status start_strip(const dvdq_layer& layer, const dvdq_plan& plan, const RotateArgs& args, float qmax) {
  const bool by_token = plan.scale_rows == 1 && layer.act_group == 0;
  const strip::Params p = strip::make_params(layer, args, qmax, by_token);
  if (by_token) {
    const uint32_t warps = (p.block_tokens * p.strips + strip::kWarpUnits - 1) / strip::kWarpUnits;
    const int64_t blocks = (args.m + p.block_tokens - 1) / p.block_tokens;
    return check_cuda(launch(strip::rotate_quantize_token<Half, Codes>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                             p.block_tokens * 8, args.stream, p),
                      "rotate_quantize (scale per token)");
  }
  constexpr int64_t kWarps = 4;
  const int64_t units = args.m * p.strips;
  if (units > INT32_MAX) {
    return fail(DVDQ_UNSUPPORTED, "rotate_quantize of %lld tokens of %lld channels: more than 2^31 strips of 256",
                static_cast<long long>(args.m), static_cast<long long>(layer.k));
  }
  const int64_t blocks = (units + kWarps * strip::kWarpUnits - 1) / (kWarps * strip::kWarpUnits);
  return check_cuda(launch(strip::rotate_quantize_group<Half, Codes>, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps), 0,
                           args.stream, p),
                    "rotate_quantize (scale per group)");
}

template <bool Half, int Codes, int Rows, int Columns>
dvdq_status start_outer(const dvdq_layer& layer, const dvdq_plan& plan, const RotateArgs& args, float qmax) {
  outer::Params p{};
  p.x = static_cast<const uint16_t*>(args.x);
  p.pre_quant = static_cast<const uint16_t*>(args.pre_quant);
  p.matrix = args.outer_matrix;
  p.codes = static_cast<unsigned char*>(args.codes);
  p.scales = args.scales;
  p.sums = args.sums;
  p.tokens = args.m;
  p.channels = static_cast<int>(layer.k);
  p.log2_block = strip::log2_of(layer.block);
  p.order = layer.outer;
  p.groups = plan.scale_rows;
  p.qmax = qmax;
  // Padding as in outer::padded.
  p.padded_channels = p.channels + (p.channels / 128 + 1) * 8;
  // kMaxOuterChannels / kTileValues = kMaxThreads.
  const int threads = (p.channels / outer::kTileValues + 31) / 32 * 32;
  const size_t shared = 4u * static_cast<size_t>(p.padded_channels) + 8u * static_cast<size_t>(p.groups);
  return check_cuda(launch(outer::rotate_quantize_outer<Half, Codes, Rows, Columns>, dim3(static_cast<unsigned>(args.m)),
                           dim3(static_cast<unsigned>(threads)), shared, args.stream, p),
                    "rotate_quantize (outer factor)");
}

template <bool Half, int Codes>
dvdq_status start(const dvdq_layer& layer, const dvdq_plan& plan, const RotateArgs& args) {
  const float qmax = layer.act_bits == 4 ? 7.0f : 127.0f;
  if (layer.outer == 1) return start_strip<Half, Codes>(layer, plan, args, qmax);
  if (layer.outer == 2) return start_outer<Half, Codes, 2, 4>(layer, plan, args, qmax);
  return layer.block >= 4 ? start_outer<Half, Codes, 4, 4>(layer, plan, args, qmax)
                          : start_outer<Half, Codes, 4, 1>(layer, plan, args, qmax);
}

template <bool Half>
dvdq_status start_codes(const dvdq_layer& layer, const dvdq_plan& plan, const RotateArgs& args) {
  switch (plan.codes) {
    case DVDQ_CODES_S4: return start<Half, DVDQ_CODES_S4>(layer, plan, args);
    case DVDQ_CODES_S8: return start<Half, DVDQ_CODES_S8>(layer, plan, args);
    default: return start<Half, DVDQ_CODES_E4M3>(layer, plan, args);
  }
}

}  // namespace

dvdq_status rotate_quantize(const dvdq_layer& layer, const dvdq_plan& plan, const RotateArgs& args) {
  return layer.dtype == DVDQ_FP16 ? start_codes<true>(layer, plan, args) : start_codes<false>(layer, plan, args);
}

}  // namespace dvdq
