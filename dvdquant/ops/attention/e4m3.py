"""q, k and v as e4m3 codes with their scales, for kernels that take them so."""

from __future__ import annotations

import torch
from torch import Tensor

from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.numerics.hadamard import kept_hadamard_matrix
from dvdquant.ops.attention.definition import e4m3_codes

__all__ = ["e4m3_operands"]


def e4m3_operands(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, v_per_head: bool = True
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Rotate q and k, and round q, k and v to e4m3.

    Args:
        q: [B, S, H, d] in 16 bit, or codes already, by their bounds.
        k: [B, T, H, d], as q.
        v: [B, T, H, d] in 16 bit.
        bounds: fp32 [2], the largest values that q and k can have. None takes them from the values.
        v_per_head: Whether v has a scale per head, or one for all.

    Returns:
        The codes of q, k and v, contiguous in their shapes, and the steps they are multiplied by: [1, 1] for q and k,
        [B, H] or [1, 1] for v.
    """
    coded = q.dtype == torch.float8_e4m3fn
    if not coded:
        matrix = kept_hadamard_matrix(q.shape[-1], q.dtype, q.device)
        q, k = q @ matrix, k @ matrix
    q_amax, k_amax = (q.abs().amax(), k.abs().amax()) if bounds is None else bounds.unbind()
    v_amax = v.abs().amax((1, 3)) if v_per_head else v.abs().amax().reshape(1, 1)
    steps = [
        (amax.float().clamp(min=1e-30) / E4M3_MAX) for amax in (q_amax.reshape(1, 1), k_amax.reshape(1, 1), v_amax)
    ]
    codes = [
        (x if x.dtype == torch.float8_e4m3fn else e4m3_codes(x.float(), step[:, None, :, None])).contiguous()
        for x, step in zip((q, k, v), steps)
    ]
    return (codes[0], codes[1], codes[2]), (steps[0], steps[1], steps[2])
