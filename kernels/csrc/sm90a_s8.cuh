// One instance of mode T's kernel: CUTLASS's s8 wgmma collective with the epilogue of sm90a_launch.cuh. Apart from the
// choice of tiles, so that bench/tiles.cu can measure others.
#pragma once

#include "sm90a_launch.cuh"

namespace dvdq::sm90 {

template <typename Output, typename Tile, typename Cluster, typename MainSchedule, typename StoreSchedule>
struct S8Instance {
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

  static dvdq_status run(const GemmArgs& args, int swizzle) {
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n), k = static_cast<int>(args.k);
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const int8_t*>(args.codes),
         {args.k, {}, 0},
         static_cast<const int8_t*>(args.weight),
         {args.k, {}, 0}},
        {Fused::arguments(args), nullptr, {}, static_cast<Output*>(args.y), {args.n, {}, 0}}};
    return launch<Gemm>(arguments, args, swizzle, "s8_wgmma");
  }
};

}  // namespace dvdq::sm90
