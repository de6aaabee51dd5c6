"""Static scales of e4m3 attention: what the norms of q and k say about their values, without data.

Both executors use this: sessions in PyTorch (``deploy/sessions/attention.py``) and engines
(``export/passes/fp8_attention.py``).
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["longest_row", "pair_exponents"]

MOST_SHIFT = 12


def pair_exponents(q: Tensor, k: Tensor) -> Tensor:
    """Return by which power of two q is multiplied, and k divided, per rope pair, so that both are about as large.

    A channel that is large in k and small in q takes k's grid for itself. The factor leaves every product of q and k, and
    every digit of the norm weights. Rope mixes the two channels of a pair, so they have one.

    Args:
        q: The sizes of the pairs' norm weights in q, fp32 [n/2].
        k: The sizes in k, fp32 [n/2].

    Returns:
        Whole numbers as fp32 [n/2], the nearest to half of log2(k/q), within ±12; 0 where a size is 0 or no number.
    """
    exponents = (0.5 * (k / q).log2()).round()
    return exponents.nan_to_num(0.0, 0.0, 0.0).clamp(-MOST_SHIFT, MOST_SHIFT)


def longest_row(channels: int, weight: Tensor | None, bias: Tensor | None) -> float:
    """Return the length that a row behind an RMS or layer norm has at most: ``√n·max|w| + ‖b‖``.

    Rope and a rotation keep it, and no value of the row is larger.

    Args:
        channels: n, the number of channels that the norm is over.
        weight: Its weight [n], any floating dtype, or None for ones.
        bias: Its bias [n], or None.
    """
    largest = 1.0 if weight is None else float(weight.float().abs().amax())
    return float(channels**0.5 * largest + (0.0 if bias is None else float(bias.float().norm())))
