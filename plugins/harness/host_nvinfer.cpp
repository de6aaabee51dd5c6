// libnvinfer.so.N with nothing but a plugin registry that remembers what is registered: for the library's other door.
#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

class Registry final : public IPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR == 10
  bool registerCreator(IPluginCreator&, AsciiChar const*) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 10
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
#endif
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* name_space) noexcept override {
    name_space_ = name_space;
    creators_.push_back(&creator);
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    *count = static_cast<int32_t>(creators_.size());
    return creators_.data();
  }
  IPluginCreatorInterface* getCreator(AsciiChar const* name, AsciiChar const*, AsciiChar const* name_space) noexcept override {
    for (IPluginCreatorInterface* const creator : creators_) {
      bool const same = std::string(name) == static_cast<IPluginCreatorV3One*>(creator)->getPluginName();
      if (same && name_space_ == name_space) return creator;
    }
    return nullptr;
  }
  bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
  IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(AsciiChar const*) noexcept override { return 1; }

 private:
  std::vector<IPluginCreatorInterface*> creators_;
  std::string name_space_;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}
