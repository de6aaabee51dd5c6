"""Bounds that follow from number formats, for tests that compare one computation with another.

No bound here was read off a machine. Processors, libraries and thread counts differ in the order of their sums, and in
whether a product is rounded before it is added; a right computation may differ by that, and by no more:

* A sum of n terms has n roundings of at most u of what they round; they are independent, so their sum stays below
  λ·√n·u·‖terms‖ (λ and the reasoning are the layer judge's, :mod:`dvdquant.export.verify.tolerance`).
* A value within that of a rounding boundary of a coarser grid (a tie) may fall on either side. Only such a value may:
  tests name the ties and let them be one step off, instead of allowing an error that holds so many flips on average.

Quantized layers have their bound from the judge itself, :func:`assert_layer`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvdquant.export.passes.fp8_attention import AttentionScales
from dvdquant.export.verify.tolerance import LAMBDA, UNIT, OpInputs, judge
from dvdquant.model.layers import QuantLinear
from dvdquant.quantize.bgr import QuantizedWeight

__all__ = [
    "LAMBDA",
    "UNIT",
    "assert_layer",
    "assert_same_grid",
    "attention_error",
    "e4m3_attention_error",
    "product_error",
    "sum_error",
]


def sum_error(terms: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return how far the sum of ``terms`` [..., n] over the last axis, accumulated in ``dtype``, may be off: [...]."""
    wide = terms.double()
    return LAMBDA * terms.shape[-1] ** 0.5 * UNIT[dtype] * wide.norm(dim=-1)


def product_error(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return how far ``a @ b``, accumulated in ``dtype``, may be off: a [..., K] and b [K, N] to [..., N], fp64."""
    norms = (a.double().square() @ b.double().square()).sqrt()
    return LAMBDA * a.shape[-1] ** 0.5 * UNIT[dtype] * norms


def attention_error(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention in float64 and how far attention in fp32 may be from it, both [B, H, S, d].

    A score is off by its sum's rounding and by a few units of itself (operands that are scaled, the largest score that is taken
    away). A share is off by as much of itself as its own score and the sum of all are, and by the exponential's 4 units.

    Args:
        q, k, v: [B, H, S, d]. keep: bool, which keys count, and broadcasts to the scores.
    """
    unit, q, k, v = UNIT[torch.float32], q.double(), k.double(), v.double()
    scale, turned = q.shape[-1] ** -0.5, k.transpose(-1, -2)
    scores = q @ turned * scale
    off = (product_error(q, turned) * scale + 4 * unit * scores.abs()).masked_fill(~keep, 0.0)
    shares = torch.softmax(scores.masked_fill(~keep, -torch.inf), dim=-1)
    relative = 2 * off.amax(-1, keepdim=True) + (2 * k.shape[-2] + 8) * unit
    return shares @ v, relative * (shares @ v.abs())


def assert_same_grid(w: Tensor, found: QuantizedWeight, other: QuantizedWeight) -> None:
    """Assert that two quantizations of w [N, K], whose scales agree but for 16 roundings, have the same error in every row.

    A restored weight moves by those roundings of itself. A code next to a tie may be the other one, which is as near to the
    weight but for as much again. A group's stored share or a zero-point that lies next to a tie of its own grid is a step off;
    such rows are counted, and there are few.
    """
    rows = len(w)
    same = (found.group_scale == other.group_scale).reshape(rows, -1).all(1)
    same &= (found.zero == other.zero).reshape(rows, -1).all(1)
    restored = found.dequantize(torch.float64)
    first, second = ((w.double() - x).norm(dim=1) for x in (restored, other.dequantize(torch.float64)))
    bound = 3 * 16 * UNIT[torch.float32] * (w.double().norm(dim=1) + restored.norm(dim=1))
    assert bool(((first - second).abs() <= bound)[same].all())
    # A quotient of 16 roundings in steps of 1/255 or 1/16 is next to a tie in 32·255 of 2²⁴ cases.
    expected = found.group_scale.numel() * 32 * 255 * UNIT[torch.float32] * 2
    assert int((~same).sum()) <= expected + LAMBDA * expected**0.5 + 1


def assert_layer(
    layer: QuantLinear | OpInputs, x: Tensor, *outputs: Tensor, rotated_in: torch.dtype = torch.float32
) -> None:
    """Assert that every output is what a quantized layer gives for ``x``, on any processor.

    Args:
        rotated_in: dtype in which the executor holds the rotated input.
    """
    judged = judge(OpInputs.of(layer) if isinstance(layer, QuantLinear) else layer, x, rotated_in)
    for y in outputs:
        share, distance, bound = judged.worst(y)
        assert share <= 1.0, f"{distance:.3g} from float64, of at most {bound:.3g}"


def e4m3_attention_error(
    q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return attention in float64 and how far FP8 attention may be from it, both [B, H, S, d].

    e4m3 has three bits behind its leading one: rounding moves a value by at most 2⁻⁴ of itself, or by 2⁻¹⁰ steps of the scale
    where it is subnormal. With errors δ of the operands (independent, so that a sum of them stays below λ·‖δ‖), to first order::

        δo = Σ_j p_j·(v_j − o)·(δq·k_j + q·δk_j)  +  Σ_j δp_j·v_j  +  Σ_j p_j·δv_j

    The first-order terms are taken one and a half times, for their products. Scores, shares and o are rounded to ``dtype``, too.

    Args:
        q, k, v: [B, H, S, d] fp64, what is rounded to e4m3; q holds 1/√d.
        scales: of q, k, v and the softmax. dtype: of the graph.
    """
    unit = UNIT[dtype]

    def rounding(x: Tensor, scale: float) -> Tensor:
        return torch.maximum(x.abs() * 2.0**-4, torch.full_like(x, scale * 2.0**-10))

    scores = q @ k.transpose(-1, -2)
    p = torch.softmax(scores, dim=-1)
    o = p @ v
    dq, dk, dv = rounding(q, scales.q), rounding(k, scales.k), rounding(v, scales.v)
    dp = rounding(p, scales.p) + 4 * unit * p
    # One key's error is shared by all outputs of a query, one query's by all keys.
    of_keys = (q.square() @ dk.square().transpose(-1, -2)) + (unit * scores).square()
    spread = (v.unsqueeze(-3) - o.unsqueeze(-2)) * p.unsqueeze(-1)  # [B, H, S, S', d]
    by_keys = torch.einsum("bhst,bhstd->bhsd", of_keys, spread.square())
    pulls = torch.einsum("bhtc,bhstd->bhscd", k, spread)  # Σ_j p_j·k_jc·(v_jd − o_d)
    by_queries = torch.einsum("bhsc,bhscd->bhsd", dq.square(), pulls.square())
    squares = by_keys + by_queries + dp.square() @ v.square() + p.square() @ dv.square()
    return o, 1.5 * LAMBDA * squares.sqrt() + 4 * unit * o.abs() + 1e-12
