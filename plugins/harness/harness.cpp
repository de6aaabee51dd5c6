// harness PLUGIN contract             shapes, types, formats, fields, refusals; with a device also planning
// harness PLUGIN missing-kernels      the refusal when libdvdquant_kernels.so cannot be loaded
// harness PLUGIN missing-driver       the refusal when there is no libcuda.so.1
// harness PLUGIN registration [lean]  registers itself with a TensorRT in the process (DVDQUANT_PLUGIN_REGISTER=1), or with
//                                     the lean runtime
// harness PLUGIN other-version [lean] refuses a TensorRT, or a lean runtime, of another major version
// harness PLUGIN run CASE_FOLDER ...  enqueue on data; writes y.bin and y_graph.bin into each folder
// harness PLUGIN run-fused CASE ...   the same with FusedQuantLinear; hidden.bin too, where a node has it
#include "harness.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace harness {
namespace {

int g_checks = 0, g_failures = 0;

template <typename Function>
Function* symbol(void* library, char const* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(std::string("the plugin exports no ") + name);
  return reinterpret_cast<Function*>(found);
}

}  // namespace

void check(bool holds, char const* text, char const* file, int line, std::string const& detail) {
  ++g_checks;
  if (holds) return;
  ++g_failures;
  std::fprintf(stderr, "FAILED %s:%d: %s\n%s", file, line, text, detail.empty() ? "" : ("  got: " + detail + "\n").c_str());
}

int failures() { return g_failures; }
int checks() { return g_checks; }

Library::Library(char const* path, Logger& logger, std::string const& name) : finder_(logger) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  symbol<void(nvinfer1::ILoggerFinder*)>(library, "setLoggerFinder")(&finder_);
  int32_t count = 0;
  auto* creators = symbol<nvinfer1::IPluginCreatorInterface* const*(int32_t&)>(library, "getCreators")(count);
  CHECK(count == 2);
  for (int32_t i = 0; i < count; ++i) {
    CHECK(std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
    auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    if (name == creator->getPluginName()) creator_ = creator;
  }
  if (creator_ == nullptr) throw std::runtime_error("the plugin has no creator of " + name);
}

Plugin Library::create(Fields const& fields, nvinfer1::TensorRTPhase phase) const {
  std::vector<nvinfer1::PluginField> list;
  for (auto const& [name, value] : fields.integers) {
    list.emplace_back(name.c_str(), &value, nvinfer1::PluginFieldType::kINT32, 1);
  }
  if (!fields.layer.empty()) {
    list.emplace_back("layer", fields.layer.data(), nvinfer1::PluginFieldType::kCHAR,
                      static_cast<int32_t>(fields.layer.size()));
  }
  for (auto const& [name, value] : fields.texts) {
    list.emplace_back(name.c_str(), value.data(), nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(value.size()));
  }
  for (auto const& [name, value] : fields.reals) {
    list.emplace_back(name.c_str(), &value, nvinfer1::PluginFieldType::kFLOAT32, 1);
  }
  nvinfer1::PluginFieldCollection collection;
  collection.nbFields = static_cast<int32_t>(list.size());
  collection.fields = list.data();
  return Plugin(creator_->createPlugin("node_quant_linear", &collection, phase));
}

Plugin Library::reload(Plugin const& plugin) const {
  // The bytes travel through a file, so nothing of the first plugin may be pointed at.
  nvinfer1::PluginFieldCollection const stored = *runtime(plugin).getFieldsToSerialize();
  std::vector<std::vector<char>> bytes;
  std::vector<nvinfer1::PluginField> list;
  for (int32_t i = 0; i < stored.nbFields; ++i) {
    nvinfer1::PluginField const& field = stored.fields[i];
    size_t const size = field.type == nvinfer1::PluginFieldType::kCHAR ? 1 : 4;
    auto const* data = static_cast<char const*>(field.data);
    bytes.emplace_back(data, data + size * static_cast<size_t>(field.length));
    list.emplace_back(field.name, nullptr, field.type, field.length);
  }
  for (size_t i = 0; i < list.size(); ++i) list[i].data = bytes[i].data();
  nvinfer1::PluginFieldCollection collection;
  collection.nbFields = static_cast<int32_t>(list.size());
  collection.fields = list.data();
  return Plugin(creator_->createPlugin("", &collection, nvinfer1::TensorRTPhase::kRUNTIME));
}

nvinfer1::IPluginV3OneCore& core(Plugin const& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneCore*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
}
nvinfer1::IPluginV3OneBuild& build(Plugin const& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}
nvinfer1::IPluginV3OneRuntime& runtime(Plugin const& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

nvinfer1::Dims dims(std::vector<int64_t> const& sizes) {
  nvinfer1::Dims result{};
  result.nbDims = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) result.d[i] = sizes[i];
  return result;
}

}  // namespace harness

namespace {

constexpr char kUsage[] =
    "usage: harness PLUGIN (contract | missing-kernels | missing-driver | registration [lean] | other-version [lean] | "
    "run CASE ... | run-fused CASE ...)\n";

// Whether a device was there for it; throws on an unknown command.
bool dispatch(std::string const& command, int count, char** arguments) {
  std::string const tensorrt = count > 3 && std::strcmp(arguments[3], "lean") == 0 ? "libnvinfer_lean" : "libnvinfer";
  if (command == "registration") return harness::check_registration(arguments[1], tensorrt), false;
  if (command == "other-version") return harness::check_other_version(arguments[1], tensorrt), false;
  harness::Logger logger;
  bool const fused = command == "run-fused";
  harness::Library const library(arguments[1], logger, fused ? "FusedQuantLinear" : "QuantLinear");
  if (command == "missing-kernels") return harness::check_missing_kernels(library, logger), false;
  if (command == "missing-driver") return harness::check_missing_driver(library, logger), false;
  bool const device = harness::device_present();
  if (command == "contract") {
    // The plugin keeps what finds its logger, so this lives as long as the other is asked.
    harness::Library const with_prologue(arguments[1], logger, "FusedQuantLinear");
    harness::check_contract(library, logger);
    harness::check_fused_contract(with_prologue, logger);
    if (device) harness::check_device_questions(library, logger);
    return device;
  }
  if (command != "run" && !fused) throw std::runtime_error(kUsage);
  if (!device) throw std::runtime_error("no CUDA device: enqueue cannot run");
  for (int i = 3; i < count; ++i) harness::load_case(library, arguments[i]);
  for (int i = 3; i < count; ++i) harness::run_case(library, logger, arguments[i]);
  return device;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count < 3) throw std::runtime_error(kUsage);
    bool const device = dispatch(arguments[2], count, arguments);
    std::printf("%d checks, %d failed, TensorRT headers %d.%d, %s\n", harness::checks(), harness::failures(),
                NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, device ? "with a device" : "no device");
    return harness::failures() == 0 ? 0 : 1;
  } catch (std::exception const& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
