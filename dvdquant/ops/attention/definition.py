"""The formats of 8-bit attention in plain PyTorch: what every library's kernel is compared with.

``softmax(q·kᵀ·scale)·v`` with q, k, the weights ``p = exp(s − max s)`` and v on grids of 8 bits:

* int8 q and k have a scale per block of tokens, taken from their values. k is centred by its mean over the tokens, which
  adds one number to every score of a row and so leaves the softmax as it is; or q and k are rotated by a Hadamard matrix.
* e4m3 q and k have one scale each, from the norm before them: a row behind an RMS norm over n channels has the length
  ``√n·max|w|`` at most, and rope and the rotation keep lengths. No value is larger, whatever the data.
* p is e4m3 of 448·p, or uint8 with a scale per tile of keys. p is at most 1, and most of a long row is far below it.
  One scale in 8 bits of integers, or rounding p after it was divided by its sum, would leave nothing of such rows.
* v has a scale per channel: e4m3 beside e4m3 p, int8 beside uint8 p.

Sums are in fp32, as on tensor cores; in fp64 if the inputs are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dvdquant.errors import ShapeError
from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.numerics.hadamard import kept_hadamard_matrix

__all__ = ["FORMATS", "AttentionFormat", "e4m3_codes", "exact_attention", "quantized_attention"]

# SageAttention's blocks of tokens; a scale serves all channels of a head in a block.
Q_BLOCK, K_BLOCK = 128, 64
# Keys that share a scale of p.
P_TILE = 64
SCORES_AT_ONCE = 1 << 24
"""The number of scores held at a time: 64 MB in fp32."""
_TINY = 1e-30


@dataclass(frozen=True)
class AttentionFormat:
    """One format of attention.

    Args:
        qk: ``int8`` with scales per block of tokens, or ``e4m3`` with one scale for each of q and k.
        pv: ``e4m3`` with 448 as the scale of p and v per channel, or ``uint8`` p with a scale per tile of keys and int8
            v per channel.
        centred: Subtract from k its mean over the tokens.
        rotated: Multiply q and k by a Hadamard matrix over the channels of a head.
    """

    qk: Literal["int8", "e4m3"]
    pv: Literal["e4m3", "uint8"]
    centred: bool = False
    rotated: bool = False


FORMATS: dict[str, AttentionFormat] = {
    # What a recipe's ``int8`` and ``fp8`` mean.
    "int8": AttentionFormat("int8", "uint8", centred=True),
    "fp8": AttentionFormat("e4m3", "e4m3", rotated=True),
    # Other int8 formats that a library may bring.
    "int8-fp8": AttentionFormat("int8", "e4m3", centred=True),
    "int8-rotated": AttentionFormat("int8", "uint8", rotated=True),
    # What the rotation is for.
    "fp8-plain": AttentionFormat("e4m3", "e4m3"),
}


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Return attention in fp64.

    Args:
        q: [B, H, S, d].
        k: [B, H, T, d].
        v: [B, H, T, d].
        scale: What scores are multiplied by, 1/√d by default.

    Returns:
        fp64 [B, H, S, d].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = [
        (part @ k.double().mT * scale).softmax(-1) @ v.double() for part in torch.split(q.double(), _rows(q, k), 2)
    ]
    return torch.cat(parts, 2)


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: AttentionFormat,
    bounds: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return attention with its operands on the grids of a format.

    Args:
        q: [B, H, S, d] of a floating dtype.
        k: [B, H, T, d].
        v: [B, H, T, d].
        kind: The format.
        bounds: fp32 [2], the largest values that q and k can have, for e4m3. None takes them from q and k.
        scale: What scores are multiplied by, 1/√d by default.

    Returns:
        [B, H, S, d] of q's dtype.

    Raises:
        ShapeError: q, k and v do not fit each other.
        UnsupportedError: The format rotates, and no Hadamard matrix of order d can be constructed.
    """
    _check(q, k, v)
    d = q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype = q.dtype
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if kind.centred:
        k = k - k.mean(2, keepdim=True)
    if kind.rotated:
        matrix = kept_hadamard_matrix(d, wide, q.device)
        q, k = q @ matrix, k @ matrix
    if kind.qk == "int8":
        q = int8_grid(q, block_amax(q, Q_BLOCK))
        k = int8_grid(k, block_amax(k, K_BLOCK))
    else:
        q = e4m3_grid(q, q.abs().amax() if bounds is None else bounds[0].to(wide))
        k = e4m3_grid(k, k.abs().amax() if bounds is None else bounds[1].to(wide))
    per_channel = v.abs().amax(2, keepdim=True)
    v = e4m3_grid(v, per_channel) if kind.pv == "e4m3" else int8_grid(v, per_channel)
    parts = [_weighted(part, k, v, kind, scale) for part in torch.split(q, _rows(q, k), 2)]
    return torch.cat(parts, 2).to(dtype)


def _weighted(q: Tensor, k: Tensor, v: Tensor, kind: AttentionFormat, scale: float) -> Tensor:
    """Return the outputs of some rows of q; the sum that they are divided by is that of p before it is rounded."""
    scores = q @ k.mT * scale
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    total = p.sum(-1, keepdim=True)
    rounded = e4m3_grid(p, p.new_ones(())) if kind.pv == "e4m3" else tile_grid(p, P_TILE)
    return rounded @ v / total


def block_amax(x: Tensor, block: int) -> Tensor:
    """Return the largest |x| of every block of tokens.

    Args:
        x: [B, H, S, d].
        block: The number of tokens of a block. The last one may be shorter.

    Returns:
        [B, H, S, 1], the same for all tokens of a block.
    """
    largest = x.abs().amax(-1)
    tokens = largest.shape[-1]
    padded = torch.nn.functional.pad(largest, (0, -tokens % block))
    blocks = padded.view(*padded.shape[:-1], -1, block).amax(-1)
    return torch.repeat_interleave(blocks, block, -1)[..., :tokens, None]


def int8_grid(x: Tensor, amax: Tensor) -> Tensor:
    """Round x to the nearest of 255 values between −amax and amax (broadcast to x).

    Args:
        x: The values, any shape, floating point.
        amax: The largest absolute value of each group, broadcast to ``x``.
    """
    step = amax.clamp(min=_TINY) / 127
    return (x / step).round().clamp(-127, 127) * step


def e4m3_grid(x: Tensor, amax: Tensor) -> Tensor:
    """Round x to e4m3 times ``amax / 448`` (broadcast to x); what is larger than amax becomes amax.

    Args:
        x: The values, any shape, floating point.
        amax: The value that becomes 448, the largest of e4m3, broadcast to ``x``.
    """
    step = amax.clamp(min=_TINY) / E4M3_MAX
    return e4m3_codes(x, step).to(x.dtype) * step


def e4m3_codes(x: Tensor, step: Tensor | float) -> Tensor:
    """Return the e4m3 numbers nearest to ``x / step``, ties to even, saturated at ±448.

    Args:
        x: fp32 or fp64 of any shape.
        step: The value of the code 1, broadcast to x.
    """
    return (x / step).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float32).to(torch.float8_e4m3fn)


def tile_grid(p: Tensor, tile: int) -> Tensor:
    """Round weights [..., T] ≥ 0 to the nearest of 256 values between 0 and the largest of their tile of keys.

    Args:
        p: The weights, fp32 [..., T], not negative.
        tile: The number of keys in a tile.
    """
    keys = p.shape[-1]
    padded = torch.nn.functional.pad(p, (0, -keys % tile))
    tiles = padded.view(*padded.shape[:-1], -1, tile)
    step = tiles.amax(-1, keepdim=True).clamp(min=_TINY) / 255
    rounded: Tensor = (tiles / step).round() * step
    return rounded.flatten(-2)[..., :keys]


def _rows(q: Tensor, k: Tensor) -> int:
    """Return how many rows of q are computed together."""
    return max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the operands.

    Raises:
        ShapeError: They do not fit each other.
    """
    shapes = [tuple(t.shape) for t in (q, k, v)]
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or not k.shape[2]:
        raise ShapeError(f"attention got q {shapes[0]}, k {shapes[1]}, v {shapes[2]}", available="[B, H, tokens, d]")
