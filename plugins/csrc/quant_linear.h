// dvdquant::QuantLinear as a TensorRT plugin: y = quant_linear(x, packed weight), see dvdquant/ops/quant_linear.py. And
// dvdquant::FusedQuantLinear, the same of what a residual, a norm and a modulation, or GELU, make of x: dvdquant/ops/fused.py.
#pragma once

#include <NvInferRuntime.h>

#include <optional>
#include <string>
#include <vector>

#include "layer.h"
#include "prepared.h"
#include "weight_form.h"

namespace dvdquant::plugin {

constexpr char kPluginName[] = "QuantLinear";
constexpr char kFusedName[] = "FusedQuantLinear";
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "dvdquant";

// One node. Build-time copies only answer questions; the copy attached to an execution context runs the layer, from one
// thread at a time as TensorRT promises for a context. It holds the prepared weight (or the rows of the packed one) of the
// addresses it ran with last, and those of every address a CUDA graph captured, until the context goes. What a packed weight
// is expanded into is in the workspace of each enqueue, which TensorRT orders.
class QuantLinear final : public nvinfer1::IPluginV3,
                          public nvinfer1::IPluginV3OneCore,
                          public nvinfer1::IPluginV3OneBuild,
                          public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit QuantLinear(Fields fields);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  nvinfer1::AsciiChar const* getPluginName() const noexcept override {
    return fields_.fused ? kFusedName : kPluginName;
  }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t outputs, nvinfer1::DataType const* input_types,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const* shape_inputs,
                          int32_t shape_input_count, nvinfer1::DimsExprs* out, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* in_out, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return fields_.outputs(); }
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) const noexcept override;
  char const* getTimingCacheID() noexcept override { return description_.c_str(); }
  char const* getMetadataString() noexcept override { return description_.c_str(); }

  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  void run(nvinfer1::PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace,
           Stream stream);
  void run_fused(nvinfer1::PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace,
                 int64_t workspace_bytes, int64_t tokens, Stream stream);
  void use_weight(void const* const* inputs, Stream stream);
  // Whether this layer runs on its packed weight.
  bool packed() const;

  Fields const fields_;
  std::string const reads_, norm_;  // as the engine file holds them
  std::string const description_;
  std::vector<nvinfer1::PluginField> serialized_;
  nvinfer1::PluginFieldCollection collection_{};

  // Set by onShapeChange.
  std::optional<dvdq_layer> layer_;
  dvdq_plan plan_{};
  int device_ = 0;
  int32_t sm_ = 0;
  bool group_scale_int32_ = false, zero_int32_ = false;

  bool attached_ = false;
  Form form_ = Form::kPacked;  // read when the context is made
  int64_t rows_bytes_ = 0;     // set by onShapeChange
  std::optional<PreparedKey> key_;
  Prepared weight_;
  bool captured_ = false;
  std::vector<Prepared> kept_for_graphs_;
};

}  // namespace dvdquant::plugin
