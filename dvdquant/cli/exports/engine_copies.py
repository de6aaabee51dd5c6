"""What engines of several widths take together, where each holds a copy of the weights of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dvdquant.text import amount

__all__ = ["copies_text", "sum_by_width"]


def sum_by_width(engines: Iterable[tuple[Iterable[str], int, int]]) -> dict[str, dict[int, int]]:
    """Return compute capability -> activation bits -> the bytes of its engines.

    Args:
        engines: The compute capabilities, the activation bits and the bytes of each engine.
    """
    held: dict[str, dict[int, int]] = {}
    for sms, bits, nbytes in engines:
        for sm in sms:
            widths = held.setdefault(sm, {})
            widths[bits] = widths.get(bits, 0) + nbytes
    return held


def copies_text(held: Mapping[str, Mapping[int, int]], sixteen: int, of: str) -> str:
    """Return what the engines of a compute capability take together, or "" where none has two widths.

    Args:
        held: Compute capability -> activation bits -> the bytes of the engines that hold weights themselves.
        sixteen: The bytes of the same weights in 16 bit.
        of: What they are the weights of, in words.
    """
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for sm, widths in held.items():
        if len(widths) > 1:
            groups.setdefault((sum(widths.values()), tuple(sorted(widths))), []).append(sm)
    if not groups or not sixteen:
        return ""
    parts = [
        f"{' and '.join(f'a{width}' for width in bits)} on SM {', '.join(sms)} take {amount(total)} together, "
        f"{total / sixteen:.2f} times the {amount(sixteen)} of {of} in 16 bit"
        for (total, bits), sms in groups.items()
    ]
    return (
        f"each engine holds a copy of the weights of its own: {'; '.join(parts)}. "
        f"One alone: --activations {max(width for _, bits in groups for width in bits)}"
    )
