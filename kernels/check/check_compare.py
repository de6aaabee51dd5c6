"""What gpu_check holds results against: float64 on identical inputs, with bounds that follow from the number formats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dvdquant.numerics.activation_grid import AMAX_FLOOR, QMAX
from dvdquant.ops.linear_gemm import decode_codes
from dvdquant.ops.packed_layer import PackedLayer
from dvdquant.ops.reference import rotate_by_matrices
from dvdquant.ops.repack import ALIGNMENT, LayerShape, prepared_bytes

# Bits of significand, and the smallest spacing of numbers.
_SIGNIFICAND = {torch.bfloat16: (8, 2.0**-133), torch.float16: (11, 2.0**-24)}
_UNIT = 2.0**-24
# A sum of n independent rounding errors of at most u stays below λ·√n·u except with probability 2·exp(−λ²/2) (Hoeffding).
_LAMBDA = 7.0


@dataclass(frozen=True)
class Verdict:
    """Whether a check passed, and by how much.

    Args:
        worst: the largest error as a share of its bound; 1 is the limit. NaN fails.
        ties: codes that differ from float64's because they lie at a rounding tie.
        note: what was found, where it failed.
    """

    passed: bool
    worst: float = 0.0
    ties: int = 0
    note: str = ""


def half_ulp(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of ``dtype`` at y (float64): the largest error of rounding y once."""
    bits, smallest = _SIGNIFICAND[dtype]
    exponent = torch.frexp(y.abs()).exponent.to(torch.float64)
    return torch.exp2(exponent - bits - 1).clamp(min=smallest / 2)


def decode_prepared(layer: LayerShape, path: str, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """A prepared buffer, wherever it lies, to the weight it stands for float64 [N, K] and its bias [N]."""
    n, k, groups = layer.n, layer.k, layer.weight_groups
    if buffer.numel() != prepared_bytes(layer, path):
        raise ValueError(f"{buffer.numel()} bytes instead of {prepared_bytes(layer, path)}")
    width = k // 2 if path.startswith("s4") else k
    sizes = [n * width, 4 * n, 4 * n, 4 * n]
    if path == "s4_group" and groups > 1:
        sizes += [n * groups] * (1 + layer.float_zero_point)
    parts, start = [], 0
    for size in sizes:
        parts.append(buffer[start : start + size])
        start += -(-size // ALIGNMENT) * ALIGNMENT
    scale, zero, bias = (p.clone().view(torch.float32).to(torch.float64) for p in parts[1:4])
    values = decode_codes(parts[0].reshape(n, width).clone(), path).reshape(n, groups, -1)
    if len(parts) > 5:
        values -= (parts[5].reshape(n, groups, 1).to(torch.float64)) / 16 - 8
    else:
        values -= zero[:, None, None]
    if len(parts) > 4:
        values *= parts[4].reshape(n, groups, 1).to(torch.float64) / 255
    return values.reshape(n, k) * scale[:, None], bias


def check_product(
    layer: LayerShape, path: str, codes: Tensor, scales: Tensor, weight: Tensor, bias: Tensor, y: Tensor,
    integers: bool = True,
) -> Verdict:  # fmt: skip
    """y [M, N] against float64 on the very codes and weights the kernel read.

    ``|y − y₆₄| ≤ 2 · (half an ulp of y₆₄) + fp32 rounding of the sum of groups``: twice what a reference that is exact
    up to its output dtype may be off by. Integer products are exact, so the second term knows no K. Where ``integers`` is
    false, e4m3 codes are not integers, and a tensor core may drop of each product what lies more than 13 bits below the
    largest.

    Args:
        codes: as the path holds them. scales: fp32 [groups, M].
        weight: float64 [N, K] and bias [N] from :func:`decode_prepared`.
    """
    groups = len(scales)
    values = decode_codes(codes, path).reshape(len(codes), groups, -1)
    parts = weight.reshape(len(weight), groups, -1)
    want, mass = bias.expand(len(codes), -1).clone(), bias.abs().expand(len(codes), -1).clone()
    for group in range(groups):
        term = scales[group].to(torch.float64)[:, None] * (values[:, group] @ parts[:, group].T)
        want += term
        mass += term.abs()
    slack = _UNIT * (4 + min(groups, _LAMBDA * math.sqrt(groups))) * mass
    if path.startswith("s4"):
        # acc and z · sum are each as large as the sums of |codes|, and one is subtracted from the other.
        slack = slack + 2 * _UNIT * _correction_mass(values, scales, weight)
    if path == "e4m3_group" and not integers:
        slack = slack + 2.0**-13 * _correction_mass(values.sign() * 7, scales, weight) / 16
    error = (y.to(torch.float64) - want).abs()
    bound = 2 * half_ulp(want, y.dtype) + slack
    return _verdict(error, bound, "y")


def _correction_mass(values: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    # |Δ z sum| ≤ 8 Δ Σ|c|, and the largest |w| of a row is at least half a step.
    row = 16 * weight.abs().amax(dim=1)
    return (values.abs().sum(dim=2).T * scales.to(torch.float64)).sum(dim=0)[:, None] * row


@dataclass(frozen=True)
class ExactCodes:
    """x̃·qmax/amax in float64, [M, groups, G], and how far fp32 may be off it.

    Args:
        amax: float64 [M, groups, 1]. off: what fp32 may be off by in amax. grid: clamped to ±qmax. margin: as grid.
    """

    amax: Tensor
    off: Tensor
    grid: Tensor
    margin: Tensor


def exact_codes(layer: LayerShape, packed: PackedLayer, x: Tensor) -> ExactCodes:
    """The codes of x [M, K] before rounding, with e = γ · ‖block‖₁/√block, what fp32 can be off by in x̃.

    γ counts one rounding per stage of the inner factor and one per term of the outer one.
    """
    tokens, k, block = len(x), layer.k, layer.block * layer.outer
    wide = x.to(torch.float64)
    rotated = rotate_by_matrices(wide, packed.hadamard.to(torch.float64), packed.outer.to(torch.float64))
    stages = math.log2(layer.block) + (layer.outer if layer.outer > 1 else 0) + 4
    norm = wide.abs().reshape(tokens, k // block, block).sum(dim=2) / math.sqrt(block)
    grouped = rotated.reshape(tokens, k // (layer.act_group or k), -1)
    error = (2 * _UNIT * stages * norm).repeat_interleave(block, dim=1).reshape(grouped.shape)
    qmax = QMAX[layer.act_bits]
    amax = grouped.abs().amax(dim=2, keepdim=True).clamp(min=AMAX_FLOOR)
    off = error.amax(dim=2, keepdim=True) + 4 * _UNIT * amax
    grid = (grouped * (qmax / amax)).clamp(-qmax, qmax)
    margin = (error + grouped.abs() * off / amax) * (qmax / amax) + 4 * _UNIT * grid.abs() + 2.0**-40
    return ExactCodes(amax, off, grid, margin)


def check_codes(
    layer: LayerShape, packed: PackedLayer, path: str, x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor | None
) -> Verdict:
    """Codes, scales and sums of x [M, K] against the rotation in float64.

    The scale may be off by what fp32 is off by in amax, and a code may differ by one where :func:`exact_codes` lies that
    near to a tie; nothing else may differ.
    """
    exact, qmax = exact_codes(layer, packed, x), QMAX[layer.act_bits]
    scale = _verdict((scales.T.to(torch.float64)[:, :, None] * qmax - exact.amax).abs(), exact.off, "scale")
    got = decode_codes(codes, path).reshape(exact.grid.shape)
    ties = int((got != torch.round(exact.grid)).sum())
    # What is left beyond rounding to the nearest, as a share of the margin.
    code = _verdict(((got - exact.grid).abs() - 0.5).clamp(min=0), exact.margin, "code")
    whole = bool((got == torch.round(got)).all()) and bool((got.abs() <= qmax).all())
    total = sums is None or torch.equal(sums.T.to(torch.float64), got.sum(dim=2))
    notes = [scale.note, code.note, "" if whole else "codes off the grid", "" if total else "token sums"]
    passed = scale.passed and code.passed and whole and total
    return Verdict(passed, max(scale.worst, code.worst), ties, "; ".join(filter(None, notes)))


def check_expansion(layer: LayerShape, packed: PackedLayer, weight: Tensor, exact: bool) -> Verdict:
    """A decoded prepared weight against the packed weight in float64.

    Exact expansions differ by the fp32 rounding of the row's step; rounded ones by at most half a step of 8 bits, or half
    of 2⁻³ of the value in e4m3.
    """
    from dvdquant.ops.reference import dequantize_weight

    want = dequantize_weight(packed.weight, packed.scale, packed.group_scale, packed.zero, torch.float64)
    row = want.abs().amax(dim=1, keepdim=True)
    bound = 8 * _UNIT * row if exact else (0.51 / 127) * row + want.abs() / 15.5
    return _verdict((weight - want).abs(), bound + 2.0**-140, "weight")


def check_equal(a: Tensor, b: Tensor, what: str) -> Verdict:
    """Equal bit by bit, NaN included."""
    a, b = (t.contiguous().view(torch.uint8) for t in (a, b))
    if a.shape == b.shape and torch.equal(a, b):
        return Verdict(True)
    different = int((a != b).sum()) if a.shape == b.shape else a.numel()
    return Verdict(False, math.inf, note=f"{what}: {different} of {a.numel()} bytes differ")


def _verdict(error: Tensor, bound: Tensor, what: str) -> Verdict:
    if error.numel() == 0:
        return Verdict(True)
    share = error / bound
    # Not `share.max() <= 1`, which a NaN hidden by the reduction could pass.
    bad = ~(share <= 1)
    if not bool(bad.any()):
        return Verdict(True, float(share.max()))
    place = [int(i) for i in torch.nonzero(bad)[0]]
    worst = float(torch.nan_to_num(share, nan=math.inf).max())
    return Verdict(
        False, worst, note=f"{what} at {place}: {worst:.3g} × its bound, {int(bad.sum())} of {bad.numel()} wrong"
    )
