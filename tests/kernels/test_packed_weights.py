"""Weights that stay packed, on the emulated kernels: expanded to the bytes of prepare_weight, and outputs of the same bits."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from dvdquant.errors import DvdquantError, ResourceError, ShapeError, UnsupportedError
from dvdquant.ops import packed_rows, repack
from dvdquant.ops.cuda.arguments import WeightPointers
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.paths import choose_path, form_of
from dvdquant.ops.repack import LayerShape, padded
from tests.support.emulated_kernels import library as library
from tests.support.guarded_calls import (
    AMPERE,
    BLACKWELL,
    HOPPER,
    LAYER_CASES,
    PREPARE_CASES,
    Buffer,
    filled,
    outer_matrix,
    prepare,
    stored_weight,
    token_rows,
)

SMS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def make_rows(
    library: KernelLibrary, layer: LayerShape, sm: int, weight: tuple[torch.Tensor, ...], bias: bool = True
) -> tuple[WeightPointers, Buffer, list[Buffer]]:
    """What a product reads of a packed weight, its rows, and all buffers of it; guards checked.

    Scale and bias are not read any more, nor anything of groups where there are none.
    """
    buffers = [filled(part) for part in weight]
    size = library.rows_bytes(layer, sm)
    rows = Buffer(size)
    pointers = WeightPointers(*(b.address for b in buffers[:4]), bias=buffers[4].address if bias else 0)
    library.make_rows(layer, sm, pointers, rows.address, size, 0)
    for buffer in (*buffers, rows):
        buffer.check_guards()
    grouped = layer.weight_groups > 1
    group_scale = buffers[2].address if grouped else 0
    zero = buffers[3].address if grouped and layer.float_zero_point else 0
    return WeightPointers(buffers[0].address, 0, group_scale, zero), rows, [*buffers, rows]


# More than 256 groups: their tables do not fit shared memory at once; groups of 24 channels: no power of two.
EXPAND_CASES = [
    *PREPARE_CASES,
    (3, 4160, 260, True, 8, 0, HOPPER, "", "s8_wgmma"),
    (3, 2304, 288, False, 8, 0, BLACKWELL, "mixed", "s8_token"),
    (5, 96, 4, True, 8, 0, AMPERE, "", "s8_token"),
    (2, 8192, 1, False, 8, 0, HOPPER, "mixed", "s8_wgmma"),
]


@pytest.mark.parametrize("case", EXPAND_CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_packed_weight_expands_to_the_bytes_of_the_prepared_one(
    library: KernelLibrary, case: tuple[int, ...]
) -> None:
    n, k, groups, float_zero, bits, group, sm, zeros, path = case
    layer = LayerShape(n, k, groups, bool(float_zero), 1, 1, bits, group)
    weight = stored_weight(layer, str(zeros))
    for bias in (True, False):
        held_weight, rows, buffers = make_rows(library, layer, sm, weight, bias)
        # 1. The rows are those of the numpy definition.
        stored = (*weight[:4], weight[4] if bias else None)
        expected = packed_rows.make_rows(layer, *stored)
        assert rows.bytes.size == packed_rows.rows_bytes(layer) == len(expected)
        for start in range(0, len(expected), padded(4 * n)):
            assert rows.bytes[start : start + 4 * n].tobytes() == expected[start : start + 4 * n], start
        # 2. What is expanded from them is what is prepared from the stored tensors; so in numpy.
        prepared = repack.from_bytes(layer, str(path), prepare(library, layer, sm, weight, bias).bytes.tobytes())
        held = packed_rows.expand(layer, str(path), weight[0], expected, weight[2], weight[3])
        expansions = [held]
        if str(path).startswith("s4"):
            with pytest.raises(UnsupportedError, match="multiplies the packed weight itself"):
                library.expand_weight(layer, sm, held_weight, rows.address, rows.address, rows.bytes.size, 0)
        else:
            plan = library.plan_layer(layer, sm)
            out = Buffer(plan.prepared_bytes)
            library.expand_weight(layer, sm, held_weight, rows.address, out.address, plan.prepared_bytes, 0)
            for buffer in (*buffers, out):
                buffer.check_guards()
            expansions.append(repack.from_bytes(layer, str(path), out.bytes.tobytes()))
        for found in expansions:
            for name in ("codes", "row_scale", "row_zero", "bias", "group_scale", "group_zero"):
                left, right = getattr(found, name), getattr(prepared, name)
                assert (left is None) == (right is None), name
                if left is not None:
                    assert left.tobytes() == right.tobytes(), name


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: "-".join(map(str, case)))
def test_outputs_have_the_bits_of_the_prepared_weight(library: KernelLibrary, case: tuple[int, ...]) -> None:
    n, k, groups, float_zero, block, outer, bits, group, sm, m = case
    layer = LayerShape(n, k, groups, bool(float_zero), block, outer, bits, group)
    weight, x = stored_weight(layer, ""), token_rows(m, k)
    source, matrix = filled(x), outer_matrix(layer)
    address = matrix.address if matrix else 0
    # 1. The prepared weight.
    prepared, wanted = prepare(library, layer, sm, weight, bias=True), Buffer(2 * m * n)
    space = Buffer(library.workspace_bytes(layer, sm, m))
    library.quant_linear(
        layer, sm, source.address, address, prepared.address, wanted.address, m, space.address, space.bytes.size, 0
    )
    # 2. The packed one. One workspace serves it twice: what a call leaves there is no input of the next.
    held, rows, buffers = make_rows(library, layer, sm, weight)
    space, y = Buffer(library.packed_workspace_bytes(layer, sm, m)), Buffer(2 * m * n)
    scratch = space.bytes.size - library.workspace_bytes(layer, sm, m)
    path = library.plan_layer(layer, sm).path
    assert (scratch == 0) == path.startswith("s4")
    assert scratch < library.plan_layer(layer, sm).prepared_bytes + 256
    for _ in range(2):
        y.bytes[:] = 0xAB
        library.packed_linear(
            layer, sm, source.address, address, held, rows.address, y.address, m, space.address,
            space.bytes.size, 0,
        )  # fmt: skip
        for buffer in (space, y, *buffers):
            buffer.check_guards()
        assert y.bytes.tobytes() == wanted.bytes.tobytes()


def test_the_order_of_threads_does_not_matter(library: KernelLibrary) -> None:
    layer = LayerShape(4, 4160, 260, True, 1, 1, 8, 0)
    held, rows, _buffers = make_rows(library, layer, HOPPER, stored_weight(layer, ""))
    size = library.plan_layer(layer, HOPPER).prepared_bytes
    found = set()
    for seed in (0, 1, 2):
        library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(seed))
        out = Buffer(size)
        library.expand_weight(layer, HOPPER, held, rows.address, out.address, size, 0)
        found.add(out.bytes.tobytes())
    library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(0))
    assert len(found) == 1


def test_paths_in_python_are_those_of_the_library(library: KernelLibrary) -> None:
    layers = [
        LayerShape(n, 512, groups, float_zero, 1, 1, bits, group)
        for n in (8, 13)
        for groups, float_zero in ((1, False), (4, True), (8, False), (32, True))
        for bits in (4, 6, 8)
        for group in (0, 32, 64, 128)
    ]
    for sm in (75, *SMS, 95, 130):
        for layer in layers:
            try:
                plan = library.plan_layer(layer, sm)
            except DvdquantError as error:
                with pytest.raises(type(error)):
                    choose_path(layer, sm)
                continue
            assert choose_path(layer, sm) == plan.path
            assert form_of(plan.path) == plan.codes
            assert repack.prepared_bytes(layer, plan.path) == plan.prepared_bytes
            assert library.rows_bytes(layer, sm) == packed_rows.rows_bytes(layer)


def test_pointers_and_sizes_are_checked(library: KernelLibrary) -> None:
    layer = LayerShape(8, 256, 1, False, 256, 1, 8, 0)
    buffer = Buffer(1 << 15)
    here = buffer.address
    with pytest.raises(ResourceError, match="rows of the weight need"):
        library.make_rows(layer, HOPPER, WeightPointers(here, here, here, here), here, 256, 0)
    with pytest.raises(ShapeError, match="rows is not aligned to 256 bytes"):
        library.make_rows(layer, HOPPER, WeightPointers(here, here, here, here), here + 16, 1 << 14, 0)
    codes, none = WeightPointers(here, 0, 0, 0), WeightPointers(0, 0, 0, 0)
    with pytest.raises(ShapeError, match=r"weight.codes is not aligned to 16 bytes"):
        library.packed_linear(
            layer, HOPPER, here, 0, WeightPointers(here + 8, 0, 0, 0), here, here, 1, here, 1 << 15, 0
        )
    grouped = LayerShape(8, 256, 8, True, 1, 1, 8, 0)
    for weight, name in ((codes, "group_scale"), (WeightPointers(here, 0, here, 0), "zero")):
        with pytest.raises(ShapeError, match=f"weight.{name} is null"):
            library.packed_linear(grouped, HOPPER, here, 0, weight, here, here, 1, here, 1 << 15, 0)
    with pytest.raises(ResourceError, match=r"need \d+ bytes of workspace, the buffer has 256"):
        library.packed_linear(layer, HOPPER, here, 0, codes, here, here, 4, here, 256, 0)
    with pytest.raises(ResourceError, match="expanded weight needs"):
        library.expand_weight(layer, HOPPER, codes, here, here, 256, 0)
    library.packed_linear(layer, HOPPER, 0, 0, none, 0, 0, 0, 0, 0, 0)  # no tokens: nothing to do, nothing read
    with pytest.raises(UnsupportedError, match=r"SM 7\.5"):
        library.rows_bytes(layer, 75)
    with pytest.raises(ShapeError, match="rows of 3 bytes"):
        packed_rows.expand(layer, "s8_token", np.zeros((8, 128), np.int8), b"abc")
