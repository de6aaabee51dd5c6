// One tile shape of S8_WGMMA as a library of its own, for tiles.py: -DTILE_M, TILE_N, CLUSTER_M, CLUSTER_N, PINGPONG.
#include "sm90a_s8.cuh"

namespace {

using namespace cutlass;
using Tile = cute::Shape<cute::Int<TILE_M>, cute::Int<TILE_N>, cute::_128>;
using Cluster = cute::Shape<cute::Int<CLUSTER_M>, cute::Int<CLUSTER_N>, cute::_1>;
#if PINGPONG
using Multiply = gemm::KernelTmaWarpSpecializedPingpong;
using Store = epilogue::TmaWarpSpecialized;
#else
using Multiply = gemm::KernelTmaWarpSpecializedCooperative;
using Store = epilogue::TmaWarpSpecializedCooperative;
#endif
using Instance = dvdq::sm90::S8Instance<bfloat16_t, Tile, Cluster, Multiply, Store>;

}  // namespace

// y bf16 [m, n] = row_scale * (scales * codes . weight) + bias; codes int8 [m, k], weight int8 [n, k]. 0, or a dvdq_status.
extern "C" int run_tile(const void* codes, const void* weight, const float* scales, const float* row_scale,
                        const float* bias, void* y, int64_t m, int64_t n, int64_t k, int swizzle, cudaStream_t stream) {
  dvdq::GemmArgs args{};
  args.codes = codes;
  args.weight = weight;
  args.scales = scales;
  args.row_scale = row_scale;
  args.bias = bias;
  args.y = y;
  args.m = m;
  args.n = n;
  args.k = k;
  args.stream = stream;
  return Instance::run(args, swizzle);
}
