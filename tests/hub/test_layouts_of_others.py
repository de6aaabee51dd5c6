"""Why codes are not written in ComfyUI's ConvRot layout (docs/hub.md): its grid is another one, by comfy-kitchen itself."""

from __future__ import annotations

import pytest
import torch

from dvdquant.numerics.hadamard import Rotation, hadamard_matrix, rotate
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.recipe import WeightSpec


@pytest.fixture(scope="module")
def kitchen() -> object:
    return pytest.importorskip("comfy_kitchen", reason="needs comfy-kitchen: the extra dvdquant[attention]")


def regular(kitchen: object, order: int) -> torch.Tensor:
    """ConvRot's matrix, read off what it does to an identity: W̃ = W·Hᵀ, and back with the same call."""
    from comfy_kitchen.backends.eager.convrot_w4a4 import _build_hadamard

    matrix: torch.Tensor = _build_hadamard(order, dtype=torch.float64)
    return matrix


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_no_signed_permutation_leads_from_one_rotation_to_the_other(kitchen: object, order: int) -> None:
    between = hadamard_matrix(order).T @ regular(kitchen, order)
    assert torch.allclose(between @ between.T, torch.eye(order, dtype=torch.float64))
    # A permutation with signs has one ±1 in each row.
    assert float(between.abs().max()) <= 0.5 + 1e-9 if order == 4 else float(between.abs().max()) < 1


def test_a_weight_on_our_grid_is_off_theirs(kitchen: object) -> None:
    """Even with the zero-point that both have, a second quantization costs as much error again as the first."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 512, generator=generator)
    rotation = Rotation.for_features(512, "auto")
    assert rotation.block == 256
    ours = quantize_weight(rotate(weight, rotation), WeightSpec(zero_point="symmetric"))
    steps = ours.scale[:, None] * (ours.group_scale.float() / 255).repeat_interleave(
        512 // ours.group_scale.shape[1], 1
    )
    held = rotate(
        (ours.codes.float() - ours.zero.reshape(-1, 1).float()) * steps, rotation
    )  # of order 4ᵏ: its own inverse
    first = float((held - weight).norm() / weight.norm())
    codes, scales = kitchen.quantize_convrot_w4a4_weight(held)  # type: ignore[attr-defined]
    theirs = kitchen.dequantize_convrot_w4a4_weight(codes, scales)  # type: ignore[attr-defined]
    second = float((theirs - held).norm() / held.norm())
    assert 0.05 < first < 0.2
    assert second > 0.8 * first
