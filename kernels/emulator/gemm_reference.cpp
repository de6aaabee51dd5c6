// Plain loops in place of the per-token and e4m3 launchers, whose main loops are CUTLASS's and run on a GPU only. They
// follow the equations in gemm.h, so the emulated library answers every call of the ABI; they are no check of CUTLASS.
#include <stdint.h>

#include "emulator.h"
#include "error.h"
#include "gemm.h"

namespace dvdq {
namespace {

int code_s4(const void* codes, int64_t i) {
  const int byte = static_cast<const uint8_t*>(codes)[i / 2];
  return static_cast<int8_t>((i % 2 ? byte >> 4 : byte) << 4) >> 4;
}

// The number that each byte of e4m3 stands for.
struct E4m3 {
  double numbers[256];
  E4m3() {
    for (int byte = 0; byte < 256; ++byte) {
      const int exponent = (byte >> 3) & 15, mantissa = byte & 7;
      const double size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
      numbers[byte] = byte & 128 ? -size : size;
    }
  }
};
const E4m3 e4m3;

double code_e4m3(const void* codes, int64_t i) { return e4m3.numbers[static_cast<const uint8_t*>(codes)[i]]; }

void store(const GemmArgs& args, int64_t m, int64_t n, float value) {
  const uint16_t bits = args.dtype == DVDQ_FP16 ? float_to_fp16(value) : float_to_bf16(value);
  static_cast<uint16_t*>(args.y)[m * args.n + n] = bits;
}

dvdq_status token_s8(const GemmArgs& args) {
  const int8_t* const a = static_cast<const int8_t*>(args.codes);
  const int8_t* const b = static_cast<const int8_t*>(args.weight);
  for (int64_t m = 0; m < args.m; ++m)
    for (int64_t n = 0; n < args.n; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < args.k; ++k) sum += a[m * args.k + k] * b[n * args.k + k];
      store(args, m, n, std::fmaf(args.row_scale[n], args.scales[m] * static_cast<float>(sum), args.bias[n]));
    }
  return DVDQ_OK;
}

}  // namespace

dvdq_status gemm_s4_token(const GemmArgs& args) {
  for (int64_t m = 0; m < args.m; ++m)
    for (int64_t n = 0; n < args.n; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < args.k; ++k) sum += code_s4(args.codes, m * args.k + k) * code_s4(args.weight, n * args.k + k);
      const float centred = static_cast<float>(sum) - args.row_zero[n] * args.sums[m];
      store(args, m, n, std::fmaf(args.row_scale[n], args.scales[m] * centred, args.bias[n]));
    }
  return DVDQ_OK;
}

dvdq_status gemm_s8_token(const GemmArgs& args) { return token_s8(args); }
dvdq_status gemm_s8_wgmma(const GemmArgs& args) { return token_s8(args); }

dvdq_status gemm_e4m3_group(const GemmArgs& args) {
  for (int64_t m = 0; m < args.m; ++m)
    for (int64_t n = 0; n < args.n; ++n) {
      float total = 0.0f;
      for (int64_t g = 0; g < args.k / args.act_group; ++g) {
        double sum = 0.0;
        for (int64_t k = g * args.act_group; k < (g + 1) * args.act_group; ++k)
          sum += code_e4m3(args.codes, m * args.k + k) * code_e4m3(args.weight, n * args.k + k);
        total = std::fmaf(args.scales[g * args.m + m], static_cast<float>(sum), total);
      }
      store(args, m, n, std::fmaf(args.row_scale[n], total, args.bias[n]));
    }
  return DVDQ_OK;
}

}  // namespace dvdq

// Shuffles the order in which threads run; 0 runs them in order.
extern "C" __attribute__((visibility("default"))) void dvdq_emulator_schedule(uint64_t seed) { dvdq::emulator::set_schedule(seed); }

// Lets the next launch fail with a code of the CUDA runtime.
extern "C" __attribute__((visibility("default"))) void dvdq_emulator_refuse(int error) { dvdq::emulator::refuse_next(error); }
