// What a QuantLinear node's tensors say about its layer, and what is wrong with them.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "dvdquant/kernels.h"

namespace dvdquant::plugin {

// Inputs of the node, in the order of the ONNX operator's schema.
enum Input : int32_t { kX = 0, kWeight, kScale, kFactor, kZero, kBias, kHadamard, kOuter, kInputs };
constexpr int32_t kOutputs = 1;

// The node's attributes. layer: the layer's name, for messages and for telling prepared weights apart.
struct Fields {
  int32_t act_bits = 0;
  int32_t act_group = 0;
  std::string layer;
  // Whether the engine's workspace has room to expand a packed weight: it does in every engine that this plugin built.
  int32_t packed_workspace = 0;
};

struct Tensor {
  nvinfer1::Dims dims;
  nvinfer1::DataType type;
};

// Reads act_bits, act_group (integers, required), layer (text, otherwise fallback_name) and packed_workspace (otherwise 0).
Fields read_fields(nvinfer1::PluginFieldCollection const* collection, char const* fallback_name);

char const* input_name(int32_t position);
std::string type_name(nvinfer1::DataType type);

// Whether TensorRT may hand over this type at a position (kInputs is y); x's type decides y's.
bool accepts_type(int32_t position, nvinfer1::DataType type, nvinfer1::DataType x);

void check_counts(Fields const& fields, int32_t inputs, int32_t outputs);
// Throws naming the input, its type and those accepted.
void check_types(Fields const& fields, nvinfer1::DataType const* types);

// Shapes and types of the kInputs inputs -> the layer as the kernels know it. Only x's leading dimensions may be -1.
dvdq_layer describe_layer(Fields const& fields, Tensor const* inputs);

// Product of all dimensions but the last.
int64_t tokens_of(nvinfer1::Dims const& x);

}  // namespace dvdquant::plugin
