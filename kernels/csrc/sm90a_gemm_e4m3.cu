// Mode G (SM 9.0): 4-bit codes held as e4m3, one activation scale per token and 128 channels; e4m3 wgmma.
//
// A group of 128 channels is summed in the tensor core and then added, times s[m, g], to an fp32 accumulator. Codes are
// integers, |activation| <= 7 and |weight| <= 16 (exact in e4m3), so a partial sum stays below 7 * 16 * 128 = 14336 <
// 2^14 and every one is an integer: it is exact if the tensor core keeps 13 bits below the leading one of the largest
// term (tests/kernels/test_kernels_gemm.py proves that; gpu_check measures that the device does).
//
// No block scale on the weight side: row_scale is in the epilogue, and the collective reads a single 1.0f.
#include "sm90a_launch.cuh"
#include "sm90a_scales.cuh"

namespace dvdq {
namespace {

using namespace sm90;
using cute::_128;
using cute::_2;

__device__ const float kUnitScale = 1.0f;

template <typename Output>
struct Instance {
  using Tile = cute::Shape<_128, _128, _128>;
  using Cluster = cute::Shape<_2, _1, _1>;
  using Fused = sm90::Epilogue<Tile, Output, false>;
  using Store = CollectiveEpilogue<Tile, Cluster, float, Output, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                   typename Fused::Tree>;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::float_e4m3_t,
      cute::tuple<cutlass::layout::RowMajor, ScaleLayout<_1>>, 16, cutlass::float_e4m3_t,
      cute::tuple<cutlass::layout::ColumnMajor, ScaleLayout<_128>>, 16, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Store::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8Blockwise>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, Store,
                                                      cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(!Main::IsTmaLoadSFA && !Main::IsTmaLoadSFB, "scales of any m need the element-wise loads");

  static dvdq_status run(const GemmArgs& args) {
    void* unit = nullptr;
    const cudaError_t error = cudaGetSymbolAddress(&unit, kUnitScale);
    if (error != cudaSuccess) {
      return check_cuda(error, "e4m3_group");
    }
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n), k = static_cast<int>(args.k);
    using Code = cutlass::float_e4m3_t;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const Code*>(args.codes),
         {args.k, {}, 0},
         static_cast<const Code*>(args.weight),
         {args.k, {}, 0},
         args.scales,
         activation_scales(m, k),
         static_cast<const float*>(unit),
         unit_scales(n, k)},
        {Fused::arguments(args), nullptr, {}, static_cast<Output*>(args.y), {args.n, {}, 0}}};
    return launch<Gemm>(arguments, args, kSquare, "e4m3_group");
  }
};

}  // namespace

dvdq_status gemm_e4m3_group(const GemmArgs& args) {
  if (args.act_group != kGroup || args.k % kGroup != 0) {
    return fail(DVDQ_UNSUPPORTED, "e4m3_group runs groups of 128 channels, not %d of %lld", args.act_group,
                static_cast<long long>(args.k));
  }
  if (args.n % kOutputAlignment != 0) {
    return fail(DVDQ_UNSUPPORTED, "e4m3_group: n %lld is not a multiple of 8; s8_group can run this layer",
                static_cast<long long>(args.n));
  }
  if (const dvdq_status status = check_sizes(args, "e4m3_group"); status != DVDQ_OK) return status;
  return args.dtype == DVDQ_BF16 ? Instance<cutlass::bfloat16_t>::run(args) : Instance<cutlass::half_t>::run(args);
}

}  // namespace dvdq
