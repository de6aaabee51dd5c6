"""``dvdquant::attention``: attention by whatever a session chose, as one opaque operation of a compiled model."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from dvdquant.errors import EngineError
from dvdquant.ops.attention.ladder import Attention

__all__ = ["attention", "number_of"]

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
    chosen = _known.get(number)
    if chosen is None:
        raise EngineError("the session that a compiled model was made for is gone", fix="open it again")
    return chosen(q, k, v, scale, bounds).contiguous()


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, number: int) -> Tensor:
    return q.new_empty(q.shape)
