"""The checks of gpu_check of q and k on their way to attention: norm, rope, rotation, and codes or 16 bits.

The result is one rounding of a value in fp32. That value errs, beside float64, by a few units of the last place of the head's
largest: the sums of the norm and of the rotation. So a result is right where it is a rounding of a value within that distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from check_compare import Verdict
from check_kernels import Bench, GuardedKernels, Outcome, Tally
from torch import Tensor

from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.ops.attention.rope import Rope, apply_rope, run_rope_quantize
from dvdquant.ops.packed_layer import DTYPES

# Units of the last place of fp32 by which a value may err, of the largest value of its head: the norm's and rope's roundings, and
# one for each stage of the rotation.
_UNITS = 24


@dataclass(frozen=True)
class RopeCase:
    """q or k of one layer.

    Args:
        heads: H.
        head: d.
        batch: B.
        tokens: S.
        norm: ``none``, ``all``, ``head`` or ``layer``.
        rope: Whether there is rope: ``none``, ``head`` (one table for all heads) or ``all``.
        rotated: Whether heads are rotated.
        codes: Whether e4m3 comes out.
        members: Layers that are merged, so that tokens lie as many times C apart.
        first: The token where rope begins.
        rows: Tokens with rope, or -1 for a row of each sample's own; 0 for all tokens, the same in every sample.
        per_channel: Whether tables have a value for each channel.
    """

    heads: int
    head: int
    batch: int
    tokens: int
    norm: str
    rope: str
    rotated: bool
    codes: bool
    members: int = 1
    first: int = 0
    rows: int = 0
    per_channel: bool = False


CASES = (
    RopeCase(12, 128, 1, 9, "all", "head", True, True, 3),  # Wan 1.3B, self-attention
    RopeCase(40, 128, 1, 3, "all", "head", True, True, 3),  # Wan 14B
    RopeCase(40, 128, 2, 2, "all", "head", False, False, 3),
    RopeCase(24, 128, 2, 3, "head", "head", True, True, 3),  # HunyuanVideo
    RopeCase(32, 64, 2, 3, "all", "all", True, True, 3),  # LTX-Video
    RopeCase(30, 64, 1, 5, "none", "head", True, True),
    RopeCase(3, 32, 3, 2, "head", "none", True, False),
    RopeCase(5, 256, 1, 4, "all", "head", True, True),
    RopeCase(32, 256, 1, 1, "none", "none", False, True, 2),
    RopeCase(1, 64, 1, 1, "all", "all", False, False),
    RopeCase(32, 64, 2, 3, "all", "all", True, True, 3, 0, -1, True),  # LTX-Video as diffusers writes it
    RopeCase(32, 64, 2, 3, "all", "all", False, False, 3, 0, 0, True),
    RopeCase(24, 128, 2, 5, "head", "head", True, True, 3, 0, 3, True),  # HunyuanVideo's single blocks: text behind
    RopeCase(48, 64, 2, 5, "layer", "head", False, False, 3, 2, 3, True),  # CogVideoX: text before
    RopeCase(3, 256, 2, 4, "layer", "head", True, True, 1, 1, 2),
)


def make_rope(case: RopeCase, dtype: str, device: torch.device, seed: int = 0) -> tuple[Tensor, Rope]:
    """Return x [B, S, C] of a case and what it goes through.

    Args:
        case: The case.
        dtype: ``bf16`` or ``fp16``.
        device: The device of the tensors.
        seed: The seed of the random numbers.
    """
    rng = torch.Generator(device).manual_seed(seed + case.heads * case.head)
    channels = case.heads * case.head
    whole = torch.randn(case.batch, case.tokens, case.members * channels, generator=rng, device=device).to(
        DTYPES[dtype]
    )
    x = whole[..., (case.members - 1) * channels :]
    size = channels if case.norm == "all" else case.head
    weight = None if case.norm == "none" else 1 + 0.5 * torch.randn(size, generator=rng, device=device)
    width = {"none": 0, "head": case.head, "all": channels}[case.rope]
    rows = {0: case.tokens, -1: case.batch * case.tokens}.get(case.rows, case.rows)
    # Where every channel has an angle of its own, those of a pair differ: no rotation, but what the definition says.
    angles = 6.3 * torch.rand(rows, width // (1 if case.per_channel else 2), generator=rng, device=device)
    cosines, sines = (angles.cos(), angles.sin()) if width else (None, None)
    bound = torch.full((1,), 3.0, device=device) if case.codes else None  # some values are beyond it
    bias = 0.5 * torch.randn(size, generator=rng, device=device) if case.norm == "layer" else None
    return x, Rope(
        case.head, case.norm, 1e-6, case.rotated, weight, cosines, sines, bound, bias, case.first, case.per_channel
    )


def check_rope(bench: Bench) -> Iterator[Outcome]:
    """Yield the checks of q and k on their way to attention.

    Args:
        bench: The kernels and the device.
    """
    tally = Tally()
    for case in CASES:
        for dtype in DTYPES:
            x, rope = make_rope(case, dtype, bench.device)
            name = f"rope: {'e4m3' if case.codes else '16 bit'}"
            tally.add(name, judge_rope(bench.kernels, x, rope), f"{case}, {dtype}")
    yield from tally.rows.values()


def judge_rope(kernels: GuardedKernels, x: Tensor, rope: Rope) -> Verdict:
    """Run the kernel, and judge what it gives in float64.

    Args:
        kernels: The kernels.
        x: The input [B, S, C].
        rope: What it goes through.
    """
    out = run_rope_quantize(kernels, x, rope)
    if not kernels.intact():
        return Verdict(False, note="written outside of the result")
    wide = {
        name: part.double()
        for name in ("weight", "bias", "cosines", "sines")
        if (part := getattr(rope, name)) is not None
    }
    exact = apply_rope(x.double(), replace(rope, **wide, bound=None))
    largest = exact.reshape(*exact.shape[:2], -1, rope.head).abs().amax(-1, keepdim=True)
    slack = (_UNITS * 2.0**-24 * largest.expand(*largest.shape[:-1], rope.head)).reshape(exact.shape)
    if rope.bound is not None:
        factor = E4M3_MAX / rope.bound.double()
        exact, slack = exact * factor, slack * factor
    # The two roundings of the ends of what the value may be.
    low, high = (_rounded(value, out.dtype) for value in (exact - slack, exact + slack))
    got = out.double()
    wrong = ~((got >= low) & (got <= high))
    return Verdict(not bool(wrong.any()), note=f"{int(wrong.sum())} of {wrong.numel()} values are no rounding")


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        value = value.clamp(-E4M3_MAX, E4M3_MAX)
    return value.float().to(dtype).double()
