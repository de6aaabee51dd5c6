// Mode T (SM 9.0): s8 wgmma, one activation scale per token; weights expanded to int8 per row.
//
// Two tiles: 128x256x128 with two consumer warpgroups on one tile (least shared-memory traffic per product), and
// 128x128x128 ping-pong, whose warpgroups take turns (one multiplies while the other stores), for problems of less than
// one wave and for short rows, where storing is a large part: on an H100 it is 1.2 times faster at k = 1536 and 1.2 times
// slower at k = 3072 (bench/results, tiles); where between them it turns is not measured.
#include "sm90a_s8.cuh"

namespace dvdq {
namespace {

using namespace sm90;
using cute::_128;
using cute::_2;
using cute::_256;

template <typename Output>
dvdq_status run(const GemmArgs& args) {
  using Pair = cute::Shape<_2, _1, _1>;
  using Large = S8Instance<Output, cute::Shape<_128, _256, _128>, Pair, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                           cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using Small = S8Instance<Output, cute::Shape<_128, _128, _128>, Pair, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                           cutlass::epilogue::TmaWarpSpecialized>;
  int l2_bytes = 0;
  if (const dvdq_status status = query_l2("s8_wgmma", &l2_bytes); status != DVDQ_OK) return status;
  // On an H100, 118800 x 12288 -> 3072 takes 6.0 ms past the whole weight and 10.4 in squares (bench/results).
  const int swizzle = args.n * args.k <= l2_bytes ? kWholeWeight : kSquare;
  const int64_t tiles = ((args.m + 127) / 128) * ((args.n + 255) / 256);
  constexpr int64_t kOneWave = 132;  // SMs of an H100 or H200
  constexpr int64_t kShort = 2048;
  return tiles >= kOneWave && args.k > kShort ? Large::run(args, swizzle) : Small::run(args, swizzle);
}

}  // namespace

dvdq_status gemm_s8_wgmma(const GemmArgs& args) {
  if (args.n % kOutputAlignment != 0) {
    return grouped_s8(args);
  }
  if (const dvdq_status status = check_sizes(args, "s8_wgmma"); status != DVDQ_OK) return status;
  return args.dtype == DVDQ_BF16 ? run<cutlass::bfloat16_t>(args) : run<cutlass::half_t>(args);
}

}  // namespace dvdq
