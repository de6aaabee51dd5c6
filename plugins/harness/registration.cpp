// The plugin file in a process with a TensorRT: registering itself, and a TensorRT of another major version.
#include <dlfcn.h>

#include <stdexcept>

#include "harness.h"

namespace harness {
namespace {

void* open(char const* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  return library;
}

}  // namespace

void check_registration(char const* plugin, std::string const& tensorrt) {
  void* library = open((tensorrt + ".so." + std::to_string(NV_TENSORRT_MAJOR)).c_str());
  auto* registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"))();
  int32_t count = 0;
  registry->getAllCreators(&count);
  CHECK(count == 0);
  open(plugin);
  registry->getAllCreators(&count);
  CHECK(count == 2);
  CHECK(registry->getCreator("FusedQuantLinear", "1", "dvdquant") != nullptr);
  auto* creator = registry->getCreator("QuantLinear", "1", "dvdquant");
  CHECK(creator != nullptr);
  CHECK(creator != nullptr && std::string(static_cast<nvinfer1::IPluginCreatorV3One*>(creator)->getPluginName()) ==
                                  "QuantLinear");
}

void check_other_version(char const* plugin, std::string const& tensorrt) {
  // The other version's layout of IPluginRegistry is unknown here, so nothing of it is called.
  open((tensorrt + (NV_TENSORRT_MAJOR == 10 ? ".so.11" : ".so.10")).c_str());
  void* library = open(plugin);
  int32_t count = -1;
  reinterpret_cast<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"))(count);
  CHECK(count == 0);
  // An object that must not be called: its table of functions would be the other version's.
  auto* finder = reinterpret_cast<nvinfer1::ILoggerFinder*>(0x10);
  reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(finder);
}

}  // namespace harness
