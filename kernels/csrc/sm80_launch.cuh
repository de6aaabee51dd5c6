// What the two CUTLASS 2.x GEMMs share (mma.sync, cp.async, SM 8.x and 12.x): the epilogue tree, one kernel instance
// per tile, and its launch.
//
//   y = row_scale[n] * (s[m] * (acc - row_zero[n] * sum[m])) + bias[n],
//
// in fp32, rounded once to the output type; the correction is left out where the weights are expanded (Corrected
// false).
#pragma once

#include <limits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"
#include "cutlass/gemm/threadblock/threadblock_swizzle.h"
#include "gemm.h"

// Last: it uses names of the headers above without including them.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"

namespace dvdq::sm80 {

namespace visitor = cutlass::epilogue::threadblock;
using cute::_0;
using cute::_1;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kOutputAlignment = 8;  // elements of one 16-byte store
// |code| <= 128 on both sides: below this many channels a sum fits int32 (the instruction would saturate).
constexpr int64_t kMaxFeatures = 131072;

// acc - zero * sum with one rounding.
template <typename T>
struct SubtractProduct;
template <int N>
struct SubtractProduct<cutlass::Array<float, N>> {
  using Fragment = cutlass::Array<float, N>;
  CUTLASS_HOST_DEVICE Fragment operator()(const Fragment& acc, const Fragment& zero, const Fragment& sum) const {
    Fragment result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      result[i] = fmaf(-zero[i], sum[i], acc[i]);
    }
    return result;
  }
};

template <typename ThreadMap, typename Output, bool Corrected>
struct Epilogue {
  using PerToken = visitor::VisitorColBroadcast<ThreadMap, float, cute::Stride<_1, _0, int32_t>>;
  using PerRow = visitor::VisitorRowBroadcast<ThreadMap, float, cute::Stride<_0, _1, int32_t>>;
  using Accumulator = visitor::VisitorAccFetch;
  using Subtract = visitor::VisitorCompute<SubtractProduct, float, float, kRound>;
  using Multiply = visitor::VisitorCompute<cutlass::multiplies, float, float, kRound>;
  using MultiplyAdd = visitor::VisitorCompute<cutlass::multiply_add, Output, float, kRound>;
  using Centred = visitor::Sm80EVT<Subtract, Accumulator, PerRow, PerToken>;
  using Sum = cute::conditional_t<Corrected, Centred, Accumulator>;
  using Scaled = visitor::Sm80EVT<Multiply, PerToken, Sum>;
  using Result = visitor::Sm80EVT<MultiplyAdd, PerRow, Scaled, PerRow>;
  using Store = visitor::VisitorAuxStore<ThreadMap, Output, kRound, cute::Stride<int64_t, _1, int64_t>>;
  using Tree = visitor::Sm80EVT<Store, Result>;

  static typename Tree::Arguments arguments(const GemmArgs& args) {
    const typename Store::Arguments store{static_cast<Output*>(args.y), {args.n, {}, 0}};
    if constexpr (Corrected) {
      const typename Centred::Arguments centred{{}, {args.row_zero}, {args.sums}, {}};
      return {{{args.row_scale}, {{args.scales}, centred, {}}, {args.bias}, {}}, store};
    } else {
      return {{{args.row_scale}, {{args.scales}, {}, {}}, {args.bias}, {}}, store};
    }
  }
};

// One kernel: a threadblock of Tile, warps of 64 x 64 (K as the tile).
template <typename Code, typename Instruction, typename Tile, typename Output, bool Corrected, int Stages>
struct Instance {
  using Warp = cutlass::gemm::GemmShape<64, 64, Tile::kK>;
  using ThreadMap = visitor::OutputTileThreadLayout<Tile, Warp, Output, kOutputAlignment, 1>;
  using Fused = sm80::Epilogue<ThreadMap, Output, Corrected>;
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits<Code>::value;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      Code, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kAlignment, Code, cutlass::layout::ColumnMajor,
      cutlass::ComplexTransform::kNone, kAlignment, Output, cutlass::layout::RowMajor, kOutputAlignment, int32_t, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp, Instruction, typename Fused::Tree,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, Stages, cutlass::arch::OpMultiplyAddSaturate,
      1>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(sizeof(typename Kernel::SharedStorage) <= 99 * 1024, "SM 8.6, 8.9 and 12.0 have 99 KiB per block");

  static dvdq_status run(const GemmArgs& args, const char* name) {
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n), k = static_cast<int>(args.k);
    typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k}, 1, Fused::arguments(args),
                                       args.codes, args.weight, nullptr, nullptr, args.m * args.k, args.n * args.k, 0,
                                       0, args.k, args.k, 0, 0);
    cutlass::Status status = Gemm::can_implement(arguments);
    if (status != cutlass::Status::kSuccess) {
      return fail(DVDQ_UNSUPPORTED, "%s cannot run m %d, n %d, k %d: %s (n has to be a multiple of 8, k of %d)", name,
                  m, n, k, cutlass::cutlassGetStatusString(status), kAlignment);
    }
    Gemm gemm;
    status = gemm.initialize(arguments, nullptr, args.stream);
    if (status == cutlass::Status::kSuccess) {
      status = gemm.run(args.stream);
    }
    if (status != cutlass::Status::kSuccess) {
      const cudaError_t error = cudaGetLastError();
      return fail(cuda_failure(error), "%s: %s (CUDA: %s)", name, cutlass::cutlassGetStatusString(status),
                  cudaGetErrorString(error));
    }
    return DVDQ_OK;
  }
};

// 128 x 256 tiles where they fill the device once, else 128 x 128.
template <typename Code, typename Instruction, typename Output, bool Corrected>
dvdq_status run(const GemmArgs& args, const char* name) {
  constexpr int kTileBytes = 64;  // of K, per stage and row
  constexpr int kTile = kTileBytes * 8 / cutlass::sizeof_bits<Code>::value;
  constexpr int kStages = 4;  // 96 KiB at 128 x 256: within the 99 KiB of SM 8.6, 8.9 and 12.0
  using Large = Instance<Code, Instruction, cutlass::gemm::GemmShape<128, 256, kTile>, Output, Corrected, kStages>;
  using Small = Instance<Code, Instruction, cutlass::gemm::GemmShape<128, 128, kTile>, Output, Corrected, kStages>;
  if (args.m > std::numeric_limits<int32_t>::max() - 256 || args.n > 65535 * 128 || args.k >= kMaxFeatures) {
    return fail(DVDQ_UNSUPPORTED, "%s: m %lld, n %lld, k %lld do not fit the int32 shapes and sums of the kernel", name,
                static_cast<long long>(args.m), static_cast<long long>(args.n), static_cast<long long>(args.k));
  }
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    return check_cuda(error, name);
  }
  const int64_t tiles = ((args.m + 127) / 128) * ((args.n + 255) / 256);
  return tiles >= processors ? Large::run(args, name) : Small::run(args, name);
}

}  // namespace dvdq::sm80
