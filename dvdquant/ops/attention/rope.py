"""q or k on its way to attention: a norm, rope, a Hadamard matrix over each head, and e4m3 codes or 16 bits.

Each of these operations reads and writes all of q when it runs by itself. The kernel (``kernels/csrc/rope_quantize.cu``) does
them in registers, in one pass. :func:`apply_rope` is the definition that it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.numerics.hadamard import kept_hadamard_matrix
from dvdquant.ops.attention.definition import e4m3_codes
from dvdquant.ops.cuda.arguments import ROPE_NORMS, RopePointers
from dvdquant.ops.cuda_linear import CudaKernels, aligned, pointer_of, require_kernels, stream_of
from dvdquant.ops.packed_layer import DTYPE_NAMES

__all__ = ["Rope", "apply_rope", "rope_quantize", "run_rope_quantize"]

_TINY = 1e-30


@dataclass(frozen=True)
class Rope:
    """The norm, the rope and the rotation of q or k [B, S, C]. C is H heads of d channels.

    Args:
        head: The channels of a head, d.
        norm: ``none``, ``all`` (over C) or ``head`` (over d), an RMS norm, or ``layer``, a layer norm over d.
        eps: The number that the norm adds to the mean of squares, or to the variance.
        rotated: Whether each head is multiplied by the Hadamard matrix / √d.
        weight: The weight of the norm, fp32 [C] or [d], or None for ones.
        cosines: fp32 [R, d/2], or [R, C/2] where every head has its own; None for no rope. With ``per_channel``, [R, d]
            or [R, C]. R is up to S - ``first`` for the same rows in every sample, or B · S for rows of each.
        sines: The sines, as the cosines.
        bound: fp32 [1], the value that becomes 448 of e4m3, or None for 16 bits out.
        bias: The bias of the norm, fp32 [C] or [d], or None for zeros.
        first: The token of a sample that the tables' first row is for. Tokens that have no row are not turned.
        per_channel: Whether both channels of a pair have a cosine and a sine of their own.
    """

    head: int
    norm: str = "none"
    eps: float = 0.0
    rotated: bool = False
    weight: Tensor | None = None
    cosines: Tensor | None = None
    sines: Tensor | None = None
    bound: Tensor | None = None
    bias: Tensor | None = None
    first: int = 0
    per_channel: bool = False


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Take q or k through its norm, rope and rotation, and round it.

    ``n = x / sqrt(mean(x²) + eps) · weight + bias``, of x or, for a layer norm, of x less its mean. Rope turns the pairs
    (2i, 2i + 1) of n by their angles, ``n0 cos - n1 sin`` and ``n1 cos + n0 sin``, in the tokens that have a row of the
    tables. The rotation mixes each head; then ``e4m3(h · 448 / bound)``. All in fp32, and rounded once, at the end. float64
    is computed in float64 throughout.

    Args:
        x: [B, S, C] of a floating dtype.
        rope: The norm, the rope and the rotation.

    Returns:
        [B, S, C]: float8_e4m3fn with a bound, else x's dtype.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    _check(x, rope)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(wide)
    if rope.norm != "none":
        parts = h if rope.norm == "all" else _split(h, rope.head)
        parts = parts - parts.mean(-1, keepdim=True) if rope.norm == "layer" else parts
        parts = parts / (parts.square().mean(-1, keepdim=True) + rope.eps).sqrt()
        parts = parts if rope.weight is None else parts * rope.weight
        h = (parts if rope.bias is None else parts + rope.bias).reshape(x.shape)
    if rope.cosines is not None and rope.sines is not None:
        # A row of each sample's own: all tokens as if of one sample.
        tokens = h.reshape(1, -1, h.shape[2]) if len(rope.cosines) > h.shape[1] else h
        last = rope.first + len(rope.cosines)
        turned = _turn(tokens[:, rope.first : last], rope.cosines, rope.sines, rope.per_channel)
        h = torch.cat([tokens[:, : rope.first], turned, tokens[:, last:]], 1).reshape(x.shape)
    if rope.rotated:
        matrix = kept_hadamard_matrix(rope.head, wide, x.device)
        h = (_split(h, rope.head) @ matrix).reshape(x.shape)
    if rope.bound is None:
        return h.to(x.dtype)
    return e4m3_codes(h * (E4M3_MAX / rope.bound.to(wide).clamp(min=_TINY)), 1.0)


def _turn(x: Tensor, cosines: Tensor, sines: Tensor, per_channel: bool) -> Tensor:
    """Return the pairs of channels of x [B, R, C] turned by their angles."""
    if not per_channel:
        cosines, sines = cosines.repeat_interleave(2, 1), sines.repeat_interleave(2, 1)
    parts = x.reshape(*x.shape[:2], -1, cosines.shape[1])
    across = torch.stack([-parts[..., 1::2], parts[..., ::2]], -1).flatten(-2)
    return (parts * cosines[:, None] + across * sines[:, None]).reshape(x.shape)


def _split(x: Tensor, head: int) -> Tensor:
    """Return [B, S, H, d] of [B, S, C]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // head, head)


def _check(x: Tensor, rope: Rope) -> None:
    """Check the sizes.

    Raises:
        ShapeError: They do not fit each other.
    """
    if x.ndim != 3 or x.shape[2] % rope.head or rope.norm not in ROPE_NORMS:
        raise ShapeError(
            f"x {tuple(x.shape)}, heads of {rope.head}, norm {rope.norm!r:.20}", available="[B, S, heads · channels]"
        )
    batch, tokens, channels = x.shape
    size = channels if rope.norm == "all" else rope.head
    for name, part in (("weight", rope.weight), ("bias", rope.bias)):
        if part is not None and tuple(part.shape) != (size,):
            raise ShapeError(
                f"a {name} {tuple(part.shape)} of a norm over {size} channels",
                available=f"({size},)",
                fix="give a value for each channel that the norm is over",
            )
    if rope.cosines is None or rope.sines is None:
        return
    share = 1 if rope.per_channel else 2
    widths = (rope.head // share, channels // share)
    if rope.cosines.ndim != 2 or rope.cosines.shape != rope.sines.shape or rope.cosines.shape[1] not in widths:
        raise ShapeError(
            f"tables {tuple(rope.cosines.shape)} and {tuple(rope.sines.shape)} of rope",
            available=f"both of rows of {widths[0]} or {widths[1]}",
            fix="give cosines and sines of one shape, [rows, channels of a head or of all heads]",
        )
    rows = rope.cosines.shape[0]
    if rope.first < 0 or (rope.first + rows > tokens and (rope.first, rows) != (0, batch * tokens)):
        raise ShapeError(
            f"a table of {rows} rows from token {rope.first} of {batch} samples of {tokens} tokens",
            available=f"up to {tokens - rope.first} rows for all samples, or {batch * tokens} from token 0",
            fix="cut the table to the tokens that rope turns",
        )


def run_rope_quantize(kernels: CudaKernels, x: Tensor, rope: Rope, out: Tensor | None = None) -> Tensor:
    """Compute :func:`apply_rope` in one kernel, which a CUDA graph can capture.

    Args:
        kernels: The kernels of x's device.
        x: bf16 or fp16 [B, S, C]. Its tokens may lie apart, such as q in the output of a merged layer.
        rope: The norm, the rope and the rotation.
        out: Where the result is written, of its shape and dtype, contiguous and at a multiple of 16 bytes; None for a new
            tensor.

    Raises:
        ShapeError: The tensors do not fit each other.
        UnsupportedError: The size of a head is not 32, 64, 128 or 256, x has more than 8192 channels, or the dtype is another.
    """
    _check(x, rope)
    if x.dtype not in DTYPE_NAMES:
        raise UnsupportedError(f"the kernels take no {x.dtype} of q and k", available=DTYPE_NAMES.values())
    batch, tokens, channels = x.shape
    stride = x.stride(1) if tokens > 1 else channels
    apart = batch > 1 and x.stride(0) != tokens * stride
    if x.stride(2) != 1 or apart or stride % 8 or stride < channels or x.data_ptr() % 16:
        x, stride = aligned(x), channels
    weight, bias, cosines, sines = (
        None if part is None else aligned(part.float()) for part in (rope.weight, rope.bias, rope.cosines, rope.sines)
    )
    bound = None if rope.bound is None else rope.bound.float().contiguous()
    dtype = x.dtype if bound is None else torch.float8_e4m3fn
    if out is None:
        out = kernels.allocate((batch, tokens, channels), dtype, x.device)
    elif out.shape != x.shape or out.dtype != dtype or not out.is_contiguous() or out.data_ptr() % 16:
        raise ShapeError(
            f"a place for the result {tuple(out.shape)} {out.dtype}",
            available=f"contiguous {tuple(x.shape)} {dtype}",
            fix="give a tensor like this, or none",
        )
    if out.numel():
        rows, width = (0, 0) if cosines is None else cosines.shape
        pointers = RopePointers(
            channels, rope.head, DTYPE_NAMES[x.dtype], stride, max(tokens, rope.first + rows),
            width if rope.per_channel else 2 * width, rope.first, rows, rope.norm, rope.rotated, rope.per_channel, rope.eps,
            pointer_of(weight), pointer_of(bias), pointer_of(cosines), pointer_of(sines), pointer_of(bound),
        )  # fmt: skip
        with stream_of(x) as stream:
            kernels.library.rope_quantize(pointers, x.data_ptr(), out.data_ptr(), batch * tokens, stream)
    return out


@torch.library.custom_op("dvdquant::rope_quantize", mutates_args=())
def rope_quantize(
    x: Tensor,
    weight: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    bound: Tensor | None,
    head: int,
    norm: str,
    eps: float,
    rotated: bool,
    bias: Tensor | None = None,
    first: int = 0,
    per_channel: bool = False,
) -> Tensor:
    """Take q or k through norm, rope and rotation.

    Args:
        x: [B, S, C] float32 (CPU only), float16 or bfloat16.
        weight: The weight of the norm, fp32 [C] or [d], or None for ones.
        cosines: The cosines, fp32 [R, d/2] or [R, C/2], or None for no rope. With ``per_channel``, [R, d] or [R, C].
        sines: The sines, as the cosines.
        bound: The value that becomes 448 of e4m3, fp32 [1], or None for 16 bits out.
        head: The channels of a head, d.
        norm: ``none``, ``all``, ``head`` or ``layer``, see :class:`Rope`.
        eps: The number that is added to the mean of squares, or to the variance.
        rotated: Whether each head is multiplied by the Hadamard matrix / √d.
        bias: The bias of the norm, fp32 [C] or [d], or None for zeros.
        first: The token of a sample that the tables' first row is for.
        per_channel: Whether both channels of a pair have a cosine and a sine of their own.

    Returns:
        [B, S, C], contiguous: float8_e4m3fn with a bound, else x's dtype.
    """
    return apply_rope(
        x, Rope(head, norm, eps, rotated, weight, cosines, sines, bound, bias, first, per_channel)
    ).contiguous()


@rope_quantize.register_fake
def _rope_quantize_fake(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, bound: Tensor | None, head: int,
    norm: str, eps: float, rotated: bool, bias: Tensor | None = None, first: int = 0, per_channel: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape, dtype=x.dtype if bound is None else torch.float8_e4m3fn)


@rope_quantize.register_kernel("cuda")
def _rope_quantize_cuda(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, bound: Tensor | None, head: int,
    norm: str, eps: float, rotated: bool, bias: Tensor | None = None, first: int = 0, per_channel: bool = False,
) -> Tensor:  # fmt: skip
    rope = Rope(head, norm, eps, rotated, weight, cosines, sines, bound, bias, first, per_channel)
    return run_rope_quantize(require_kernels(x.device), x, rope)
