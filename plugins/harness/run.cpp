// An engine's life on data: build questions, serialization, a context, enqueue, a CUDA graph, shared and changed weights.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "device_memory.h"
#include "harness.h"

namespace harness {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

constexpr int kInputs = 8;
constexpr int kMost = 16;  // inputs and outputs of a fused node
constexpr size_t kGuard = 512;
constexpr unsigned char kPoison = 0xff;  // NaN in bf16 and fp16

struct Case {
  std::string folder;
  Fields fields;
  PluginTensorDesc tensors[kMost]{};  // outputs last
  std::vector<std::vector<char>> data;
  std::vector<std::string> results;  // names of the outputs
  size_t y_bytes = 0, hidden_bytes = 0;

  int inputs() const { return static_cast<int>(data.size()); }
  int outputs() const { return static_cast<int>(results.size()); }
};

struct Type {
  DataType type;
  size_t bytes;
};

Type type_of(std::string const& name) {
  if (name == "bf16") return {DataType::kBF16, 2};
  if (name == "fp16") return {DataType::kHALF, 2};
  if (name == "fp32") return {DataType::kFLOAT, 4};
  if (name == "int32") return {DataType::kINT32, 4};
  if (name == "int8") return {DataType::kINT8, 1};
  throw std::runtime_error("case.txt names the type " + name);
}

// case.txt: "field NAME NUMBER", "real NAME NUMBER", "text NAME WORD", "layer NAME", "tensor NAME TYPE SIZES..." in the order of
// the inputs, and "result NAME TYPE SIZES..." for y and the sum of a residual.
Case read_case(std::string const& folder) {
  Case result;
  result.folder = folder;
  std::ifstream lines(folder + "/case.txt");
  int position = 0;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string kind, name, type;
    words >> kind >> name;
    if (kind == "layer") result.fields.layer = name;
    if (kind == "field") {
      int32_t value = 0;
      words >> value;
      result.fields.integers.emplace_back(name, value);
    }
    if (kind == "text") {
      std::string word;
      words >> word;
      result.fields.texts.emplace_back(name, word);
    }
    if (kind == "real") {
      float value = 0;
      words >> value;
      result.fields.reals.emplace_back(name, value);
    }
    if (kind != "tensor" && kind != "result") continue;
    if (position == kMost) throw std::runtime_error(folder + "/case.txt names too many tensors");
    words >> type;
    std::vector<int64_t> sizes;
    for (int64_t size = 0; words >> size;) sizes.push_back(size);
    PluginTensorDesc& tensor = result.tensors[position];
    tensor.dims = dims(sizes);
    tensor.type = type_of(type).type;
    tensor.format = nvinfer1::TensorFormat::kLINEAR;
    tensor.scale = 1;
    size_t bytes = type_of(type).bytes;
    for (int64_t size : sizes) bytes *= static_cast<size_t>(size);
    if (kind == "result") {
      (result.results.empty() ? result.y_bytes : result.hidden_bytes) = bytes;
      result.results.push_back(name);
    } else {
      std::ifstream file(folder + "/" + name + ".bin", std::ios::binary);
      result.data.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
      if (result.data.back().size() != bytes) throw std::runtime_error(folder + ": " + name + ".bin has another size");
    }
    ++position;
  }
  if (result.inputs() < kInputs || result.results.empty()) throw std::runtime_error(folder + "/case.txt names " + std::to_string(position) + " tensors");
  return result;
}

size_t workspace_of(Plugin const& plugin, Case const& data) {
  nvinfer1::DynamicPluginTensorDesc described[kMost]{};
  int const inputs = data.inputs(), outputs = data.outputs();
  for (int i = 0; i < inputs + outputs; ++i) {
    described[i].desc = data.tensors[i];
    described[i].min = described[i].opt = described[i].max = data.tensors[i].dims;
    CHECK(build(plugin).supportsFormatCombination(i, described, inputs, outputs));
  }
  CHECK(build(plugin).getNbOutputs() == outputs);
  CHECK(build(plugin).configurePlugin(described, inputs, described + inputs, outputs) == 0);
  return build(plugin).getWorkspaceSize(described, inputs, described + inputs, outputs);
}

// A context of an engine that was built, stored and loaded; `old`: by a plugin that knew no packed weights.
class Engine {
 public:
  Engine(Library const& library, Case const& data, Fields const& fields, Logger& logger, bool old = false) : data_(data) {
    using nvinfer1::TensorRTPhase;
    Plugin const built = library.create(fields, old ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD);
    if (built == nullptr) throw std::runtime_error("the plugin was not created");
    workspace_ = std::make_unique<Memory>(workspace_of(built, data) + kGuard);
    workspace_->fill(kPoison);
    Context context;
    plugin_ = Plugin(runtime(library.reload(built)).attachToContext(&context));
    if (plugin_ == nullptr) throw std::runtime_error("no context: " + logger.take());
    int const count = data_.inputs();
    CHECK(runtime(plugin_).onShapeChange(data_.tensors, count, data_.tensors + count, data_.outputs()) == 0);
    if (data_.outputs() == 2) hidden_ = std::make_unique<Memory>(data_.hidden_bytes + kGuard);
    if (hidden_) hidden_->fill(kPoison);
  }

  // x + gate * y of the last run, or null where the node does not add.
  Memory const* hidden() const { return hidden_.get(); }

  int32_t enqueue(std::vector<std::unique_ptr<Memory>> const& inputs, Memory const& y, Stream stream) const {
    void const* addresses[kMost];
    for (int i = 0; i < data_.inputs(); ++i) addresses[i] = inputs[i]->data();
    void* outputs[2] = {y.data(), hidden_ ? hidden_->data() : nullptr};
    return runtime(plugin_).enqueue(data_.tensors, data_.tensors + data_.inputs(), addresses, outputs, workspace_->data(),
                                     static_cast<cudaStream_t>(stream));
  }

  // No token: nothing to do, and nothing of the layer is touched.
  int32_t enqueue_nothing(Stream stream) const {
    if (data_.tensors[0].dims.nbDims == 1) return 0;  // a vector is one token
    PluginTensorDesc empty[kMost];
    std::copy(data_.tensors, data_.tensors + kMost, empty);
    empty[0].dims.d[0] = 0;
    void* outputs[2] = {nullptr, nullptr};
    void const* addresses[kMost]{};
    return runtime(plugin_).enqueue(empty, empty + data_.inputs(), addresses, outputs, nullptr,
                                     static_cast<cudaStream_t>(stream));
  }

 private:
  Case const& data_;
  std::unique_ptr<Memory> workspace_, hidden_;
  Plugin plugin_;
};

std::vector<std::unique_ptr<Memory>> upload(Case const& data) {
  std::vector<std::unique_ptr<Memory>> inputs;
  for (auto const& contents : data.data) inputs.push_back(std::make_unique<Memory>(contents));
  return inputs;
}

void save(Case const& data, Memory const& y, size_t bytes, char const* name) {
  std::vector<char> const contents = y.read();
  for (size_t i = bytes; i < contents.size(); ++i) {
    if (static_cast<unsigned char>(contents[i]) != kPoison) {
      check(false, "an output is written past its end", __FILE__, __LINE__, std::to_string(i));
      break;
    }
  }
  std::ofstream(data.folder + "/" + name, std::ios::binary).write(contents.data(), static_cast<std::streamsize>(bytes));
}

Fields other_width(Fields fields) {
  for (auto& [name, value] : fields.integers) {
    if (name == "act_bits") value = 12 - value;
  }
  return fields;
}

void run_with_graph(Engine const& engine, Case const& data, std::vector<std::unique_ptr<Memory>> const& inputs,
                    Stream stream, Logger& logger) {
  Device& device = Device::get();
  Memory const y(data.y_bytes + kGuard);
  y.fill(kPoison);
  // Nothing may be prepared while a graph is captured.
  device.begin_capture(stream);
  CHECK(engine.enqueue(inputs, y, stream) != 0);
  device.end_capture(stream, false);
  CHECK_SAYS(logger, "fix: run the context once with these weights bound before capturing");
  int const before = device.live_allocations();
  long long const bytes = device.live_bytes();
  CHECK(engine.enqueue(inputs, y, stream) == 0);
  if (before >= 0) std::printf("%s: holds %lld bytes\n", data.folder.c_str(), device.live_bytes() - bytes);
  check(logger.errors.empty(), "the layer runs", __FILE__, __LINE__, logger.take());
  device.synchronize(stream);
  save(data, y, data.y_bytes, "y.bin");
  if (engine.hidden() != nullptr) save(data, *engine.hidden(), data.hidden_bytes, "hidden.bin");
  if (before >= 0) CHECK(device.live_allocations() == before + 1);

  y.fill(kPoison);
  device.begin_capture(stream);
  CHECK(engine.enqueue(inputs, y, stream) == 0);
  device.end_capture(stream, true);
  save(data, y, data.y_bytes, "y_graph.bin");
  CHECK(engine.enqueue_nothing(stream) == 0);
}

// The weights at another address are another prepared weight; the first stays, since a graph holds its address.
void run_elsewhere(Engine const& engine, Case const& data, Stream stream, Logger& logger) {
  Device& device = Device::get();
  auto const moved = upload(data);
  Memory const y(data.y_bytes + kGuard);
  device.begin_capture(stream);
  CHECK(engine.enqueue(moved, y, stream) != 0);
  device.end_capture(stream, false);
  CHECK_SAYS(logger, "this weight has not run before");
  int const before = device.live_allocations();
  CHECK(engine.enqueue(moved, y, stream) == 0);
  device.synchronize(stream);
  if (before >= 0) CHECK(device.live_allocations() == before + 1);
}

void refuse_wrong_matrix(Library const& library, Case const& data, Stream stream, Logger& logger) {
  if (data.tensors[6].dims.d[0] == 1) return;
  Case wrong = data;
  float value = 0;
  std::memcpy(&value, wrong.data[6].data(), sizeof value);
  value = -value;
  std::memcpy(wrong.data[6].data(), &value, sizeof value);
  Engine const engine(library, wrong, wrong.fields, logger);
  auto const inputs = upload(wrong);
  Memory const y(data.y_bytes + kGuard);
  CHECK(engine.enqueue(inputs, y, stream) != 0);
  CHECK_SAYS(logger, "hadamard[0, 0] is -");
}

}  // namespace

void load_case(Library const& library, std::string const& folder) {
  CHECK(library.create(read_case(folder).fields, nvinfer1::TensorRTPhase::kRUNTIME) != nullptr);
}

void run_case(Library const& library, Logger& logger, std::string const& folder) {
  Device& device = Device::get();
  Case const data = read_case(folder);
  Stream const stream = device.new_stream();
  int const start = device.live_allocations();
  {
    auto const inputs = upload(data);
    Engine const engine(library, data, data.fields, logger);
    run_with_graph(engine, data, inputs, stream, logger);
    // The engine of the other activation width on the same weights.
    Engine const other(library, data, other_width(data.fields), logger);
    Memory const y(data.y_bytes + kGuard);
    y.fill(kPoison);
    int const before = device.live_allocations();
    CHECK(other.enqueue(inputs, y, stream) == 0);
    device.synchronize(stream);
    if (before >= 0) std::printf("%s: other width allocates %d\n", folder.c_str(), device.live_allocations() - before);
    // Another context of the engine, on a stream of its own: it shares what is held, and has its own workspace.
    Engine const twin(library, data, data.fields, logger);
    Stream const second = device.new_stream();
    int const shared = device.live_allocations();
    CHECK(twin.enqueue(inputs, y, second) == 0);
    device.synchronize(second);
    save(data, y, data.y_bytes, "y_twin.bin");
    if (before >= 0) CHECK(device.live_allocations() == shared);
    device.delete_stream(second);
    // An engine whose workspace has no room to expand a weight runs as ever.
    Engine const old(library, data, data.fields, logger, true);
    y.fill(kPoison);
    CHECK(old.enqueue(inputs, y, stream) == 0);
    device.synchronize(stream);
    save(data, y, data.y_bytes, "y_old.bin");
    run_elsewhere(engine, data, stream, logger);
    refuse_wrong_matrix(library, data, stream, logger);
  }
  check(logger.errors.empty(), "nothing else was logged", __FILE__, __LINE__, logger.take());
  CHECK(device.live_allocations() == start);
  device.delete_stream(stream);
}

}  // namespace harness
