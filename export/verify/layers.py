"""The check of an exported graph's layers one by one: each on a given x, against float64, with a derived bound.

Between two executors of a whole 4-bit-activation network the codes at rounding ties decide, and they hide a wrong
layer. Alone, on the very x that it had in the graph, a layer has no such freedom: see
:mod:`dvdquant.export.verify.tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dvdquant.export.verify.intermediates import (
    Intermediate,
    add_intermediates,
    cut_out,
    find_intermediates,
    run_graph,
    select,
)
from dvdquant.export.verify.tolerance import OpInputs, judge
from dvdquant.model.layers import LayerSpec, QuantLinear
from dvdquant.model.quantized_model import quant_linears

__all__ = ["LayerCheck", "LayersCheck", "check_layers", "choose_layers", "judge_layers", "token_step"]

MAX_LAYERS = 64
MIN_TOKENS = 32
PRODUCTS = 1 << 36  # of activations and weights, per graph; some 10 float64 operations each
BATCH = 1 << 25  # weights that run in one cut-out


@dataclass(frozen=True)
class LayerCheck:
    """The check of one layer against float64 on one input.

    Args:
        name: The name of the layer.
        excess: The largest |y − y₆₄| / bound over all elements; at most 1 if the layer is right.
        ties: The number of activation codes near a rounding tie.
        codes: The number of all activation codes.
        error: |y − y₆₄| at the element of ``excess``.
        bound: Its bound there.
    """

    name: str
    excess: float
    ties: int
    codes: int
    error: float = 0.0
    bound: float = 0.0

    @property
    def passed(self) -> bool:
        """Return whether every element is within its bound (NaN is not)."""
        return self.excess <= 1.0


@dataclass(frozen=True)
class LayersCheck:
    """The judged layers of one graph.

    Args:
        judged: The checks of the layers.
        total: The number of layers in the graph.
    """

    judged: tuple[LayerCheck, ...]
    total: int

    @property
    def worst(self) -> LayerCheck:
        """Return the layer closest to its bound, or furthest beyond it."""
        return max(self.judged, key=lambda check: np.nan_to_num(check.excess, nan=np.inf))

    @property
    def failed(self) -> tuple[LayerCheck, ...]:
        """Return the layers out of bounds, worst first."""
        return tuple(sorted((c for c in self.judged if not c.passed), key=lambda c: -c.excess))

    @property
    def passed(self) -> bool:
        """Return whether there are layers and all of them are within their bounds."""
        return bool(self.judged) and not self.failed

    def to_json(self) -> dict[str, Any]:
        """Return counts, the worst layer and the layers that failed, as a plain dict.

        The numbers of a layer are those of its worst element.
        """
        return {
            "judged": len(self.judged),
            "total": self.total,
            "worst": asdict(self.worst),
            "failed": [asdict(check) for check in self.failed],
            "passed": self.passed,
        }


def choose_layers(specs: Iterable[LayerSpec], worst: Iterable[str] = (), limit: int = MAX_LAYERS) -> tuple[str, ...]:
    """Return the names of the layers to judge, in module order.

    All layers are judged up to ``limit``. Of more it is an even spread with the first, the last and those in ``worst``.

    Args:
        specs: The quantized layers, in module order.
        worst: The names of layers that must be among them.
        limit: The number of layers to judge.
    """
    names = [spec.name for spec in specs]
    if len(names) <= limit:
        return tuple(names)
    wanted = {name for name in worst if name in names}
    places = np.linspace(0, len(names) - 1, max(2, limit - len(wanted))).round().astype(int)
    wanted |= {names[place] for place in places}
    return tuple(name for name in names if name in wanted)


def token_step(specs: Iterable[LayerSpec], tokens: int) -> int:
    """Return n so that tokens × weights stay below ``PRODUCTS`` if every n-th token is judged.

    At least ``MIN_TOKENS`` tokens are judged, or all if there are fewer.

    Args:
        specs: The layers to judge.
        tokens: The number of tokens.
    """
    weights = sum(spec.out_features * spec.features for spec in specs)
    return max(1, tokens // max(MIN_TOKENS, PRODUCTS // max(1, weights)))


def judge_layers(
    model: ir.Model,
    intermediates: Mapping[str, Intermediate],
    xs: Mapping[str, Tensor],
    layers: Mapping[str, QuantLinear],
    dtype: torch.dtype,
    folder: Path,
    advance: Callable[[str], None] = lambda layer: None,
) -> list[LayerCheck]:
    """Run the layers again, cut out, on the given inputs, and judge their outputs; ``model`` is consumed.

    They are cut out because ONNX Runtime drops the rounding between an fp16 operator that it runs in fp32 and the
    layer's first cast: inside the graph, the x of a layer is not quite the x that comes out as an output.

    Args:
        model: The prepared graph.
        intermediates: The inputs and outputs of the layers in the graph, by name.
        xs: x of each layer [..., K] in the graph's dtype, or in fp32 where that is bfloat16.
        layers: The loaded PyTorch layers by name, with the activation grids that the graph is meant to have.
        dtype: The dtype of the graph.
        folder: The folder of the weight files.
        advance: A function that is called with the name of every layer that is done.

    Raises:
        ExportError: ONNX Runtime cannot run a layer.
    """
    cut = cut_out(model, intermediates)
    checks = []
    for batch in _batches(intermediates, layers):
        part = cut.clone() if len(batch) < len(intermediates) else cut
        outputs = {value.name: value for value in part.graph.outputs}
        part = select(part, [outputs[intermediates[name].y.name] for name in batch])
        ys = run_graph(
            part, folder, {intermediates[name].fed: xs[name] for name in batch}, f"layer {batch[0]} and others"
        )
        for name in batch:
            intermediate, layer = intermediates[name], layers[name]
            judged = judge(OpInputs.of(layer), xs[name], dtype if intermediate.lowered else torch.float32, dtype)
            excess, error, bound = judged.worst(ys[intermediate.y.name or ""])
            checks.append(LayerCheck(name, excess, int(judged.near.sum()), judged.near.numel(), error, bound))
            advance(name)
    return checks


def check_layers(
    model: ir.Model,
    torch_model: nn.Module,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    folder: Path,
    names: Iterable[str] | None = None,
    step: int = 1,
) -> list[LayerCheck]:
    """Run a prepared graph, then judge its layers on every ``step``-th token that they had there.

    Args:
        model: The prepared graph, which is consumed.
        torch_model: The quantized PyTorch model with the stored weights, set to the graph's activation grid.
        inputs: The inputs of the graph by name.
        dtype: The dtype of the graph.
        folder: The folder of the weight files.
        names: The names of the layers to judge; None means all.
        step: Every ``step``-th token is judged.

    Raises:
        ExportError: ONNX Runtime cannot run the graph or a layer, or a layer is not in the graph.
    """
    layers = quant_linears(torch_model)
    intermediates = find_intermediates(model, layers if names is None else names)
    outputs = add_intermediates(model, {name: intermediate.x for name, intermediate in intermediates.items()}, step)
    seen = run_graph(model, folder, inputs, model.graph.name or "the graph")
    return judge_layers(
        model, intermediates, {name: seen[outputs[name]] for name in intermediates}, layers, dtype, folder
    )


def _batches(intermediates: Mapping[str, Intermediate], layers: Mapping[str, QuantLinear]) -> Iterator[list[str]]:
    """Yield the names of the layers in batches of at most ``BATCH`` weights, or of one larger layer."""
    batch: list[str] = []
    weights = 0
    for name in intermediates:
        spec = layers[name].spec
        size = spec.out_features * spec.features
        if batch and weights + size > BATCH:
            yield batch
            batch, weights = [], 0
        batch.append(name)
        weights += size
    if batch:
        yield batch
