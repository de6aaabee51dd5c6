// Device memory, streams and graphs for the harness, by the CUDA driver (or host_cuda.cpp's).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace harness {

using Stream = void*;

// The driver with a current context on device 0. Throws std::runtime_error with the call that failed.
class Device {
 public:
  static Device& get();

  // Allocations that the plugin and the harness hold; -1 on a real GPU, which cannot say.
  int live_allocations() const;
  long long live_bytes() const;
  Stream new_stream() const;
  void delete_stream(Stream stream) const;
  void synchronize(Stream stream) const;
  void begin_capture(Stream stream) const;
  // Ends the capture; the graph is launched on stream when launch is set.
  void end_capture(Stream stream, bool launch) const;

 private:
  Device();
};

// Freed on destruction.
class Memory {
 public:
  explicit Memory(size_t bytes);
  explicit Memory(std::vector<char> const& contents);
  ~Memory();
  Memory(Memory const&) = delete;
  Memory& operator=(Memory const&) = delete;
  void* data() const { return reinterpret_cast<void*>(address_); }
  void fill(unsigned char value) const;
  std::vector<char> read() const;

 private:
  unsigned long long address_ = 0;
  size_t bytes_;
};

}  // namespace harness
