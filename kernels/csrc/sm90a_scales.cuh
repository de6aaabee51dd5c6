// How mode G reads its scales: layouts of the activation's, one per token and 128 channels, and of the weight's, which
// has none. Apart from the kernel so that a host program can walk them (emulator/scale_loads.cu).
#pragma once

#include "cute/tensor.hpp"

namespace dvdq::sm90 {

constexpr int kGroup = 128;  // channels per scale

// ((rows per scale, scales), (channels per scale, groups), batch), strides known at run time only. The collective loads
// scales whose leading stride is a static 1 with TMA, which wants a leading dimension that is a multiple of 4; these it
// loads one by one with cp.async, so any m is legal.
template <typename RowsPerScale>
using ScaleLayout = cute::Layout<cute::Shape<cute::Shape<RowsPerScale, int>, cute::Shape<cute::Int<kGroup>, int>, int>,
                                 cute::Stride<cute::Stride<cute::_0, int>, cute::Stride<cute::_0, int>, int>>;

// fp32 [k / 128, m], group-major.
inline ScaleLayout<cute::_1> activation_scales(int m, int k) {
  return {{{cute::_1{}, m}, {cute::_128{}, k / kGroup}, 1}, {{cute::_0{}, 1}, {cute::_0{}, m}, 0}};
}

// One value for every block of 128 x 128: stride 0.
inline ScaleLayout<cute::_128> unit_scales(int n, int k) {
  return {{{cute::_128{}, (n + 127) / 128}, {cute::_128{}, k / kGroup}, 1}, {{cute::_0{}, 0}, {cute::_0{}, 0}, 0}};
}

}  // namespace dvdq::sm90
