// S4_TOKEN (SM 8.0 to 8.9): native 4-bit tensor cores, m16n8k64; signed codes on both sides, the weight's zero-point
// corrected in the epilogue with one fp32 sum of codes per token.
#include "sm80_launch.cuh"

namespace dvdq {

dvdq_status gemm_s4_token(const GemmArgs& args) {
  // The grouped kernel stores any n, and refuses other devices in words.
  if (args.n % sm80::kOutputAlignment != 0 || args.sm < 80 || args.sm >= 90) {
    return grouped_s4(args);
  }
  using Code = cutlass::int4b_t;
  using Instruction = cutlass::gemm::GemmShape<16, 8, 64>;
  return args.dtype == DVDQ_BF16 ? sm80::run<Code, Instruction, cutlass::bfloat16_t, true>(args, "s4_token")
                                 : sm80::run<Code, Instruction, cutlass::half_t, true>(args, "s4_token");
}

}  // namespace dvdq
