"""The common parts of the lowerings of ``dvdquant::QuantLinear``: node reader, emitter, rotation and token scales.

The lowerings agree on these numerics. Everything that carries a magnitude (token scale s, row scale Δ, the mantissa of
the Hadamard factor) is applied in fp32 after the product, where it fuses into the epilogue. The values that enter the
product in the graph's dtype are small integers times a power of two, which fp16 and bf16 hold exactly. So no fp16 scale
can underflow, no fp16 product can overflow (|sum| ≤ K), and a bf16 graph loses nothing by rounding scales to 8 bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from dvdquant.errors import ExportError
from dvdquant.numerics.activation_grid import AMAX_FLOOR
from dvdquant.numerics.packing import expand_zero
from dvdquant.onnx.schema import DOMAIN

__all__ = ["Emitter", "QuantLinearNode", "lower_each", "quant_linear_nodes", "split_rotation"]

INPUT_NAMES = ("x", "weight", "weight_scale", "weight_group_scale", "weight_zero", "bias", "hadamard", "outer")
FLOAT_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT)


@dataclass(frozen=True)
class QuantLinearNode:
    """One ``dvdquant::QuantLinear`` node with its constants read.

    Args:
        node: The node.
        name: The name of the layer.
        x: The input value [..., K].
        weight: The initializer of packed bytes [N, K/2], whose data are not read.
        scale: The scales of the rows, fp32 [N].
        group_scale: The group scales, uint8 [N, groups].
        zero: The zero-points as they are stored, fp32 [N] or uint8 [N, groups].
        bias: The bias, fp32 [N].
        hadamard: The inner rotation matrix, fp32 [b, b].
        outer: The outer rotation matrix, fp32 [p, p].
        act_bits: The bits of the activation codes.
        act_group: The number of channels that share an activation scale; 0 means the whole token.
        features: K, the number of input channels.
    """

    node: ir.Node
    name: str
    x: ir.Value
    weight: ir.Value
    scale: np.ndarray
    group_scale: np.ndarray
    zero: np.ndarray
    bias: np.ndarray
    hadamard: np.ndarray
    outer: np.ndarray
    act_bits: int
    act_group: int
    features: int

    @property
    def rows(self) -> int:
        """Return N, the number of output channels."""
        return int(self.scale.shape[0])

    @property
    def groups(self) -> int:
        """Return the number of weight groups per row."""
        return int(self.group_scale.shape[1])

    @property
    def zero_points(self) -> np.ndarray:
        """Return the zero-points, fp32 [N, 1] or [N, groups]."""
        return expand_zero(torch.from_numpy(np.array(self.zero))).numpy()

    @property
    def qmax(self) -> int:
        """Return the largest activation code, 2^(act_bits − 1) − 1."""
        return int(2 ** (self.act_bits - 1)) - 1

    @property
    def dtype(self) -> ir.DataType:
        """Return the graph's dtype here, that of x and y.

        Raises:
            ExportError: The type of x is unknown or no floating type.
        """
        dtype = self.x.dtype
        if dtype not in FLOAT_TYPES:
            raise ExportError(
                f"{self.name}: the input of QuantLinear has element type {dtype}",
                available=[t.name for t in FLOAT_TYPES],
                fix="run shape and type inference on the graph before lowering",
            )
        return dtype

    @property
    def rank(self) -> int:
        """Return the rank of x.

        Raises:
            ExportError: It is unknown.
        """
        if self.x.shape is None:
            raise ExportError(
                f"{self.name}: the rank of the input of QuantLinear is unknown", fix="run shape inference"
            )
        return len(self.x.shape)

    @property
    def weight_tensor(self) -> ir.TensorProtocol:
        """Return the tensor behind the packed weight.

        Raises:
            ExportError: The weight file is not bound to the graph.
        """
        return _constant(self.node, self.name, 1)

    def packed_rows(self) -> np.ndarray:
        """Return the packed weight, uint8 [N, K/2]; it is a memory map if the weight is an external tensor.

        Raises:
            ExportError: The weight file is not bound to the graph.
        """
        return np.asarray(self.weight_tensor.numpy()).view(np.uint8)


def quant_linear_nodes(model: ir.Model) -> Iterator[QuantLinearNode]:
    """Yield the QuantLinear nodes of the main graph, in order.

    Args:
        model: The graph.

    Raises:
        ExportError: A node sits in a subgraph, two nodes share a weight, act_group does not divide K, or a weight,
            scale or rotation is not an initializer.
    """
    for node in list(model.graph.all_nodes()):
        if (node.domain, node.op_type) != (DOMAIN, "QuantLinear"):
            continue
        if node.graph is not model.graph:
            raise ExportError(
                f"{node.name}: QuantLinear inside a subgraph cannot be lowered",
                fix="export again with -v, and report it with what dvdq doctor prints",
            )
        yield _read(node)


def _read(node: ir.Node) -> QuantLinearNode:
    """Read the constants of a QuantLinear node.

    Raises:
        ExportError: The node has other inputs, shares its weight, or a constant is missing.
    """
    weight, x = node.inputs[1], node.inputs[0]
    if weight is None or x is None or len(node.inputs) != len(INPUT_NAMES):
        raise ExportError(
            f"{node.name}: QuantLinear takes {len(INPUT_NAMES)} inputs: {', '.join(INPUT_NAMES)}",
            fix="export again with -v, and report it with what dvdq doctor prints",
        )
    name = (weight.name or node.name or "quant_linear").removesuffix(".weight")
    scale, group_scale, zero, bias, hadamard, outer = (
        np.asarray(_constant(node, name, i).numpy()) for i in range(2, 8)
    )
    if len(weight.uses()) > 1:
        raise ExportError(
            f"{name}: the packed weight is used by {len(weight.uses())} nodes", fix="give each node its own"
        )
    features = 2 * int(_constant(node, name, 1).shape.numpy()[1])
    bits, group = node.attributes["act_bits"].as_int(), node.attributes["act_group"].as_int()
    if group and features % group:
        raise ExportError(
            f"{name}: {features} channels cannot be split into groups of {group}",
            fix="take a recipe with a group size that divides the channels, or with one scale per row (w4a4, w4a8)",
        )
    constants = (scale, group_scale, zero, bias, hadamard, outer)
    return QuantLinearNode(node, name, x, weight, *constants, act_bits=bits, act_group=group, features=features)


def _constant(node: ir.Node, layer: str, index: int) -> ir.TensorProtocol:
    """Return the tensor behind one input of a node.

    Args:
        node: The QuantLinear node.
        layer: The name of the layer, for the error.
        index: The position of the input.

    Raises:
        ExportError: The input holds no data.
    """
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise ExportError(
            f"{layer}: input {INPUT_NAMES[index]!r} of QuantLinear holds no data",
            fix="bind the weight file to the graph before lowering it",
        )
    return value.const_value


def split_rotation(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """Split a rotation matrix: ``matrix = exact · residual``, ``exact`` representable in bf16 and residual in [1, 2).

    A Hadamard factor has entries ±1/√n. The power of two below goes into the product. The rest is a common factor that
    the fp32 token scale takes over. A matrix of any other kind is returned as it is, with residual 1.

    Args:
        matrix: The rotation matrix, fp32 [n, n].

    Returns:
        (exact, fp32 [n, n], residual).
    """
    magnitude = float(np.abs(matrix).flat[0])
    if magnitude == 0.0 or not np.allclose(np.abs(matrix), magnitude, rtol=1e-6, atol=0.0):
        return matrix.astype(np.float32), 1.0
    power = float(2.0 ** np.floor(np.log2(magnitude)))
    return (np.sign(matrix) * power).astype(np.float32), magnitude / power


class Emitter:
    """The collected nodes that replace one QuantLinear; they are named ``<layer>.<step>``.

    Args:
        model: The graph that the nodes are for.
        layer: The QuantLinear node.

    Attributes:
        graph: The main graph of the model.
        layer: The QuantLinear node.
        nodes: The nodes that were emitted, in order.
    """

    def __init__(self, model: ir.Model, layer: QuantLinearNode) -> None:
        self.graph = model.graph
        self.layer = layer
        self.nodes: list[ir.Node] = []

    def op(
        self, op_type: str, step: str, *inputs: ir.Value, domain: str = "", outputs: int = 1, **attrs: object
    ) -> ir.Value:
        """Append a node, and return its first output (the others follow in ``.producer().outputs``).

        Args:
            op_type: The operator.
            step: The name of the step, unique in the layer.
            *inputs: The inputs of the node.
            domain: The domain of the operator.
            outputs: The number of outputs.
            **attrs: The attributes of the node.
        """
        name = f"{self.layer.name}.{step}"
        node = ir.node(op_type, inputs, attrs, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else f"{name}.{index}"
        self.nodes.append(node)
        return node.outputs[0]

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return the initializer of a name; one that is there already is used again.

        Args:
            name: The name.
            tensor: The data of a new initializer.
        """
        if name not in self.graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def array(self, step: str, array: np.ndarray, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Return a constant of this layer, rounded to ``dtype``.

        Args:
            step: The name of the step, unique in the layer.
            array: The values.
            dtype: The ONNX element type.
        """
        name = f"{self.layer.name}.{step}"
        return self.initializer(name, ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name))

    def scalar(self, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Return a constant scalar, shared by the whole graph.

        Args:
            value: The value.
            dtype: The ONNX element type.
        """
        name = f"{DOMAIN}.{dtype.name.lower()}.{value:.9g}"
        return self.initializer(name, ir.Tensor(np.array(value, dtype.numpy()), dtype=dtype, name=name))

    def ints(self, *values: int) -> ir.Value:
        """Return a constant int64 vector, shared by the whole graph.

        Args:
            *values: The elements.
        """
        name = f"{DOMAIN}.int64.{'_'.join(map(str, values))}"
        return self.initializer(name, ir.tensor(np.array(values, np.int64), name=name))

    def cast(self, step: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Append a Cast, and return its output.

        Args:
            step: The name of the step, unique in the layer.
            value: The value to cast.
            dtype: The ONNX element type to cast to.
        """
        return self.op("Cast", step, value, to=int(dtype))

    def split(self, step: str, value: ir.Value, parts: int, size: int) -> ir.Value:
        """Reshape [..., parts · size] to [..., parts, size].

        Args:
            step: The name of the step, unique in the layer.
            value: A value of the rank of x.
            parts: The number of parts of the last axis.
            size: The size of a part.

        Raises:
            ExportError: The rank of x is unknown.
        """
        return self.op("Reshape", step, value, self.ints(*[0] * (self.layer.rank - 1), parts, size))

    def join(self, step: str, value: ir.Value) -> ir.Value:
        """Reshape [..., parts, size] to [..., K].

        Args:
            step: The name of the step, unique in the layer.
            value: A value with one axis more than x.

        Raises:
            ExportError: The rank of x is unknown.
        """
        return self.op("Reshape", step, value, self.ints(*[0] * (self.layer.rank - 1), self.layer.features))

    def rotate(self) -> tuple[ir.Value, float]:
        """Emit the rotation, and return (x̃ / residual in the graph's dtype, residual).

        1. inner and outer are 1 × 1: it is x itself.
        2. outer is 1 × 1: it is ``dvdquant::Rotate``.
        3. otherwise it is ``dvdquant::RotateOuter``.

        Raises:
            ExportError: The type of x is unknown or no floating type.
        """
        layer = self.layer
        inner, outer = layer.hadamard, layer.outer
        if inner.shape[0] == 1 and outer.shape[0] == 1:
            return layer.x, 1.0
        exact, residual = split_rotation(inner)
        factors = [self._rotation_factor("hadamard", exact)]
        if outer.shape[0] > 1:
            exact, more = split_rotation(outer)
            residual *= more
            factors.append(self._rotation_factor("outer", exact))
        kind = "RotateOuter" if len(factors) > 1 else "Rotate"
        return self.op(kind, "rotate", layer.x, *factors, domain=DOMAIN), residual

    def _rotation_factor(self, kind: str, matrix: np.ndarray) -> ir.Value:
        """Return a rotation matrix in the graph's dtype as an initializer that all layers share.

        Args:
            kind: ``hadamard`` or ``outer``.
            matrix: The matrix [n, n], exact in the graph's dtype.
        """
        # In a model one order stands for one matrix; the checksum in the name keeps other matrices apart.
        digest = zlib.crc32(matrix.tobytes())
        name = f"{DOMAIN}.{kind}.{matrix.shape[0]}.{self.layer.dtype.name.lower()}.{digest:08x}"
        data = matrix.astype(self.layer.dtype.numpy())
        return self.initializer(name, ir.Tensor(data, dtype=self.layer.dtype, name=name))

    def token_codes(self, rotated: ir.Value, residual: float) -> tuple[ir.Value, ir.Value]:
        """Emit the codes before rounding and the token scale, both fp32.

        The codes are clip(x̃ · qmax/amax, ±qmax), and the scale is s = residual · amax / qmax.

        Args:
            rotated: x̃ / residual [..., K], in the graph's dtype.
            residual: The common factor of the rotation; see :func:`split_rotation`.

        Returns:
            The codes and the scale: [..., K] and [..., 1] for whole tokens, [..., K/G, G] and [..., K/G, 1] for groups.

        Raises:
            ExportError: The rank of x is unknown, and the tokens have groups.
        """
        layer, f32 = self.layer, ir.DataType.FLOAT
        if layer.act_group:
            rotated = self.split("act_groups", rotated, layer.features // layer.act_group, layer.act_group)
        amax = self.op("ReduceMax", "amax", self.op("Abs", "abs", rotated), self.ints(-1), keepdims=1)
        amax = self.op("Max", "amax_floor", self.cast("amax_fp32", amax, f32), self.scalar(AMAX_FLOOR))
        inverse = self.op("Div", "inverse", self.scalar(float(layer.qmax)), amax)
        scale = self.op("Mul", "act_scale", amax, self.scalar(residual / layer.qmax))
        scaled = self.op("Mul", "scaled", self.cast("rotated_fp32", rotated, f32), inverse)
        bound = float(layer.qmax)
        return self.op("Clip", "clipped", scaled, self.scalar(-bound), self.scalar(bound)), scale

    def finish(self, product: ir.Value, scale: ir.Value | None, row_scale: np.ndarray) -> ir.Value:
        """Emit fp32 ``product · scale[m] · row_scale[n] + bias[n]``, and return it rounded once to the graph's dtype.

        Args:
            product: The product [..., N], fp32.
            scale: The token scale [..., 1], fp32, or None if the product has it already.
            row_scale: The scales of the rows [N].
        """
        if scale is not None:
            product = self.op("Mul", "token_scaled", product, scale)
        product = self.op("Mul", "row_scaled", product, self.array("row_scale", row_scale))
        if np.any(self.layer.bias):
            product = self.op("Add", "biased", product, self.array("bias_fp32", self.layer.bias))
        return self.cast("output", product, self.layer.dtype)

    def replace(self, output: ir.Value) -> None:
        """Put the collected nodes in the place of the QuantLinear node.

        Args:
            output: The value that replaces the output of the QuantLinear node.
        """
        node = self.layer.node
        output.name = None
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], self.nodes, node.outputs, [output])


def lower_each(model: ir.Model, lower: Callable[[Emitter], ir.Value]) -> bool:
    """Replace every QuantLinear by the nodes that ``lower`` emits, then drop constants and functions that nothing uses.

    Args:
        model: The graph, which is changed in place.
        lower: A function that emits the nodes of a layer, and returns their output.

    Returns:
        True if there was a QuantLinear.

    Raises:
        ExportError: See :func:`quant_linear_nodes`.
    """
    changed = False
    for layer in quant_linear_nodes(model):
        used = [value for value in layer.node.inputs[1:] if value is not None]
        emitter = Emitter(model, layer)
        emitter.replace(lower(emitter))
        _drop_unused(model.graph, used)
        changed = True
    if changed:
        model.functions.pop((DOMAIN, "QuantLinear", ""), None)
        _add_rotation_functions(model)
    return changed


def _drop_unused(graph: ir.Graph, values: list[ir.Value]) -> None:
    """Delete those of the initializers that no node uses."""
    for value in values:
        if not value.uses() and value.name in graph.initializers and graph.initializers[value.name] is value:
            del graph.initializers[value.name]


def _add_rotation_functions(model: ir.Model) -> None:
    """Add the bodies of the rotation operators that the graph uses."""
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    opset = model.graph.opset_imports[""]
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in sorted(used & {"Rotate", "RotateOuter"}):
        model.functions[(DOMAIN, name, "")] = _rotation_function(name, opset)


def _rotation_function(name: str, opset: int) -> ir.Function:
    """Return the body of a rotation operator: reshape to blocks, multiply, reshape back.

    Args:
        name: ``Rotate``, with inputs (x, hadamard), or ``RotateOuter``, with inputs (x, hadamard, outer).
        opset: The version of the standard operators.
    """
    inputs = [ir.Value(name=n) for n in ("x", "hadamard", "outer")][: 3 if name == "RotateOuter" else 2]
    nodes: list[ir.Node] = []

    def op(op_type: str, out: str, *values: ir.Value, **attrs: object) -> ir.Value:
        """Append a standard node, and return its output, which is called ``out``."""
        node = ir.node(op_type, values, attrs, name="")
        node.outputs[0].name = out
        nodes.append(node)
        return node.outputs[0]

    sizes = [op("Shape", "leading", inputs[0], start=0, end=-1), op("Constant", "blocks", value_ints=[-1])]
    sizes += [
        op("Shape", f"{group_scale.name}_order", group_scale, start=0, end=1) for group_scale in reversed(inputs[1:])
    ]
    blocked = op("Reshape", "blocked", inputs[0], op("Concat", "block_shape", *sizes, axis=0))
    mixed = op("MatMul", "inner", blocked, inputs[1])
    if len(inputs) == 3:
        mixed = op("MatMul", "across", op("Transpose", "outer_t", inputs[2], perm=[1, 0]), mixed)
    result = op("Reshape", "rotated", mixed, op("Shape", "x_shape", inputs[0]))
    graph = ir.Graph(inputs, [result], nodes=nodes, opset_imports={"": opset}, name=name)
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
