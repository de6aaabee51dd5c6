"""The kernel that takes q and k through norm, rope and rotation to codes: emulated, against float64."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvdquant.errors import DvdquantError, ShapeError, UnsupportedError
from dvdquant.ops.attention.definition import e4m3_codes
from dvdquant.ops.attention.rope import Rope, apply_rope, rope_quantize, run_rope_quantize
from dvdquant.ops.cuda.arguments import RopePointers, rope_struct
from dvdquant.ops.cuda.library import KernelLibrary
from tests.support.emulated_kernels import library as library
from tests.support.emulated_kernels import one_thread  # noqa: F401

sys.path[:0] = [str(Path(__file__).parents[2] / "kernels" / folder) for folder in ("", "bench", "check")]

from check_kernels import GuardedKernels  # noqa: E402
from check_rope import CASES, judge_rope, make_rope  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index].heads}x{CASES[index].head}")
def test_against_float64(library: KernelLibrary, index: int) -> None:
    verdict = judge_rope(GuardedKernels(library, 90), *make_rope(CASES[index], ("bf16", "fp16")[index % 2], CPU))
    assert verdict.passed, verdict.note


def test_every_number_becomes_its_nearest_e4m3(library: KernelLibrary) -> None:
    """Every bf16 number, infinities and NaN among them, by the kernel and by PyTorch."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(1, 256, 256)
    out = run_rope_quantize(GuardedKernels(library, 90), x, Rope(32, bound=torch.tensor([448.0])))
    wanted = e4m3_codes(x.float(), 1.0)
    assert torch.equal(out.view(torch.uint8) & 0x7F, wanted.view(torch.uint8) & 0x7F)
    number = ~x.isnan()
    assert torch.equal(out.view(torch.uint8)[number], wanted.view(torch.uint8)[number])


def test_nan_stays_where_it_is(library: KernelLibrary) -> None:
    """In the token whose norm saw it, and in no other."""
    x, rope = make_rope(CASES[0], "bf16", CPU)
    clean = run_rope_quantize(GuardedKernels(library, 90), x, rope)
    x[0, 3, 700], x[0, 5, 1] = math.nan, math.inf
    out = run_rope_quantize(GuardedKernels(library, 90), x, rope).float()
    for token in range(9):
        if token in (3, 5):
            assert out[0, token].isnan().any()
        else:
            assert torch.equal(out[0, token], clean[0, token].float())


def test_thread_order_does_not_matter(library: KernelLibrary) -> None:
    x, rope = make_rope(CASES[1], "bf16", CPU)
    expected = run_rope_quantize(GuardedKernels(library, 90), x, rope)
    for seed in (1, 2):
        library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(seed))
        out = run_rope_quantize(GuardedKernels(library, 90), x, rope)
        assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(0))


def test_tokens_may_lie_anywhere(library: KernelLibrary) -> None:
    """At an odd address, samples that do not follow each other, channels that do not: as if packed."""
    kernels = GuardedKernels(library, 90)
    x, rope = make_rope(CASES[3], "bf16", CPU)
    packed = x.contiguous()
    wanted = run_rope_quantize(kernels, packed, rope).view(torch.uint8)
    odd = torch.empty(packed.numel() + 1, dtype=x.dtype)[1:].view(packed.shape).copy_(packed)
    spread = torch.empty(2, 5, *packed.shape[1:], dtype=x.dtype)[:, 2].copy_(packed)
    turned = packed.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (x, odd, spread, turned):
        assert torch.equal(run_rope_quantize(kernels, other, rope).view(torch.uint8), wanted)


def test_the_operation() -> None:
    """On a CPU: PyTorch's own checks, and float32."""
    x, rope = make_rope(CASES[0], "bf16", CPU)
    arguments = (x, rope.weight, rope.cosines, rope.sines, rope.bound, 128, "all", 1e-6, True)
    torch.library.opcheck(
        torch.ops.dvdquant.rope_quantize.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert torch.equal(rope_quantize(*arguments).float(), apply_rope(x, rope).float())
    assert rope_quantize(x.float(), *arguments[1:4], None, *arguments[5:]).dtype == torch.float32


def numbers(text: object) -> list[int]:
    """The whole numbers that a text names, in their order."""
    return list(map(int, re.findall(r"\d+", str(text))))


def test_what_is_refused(library: KernelLibrary) -> None:
    """Each error names the tensor, its size, and the size that would do."""
    kernels = GuardedKernels(library, 90)
    x, rope = make_rope(CASES[0], "bf16", CPU)

    def refused(kind: type[DvdquantError], x: Tensor, rope: Rope, *out: Tensor) -> DvdquantError:
        with pytest.raises(kind) as caught:
            run_rope_quantize(kernels, x, rope, *out)
        return caught.value

    assert 16 in numbers(refused(UnsupportedError, x, replace(rope, head=16, cosines=None, sines=None)))
    assert 8192 in numbers(refused(UnsupportedError, torch.zeros(1, 1, 8320, dtype=torch.bfloat16), Rope(128)))
    error = refused(UnsupportedError, x.float(), rope)
    assert "float32" in error.what
    assert "bf16" in str(error.available)
    # A table of 9 rows: from token 0 of 8, where 8 rows are left; from token 1 of 9, where 8 are, or 9 from token 0.
    error = refused(ShapeError, x[:, 1:], rope)
    assert (numbers(error.what), numbers(error.available)) == ([9, 0, 1, 8], [8, 8, 0])
    assert "cut the table" in str(error.fix)
    error = refused(ShapeError, x, replace(rope, first=1))
    assert (numbers(error.what), numbers(error.available)) == ([9, 1, 1, 9], [8, 9, 0])
    error = refused(ShapeError, x, replace(rope, per_channel=True))
    assert "tables" in error.what
    assert numbers(error.available) == [128, 1536]
    error = refused(ShapeError, x, replace(rope, bias=x.new_zeros(128)))
    assert "bias" in error.what
    assert (numbers(error.what), numbers(error.available)) == ([128, 1536], [1536])
    error = refused(ShapeError, x, rope, torch.empty_like(x))
    assert "bfloat16" in error.what
    assert "float8_e4m3fn" in str(error.available)
    error = refused(ShapeError, x, replace(rope, norm="head"))
    assert "weight" in error.what
    assert (numbers(error.what), numbers(error.available)) == ([1536, 128], [128])
    assert run_rope_quantize(kernels, x[:, :0], Rope(128)).shape == (1, 0, 1536)


def test_the_binding_names_what_it_takes() -> None:
    """And the library what fits into a sample."""
    pointers = RopePointers(64, 64, "bf16", 64, 4)
    assert rope_struct(replace(pointers, norm="layer")).norm == 3
    for wrong, words in (
        (replace(pointers, dtype="fp8"), ("'fp8'", "bf16")),
        (replace(pointers, norm="rms"), ("'rms'", "layer")),
    ):
        with pytest.raises(UnsupportedError) as caught:
            rope_struct(wrong)
        name, other = words
        assert name in caught.value.what
        assert other in str(caught.value.available), "what it takes"


def test_rope_beyond_a_sample_is_refused(library: KernelLibrary) -> None:
    place = torch.zeros(1024, dtype=torch.bfloat16)
    pointers = RopePointers(64, 64, "bf16", 64, 4, 64, 2, 3, cosines=place.data_ptr(), sines=place.data_ptr())
    with pytest.raises(ShapeError) as caught:
        library.rope_quantize(pointers, place.data_ptr(), place.data_ptr(), 4, 0)
    assert "rope" in str(caught.value)
    assert [n for n in numbers(caught.value) if n in (3, 2, 4)][:3] == [3, 2, 4], (
        "its tokens, the first, and the sample's"
    )
