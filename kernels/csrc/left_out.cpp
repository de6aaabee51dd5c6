// Launchers of the sources that a build leaves out, because none of its architectures runs them. A plan for a GPU of the build
// never names their paths; a GPU of another architecture gets these words.
#include "gemm.h"

namespace dvdq {
namespace {

[[maybe_unused]] dvdq_status left_out(const GemmArgs& args, const char* path) {
  return fail(DVDQ_UNSUPPORTED, "%s: this library was built without code for SM %d.%d; dvdq_architectures lists what it has", path,
              args.sm / 10, args.sm % 10);
}

}  // namespace

#ifdef DVDQ_LEFT_OUT_SM80_GEMM_S4
dvdq_status gemm_s4_token(const GemmArgs& args) { return left_out(args, "s4_token"); }
#endif
#ifdef DVDQ_LEFT_OUT_SM80_GEMM_S8
dvdq_status gemm_s8_token(const GemmArgs& args) { return left_out(args, "s8_token"); }
#endif
#ifdef DVDQ_LEFT_OUT_SM90A_GEMM_S8
dvdq_status gemm_s8_wgmma(const GemmArgs& args) { return left_out(args, "s8_wgmma"); }
#endif
#ifdef DVDQ_LEFT_OUT_SM90A_GEMM_E4M3
dvdq_status gemm_e4m3_group(const GemmArgs& args) { return left_out(args, "e4m3_group"); }
#endif

}  // namespace dvdq
