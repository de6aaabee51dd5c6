#include "quant_linear.h"

#include <algorithm>
#include <array>
#include <utility>

#include "kernels_api.h"
#include "messages.h"

namespace dvdquant::plugin {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

std::string describe(Fields const& fields) {
  std::string text = "act_bits=" + std::to_string(fields.act_bits) + ";act_group=" + std::to_string(fields.act_group);
  if (!fields.fused) return text;
  Fusion const& fusion = fields.fusion;
  return text + ";reads=" + reads_text(fusion) + ";norm=" + norm_text(fusion) + ";gelu=" + std::to_string(fusion.gelu) +
         ";eps=" + std::to_string(fusion.eps);
}

using Tensors = std::array<Tensor, kInputs + kExtras>;

Tensors tensors_of(PluginTensorDesc const* in, int32_t inputs) {
  Tensors tensors{};
  for (int32_t i = 0; i < inputs; ++i) tensors[i] = {in[i].dims, in[i].type};
  return tensors;
}

Tensors tensors_of(DynamicPluginTensorDesc const* in, int32_t inputs) {
  Tensors tensors{};
  for (int32_t i = 0; i < inputs; ++i) tensors[i] = {in[i].desc.dims, in[i].desc.type};
  return tensors;
}

dvdq_plan plan_of(dvdq_layer const& layer, int32_t sm, std::string const& name) {
  dvdq_plan plan{};
  check_kernels(kernels().plan_layer(&layer, sm, &plan), (name + " on SM " + std::to_string(sm)).c_str());
  return plan;
}

}  // namespace

QuantLinear::QuantLinear(Fields fields)
    : fields_(std::move(fields)),
      reads_(reads_text(fields_.fusion)),
      norm_(norm_text(fields_.fusion)),
      description_(describe(fields_)) {
  using nvinfer1::PluginFieldType;
  serialized_.emplace_back("act_bits", &fields_.act_bits, PluginFieldType::kINT32, 1);
  serialized_.emplace_back("act_group", &fields_.act_group, PluginFieldType::kINT32, 1);
  serialized_.emplace_back("layer", fields_.layer.c_str(), PluginFieldType::kCHAR,
                           static_cast<int32_t>(fields_.layer.size() + 1));
  serialized_.emplace_back("packed_workspace", &fields_.packed_workspace, PluginFieldType::kINT32, 1);
  if (fields_.fused) {
    auto const text = [&](char const* name, std::string const& value) {
      serialized_.emplace_back(name, value.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size() + 1));
    };
    text("reads", reads_);
    text("norm", norm_);
    serialized_.emplace_back("gelu", &fields_.fusion.gelu, PluginFieldType::kINT32, 1);
    serialized_.emplace_back("eps", &fields_.fusion.eps, PluginFieldType::kFLOAT32, 1);
  }
  collection_.nbFields = static_cast<int32_t>(serialized_.size());
  collection_.fields = serialized_.data();
}

nvinfer1::IPluginCapability* QuantLinear::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* QuantLinear::clone() noexcept {
  QuantLinear* copy = nullptr;
  guarded("clone", [&] {
    copy = new QuantLinear(fields_);
    copy->layer_ = layer_;
    copy->plan_ = plan_;
    copy->device_ = device_;
    copy->sm_ = sm_;
    copy->form_ = form_;
    copy->rows_bytes_ = rows_bytes_;
    copy->group_scale_int32_ = group_scale_int32_;
    copy->zero_int32_ = zero_int32_;
  });
  return copy;
}

int32_t QuantLinear::configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*,
                                     int32_t outputs) noexcept {
  return guarded("configure", [&] {
    check_counts(fields_, inputs, outputs);
    dvdq_layer const layer = describe_layer(fields_, tensors_of(in, inputs).data());
    kernels();  // their absence is said before the device's
    int32_t const sm = sm_of(current_device());
    dvdq_plan const plan = plan_of(layer, sm, fields_.layer);
    log(Severity::kVERBOSE, std::string("dvdquant ") + getPluginName() + " " + fields_.layer + ": " + kernels().path_name(plan.path) + " on SM " +
                                std::to_string(sm));
  });
}

int32_t QuantLinear::getOutputDataTypes(DataType* output_types, int32_t outputs, DataType const* input_types,
                                        int32_t inputs) const noexcept {
  return guarded("output type", [&] {
    check_counts(fields_, inputs, outputs);
    check_types(fields_, input_types);
    for (int32_t i = 0; i < outputs; ++i) output_types[i] = input_types[kX];
  });
}

int32_t QuantLinear::getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*,
                                     int32_t shape_input_count, nvinfer1::DimsExprs* out, int32_t outputs,
                                     nvinfer1::IExprBuilder& builder) noexcept {
  return guarded("output shape", [&] {
    check_counts(fields_, inputs, outputs);
    nvinfer1::DimsExprs const &x = in[kX], &weight = in[kWeight];
    if (shape_input_count != 0 || x.nbDims < 1 || weight.nbDims != 2) {
      throw Failure(DVDQ_BAD_ARGUMENT,
                    fields_.layer + ": x has " + std::to_string(x.nbDims) + " dimensions, weight " +
                        std::to_string(weight.nbDims) + ", shape inputs " + std::to_string(shape_input_count),
                    "x [..., K], weight [N, K/2], no shape inputs");
    }
    auto const* k = builder.operation(nvinfer1::DimensionOperation::kPROD, *weight.d[1], *builder.constant(2));
    auto const* features = x.d[x.nbDims - 1];
    if (k != nullptr && k->isConstant() && features->isConstant() &&
        k->getConstantValue() != features->getConstantValue()) {
      throw Failure(DVDQ_BAD_ARGUMENT,
                    fields_.layer + ": x has " + std::to_string(features->getConstantValue()) + " features",
                    std::to_string(k->getConstantValue()) + ", the K of the weight");
    }
    out[0] = x;
    out[0].d[x.nbDims - 1] = weight.d[0];
    if (outputs == 2) out[1] = x;
  });
}

bool QuantLinear::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* in_out, int32_t inputs,
                                            int32_t outputs) noexcept {
  if (inputs != fields_.inputs() || outputs != fields_.outputs() || position < 0 || position >= inputs + outputs) return false;
  PluginTensorDesc const& tensor = in_out[position].desc;
  return tensor.format == nvinfer1::TensorFormat::kLINEAR &&
         accepts_type(fields_, position, tensor.type, in_out[kX].desc.type);
}

size_t QuantLinear::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*,
                                     int32_t outputs) const noexcept {
  int64_t bytes = 0;
  guarded("workspace size", [&] {
    check_counts(fields_, inputs, outputs);
    dvdq_layer const layer = describe_layer(fields_, tensors_of(in, inputs).data());
    int64_t const tokens = std::max<int64_t>(tokens_of(in[kX].max), 0);
    // With room for an expanded weight, whatever the form will be: TensorRT shares it among layers, so it costs an engine
    // that of its largest layer once.
    int32_t const sm = sm_of(current_device());
    auto* const ask = fields_.packed_workspace ? kernels().packed_workspace_bytes : kernels().workspace_bytes;
    check_kernels(ask(&layer, sm, tokens, &bytes), "workspace size");
  });
  return static_cast<size_t>(bytes);
}

int32_t QuantLinear::onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*,
                                   int32_t outputs) noexcept {
  return guarded("shape change", [&] {
    check_counts(fields_, inputs, outputs);
    dvdq_layer const layer = describe_layer(fields_, tensors_of(in, inputs).data());
    device_ = current_device();
    sm_ = sm_of(device_);
    plan_ = plan_of(layer, sm_, fields_.layer);
    check_kernels(kernels().rows_bytes(&layer, sm_, &rows_bytes_), "size of the rows");
    group_scale_int32_ = in[kGroupScale].type == DataType::kINT32;
    zero_int32_ = in[kZero].type == DataType::kINT32;
    layer_ = layer;
  });
}

int32_t QuantLinear::enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                             void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded("enqueue", [&] { run(in, inputs, outputs, workspace, stream); });
}

void QuantLinear::run(PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace,
                      Stream stream) {
  if (!layer_) {
    throw Failure(DVDQ_BAD_ARGUMENT, fields_.layer + ": enqueue came before onShapeChange");
  }
  int64_t const tokens = tokens_of(in[kX].dims);
  if (tokens == 0) return;
  use_weight(inputs, stream);
  int64_t needed = 0;
  auto* const ask = packed() ? kernels().packed_workspace_bytes : kernels().workspace_bytes;
  check_kernels(ask(&*layer_, sm_, tokens, &needed), "workspace size");
  if (fields_.fused) return run_fused(in, inputs, outputs, workspace, needed, tokens, stream);
  void* const y = outputs[0];
  auto const* outer = layer_->outer > 1 ? static_cast<float const*>(inputs[kOuter]) : nullptr;
  // No pre_quant: the graph's own pointwise operations before this node are it, fused by TensorRT.
  if (packed()) {
    dvdq_weight const weight = packed_weight(*key_, *weight_);
    check_kernels(kernels().packed_linear(&*layer_, sm_, inputs[kX], nullptr, outer, &weight, weight_->data(), y, tokens,
                                          workspace, needed, stream),
                  fields_.layer.c_str());
    return;
  }
  check_kernels(kernels().quant_linear(&*layer_, sm_, inputs[kX], nullptr, outer, weight_->data(), y, tokens, workspace,
                                       needed, stream),
                fields_.layer.c_str());
}

void QuantLinear::run_fused(PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace,
                            int64_t workspace_bytes, int64_t tokens, Stream stream) {
  auto const read = [&](Extra extra) -> void const* {
    int32_t const position = fields_.position(extra);
    return position < 0 ? nullptr : inputs[position];
  };
  auto const rows = [&](Extra extra) {
    int32_t const position = fields_.position(extra);
    return position < 0 ? int64_t{1} : tokens_of(in[position].dims);
  };
  // 1. What comes before the layer.
  dvdq_prologue prologue{};
  prologue.y = read(kY);
  prologue.hidden = fields_.outputs() == 2 ? outputs[1] : nullptr;
  prologue.gate = static_cast<float const*>(read(kGate));
  prologue.multiplier = static_cast<float const*>(read(kMultiplier));
  prologue.addend = static_cast<float const*>(read(kAddend));
  prologue.norm = fields_.fusion.norm;
  prologue.gelu = fields_.fusion.gelu;
  prologue.eps = fields_.fusion.eps;
  bool const both = prologue.multiplier != nullptr && prologue.addend != nullptr;
  if (both && rows(kMultiplier) != rows(kAddend)) {
    throw Failure(DVDQ_BAD_ARGUMENT, fields_.layer + ": " + std::to_string(rows(kMultiplier)) + " rows of the multiplier, " +
                                         std::to_string(rows(kAddend)) + " of the addend",
                  "as many of both");
  }
  int64_t const modulations = prologue.multiplier != nullptr ? rows(kMultiplier) : rows(kAddend);
  prologue.gate_tokens = tokens_of_a_row(fields_, rows(kGate), tokens);
  prologue.gate_stride = prologue.gate_tokens ? layer_->k : 0;
  prologue.modulate_tokens = tokens_of_a_row(fields_, modulations, tokens);
  prologue.modulate_stride = prologue.modulate_tokens ? layer_->k : 0;
  // 2. The layer, on its weight packed or as the path multiplies it.
  if (packed()) {
    dvdq_weight const weight = packed_weight(*key_, *weight_);
    check_kernels(kernels().packed_fused_linear(&*layer_, sm_, &prologue, inputs[kX], read(kPreQuant), &weight, weight_->data(),
                                                outputs[0], tokens, workspace, workspace_bytes, stream),
                  fields_.layer.c_str());
    return;
  }
  check_kernels(kernels().fused_linear(&*layer_, sm_, &prologue, inputs[kX], read(kPreQuant), weight_->data(), outputs[0],
                                       tokens, workspace, workspace_bytes, stream),
                fields_.layer.c_str());
}

bool QuantLinear::packed() const {
  // Paths of 4 bits multiply the bound codes: another copy of them would gain nothing. An engine of an older release has no room
  // to expand into.
  return plan_.codes == DVDQ_CODES_S4 || (form_ == Form::kPacked && fields_.packed_workspace != 0);
}

void QuantLinear::use_weight(void const* const* inputs, Stream stream) {
  int32_t const codes = packed() ? -1 : plan_.codes;
  int64_t const bytes = packed() ? rows_bytes_ : plan_.prepared_bytes;
  bool same = weight_ != nullptr && key_->codes == codes && key_->bytes == bytes;
  for (int32_t i = kWeight; same && i <= kBias; ++i) same = key_->inputs[i] == inputs[i];
  bool const capturing = is_capturing(stream);
  if (!same) {
    PreparedKey key{device_,  sm_, fields_.layer, {}, layer_->n, layer_->k, layer_->weight_groups, bytes,
                    layer_->float_zero_point, codes, group_scale_int32_, zero_int32_};
    for (int32_t i = kWeight; i <= kBias; ++i) key.inputs[i] = inputs[i];
    Prepared weight = find_prepared(key);
    if (!weight && capturing) {
      throw Failure(DVDQ_BAD_ARGUMENT,
                    fields_.layer + ": the stream is captured into a CUDA graph, and this weight has not run before", "",
                    "run the context once with these weights bound before capturing");
    }
    if (!weight) {
      // Inputs of a build may be scratch data; a context's are real.
      if (attached_ && layer_->block > 1) check_hadamard(device_, inputs[kHadamard], layer_->block, stream);
      weight = prepare(key, *layer_, stream);
    }
    // A graph captured with the old weight may still be replayed.
    if (captured_) kept_for_graphs_.push_back(weight_);
    captured_ = false;
    weight_ = std::move(weight);
    key_ = std::move(key);
  }
  captured_ = captured_ || capturing;
}

nvinfer1::IPluginV3* QuantLinear::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  // The prepared weight outlives a context where another still uses it, so it is not taken from the context's allocator.
  QuantLinear* copy = nullptr;
  guarded("attach", [&] {
    Form const form = wanted_form(fields_.layer);
    copy = static_cast<QuantLinear*>(clone());
    if (copy == nullptr) return;
    copy->attached_ = true;
    copy->form_ = form;
    if (form == Form::kPacked && !fields_.packed_workspace) {
      log(Severity::kINFO, "dvdquant QuantLinear " + fields_.layer +
                               ": this engine has no room to expand a packed weight, so 8-bit paths hold it expanded; build "
                               "the engine again");
    }
  });
  return copy;
}

nvinfer1::PluginFieldCollection const* QuantLinear::getFieldsToSerialize() noexcept { return &collection_; }

}  // namespace dvdquant::plugin
