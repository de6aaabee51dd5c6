// What the tensors of a QuantLinear or FusedQuantLinear node say about its layer, and what is wrong with them.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "dvdquant/kernels.h"

namespace dvdquant::plugin {

// Inputs of both nodes, in the order of the ONNX operator's schema.
enum Input : int32_t { kX = 0, kWeight, kScale, kGroupScale, kZero, kBias, kHadamard, kOuter, kInputs };

// What a FusedQuantLinear node reads behind them, in this order; its attribute "reads" names those that are there.
enum Extra : int32_t { kY = 0, kGate, kMultiplier, kAddend, kPreQuant, kExtras };

// What a FusedQuantLinear node does before the layer.
struct Fusion {
  std::vector<Extra> reads;
  int32_t norm = DVDQ_NORM_NONE;
  int32_t gelu = 0;
  float eps = 0;
};

// The node's attributes. layer: the layer's name, for messages and for telling prepared weights apart.
struct Fields {
  int32_t act_bits = 0;
  int32_t act_group = 0;
  std::string layer;
  // Whether the engine's workspace has room to expand a packed weight: it does in every engine that this plugin built.
  int32_t packed_workspace = 0;
  // Of a FusedQuantLinear node; else false, and no fusion.
  bool fused = false;
  Fusion fusion;

  int32_t inputs() const { return kInputs + static_cast<int32_t>(fusion.reads.size()); }
  // y; and x + gate * y, where it adds.
  int32_t outputs() const { return position(kY) < 0 ? 1 : 2; }
  // Where an input that not every node has stands, or -1.
  int32_t position(Extra extra) const;
};

struct Tensor {
  nvinfer1::Dims dims;
  nvinfer1::DataType type;
};

// Reads act_bits, act_group (integers, required), layer (text, otherwise fallback_name) and packed_workspace (otherwise 0); of a
// fused node also reads, norm (text), gelu (integer) and eps (float).
Fields read_fields(nvinfer1::PluginFieldCollection const* collection, char const* fallback_name, bool fused);

// What "reads" and "norm" hold, for an engine file.
std::string reads_text(Fusion const& fusion);
std::string norm_text(Fusion const& fusion);

std::string type_name(nvinfer1::DataType type);

// Whether TensorRT may hand over this type at a position, outputs behind inputs; x's type decides that of what is in 16 bits.
bool accepts_type(Fields const& fields, int32_t position, nvinfer1::DataType type, nvinfer1::DataType x);

void check_counts(Fields const& fields, int32_t inputs, int32_t outputs);
// Throws naming the input, its type and those accepted.
void check_types(Fields const& fields, nvinfer1::DataType const* types);

// Shapes and types of the inputs -> the layer as the kernels know it. Only the leading dimensions of x, and of what a fused node
// reads by token or by sample, may be -1.
dvdq_layer describe_layer(Fields const& fields, Tensor const* inputs);

// Product of all dimensions but the last.
int64_t tokens_of(nvinfer1::Dims const& x);

// How many tokens read one of `rows` rows, 0 for all. Throws unless they divide the tokens.
int64_t tokens_of_a_row(Fields const& fields, int64_t rows, int64_t tokens);

}  // namespace dvdquant::plugin
