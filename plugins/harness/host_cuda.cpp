// libcuda.so.1 for machines without a GPU: device memory is the host's, streams run at once. It implements the driver calls
// of the plugin and the harness, counts what is allocated, and refuses what a captured stream forbids, so that the plugin's
// own memory and capture rules are exercised. It is no model of a GPU: kernels come from host_kernels.cpp.
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

enum : int { kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidContext = 201, kCaptureUnsupported = 900 };
constexpr int kRelaxed = 2;
using Address = unsigned long long;

struct State {
  std::mutex mutex;
  std::map<Address, size_t> live;
  std::set<void*> capturing;
};

State& state() {
  static State shared;
  return shared;
}

thread_local int t_capture_mode = 0;  // global, the driver's default
thread_local bool t_has_context = false;

// A potentially unsafe call is forbidden while any stream is captured, unless this thread asked for relaxed mode.
bool forbidden() { return !state().capturing.empty() && t_capture_mode != kRelaxed; }

int copy(void* to, void const* from, size_t bytes, void* stream) {
  // A real capture would record the copy and leave the data for later: here that is an error to notice.
  if (state().capturing.count(stream) != 0) return kCaptureUnsupported;
  std::memcpy(to, from, bytes);
  return kOk;
}

}  // namespace

#define HOST_API extern "C" __attribute__((visibility("default")))

HOST_API int cuInit(unsigned) { return kOk; }
HOST_API int cuGetErrorString(int code, char const** text) {
  *text = code == kOutOfMemory ? "out of memory" : code == kCaptureUnsupported ? "not permitted when capturing" : "error";
  return kOk;
}
HOST_API int cuDeviceGetCount(int* count) { return *count = 1, kOk; }
HOST_API int cuDeviceGet(int* device, int) { return *device = 0, kOk; }
HOST_API int cuDeviceGetName(char* name, int length, int) {
  std::strncpy(name, "host", static_cast<size_t>(length));
  return kOk;
}
HOST_API int cuDeviceTotalMem_v2(size_t* bytes, int) {
  char const* text = std::getenv("HOST_CUDA_MEMORY");
  return *bytes = text != nullptr ? std::strtoull(text, nullptr, 10) : size_t{1} << 33, kOk;
}
HOST_API int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &state(), kOk; }
HOST_API int cuCtxSetCurrent(void* context) { return t_has_context = context != nullptr, kOk; }
HOST_API int cuCtxGetDevice(int* device) { return *device = 0, t_has_context ? kOk : kInvalidContext; }
HOST_API int cuDeviceGetAttribute(int* value, int attribute, int) {
  char const* text = std::getenv("HOST_CUDA_SM");
  int const sm = text != nullptr ? std::atoi(text) : 90;
  *value = attribute == 75 ? sm / 10 : sm % 10;
  return attribute == 75 || attribute == 76 ? kOk : kInvalidValue;
}
HOST_API int cuThreadExchangeStreamCaptureMode(int* mode) {
  int const before = t_capture_mode;
  t_capture_mode = *mode;
  *mode = before;
  return kOk;
}
HOST_API int cuMemAlloc_v2(Address* address, size_t bytes) {
  State& shared = state();
  std::lock_guard<std::mutex> lock(shared.mutex);
  if (forbidden()) return kCaptureUnsupported;
  void* memory = bytes == 0 ? nullptr : std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (memory == nullptr) return bytes == 0 ? kInvalidValue : kOutOfMemory;
  *address = reinterpret_cast<Address>(memory);
  shared.live[*address] = bytes;
  return kOk;
}
HOST_API int cuMemFree_v2(Address address) {
  State& shared = state();
  std::lock_guard<std::mutex> lock(shared.mutex);
  if (forbidden()) return kCaptureUnsupported;
  if (shared.live.erase(address) == 0) return kInvalidValue;
  std::free(reinterpret_cast<void*>(address));
  return kOk;
}
HOST_API int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  return copy(to, reinterpret_cast<void const*>(from), bytes, stream);
}
HOST_API int cuMemcpyHtoDAsync_v2(Address to, void const* from, size_t bytes, void* stream) {
  return copy(reinterpret_cast<void*>(to), from, bytes, stream);
}
HOST_API int cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void*) {
  return std::memset(reinterpret_cast<void*>(to), value, bytes), kOk;
}
HOST_API int cuStreamCreate(void** stream, unsigned) { return *stream = std::malloc(1), kOk; }
HOST_API int cuStreamDestroy_v2(void* stream) { return std::free(stream), kOk; }
HOST_API int cuStreamSynchronize(void* stream) { return state().capturing.count(stream) ? kCaptureUnsupported : kOk; }
HOST_API int cuStreamIsCapturing(void* stream, int* status) {
  return *status = state().capturing.count(stream) ? 1 : 0, kOk;
}
HOST_API int cuStreamBeginCapture_v2(void* stream, int) { return state().capturing.insert(stream), kOk; }
HOST_API int cuStreamEndCapture(void* stream, void** graph) {
  return *graph = stream, state().capturing.erase(stream) == 1 ? kOk : kInvalidValue;
}
// What was captured ran when it was enqueued, so a graph holds nothing to run again.
HOST_API int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  return *executable = graph, kOk;
}
HOST_API int cuGraphLaunch(void*, void*) { return kOk; }

// Allocations that are not freed; only this library has it, which is how the harness knows that there is no GPU.
HOST_API long long host_cuda_live_bytes() {
  std::lock_guard<std::mutex> lock(state().mutex);
  long long bytes = 0;
  for (auto const& [address, size] : state().live) bytes += static_cast<long long>(size);
  return bytes;
}
HOST_API int host_cuda_live() {
  std::lock_guard<std::mutex> lock(state().mutex);
  return static_cast<int>(state().live.size());
}
