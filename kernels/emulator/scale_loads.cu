// Walks, on the CPU, the element-wise scale loads of mode G for one m and k: every scale of every tile must be loaded
// once, from its own place, and none behind the end. The partitioning is that of the collective's load_auxiliary
// (CUTLASS 4.2, sm90_mma_tma_gmma_ss_warpspecialized_fp8_blockwise_scaling.hpp), with plain copies in place of
// cp.async.
//   nvcc -std=c++17 --expt-relaxed-constexpr -arch=sm_90a -I <cutlass> -I ../csrc scale_loads.cu && ./a.out M K
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "cutlass/detail/blockwise_scale_layout.hpp"
#include "sm90a_scales.cuh"

using namespace cute;
using BlockShape = Shape<_128, _128, _128>;
using Scales = dvdq::sm90::ScaleLayout<_1>;
constexpr int kStages = 4;

// What decides between TMA and cp.async in the collective, and its shared-memory layout for the second.
static_assert(!(size<0, 1>(Scales{}.stride()) == 1), "the layout has to keep the collective from TMA loads");
using Config = cutlass::detail::Sm90BlockwiseScaleConfig<1, 128, 128, GMMA::Major::K, GMMA::Major::K>;
using Atom = decltype(Config::smem_atom_layoutSFA(BlockShape{}));
using Shared =
    decltype(make_layout(append(shape(Atom{}), Int<kStages>{}), append(stride(Atom{}), size(filter_zeros(Atom{})))));

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const int m = atoi(arguments[1]), k = atoi(arguments[2]), groups = k / dvdq::sm90::kGroup;
  const Scales layout = dvdq::sm90::activation_scales(m, k);
  std::vector<float> global(static_cast<size_t>(m) * groups), shared(cosize_v<Shared>);
  Tensor scales = make_tensor(make_gmem_ptr(global.data()), layout);
  Tensor coordinates = make_identity_tensor(shape(layout));
  Tensor tiles = local_tile(scales, BlockShape{}, make_coord(_, _, _), Step<_1, Underscore, _1>{});
  Tensor tile_coordinates = local_tile(coordinates, BlockShape{}, make_coord(_, _, _), Step<_1, Underscore, _1>{});
  Tensor stages = make_tensor(make_smem_ptr(shared.data()), Shared{});
  auto copy = make_tiled_copy(Copy_Atom<UniversalCopy<float>, float>{}, Layout<Shape<_32>>{}, Layout<Shape<_1>>{});
  int wrong = 0;
  for (int tile = 0; tile < (m + 127) / 128; ++tile) {
    for (int group = 0; group < groups; ++group) {
      const int stage = group % kStages;
      std::vector<int> loaded(128, 0);
      for (int lane = 0; lane < 32; ++lane) {
        auto thread = copy.get_slice(lane);
        Tensor from = filter_zeros(thread.partition_S(tiles(_, _, tile, _, 0))(_, _, _, group));
        Tensor at = filter_zeros(thread.partition_S(tile_coordinates(_, _, tile, _, 0))(_, _, _, group));
        Tensor to = filter_zeros(thread.partition_D(stages)(_, _, _, stage));
        for (int i = 0; i < size(to); ++i) {
          const long row = &to(i) - shared.data() - stage * 128;
          const bool inside = elem_less(at(i), shape(layout));
          if (row < 0 || row >= 128) {
            ++wrong;
            continue;
          }
          ++loaded[row];
          const long token = tile * 128L + row;
          wrong += inside != (token < m);
          wrong += inside && &from(i) - global.data() != static_cast<long>(group) * m + token;
        }
      }
      for (int times : loaded) wrong += times != 1;
    }
  }
  printf("m %d, k %d: %d wrong\n", m, k, wrong);
  return wrong != 0;
}
