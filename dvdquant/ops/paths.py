"""Which path multiplies a layer on a GPU: the table of kernels/csrc/plan.cpp, for those who have no kernel library.

``make gpu-check`` and tests/kernels/test_packed_weights.py hold the two against each other.
"""

from __future__ import annotations

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.ops.repack import LayerShape

__all__ = ["choose_path", "form_of"]


def choose_path(layer: LayerShape, sm: int) -> str:
    """Return the path of a layer, one of :data:`dvdquant.ops.repack.PATHS`.

    Args:
        layer: The layer.
        sm: The compute capability, major · 10 + minor.

    Raises:
        UnsupportedError: No path runs the layer.
        ShapeError: K or the weight groups have a size that no kernel takes.
    """
    if sm < 80 or 90 < sm < 100:
        raise UnsupportedError(f"SM {sm / 10}", available="SM 8.0 to 8.9, 9.0, and 10.0 and later")
    if layer.act_bits not in (4, 8) or layer.act_group not in (0, 64, 128):
        raise UnsupportedError(
            f"{layer.act_bits}-bit activations in groups of {layer.act_group}",
            available="4 and 8 bits; groups of 64 and 128, and the whole token",
            fix="export with recipe w4a4, w4a4-g64, w4a4-g128 or w4a8",
        )
    if layer.k % 32 or layer.k // layer.weight_groups % 8:
        raise ShapeError(
            f"k = {layer.k} in {layer.weight_groups} weight groups", available="k % 32 == 0, groups of 8·i"
        )
    native, by_row = sm < 90, layer.weight_groups == 1
    path = "s8_group"
    if layer.act_group == 0:
        path = "s8_wgmma" if sm == 90 else "s4_token" if native and layer.act_bits == 4 and by_row else "s8_token"
    elif layer.act_bits == 4:
        whole = by_row or layer.k // layer.weight_groups % layer.act_group == 0
        if native and whole:
            path = "s4_group"
        if sm == 90 and layer.act_group == 128 and by_row and layer.n % 8 == 0:
            path = "e4m3_group"
    return path


def form_of(path: str) -> str:
    """Return the form in which a path holds its weight: ``s4``, ``s8`` or ``e4m3``.

    Args:
        path: One of :data:`dvdquant.ops.repack.PATHS`.
    """
    return path.partition("_")[0]
