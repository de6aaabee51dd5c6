"""``dvdquant::attention``: attention by whatever a session chose, as one opaque operation of a compiled model."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from dvdquant.errors import EngineError
from dvdquant.ops.attention.ladder import Attention
from dvdquant.ops.attention.rope import Rope, run_rope_quantize
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.prepared_linear import kernels_of

__all__ = ["attention", "number_of", "rope_attention"]

_numbers = itertools.count(1)
_known: weakref.WeakValueDictionary[int, Attention] = weakref.WeakValueDictionary()


def number_of(chosen: Attention) -> Tensor:
    """Return a new number by which :func:`attention` finds ``chosen``: an operation takes no Python objects.

    It is a tensor, which a compiled model reads at every call. A plain number would be a constant of the compiled code, so
    that every session, and every process, would compile anew.

    Args:
        chosen: The attention that a session has taken.

    Returns:
        int64 [], on the CPU.
    """
    number = next(_numbers)
    _known[number] = chosen
    # Sessions are alike for the compiler only if this is, wherever they were opened.
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.int64, device="cpu")


@torch.library.custom_op("dvdquant::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, number: Tensor) -> Tensor:
    """Compute attention as the session of this number does.

    Args:
        q: [B, S, H, d] in 16 bit (fp32 on a CPU).
        k: [B, T, H, d] of the dtype of q.
        v: [B, T, H, d] of the dtype of q.
        bounds: fp32 [2], the largest values that q and k can have, or None.
        scale: The factor of the scores.
        number: The number of the session's attention, int64, from :func:`number_of`.

    Returns:
        [B, S, H, d], contiguous.

    Raises:
        EngineError: The session of this number is gone.
    """
    return _chosen(number)(q, k, v, scale, bounds).contiguous()


def _chosen(number: Tensor) -> Attention:
    """Return the attention of a number.

    Raises:
        EngineError: Its session is gone.
    """
    chosen = _known.get(int(number))
    if chosen is None:
        raise EngineError("the session that a compiled model was made for is gone", fix="open it again")
    return chosen


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, number: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("dvdquant::rope_attention", mutates_args=())
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    bounds: Tensor | None,
    norm: str,
    q_eps: float,
    k_eps: float,
    text_q_eps: float,
    text_k_eps: float,
    first: int,
    per_channel: bool,
    scale: float,
    number: Tensor,
    kernels: int,
) -> Tensor:
    """Take q and k through their norm and rope in one kernel each, and compute attention as the session of this number does.

    A library that takes e4m3 codes gets those of rotated heads. Any other gets 16 bits, and so does
    a call that chooses one: the session's first, and the one at which a library fails.

    Args:
        q: [B, S, C], the output of the layer of q.
        k: [B, S, C], the output of the layer of k.
        v: [B, S + T, H, d], and [B, S, H, d] without text of its own.
        text_q: [B, T, C], text tokens behind those of q, of a layer of their own: they have a norm and no rope. Or None.
        text_k: [B, T, C], text tokens behind those of k, as text_q. Or None.
        q_weight: fp32 [C] or [d], of the norm of q.
        k_weight: fp32 [C] or [d], of the norm of k.
        text_q_weight: In the same form, of the norm of text_q.
        text_k_weight: In the same form, of the norm of text_k.
        q_bias: In the same form, of the norm of q.
        k_bias: In the same form, of the norm of k.
        cosines: Tables of the rope of q and k, as of :class:`.Rope`.
        sines: In the same form.
        bounds: fp32 [2], the largest values that q and k can have, or None.
        norm: ``none``, ``all``, ``head`` or ``layer``, see :class:`.Rope`.
        q_eps: The number that the norm of q adds to the mean of squares, or to the variance.
        k_eps: The same of the norm of k.
        text_q_eps: The same of the norm of text_q.
        text_k_eps: The same of the norm of text_k.
        first: The token of a sample that the tables' first row is for.
        per_channel: Whether both channels of a pair have a cosine and a sine of their own.
        scale: The factor of the scores.
        number: The number of the session's attention, int64, from :func:`number_of`.
        kernels: The number of the kernels, of :func:`.handle_of`.

    Returns:
        [B, S + T, H, d], contiguous.

    Raises:
        EngineError: The session of this number is gone.
        KernelError: The kernels are.
    """
    chosen, library, head = _chosen(number), kernels_of(kernels), v.shape[-1]
    sides = (
        (q, q_weight, q_bias, q_eps, text_q, text_q_weight, text_q_eps),
        (k, k_weight, k_bias, k_eps, text_k, text_k_weight, text_k_eps),
    )

    def heads(coded_by: Tensor | None) -> tuple[Tensor, Tensor]:
        operands = []
        for i, (x, weight, bias, eps, text, text_weight, text_eps) in enumerate(sides):
            coded, bound = coded_by is not None, None if coded_by is None else coded_by[i : i + 1]
            parts = [(x, Rope(head, norm, eps, coded, weight, cosines, sines, bound, bias, first, per_channel))]
            if text is not None:
                parts.append((text, Rope(head, norm, text_eps, coded, text_weight, bound=bound)))
            joined = _joined(library, parts)
            operands.append(joined.reshape(*joined.shape[:2], -1, head))
        return operands[0], operands[1]

    out = None
    if bounds is not None and chosen.takes_codes:
        out = chosen.of_codes(*heads(bounds), v, scale, bounds)
    if out is None:
        out = chosen(*heads(None), v, scale, bounds)
    return out.contiguous()


def _joined(kernels: CudaKernels, parts: list[tuple[Tensor, Rope]]) -> Tensor:
    """Return what becomes of several tensors [B, S, C], one behind the other: every kernel writes to its place."""
    if len(parts) == 1:
        return run_rope_quantize(kernels, *parts[0])
    (x, rope), tokens = parts[0], sum(part.shape[1] for part, _ in parts)
    dtype = x.dtype if rope.bound is None else torch.float8_e4m3fn
    out = kernels.allocate((x.shape[0], tokens, x.shape[2]), dtype, x.device)
    for sample in range(x.shape[0]):
        start = 0
        for part, through in parts:
            end = start + part.shape[1]
            run_rope_quantize(kernels, part[sample : sample + 1], through, out[sample : sample + 1, start:end])
            start = end
    return out


@rope_attention.register_fake
def _rope_attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty(v.shape)
