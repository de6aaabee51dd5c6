#include "messages.h"

#include <atomic>
#include <cstdio>

namespace dvdquant::plugin {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> g_finder{nullptr};

std::string joined(std::string const& what, std::string const& available, std::string const& fix) {
  std::string text = what;
  if (!available.empty()) text += "\n  available: " + available;
  if (!fix.empty()) text += "\n  fix: " + fix;
  return text;
}

}  // namespace

Failure::Failure(int32_t code, std::string const& what, std::string const& available, std::string const& fix)
    : std::runtime_error(joined(what, available, fix)), code_(code) {}

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { g_finder.store(finder); }

void log(Severity severity, std::string const& text) noexcept {
  nvinfer1::ILogger* logger = nullptr;
  try {
    // findLogger is the one call of this interface that is not noexcept.
    if (auto* finder = g_finder.load()) logger = finder->findLogger();
  } catch (...) {
    logger = nullptr;
  }
  if (logger != nullptr) {
    logger->log(severity, text.c_str());
  } else if (severity <= Severity::kWARNING) {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
}

}  // namespace dvdquant::plugin
