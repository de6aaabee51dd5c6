"""The checks of gpu_check of what is fused with a layer: residual, norm, modulation and GELU before its codes.

h is judged first. What follows is judged from the h that the kernel wrote, so that a rounding of h that fell to the other side
counts once. Bounds are derived: a sum of n numbers in fp32 errs by n units of the last place at most; where the exact value is
nearer to a tie of 16 bits than that, the rounding may fall to either side, and the rotation spreads what that changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from check_compare import Verdict
from check_kernels import Bench, GuardedKernels, Outcome, Tally
from torch import Tensor

from dvdquant.errors import UnsupportedError
from dvdquant.numerics.activation_grid import AMAX_FLOOR, QMAX
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.ops.fused import Prologue, run_fused_linear, run_fused_quantize, run_packed_fused_linear
from dvdquant.ops.linear_gemm import decode_codes
from dvdquant.ops.packed_layer import DTYPES
from dvdquant.ops.repack import LayerShape
from dvdquant.ops.smooth import apply_pre_quant, pack_pre_quant

_UNIT = 2.0**-24


@dataclass(frozen=True)
class FusedCase:
    """One layer with what comes before it.

    Args:
        k: Channels.
        block: Order of the rotation.
        bits: Bits of the codes.
        group: Channels per scale, 0 for the token.
        tokens: M.
        norm: ``none``, ``layer``, ``rms`` or ``gelu``.
        residual: Whether y is added.
        gate_rows: Rows of the gate; 0 for none.
        rows: Rows of the modulation; 0 for none.
        balanced: Whether there is a pre-quant scale and shift.
    """

    k: int
    block: int
    bits: int
    group: int
    tokens: int
    norm: str
    residual: bool = False
    gate_rows: int = 0
    rows: int = 0
    balanced: bool = True


CASES = (
    # Wan: layer norm behind a gated residual, fp32 modulation a row per batch.
    FusedCase(1536, 256, 8, 0, 33, "layer", True, 3, 3),
    FusedCase(5120, 256, 8, 0, 3, "layer", True, 1, 1),
    FusedCase(5120, 256, 4, 128, 2, "layer", True, 0, 1),
    FusedCase(1536, 256, 4, 0, 5, "layer", False, 0, 1),
    # A modulation per token (Wan2.2 ti2v, LTX-Video), RMS norms (LTX-Video).
    FusedCase(2048, 256, 4, 0, 7, "rms", True, 7, 7, False),
    FusedCase(2048, 256, 8, 128, 6, "rms", True, 2, 3),
    # HunyuanVideo and CogVideoX.
    FusedCase(3072, 1024, 4, 128, 3, "layer", True, 1, 1, False),
    FusedCase(1920, 64, 4, 64, 9, "layer", True, 3, 1),
    FusedCase(1920, 64, 8, 0, 5, "layer", True, 1, 5, False),
    # Ragged strips, no rotation, nothing but a sum, nothing but a modulation, long rows.
    FusedCase(352, 1, 4, 0, 11, "layer", True, 1, 1, False),
    FusedCase(288, 32, 8, 0, 17, "rms", balanced=False),
    FusedCase(320, 16, 4, 64, 3, "none", True),
    FusedCase(384, 2, 8, 128, 3, "none", rows=3, balanced=False),
    FusedCase(4096, 2048, 4, 0, 1, "layer", True, 1, 1, False),
    FusedCase(32768, 256, 8, 0, 1, "layer", rows=1, balanced=False),
    FusedCase(8960, 256, 8, 0, 2, "gelu"),
    FusedCase(13824, 256, 4, 128, 1, "gelu"),
    FusedCase(7680, 512, 4, 0, 2, "gelu", balanced=False),
    FusedCase(416, 32, 8, 0, 9, "gelu"),
)


def make_fused(
    case: FusedCase, dtype: str, device: torch.device, seed: int = 0
) -> tuple[LayerShape, Tensor, Prologue, Tensor | None]:
    """Return the layer of a case, x, what comes before it, and its packed pre-quant rows.

    Args:
        case: The case.
        dtype: ``bf16`` or ``fp16``.
        device: The device of the tensors.
        seed: The seed of the random numbers.
    """
    rng = torch.Generator(device).manual_seed(seed + case.k)
    layer = LayerShape(8, case.k, 1, False, case.block, 1, case.bits, case.group, dtype)
    kind, m, k = DTYPES[dtype], case.tokens, case.k

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    x = 3 * draw(m, k) + 0.5
    x[:, 3::37] *= 30
    if case.norm == "gelu":
        x[0, :6] = torch.tensor([0.0, -0.0, 1e-30, -1e-5, 40.0, -40.0], device=device)
    # Rows of one tensor that holds more, as chunk() gives them.
    held = draw(case.rows or 1, 3, k)
    prologue = Prologue(
        (2 * draw(m, k)).to(kind) if case.residual else None,
        draw(case.gate_rows, k) if case.gate_rows else None,
        1 + held[:, 0] if case.rows else None,
        held[:, 2] if case.rows else None,
        "none" if case.norm == "gelu" else case.norm,
        case.norm == "gelu",
    )
    scale = 2.0 ** torch.randint(-3, 4, (k,), generator=rng, device=device)
    return layer, x.to(kind), prologue, pack_pre_quant(scale, draw(k), kind) if case.balanced else None


def make_stored(layer: LayerShape, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random packed tensors of a layer: codes, scale, group scale, zero-point and bias.

    Args:
        layer: The layer.
        device: The device of the tensors.
        seed: The seed of the random numbers.
    """
    rng = torch.Generator(device).manual_seed(seed)
    n, cells = layer.n, (layer.n, layer.weight_groups)
    zero = torch.randint(-15, 15, (n,), generator=rng, device=device) / 2
    if layer.float_zero_point:
        zero = torch.randint(0, 256, cells, generator=rng, device=device, dtype=torch.uint8)
    return (
        torch.randint(-128, 128, (n, layer.k // 2), generator=rng, device=device, dtype=torch.int8),
        torch.rand(n, generator=rng, device=device) / 64 + 1e-3,
        torch.randint(1, 256, cells, generator=rng, device=device, dtype=torch.uint8),
        zero,
        torch.randn(n, generator=rng, device=device),
    )


def check_fused(bench: Bench) -> Iterator[Outcome]:
    """Yield the checks of RQ with a prologue, and that RQ and QL in one call give what they give apart.

    Args:
        bench: The kernels and the device.
    """
    tally, kernels = Tally(), bench.kernels
    for case in CASES:
        for dtype in DTYPES:
            layer, x, prologue, pre_quant = make_fused(case, dtype, bench.device)
            try:
                kernels.plan(layer)
            except UnsupportedError:
                continue
            where = f"{case}, {dtype}"
            tally.add(f"fused: {case.norm}", judge_fused(kernels, layer, x, prologue, pre_quant), where)
            stored = make_stored(layer, bench.device)
            prepared, held = kernels.prepare(layer, stored), kernels.make_rows(layer, stored)
            y, hidden = run_fused_linear(kernels, layer, x, prologue, prepared, pre_quant)
            codes, scales, sums, apart = run_fused_quantize(kernels, layer, x, prologue, pre_quant)
            wanted = kernels.linear_gemm(layer, codes, scales, sums, prepared)
            same = torch.equal(hidden, apart) and torch.equal(y.view(torch.int16), wanted.view(torch.int16))
            tally.add("fused: one call = two calls", Verdict(same), where)
            kept, beside = run_packed_fused_linear(kernels, layer, x, prologue, *held, pre_quant)
            same = torch.equal(beside, hidden) and torch.equal(kept.view(torch.int16), y.view(torch.int16))
            tally.add("fused: packed = prepared", Verdict(same and kernels.intact()), where)
    yield from tally.rows.values()


def judge_fused(
    kernels: GuardedKernels, layer: LayerShape, x: Tensor, prologue: Prologue, pre_quant: Tensor | None
) -> Verdict:
    """Run RQ with a prologue, and judge h, codes, scales and sums in float64.

    Args:
        kernels: The kernels.
        layer: The layer.
        x: The input [M, K].
        prologue: What comes before.
        pre_quant: The packed pre-quant rows, or None.
    """
    before = x.clone()
    raw, scales, sums, hidden = run_fused_quantize(kernels, layer, x, prologue, pre_quant)
    if not kernels.intact() or not torch.equal(x, before):
        return Verdict(False, note="written past an output, or over x")
    m, k, block = len(x), layer.k, layer.block
    note, exact, error = exact_input(x, hidden, prologue)
    low, high, z = ((exact + by).to(x.dtype) for by in (-error, error, 0 * error))
    unsure = high.double() - low.double()
    if pre_quant is not None:
        z = apply_pre_quant(z, pre_quant)
        digit = 2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-10
        unsure = unsure * pre_quant[:, 0].reshape(-1).double().abs() + (unsure > 0) * digit * z.double().abs()
    groups = scales.shape[0]
    rotated = rotate(z.double(), Rotation(k, block, 1)).reshape(m, groups, k // groups)
    amax = rotated.abs().amax(-1).clamp(min=AMAX_FLOOR)
    by_block = (unsure.reshape(m, k // block, block).sum(-1) / math.sqrt(block)).repeat_interleave(block, 1)
    # One rounding per stage of adds, relative to what the stage sums.
    norms = z.double().abs().reshape(m, k // block, block).sum(-1).amax(-1) / math.sqrt(block)
    rounding = _UNIT * (math.log2(block) + 5) * norms[:, None] + by_block.reshape(rotated.shape).amax(-1)
    qmax = QMAX[layer.act_bits]
    scale = ((scales.T.double() * qmax - amax).abs() / (rounding + 4 * _UNIT * amax)).amax()
    grid = rotated * (qmax / amax[..., None])
    codes = decode_codes(raw, kernels.plan(layer).path).reshape(grid.shape)
    margin = (qmax * (2 * rounding / amax + 8 * _UNIT))[..., None]
    code = (((codes - grid).abs() - 0.5).clamp(min=0) / margin).amax()
    ties = int((codes != grid.round()).sum())
    notes = {
        note: not note,
        "scale": bool(scale <= 1),
        "code": bool(code <= 1),
        "more ties than chance": ties <= 4e-3 * codes.numel() + 2,
        "codes off the grid": bool((codes == codes.round()).all() and (codes.abs() <= qmax).all()),
        "token sums": torch.equal(sums.T.double(), codes.sum(-1)),
    }
    failed = [text for text, passed in notes.items() if not passed]
    return Verdict(not failed, float(max(scale, code)), ties, "; ".join(failed))


def exact_input(x: Tensor, hidden: Tensor, prologue: Prologue) -> tuple[str, Tensor, Tensor]:
    """Check h, and return what is wrong with it, what the layer gets before that is rounded, and what fp32 may err there.

    Args:
        x: The input [M, K].
        hidden: The h that a kernel wrote, or x.
        prologue: What comes before the layer.
    """
    m, k = x.shape
    if prologue.gelu:
        exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
        # x / (1 + 2^-e): e errs by 4 units of its size, 2^-e by that times ln 2 and 4 more, the quotient by 3.
        exponent = (2.3022 * x.double() * (1 + 0.044715 * x.double().square())).abs()
        # Quotients below 2^-126 may become 0.
        return "", exact, exact.abs() * _UNIT * (8 + 6 * exponent.clamp(max=200)) + x.double().abs() * 2.0**-126
    note = ""
    if prologue.y is not None:
        gated = prologue.y.double() * _spread(prologue.gate, m, 1.0).to(x.device)
        h = x.double() + gated
        error = 2 * _UNIT * (x.double().abs() + gated.abs())
        low, high = (h - error).to(x.dtype), (h + error).to(x.dtype)
        if not bool(((low <= hidden) & (hidden <= high)).all()):
            note = "h"
    h = hidden.double()
    zero = h.new_zeros(m, 1)
    mean = h.mean(-1, keepdim=True) if prologue.norm == "layer" else zero
    inverse, error = zero + 1, torch.zeros_like(h)
    if prologue.norm != "none":
        # Numbers that a thread and the strips add one after the other, and the steps around them.
        sums = 64 + 2 + k // 256 + 8
        inverse = ((h - mean).square().mean(-1, keepdim=True) + prologue.eps).rsqrt()
        off = sums * _UNIT * h.abs().mean(-1, keepdim=True) * (prologue.norm == "layer")
        error = inverse * off + (h - mean).abs() * inverse * _UNIT * (sums + 4)
    n = (h - mean) * inverse
    multiplier, addend = _spread(prologue.multiplier, m, 1.0), _spread(prologue.addend, m, 0.0)
    z = n * multiplier.to(n) + addend.to(n)
    error = error * multiplier.to(n).abs() + 3 * _UNIT * ((n * multiplier.to(n)).abs() + addend.to(n).abs())
    return note, z, error


def _spread(rows: Tensor | None, m: int, default: float) -> Tensor:
    if rows is None:
        return torch.full((1, 1), default, dtype=torch.float64)
    return rows.double().repeat_interleave(m // len(rows), 0)
