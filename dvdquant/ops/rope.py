"""q or k on its way to attention: RMS norm, rope, a Hadamard matrix over each head, and e4m3 codes or 16 bits.

Each of these operations reads and writes all of q when it runs by itself. The kernel (``kernels/csrc/rope_quantize.cu``) does
them in registers, in one pass. :func:`apply_rope` is the definition that it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvdquant.errors import ShapeError
from dvdquant.numerics.hadamard import hadamard_matrix
from dvdquant.ops.attention.definition import E4M3_MAX, e4m3_codes
from dvdquant.ops.cuda.arguments import ROPE_NORMS, RopePointers
from dvdquant.ops.cuda_linear import CudaKernels, aligned, pointer_of, require_kernels, stream_of
from dvdquant.ops.packed_layer import DTYPE_NAMES

__all__ = ["Rope", "apply_rope", "rope_quantize", "run_rope_quantize"]

_TINY = 1e-30


@dataclass(frozen=True)
class Rope:
    """What q or k [B, S, C] goes through. C is H heads of d channels.

    Args:
        head: d.
        norm: ``none``, ``all`` (over C) or ``head`` (over d): an RMS norm.
        eps: What it adds to the mean of squares.
        rotated: Whether each head is multiplied by the Hadamard matrix / √d.
        weight: Of the norm, fp32 [C] or [d], or None for ones.
        cosines: fp32 [S, d/2], or [S, C/2] where every head has its own; None for no rope.
        sines: The same.
        bound: fp32 [1], the value that becomes 448 of e4m3, or None for 16 bits out.
    """

    head: int
    norm: str = "none"
    eps: float = 0.0
    rotated: bool = False
    weight: Tensor | None = None
    cosines: Tensor | None = None
    sines: Tensor | None = None
    bound: Tensor | None = None


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Return what q or k becomes.

    ``n = x / sqrt(mean(x²) + eps) · weight``; rope turns the pairs (2i, 2i + 1) of n by their angles; the rotation mixes each
    head; then ``e4m3(h · 448 / bound)``. All in fp32, and rounded once, at the end. float64 is computed in float64 throughout.

    Args:
        x: [B, S, C] of a floating dtype.
        rope: What it goes through.

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
        parts = parts / (parts.square().mean(-1, keepdim=True) + rope.eps).sqrt()
        h = (parts if rope.weight is None else parts * rope.weight).reshape(x.shape)
    if rope.cosines is not None and rope.sines is not None:
        width = 2 * rope.cosines.shape[1]
        first, second = h.reshape(*h.shape[:2], -1, width // 2, 2).unbind(-1)
        cosines, sines = rope.cosines[:, None], rope.sines[:, None]
        turned = torch.stack([first * cosines - second * sines, second * cosines + first * sines], -1)
        h = turned.reshape(x.shape)
    if rope.rotated:
        matrix = hadamard_matrix(rope.head, wide).to(x.device)
        h = (_split(h, rope.head) @ matrix).reshape(x.shape)
    if rope.bound is None:
        return h.to(x.dtype)
    return e4m3_codes(h * (E4M3_MAX / rope.bound.to(wide).clamp(min=_TINY)), 1.0)


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
    _, tokens, channels = x.shape
    size = channels if rope.norm == "all" else rope.head
    if rope.weight is not None and tuple(rope.weight.shape) != (size,):
        raise ShapeError(f"a weight {tuple(rope.weight.shape)} of a norm over {size} channels", available=f"({size},)")
    for table in (rope.cosines, rope.sines):
        if table is not None and tuple(table.shape) not in ((tokens, rope.head // 2), (tokens, channels // 2)):
            raise ShapeError(
                f"a table {tuple(table.shape)} for {tokens} tokens",
                available=f"{tokens} rows of {rope.head // 2} or {channels // 2}",
            )


def run_rope_quantize(kernels: CudaKernels, x: Tensor, rope: Rope) -> Tensor:
    """Compute :func:`apply_rope` in one kernel, which a CUDA graph can capture.

    Args:
        kernels: The kernels of x's device.
        x: bf16 or fp16 [B, S, C]. Its tokens may lie apart, such as q in the output of a merged layer.
        rope: What it goes through.

    Raises:
        ShapeError: The tensors do not fit each other.
        UnsupportedError: Heads of another size than 32, 64, 128 or 256, or more than 8192 channels.
    """
    _check(x, rope)
    batch, tokens, channels = x.shape
    stride = x.stride(1) if tokens > 1 else channels
    apart = batch > 1 and x.stride(0) != tokens * stride
    if x.stride(2) != 1 or apart or stride % 8 or stride < channels or x.data_ptr() % 16:
        x, stride = aligned(x), channels
    weight, cosines, sines = (
        None if part is None else aligned(part.float()) for part in (rope.weight, rope.cosines, rope.sines)
    )
    bound = None if rope.bound is None else rope.bound.float().contiguous()
    out = kernels.allocate((batch, tokens, channels), x.dtype if bound is None else torch.float8_e4m3fn, x.device)
    if out.numel():
        width = 0 if rope.cosines is None else 2 * rope.cosines.shape[1]
        pointers = RopePointers(
            channels, rope.head, DTYPE_NAMES[x.dtype], stride, tokens, width, rope.norm, rope.rotated, rope.eps,
            pointer_of(weight), pointer_of(cosines), pointer_of(sines), pointer_of(bound),
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
) -> Tensor:
    """Take q or k through norm, rope and rotation.

    Args:
        x: [B, S, C] float32 (CPU only), float16 or bfloat16.
        weight: As in :class:`Rope`.
        cosines: As in :class:`Rope`.
        sines: As in :class:`Rope`.
        bound: As in :class:`Rope`.
        head: As in :class:`Rope`.
        norm: As in :class:`Rope`.
        eps: As in :class:`Rope`.
        rotated: As in :class:`Rope`.

    Returns:
        [B, S, C], contiguous: float8_e4m3fn with a bound, else x's dtype.
    """
    return apply_rope(x, Rope(head, norm, eps, rotated, weight, cosines, sines, bound)).contiguous()


@rope_quantize.register_fake
def _rope_quantize_fake(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, bound: Tensor | None, head: int,
    norm: str, eps: float, rotated: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape, dtype=x.dtype if bound is None else torch.float8_e4m3fn)


@rope_quantize.register_kernel("cuda")
def _rope_quantize_cuda(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, bound: Tensor | None, head: int,
    norm: str, eps: float, rotated: bool,
) -> Tensor:  # fmt: skip
    rope = Rope(head, norm, eps, rotated, weight, cosines, sines, bound)
    return run_rope_quantize(require_kernels(x.device), x, rope)
