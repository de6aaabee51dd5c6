// The kernels' C ABI on host memory, in double precision and straight from the definition in dvdquant/ops/quant_linear.py:
// the judge of what the plugin passes on (pointers, sizes, layouts), not of the kernels.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "dvdquant/kernels.h"

namespace {

#if defined(__aarch64__)
using Half = __fp16;  // g++ before 13 has _Float16 in C++ on x86 alone
#else
using Half = _Float16;
#endif

thread_local std::string t_error = "no error";

dvdq_status fail(dvdq_status status, std::string const& text) {
  t_error = text;
  return status;
}

double widen(uint16_t bits, int32_t dtype) {
  if (dtype == DVDQ_FP16) {
    Half half;
    std::memcpy(&half, &bits, 2);
    return static_cast<double>(half);
  }
  uint32_t const wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t narrow(double value, int32_t dtype) {
  uint16_t bits;
  if (dtype == DVDQ_FP16) {
    Half const half = static_cast<Half>(value);
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  float const single = static_cast<float>(value);
  uint32_t wide;
  std::memcpy(&wide, &single, 4);
  if (std::isnan(single)) return 0x7fc0;
  wide += 0x7fff + ((wide >> 16) & 1);
  return static_cast<uint16_t>(wide >> 16);
}

// Prepared: the dequantized weight [N, K] and the bias [N], in double.
int64_t prepared_bytes(dvdq_layer const& layer) { return static_cast<int64_t>(sizeof(double)) * layer.n * (layer.k + 1); }

// Rows of a packed weight: scale, zero-point and bias, in double. A row of one group has its group scale and its zero-point there;
// what several groups have is read from the weight.
int64_t rows_bytes(dvdq_layer const& layer) { return static_cast<int64_t>(sizeof(double)) * layer.n * 3; }

double zero_of_byte(void const* zero, int64_t cell) { return static_cast<uint8_t const*>(zero)[cell] / 16.0 - 8.0; }

void expand(dvdq_layer const& layer, dvdq_weight const& weight, double const* rows, double* out) {
  int64_t const width = layer.k / layer.weight_groups;
  bool const grouped = layer.weight_groups > 1;
  auto const* codes = static_cast<uint8_t const*>(weight.codes);
  for (int64_t n = 0; n < layer.n; ++n) {
    for (int64_t k = 0; k < layer.k; ++k) {
      int64_t const cell = n * layer.weight_groups + k / width;
      int const nibble = (codes[(n * layer.k + k) / 2] >> (k % 2 ? 4 : 0)) & 15;
      double const group_scale = grouped ? static_cast<uint8_t const*>(weight.group_scale)[cell] / 255.0 : 1.0;
      double const zero = grouped && layer.float_zero_point ? zero_of_byte(weight.zero, cell) : rows[layer.n + n];
      out[n * layer.k + k] = ((nibble ^ 8) - 8 - zero) * rows[n] * group_scale;
    }
    out[layer.n * layer.k + n] = rows[2 * layer.n + n];
  }
}

void rotate(dvdq_layer const& layer, float const* outer, std::vector<double>& row) {
  int64_t const b = layer.block, p = layer.outer, span = b * p;
  std::vector<double> mixed(static_cast<size_t>(span));
  double const size = 1.0 / std::sqrt(static_cast<double>(b));
  for (int64_t start = 0; start < layer.k; start += span) {
    for (int64_t i = 0; i < p; ++i) {
      for (int64_t j = 0; j < b; ++j) {
        double sum = 0;
        for (int64_t t = 0; t < b; ++t) sum += row[start + i * b + t] * (__builtin_parityll(t & j) ? -size : size);
        mixed[i * b + j] = sum;
      }
    }
    for (int64_t i = 0; i < p; ++i) {
      for (int64_t j = 0; j < b; ++j) {
        double sum = p == 1 ? mixed[j] : 0;
        for (int64_t t = 0; p > 1 && t < p; ++t) sum += outer[t * p + i] * mixed[t * b + j];
        row[start + i * b + j] = sum;
      }
    }
  }
}

void quantize(dvdq_layer const& layer, std::vector<double>& row) {
  int64_t const group = layer.act_group ? layer.act_group : layer.k;
  double const qmax = std::ldexp(1.0, layer.act_bits - 1) - 1;
  for (int64_t start = 0; start < layer.k; start += group) {
    double amax = std::ldexp(1.0, -100);
    for (int64_t k = start; k < start + group; ++k) amax = std::max(amax, std::fabs(row[k]));
    for (int64_t k = start; k < start + group; ++k) {
      double const code = std::nearbyint(row[k] * (qmax / amax));
      row[k] = std::min(std::max(code, -qmax), qmax) * (amax / qmax);
    }
  }
}

// What a prologue makes of x, [m, k] in 16 bits.
std::vector<uint16_t> apply_prologue(dvdq_layer const* layer, dvdq_prologue const* prologue, void const* x, void const* pre_quant,
                                     int64_t m) {
  dvdq_prologue const& p = *prologue;
  auto const read = [&](void const* from, int64_t i) { return widen(static_cast<uint16_t const*>(from)[i], layer->dtype); };
  std::vector<uint16_t> inputs(static_cast<size_t>(m * layer->k));
  std::vector<double> row(static_cast<size_t>(layer->k));
  for (int64_t token = 0; token < m; ++token) {
    int64_t const start = token * layer->k;
    int64_t const gates = p.gate_tokens ? token / p.gate_tokens * p.gate_stride : 0;
    int64_t const rows = p.modulate_tokens ? token / p.modulate_tokens * p.modulate_stride : 0;
    double mean = 0, square = 0;
    for (int64_t k = 0; k < layer->k; ++k) {
      row[k] = read(x, start + k);
      if (p.y != nullptr) {
        uint16_t const sum = narrow(row[k] + (p.gate ? p.gate[gates + k] : 1.0) * read(p.y, start + k), layer->dtype);
        if (p.hidden != nullptr) static_cast<uint16_t*>(p.hidden)[start + k] = sum;
        row[k] = widen(sum, layer->dtype);
      }
      mean += row[k] / layer->k;
    }
    if (p.norm != DVDQ_NORM_LAYER) mean = 0;
    for (int64_t k = 0; k < layer->k; ++k) square += (row[k] - mean) * (row[k] - mean) / layer->k;
    double const inverse = p.norm == DVDQ_NORM_NONE ? 1 : 1 / std::sqrt(square + p.eps);
    for (int64_t k = 0; k < layer->k; ++k) {
      double value = (row[k] - mean) * inverse * (p.multiplier ? p.multiplier[rows + k] : 1.0) +
                     (p.addend ? p.addend[rows + k] : 0.0);
      if (p.gelu) value = row[k] / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (row[k] + 0.044715 * std::pow(row[k], 3))));
      uint16_t z = narrow(value, layer->dtype);
      if (pre_quant != nullptr) {
        int64_t const at = k / 8 * 16 + k % 8;
        z = narrow(widen(z, layer->dtype) * read(pre_quant, at) + read(pre_quant, at + 8), layer->dtype);
      }
      inputs[start + k] = z;
    }
  }
  return inputs;
}

}  // namespace

extern "C" {

DVDQ_API const char* dvdq_last_error(void) { return t_error.c_str(); }
DVDQ_API int32_t dvdq_abi_version(void) { return DVDQ_ABI_VERSION; }
DVDQ_API const char* dvdq_path_name(int32_t path) { return path == DVDQ_PATH_S8_WGMMA ? "S8_WGMMA" : "host"; }

DVDQ_API dvdq_status dvdq_plan_layer(const dvdq_layer* layer, int32_t sm, dvdq_plan* plan) {
  if (sm < 80) return fail(DVDQ_UNSUPPORTED, "SM " + std::to_string(sm) + " has no kernels; available: 80 and newer");
  if (layer->k % 32 != 0) return fail(DVDQ_BAD_ARGUMENT, "K is no multiple of 32");
  *plan = {};
  plan->path = layer->act_group ? DVDQ_PATH_S8_GROUP
               : sm == 90       ? DVDQ_PATH_S8_WGMMA
               : layer->act_bits == 4 ? DVDQ_PATH_S4_TOKEN : DVDQ_PATH_S8_TOKEN;
  plan->codes = plan->path == DVDQ_PATH_S4_TOKEN ? DVDQ_CODES_S4 : DVDQ_CODES_S8;
  plan->scale_rows = layer->act_group ? static_cast<int32_t>(layer->k / layer->act_group) : 1;
  plan->prepared_bytes = prepared_bytes(*layer);
  return DVDQ_OK;
}

DVDQ_API dvdq_status dvdq_workspace_bytes(const dvdq_layer* layer, int32_t sm, int64_t m, int64_t* bytes) {
  dvdq_plan plan;
  if (dvdq_status const status = dvdq_plan_layer(layer, sm, &plan); status != DVDQ_OK) return status;
  *bytes = m * layer->k * static_cast<int64_t>(sizeof(double));
  return DVDQ_OK;
}

DVDQ_API dvdq_status dvdq_prepare_weight(const dvdq_layer* layer, int32_t, const dvdq_weight* weight, void* prepared,
                                         int64_t bytes, dvdq_stream) {
  if (bytes < prepared_bytes(*layer)) return fail(DVDQ_WORKSPACE, "prepared buffer too small");
  if (!weight->codes || !weight->scale || !weight->group_scale || !weight->zero) return fail(DVDQ_BAD_ARGUMENT, "null");
  auto* out = static_cast<double*>(prepared);
  auto const* codes = static_cast<uint8_t const*>(weight->codes);
  auto const* group_scale = static_cast<uint8_t const*>(weight->group_scale);
  int64_t const width = layer->k / layer->weight_groups;
  for (int64_t n = 0; n < layer->n; ++n) {
    for (int64_t k = 0; k < layer->k; ++k) {
      int64_t const cell = n * layer->weight_groups + k / width;
      int const nibble = (codes[(n * layer->k + k) / 2] >> (k % 2 ? 4 : 0)) & 15;
      double const zero =
          layer->float_zero_point ? zero_of_byte(weight->zero, cell) : static_cast<float const*>(weight->zero)[n];
      out[n * layer->k + k] = ((nibble ^ 8) - 8 - zero) * weight->scale[n] * (group_scale[cell] / 255.0);
    }
    out[layer->n * layer->k + n] = weight->bias ? weight->bias[n] : 0;
  }
  return DVDQ_OK;
}

DVDQ_API dvdq_status dvdq_quant_linear(const dvdq_layer* layer, int32_t sm, const void* x, const void* pre_quant,
                                       const float* outer, const void* prepared, void* y, int64_t m, void* workspace,
                                       int64_t bytes, dvdq_stream stream) {
  int64_t needed = 0;
  if (pre_quant != nullptr) return fail(DVDQ_BAD_ARGUMENT, "the plugin passes no pre_quant");
  if (dvdq_status const status = dvdq_workspace_bytes(layer, sm, m, &needed); status != DVDQ_OK) return status;
  if (bytes < needed || workspace == nullptr) return fail(DVDQ_WORKSPACE, "workspace too small");
  if (layer->outer > 1 && outer == nullptr) return fail(DVDQ_BAD_ARGUMENT, "outer is null");
  (void)stream;
  auto const* weight = static_cast<double const*>(prepared);
  for (int64_t row = 0; row < m; ++row) {
    std::vector<double> values(static_cast<size_t>(layer->k));
    for (int64_t k = 0; k < layer->k; ++k) {
      values[k] = widen(static_cast<uint16_t const*>(x)[row * layer->k + k], layer->dtype);
    }
    rotate(*layer, outer, values);
    quantize(*layer, values);
    // Through the workspace, whose size and address are the caller's to get right.
    auto* codes = static_cast<double*>(workspace) + row * layer->k;
    std::copy(values.begin(), values.end(), codes);
    for (int64_t n = 0; n < layer->n; ++n) {
      double sum = weight[layer->n * layer->k + n];
      for (int64_t k = 0; k < layer->k; ++k) sum += codes[k] * weight[n * layer->k + k];
      static_cast<uint16_t*>(y)[row * layer->n + n] = narrow(sum, layer->dtype);
    }
  }
  return DVDQ_OK;
}

DVDQ_API dvdq_status dvdq_rows_bytes(const dvdq_layer* layer, int32_t sm, int64_t* bytes) {
  dvdq_plan plan;
  if (dvdq_status const status = dvdq_plan_layer(layer, sm, &plan); status != DVDQ_OK) return status;
  *bytes = rows_bytes(*layer);
  return DVDQ_OK;
}

DVDQ_API dvdq_status dvdq_make_rows(const dvdq_layer* layer, int32_t, const dvdq_weight* weight, void* rows, int64_t bytes,
                                    dvdq_stream) {
  if (bytes < rows_bytes(*layer)) return fail(DVDQ_WORKSPACE, "buffer for rows too small");
  if (!weight->codes || !weight->scale || !weight->group_scale || !weight->zero) return fail(DVDQ_BAD_ARGUMENT, "null");
  auto* out = static_cast<double*>(rows);
  auto const* group_scale = static_cast<uint8_t const*>(weight->group_scale);
  bool const grouped = layer->weight_groups > 1;
  for (int64_t n = 0; n < layer->n; ++n) {
    out[n] = weight->scale[n] * (grouped ? 1.0 : group_scale[n] / 255.0);
    out[layer->n + n] = !layer->float_zero_point ? static_cast<float const*>(weight->zero)[n]
                        : grouped                ? 0.0
                                                 : zero_of_byte(weight->zero, n);
    out[2 * layer->n + n] = weight->bias ? weight->bias[n] : 0;
  }
  return DVDQ_OK;
}

DVDQ_API dvdq_status dvdq_fused_linear(const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                                       const void* pre_quant, const void* prepared, void* y, int64_t m, void* workspace,
                                       int64_t bytes, dvdq_stream stream) {
  if (layer->outer != 1) return fail(DVDQ_UNSUPPORTED, "no outer factor");
  std::vector<uint16_t> const z = apply_prologue(layer, prologue, x, pre_quant, m);
  return dvdq_quant_linear(layer, sm, z.data(), nullptr, nullptr, prepared, y, m, workspace, bytes, stream);
}

DVDQ_API dvdq_status dvdq_packed_workspace_bytes(const dvdq_layer* layer, int32_t sm, int64_t m, int64_t* bytes) {
  dvdq_plan plan;
  if (dvdq_status const status = dvdq_plan_layer(layer, sm, &plan); status != DVDQ_OK) return status;
  int64_t before = 0;
  dvdq_workspace_bytes(layer, sm, m, &before);
  *bytes = before + (plan.codes == DVDQ_CODES_S4 ? 0 : plan.prepared_bytes);
  return DVDQ_OK;
}

DVDQ_API dvdq_status dvdq_packed_linear(const dvdq_layer* layer, int32_t sm, const void* x, const void* pre_quant,
                                        const float* outer, const dvdq_weight* weight, const void* rows, void* y, int64_t m,
                                        void* workspace, int64_t bytes, dvdq_stream stream) {
  int64_t before = 0, needed = 0;
  if (dvdq_status const status = dvdq_packed_workspace_bytes(layer, sm, m, &needed); status != DVDQ_OK) return status;
  dvdq_workspace_bytes(layer, sm, m, &before);
  if (bytes < needed || workspace == nullptr) return fail(DVDQ_WORKSPACE, "workspace too small");
  bool const grouped = layer->weight_groups > 1;
  if (weight == nullptr || weight->codes == nullptr || rows == nullptr || (grouped && weight->group_scale == nullptr) ||
      (grouped && layer->float_zero_point && weight->zero == nullptr)) {
    return fail(DVDQ_BAD_ARGUMENT, "the packed weight is null");
  }
  // In the workspace, as the kernels do; paths of 4 bits have none there.
  std::vector<double> own(needed == before ? static_cast<size_t>(layer->n * (layer->k + 1)) : 0);
  auto* const expanded = own.empty() ? reinterpret_cast<double*>(static_cast<char*>(workspace) + before) : own.data();
  expand(*layer, *weight, static_cast<double const*>(rows), expanded);
  return dvdq_quant_linear(layer, sm, x, pre_quant, outer, expanded, y, m, workspace, before, stream);
}

DVDQ_API dvdq_status dvdq_packed_fused_linear(const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                                              const void* pre_quant, const dvdq_weight* weight, const void* rows, void* y,
                                              int64_t m, void* workspace, int64_t bytes, dvdq_stream stream) {
  if (layer->outer != 1) return fail(DVDQ_UNSUPPORTED, "no outer factor");
  std::vector<uint16_t> const z = apply_prologue(layer, prologue, x, pre_quant, m);
  return dvdq_packed_linear(layer, sm, z.data(), nullptr, nullptr, weight, rows, y, m, workspace, bytes, stream);
}

}  // extern "C"
