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

from dvdquant.export.verify.tolerance import LAMBDA, UNIT, OpInputs, judge
from dvdquant.model.layers import QuantLinear

__all__ = ["LAMBDA", "UNIT", "assert_layer", "product_error", "sum_error"]


def sum_error(terms: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return how far the sum of ``terms`` [..., n] over the last axis, accumulated in ``dtype``, may be off: [...]."""
    wide = terms.double()
    return LAMBDA * terms.shape[-1] ** 0.5 * UNIT[dtype] * wide.norm(dim=-1)


def product_error(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return how far ``a @ b``, accumulated in ``dtype``, may be off: a [..., K] and b [K, N] to [..., N], fp64."""
    norms = (a.double().square() @ b.double().square()).sqrt()
    return LAMBDA * a.shape[-1] ** 0.5 * UNIT[dtype] * norms


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
