// Launchers for weights that stay packed; arguments are checked by the caller (packed_api.cpp).
#pragma once

#include "dvdquant/kernels.h"
#include "runtime.h"

namespace dvdq {

// Stored weight -> its rows (RowsLayout), once per layer.
dvdq_status make_rows(const dvdq_layer& layer, const dvdq_weight& weight, void* rows, cudaStream_t stream);

// Codes, group scales and byte zero-points of `weight`, and rows -> the prepared weight of an 8-bit path, byte for byte what prepare_weight makes but for padding.
dvdq_status expand_packed(const dvdq_layer& layer, const dvdq_plan& plan, const dvdq_weight& weight, const void* rows,
                          void* prepared, cudaStream_t stream);

}  // namespace dvdq
