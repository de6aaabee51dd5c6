// What TensorRT asks at build time and when an engine is loaded; no device memory.
#include <cstring>
#include <map>

#include "harness.h"

namespace harness {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int kTensors = 9;
Fields const kGood{{{"act_bits", 4}, {"act_group", 0}}, "blocks.0.ffn"};

struct Node {
  DynamicPluginTensorDesc tensors[kTensors];  // 8 inputs and y
};

// x [2, dynamic (up to 100), 96] and N = 64, groups of 32, rotation 3 * 16, float zero-points.
Node good_node() {
  Node node{};
  std::vector<std::vector<int64_t>> const shapes{{2, -1, 96}, {64, 48}, {64}, {64, 3}, {64, 3},
                                                 {64},        {16, 16}, {3, 3}, {2, -1, 64}};
  DataType const types[kTensors] = {DataType::kBF16,  DataType::kINT8,  DataType::kFLOAT, DataType::kINT8, DataType::kINT8,
                                    DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kBF16};
  for (int i = 0; i < kTensors; ++i) {
    DynamicPluginTensorDesc& tensor = node.tensors[i];
    tensor.desc.dims = tensor.min = tensor.max = tensor.opt = dims(shapes[i]);
    tensor.desc.type = types[i];
    tensor.desc.format = TensorFormat::kLINEAR;
    tensor.desc.scale = 1;
    if (i == 0 || i == 8) tensor.min.d[1] = 1, tensor.opt.d[1] = 50, tensor.max.d[1] = 100;
  }
  return node;
}

int32_t configure(Plugin const& plugin, Node const& node) {
  return build(plugin).configurePlugin(node.tensors, 8, node.tensors + 8, 1);
}

void check_identity(Library const& library) {
  auto& creator = library.creator();
  CHECK(std::strcmp(creator.getPluginName(), "QuantLinear") == 0);
  CHECK(std::strcmp(creator.getPluginVersion(), "1") == 0);
  CHECK(std::strcmp(creator.getPluginNamespace(), "dvdquant") == 0);
  nvinfer1::PluginFieldCollection const* names = creator.getFieldNames();
  CHECK(names->nbFields == 4);
  CHECK(std::strcmp(names->fields[0].name, "act_bits") == 0 && std::strcmp(names->fields[1].name, "act_group") == 0);
  CHECK(std::strcmp(names->fields[2].name, "layer") == 0);
  Plugin const plugin = library.create(kGood);
  CHECK(plugin != nullptr);
  CHECK(std::strcmp(core(plugin).getPluginName(), "QuantLinear") == 0);
  CHECK(std::strcmp(core(plugin).getPluginNamespace(), "dvdquant") == 0);
  CHECK(build(plugin).getNbOutputs() == 1);
  CHECK(std::strcmp(build(plugin).getTimingCacheID(), "act_bits=4;act_group=0") == 0);
}

// Position by type, everything else being as in a good node.
void check_formats(Library const& library) {
  Plugin const plugin = library.create(kGood);
  std::map<int, std::vector<DataType>> const accepted{
      {0, {DataType::kBF16, DataType::kHALF}}, {1, {DataType::kINT8}},
      {2, {DataType::kFLOAT}},                 {3, {DataType::kINT8, DataType::kINT32}},
      {4, {DataType::kFLOAT, DataType::kINT8, DataType::kINT32}},
      {5, {DataType::kFLOAT}},                 {6, {DataType::kFLOAT}},
      {7, {DataType::kFLOAT}}};
  for (DataType x : {DataType::kBF16, DataType::kHALF}) {
    for (int position = 0; position < kTensors; ++position) {
      for (int type = 0; type < 10; ++type) {
        for (int format = 0; format < 13; ++format) {
          Node node = good_node();
          node.tensors[0].desc.type = x;
          node.tensors[position].desc.type = static_cast<DataType>(type);
          node.tensors[position].desc.format = static_cast<TensorFormat>(format);
          bool wanted = false;
          if (position == 8) wanted = static_cast<DataType>(type) == x;
          for (int i = 0; position < 8 && i < static_cast<int>(accepted.at(position).size()); ++i) {
            wanted = wanted || accepted.at(position)[i] == static_cast<DataType>(type);
          }
          wanted = wanted && format == 0;
          CHECK(build(plugin).supportsFormatCombination(position, node.tensors, 8, 1) == wanted);
        }
      }
    }
  }
  Node node = good_node();
  CHECK(!build(plugin).supportsFormatCombination(0, node.tensors, 7, 1));
  CHECK(!build(plugin).supportsFormatCombination(9, node.tensors, 8, 1));
}

void check_types(Library const& library, Logger& logger) {
  Plugin const plugin = library.create(kGood);
  DataType out = DataType::kBOOL;
  DataType types[8];
  for (int i = 0; i < 8; ++i) types[i] = good_node().tensors[i].desc.type;
  for (DataType x : {DataType::kBF16, DataType::kHALF}) {
    types[0] = x;
    CHECK(build(plugin).getOutputDataTypes(&out, 1, types, 8) == 0);
    CHECK(out == x);
  }
  CHECK(build(plugin).getOutputDataTypes(&out, 1, types, 7) != 0);
  CHECK_SAYS(logger, "the node has 7 inputs");
  types[0] = DataType::kFLOAT;
  CHECK(build(plugin).getOutputDataTypes(&out, 1, types, 8) != 0);
  CHECK_SAYS(logger, "blocks.0.ffn: x is FLOAT\n  available: BF16, HALF\n  fix: export the transformer in bfloat16");
  types[0] = DataType::kHALF;
  types[3] = DataType::kUINT8;
  CHECK(build(plugin).getOutputDataTypes(&out, 1, types, 8) != 0);
  CHECK_SAYS(logger, "weight_group_scale is UINT8\n  available: INT8, INT32\n  fix: declare it INT8");
}

void check_shapes(Library const& library, Logger& logger) {
  Plugin const plugin = library.create(kGood);
  ExpressionBuilder builder;
  Node const node = good_node();
  for (int rank = 1; rank <= 8; ++rank) {
    nvinfer1::DimsExprs in[8]{}, out{};
    for (int i = 1; i < 8; ++i) {
      in[i].nbDims = node.tensors[i].desc.dims.nbDims;
      for (int d = 0; d < in[i].nbDims; ++d) in[i].d[d] = builder.number(node.tensors[i].desc.dims.d[d]);
    }
    in[0].nbDims = rank;
    std::string wanted;
    for (int d = 0; d + 1 < rank; ++d) {
      in[0].d[d] = d % 2 ? builder.number(d) : builder.symbol("s" + std::to_string(d));
      wanted += (d % 2 ? "" : "s") + std::to_string(d) + " ";
    }
    in[0].d[rank - 1] = builder.number(96);
    CHECK(build(plugin).getOutputShapes(in, 8, nullptr, 0, &out, 1, builder) == 0);
    CHECK(out.nbDims == rank);
    std::string got;
    for (int d = 0; d < out.nbDims; ++d) got += Expression::text_of(out.d[d]) + " ";
    check(got == wanted + "64 ", "leading dimensions kept, N last", __FILE__, __LINE__, got);

    // An unknown K is settled at run time; a wrong one is refused now.
    in[0].d[rank - 1] = builder.symbol("K");
    CHECK(build(plugin).getOutputShapes(in, 8, nullptr, 0, &out, 1, builder) == 0);
    in[0].d[rank - 1] = builder.number(97);
    CHECK(build(plugin).getOutputShapes(in, 8, nullptr, 0, &out, 1, builder) != 0);
    CHECK_SAYS(logger, "x has 97 features\n  available: 96, the K of the weight");
  }
}

void check_fields(Library const& library, Logger& logger) {
  auto refuse = [&](Fields const& fields, char const* words) {
    CHECK(library.create(fields) == nullptr);
    CHECK_SAYS(logger, words);
  };
  refuse({{{"act_bits", 5}, {"act_group", 0}}, "here"}, "here: act_bits is 5\n  available: 4 and 8");
  refuse({{{"act_bits", 6}, {"act_group", 0}}, ""}, "node_quant_linear: act_bits is 6");
  refuse({{{"act_bits", 4}, {"act_group", -1}}, ""}, "act_group is -1");
  refuse({{{"act_bits", 4}}, ""}, "no attribute act_group");
  refuse({{}, ""}, "no attribute act_bits");
  float const real = 4;
  nvinfer1::PluginField const wrong("act_bits", &real, nvinfer1::PluginFieldType::kFLOAT32, 1);
  nvinfer1::PluginFieldCollection collection;
  collection.nbFields = 1;
  collection.fields = &wrong;
  CHECK(library.creator().createPlugin("n", &collection, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
  CHECK_SAYS(logger, "field act_bits is no 32-bit integer");
  CHECK(library.creator().createPlugin(nullptr, nullptr, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
  CHECK_SAYS(logger, "no attribute act_bits");
}

void check_copies(Library const& library) {
  for (int32_t bits : {4, 8}) {
    for (int32_t group : {0, 64, 128}) {
      Plugin const plugin = library.create({{{"act_bits", bits}, {"act_group", group}}, "a+b"});
      std::string const wanted = "act_bits=" + std::to_string(bits) + ";act_group=" + std::to_string(group);
      Plugin const copy(plugin->clone());
      Plugin const loaded = library.reload(copy);
      Plugin const again = library.reload(loaded);
      for (Plugin const& each : {copy, loaded, again}) {
        CHECK(each != nullptr && each != plugin);
        CHECK(build(each).getMetadataString() == wanted);
        nvinfer1::PluginFieldCollection const* stored = runtime(each).getFieldsToSerialize();
        CHECK(stored->nbFields == 4 && std::strcmp(static_cast<char const*>(stored->fields[2].data), "a+b") == 0);
      }
    }
  }
}

}  // namespace

void check_contract(Library const& library, Logger& logger) {
  check_identity(library);
  check_formats(library);
  check_types(library, logger);
  check_shapes(library, logger);
  check_fields(library, logger);
  check_copies(library);
  CHECK(logger.take().empty());
}

namespace {

// x [2, dynamic, 96] with a residual, a gate by sample, a norm with rows for all, and a balance.
Fields const kFused{{{"act_bits", 4}, {"act_group", 0}},
                    "blocks.0.to_q",
                    {{"reads", "y,gate,multiplier,addend,pre_quant"}, {"norm", "layer"}},
                    {{"eps", 1e-6f}}};
constexpr int kFusedInputs = 13;

struct FusedNode {
  DynamicPluginTensorDesc tensors[kFusedInputs + 2];
};

FusedNode good_fused() {
  FusedNode node{};
  Node const plain = good_node();
  for (int i = 0; i < 8; ++i) node.tensors[i] = plain.tensors[i];
  node.tensors[7].desc.dims = dims({1, 1});
  std::vector<std::vector<int64_t>> const shapes{{2, -1, 96}, {2, 1, 96}, {96}, {96}, {12, 2, 8}, {2, -1, 64}, {2, -1, 96}};
  DataType const x = DataType::kBF16, real = DataType::kFLOAT;
  DataType const types[] = {x, real, real, real, x, x, x};
  for (int i = 0; i < 7; ++i) {
    DynamicPluginTensorDesc& tensor = node.tensors[8 + i];
    tensor.desc.dims = tensor.min = tensor.opt = tensor.max = dims(shapes[i]);
    tensor.desc.type = types[i];
    tensor.desc.scale = 1;
  }
  for (int i : {0, 8, 13, 14}) node.tensors[i].min.d[1] = 1, node.tensors[i].opt.d[1] = 50, node.tensors[i].max.d[1] = 100;
  return node;
}

int32_t configure(Plugin const& plugin, FusedNode const& node) {
  return build(plugin).configurePlugin(node.tensors, kFusedInputs, node.tensors + kFusedInputs, 2);
}

void check_fused_shapes(Library const& library, Logger& logger) {
  Plugin const plugin = library.create(kFused);
  CHECK(build(plugin).getNbOutputs() == 2);
  DataType types[kFusedInputs], out[2]{};
  for (int i = 0; i < kFusedInputs; ++i) types[i] = good_fused().tensors[i].desc.type;
  CHECK(build(plugin).getOutputDataTypes(out, 2, types, kFusedInputs) == 0);
  CHECK(out[0] == DataType::kBF16 && out[1] == DataType::kBF16);
  types[9] = DataType::kBF16;
  CHECK(build(plugin).getOutputDataTypes(out, 2, types, kFusedInputs) != 0);
  CHECK_SAYS(logger, "blocks.0.to_q: gate is BF16\n  available: FLOAT");
  types[9] = DataType::kFLOAT;
  types[8] = DataType::kHALF;
  CHECK(build(plugin).getOutputDataTypes(out, 2, types, kFusedInputs) != 0);
  CHECK_SAYS(logger, "y is HALF\n  available: BF16, as x");
  CHECK(build(plugin).getOutputDataTypes(out, 1, types, kFusedInputs) != 0);
  CHECK_SAYS(logger, "outer, y, gate, multiplier, addend, pre_quant) and 2 outputs");
  FusedNode const node = good_fused();
  for (int i = 0; i < kFusedInputs + 2; ++i) CHECK(build(plugin).supportsFormatCombination(i, node.tensors, kFusedInputs, 2));
  CHECK(!build(plugin).supportsFormatCombination(0, node.tensors, 8, 1));

  ExpressionBuilder builder;
  nvinfer1::DimsExprs in[kFusedInputs]{}, shapes[2]{};
  for (int i = 0; i < kFusedInputs; ++i) {
    in[i].nbDims = node.tensors[i].desc.dims.nbDims;
    for (int d = 0; d < in[i].nbDims; ++d) {
      int64_t const size = node.tensors[i].desc.dims.d[d];
      in[i].d[d] = size < 0 ? builder.symbol("S") : builder.number(size);
    }
  }
  CHECK(build(plugin).getOutputShapes(in, kFusedInputs, nullptr, 0, shapes, 2, builder) == 0);
  std::string got;
  for (auto const& shape : shapes) {
    for (int d = 0; d < shape.nbDims; ++d) got += Expression::text_of(shape.d[d]) + " ";
  }
  check(got == "2 S 64 2 S 96 ", "y has N features, the sum those of x", __FILE__, __LINE__, got);
}

void check_fused_fields(Library const& library, Logger& logger) {
  auto refuse = [&](std::vector<std::pair<std::string, std::string>> texts, int32_t gelu, float eps, char const* words) {
    Fields const fields{{{"act_bits", 4}, {"act_group", 0}, {"gelu", gelu}}, "here", std::move(texts), {{"eps", eps}}};
    CHECK(library.create(fields) == nullptr);
    CHECK_SAYS(logger, words);
  };
  refuse({{"reads", "gate,y"}}, 0, 0, "here: reads is gate,y\n  available: y,gate,multiplier,addend,pre_quant");
  refuse({{"reads", "y,y"}}, 0, 0, "reads is y,y");
  refuse({{"reads", "y,,gate"}}, 0, 0, "reads is y,,gate");
  refuse({{"reads", "gate"}}, 0, 0, "reads is gate\n  available: a gate with its y");
  refuse({{"norm", "batch"}}, 0, 0, "norm is batch\n  available: none, layer, rms");
  refuse({{"norm", "rms"}}, 1, 0, "gelu with a norm");
  refuse({{"reads", "addend"}}, 1, 0, "gelu with a norm or with reads of addend");
  refuse({{"norm", "rms"}}, 0, -1, "eps is -1");
  Fields wrong{{{"act_bits", 4}, {"act_group", 0}, {"eps", 1}}, "here", {}, {}};
  CHECK(library.create(wrong) == nullptr);
  CHECK_SAYS(logger, "field eps is no number\n  available: FLOAT32");

  // Through an engine file and back, twice.
  Plugin const plugin = library.create(kFused);
  for (Plugin const& each : {Plugin(plugin->clone()), library.reload(plugin), library.reload(library.reload(plugin))}) {
    CHECK(each != nullptr && std::strcmp(core(each).getPluginName(), "FusedQuantLinear") == 0);
    CHECK(build(each).getNbOutputs() == 2);
    std::string const said = build(each).getMetadataString();
    check(said.find(";reads=y,gate,multiplier,addend,pre_quant;norm=layer;gelu=0;eps=0.000001") != std::string::npos,
          "all fields are kept", __FILE__, __LINE__, said);
  }
}

void check_fused_questions(Library const& library, Logger& logger) {
  Plugin const plugin = library.create(kFused);
  FusedNode node = good_fused();
  CHECK(configure(plugin, node) == 0);
  check(logger.errors.empty(), "a good fused node configures", __FILE__, __LINE__, logger.take());
  size_t const most = build(plugin).getWorkspaceSize(node.tensors, kFusedInputs, node.tensors + kFusedInputs, 2);
  CHECK(most > 0);
  auto refuse = [&](int input, std::vector<int64_t> const& shape, char const* words) {
    FusedNode bad = good_fused();
    bad.tensors[input].desc.dims = dims(shape);
    CHECK(configure(plugin, bad) != 0);
    CHECK_SAYS(logger, words);
  };
  refuse(8, {2, 1, 96}, "y has shape [2, 1, 96]\n  available: [2, -1, 96], the shape of x");
  refuse(9, {3, 1, 96}, "gate has shape [3, 1, 96]\n  available: rows of 96");
  refuse(9, {1, 7, 96}, "gate has shape [1, 7, 96]");
  refuse(10, {95}, "multiplier has shape [95]");
  refuse(11, {1, 2, 1, 96}, "addend has shape [1, 2, 1, 96]");
  refuse(12, {96}, "pre_quant has shape [96]\n  available: [12, 2, 8]");
  refuse(7, {3, 3}, "rotation has an outer factor of 3\n  available: rotations without one\n  fix: export without --fuse");
}

}  // namespace

void check_fused_contract(Library const& library, Logger& logger) {
  check_fused_shapes(library, logger);
  check_fused_fields(library, logger);
  if (device_present()) check_fused_questions(library, logger);
  CHECK(logger.take().empty());
}

void check_device_questions(Library const& library, Logger& logger) {
  Plugin const plugin = library.create(kGood);
  Node node = good_node();
  CHECK(configure(plugin, node) == 0);
  check(logger.errors.empty(), "a good node configures", __FILE__, __LINE__, logger.take());
  size_t const most = build(plugin).getWorkspaceSize(node.tensors, 8, node.tensors + 8, 1);
  node.tensors[0].max.d[1] = 1;
  size_t const least = build(plugin).getWorkspaceSize(node.tensors, 8, node.tensors + 8, 1);
  CHECK(most > least && least > 0);

  auto refuse = [&](int input, std::vector<int64_t> const& shape, char const* words) {
    Node bad = good_node();
    bad.tensors[input].desc.dims = dims(shape);
    CHECK(configure(plugin, bad) != 0);
    CHECK_SAYS(logger, words);
  };
  refuse(0, {2, -1, 64}, "x has shape [2, -1, 64]\n  available: [..., 96]");
  refuse(1, {64, 48, 1}, "weight has shape [64, 48, 1]");
  refuse(1, {-1, 48}, "weight has shape [-1, 48]");
  refuse(2, {63}, "weight_scale has shape [63]\n  available: [64]");
  refuse(3, {64, 5}, "weight_group_scale has shape [64, 5]");
  refuse(4, {64}, "weight_zero has shape [64]\n  available: [64, 3] (bytes, per row and group)");
  refuse(5, {1}, "bias has shape [1]");
  refuse(6, {16, 8}, "hadamard has shape [16, 8]\n  available: a square matrix");
  refuse(7, {5, 5}, "K = 96 is no multiple of the rotation block 5 * 16");
  Node real = good_node();
  real.tensors[4].desc.type = DataType::kFLOAT;
  CHECK(configure(plugin, real) != 0);
  CHECK_SAYS(logger, "available: [64] (fp32, per row)");
  Plugin const grouped = library.create({{{"act_bits", 8}, {"act_group", 64}}, "g"});
  CHECK(configure(grouped, good_node()) != 0);
  CHECK_SAYS(logger, "K = 96 is no multiple of act_group 64");
  PluginTensorDesc in[8]{};
  void* outputs[1]{};
  CHECK(runtime(plugin).enqueue(in, in, nullptr, outputs, nullptr, nullptr) != 0);
  CHECK_SAYS(logger, "enqueue came before onShapeChange");
}

void check_missing_kernels(Library const& library, Logger& logger) {
  Plugin const plugin = library.create(kGood);
  CHECK(plugin != nullptr);
  CHECK(configure(plugin, good_node()) != 0);
  CHECK_SAYS(logger, "libdvdquant_kernels.so) cannot be loaded");
  CHECK(configure(plugin, good_node()) != 0);
  CHECK_SAYS(logger, "fix: build them (make kernels)");
}

void check_missing_driver(Library const& library, Logger& logger) {
  Plugin const plugin = library.create(kGood);
  CHECK(configure(plugin, good_node()) != 0);
  CHECK_SAYS(logger, "the CUDA driver cannot be loaded");
  nvinfer1::PluginTensorDesc in[8]{};
  for (int i = 0; i < 8; ++i) in[i] = good_node().tensors[i].desc;
  CHECK(runtime(plugin).onShapeChange(in, 8, in, 1) != 0);
  CHECK_SAYS(logger, "fix: run on a machine with an NVIDIA driver");
}

}  // namespace harness
