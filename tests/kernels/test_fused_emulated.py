"""The kernel that takes a residual, a norm and a modulation, or GELU, on the way to the codes: emulated, against float64."""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dvdquant.errors import ResourceError, ShapeError, UnsupportedError
from dvdquant.numerics.hadamard import hadamard_matrix
from dvdquant.ops.cuda.arguments import ProloguePointers
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.fused import (
    Prologue,
    apply_prologue,
    fused_linear,
    fused_quantize,
    run_fused_linear,
    run_fused_quantize,
    run_packed_fused_linear,
)
from dvdquant.ops.linear_gemm import decode_codes
from dvdquant.ops.prepared_linear import handle_of
from dvdquant.ops.repack import LayerShape
from tests.support.emulated_kernels import library as library
from tests.support.emulated_kernels import one_thread  # noqa: F401

sys.path[:0] = [str(Path(__file__).parents[2] / "kernels" / folder) for folder in ("", "bench", "check")]

from check_fused import CASES, FusedCase, exact_input, judge_fused, make_fused, make_stored  # noqa: E402
from check_kernels import GuardedKernels  # noqa: E402

CPU = torch.device("cpu")
AMPERE, HOPPER, BLACKWELL = 89, 90, 120


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index].k}-{CASES[index].norm}")
def test_what_comes_before_a_layer_against_float64(library: KernelLibrary, index: int) -> None:
    """Dtypes and SMs take turns, so that every kind of codes and both dtypes are in it."""
    for turn in (0, 1):
        sm = (AMPERE, HOPPER, BLACKWELL)[(index + turn) % 3]
        kernels = GuardedKernels(library, sm)
        verdict = judge_fused(kernels, *make_fused(CASES[index], ("bf16", "fp16")[(index // 3 + turn) % 2], CPU))
        assert verdict.passed, verdict.note


def test_what_norms_see_at_their_edges(library: KernelLibrary) -> None:
    """Zeros, equal channels, one channel, and values whose squares are near the largest of fp32."""
    layer = LayerShape(8, 1536, 1, False, 256, 1, 8, 0)
    x = torch.zeros(5, 1536, dtype=torch.bfloat16)
    x[1], x[2, 700], x[3] = 7.0, 100.0, torch.randn(1536).to(torch.bfloat16) * 1e17
    x[4, ::2] = 3.0
    for norm in ("layer", "rms"):
        verdict = judge_fused(GuardedKernels(library, HOPPER), layer, x, Prologue(norm=norm), None)
        assert verdict.passed, verdict.note


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("norm", ["layer", "gelu"])
def test_nan_and_inf_reach_the_scale(library: KernelLibrary, group: int, norm: str) -> None:
    layer = LayerShape(8, 1536, 1, False, 256, 1, 4, group)
    x = torch.randn(6, 1536, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    prologue = Prologue(gelu=True) if norm == "gelu" else Prologue(norm=norm)
    kernels = GuardedKernels(library, AMPERE)
    clean = run_fused_quantize(kernels, layer, x, prologue)
    x[1, 700], x[2, 0], x[3, 1535], x[4, 255] = math.nan, math.inf, -math.inf, math.nan
    codes, scales, _, _ = run_fused_quantize(kernels, layer, x, prologue)
    for token in (0, 5):
        assert torch.equal(codes[token], clean[0][token])
    for token, channel in ((1, 700), (2, 0), (3, 1535), (4, 255)):
        bad = ~scales[:, token].isfinite()
        assert bad.all() if norm == "layer" or not group else bad[channel // 256 * 2 : channel // 256 * 2 + 2].all()
        values = decode_codes(codes, "s4_group")[token].reshape(len(scales), -1)
        assert (values[bad] == 0).all()


def test_thread_order_does_not_matter(library: KernelLibrary) -> None:
    layer, x, prologue, pre_quant = make_fused(CASES[0], "bf16", CPU)
    expected = run_fused_quantize(GuardedKernels(library, HOPPER), layer, x, prologue, pre_quant)
    for seed in (1, 2, 3):
        library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(seed))
        for left, right in zip(
            expected, run_fused_quantize(GuardedKernels(library, HOPPER), layer, x, prologue, pre_quant)
        ):
            assert torch.equal(left, right)
    library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(0))


def test_a_layer_in_one_call(library: KernelLibrary) -> None:
    """RQ with a prologue and QL: as QL of what RQ gives, and h beside it."""
    kernels = GuardedKernels(library, AMPERE)
    layer, x, prologue, pre_quant = make_fused(FusedCase(512, 64, 4, 128, 5, "layer", True, 1, 1), "bf16", CPU)
    rng = np.random.default_rng(0)
    size = kernels.plan(layer).prepared_bytes
    prepared = kernels.allocate((size,), torch.uint8, x.device)
    prepared.copy_(torch.from_numpy(rng.integers(0, 60, size, dtype=np.uint8)))
    codes, scales, sums, hidden = run_fused_quantize(kernels, layer, x, prologue, pre_quant)
    y, other = run_fused_linear(kernels, layer, x, prologue, prepared, pre_quant)
    assert kernels.intact()
    assert torch.equal(hidden, other)
    wanted = kernels.linear_gemm(layer, codes, scales, sums, prepared)
    assert torch.equal(y.view(torch.int16), wanted.view(torch.int16))
    rest = (prepared, None, pre_quant, handle_of(kernels), 8, 1, False, 64, 4, 128)
    parts = (prologue.y, prologue.gate, prologue.multiplier, prologue.addend)
    batch = [part[None] if part is not None else None for part in (x, *parts)]
    operation, residual = fused_linear(*batch, "layer", False, prologue.eps, *rest)
    assert torch.equal(operation[0].view(torch.int16), wanted.view(torch.int16))
    assert torch.equal(residual[0], hidden)


@pytest.mark.parametrize("sm", [AMPERE, HOPPER, BLACKWELL])
@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 128), (8, 0)])
def test_a_weight_that_stays_packed(library: KernelLibrary, sm: int, bits: int, group: int) -> None:
    """As RQ with a prologue, and QL on the prepared weight, bit for bit; no second copy of the weight is made on any path."""
    kernels = GuardedKernels(library, sm)
    layer, x, prologue, pre_quant = make_fused(FusedCase(512, 64, bits, group, 5, "layer", True, 1, 1), "bf16", CPU)
    layer = replace(layer, weight_groups=8, float_zero_point=True) if group else layer
    stored = make_stored(layer, CPU)
    held = kernels.make_rows(layer, stored)
    before = [tensor.clone() for tensor in held]
    y, hidden = run_packed_fused_linear(kernels, layer, x, prologue, *held, pre_quant)
    assert kernels.intact()
    assert all(torch.equal(tensor, was) for tensor, was in zip(held, before, strict=True))
    codes, scales, sums, other = run_fused_quantize(kernels, layer, x, prologue, pre_quant)
    wanted = kernels.linear_gemm(layer, codes, scales, sums, kernels.prepare(layer, stored))
    assert torch.equal(hidden, other)
    assert torch.equal(y.view(torch.int16), wanted.view(torch.int16))
    grid = (layer.weight_groups, layer.float_zero_point, 64, bits, group)
    parts = (prologue.y, prologue.gate, prologue.multiplier, prologue.addend)
    rest = (held[0], held[1], pre_quant, handle_of(kernels), -1, *grid)
    operation, residual = fused_linear(x, *parts, "layer", False, prologue.eps, *rest)
    assert torch.equal(operation.view(torch.int16), wanted.view(torch.int16))
    assert torch.equal(residual, hidden)


def test_what_a_packed_fused_layer_refuses(library: KernelLibrary) -> None:
    kernels = GuardedKernels(library, AMPERE)
    layer, x, _, _ = make_fused(FusedCase(512, 64, 4, 0, 5, "layer", True, 1, 1), "bf16", CPU)
    codes, rows = kernels.make_rows(layer, make_stored(layer, CPU))
    with pytest.raises(UnsupportedError, match="outer factor of 4"):
        run_packed_fused_linear(kernels, replace(layer, outer=4), x, Prologue(gelu=True), codes, rows)
    pointers, here = kernels.packed_pointers(layer, codes, rows), x.data_ptr()
    arguments = (layer, AMPERE, ProloguePointers(norm="rms"), here, pointers, rows.data_ptr(), here, 5, rows.data_ptr())
    with pytest.raises(ResourceError, match="5 tokens need"):
        library.packed_fused_linear(*arguments, 16, 0)
    library.packed_fused_linear(layer, AMPERE, ProloguePointers(), 0, pointers, 0, 0, 0, 0, 0, 0)  # no tokens


def test_rows_may_lie_anywhere(library: KernelLibrary) -> None:
    """Rows of an odd stride or address, one row of a wider table, and a multiplier that lies otherwise than its addend."""
    kernels = GuardedKernels(library, HOPPER)
    layer, x, prologue, _ = make_fused(FusedCase(288, 32, 8, 0, 6, "layer", True, 3, 3), "bf16", CPU)
    rows = torch.randn(3, 288, generator=torch.Generator().manual_seed(1))

    def laid(width: int, first: int) -> torch.Tensor:
        """The rows in a table of this width that starts so many floats after an aligned address."""
        memory = torch.zeros(first + 3 * width)
        memory[first:].reshape(3, width)[:, :288] = rows
        return memory[first:].reshape(3, width)[:, :288]

    for count in (1, 3):
        plain = replace(prologue, gate=rows[:count], multiplier=rows[:count], addend=rows[:count])
        wanted = run_fused_quantize(kernels, layer, x, plain)
        other = laid(288, 1)[:count]
        for width, first in ((288, 1), (289, 0), (290, 2), (292, 0)):
            here = laid(width, first)[:count]
            for multiplier, addend in ((here, other), (other, here)):
                moved = replace(prologue, gate=here, multiplier=multiplier, addend=addend)
                for left, right in zip(wanted, run_fused_quantize(kernels, layer, x, moved), strict=True):
                    assert torch.equal(left, right), (count, width, first)


def test_the_definition_is_what_the_operation_computes() -> None:
    """On a CPU: the operation, its fake kernel, and float64 throughout."""
    _, x, prologue, pre_quant = make_fused(CASES[1], "bf16", CPU)
    arguments = (
        x, prologue.y, prologue.gate, prologue.multiplier, prologue.addend, prologue.norm, False, prologue.eps, pre_quant,
        hadamard_matrix(256, torch.float32), 8, 0, "s8_wgmma",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dvdquant.fused_quantize.default, arguments)
    codes, _, sums, hidden = fused_quantize(*arguments)
    z, expected = apply_prologue(x, prologue)
    assert torch.equal(hidden, expected)
    note, exact, error = exact_input(x, hidden, prologue)
    assert not note
    assert ((z >= (exact - error).to(x.dtype)) & (z <= (exact + error).to(x.dtype))).all()
    wide = apply_prologue(hidden.double(), Prologue(None, None, prologue.multiplier, prologue.addend, "layer"))[0]
    assert (wide - exact).abs().max() < 1e-12 * exact.abs().max()
    assert codes.shape == x.shape
    assert torch.equal(sums[0].double(), decode_codes(codes, "s8_wgmma").sum(-1))


def test_what_no_kernel_takes(library: KernelLibrary) -> None:
    kernels = GuardedKernels(library, HOPPER)
    x = torch.ones(4, 768, dtype=torch.bfloat16)
    layer = LayerShape(8, 768, 1, False, 64, 1, 8, 0)
    with pytest.raises(UnsupportedError, match="outer factor of 12"):
        run_fused_quantize(kernels, LayerShape(8, 768, 1, False, 64, 12, 8, 0), x, Prologue(gelu=True))
    long = torch.ones(1, 32768 + 128, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="rows of up to 32768"):
        run_fused_quantize(kernels, LayerShape(8, 32768 + 128, 1, False, 64, 1, 8, 128), long, Prologue(gelu=True))
    with pytest.raises(ShapeError, match="gelu alone"):
        run_fused_quantize(kernels, layer, x, Prologue(gelu=True, norm="rms"))
    with pytest.raises(ShapeError, match="no gate"):
        run_fused_quantize(kernels, layer, x, Prologue(gate=torch.ones(1, 768)))
    with pytest.raises(ShapeError, match="eps"):
        run_fused_quantize(kernels, layer, x, Prologue(norm="rms", eps=math.nan))
    with pytest.raises(ShapeError, match="3 rows of a prologue for 4 tokens"):
        run_fused_quantize(kernels, layer, x, Prologue(addend=torch.ones(3, 768)))
    with pytest.raises(ShapeError, match="different numbers of rows"):
        run_fused_quantize(kernels, layer, x, Prologue(addend=torch.ones(2, 768), multiplier=torch.ones(4, 768)))
    with pytest.raises(ShapeError, match="y is"):
        run_fused_quantize(kernels, layer, x, Prologue(y=x[:2]))
    with pytest.raises(UnsupportedError, match="no 'batch' norm"):
        run_fused_quantize(kernels, layer, x, Prologue(norm="batch"))
    here = x.data_ptr()
    with pytest.raises(ShapeError, match=r"hidden is x or y"):
        library.fused_quantize(layer, HOPPER, ProloguePointers(y=here, hidden=here), here, here, here, 0, 4, 0)
    none = run_fused_quantize(kernels, layer, x[:0], Prologue(norm="rms"))
    assert none[0].shape == (0, 768)
