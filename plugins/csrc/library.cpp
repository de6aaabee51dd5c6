// The library's doors. TensorRT's loadLibrary asks for the creators and hands over a logger; programs that only dlopen a
// plugin file (trtexec --staticPlugins, polygraphy --plugins) need it to register itself, which DVDQUANT_PLUGIN_REGISTER=1
// asks for. Not by default: loadLibrary refuses a library whose creators are registered already.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "dvdquant/kernels.h"
#include "messages.h"
#include "quant_linear.h"
#include "weight_form.h"

namespace dvdquant::plugin {
namespace {

#define DVDQ_TEXT_OF(value) #value
#define DVDQ_TEXT(value) DVDQ_TEXT_OF(value)
// Read from the file by programs that must not load it (dvdquant/system/plugin_file.py).
[[gnu::used]] char const kBuiltFor[] = "@dvdquant-plugin tensorrt=" DVDQ_TEXT(NV_TENSORRT_MAJOR);

class QuantLinearCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit QuantLinearCreator(bool fused) : fused_(fused) {
    using nvinfer1::PluginFieldType;
    fields_[0] = {"act_bits", nullptr, PluginFieldType::kINT32, 1};
    fields_[1] = {"act_group", nullptr, PluginFieldType::kINT32, 1};
    fields_[2] = {"layer", nullptr, PluginFieldType::kCHAR, 0};
    fields_[3] = {"packed_workspace", nullptr, PluginFieldType::kINT32, 1};
    fields_[4] = {"reads", nullptr, PluginFieldType::kCHAR, 0};
    fields_[5] = {"norm", nullptr, PluginFieldType::kCHAR, 0};
    fields_[6] = {"gelu", nullptr, PluginFieldType::kINT32, 1};
    fields_[7] = {"eps", nullptr, PluginFieldType::kFLOAT32, 1};
    collection_.nbFields = fused ? 8 : 4;
    collection_.fields = fields_;
  }

  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    QuantLinear* plugin = nullptr;
    guarded("creation", [&] {
      Fields read = read_fields(fields, name, fused_);
      // What is built now asks for a workspace with room to expand; an engine file says whether it did.
      if (phase == nvinfer1::TensorRTPhase::kBUILD) read.packed_workspace = 1;
      remember_layer(read.layer);
      plugin = new QuantLinear(std::move(read));
    });
    return plugin;
  }

  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return fused_ ? kFusedName : kPluginName; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  bool const fused_;
  nvinfer1::PluginField fields_[8];
  nvinfer1::PluginFieldCollection collection_{};
};

QuantLinearCreator& creator(bool fused) {
  static QuantLinearCreator plain(false), with_prologue(true);
  return fused ? with_prologue : plain;
}

// The TensorRT of that major version, if it is in this process: all of it, or the lean runtime alone.
void* loaded_tensorrt(int major) {
  for (char const* name : {"libnvinfer.so.", "libnvinfer_lean.so."}) {
    void* found = dlopen((name + std::to_string(major)).c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (found != nullptr) return found;
  }
  return nullptr;
}

// TensorRT 10 and 11 order the functions of ILoggerFinder and IPluginRegistry differently, so a library built for one
// must not call those of the other. Says so and returns false when only another major version is in the process.
bool fits_tensorrt() {
  if (loaded_tensorrt(NV_TENSORRT_MAJOR) != nullptr) return true;
  for (int major = 10; major < 16; ++major) {
    if (major == NV_TENSORRT_MAJOR || loaded_tensorrt(major) == nullptr) continue;
    // Its logger cannot be called, so this goes to standard error.
    set_logger_finder(nullptr);
    log(Severity::kERROR, "dvdquant plugin: this library is built for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                              "\n  available: TensorRT " + std::to_string(major) +
                              "\n  fix: build it against that version: TENSORRT_ROOT=... make plugin");
    return false;
  }
  return true;  // a statically linked or renamed TensorRT cannot be told
}

bool register_itself() {
  char const* asked = std::getenv("DVDQUANT_PLUGIN_REGISTER");
  if (asked == nullptr || std::strcmp(asked, "1") != 0) return false;
  int32_t const code = guarded("registration", [] {
    if (!fits_tensorrt()) return;
    void* tensorrt = loaded_tensorrt(NV_TENSORRT_MAJOR);
    using Get = nvinfer1::IPluginRegistry*();
    auto* get = tensorrt == nullptr ? nullptr : reinterpret_cast<Get*>(dlsym(tensorrt, "getPluginRegistry"));
    if (get == nullptr || get() == nullptr) {
      throw Failure(DVDQ_UNSUPPORTED,
                    "DVDQUANT_PLUGIN_REGISTER=1, but TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                        " (libnvinfer, or libnvinfer_lean) is not in this process",
                    "", "load TensorRT first, or unset the variable and load this file with loadLibrary");
    }
    for (bool const fused : {false, true}) {
      if (!get()->registerCreator(creator(fused), kPluginNamespace)) {
        throw Failure(DVDQ_BAD_ARGUMENT, "TensorRT did not take the plugin", "", "load the library once");
      }
    }
  });
  return code == 0;
}

[[maybe_unused]] bool const g_registered = register_itself();

}  // namespace
}  // namespace dvdquant::plugin

extern "C" DVDQ_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&dvdquant::plugin::creator(false),
                                                               &dvdquant::plugin::creator(true)};
  count = dvdquant::plugin::fits_tensorrt() ? 2 : 0;
  return creators;
}

extern "C" DVDQ_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  if (dvdquant::plugin::fits_tensorrt()) dvdquant::plugin::set_logger_finder(finder);
}
