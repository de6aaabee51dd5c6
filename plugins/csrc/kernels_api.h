// The kernels' C ABI as a table: linked into this file, or taken from libdvdquant_kernels.so.
#pragma once

#include "dvdquant/kernels.h"

namespace dvdquant::plugin {

struct Kernels {
  decltype(&dvdq_last_error) last_error = nullptr;
  decltype(&dvdq_abi_version) abi_version = nullptr;
  decltype(&dvdq_path_name) path_name = nullptr;
  decltype(&dvdq_plan_layer) plan_layer = nullptr;
  decltype(&dvdq_workspace_bytes) workspace_bytes = nullptr;
  decltype(&dvdq_prepare_weight) prepare_weight = nullptr;
  decltype(&dvdq_quant_linear) quant_linear = nullptr;
  decltype(&dvdq_rows_bytes) rows_bytes = nullptr;
  decltype(&dvdq_make_rows) make_rows = nullptr;
  decltype(&dvdq_packed_workspace_bytes) packed_workspace_bytes = nullptr;
  decltype(&dvdq_packed_linear) packed_linear = nullptr;
  decltype(&dvdq_fused_linear) fused_linear = nullptr;
  decltype(&dvdq_packed_fused_linear) packed_fused_linear = nullptr;
};

// Throws Failure naming every place that was searched when the library is missing, or of another ABI version.
// The library is taken from $DVDQUANT_KERNELS (a file), else from beside this plugin, else by the loader's own search.
Kernels const& kernels();

// Throws Failure with the kernels' own words unless status is DVDQ_OK.
void check_kernels(dvdq_status status, char const* doing);

}  // namespace dvdquant::plugin
