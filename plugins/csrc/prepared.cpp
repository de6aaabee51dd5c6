#include "prepared.h"

#include <cmath>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "kernels_api.h"
#include "messages.h"

namespace dvdquant::plugin {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<PreparedKey, std::weak_ptr<DeviceBuffer const>> weights;
  std::set<std::tuple<int, void const*, int32_t>> checked_matrices;
};

Registry& registry() {
  static Registry shared;
  return shared;
}

// INT32 values as TensorRT's parser makes them of UINT8 ones -> the bytes again, at `to` on the device.
void narrow(void const* values, void* to, int64_t count, char const* name, Stream stream) {
  std::vector<int32_t> wide(static_cast<size_t>(count));
  copy_to_host(wide.data(), values, wide.size() * sizeof(int32_t), stream);
  synchronize(stream);
  std::vector<uint8_t> bytes(wide.size());
  for (size_t i = 0; i < wide.size(); ++i) {
    if (wide[i] < 0 || wide[i] > 255) {
      throw Failure(DVDQ_BAD_ARGUMENT, std::string(name) + " holds " + std::to_string(wide[i]) + " at " +
                                           std::to_string(i), "0 to 255");
    }
    bytes[i] = static_cast<uint8_t>(wide[i]);
  }
  copy_to_device(to, bytes.data(), bytes.size(), stream);
  synchronize(stream);
}

// Bytes of group scales and zero-points that came in as INT32, and lie narrowed behind the rows of a packed weight.
int64_t narrowed_bytes(PreparedKey const& key) {
  bool const kept = key.codes < 0 && key.groups > 1;
  return kept ? key.n * key.groups * (int{key.group_scale_int32} + int{key.zero_int32}) : 0;
}

Prepared make(PreparedKey const& key, dvdq_layer const& layer, Stream stream) {
  RelaxedCapture relaxed;
  int64_t const cells = key.n * key.groups, kept = narrowed_bytes(key);
  auto buffer = std::make_shared<DeviceBuffer>(static_cast<size_t>(key.bytes + kept), "the prepared weight of " + key.layer);
  // Narrowed behind the rows, where products read them; else for the time of making.
  std::unique_ptr<DeviceBuffer> apart;
  auto* narrow_to = static_cast<uint8_t*>(buffer->data()) + key.bytes;
  if (kept == 0 && (key.group_scale_int32 || key.zero_int32)) {
    apart = std::make_unique<DeviceBuffer>(static_cast<size_t>(2 * cells), "the bytes of groups of " + key.layer);
    narrow_to = static_cast<uint8_t*>(apart->data());
  }
  dvdq_weight weight = packed_weight(key, *buffer);
  if (key.group_scale_int32) {
    narrow(key.inputs[kGroupScale], narrow_to, cells, "weight_group_scale", stream);
    weight.group_scale = narrow_to;
    narrow_to += cells;
  }
  if (key.zero_int32) {
    narrow(key.inputs[kZero], narrow_to, cells, "weight_zero", stream);
    weight.zero = narrow_to;
  }
  auto* const call = key.codes < 0 ? kernels().make_rows : kernels().prepare_weight;
  dvdq_status const status = call(&layer, key.sm, &weight, buffer->data(), key.bytes, stream);
  // Kernels may still read the narrowed copies, and other streams will read the result.
  synchronize(stream);
  check_kernels(status, "preparing the weight");
  return buffer;
}

Prepared held(Registry& shared, PreparedKey const& key) {
  auto const found = shared.weights.find(key);
  if (found == shared.weights.end()) return nullptr;
  Prepared weight = found->second.lock();
  if (!weight) shared.weights.erase(found);
  return weight;
}

}  // namespace

dvdq_weight packed_weight(PreparedKey const& key, DeviceBuffer const& buffer) {
  dvdq_weight weight{};
  weight.codes = key.inputs[kWeight];
  weight.scale = static_cast<float const*>(key.inputs[kScale]);
  weight.group_scale = key.inputs[kGroupScale];
  weight.zero = key.inputs[kZero];
  weight.bias = static_cast<float const*>(key.inputs[kBias]);
  if (narrowed_bytes(key) == 0) return weight;
  auto const* const narrowed = static_cast<uint8_t const*>(buffer.data()) + key.bytes;
  if (key.group_scale_int32) weight.group_scale = narrowed;
  if (key.zero_int32) weight.zero = narrowed + (key.group_scale_int32 ? key.n * key.groups : 0);
  return weight;
}

Prepared find_prepared(PreparedKey const& key) {
  Registry& shared = registry();
  std::lock_guard<std::mutex> lock(shared.mutex);
  return held(shared, key);
}

Prepared prepare(PreparedKey const& key, dvdq_layer const& layer, Stream stream) {
  Registry& shared = registry();
  // Held while preparing: a second context of the same layer then waits for the weight instead of making its own.
  std::lock_guard<std::mutex> lock(shared.mutex);
  if (Prepared weight = held(shared, key)) return weight;
  Prepared weight = make(key, layer, stream);
  shared.weights[key] = weight;
  for (auto item = shared.weights.begin(); item != shared.weights.end();) {
    item = item->second.expired() ? shared.weights.erase(item) : std::next(item);
  }
  return weight;
}

void check_hadamard(int device, void const* matrix, int32_t order, Stream stream) {
  Registry& shared = registry();
  std::tuple<int, void const*, int32_t> const key{device, matrix, order};
  {
    std::lock_guard<std::mutex> lock(shared.mutex);
    if (shared.checked_matrices.count(key) != 0) return;
  }
  std::vector<float> values(static_cast<size_t>(order) * order);
  {
    RelaxedCapture relaxed;
    copy_to_host(values.data(), matrix, values.size() * sizeof(float), stream);
    synchronize(stream);
  }
  double const size = 1.0 / std::sqrt(static_cast<double>(order));
  for (uint32_t row = 0; row < static_cast<uint32_t>(order); ++row) {
    for (uint32_t column = 0; column < static_cast<uint32_t>(order); ++column) {
      double const expected = __builtin_parity(row & column) ? -size : size;
      double const value = values[static_cast<size_t>(row) * order + column];
      // Written so that a NaN fails too. 1e-6: an fp32 rounding of 1/sqrt(b), with room.
      if (!(std::fabs(value - expected) <= 1e-6)) {
        throw Failure(DVDQ_BAD_ARGUMENT,
                      "hadamard[" + std::to_string(row) + ", " + std::to_string(column) + "] is " +
                          std::to_string(value),
                      "the Sylvester matrix of order " + std::to_string(order) + " / sqrt(order): " +
                          std::to_string(expected) + " there",
                      "bind the matrix of the export (onnx/*.constants.bin)");
      }
    }
  }
  std::lock_guard<std::mutex> lock(shared.mutex);
  shared.checked_matrices.insert(key);
}

}  // namespace dvdquant::plugin
