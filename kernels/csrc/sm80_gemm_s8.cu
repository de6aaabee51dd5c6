// S8_TOKEN (SM 8.x, 10.x, 12.x): 8-bit tensor cores through mma.sync, m16n8k32; weights expanded to int8 per row.
#include "sm80_launch.cuh"

namespace dvdq {

dvdq_status gemm_s8_token(const GemmArgs& args) {
  if (args.n % sm80::kOutputAlignment != 0) {
    return grouped_s8(args);
  }
  using Instruction = cutlass::gemm::GemmShape<16, 8, 32>;
  return args.dtype == DVDQ_BF16 ? sm80::run<int8_t, Instruction, cutlass::bfloat16_t, false>(args, "s8_token")
                                 : sm80::run<int8_t, Instruction, cutlass::half_t, false>(args, "s8_token");
}

}  // namespace dvdq
