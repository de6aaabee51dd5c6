"""What a GPU holds of published models: counted from their plans, and by the kernels' own library."""

from __future__ import annotations

import pytest
import torch

from benchmarks.held_weights import plan_of
from dvdquant.export.estimate import packed_bytes
from dvdquant.hardware.capabilities import CAPABILITIES, sm_number
from dvdquant.hardware.weights import OPERATIONS_PER_BYTE
from dvdquant.model.families import Axis, Sizes
from dvdquant.model.held_weights import held_weights, largest_kept, shape_of
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.packed_rows import group_bytes
from tests.support.emulated_kernels import library as library

SMS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("wan2.1-1.3b", "w4a4-g64"),
        pytest.param("wan2.1-14b", "w4a4", marks=pytest.mark.stress),
        pytest.param("hunyuan-video", "w4a4", marks=pytest.mark.stress),
        ("wan2.1-1.3b", "w4a8"),
        pytest.param("wan2.1-1.3b", "paper", marks=pytest.mark.stress),
    ],
)
def test_both_widths_hold_little_more_than_the_files_on_every_gpu(
    name: str, recipe: str, library: KernelLibrary
) -> None:
    plan = plan_of(name, recipe)
    files = packed_bytes(plan)
    bits = (8,) if recipe == "w4a8" else (4, 8)
    for sm in SMS:
        held = held_weights(plan, sm, bits)
        assert held.nbytes("packed") + held.scratch <= 1.1 * files
        assert held.nbytes("packed", plugin=True) + held.scratch <= 1.1 * files
        # The bytes are the library's own.
        packed, expanded, scratch = 0, 0, 0
        for spec in plan.layers:
            layers = {width: shape_of(spec, plan, width) for width in bits}
            forms = {}
            for layer in layers.values():
                found = library.plan_layer(layer, sm)
                forms[found.form] = found.prepared_bytes
                space = library.packed_workspace_bytes(layer, sm, 0) - library.workspace_bytes(layer, sm, 0)
                assert space == (0 if found.codes == "s4" else found.prepared_bytes)
                scratch = max(scratch, space)
            packed += spec.out_features * spec.features // 2 + sum(group_bytes(layer)) + library.rows_bytes(layer, sm)
            expanded += sum(forms.values())
        assert (held.packed, held.expanded, held.scratch) == (packed, expanded, scratch)
        assert held.packed < held.expanded


def test_the_cost_is_that_of_the_traffic() -> None:
    plan = plan_of("wan2.1-1.3b", "w4a4")
    sizes = Sizes(Axis(21, 21, 21), Axis(60, 60, 60), Axis(104, 104, 104), 512)
    held = held_weights(plan, 90, (4, 8), sizes)
    weights = plan.quantized_weights
    assert dict(held.traffic) == {4: weights * 3 // 2, 8: weights * 3 // 2}
    tokens = plan.family.tokens(*sizes.at("opt"))
    products = 0.75 * OPERATIONS_PER_BYTE[90] / tokens
    assert 0 < held.cost < products
    native = held_weights(plan, 80, (4, 8), sizes)
    assert dict(native.traffic) == {4: 0, 8: weights * 3 // 2}
    assert held_weights(plan, 80, (4,), sizes).cost == 0
    # Where 16 bit is many times as fast as INT8, attention takes little beside the products.
    slow = held_weights(plan, 103, (8,), sizes).cost
    assert 0.8 < slow / (0.75 * OPERATIONS_PER_BYTE[103] / tokens) < 1


def test_every_gpu_with_kernels_has_its_figures() -> None:
    assert set(OPERATIONS_PER_BYTE) == {sm_number(sm) for sm, c in CAPABILITIES.items() if c.kernels and not c.refused}


def test_what_stays_in_16_bit_is_listed_by_size() -> None:
    plan = plan_of("wan2.1-1.3b", "w4a4")
    kept = largest_kept(plan)
    assert [t.nbytes for t in kept] == sorted((t.nbytes for t in kept), reverse=True)
    assert len(kept) == 8
    everything = largest_kept(plan, None)
    assert sum(t.nbytes for t in everything) == packed_bytes(plan) - sum(
        dtype.itemsize * torch.Size(shape).numel() for spec in plan.layers for dtype, shape in spec.tensors().values()
    )
