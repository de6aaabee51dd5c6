"""Synthetic chains of QuantLinear layers and their references, for the tests of lowerings and engine builders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def hadamard(order: int) -> np.ndarray:
    """Orthonormal Sylvester matrix."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(order)).astype(np.float32)


def paley12() -> np.ndarray:
    """Orthonormal Hadamard matrix of order 12 (Paley I, residues modulo 11); not symmetric."""
    residues = {pow(i, 2, 11) for i in range(1, 11)}
    q = np.array([[0 if i == j else (1 if (i - j) % 11 in residues else -1) for j in range(11)] for i in range(11)])
    s = np.zeros((12, 12))
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, q
    matrix = np.eye(12) + s
    assert np.array_equal(matrix @ matrix.T, 12 * np.eye(12))
    return (matrix / np.sqrt(12)).astype(np.float32)


@dataclass
class Layer:
    """One layer's constants, canonical."""

    name: str
    packed: np.ndarray
    scale: np.ndarray
    group_scale: np.ndarray
    zero: np.ndarray
    bias: np.ndarray
    hadamard: np.ndarray
    outer: np.ndarray
    act_bits: int
    act_group: int

    @property
    def codes(self) -> np.ndarray:
        low = (self.packed << 4).view(np.int8) >> 4
        return np.stack([low, self.packed.view(np.int8) >> 4], axis=-1).reshape(self.packed.shape[0], -1)

    def weight(self) -> np.ndarray:
        """fp64 [N, K]."""
        n, groups = self.group_scale.shape
        zero = self.zero.astype(np.float64)[:, None]
        if self.zero.dtype == np.uint8:
            zero = self.zero[..., None] / 16 - 8
        centred = self.codes.reshape(n, groups, -1) - (zero[..., None] if zero.ndim == 2 else zero)
        steps = self.scale.astype(np.float64)[:, None] * self.group_scale / 255
        return (centred * steps[..., None]).reshape(n, -1)


@dataclass
class Spec:
    """A chain of layers K → N → K …, GELU between, residual where the widths meet again."""

    dtype: str = "fp16"
    widths: tuple[int, ...] = (256, 512, 256)
    act_bits: int = 8
    act_group: int = 0
    weight_group: int = 0
    zero: str = "midrise"
    block: int = 64
    outer: int = 1
    seed: int = 0
    layers: list[Layer] = field(default_factory=list)

    def build_layers(self) -> list[Layer]:
        rng = np.random.default_rng(self.seed)
        for i, (k, n) in enumerate(zip(self.widths, self.widths[1:])):
            groups = k // self.weight_group if self.weight_group else 1
            group_scale = (
                rng.integers(90, 256, (n, groups)).astype(np.uint8) if groups > 1 else np.full((n, 1), 255, np.uint8)
            )
            stored = None
            if self.zero == "float":
                stored = rng.integers(96, 150, (n, groups)).astype(np.uint8)
                zero = np.repeat(stored / 16 - 8, k // groups, axis=1)
            else:
                kinds = {"midrise": np.full(n, -0.5), "symmetric": np.zeros(n), "paper": rng.integers(-3, 4, n)}
                zero = kinds[self.zero][:, None]
            # Gaussian rows, as after a rotation.
            codes = np.clip(np.rint(rng.standard_normal((n, k)) * 2.6 + zero), -8, 7).astype(np.int8)
            pairs = codes.view(np.uint8).reshape(n, -1, 2)
            packed = (pairs[..., 0] & 15) | (pairs[..., 1] << 4)
            scale = (rng.random(n) + 0.5) * 0.02 / 2.6
            self.layers.append(
                Layer(
                    f"blocks.{i}.ffn",
                    packed,
                    scale.astype(np.float32),
                    group_scale,
                    zero[:, 0].astype(np.float32) if stored is None else stored,
                    (rng.standard_normal(n) * 0.05).astype(np.float32),
                    hadamard(self.block),
                    paley12() if self.outer == 12 else hadamard(self.outer),
                    self.act_bits,
                    self.act_group,
                )
            )
        return self.layers


def graph(spec: Spec, folder: Path | None = None, *, rows: int | str = "tokens") -> ir.Model:
    """The ONNX graph of ``spec``; with ``folder`` the packed weights lie in ``folder/weights.safetensors``."""
    dtype = DTYPES[spec.dtype]
    layers = spec.layers or spec.build_layers()
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([1, rows, spec.widths[0]]))
    nodes: list[ir.Node] = []
    initializers: dict[str, ir.Value] = {}

    def const(name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in initializers:
            initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return initializers[name]

    def op(op_type: str, name: str, inputs: list[ir.Value], width: int, domain: str = "", **attrs: object) -> ir.Value:
        node = ir.node(op_type, inputs, attrs, domain=domain, name=name)
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
        node.outputs[0].shape = ir.Shape([1, rows, width])
        nodes.append(node)
        return node.outputs[0]

    stored = write_weights(layers, folder) if folder else {}
    h, previous = x, {}
    for i, layer in enumerate(layers):
        n, k = layer.packed.shape[0], layer.packed.shape[1] * 2
        name = f"{layer.name}.weight"
        tensors = {
            name: stored.get(name) or ir.Tensor(layer.packed.view(np.int8), name=name),
            **{f"{layer.name}.{f}": ir.tensor(getattr(layer, a)) for f, a in
               (("weight_scale", "scale"), ("weight_group_scale", "group_scale"), ("weight_zero", "zero"), ("bias", "bias"))},
            f"hadamard.{layer.hadamard.shape[0]}": ir.tensor(layer.hadamard),
            f"outer.{layer.outer.shape[0]}": ir.tensor(layer.outer),
        }  # fmt: skip
        inputs = [h, *(const(key, tensor) for key, tensor in tensors.items())]
        y = op("QuantLinear", f"ql{i}", inputs, n, "dvdquant", act_bits=layer.act_bits, act_group=layer.act_group)
        if n in previous:
            y = op("Add", f"residual{i}", [y, previous[n]], n)
        previous[k] = h
        h = op("Gelu", f"gelu{i}", [y], n, approximate="tanh") if i < len(layers) - 1 else y
    g = ir.Graph(
        [x],
        [h],
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports={"": 23, "dvdquant": 1},
        name="chain",
    )
    return ir.Model(g, ir_version=11)


def write_weights(layers: list[Layer], folder: Path) -> dict[str, ir.TensorProtocol]:
    """One safetensors file with the packed weights and external tensors into it."""
    from safetensors.numpy import save_file

    path = folder / "weights.safetensors"
    save_file({f"{layer.name}.weight": layer.packed.view(np.int8) for layer in layers}, path)
    import json

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = ir.ExternalTensor(
            path.name, 8 + size + begin, end - begin, ir.DataType.INT8, shape=ir.Shape(entry["shape"]), name=name,
            base_dir=str(folder),
        )  # fmt: skip
    return tensors


def chain(spec: Spec, x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The chain in torch. float64 is the op's definition; fp16 / bf16 emulate it op by op in that dtype."""
    h = torch.from_numpy(x.astype(np.float64)).to(dtype)
    layers, previous = spec.layers, {}
    for i, layer in enumerate(layers):
        n, k = layer.packed.shape[0], layer.packed.shape[1] * 2
        y = quant_linear(layer, h, dtype)
        if n in previous:
            y = y + previous[n]
        previous[k] = h
        h = torch.nn.functional.gelu(y, approximate="tanh") if i < len(layers) - 1 else y
    return h.double().numpy()


def quant_linear(layer: Layer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One layer with every intermediate in ``dtype`` (scales in fp32 at least)."""
    wide = torch.promote_types(dtype, torch.float32)
    inner, outer = (torch.from_numpy(m).double().to(dtype) for m in (layer.hadamard, layer.outer))
    rotated = outer.T @ (x.reshape(*x.shape[:-1], -1, outer.shape[0], inner.shape[0]) @ inner)
    grouped = rotated.reshape(*x.shape[:-1], -1, layer.act_group or x.shape[-1]).to(wide)
    qmax = 2 ** (layer.act_bits - 1) - 1
    amax = grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    codes = torch.clamp(torch.round(grouped * (qmax / amax)), -qmax, qmax)
    act = (codes * (amax / qmax)).reshape(x.shape).to(dtype)
    weight = torch.from_numpy(layer.weight()).to(dtype)
    return act @ weight.T + torch.from_numpy(layer.bias).to(dtype)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def outliers(shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray:
    """Signed, heavy-tailed, with a few channels ten times larger and one zero token; rounded to ``dtype``."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    x[..., :: shape[-1] // 7] *= 10
    x[:, 1] = 0
    kinds = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
    return x.astype(kinds[dtype])
