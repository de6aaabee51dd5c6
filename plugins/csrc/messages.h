// Failures in words, through the logger that TensorRT hands to the library.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace dvdquant::plugin {

// What went wrong, what there was instead and what to do; thrown inside the library only.
class Failure : public std::runtime_error {
 public:
  // code: returned to TensorRT, not 0.
  Failure(int32_t code, std::string const& what, std::string const& available = {}, std::string const& fix = {});
  int32_t code() const noexcept { return code_; }

 private:
  int32_t code_;
};

using Severity = nvinfer1::ILogger::Severity;

// nullptr: back to standard error, which is also used until a finder is set.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;
void log(Severity severity, std::string const& text) noexcept;

// Runs body and returns 0; logs what it throws and returns its code (DVDQ_CUDA_ERROR + 1 for anything unforeseen).
template <typename Body>
int32_t guarded(char const* where, Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (Failure const& failure) {
    log(Severity::kERROR, std::string("dvdquant QuantLinear, ") + where + ": " + failure.what());
    return failure.code();
  } catch (std::exception const& error) {
    log(Severity::kINTERNAL_ERROR, std::string("dvdquant QuantLinear, ") + where + ": " + error.what());
    return 5;
  }
}

}  // namespace dvdquant::plugin
