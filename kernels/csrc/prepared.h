// The prepared weight: one buffer per layer and device, parts in this order, each starting at a multiple of 256 bytes.
//
//   codes       [n, k / 2] packed int4 (S4 paths, as in the files), [n, k] int8 (S8 paths), [n, k] e4m3 (E4M3_GROUP)
//   row_scale   fp32 [n]
//   row_zero    fp32 [n]; the zero-point z where y = row_scale * (acc - z * sum), 0 where the codes carry it
//   bias        fp32 [n]; zeros where the layer has none
//   group_scale uint8 [n, weight_groups], S4_GROUP with weight_groups > 1 only; 255 = 1
//   group_zero  uint8 [n, weight_groups], S4_GROUP with weight_groups > 1 and float_zero_point only; z = byte / 16 - 8
//
// Rows on 8-bit paths, with d = c - z, reach = max |d| of any code c in -8..7, step = scale * (group_scale / 255), all fp32:
//   weight_groups == 1, z an integer, reach <= limit         code d,  row_scale step               exact
//   weight_groups == 1, 2z an integer, 2 * reach <= limit    code 2d, row_scale step / 2           exact
//   any other row, int8    code clamp(rint(W / D), -127, 127), row_scale D = max(max|W|, 2^-100) / 127, W = d * step
//   any other row, e4m3    code e4m3(2d * r), row_scale step / 2 / r, r = 1 if 2 * reach <= 448, else 448 / (2 * reach)
// limit = 127 for int8 and 16 for e4m3 (integers up to 16 are exact there). With groups, z and step are each group's own.
//
// A weight that stays packed is the codes as the files hold them, with weight_groups > 1 the group scales and byte zero-points as
// well, and its rows, the same on every SM, parts at multiples of 256 bytes:
//
//   row_scale, row_zero, bias   as S4_GROUP has them above
//   int8_scale  fp32 [n]: row_scale of the S8 forms, which asks for the largest weight of a row and so for all of its codes
#pragma once

#include <stdint.h>

#include "dvdquant/kernels.h"

namespace dvdq {

constexpr int64_t kAlignment = 256;

constexpr int64_t align_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Byte offsets into the prepared buffer; -1 for a part that the path does not have.
struct PreparedLayout {
  int64_t row_scale, row_zero, bias, group_scale, group_zero, bytes;
};

inline bool is_s4(int32_t path) { return path == DVDQ_PATH_S4_TOKEN || path == DVDQ_PATH_S4_GROUP; }

inline PreparedLayout prepared_layout(const dvdq_layer& layer, int32_t path) {
  PreparedLayout at{};
  const bool grouped = path == DVDQ_PATH_S4_GROUP && layer.weight_groups > 1;
  const int64_t per_row = align_up(layer.n * 4), per_group = align_up(layer.n * layer.weight_groups);
  at.row_scale = align_up(layer.n * (is_s4(path) ? layer.k / 2 : layer.k));
  at.row_zero = at.row_scale + per_row;
  at.bias = at.row_zero + per_row;
  at.bytes = at.bias + per_row;
  at.group_scale = grouped ? at.bytes : -1;
  at.bytes += grouped ? per_group : 0;
  at.group_zero = grouped && layer.float_zero_point ? at.bytes : -1;
  at.bytes += grouped && layer.float_zero_point ? per_group : 0;
  return at;
}

// Byte offsets into the rows of a weight that stays packed.
struct RowsLayout {
  int64_t row_scale, row_zero, bias, int8_scale, bytes;
};

inline RowsLayout rows_layout(const dvdq_layer& layer) {
  const int64_t per_row = align_up(layer.n * 4);
  return {0, per_row, 2 * per_row, 3 * per_row, 4 * per_row};
}

// What a packed weight has beside codes and rows; null where the layer has none.
struct PackedGroups {
  const uint8_t *group_scale, *zero;
};

inline PackedGroups packed_groups(const dvdq_layer& layer, const dvdq_weight& weight) {
  if (layer.weight_groups == 1) return {nullptr, nullptr};
  return {static_cast<const uint8_t*>(weight.group_scale), layer.float_zero_point ? static_cast<const uint8_t*>(weight.zero) : nullptr};
}

}  // namespace dvdq
