// Checks of dvdq_rope_quantize, then its launcher.
#include <stdint.h>

#include "dvdquant/kernels.h"
#include "error.h"
#include "multiply.h"
#include "rope_quantize.h"

namespace dvdq {
namespace {

constexpr const char* kName = "dvdq_rope_quantize";

dvdq_status check_rope(const dvdq_rope* rope, int64_t m) {
  if (rope == nullptr) return fail(DVDQ_BAD_ARGUMENT, "%s: rope is null", kName);
  const int64_t channels = rope->channels, head = rope->head;
  if (m < 0 || m > INT32_MAX || rope->period < 1 || rope->period > INT32_MAX)
    return fail(DVDQ_BAD_ARGUMENT, "%s: %lld tokens in samples of %lld; up to 2^31-1", kName, static_cast<long long>(m),
                static_cast<long long>(rope->period));
  if (rope->dtype != DVDQ_BF16 && rope->dtype != DVDQ_FP16)
    return fail(DVDQ_BAD_ARGUMENT, "%s: dtype %d is unknown", kName, rope->dtype);
  if (rope->norm < DVDQ_ROPE_NORM_NONE || rope->norm > DVDQ_ROPE_NORM_LAYER)
    return fail(DVDQ_BAD_ARGUMENT, "%s: norm %d is unknown", kName, rope->norm);
  if (head != 32 && head != 64 && head != 128 && head != 256)
    return fail(DVDQ_UNSUPPORTED, "%s: heads of %lld channels; available: 32, 64, 128, 256", kName, static_cast<long long>(head));
  if (channels < head || channels % head)
    return fail(DVDQ_BAD_ARGUMENT, "%s: %lld channels in heads of %lld", kName, static_cast<long long>(channels),
                static_cast<long long>(head));
  if (channels > kRopeChannels)
    return fail(DVDQ_UNSUPPORTED, "%s: %lld channels; up to %lld", kName, static_cast<long long>(channels),
                static_cast<long long>(kRopeChannels));
  if (rope->stride < channels || rope->stride % 8)
    return fail(DVDQ_BAD_ARGUMENT, "%s: tokens of %lld channels are %lld apart; a multiple of 8, at least as many", kName,
                static_cast<long long>(channels), static_cast<long long>(rope->stride));
  if (rope->rope_channels != 0 && rope->rope_channels != head && rope->rope_channels != channels)
    return fail(DVDQ_BAD_ARGUMENT, "%s: rope over %lld channels; none, a head's or all", kName,
                static_cast<long long>(rope->rope_channels));
  if (rope->rope_channels != 0 &&
      (rope->rope_first < 0 || rope->rope_tokens < 0 || rope->rope_first > rope->period - rope->rope_tokens))
    return fail(DVDQ_BAD_ARGUMENT, "%s: rope of %lld tokens from token %lld of samples of %lld", kName,
                static_cast<long long>(rope->rope_tokens), static_cast<long long>(rope->rope_first),
                static_cast<long long>(rope->period));
  return DVDQ_OK;
}

}  // namespace
}  // namespace dvdq

using namespace dvdq;

extern "C" dvdq_status dvdq_rope_quantize(const dvdq_rope* rope, const void* x, void* out, int64_t m, dvdq_stream stream) {
  const dvdq_status status = check_rope(rope, m);
  if (status != DVDQ_OK || m == 0) return status;
  const bool plain = rope->rope_channels == 0;
  const Named pointers[] = {{"x", x, false, 16},
                            {"out", out, false, 16},
                            {"rope.weight", rope->weight, true, 16},
                            {"rope.bias", rope->bias, true, 16},
                            {"rope.cosines", rope->cosines, plain, 16},
                            {"rope.sines", rope->sines, plain, 16},
                            {"rope.bound", rope->bound, true, 4}};
  const dvdq_status checked = check_pointers(kName, pointers);
  if (checked != DVDQ_OK) return checked;
  return rope_quantize(*rope, x, out, m, static_cast<cudaStream_t>(stream));
}
