#include "layer.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "messages.h"

namespace dvdquant::plugin {
namespace {

using nvinfer1::DataType;

constexpr char const* kNames[kInputs] = {"x",    "weight",   "weight_scale", "weight_group_scale", "weight_zero",
                                         "bias", "hadamard", "outer"};
constexpr char const* kExtraNames[kExtras] = {"y", "gate", "multiplier", "addend", "pre_quant"};
constexpr char const* kNorms[] = {"none", "layer", "rms"};  // by dvdq_norm

// weight_group_scale and a stored weight_zero are unsigned bytes. TensorRT has no UINT8 for plugins, so they come as INT8 with
// the same bits; its ONNX parser turns a UINT8 initializer into INT32 with the same values.
std::vector<DataType> accepted_types(int32_t position) {
  switch (position) {
    case kX: return {DataType::kBF16, DataType::kHALF};
    case kWeight: return {DataType::kINT8};
    case kGroupScale: return {DataType::kINT8, DataType::kINT32};
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

// Whether a tensor has one row of channels for all tokens, for each of the first dimensions, or for each token. Its axes are
// those of x, counted from the last; behind the first that is one, all are.
bool are_rows(nvinfer1::Dims const& rows, nvinfer1::Dims const& x) {
  if (rows.nbDims < 1 || rows.nbDims > x.nbDims || rows.d[rows.nbDims - 1] != x.d[x.nbDims - 1]) return false;
  bool ones = false;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) {
    int32_t const at = i - (x.nbDims - rows.nbDims);
    int64_t const size = at < 0 ? 1 : rows.d[at];
    if (!ones && size == x.d[i]) continue;
    if (size != 1) return false;
    ones = true;
  }
  return true;
}

void check_extras(Fields const& fields, Tensor const* inputs, dvdq_layer const& layer) {
  nvinfer1::Dims const& x = inputs[kX].dims;
  for (size_t i = 0; i < fields.fusion.reads.size(); ++i) {
    Extra const extra = fields.fusion.reads[i];
    nvinfer1::Dims const& dims = inputs[kInputs + i].dims;
    bool fits = false;
    std::string wanted;
    if (extra == kPreQuant) {
      fits = dims.nbDims == 3 && dims.d[0] * 8 == layer.k && dims.d[1] == 2 && dims.d[2] == 8;
      wanted = "[" + std::to_string(layer.k / 8) + ", 2, 8]";
    } else if (extra == kY) {
      fits = dims.nbDims == x.nbDims;
      for (int32_t d = 0; fits && d < x.nbDims; ++d) fits = dims.d[d] == x.d[d];
      wanted = shape_text(x) + ", the shape of x";
    } else {
      fits = are_rows(dims, x);
      wanted = "rows of " + std::to_string(layer.k) + " for all tokens, for each sample or for each token of " + shape_text(x);
    }
    if (!fits) refuse(fields, std::string(kExtraNames[extra]) + " has shape " + shape_text(dims), wanted);
  }
  if (fields.fused && layer.outer != 1) {
    refuse(fields, "a fused layer whose rotation has an outer factor of " + std::to_string(layer.outer),
           "rotations without one", "export without --fuse");
  }
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

float real_of(nvinfer1::PluginField const& field) {
  if (field.type != nvinfer1::PluginFieldType::kFLOAT32 || field.length != 1 || field.data == nullptr) {
    throw Failure(DVDQ_BAD_ARGUMENT, std::string("field ") + field.name + " is no number", "FLOAT32");
  }
  float value = 0;
  std::memcpy(&value, field.data, sizeof value);
  return value;
}

// The names in `reads`, in their order, and the norm by its name.
void read_fusion(Fields& fields, std::string const& reads, std::string const& norm) {
  Fusion& fusion = fields.fusion;
  for (size_t start = 0; start < reads.size();) {
    size_t const comma = std::min(reads.find(',', start), reads.size());
    std::string const word = reads.substr(start, comma - start);
    int32_t extra = fusion.reads.empty() ? 0 : fusion.reads.back() + 1;
    while (extra < kExtras && word != kExtraNames[extra]) ++extra;
    if (extra == kExtras) refuse(fields, "reads is " + reads, "y,gate,multiplier,addend,pre_quant: some of them in this order");
    fusion.reads.push_back(static_cast<Extra>(extra));
    start = comma + 1;
  }
  fusion.norm = 0;
  while (fusion.norm < 3 && norm != kNorms[fusion.norm]) ++fusion.norm;
  if (fusion.norm == 3) refuse(fields, "norm is " + norm, "none, layer, rms");
  if (!(fusion.eps >= 0)) refuse(fields, "eps is " + std::to_string(fusion.eps), "a number that is not negative");
  bool const others = fields.position(kY) >= 0 || fields.position(kMultiplier) >= 0 || fields.position(kAddend) >= 0;
  if (fusion.gelu != 0 && (fusion.norm != DVDQ_NORM_NONE || others)) {
    refuse(fields, "gelu with a norm or with reads of " + reads, "gelu alone, and pre_quant");
  }
  if (fields.position(kGate) >= 0 && fields.position(kY) < 0) refuse(fields, "reads is " + reads, "a gate with its y");
}

std::string text_of(nvinfer1::PluginField const& field) {
  if (field.type != nvinfer1::PluginFieldType::kCHAR || field.length < 0 || (field.data == nullptr && field.length)) {
    throw Failure(DVDQ_BAD_ARGUMENT, std::string("field ") + field.name + " is no text", "CHAR");
  }
  std::string text(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
  return text.substr(0, text.find('\0'));
}

}  // namespace

std::string type_name(DataType type) {
  constexpr char const* names[] = {"FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4"};
  auto const index = static_cast<uint32_t>(type);
  return index < sizeof names / sizeof *names ? names[index] : "type " + std::to_string(index);
}

bool accepts_type(Fields const& fields, int32_t position, DataType type, DataType x) {
  if (position >= fields.inputs()) return type == x;
  if (position >= kInputs) {
    Extra const extra = fields.fusion.reads[static_cast<size_t>(position - kInputs)];
    return type == (extra == kY || extra == kPreQuant ? x : DataType::kFLOAT);
  }
  for (DataType accepted : accepted_types(position)) {
    if (type == accepted) return true;
  }
  return false;
}

int32_t Fields::position(Extra extra) const {
  for (size_t i = 0; i < fusion.reads.size(); ++i) {
    if (fusion.reads[i] == extra) return kInputs + static_cast<int32_t>(i);
  }
  return -1;
}

std::string reads_text(Fusion const& fusion) {
  std::string text;
  for (Extra extra : fusion.reads) text += (text.empty() ? "" : ",") + std::string(kExtraNames[extra]);
  return text;
}

std::string norm_text(Fusion const& fusion) { return kNorms[fusion.norm]; }

Fields read_fields(nvinfer1::PluginFieldCollection const* collection, char const* fallback_name, bool fused) {
  Fields fields;
  fields.fused = fused;
  std::string reads, norm = kNorms[DVDQ_NORM_NONE];
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
    } else if (fused && name == "reads") {
      reads = text_of(field);
    } else if (fused && name == "norm") {
      norm = text_of(field);
    } else if (fused && name == "gelu") {
      fields.fusion.gelu = integer_of(field) != 0;
    } else if (fused && name == "eps") {
      fields.fusion.eps = real_of(field);
    }
  }
  if (fields.layer.empty() && fallback_name != nullptr) fields.layer = fallback_name;
  if (fused) read_fusion(fields, reads, norm);
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
  if (inputs == fields.inputs() && outputs == fields.outputs()) return;
  std::string names;
  for (char const* name : kNames) names += (names.empty() ? "" : ", ") + std::string(name);
  for (Extra extra : fields.fusion.reads) names += std::string(", ") + kExtraNames[extra];
  refuse(fields, "the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs",
         std::to_string(fields.inputs()) + " inputs (" + names + ") and " + std::to_string(fields.outputs()) +
             (fields.outputs() == 1 ? " output" : " outputs"));
}

void check_types(Fields const& fields, DataType const* types) {
  for (int32_t position = 0; position < kInputs; ++position) {
    if (accepts_type(fields, position, types[position], types[kX])) continue;
    std::string known;
    for (DataType type : accepted_types(position)) known += (known.empty() ? "" : ", ") + type_name(type);
    std::string fix;
    if (position == kX) fix = "export the transformer in bfloat16 or float16";
    if (types[position] == DataType::kUINT8) fix = "declare it INT8 with the same bytes: TensorRT passes no UINT8 on";
    refuse(fields, std::string(kNames[position]) + " is " + type_name(types[position]), known, fix);
  }
  for (int32_t position = kInputs; position < fields.inputs(); ++position) {
    if (accepts_type(fields, position, types[position], types[kX])) continue;
    Extra const extra = fields.fusion.reads[static_cast<size_t>(position - kInputs)];
    refuse(fields, std::string(kExtraNames[extra]) + " is " + type_name(types[position]),
           extra == kY || extra == kPreQuant ? type_name(types[kX]) + ", as x" : type_name(DataType::kFLOAT));
  }
}

dvdq_layer describe_layer(Fields const& fields, Tensor const* inputs) {
  DataType types[kInputs + kExtras];
  for (int32_t i = 0; i < fields.inputs(); ++i) types[i] = inputs[i].type;
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
  nvinfer1::Dims const& group_scale = inputs[kGroupScale].dims;
  if (group_scale.nbDims != 2 || group_scale.d[0] != layer.n || group_scale.d[1] < 1 || layer.k % group_scale.d[1] != 0) {
    refuse(fields, "weight_group_scale has shape " + shape_text(group_scale),
           "[" + std::to_string(layer.n) + ", groups], groups a divisor of " + std::to_string(layer.k));
  }
  layer.weight_groups = group_scale.d[1];
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
  check_extras(fields, inputs, layer);
  return layer;
}

int64_t tokens_of_a_row(Fields const& fields, int64_t rows, int64_t tokens) {
  if (rows == 1) return 0;
  if (rows < 1 || tokens % rows != 0) {
    refuse(fields, std::to_string(rows) + " rows for " + std::to_string(tokens) + " tokens", "a number that divides them");
  }
  return tokens / rows;
}

int64_t tokens_of(nvinfer1::Dims const& x) {
  int64_t tokens = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) tokens *= x.d[i];
  return tokens;
}

}  // namespace dvdquant::plugin
