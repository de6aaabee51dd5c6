"""``dvdquant::attention``: attention by whatever a session chose, as one opaque operation of a compiled model."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from dvdquant.errors import EngineError
from dvdquant.ops.attention.ladder import Attention
from dvdquant.ops.prepared_linear import kernels_of
from dvdquant.ops.rope import Rope, run_rope_quantize

__all__ = ["attention", "number_of", "rope_attention"]

_numbers = itertools.count(1)
_known: weakref.WeakValueDictionary[int, Attention] = weakref.WeakValueDictionary()


def number_of(chosen: Attention) -> int:
    """Return a new number by which :func:`attention` finds ``chosen``: an operation takes no Python objects.

    Args:
        chosen: The attention that a session has taken.
    """
    number = next(_numbers)
    _known[number] = chosen
    return number


@torch.library.custom_op("dvdquant::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, number: int) -> Tensor:
    """Compute attention as the session of this number does.

    Args:
        q: [B, S, H, d], and k and v [B, T, H, d].
        k: See q.
        v: See q.
        bounds: fp32 [2], the largest values that q and k can have, or None.
        scale: What scores are multiplied by.
        number: Of :func:`number_of`.

    Returns:
        [B, S, H, d], contiguous.

    Raises:
        EngineError: The session of this number is gone.
    """
    return _chosen(number)(q, k, v, scale, bounds).contiguous()


def _chosen(number: int) -> Attention:
    """Return the attention of a number.

    Raises:
        EngineError: Its session is gone.
    """
    chosen = _known.get(number)
    if chosen is None:
        raise EngineError("the session that a compiled model was made for is gone", fix="open it again")
    return chosen


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, number: int) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("dvdquant::rope_attention", mutates_args=())
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    bounds: Tensor | None,
    norm: str,
    q_eps: float,
    k_eps: float,
    scale: float,
    number: int,
    kernels: int,
) -> Tensor:
    """Take q and k through their norm and rope in one kernel each, and compute attention as the session of this number does.

    A library that takes e4m3 codes gets those of rotated heads. Any other gets 16 bits, and so does
    the session's first call, which chooses one.

    Args:
        q: [B, S, C], and k [B, S, C], of the layers.
        k: See q.
        v: [B, S, H, d].
        q_weight: fp32 [C] or [d], of the norm of q.
        k_weight: fp32 [C] or [d], of the norm of k.
        cosines: fp32 [S, d/2] or [S, C/2].
        sines: In the same form.
        bounds: fp32 [2], the largest values that q and k can have, or None.
        norm: As of :class:`.Rope`.
        q_eps: What the norm of q adds.
        k_eps: What the norm of k adds.
        scale: What scores are multiplied by.
        number: Of :func:`number_of`.
        kernels: The number of the kernels, of :func:`.handle_of`.

    Returns:
        [B, S, H, d], contiguous.

    Raises:
        EngineError: The session of this number is gone.
        KernelError: The kernels are.
    """
    chosen, library = _chosen(number), kernels_of(kernels)
    head, coded = v.shape[-1], bounds is not None and chosen.takes_codes
    parts = []
    for i, (x, weight, eps) in enumerate(((q, q_weight, q_eps), (k, k_weight, k_eps))):
        bound = bounds[i : i + 1] if coded and bounds is not None else None
        rope = Rope(head, norm, eps, coded, weight, cosines, sines, bound)
        parts.append(run_rope_quantize(library, x, rope).reshape(*x.shape[:2], -1, head))
    return chosen(parts[0], parts[1], v, scale, bounds).contiguous()


@rope_attention.register_fake
def _rope_attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty(v.shape)
