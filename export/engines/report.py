"""The request and the report of a build, which go as JSON between the exporter and the builder process."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "BUILD_MEMORY_FACTOR",
    "MARK",
    "BuildReport",
    "BuildRequest",
    "Shapes",
    "attention_summary",
    "layer_summary",
    "materialized_scores",
    "memory_advice",
]

# Peak resident memory of a build over the bytes of its weights, measured on TensorRT-RTX 1.7.1 with the mapped weight
# file given back phase by phase: 3.1 for packed INT4 (HunyuanVideo-13B), 2.2 for INT8 (Wan2.1-1.3B).
BUILD_MEMORY_FACTOR = 3.1
INT8_MEMORY_FACTOR = 2.2

# Starts a line of the builder process that is a message, not log.
MARK = "@dvdq "

Shapes = Mapping[str, tuple[tuple[int, ...], ...]]


def memory_advice(backend: str) -> str:
    """Return what to do where a builder has no memory left, with what is known of its need.

    Args:
        backend: ``tensorrt_rtx`` or ``tensorrt``.
    """
    words = f"free memory: a build takes up to {BUILD_MEMORY_FACTOR} times the bytes of the weights"
    return words if backend == "tensorrt_rtx" else f"{words} with TensorRT-RTX; with TensorRT that is an estimate"


@dataclass(frozen=True)
class BuildRequest:
    """The request for one engine.

    Args:
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        model: The absolute path of the ONNX file.
        engine: The absolute path of the file to write.
        sms: The target compute capabilities, such as "8.9".
        data_dir: The absolute path of the folder that external locations are relative to.
        data_roots: The absolute paths of the folders that external data may lie in.
        profile: Input name -> its [min, opt, max] shapes; None if no input is dynamic.
        plugins: The absolute paths of the plugin libraries.
        workspace_bytes: The builder's workspace limit in bytes; None means the library's default.
        timing_cache: The absolute path of a timing cache to read and update, or None.
        optimization_level: 0 to 5; None means the library's default.
        version_compatible: True lets the lean runtime of the same release run the engine (TensorRT).
    """

    backend: str
    model: str
    engine: str
    sms: tuple[str, ...]
    data_dir: str
    data_roots: tuple[str, ...]
    profile: Mapping[str, list[list[int]]] | None = None
    plugins: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    timing_cache: str | None = None
    optimization_level: int | None = None
    version_compatible: bool = False

    def to_json(self) -> str:
        """Return the request as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BuildRequest:
        """Read a request, the inverse of :meth:`to_json`.

        Args:
            text: The JSON text.
        """
        data: dict[str, Any] = json.loads(text)
        data.update({key: tuple(value) for key, value in data.items() if isinstance(value, list)})
        return cls(**data)


@dataclass(frozen=True)
class BuildReport:
    """The report of a build, for the manifest.

    Args:
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        version: The release of the builder.
        sms: The compute capabilities that the engine runs on.
        seconds: The wall time of parse and build, without the start of the process.
        bytes: The size of the engine.
        peak_rss_bytes: The peak resident memory of the builder process, mapped weight pages included.
        onnx_sha256: The SHA-256 of the ONNX file alone, not of external data.
        products: The number of matrix products that the builder planned per operand type, such as ``{"Int8": 40,
            "Int4": 2}`` (the constant operand's type; "" if both operands are activations). It is read from the
            builder's own listing.
        constant_bytes: The bytes of constants per type, from the same listing. A constant that several products share
            (a Hadamard factor) is stored once but listed by each.
        attention: The number of attentions that run as one fused kernel, per type of their queries, such as
            ``{"FP8": 30, "BFloat16": 30}``.
        warnings: The builder's warnings.
    """

    backend: str
    version: str
    sms: tuple[str, ...]
    seconds: float
    bytes: int
    peak_rss_bytes: int
    onnx_sha256: str
    products: Mapping[str, int] = field(default_factory=dict)
    constant_bytes: Mapping[str, int] = field(default_factory=dict)
    attention: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict for the manifest."""
        return asdict(self) | {"sms": list(self.sms), "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildReport:
        """Read a report, the inverse of :meth:`to_json`.

        Args:
            data: The report as :meth:`to_json` gives it.
        """
        known = dict(data)
        return cls(**known | {"sms": tuple(known["sms"]), "warnings": tuple(known.get("warnings", ()))})


_BITS = {
    "Int4": 4,
    "FP4E2M1": 4,
    "Int8": 8,
    "FP8": 8,
    "Half": 16,
    "BFloat16": 16,
    "Float": 32,
    "Int32": 32,
    "Int64": 64,
}
_CONSTANT = re.compile(r"Name: ([^,\s]+), Dimensions: \[([\d,]*)\].*?Datatype: (\w+)")
_PRODUCTS = ("gemm", "runtime_fusion", "fusion")


def layer_summary(lines: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Summarize the builder's verbose layer listing.

    A product is a layer of kind gemm, or a fused one, with a two-dimensional constant of at least 16 × 16 that its name
    or kind says it multiplies with.

    Args:
        lines: The lines of the listing.

    Returns:
        The number of products by the constant operand's type, and the bytes of constants by type.
    """
    products: Counter[str] = Counter()
    constants: dict[str, tuple[str, int]] = {}
    for line in lines:
        if not line.startswith("Name: ") or "LayerType: " not in line:
            continue
        kind = line.split("LayerType: ", 1)[1].split(",", 1)[0]
        section = line.split("Constants: [", 1)[-1].split("], Outputs:", 1)[0]
        operands = []
        for name, dims, dtype in _CONSTANT.findall(section):
            sizes = [int(d) for d in dims.split(",") if d]
            count = 1
            for size in sizes:
                count *= size
            constants[name] = (dtype, count * _BITS.get(dtype, 8) // 8)
            if len(sizes) >= 2 and min(sizes[-2:]) >= 16:
                operands.append((count, dtype))
        if kind in _PRODUCTS:
            products[max(operands)[1] if operands else ""] += 1
    totals: Counter[str] = Counter()
    for dtype, size in constants.values():
        totals[dtype] += size
    return dict(products), dict(totals)


_LAYER = re.compile(r"Name: ([^,]+), LayerType: (\w+)")
_TENSOR = re.compile(r"Name: [^,\s]+, Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
_SOFTMAX = re.compile(r"softmax|Maxr\w*Exp\w*Sum", re.IGNORECASE)
# Scores of fewer tokens than this, at fixed sizes, fit into the cache.
LONG_SCORES = 1024


def attention_summary(lines: Iterable[str]) -> dict[str, int]:
    """Return how many fused attentions there are per type of their first operand, from the builder's verbose layer listing.

    Args:
        lines: The lines of the builder's listing.
    """
    found: Counter[str] = Counter()
    for name, kind, inputs, _, _ in _layers(lines):
        if kind == "kgen" and "mha" in name and inputs:
            found[inputs[0][1]] += 1
    return dict(found)


def materialized_scores(lines: Iterable[str]) -> list[str]:
    """Return the layers that write the scores of all pairs of tokens to memory, by name.

    Such a layer is a product of two activations, or a softmax, with an output whose last two dimensions both go with the number
    of tokens: dynamic ones, or fixed ones of ``LONG_SCORES`` and more.

    Args:
        lines: The lines of the builder's listing.
    """
    return [
        name
        for name, kind, _, matrices, outputs in _layers(lines)
        if ((kind in _PRODUCTS and not matrices) or (kind == "kgen" and _SOFTMAX.search(name)))
        and any(len(sizes) >= 3 and all(size < 0 or size >= LONG_SCORES for size in sizes[-2:]) for sizes, _ in outputs)
    ]


_Tensors = list[tuple[list[int], str]]


def _layers(lines: Iterable[str]) -> Iterator[tuple[str, str, _Tensors, bool, _Tensors]]:
    """(name, kind, inputs, whether it has a constant matrix, outputs) of every listed layer."""
    for line in lines:
        found = _LAYER.match(line)
        if found is None:
            continue
        inputs, _, rest = line.partition("Constants: [")
        constants, _, rest = rest.partition("], Outputs:")
        outputs = rest.partition("], TacticName:")[0]
        matrices = any(len(sizes) >= 2 and min(sizes[-2:]) >= 16 for sizes, _ in _tensors(constants))
        yield found[1], found[2], _tensors(inputs), matrices, _tensors(outputs)


def _tensors(section: str) -> _Tensors:
    return [([int(d) for d in dims.split(",") if d], dtype) for dims, dtype in _TENSOR.findall(section)]
