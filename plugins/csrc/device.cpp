#include "device.h"

#include <dlfcn.h>

#include "dvdquant/kernels.h"
#include "messages.h"

namespace dvdquant::plugin {
namespace {

constexpr int kInvalidContext = 201;    // CUDA_ERROR_INVALID_CONTEXT
constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int kRelaxed = 2;              // CU_STREAM_CAPTURE_MODE_RELAXED

using Address = unsigned long long;  // CUdeviceptr

struct Driver {
  int (*init)(unsigned) = nullptr;
  int (*get_error_string)(int, char const**) = nullptr;
  int (*context_get_device)(int*) = nullptr;
  int (*device_get)(int*, int) = nullptr;
  int (*device_get_attribute)(int*, int, int) = nullptr;
  int (*stream_is_capturing)(Stream, int*) = nullptr;
  int (*stream_synchronize)(Stream) = nullptr;
  int (*exchange_capture_mode)(int*) = nullptr;
  int (*mem_alloc)(Address*, size_t) = nullptr;
  int (*mem_free)(Address) = nullptr;
  int (*copy_to_host)(void*, Address, size_t, Stream) = nullptr;
  int (*copy_to_device)(Address, void const*, size_t, Stream) = nullptr;
};

template <typename Function>
void resolve(void* library, char const* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) {
    throw Failure(DVDQ_CUDA_ERROR, std::string("libcuda.so.1 has no ") + name, "", "update the NVIDIA driver");
  }
}

Driver load_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    char const* reason = dlerror();
    throw Failure(DVDQ_CUDA_ERROR, std::string("the CUDA driver cannot be loaded: ") + (reason ? reason : "?"), "",
                  "run on a machine with an NVIDIA driver; in a container, pass the GPU (--gpus all)");
  }
  Driver driver;
  resolve(library, "cuInit", driver.init);
  resolve(library, "cuGetErrorString", driver.get_error_string);
  resolve(library, "cuCtxGetDevice", driver.context_get_device);
  resolve(library, "cuDeviceGet", driver.device_get);
  resolve(library, "cuDeviceGetAttribute", driver.device_get_attribute);
  resolve(library, "cuStreamIsCapturing", driver.stream_is_capturing);
  resolve(library, "cuStreamSynchronize", driver.stream_synchronize);
  resolve(library, "cuThreadExchangeStreamCaptureMode", driver.exchange_capture_mode);
  resolve(library, "cuMemAlloc_v2", driver.mem_alloc);
  resolve(library, "cuMemFree_v2", driver.mem_free);
  resolve(library, "cuMemcpyDtoHAsync_v2", driver.copy_to_host);
  resolve(library, "cuMemcpyHtoDAsync_v2", driver.copy_to_device);
  return driver;
}

std::string reason_of(Driver const& driver, int code) {
  char const* text = nullptr;
  driver.get_error_string(code, &text);
  return std::string(text != nullptr ? text : "unknown error") + " (" + std::to_string(code) + ")";
}

void check(Driver const& driver, int code, std::string const& doing) {
  if (code != 0) throw Failure(DVDQ_CUDA_ERROR, doing + " failed: " + reason_of(driver, code));
}

// Kept for the life of the process: unloading a driver is not safe. A failed load is tried again at the next call.
Driver const& driver() {
  static Driver const loaded = [] {
    Driver fresh = load_driver();
    check(fresh, fresh.init(0), "cuInit");
    return fresh;
  }();
  return loaded;
}

Address address(void const* pointer) { return reinterpret_cast<Address>(pointer); }

}  // namespace

int current_device() {
  Driver const& cuda = driver();
  int device = 0;
  int const code = cuda.context_get_device(&device);
  if (code == kInvalidContext) {
    check(cuda, cuda.device_get(&device, 0), "finding a CUDA device");
  } else {
    check(cuda, code, "cuCtxGetDevice");
  }
  return device;
}

int32_t sm_of(int device) {
  Driver const& cuda = driver();
  int major = 0, minor = 0;
  check(cuda, cuda.device_get_attribute(&major, kMajor, device), "reading the compute capability");
  check(cuda, cuda.device_get_attribute(&minor, kMinor, device), "reading the compute capability");
  return major * 10 + minor;
}

bool is_capturing(Stream stream) {
  int status = 0;
  check(driver(), driver().stream_is_capturing(stream, &status), "cuStreamIsCapturing");
  return status != 0;
}

void synchronize(Stream stream) { check(driver(), driver().stream_synchronize(stream), "cuStreamSynchronize"); }

void copy_to_host(void* host, void const* device, size_t bytes, Stream stream) {
  check(driver(), driver().copy_to_host(host, address(device), bytes, stream), "copying to the host");
}

void copy_to_device(void* device, void const* host, size_t bytes, Stream stream) {
  check(driver(), driver().copy_to_device(address(device), host, bytes, stream), "copying to the device");
}

DeviceBuffer::DeviceBuffer(size_t bytes, std::string const& what) {
  Address allocated = 0;
  int const code = driver().mem_alloc(&allocated, bytes);
  if (code != 0) {
    throw Failure(DVDQ_CUDA_ERROR,
                  "allocating " + std::to_string(bytes) + " bytes for " + what + " failed: " + reason_of(driver(), code),
                  "", "free device memory, or leave weights packed (DVDQUANT_WEIGHTS=packed): expanded ones take 4 or 8 bits more each");
  }
  data_ = reinterpret_cast<void*>(allocated);
}

DeviceBuffer::~DeviceBuffer() {
  int mode = kRelaxed;
  driver().exchange_capture_mode(&mode);
  // A driver that is shutting down at process exit refuses, and has freed the memory itself.
  int const code = driver().mem_free(address(data_));
  if (code != 0) log(Severity::kVERBOSE, "dvdquant QuantLinear: freeing device memory: " + reason_of(driver(), code));
  driver().exchange_capture_mode(&mode);
}

RelaxedCapture::RelaxedCapture() : mode_(kRelaxed) {
  check(driver(), driver().exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode");
}

RelaxedCapture::~RelaxedCapture() { driver().exchange_capture_mode(&mode_); }

}  // namespace dvdquant::plugin
