// The plugin as TensorRT sees it, and checks that count.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fakes.h"

namespace harness {

// Counts every check; a failed one is printed with its place and makes the program end with 1.
void check(bool holds, char const* text, char const* file, int line, std::string const& detail = {});
int failures();
int checks();
#define CHECK(condition) ::harness::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_SAYS(logger, words)                                                             \
  do {                                                                                        \
    std::string const said = (logger).take();                                                 \
    ::harness::check(said.find(words) != std::string::npos, words, __FILE__, __LINE__, said); \
  } while (false)

// Fields of a plugin node, owning their data.
struct Fields {
  std::vector<std::pair<std::string, int32_t>> integers;
  std::string layer;
  std::vector<std::pair<std::string, std::string>> texts = {};
  std::vector<std::pair<std::string, float>> reals = {};
};

using Plugin = std::shared_ptr<nvinfer1::IPluginV3>;

// The loaded library and one of its creators.
class Library {
 public:
  Library(char const* path, Logger& logger, std::string const& name = "QuantLinear");
  Plugin create(Fields const& fields, nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) const;
  // Through the fields the plugin serializes, as an engine file does.
  Plugin reload(Plugin const& plugin) const;
  nvinfer1::IPluginCreatorV3One& creator() const { return *creator_; }

 private:
  Finder finder_;
  nvinfer1::IPluginCreatorV3One* creator_ = nullptr;
};

nvinfer1::IPluginV3OneCore& core(Plugin const& plugin);
nvinfer1::IPluginV3OneBuild& build(Plugin const& plugin);
nvinfer1::IPluginV3OneRuntime& runtime(Plugin const& plugin);

nvinfer1::Dims dims(std::vector<int64_t> const& sizes);

// contract.cpp: everything that needs no device memory. registration.cpp: loading.
// run.cpp: enqueue on the data in the case folders.
void check_contract(Library const& library, Logger& logger);
void check_fused_contract(Library const& library, Logger& logger);
void check_device_questions(Library const& library, Logger& logger);
void check_missing_kernels(Library const& library, Logger& logger);
void check_missing_driver(Library const& library, Logger& logger);
// `tensorrt` is libnvinfer, or libnvinfer_lean for the lean runtime.
void check_registration(char const* plugin, std::string const& tensorrt);
void check_other_version(char const* plugin, std::string const& tensorrt);
bool device_present();
void run_case(Library const& library, Logger& logger, std::string const& folder);
// Creates the node of a case, as an engine file that is loaded creates all of its nodes before it has a context.
void load_case(Library const& library, std::string const& folder);

}  // namespace harness
