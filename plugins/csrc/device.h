// The few CUDA driver calls the plugin needs, resolved from libcuda.so.1 when first used: the plugin file depends on no
// CUDA runtime version and loads where there is no driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace dvdquant::plugin {

using Stream = void*;  // cudaStream_t = CUstream

// Device of the calling thread's context; device 0 where the thread has none yet, as the CUDA runtime would choose.
int current_device();
// major * 10 + minor.
int32_t sm_of(int device);
bool is_capturing(Stream stream);
void synchronize(Stream stream);
// Asynchronous on stream; host memory must stay valid until it is synchronized.
void copy_to_host(void* host, void const* device, size_t bytes, Stream stream);
void copy_to_device(void* device, void const* host, size_t bytes, Stream stream);

// Device memory of the current context; freed on destruction, which waits for work that uses it.
class DeviceBuffer {
 public:
  // what: named in the message when memory runs out.
  DeviceBuffer(size_t bytes, std::string const& what);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer const&) = delete;
  DeviceBuffer& operator=(DeviceBuffer const&) = delete;
  void* data() const noexcept { return data_; }

 private:
  void* data_ = nullptr;
};

// While it lives, allocations and frees of this thread do not break a stream capture of another thread.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();
  RelaxedCapture(RelaxedCapture const&) = delete;
  RelaxedCapture& operator=(RelaxedCapture const&) = delete;

 private:
  int mode_;
};

}  // namespace dvdquant::plugin
