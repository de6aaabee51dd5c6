// Prepared weights: one per packed weight and path in a process, shared by every context that uses it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "device.h"
#include "dvdquant/kernels.h"
#include "layer.h"

namespace dvdquant::plugin {

// What decides a prepared weight's bytes. The layer's name is part of it because TensorRT may hand two layers the same
// scratch address in turn; act_bits and path are not, because two graphs at different activation widths share one weight
// whenever their paths hold weights in the same form, which is that of the activations' codes.
struct PreparedKey {
  int device;
  int32_t sm;
  std::string layer;
  std::array<void const*, kInputs> inputs;  // addresses of weight .. bias; others null
  int64_t n, k, groups, bytes;
  int32_t float_zero_point, codes;  // codes is -1 for the rows of a packed weight, which serve every path
  bool group_scale_int32, zero_int32;  // the type inputs came in as

  auto tied() const {
    return std::tie(device, sm, layer, inputs, n, k, groups, bytes, float_zero_point, codes, group_scale_int32, zero_int32);
  }
  bool operator<(PreparedKey const& other) const { return tied() < other.tied(); }
  bool operator==(PreparedKey const& other) const { return tied() == other.tied(); }
};

using Prepared = std::shared_ptr<DeviceBuffer const>;

// The weight of that key if some context holds it, else null. Launches nothing: safe while a stream is captured.
Prepared find_prepared(PreparedKey const& key);

// The weight of that key, made on stream if no context holds it, and complete when this returns. It is freed with the
// last Prepared. Allocates and waits for the stream, so not while it is captured.
// layer: as for dvdq_prepare_weight. Throws Failure.
Prepared prepare(PreparedKey const& key, dvdq_layer const& layer, Stream stream);

// The packed weight as the kernels take it beside its rows, which are in buffer: the bound inputs, and behind the rows what came
// in as INT32 and was narrowed.
dvdq_weight packed_weight(PreparedKey const& key, DeviceBuffer const& buffer);

// Throws unless the [order, order] fp32 matrix is the Sylvester Hadamard matrix / sqrt(order), which is what the kernels
// multiply with whatever the input holds. A matrix is read once per address.
void check_hadamard(int device, void const* matrix, int32_t order, Stream stream);

}  // namespace dvdquant::plugin
