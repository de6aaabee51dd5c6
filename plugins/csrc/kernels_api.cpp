#include "kernels_api.h"

#include <string>

#include "messages.h"

#ifndef DVDQUANT_PLUGIN_STATIC_KERNELS
#include <dlfcn.h>

#include <cstdlib>
#include <vector>
#endif

namespace dvdquant::plugin {
namespace {

#ifdef DVDQUANT_PLUGIN_STATIC_KERNELS

Kernels load() {
  Kernels table;
#define DVDQ_LINK(name) table.name = &dvdq_##name;
  DVDQ_PLUGIN_CALLS(DVDQ_LINK)
#undef DVDQ_LINK
  return table;
}

#else

constexpr char kName[] = "libdvdquant_kernels.so";

std::vector<std::string> places() {
  // A wrong path in the variable must not silently give other kernels.
  if (char const* chosen = std::getenv("DVDQUANT_KERNELS"); chosen != nullptr && *chosen != '\0') return {chosen};
  std::vector<std::string> found;
  Dl_info self{};
  if (dladdr(kName, &self) != 0 && self.dli_fname != nullptr) {
    std::string const file = self.dli_fname;
    size_t const slash = file.rfind('/');
    found.push_back((slash == std::string::npos ? "./" : file.substr(0, slash + 1)) + kName);
  }
  found.emplace_back(kName);
  return found;
}

template <typename Function>
void resolve(void* library, std::string const& place, char const* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) {
    throw Failure(DVDQ_UNSUPPORTED, place + " has no " + name, "", "build the kernels of this release: make kernels");
  }
}

Kernels load() {
  std::string reasons;
  for (std::string const& place : places()) {
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      char const* reason = dlerror();
      reasons += std::string(reasons.empty() ? "" : "; ") + (reason != nullptr ? reason : place.c_str());
      continue;
    }
    Kernels table;
    resolve(library, place, "dvdq_last_error", table.last_error);
    resolve(library, place, "dvdq_abi_version", table.abi_version);
    // First, so that a library of another release is told by its version and not by what it lacks.
    if (table.abi_version() != DVDQ_ABI_VERSION) return table;
#define DVDQ_RESOLVE(name) resolve(library, place, "dvdq_" #name, table.name);
    DVDQ_PLUGIN_CALLS(DVDQ_RESOLVE)
#undef DVDQ_RESOLVE
    return table;
  }
  throw Failure(DVDQ_UNSUPPORTED, "the CUDA kernels (libdvdquant_kernels.so) cannot be loaded: " + reasons, "",
                "build them (make kernels), and put the file beside the plugin or name it in DVDQUANT_KERNELS");
}

#endif

}  // namespace

Kernels const& kernels() {
  static Kernels const table = [] {
    Kernels fresh = load();
    if (int32_t const version = fresh.abi_version(); version != DVDQ_ABI_VERSION) {
      throw Failure(DVDQ_UNSUPPORTED, "the kernels have ABI version " + std::to_string(version),
                    "this plugin speaks version " + std::to_string(DVDQ_ABI_VERSION),
                    "build the kernels and the plugin from the same release");
    }
    return fresh;
  }();
  return table;
}

void check_kernels(dvdq_status status, char const* doing) {
  if (status != DVDQ_OK) throw Failure(status, std::string(doing) + ": " + kernels().last_error());
}

}  // namespace dvdquant::plugin
