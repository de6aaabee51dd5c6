#include "device_memory.h"

#include <dlfcn.h>

#include <stdexcept>

#include "harness.h"

namespace harness {
namespace {

using Address = unsigned long long;
constexpr int kRelaxed = 2, kGlobal = 0;
void* g_driver = nullptr;

template <typename... Arguments>
void call(char const* name, Arguments... arguments) {
  auto* function = reinterpret_cast<int (*)(Arguments...)>(dlsym(g_driver, name));
  if (function == nullptr) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
  if (int const code = function(arguments...); code != 0) {
    throw std::runtime_error(std::string(name) + " failed with " + std::to_string(code));
  }
}

}  // namespace

bool device_present() {
  g_driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (g_driver == nullptr) return false;
  int count = 0;
  auto* init = reinterpret_cast<int (*)(unsigned)>(dlsym(g_driver, "cuInit"));
  auto* devices = reinterpret_cast<int (*)(int*)>(dlsym(g_driver, "cuDeviceGetCount"));
  return init != nullptr && devices != nullptr && init(0) == 0 && devices(&count) == 0 && count > 0;
}

Device::Device() {
  int device = 0;
  void* context = nullptr;
  call("cuDeviceGet", &device, 0);
  call("cuDevicePrimaryCtxRetain", &context, device);
  call("cuCtxSetCurrent", context);
}

Device& Device::get() {
  static Device device;
  return device;
}

int Device::live_allocations() const {
  auto* live = reinterpret_cast<int (*)()>(dlsym(g_driver, "host_cuda_live"));
  return live != nullptr ? live() : -1;
}

long long Device::live_bytes() const {
  auto* live = reinterpret_cast<long long (*)()>(dlsym(g_driver, "host_cuda_live_bytes"));
  return live != nullptr ? live() : -1;
}

Stream Device::new_stream() const {
  Stream stream = nullptr;
  call("cuStreamCreate", &stream, 1u);  // CU_STREAM_NON_BLOCKING
  return stream;
}

void Device::delete_stream(Stream stream) const { call("cuStreamDestroy_v2", stream); }
void Device::synchronize(Stream stream) const { call("cuStreamSynchronize", stream); }
void Device::begin_capture(Stream stream) const { call("cuStreamBeginCapture_v2", stream, kGlobal); }

void Device::end_capture(Stream stream, bool launch) const {
  void *graph = nullptr, *executable = nullptr;
  call("cuStreamEndCapture", stream, &graph);
  if (!launch) return;
  call("cuGraphInstantiateWithFlags", &executable, graph, 0ull);
  call("cuGraphLaunch", executable, stream);
  synchronize(stream);
}

Memory::Memory(size_t bytes) : bytes_(bytes) { call("cuMemAlloc_v2", &address_, bytes); }

Memory::Memory(std::vector<char> const& contents) : Memory(contents.size()) {
  call("cuMemcpyHtoDAsync_v2", address_, static_cast<void const*>(contents.data()), bytes_, Stream{});
  call("cuStreamSynchronize", Stream{});
}

Memory::~Memory() {
  auto* free = reinterpret_cast<int (*)(Address)>(dlsym(g_driver, "cuMemFree_v2"));
  CHECK(free(address_) == 0);
}

void Memory::fill(unsigned char value) const {
  call("cuMemsetD8Async", address_, value, bytes_, Stream{});
  call("cuStreamSynchronize", Stream{});
}

std::vector<char> Memory::read() const {
  std::vector<char> contents(bytes_);
  call("cuMemcpyDtoHAsync_v2", static_cast<void*>(contents.data()), address_, bytes_, Stream{});
  call("cuStreamSynchronize", Stream{});
  return contents;
}

}  // namespace harness
