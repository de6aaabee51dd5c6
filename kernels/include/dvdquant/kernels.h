// dvdquant kernels: the C ABI. Raw device pointers, 64-bit sizes and a stream; no PyTorch, no TensorRT.
//
// One quantized linear layer, everything between fp32 inputs of the definition in dvdquant/ops/quant_linear.py:
//
//   RQ   rotate_quantize   x [M, K] -> codes [M, K], scales, token sums
//   QL   linear_gemm       codes x prepared weight -> y [M, N]
//   quant_linear = RQ + QL in one call, with the codes in the workspace.
//
// A layer's packed weight (canonical layout, see dvdq_weight) is prepared once per device: expanded or repacked to what
// the path of that device multiplies. The packed weight is not needed afterwards. Or it stays packed, one copy for all
// activation grids, and is expanded before each product that needs it: dvdq_packed_linear.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define DVDQ_API __declspec(dllexport)
#else
#define DVDQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define DVDQ_ABI_VERSION 7

typedef void* dvdq_stream;  // cudaStream_t

typedef enum dvdq_status {
  DVDQ_OK = 0,
  DVDQ_BAD_ARGUMENT = 1,  // a null or misaligned pointer, a size that is negative, a K that the block does not divide
  DVDQ_UNSUPPORTED = 2,   // a valid layer that no path of this device runs; the message names what it can run
  DVDQ_WORKSPACE = 3,     // workspace or prepared buffer too small
  DVDQ_CUDA_ERROR = 4,    // the CUDA runtime refused; the message holds its text
  DVDQ_OUT_OF_MEMORY = 5  // the CUDA runtime had no memory left (cudaErrorMemoryAllocation); the message holds its text
} dvdq_status;

typedef enum dvdq_dtype { DVDQ_BF16 = 0, DVDQ_FP16 = 1 } dvdq_dtype;

// How the multiplication of a layer runs on a device.
typedef enum dvdq_path {
  DVDQ_PATH_S4_TOKEN = 0,     // s4 mma, scale per token (SM 8.x)
  DVDQ_PATH_S4_GROUP = 1,     // s4 mma, scale per 64 or 128 channels, group scales of the weight in the loop (SM 8.x)
  DVDQ_PATH_S8_TOKEN = 2,     // s8 mma, weights expanded to int8 per row (SM 8.x, 10.0 and later)
  DVDQ_PATH_S8_GROUP = 3,     // s8 mma, activation scale per group, weights expanded to int8 per row (any SM >= 8.0)
  DVDQ_PATH_S8_WGMMA = 4,     // s8 wgmma, scale per token, weights expanded to int8 per row (SM 9.0: mode T)
  DVDQ_PATH_E4M3_GROUP = 5    // e4m3 wgmma, 4-bit codes held exactly, scale per 128 channels (SM 9.0: mode G)
} dvdq_path;

typedef enum dvdq_codes { DVDQ_CODES_S4 = 0, DVDQ_CODES_S8 = 1, DVDQ_CODES_E4M3 = 2 } dvdq_codes;

// One layer; every field is read at every call, none is kept.
typedef struct dvdq_layer {
  int64_t n;               // output features
  int64_t k;               // input features; a multiple of 32, and of block * outer
  int64_t weight_groups;   // groups per weight row; 1 = scale per row
  int32_t float_zero_point; // 0: weight_zero is fp32 [N]; 1: uint8 [N, groups], z = byte / 16 - 8
  int32_t block;           // b, order of the inner (Sylvester) Hadamard factor: 1 (none) or a power of two up to 2048
  int32_t outer;           // p, order of the outer factor; 1 = block-diagonal. k = q * p * b
  int32_t act_bits;        // 4 or 8
  int32_t act_group;       // channels per activation scale; 0 = whole token
  int32_t dtype;           // dvdq_dtype of x and y
} dvdq_layer;

// The packed weight of a layer in the canonical layout: what the files hold.
typedef struct dvdq_weight {
  const void* codes;     // int8 [N, K/2], low nibble = even k, signed -8..7
  const float* scale;    // [N]
  const void* group_scale;  // uint8 [N, groups]; 255 = 1
  const void* zero;      // fp32 [N] or uint8 [N, groups]
  const float* bias;     // [N], may be null
} dvdq_weight;

// What a device needs for a layer.
typedef struct dvdq_plan {
  int32_t path;              // dvdq_path
  int32_t codes;             // dvdq_codes RQ emits; plans of one weight equal here and in prepared_bytes share its buffer
  int32_t scale_rows;        // activation scales per token: 1 or K / act_group
  int32_t needs_sums;        // whether QL reads the token sums (native s4 with a zero-point correction)
  int64_t prepared_bytes;    // of the prepared weight: codes, then row scales, corrections and bias
  int64_t codes_bytes_per_token;
} dvdq_plan;

// Text of the last error of the calling thread; never null.
DVDQ_API const char* dvdq_last_error(void);
// DVDQ_ABI_VERSION of the library, and the SMs it was compiled for as "80;86;89;90a;120".
DVDQ_API int32_t dvdq_abi_version(void);
DVDQ_API const char* dvdq_architectures(void);
DVDQ_API const char* dvdq_path_name(int32_t path);

// Chooses the path of `layer` on `sm` (major * 10 + minor). Host only: needs no device.
DVDQ_API dvdq_status dvdq_plan_layer(const dvdq_layer* layer, int32_t sm, dvdq_plan* plan);

// Bytes of workspace that dvdq_quant_linear needs for m tokens. Host only.
DVDQ_API dvdq_status dvdq_workspace_bytes(const dvdq_layer* layer, int32_t sm, int64_t m, int64_t* bytes);

// Packed weight -> prepared weight of plan.prepared_bytes bytes (256-byte aligned), on the current device.
DVDQ_API dvdq_status dvdq_prepare_weight(const dvdq_layer* layer, int32_t sm, const dvdq_weight* weight, void* prepared,
                                         int64_t prepared_bytes, dvdq_stream stream);

// RQ. x [m, k] row-major; codes as plan.codes; scales fp32: [m] per token, [k / act_group, m] per group (group-major);
// sums fp32, same layout as scales, the sum of the codes of that group, or null.
// pre_quant: [k / 8, 2, 8] of layer.dtype, 8 scales and 8 offsets in turns; or null. x becomes fma(x, scale, offset), rounded
// once to layer.dtype, before the rotation: the pre_quant_scale and pre_quant_shift of a layer, for callers who have no
// pointwise operation to fuse them into.
// outer_matrix: fp32 [p, p] on the device, null when outer == 1. The inner factor is the Sylvester matrix / sqrt(b).
DVDQ_API dvdq_status dvdq_rotate_quantize(const dvdq_layer* layer, int32_t sm, const void* x, const void* pre_quant,
                                          const float* outer_matrix, void* codes, float* scales, float* sums, int64_t m,
                                          dvdq_stream stream);

// QL. Same layouts; y [m, n] row-major of layer.dtype.
DVDQ_API dvdq_status dvdq_linear_gemm(const dvdq_layer* layer, int32_t sm, const void* codes, const float* scales,
                                      const float* sums, const void* prepared, void* y, int64_t m, void* workspace,
                                      int64_t workspace_bytes, dvdq_stream stream);

// RQ + QL. Capturable in a CUDA graph: no allocation, no synchronisation, no host copy.
DVDQ_API dvdq_status dvdq_quant_linear(const dvdq_layer* layer, int32_t sm, const void* x, const void* pre_quant,
                                       const float* outer_matrix, const void* prepared, void* y, int64_t m,
                                       void* workspace, int64_t workspace_bytes, dvdq_stream stream);

// ---- weights that stay packed ------------------------------------------------------------------------------------------
//
// Half a byte a weight, on every SM and for all activation grids: the codes of dvdq_weight where they are, with groups its group scales
// and byte zero-points as well, and `rows`, a small buffer that is made once. S4 paths multiply the codes themselves. For the others the weight is expanded into the workspace
// just before the product, byte for byte to what dvdq_prepare_weight makes, so that y has the same bits. The workspace belongs
// to the call, so calls on several streams need several, and nothing else is shared.

// Bytes of the rows of a layer; the same on every SM that runs it. Host only.
DVDQ_API dvdq_status dvdq_rows_bytes(const dvdq_layer* layer, int32_t sm, int64_t* bytes);

// Stored weight -> its rows (256-byte aligned), on the current device. Of `weight` the codes are needed afterwards; with
// weight_groups > 1 the group scales too, and with float_zero_point the zero-points. Scale and bias are in the rows.
DVDQ_API dvdq_status dvdq_make_rows(const dvdq_layer* layer, int32_t sm, const dvdq_weight* weight, void* rows,
                                    int64_t rows_bytes, dvdq_stream stream);

// Packed weight and rows -> the prepared weight of the layer's path. DVDQ_UNSUPPORTED on S4 paths, which need none.
DVDQ_API dvdq_status dvdq_expand_weight(const dvdq_layer* layer, int32_t sm, const dvdq_weight* weight, const void* rows,
                                        void* prepared, int64_t prepared_bytes, dvdq_stream stream);

// Bytes of workspace that dvdq_packed_linear needs for m tokens: those of dvdq_quant_linear, and the expanded weight. Host only.
DVDQ_API dvdq_status dvdq_packed_workspace_bytes(const dvdq_layer* layer, int32_t sm, int64_t m, int64_t* bytes);

// dvdq_quant_linear on a weight that stays packed. Capturable in a CUDA graph.
DVDQ_API dvdq_status dvdq_packed_linear(const dvdq_layer* layer, int32_t sm, const void* x, const void* pre_quant,
                                        const float* outer_matrix, const dvdq_weight* weight, const void* rows, void* y,
                                        int64_t m, void* workspace, int64_t workspace_bytes, dvdq_stream stream);

// ---- with the operations before a layer, in the same pass ---------------------------------------------------------------

typedef enum dvdq_norm { DVDQ_NORM_NONE = 0, DVDQ_NORM_LAYER = 1, DVDQ_NORM_RMS = 2 } dvdq_norm;

// What RQ reads in place of x. In fp32; -> is a rounding to layer.dtype:
//   gelu != 0:  z = gelu(x) by tanh ->
//   else:       h = x + gate * y ->;  n = (h - mean) / sqrt(variance + eps);  z = multiplier * n + addend ->
// mean and variance are over the k channels of a token; RMS: mean = 0; NONE: n = h. Without y, h = x. eps >= 0, and more where a
// token may be all zeros.
// gate, multiplier, addend: fp32 rows of [k]. Token i reads row i / tokens (0 tokens: row 0), which starts `stride` floats
// after the one before; strides are multiples of 4.
typedef struct dvdq_prologue {
  const void* y;            // [m, k] of layer.dtype, may be null
  const float* gate;        // may be null: ones
  const float* multiplier;  // may be null: ones
  const float* addend;      // may be null: zeros
  void* hidden;             // [m, k], h is written there; may be null; not x or y
  int64_t gate_tokens, gate_stride;
  int64_t modulate_tokens, modulate_stride;  // of multiplier and addend
  int32_t norm;             // dvdq_norm
  int32_t gelu;
  float eps;
} dvdq_prologue;

// dvdq_rotate_quantize and dvdq_quant_linear of z. layer.outer == 1 and k up to 32768, else DVDQ_UNSUPPORTED.
DVDQ_API dvdq_status dvdq_fused_quantize(const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                                         const void* pre_quant, void* codes, float* scales, float* sums, int64_t m,
                                         dvdq_stream stream);
DVDQ_API dvdq_status dvdq_fused_linear(const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                                       const void* pre_quant, const void* prepared, void* y, int64_t m, void* workspace,
                                       int64_t workspace_bytes, dvdq_stream stream);

// dvdq_packed_linear of z, in a workspace of dvdq_packed_workspace_bytes. Capturable in a CUDA graph.
DVDQ_API dvdq_status dvdq_packed_fused_linear(const dvdq_layer* layer, int32_t sm, const dvdq_prologue* prologue, const void* x,
                                              const void* pre_quant, const dvdq_weight* weight, const void* rows, void* y,
                                              int64_t m, void* workspace, int64_t workspace_bytes, dvdq_stream stream);

// ---- q and k on their way to attention ------------------------------------------------------------------------------------

typedef enum dvdq_rope_norm {
  DVDQ_ROPE_NORM_NONE = 0,
  DVDQ_ROPE_NORM_ALL = 1,    // RMS over all channels of a token
  DVDQ_ROPE_NORM_HEAD = 2,   // RMS over each head
  DVDQ_ROPE_NORM_LAYER = 3,  // less its mean and RMS, over each head
} dvdq_rope_norm;

// n = x / sqrt(mean(x^2) + eps) * weight + bias, of x or, with LAYER, of x - mean(x);
// r = rope of n in tokens rope_first to rope_first + rope_tokens of a sample, else n: pairs (2i, 2i + 1) become
//     (n0 cos - n1 sin, n1 cos + n0 sin);
// h = r times the Hadamard matrix / sqrt(head) over each head, or r;
// out = e4m3 of h * 448 / bound, held to 448; or h in 16 bits. In fp32, and rounded once.
typedef struct dvdq_rope {
  int64_t channels;       // of a token, all heads; up to 8192
  int64_t stride;         // elements of x from one token to the next, a multiple of 8
  int64_t period;         // tokens of a sample: token i reads row i % period - rope_first of the tables
  int64_t rope_channels;  // channels of a row of the tables: a head's or all; 0: no rope
  int64_t rope_first;
  int64_t rope_tokens;    // rows of the tables; rope_first + rope_tokens <= period
  int32_t head;           // channels of a head: 32, 64, 128 or 256
  int32_t dtype;          // dvdq_dtype, of x and of out without a bound
  int32_t norm;           // dvdq_rope_norm
  int32_t rotated;        // 0: h = r
  int32_t per_channel;    // 0: a row has one cosine and sine for each pair; else one for each channel
  float eps;
  const float* weight;    // of the norm, [channels] or [head]; null: ones
  const float* bias;      // the same; null: zeros
  const float* cosines;   // [rope_tokens, rope_channels / 2], or rope_channels
  const float* sines;     // the same
  const float* bound;     // [1] on the device, what becomes 448; null: 16 bits out
} dvdq_rope;

// x [m, channels] at rope.stride to out [m, channels], packed. Pointers are aligned to 16 bytes, bound to 4.
DVDQ_API dvdq_status dvdq_rope_quantize(const dvdq_rope* rope, const void* x, void* out, int64_t m, dvdq_stream stream);

// ---- quantizing: rotated weights -> 4-bit grids -----------------------------------------------------------------------

typedef enum dvdq_zero_point { DVDQ_ZERO_MIDRISE = 0, DVDQ_ZERO_SYMMETRIC = 1, DVDQ_ZERO_FLOAT = 2 } dvdq_zero_point;
typedef enum dvdq_solver { DVDQ_SOLVER_MINMAX = 0, DVDQ_SOLVER_SEARCH = 1 } dvdq_solver;

// What is searched for. W[n, k] = scale[n] * (group_scale[n, g] / 255) * (codes[n, k] - z).
typedef struct dvdq_grid {
  int64_t n;           // rows
  int64_t k;           // columns, a multiple of 16, up to 20480
  int64_t groups;      // segments per row; 1 = a scale per row, else k / groups is a multiple of 16 up to 256
  int32_t zero_point;  // dvdq_zero_point
  int32_t solver;      // dvdq_solver
} dvdq_grid;

// A quantized weight on the device, codes unpacked.
typedef struct dvdq_grid_out {
  void* codes;   // int8 [n, k], -8..7
  float* scale;  // [n], at least 2^-118
  void* group_scale;  // uint8 [n, groups], 1..255; 255 for a scale per row
  void* zero;    // fp32 [n], or uint8 [n, groups] with DVDQ_ZERO_FLOAT: z = byte / 16 - 8
} dvdq_grid_out;

// BGR: the grid of least squared error of each row or group of `weight` [n, k], fp32 and finite. Writes all of `out`.
DVDQ_API dvdq_status dvdq_search_grid(const dvdq_grid* grid, const float* weight, const dvdq_grid_out* out,
                                      dvdq_stream stream);

// Rounds `weight` to the grid in `out` by GPTQ and overwrites its codes; reads scale, group_scale and zero. factors:
// fp32 [k / block, block, block], unit upper triangular, row i says how the columns after i of a block take up the error of
// column i. block: 16 to 256, divides k.
DVDQ_API dvdq_status dvdq_gptq_round(const dvdq_grid* grid, const float* weight, const dvdq_grid_out* out,
                                         const float* factors, int64_t block, dvdq_stream stream);

#ifdef __cplusplus
}
#endif
