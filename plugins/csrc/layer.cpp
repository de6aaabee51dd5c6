#include "layer.h"

#include <cstring>
#include <vector>

#include "messages.h"

namespace dvdquant::plugin {
namespace {

using nvinfer1::DataType;

constexpr char const* kNames[kInputs] = {"x",    "weight",   "weight_scale", "weight_group_scale", "weight_zero",
                                         "bias", "hadamard", "outer"};

// weight_group_scale and a stored weight_zero are unsigned bytes. TensorRT has no UINT8 for plugins, so they come as INT8 with
// the same bits; its ONNX parser turns a UINT8 initializer into INT32 with the same values.
std::vector<DataType> accepted_types(int32_t position) {
  switch (position) {
    case kX: return {DataType::kBF16, DataType::kHALF};
    case kWeight: return {DataType::kINT8};
    case kFactor: return {DataType::kINT8, DataType::kINT32};
    case kZero: return {DataType::kFLOAT, DataType::kINT8, DataType::kINT32};
    default: return {DataType::kFLOAT};
  }
}

std::string shape_text(nvinfer1::Dims const& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "") + std::to_string(dims.d[i]);
  return text + "]";
}

[[noreturn]] void refuse(Fields const& fields, std::string const& what, std::string const& available = {},
                         std::string const& fix = {}) {
  throw Failure(DVDQ_BAD_ARGUMENT, (fields.layer.empty() ? "" : fields.layer + ": ") + what, available, fix);
}

void expect_shape(Fields const& fields, Tensor const* inputs, int32_t position, std::vector<int64_t> const& wanted,
                  char const* meaning) {
  nvinfer1::Dims const& dims = inputs[position].dims;
  bool same = dims.nbDims == static_cast<int32_t>(wanted.size());
  for (int32_t i = 0; same && i < dims.nbDims; ++i) same = dims.d[i] == wanted[i];
  if (same) return;
  nvinfer1::Dims expected{};
  expected.nbDims = static_cast<int32_t>(wanted.size());
  for (int32_t i = 0; i < expected.nbDims; ++i) expected.d[i] = wanted[i];
  refuse(fields, std::string(kNames[position]) + " has shape " + shape_text(dims),
         shape_text(expected) + " (" + meaning + ") fits the weight");
}

int64_t square_order(Fields const& fields, Tensor const* inputs, int32_t position) {
  nvinfer1::Dims const& dims = inputs[position].dims;
  if (dims.nbDims != 2 || dims.d[0] != dims.d[1] || dims.d[0] < 1) {
    refuse(fields, std::string(kNames[position]) + " has shape " + shape_text(dims), "a square matrix");
  }
  return dims.d[0];
}

int32_t integer_of(nvinfer1::PluginField const& field) {
  if (field.data == nullptr || field.length != 1) {
    throw Failure(DVDQ_BAD_ARGUMENT, std::string("field ") + field.name + " holds " + std::to_string(field.length) +
                                         " values", "one integer");
  }
  int32_t narrow = 0;
  int64_t wide = 0;
  switch (field.type) {
    case nvinfer1::PluginFieldType::kINT32:
      std::memcpy(&narrow, field.data, sizeof narrow);
      return narrow;
    case nvinfer1::PluginFieldType::kUNKNOWN:
      throw Failure(DVDQ_BAD_ARGUMENT, std::string("field ") + field.name + " has no type", "INT32");
    default: break;
  }
  // 64-bit fields exist from TensorRT 10.1 on, as type 10.
  if (static_cast<int32_t>(field.type) == 10) {
    std::memcpy(&wide, field.data, sizeof wide);
    if (wide == static_cast<int32_t>(wide)) return static_cast<int32_t>(wide);
  }
  throw Failure(DVDQ_BAD_ARGUMENT, std::string("field ") + field.name + " is no 32-bit integer", "INT32");
}

std::string text_of(nvinfer1::PluginField const& field) {
  if (field.type != nvinfer1::PluginFieldType::kCHAR || field.length < 0 || (field.data == nullptr && field.length)) {
    throw Failure(DVDQ_BAD_ARGUMENT, std::string("field ") + field.name + " is no text", "CHAR");
  }
  std::string text(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
  return text.substr(0, text.find('\0'));
}

}  // namespace

char const* input_name(int32_t position) { return position < kInputs ? kNames[position] : "y"; }

std::string type_name(DataType type) {
  constexpr char const* names[] = {"FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4"};
  auto const index = static_cast<uint32_t>(type);
  return index < sizeof names / sizeof *names ? names[index] : "type " + std::to_string(index);
}

bool accepts_type(int32_t position, DataType type, DataType x) {
  if (position == kInputs) return type == x;
  for (DataType accepted : accepted_types(position)) {
    if (type == accepted) return true;
  }
  return false;
}

Fields read_fields(nvinfer1::PluginFieldCollection const* collection, char const* fallback_name) {
  Fields fields;
  bool has_bits = false, has_group = false;
  for (int32_t i = 0; collection != nullptr && i < collection->nbFields; ++i) {
    nvinfer1::PluginField const& field = collection->fields[i];
    std::string const name = field.name != nullptr ? field.name : "";
    if (name == "act_bits") {
      fields.act_bits = integer_of(field);
      has_bits = true;
    } else if (name == "act_group") {
      fields.act_group = integer_of(field);
      has_group = true;
    } else if (name == "layer") {
      fields.layer = text_of(field);
    } else if (name == "packed_workspace") {
      fields.packed_workspace = integer_of(field) != 0;
    }
  }
  if (fields.layer.empty() && fallback_name != nullptr) fields.layer = fallback_name;
  if (!has_bits || !has_group) {
    refuse(fields, std::string("the node has no attribute ") + (has_bits ? "act_group" : "act_bits"),
           "act_bits (4 or 8) and act_group (0 = one scale per token)");
  }
  if (fields.act_bits != 4 && fields.act_bits != 8) {
    refuse(fields, "act_bits is " + std::to_string(fields.act_bits), "4 and 8",
           "export with activations of 4 or 8 bits for the tensorrt target");
  }
  if (fields.act_group < 0) {
    refuse(fields, "act_group is " + std::to_string(fields.act_group), "0 (whole token), or channels per scale");
  }
  return fields;
}

void check_counts(Fields const& fields, int32_t inputs, int32_t outputs) {
  if (inputs == kInputs && outputs == kOutputs) return;
  std::string names;
  for (char const* name : kNames) names += (names.empty() ? "" : ", ") + std::string(name);
  refuse(fields, "the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs",
         std::to_string(kInputs) + " inputs (" + names + ") and 1 output");
}

void check_types(Fields const& fields, DataType const* types) {
  for (int32_t position = 0; position < kInputs; ++position) {
    if (accepts_type(position, types[position], types[kX])) continue;
    std::string known;
    for (DataType type : accepted_types(position)) known += (known.empty() ? "" : ", ") + type_name(type);
    std::string fix;
    if (position == kX) fix = "export the transformer in bfloat16 or float16";
    if (types[position] == DataType::kUINT8) fix = "declare it INT8 with the same bytes: TensorRT passes no UINT8 on";
    refuse(fields, std::string(kNames[position]) + " is " + type_name(types[position]), known, fix);
  }
}

dvdq_layer describe_layer(Fields const& fields, Tensor const* inputs) {
  DataType types[kInputs];
  for (int32_t i = 0; i < kInputs; ++i) types[i] = inputs[i].type;
  check_types(fields, types);

  nvinfer1::Dims const& weight = inputs[kWeight].dims;
  if (weight.nbDims != 2 || weight.d[0] < 1 || weight.d[1] < 1) {
    refuse(fields, "weight has shape " + shape_text(weight), "[N, K/2], fixed when the engine is built");
  }
  dvdq_layer layer{};
  layer.n = weight.d[0];
  layer.k = 2 * static_cast<int64_t>(weight.d[1]);
  nvinfer1::Dims const& x = inputs[kX].dims;
  if (x.nbDims < 1 || x.d[x.nbDims - 1] != layer.k) {
    refuse(fields, "x has shape " + shape_text(x), "[..., " + std::to_string(layer.k) + "], the K of the weight");
  }
  nvinfer1::Dims const& factor = inputs[kFactor].dims;
  if (factor.nbDims != 2 || factor.d[0] != layer.n || factor.d[1] < 1 || layer.k % factor.d[1] != 0) {
    refuse(fields, "weight_group_scale has shape " + shape_text(factor),
           "[" + std::to_string(layer.n) + ", groups], groups a divisor of " + std::to_string(layer.k));
  }
  layer.weight_groups = factor.d[1];
  layer.float_zero_point = inputs[kZero].type == DataType::kFLOAT ? 0 : 1;
  if (layer.float_zero_point) {
    expect_shape(fields, inputs, kZero, {layer.n, layer.weight_groups}, "bytes, per row and group");
  } else {
    expect_shape(fields, inputs, kZero, {layer.n}, "fp32, per row");
  }
  expect_shape(fields, inputs, kScale, {layer.n}, "per row");
  expect_shape(fields, inputs, kBias, {layer.n}, "per row");
  layer.block = static_cast<int32_t>(square_order(fields, inputs, kHadamard));
  layer.outer = static_cast<int32_t>(square_order(fields, inputs, kOuter));
  if (layer.k % (static_cast<int64_t>(layer.block) * layer.outer) != 0) {
    refuse(fields, "K = " + std::to_string(layer.k) + " is no multiple of the rotation block " +
                       std::to_string(layer.outer) + " * " + std::to_string(layer.block));
  }
  if (fields.act_group != 0 && layer.k % fields.act_group != 0) {
    refuse(fields, "K = " + std::to_string(layer.k) + " is no multiple of act_group " + std::to_string(fields.act_group));
  }
  layer.act_bits = fields.act_bits;
  layer.act_group = fields.act_group;
  layer.dtype = inputs[kX].type == DataType::kBF16 ? DVDQ_BF16 : DVDQ_FP16;
  return layer;
}

int64_t tokens_of(nvinfer1::Dims const& x) {
  int64_t tokens = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) tokens *= x.d[i];
  return tokens;
}

}  // namespace dvdquant::plugin
