// The kernels' C ABI as a table: linked into this file, or taken from libdvdquant_kernels.so.
#pragma once

#include "dvdquant/kernels.h"

namespace dvdquant::plugin {

// The functions that the plugin calls. What links them and what looks them up both read this list, so that neither
// lacks one. The first two tell a library of another release apart.
#define DVDQ_PLUGIN_CALLS(X)                                                                               \
  X(last_error) X(abi_version) X(path_name) X(plan_layer) X(workspace_bytes) X(prepare_weight)              \
  X(quant_linear) X(rows_bytes) X(make_rows) X(packed_workspace_bytes) X(packed_linear) X(fused_linear)     \
  X(packed_fused_linear)

struct Kernels {
#define DVDQ_FIELD(name) decltype(&dvdq_##name) name = nullptr;
  DVDQ_PLUGIN_CALLS(DVDQ_FIELD)
#undef DVDQ_FIELD
};

// Throws Failure naming every place that was searched when the library is missing, or of another ABI version.
// The library is taken from $DVDQUANT_KERNELS (a file), else from beside this plugin, else by the loader's own search.
Kernels const& kernels();

// Throws Failure with the kernels' own words unless status is DVDQ_OK.
void check_kernels(dvdq_status status, char const* doing);

}  // namespace dvdquant::plugin
