"""The video's own self-attention in FP8: Q/DQ in e4m3 on q, k, v and the softmax, with scales that follow from weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from dvdquant.errors import UnsupportedError
from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.numerics.hadamard import Rotation
from dvdquant.onnx.schema import DOMAIN
from dvdquant.ops.attention.static_scales import longest_row, pair_exponents
from dvdquant.ops.reference import dequantize_weight, rotate_by_matrices

__all__ = ["LONG_TOKENS", "MODULATED", "AttentionScales", "fp8_attention"]

# A self-attention that never sees more tokens costs nothing to speak of, and stays in 16 bit.
LONG_TOKENS = 256
# The stated bound of v: the input of its linear is a row of K normalized channels, of length √K, and modulation makes it at
# most this many times as long. e4m3 is a float: a bound that is too large by 16 leaves values of a common size normal numbers.
MODULATED = 4.0

_NORM = re.compile(r"(.*)\.norm_(?:added_)?[qk]\.(weight|bias)$")
_MOVES = frozenset({"Reshape", "Transpose", "Cast", "Identity", "Slice", "Squeeze", "Unsqueeze"})
_LINEAR = frozenset({"QuantLinear", "MatMul", "Gemm"})


@dataclass(frozen=True)
class AttentionScales:
    """The scales of one quantized attention.

    Args:
        name: The attention's module, such as ``blocks.0.attn1``.
        order: Its place among all Attention nodes of the graph, in order of execution.
        fold: fp32 [n], powers of two by which the channels of q were multiplied and those of k divided. n is the width of
            the norm's weight, all heads or one.
        rotation: fp32 [d, d], orthonormal.
        q: The scale of q / √d, as the graph's dtype holds it.
        k: The scale of k.
        v: The scale of v.
        p: The scale of the softmax.
    """

    name: str
    order: int
    fold: np.ndarray
    rotation: np.ndarray
    q: float
    k: float
    v: float
    p: float


@dataclass(frozen=True)
class _Norm:
    """The weight or bias of a norm of q or k, where it is used."""

    node: ir.Node
    index: int
    bias: bool
    data: np.ndarray


@dataclass(frozen=True)
class _Match:
    """One Attention node that can run in FP8."""

    node: ir.Node
    order: int
    name: str
    q_norms: tuple[_Norm, ...]
    k_norms: tuple[_Norm, ...]
    v_bound: float


def fp8_attention(model: ir.Model, tokens: int) -> list[AttentionScales]:
    """Quantize the operands of the video's self-attentions, and return the scales of each; an empty list if there is none.

    1. ``Attention(q, k, v)`` over the video's tokens becomes
       ``MatMul(DQ(Q(Softmax(MatMul(DQ(Q(q·R/√d)), DQ(Q(k·R))ᵀ)))), DQ(Q(v)))``. TensorRT-RTX builds one fused kernel of it with
       FP8 operands, and only of it: without the softmax's Q/DQ, with the rotation behind the transpose to heads, or in
       INT8, the scores go to memory.
    2. R is a Hadamard matrix of the head's channels, applied in [B, S, H, d]. It spreads outlier channels over a head. 1/√d is in
       its copy for q, so the scores need no scale.
    3. Before, the norm weights of q and k are balanced per rotary pair of channels: q times and k divided by a power of two,
       which changes no product and rounds nothing. All families rotate neighbouring channels by the same angle, so a factor per
       pair passes through.
    4. Scales are static. A norm bounds what it gives: ‖q‖ ≤ √n·max|w| over its n channels (all heads, or one), plus ‖b‖, and
       the rotation keeps that: the scale is that over 448. The scale of v is ``MODULATED``·√K·max‖row‖ + max|bias| over 448.
       That of the softmax is 1/448. Scales are rounded up to the graph's dtype, so that the bound is still representable.
    5. A mask of keys, boolean [B, 1, 1, S] (padded text), becomes −∞ scores before the softmax, and stays a part of the kernel.
    6. Left alone: attention with another mask, causal, or between two sequences; of at most ``LONG_TOKENS`` tokens, or of fewer
       than ``tokens`` (text); q or k without a norm's weight; v of something else than a linear.

    Args:
        model: The graph, which is changed in place.
        tokens: The number of tokens of the video at the largest sizes.
    """
    done = []
    # All are read before any is changed: a constant of one may be one of another.
    for match in list(_matches(model, tokens)):
        done.append(_rewrite(model, match))
    return done


# ---------------------------------------------------------------------------------------------------------------- reading


def _matches(model: ir.Model, tokens: int) -> Iterator[_Match]:
    attentions = [node for node in model.graph if node.op_type == "Attention" and not node.domain]
    for order, node in enumerate(attentions):
        if not _is_long_self_attention(node, tokens):
            continue
        q_norms, k_norms = (tuple(_norms(value, side)) for value, side in zip(node.inputs[:2], "qk"))
        widths = {norm.data.size for norm in (*q_norms, *k_norms)}
        weights = [any(not norm.bias for norm in norms) for norms in (q_norms, k_norms)]
        bound = _value_bound(model, node.inputs[2])
        if not all(weights) or len(widths) != 1 or bound is None:
            continue
        found = _NORM.match(_input_name(q_norms[0]))
        assert found is not None  # it was found by that
        yield _Match(node, order, found[1], q_norms, k_norms, bound)


def _is_long_self_attention(node: ir.Node, tokens: int) -> bool:
    operands = node.inputs[:3]
    if any(value is None or value.shape is None or len(value.shape) != 4 for value in operands):
        return False
    if any(value is not None for value in node.inputs[4:]) or not _is_key_mask(node):
        return False
    for name in ("is_causal", "softcap"):
        if name in node.attributes and node.attributes[name].value:
            return False
    if "scale" in node.attributes:
        return False
    shapes = [value.shape for value in operands]
    if len({str(shape[2]) for shape in shapes}) != 1 or len({str(shape[3]) for shape in shapes}) != 1:
        return False
    if len({str(shape[1]) for shape in shapes}) != 1 or not isinstance(shapes[0][3], int):
        return False
    length = shapes[0][2]
    return tokens > LONG_TOKENS and (not isinstance(length, int) or length >= tokens)


def _is_key_mask(node: ir.Node) -> bool:
    """Return whether there is no mask, or one that only says which keys are words: boolean [B, 1, 1, S]."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        return True
    return mask.dtype == ir.DataType.BOOL and mask.shape is not None and list(mask.shape)[1:3] == [1, 1]


def _norms(value: ir.Value | None, side: str) -> Iterator[_Norm]:
    """Return the weights and biases of the norms between a linear and ``value``; nothing where one is not of ``side``."""
    seen: set[int] = set()
    stack = [value]
    found = []
    while stack:
        value = stack.pop()
        node = value.producer() if value is not None else None
        if node is None or id(node) in seen or node.op_type in _LINEAR:
            continue
        seen.add(id(node))
        for index, used in enumerate(node.inputs):
            match = _NORM.match(used.name or "") if used is not None and used.const_value is not None else None
            if match is None:
                stack.append(used)
                continue
            assert used is not None
            assert used.const_value is not None
            if not (used.name or "").removesuffix(f".{match[2]}").endswith(f"_{side}"):
                return
            data = np.asarray(used.const_value.numpy()).astype(np.float32)
            found.append(_Norm(node, index, match[2] == "bias", data))
    yield from sorted(found, key=_input_name)


def _input_name(norm: _Norm) -> str:
    value = norm.node.inputs[norm.index]
    return value.name or "" if value is not None else ""


def _value_bound(model: ir.Model, value: ir.Value | None) -> float | None:
    """Return the stated bound of v, or None where it comes from something else than linears."""
    rows: slice | None = None
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Concat":
            bounds = [_value_bound(model, part) for part in node.inputs]
            return None if any(bound is None for bound in bounds) else max(b for b in bounds if b is not None)
        if node.op_type == "Split":
            rows = _split_rows(node, value)
            if rows is None:
                return None
        elif node.op_type in _LINEAR:
            return _linear_bound(model, node, rows)
        elif node.op_type == "Add" and (bias := ir.convenience.get_const_tensor(node.inputs[1])) is not None:
            inner = _value_bound(model, node.inputs[0])
            return None if inner is None else inner + float(np.abs(bias.numpy().astype(np.float32)).max())
        elif node.op_type not in _MOVES:
            return None
        value = node.inputs[0]
    return None


def _split_rows(node: ir.Node, value: ir.Value) -> slice | None:
    sizes = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is None:
        return None
    ends = np.cumsum(sizes.numpy())
    index = [output is value for output in node.outputs].index(True)
    return slice(int(ends[index] - sizes.numpy()[index]), int(ends[index]))


def _linear_bound(model: ir.Model, node: ir.Node, rows: slice | None) -> float | None:
    """Return ``MODULATED`` · √K · max‖row‖ + max|bias| of the rows of one linear."""
    tensors = [ir.convenience.get_const_tensor(value) if value is not None else None for value in node.inputs]
    part = slice(None) if rows is None else rows
    bias: np.ndarray | None = None
    if node.domain == DOMAIN:
        if any(tensor is None for tensor in tensors[1:]):
            return None
        arrays = [torch.from_numpy(np.array(t.numpy())) for t in tensors[1:] if t is not None]
        weight, scale, group_scale, zero, offset, hadamard, outer = arrays
        kept = [t[part] for t in (weight.view(torch.int8), scale, group_scale, zero)]
        packed_name = (node.inputs[1].name if node.inputs[1] is not None else "") or ""
        pre_quant = model.graph.initializers.get(f"{packed_name.removesuffix('.weight')}.pre_quant_scale")
        squares = _row_squares(kept, hadamard.T.contiguous(), outer.T.contiguous(), pre_quant)
        bias = offset[part].numpy()
    else:
        if len(tensors) < 2 or tensors[1] is None or len(tensors[1].shape) != 2:
            return None
        matrix = np.asarray(tensors[1].numpy()).astype(np.float32)
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        matrix = (matrix if transposed else matrix.T)[part]
        squares = float(np.square(matrix).sum(axis=1).max()) * matrix.shape[1]
        if len(tensors) > 2 and tensors[2] is not None:
            bias = np.asarray(tensors[2].numpy()).astype(np.float32)[part]
    return MODULATED * math.sqrt(squares) + (float(np.abs(bias).max()) if bias is not None else 0.0)


def _row_squares(
    packed: list[torch.Tensor], hadamard: torch.Tensor, outer: torch.Tensor, pre_quant: ir.Value | None
) -> float:
    """Return K · max‖row‖² of a packed weight, as it was before it was rotated and its columns multiplied."""
    most, features = 0.0, 2 * packed[0].shape[1]
    factors = None
    if pre_quant is not None and pre_quant.const_value is not None:
        factors = torch.from_numpy(np.array(pre_quant.const_value.numpy())).float()
    step = max(1, (1 << 24) // features)
    for start in range(0, len(packed[0]), step):
        weight, scale, group_scale, zero = (t[start : start + step] for t in packed)
        rows = rotate_by_matrices(dequantize_weight(weight, scale, group_scale, zero), hadamard, outer)
        most = max(most, float((rows if factors is None else rows * factors).square().sum(dim=1).max()))
    return most * features


# ---------------------------------------------------------------------------------------------------------------- scales


def _fold(match: _Match) -> np.ndarray:
    """Return fp32 [n], a power of two per pair of channels: about the root of the ratio of k's weights to q's."""
    sizes = []
    for norms in (match.q_norms, match.k_norms):
        pairs = [np.hypot(*norm.data.reshape(-1, 2).T) for norm in norms if not norm.bias]
        sizes.append(np.max(pairs, axis=0))
    exponents = pair_exponents(*(torch.from_numpy(size) for size in sizes))
    return torch.exp2(exponents).repeat_interleave(2).numpy()


def _norm_bound(norms: tuple[_Norm, ...], fold: np.ndarray) -> float:
    """Return the length of the longest row that the norms give; of norms side by side the largest."""
    parts = [(norm.bias, torch.from_numpy(norm.data.reshape(-1) * fold)) for norm in norms]
    weights = [longest_row(data.numel(), data, None) for is_bias, data in parts if not is_bias]
    biases = [float(data.norm()) for is_bias, data in parts if is_bias]
    return max(weights) + max(biases, default=0.0)


def _rounded_up(value: float, dtype: ir.DataType) -> float:
    """Return the least number of ``dtype`` that is not below ``value``."""
    kind = dtype.numpy()
    rounded = np.array(value, kind)
    if float(rounded) < value:
        rounded = np.nextafter(rounded, np.array(np.inf, kind))
    return float(rounded)


def _rotation(channels: int) -> np.ndarray:
    """Return an orthonormal Hadamard matrix fp32 [d, d] of the head's channels, in blocks where there is none of the whole."""
    try:
        rotation = Rotation.for_features(channels, "full")
    except UnsupportedError:
        rotation = Rotation.for_features(channels, "auto")
    return rotate_by_matrices(torch.eye(channels), *rotation.matrices()).numpy()


# --------------------------------------------------------------------------------------------------------------- writing


class _Writer:
    """Collects the nodes that replace one Attention, named ``<module>.<step>``."""

    def __init__(self, model: ir.Model, match: _Match) -> None:
        self.graph, self.name = model.graph, match.name
        self.nodes: list[ir.Node] = []
        operand = match.node.inputs[0]
        assert operand is not None
        assert operand.dtype is not None
        self.dtype = operand.dtype

    def op(
        self, op_type: str, step: str, *inputs: ir.Value, like: ir.Value, shape: ir.Shape | None = None, **attrs: object
    ) -> ir.Value:
        """Append a node whose output has the type of ``like``, and its shape where none is given."""
        name = f"{self.name}.{step}"
        node = ir.node(op_type, inputs, attrs, name=name)
        output = node.outputs[0]
        output.name, output.dtype, output.shape = name, like.dtype, shape if shape is not None else like.shape
        self.nodes.append(node)
        return output

    def constant(self, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        """Return the initializer of a name; a second call with the name returns the first one's."""
        if name not in self.graph.initializers:
            tensor = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def quantized(self, step: str, value: ir.Value, scale: float) -> ir.Value:
        """Append Q/DQ in e4m3 with a static scale."""
        factor = self.constant(f"{self.name}.{step}_scale", np.array(scale), self.dtype)
        zero = self.constant(f"{DOMAIN}.e4m3.zero", np.zeros(()), ir.DataType.FLOAT8E4M3FN)
        codes = self.op("QuantizeLinear", f"{step}_q", value, factor, zero, like=value)
        codes.dtype = ir.DataType.FLOAT8E4M3FN
        return self.op("DequantizeLinear", f"{step}_dq", codes, factor, zero, like=value)


def _rewrite(model: ir.Model, match: _Match) -> AttentionScales:
    node, write = match.node, _Writer(model, match)
    q, k, v = node.inputs[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    assert q.shape is not None
    channels = int(q.shape[3])
    fold, rotation = _fold(match), _rotation(channels)
    inverse_root = channels**-0.5
    p_scale = _rounded_up(1 / E4M3_MAX, write.dtype)
    q_scale, k_scale, v_scale = (
        _rounded_up(max(bound, 2.0**-14) / E4M3_MAX, write.dtype)
        for bound in (
            _norm_bound(match.q_norms, fold) * inverse_root, _norm_bound(match.k_norms, 1 / fold), match.v_bound,
        )
    )  # fmt: skip
    for norms, factors in ((match.q_norms, fold), (match.k_norms, 1 / fold)):
        _scale_norms(write, norms, factors)
    rotated_q = _rotated(write, "q", q, rotation * inverse_root)
    rotated_k = _rotated(write, "k", k, rotation)
    operands = [
        write.quantized(step, value, scale)
        for step, value, scale in (("q", rotated_q, q_scale), ("k", rotated_k, k_scale), ("v", v, v_scale))
    ]
    swapped = ir.Shape([q.shape[0], q.shape[1], q.shape[3], q.shape[2]])
    square = ir.Shape([q.shape[0], q.shape[1], q.shape[2], q.shape[2]])
    keys = write.op("Transpose", "k_t", operands[1], like=k, shape=swapped, perm=[0, 1, 3, 2])
    scores = write.op("MatMul", "scores", operands[0], keys, like=q, shape=square)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None:
        least = write.constant(f"{DOMAIN}.{write.dtype.name.lower()}.least", np.array(-np.inf), write.dtype)
        scores = write.op("Where", "masked", mask, scores, least, like=scores)
    shares = write.op("Softmax", "softmax", scores, like=scores, axis=-1)
    output = write.op("MatMul", "attended", write.quantized("p", shares, p_scale), operands[2], like=q)
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], write.nodes, node.outputs[:1], [output])
    return AttentionScales(match.name, match.order, fold, rotation, q_scale, k_scale, v_scale, p_scale)


def _scale_norms(write: _Writer, norms: tuple[_Norm, ...], factors: np.ndarray) -> None:
    """Give the norms weights and biases times ``factors``; the powers of two leave every digit as it is."""
    for norm in norms:
        old = norm.node.inputs[norm.index]
        assert old is not None
        assert old.const_value is not None
        new = write.constant(f"{old.name}.balanced", norm.data.reshape(-1) * factors, old.const_value.dtype)
        norm.node.replace_input_with(norm.index, new)
        if not old.uses() and old.name in write.graph.initializers:
            del write.graph.initializers[old.name]


def _rotated(write: _Writer, step: str, value: ir.Value, matrix: np.ndarray) -> ir.Value:
    """Return [B, H, S, d] of ``value``, its heads rotated in [B, S, H, d]."""
    factor = write.constant(
        f"{DOMAIN}.head_rotation.{step}.{len(matrix)}.{write.dtype.name.lower()}", matrix, write.dtype
    )
    before = value.producer()
    if (
        before is not None
        and before.op_type == "Transpose"
        and list(before.attributes["perm"].as_ints()) == [0, 2, 1, 3]
    ):
        rows = before.inputs[0]
        assert rows is not None
    else:
        shape = value.shape
        assert shape is not None
        moved = ir.Shape([shape[0], shape[2], shape[1], shape[3]])
        rows = write.op("Transpose", f"{step}_rows", value, like=value, shape=moved, perm=[0, 2, 1, 3])
    rotated = write.op("MatMul", f"{step}_rotated", rows, factor, like=value, shape=rows.shape)
    return write.op("Transpose", f"{step}_heads", rotated, like=value, perm=[0, 2, 1, 3])
