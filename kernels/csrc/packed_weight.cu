// Weights that stay packed: their rows, made once, and their expansion to 8 bits before a product. One block per output row.
//
// A row has 16 codes, and a group of it one step and one zero-point: 16 results a group, computed once and looked up. So the
// expansion reads half a byte a weight, writes one, and its divisions stay few where groups are wide.
#include "packed_weight.h"

#include "device.cuh"
#include "error.h"
#include "prepared.h"
#include "weight_rules.cuh"

namespace dvdq {
namespace {

constexpr int kThreads = 128;
// Groups whose tables lie in shared memory at a time, 16 bytes each.
constexpr int kTables = 256;
// Words of eight codes that a thread loads before it stores the first: what keeps the memory busy.
constexpr int kBatch = 4;

struct RowsParams {
  StoredWeight stored;
  const float* bias;  // may be null
  float *to_scale, *to_zero, *to_bias, *to_int8_scale;
  bool byte_zeros;  // zero-points stay with the groups
};

__global__ void __launch_bounds__(kThreads) make_rows_kernel(const RowsParams p) {
  const int64_t row = blockIdx.x;
  const StoredWeight& w = p.stored;
  const RowRule rule = choose_rule<kThreads>(w, false, row, reinterpret_cast<uint32_t*>(dynamic_shared()));
  if (threadIdx.x == 0) {
    p.to_scale[row] = w.groups == 1 ? step_of(w, row, 0) : w.scale[row];
    p.to_zero[row] = p.byte_zeros ? 0.0f : zero_of(w, row, 0);
    p.to_bias[row] = p.bias == nullptr ? 0.0f : p.bias[row];
    p.to_int8_scale[row] = rule.row_scale;
  }
}

struct ExpandParams {
  const unsigned char* packed;  // [n, k / 2]
  const float *scale, *zero, *bias, *int8_scale;
  const unsigned char *group_scale, *group_zero;  // null where the layer has none
  unsigned char* codes;
  float *to_scale, *to_zero, *to_bias;
  int k, groups, width, shift;  // width = k / groups = 1 << shift; shift < 0 where it is no power of two
  bool e4m3;
};

// Bytes of a table of 16 at the eight nibbles of `packed`: codes 0..3 in the first word.
DVDQ_DEVICE uint2 look_up(const uint4& table, uint32_t packed) {
  const uint32_t low = packed & 0x77777777u;                        // place in a half of the table
  const uint32_t half = 0x32103210u | ((packed >> 1) & 0x44444444u);  // which half, for each byte
  const uint32_t first = byte_permute(byte_permute(table.x, table.y, low), byte_permute(table.z, table.w, low), half);
  const uint32_t second =
      byte_permute(byte_permute(table.x, table.y, low >> 16), byte_permute(table.z, table.w, low >> 16), half >> 16);
  return make_uint2(first, second);
}

__global__ void __launch_bounds__(kThreads) expand_packed_kernel(const ExpandParams p) {
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  unsigned char* const tables = dynamic_shared();
  const float row_step = p.scale[row], row_zero = p.zero[row], int8_scale = p.int8_scale[row];
  RowRule rule;
  if (p.groups > 1 || !rule_of_zero(p.e4m3, row_zero, row_step, &rule)) {
    rule = {true, 1.0f, 1.0f, int8_scale, int8_scale};
  }
  const unsigned char* const from = p.packed + row * (p.k / 2);
  unsigned char* const to = p.codes + row * p.k;
  for (int group = 0; group < p.groups; group += kTables) {
    const int count = p.groups - group < kTables ? p.groups - group : kTables;
    // 1. What each of the 16 codes becomes in each group.
#pragma unroll 1
    for (int entry = thread; entry < 16 * count; entry += kThreads) {
      const int64_t cell = row * p.groups + group + entry / 16;
      const float step = p.groups > 1 ? scaled_step(row_step, p.group_scale[cell]) : row_step;
      const float zero = p.group_zero != nullptr ? zero_of_byte(p.group_zero[cell]) : row_zero;
      tables[entry] = static_cast<unsigned char>(expand(rule, p.e4m3, zero, step, ((entry & 15) ^ 8) - 8));
    }
    barrier();
    // 2. The codes of these groups.
    const int start = group * p.width, end = (group + count) * p.width;
    for (int first = start + 8 * thread; first < end; first += 8 * kThreads * kBatch) {
      uint32_t words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int k = first + i * 8 * kThreads;
        if (k < end) words[i] = load_once_4(from + k / 2);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int k = first + i * 8 * kThreads;
        if (k >= end) break;
        const int place = (p.shift >= 0 ? k >> p.shift : k / p.width) - group;
        store_8(to + k, look_up(load_16(tables + 16 * place), words[i]));
      }
    }
    barrier();
  }
  if (thread == 0) {
    p.to_scale[row] = rule.row_scale;
    p.to_zero[row] = 0.0f;
    p.to_bias[row] = p.bias[row];
  }
}

float* floats(void* base, int64_t offset) { return reinterpret_cast<float*>(static_cast<unsigned char*>(base) + offset); }

}  // namespace

dvdq_status make_rows(const dvdq_layer& layer, const dvdq_weight& weight, void* rows, cudaStream_t stream) {
  const RowsLayout at = rows_layout(layer);
  RowsParams p{};
  p.stored = stored_weight(layer, weight);
  p.bias = weight.bias;
  p.to_scale = floats(rows, at.row_scale);
  p.to_zero = floats(rows, at.row_zero);
  p.to_bias = floats(rows, at.bias);
  p.to_int8_scale = floats(rows, at.int8_scale);
  p.byte_zeros = packed_groups(layer, weight).zero != nullptr;
  return check_cuda(launch(make_rows_kernel, dim3(static_cast<unsigned>(layer.n)), dim3(kThreads), 16, stream, p), "make_rows");
}

dvdq_status expand_packed(const dvdq_layer& layer, const dvdq_plan& plan, const dvdq_weight& weight, const void* rows,
                          void* prepared, cudaStream_t stream) {
  const RowsLayout at = rows_layout(layer);
  const PreparedLayout to = prepared_layout(layer, plan.path);
  const unsigned char* const base = static_cast<const unsigned char*>(rows);
  ExpandParams p{};
  p.packed = static_cast<const unsigned char*>(weight.codes);
  p.scale = reinterpret_cast<const float*>(base + at.row_scale);
  p.zero = reinterpret_cast<const float*>(base + at.row_zero);
  p.bias = reinterpret_cast<const float*>(base + at.bias);
  p.int8_scale = reinterpret_cast<const float*>(base + at.int8_scale);
  const PackedGroups groups = packed_groups(layer, weight);
  p.group_scale = groups.group_scale;
  p.group_zero = groups.zero;
  p.codes = static_cast<unsigned char*>(prepared);
  p.to_scale = floats(prepared, to.row_scale);
  p.to_zero = floats(prepared, to.row_zero);
  p.to_bias = floats(prepared, to.bias);
  p.k = static_cast<int>(layer.k);
  p.groups = static_cast<int>(layer.weight_groups);
  p.width = p.k / p.groups;
  p.shift = -1;
  for (int shift = 0; shift < 31; ++shift) {
    if (p.width == 1 << shift) p.shift = shift;
  }
  if (p.groups == 1) p.shift = 31;  // a row has one table
  p.e4m3 = plan.path == DVDQ_PATH_E4M3_GROUP;
  const size_t shared = 16 * static_cast<size_t>(p.groups < kTables ? p.groups : kTables);
  const dim3 grid(static_cast<unsigned>(layer.n));
  return check_cuda(launch(expand_packed_kernel, grid, dim3(kThreads), shared, stream, p), "expand_packed");
}

}  // namespace dvdq
