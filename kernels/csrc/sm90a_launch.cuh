// What the two Hopper GEMMs share: the epilogue, and the launch of one kernel instance.
//
// y = row_scale[n] * (s[m] * acc) + bias[n], rounded once to the output type. The activation scale of mode G is already
// in its accumulator, so the [m] factor is a template choice. No zero-point correction: 8-bit weights are exact.
#pragma once

#include <limits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "gemm.h"

namespace dvdq::sm90 {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kOutputAlignment = 8;  // elements: TMA stores rows of 16-byte multiples

template <typename Tile, typename Output, bool TokenScale>
struct Epilogue {
  using PerToken = fusion::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<_1, _0, _0>>;
  using PerRow = fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<_0, _1, _0>>;
  using Multiply = fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>;
  using MultiplyAdd = fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Output, float, kRound>;
  using Scaled = fusion::Sm90EVT<Multiply, PerToken, fusion::Sm90AccFetch>;
  using Product = cute::conditional_t<TokenScale, Scaled, fusion::Sm90AccFetch>;
  using Tree = fusion::Sm90EVT<MultiplyAdd, PerRow, Product, PerRow>;

  static typename Tree::Arguments arguments(const GemmArgs& args) {
    if constexpr (TokenScale) {
      return {{args.row_scale}, {{args.scales}, {}, {}}, {args.bias}, {}};
    } else {
      return {{args.row_scale}, {}, {args.bias}, {}};
    }
  }
};

template <typename Tile, typename Cluster, typename Accumulator, typename Output, typename Schedule, typename Tree>
using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    Accumulator, float, void, cutlass::layout::RowMajor, 4, Output, cutlass::layout::RowMajor, kOutputAlignment,
    Schedule, Tree>::CollectiveOp;

// Shapes are int32 in the kernels (offsets are 64-bit in the tensor maps and the pointers), and so are sums of s8
// codes: |code| <= 128 on both sides.
inline dvdq_status check_sizes(const GemmArgs& args, const char* name) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() - 256;
  constexpr int64_t features = 131072;
  if (args.m <= limit && args.n <= limit && args.k < features) return DVDQ_OK;
  return fail(DVDQ_UNSUPPORTED, "%s: m %lld, n %lld, k %lld do not fit the int32 shapes and sums of the kernel", name,
              static_cast<long long>(args.m), static_cast<long long>(args.n), static_cast<long long>(args.k));
}

// How many tiles consecutive CTAs walk along one side before the other: 8 gives near-square parts, 1 walks past the whole
// weight before the next rows, so that each activation is read from memory once, if the weight stays in L2.
constexpr int kSquare = 8;
constexpr int kWholeWeight = 1;

inline dvdq_status query_l2(const char* name, int* bytes) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(bytes, cudaDevAttrL2CacheSize, device);
  return check_cuda(error, name);
}

template <typename Gemm>
dvdq_status launch(typename Gemm::Arguments arguments, const GemmArgs& args, int swizzle, const char* name) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) {
    return check_cuda(error, name);
  }
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
  arguments.scheduler.max_swizzle_size = swizzle;
  if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) {
    return fail(DVDQ_UNSUPPORTED, "%s cannot run m %lld, n %lld, k %lld: n has to be a multiple of 8 and k of 16", name,
                static_cast<long long>(args.m), static_cast<long long>(args.n), static_cast<long long>(args.k));
  }
  if (Gemm::get_workspace_size(arguments) != 0) {
    return fail(DVDQ_WORKSPACE, "%s: the scheduler asks for a workspace that this launcher does not give", name);
  }
  Gemm gemm;
  cutlass::Status status = gemm.initialize(arguments, nullptr, args.stream);
  if (status == cutlass::Status::kSuccess) {
    status = gemm.run(args.stream);
  }
  if (status != cutlass::Status::kSuccess) {
    error = cudaGetLastError();
    return fail(cuda_failure(error), "%s: %s (CUDA: %s)", name, cutlass::cutlassGetStatusString(status),
                cudaGetErrorString(error));
  }
  return DVDQ_OK;
}

}  // namespace dvdq::sm90
