"""FP8 attention: what it computes, in PyTorch, and how far an executor that computes it rightly can be from float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from dvdquant.export.passes.fp8_attention import AttentionScales
from dvdquant.export.verify.tolerance import LAMBDA, UNIT
from dvdquant.ops.attention.definition import e4m3_codes

__all__ = [
    "AttentionCheck",
    "attention_intermediates",
    "judge_attention",
    "quantized_attention",
    "round_e4m3",
    "with_fp8_attention",
]

JUDGED_QUERIES = 64
_READ = ("q_rows", "k_rows", "q_rotated", "k_rotated", "v", "attended")


@dataclass(frozen=True)
class AttentionCheck:
    """One attention on the operands it had in the graph.

    Args:
        name: Its module.
        excess: The largest error over its bound.
        part: The place of that error, ``rotation`` or ``attention``.
    """

    name: str
    excess: float
    part: str

    @property
    def passed(self) -> bool:
        """Return whether all is within its bounds; NaN is not."""
        return self.excess <= 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with the verdict."""
        return {**asdict(self), "passed": self.passed}


def round_e4m3(x: Tensor, scale: float) -> Tensor:
    """Return ``x`` after Q/DQ in e4m3 with a static scale, in its own dtype.

    Each value becomes the nearest of the format, ties to even, saturated.

    Args:
        x: The values, any shape, floating point.
        scale: The static scale.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return (e4m3_codes(wide, scale).to(wide.dtype) * scale).to(x.dtype)


def quantized_attention(q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales, mask: Tensor | None = None) -> Tensor:
    """Return the attention as the graph quantizes it: [B, H, S, d] of the operands' dtype.

    Args:
        q: [B, H, S, d] as the model has it, not balanced. Float64 rounds to e4m3 alone.
        k: [B, H, S, d], as q.
        v: [B, H, S, d].
        scales: The scales, the fold and the rotation of this attention.
        mask: bool [B, 1, 1, S], true for the keys that count; None for all.
    """
    channels = q.shape[-1]
    fold = torch.from_numpy(scales.fold).to(q.dtype)
    fold = fold.reshape(-1, 1, channels)
    rotation = torch.from_numpy(scales.rotation).to(q.dtype)
    root = channels**-0.5
    q = round_e4m3(q * fold @ (torch.from_numpy(scales.rotation).double() * root).to(q.dtype), scales.q)
    k = round_e4m3(k / fold @ rotation, scales.k)
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    shares = round_e4m3(torch.softmax(scores, dim=-1), scales.p)
    return shares @ round_e4m3(v, scales.v)


@contextmanager
def with_fp8_attention(scales: Sequence[AttentionScales], attentions: int) -> Iterator[None]:
    """Let models compute the attentions of ``scales`` as the graph does, inside of the block.

    Args:
        scales: The quantized attentions.
        attentions: The number of attentions in one forward; they come in the order of the graph.
    """
    if not scales:
        yield
        return
    original: Callable[..., Tensor] = functional.scaled_dot_product_attention
    known = {each.order: each for each in scales}
    calls = 0

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *arguments: Any, **options: Any
    ) -> Tensor:
        nonlocal calls
        order, calls = calls % attentions, calls + 1
        if order in known:
            return quantized_attention(query, key, value, known[order], attn_mask)
        return original(query, key, value, attn_mask, *arguments, **options)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


# ---------------------------------------------------------------------------------------------------------------- judging


def attention_intermediates(model: ir.Model, scales: Sequence[AttentionScales]) -> dict[str, ir.Value]:
    """Return the operands and the result of every quantized attention, under ``<module> <what>``.

    Args:
        model: The graph, with its attentions quantized.
        scales: The scales of the quantized attentions.
    """
    nodes = {node.name: node for node in model.graph}
    intermediates = {}
    for each in scales:
        for side in "qk":
            product = nodes[f"{each.name}.{side}_rotated"]
            intermediates[f"{each.name} {side}_rows"] = _input(product)
            intermediates[f"{each.name} {side}_rotated"] = _input(nodes[f"{each.name}.{side}_q"])
        intermediates[f"{each.name} v"] = _input(nodes[f"{each.name}.v_q"])
        if (masked := nodes.get(f"{each.name}.masked")) is not None:
            intermediates[f"{each.name} mask"] = _input(masked)
        intermediates[f"{each.name} attended"] = nodes[f"{each.name}.attended"].outputs[0]
    return intermediates


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def judge_attention(seen: Mapping[str, Tensor], scales: AttentionScales, dtype: torch.dtype) -> AttentionCheck:
    """Judge one attention on what the executor gave it.

    The rotation is judged apart: a product whose sum is in fp32 and which is rounded to ``dtype``. Behind it the codes of q, k
    and v are known exactly. Each share of the softmax is within ε of that of float64: the score's rounding δ, that of all others
    through the sum, and that of the softmax itself. So its code lies between those of p·(1 − ε) and p·(1 + ε), and what they
    differ by, times v, is the bound::

        |o − o₆₄| ≤ Σ_j |e4m3(p_j·(1 ± ε_j)) − e4m3(p_j)|·|v_j|  +  rounding of the sum and of o

    Args:
        seen: The values by the keys of :func:`attention_intermediates`.
        scales: The attention's scales.
        dtype: The dtype of the graph.
    """
    tensors = {what: seen[f"{scales.name} {what}"].double() for what in _READ}
    rotation = torch.from_numpy(scales.rotation).double()
    root = rotation.shape[0] ** -0.5
    turned = [
        _rotation_excess(tensors["q_rows"], tensors["q_rotated"], (rotation * root).to(dtype).double(), dtype),
        _rotation_excess(tensors["k_rows"], tensors["k_rotated"], rotation.to(dtype).double(), dtype),
    ]
    mask = seen.get(f"{scales.name} mask")
    attended = _attention_excess(
        tensors, scales, dtype, None if mask is None else mask.reshape(len(mask), 1, -1).bool()
    )
    worst = max(turned)
    if not worst <= 1.0 or worst > attended:
        return AttentionCheck(scales.name, worst, "rotation")
    return AttentionCheck(scales.name, attended, "attention")


def _rotation_excess(rows: Tensor, heads: Tensor, matrix: Tensor, dtype: torch.dtype) -> float:
    exact = (rows @ matrix).transpose(1, 2)
    size = rows.norm(dim=-1, keepdim=True).transpose(1, 2) * float(matrix.abs().max())
    bound = LAMBDA * matrix.shape[0] ** 0.5 * UNIT[torch.float32] * size
    return _excess(heads, exact, bound + _rounding(exact.abs() + bound, dtype))


def _attention_excess(
    tensors: Mapping[str, Tensor], scales: AttentionScales, dtype: torch.dtype, mask: Tensor | None
) -> float:
    step = max(1, tensors["q_rotated"].shape[2] // JUDGED_QUERIES)
    fine, unit, worst = UNIT[torch.float32], UNIT[dtype], 0.0
    for head in range(tensors["v"].shape[1]):
        q = round_e4m3(tensors["q_rotated"][:, head, ::step].float(), scales.q).double()
        k = round_e4m3(tensors["k_rotated"][:, head].float(), scales.k).double()
        v = round_e4m3(tensors["v"][:, head].float(), scales.v).double()
        keys = k.transpose(-1, -2)
        scores = q @ keys
        sums = LAMBDA * q.shape[-1] ** 0.5 * fine * (q.square() @ keys.square()).sqrt()
        error = sums + _rounding(scores.abs() + sums, dtype)
        if mask is not None:
            scores, error = scores.masked_fill(~mask, -torch.inf), error.masked_fill(~mask, 0.0)
        shares = torch.softmax(scores, dim=-1)
        spread = torch.expm1(error + (shares * error).sum(-1, keepdim=True)) + 2 * unit + 8 * fine
        exact_codes = round_e4m3(shares, scales.p)
        moved = torch.maximum(
            (round_e4m3(shares * (1 + spread), scales.p) - exact_codes).abs(),
            (round_e4m3(shares * (1 - spread).clamp(min=0), scales.p) - exact_codes).abs(),
        )
        exact = exact_codes @ v
        flips = torch.minimum(moved @ v.abs(), LAMBDA * (moved.square() @ v.square()).sqrt())
        terms = LAMBDA * v.shape[-2] ** 0.5 * fine * (exact_codes.square() @ v.square()).sqrt()
        bound = flips + terms
        bound = bound + _rounding(exact.abs() + bound, dtype)
        worst = max(worst, _excess(tensors["attended"][:, head, ::step], exact, bound))
        if worst != worst:
            return worst
    return worst


def _rounding(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far rounding to ``dtype`` moves values of this size; fp16 is subnormal below 6e-5."""
    return UNIT[dtype] * size + (2.0**-25 if dtype == torch.float16 else 1e-30)


def _excess(got: Tensor, exact: Tensor, bound: Tensor) -> float:
    if got.shape != exact.shape:
        return float("inf")
    return float(((got - exact).abs() / bound).nan_to_num(nan=float("inf")).max())
