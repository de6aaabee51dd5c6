// Mode T (SM 9.0): s8 wgmma, one activation scale per token; weights expanded to int8 per row.
//
// Two tiles: 128x256x128 with two consumer warpgroups on one tile (least shared-memory traffic per product) for
// problems of at least one full wave, and 128x128x128 ping-pong, whose warpgroups take turns (one multiplies while the
// other stores), for smaller ones.
#include "sm90a_launch.cuh"

namespace dvdq {
namespace {

using namespace sm90;
using cute::_128;
using cute::_2;
using cute::_256;

template <typename Output, typename Tile, typename MainSchedule, typename StoreSchedule>
struct Instance {
  using Cluster = cute::Shape<_2, _1, _1>;
  using Fused = sm90::Epilogue<Tile, Output, true>;
  using Store = CollectiveEpilogue<Tile, Cluster, int32_t, Output, StoreSchedule, typename Fused::Tree>;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Store::SharedStorage))>,
      MainSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, Store,
                                                      cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static dvdq_status run(const GemmArgs& args) {
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n), k = static_cast<int>(args.k);
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const int8_t*>(args.codes),
         {args.k, {}, 0},
         static_cast<const int8_t*>(args.weight),
         {args.k, {}, 0}},
        {Fused::arguments(args), nullptr, {}, static_cast<Output*>(args.y), {args.n, {}, 0}}};
    return launch<Gemm>(arguments, args, "s8_wgmma");
  }
};

template <typename Output>
dvdq_status run(const GemmArgs& args) {
  using Large = Instance<Output, cute::Shape<_128, _256, _128>, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using Small = Instance<Output, cute::Shape<_128, _128, _128>, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                         cutlass::epilogue::TmaWarpSpecialized>;
  const int64_t tiles = ((args.m + 127) / 128) * ((args.n + 255) / 256);
  constexpr int64_t kOneWave = 132;  // SMs of an H100 or H200
  return tiles >= kOneWave ? Large::run(args) : Small::run(args);
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
