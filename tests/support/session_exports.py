"""Small exports that the tests of the runtime share: made once in a test run, removed at its end."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.export.verify.graph import load_quantized
from dvdquant.export.verify.reference import as_float64
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.quantized_model import set_activation
from dvdquant.system.safetensors_reader import read_header
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process
from tests.support.folders import shared_folder
from tests.support.traces import without_graphs

RANGES = ["--latent", "2:3:4x4:8:12x6:8:10", "--text-tokens", "12"]
FIXED = ["--latent", "3x8x8", "--text-tokens", "12"]
# Rounding to nearest is the fastest recipe; what it does to the weights is no matter here.
QUICK = ["--recipe", "rtn", "--target", "graphs"]


@functools.cache
def family_export(name: str, dtype: str = "bf16") -> Path:
    """Graphs of one block of a family, with ranges of sizes; of Wan the first transformer of :func:`engine_export`.

    In fp16 they have one size: to trace ranges takes much longer, and is no other in fp16.
    """
    if (name, dtype) == ("wan", "bf16") and importlib.util.find_spec("tensorrt_rtx"):
        return engine_export()

    def make(folder: Path) -> None:
        source = tiny.write_checkpoint(folder / "model", {**tiny.CONFIGS[name], "num_layers": 1})
        sizes = RANGES if dtype == "bf16" else FIXED
        in_process(source, "-o", folder / "out", "--dtype", dtype, *QUICK, *sizes)

    return shared_folder(f"sessions-{name}-{dtype}", make) / "out"


@functools.cache
def weights_export(name: str, recipe: str = "rtn", ranges: bool = True) -> Path:
    """As :func:`family_export` for PyTorch sessions alone: a graph takes most of the time of an export, and has no node here.

    Where sessions trace blocks for a compiler, one size takes much less time than ranges.
    """

    def make(folder: Path) -> None:
        source = tiny.write_checkpoint(folder / "model", {**tiny.CONFIGS[name], "num_layers": 1})
        with without_graphs():
            in_process(source, "-o", folder / "out", "--recipe", recipe, "--target", "graphs", *sizes)

    sizes = RANGES if ranges else FIXED
    return shared_folder(f"sessions-weights-{name}-{recipe}-{ranges}", make) / "out"


@functools.cache
def deep_export(name: str) -> Path:
    """As :func:`weights_export` with two blocks or more, for what blocks share; of one size."""

    def make(folder: Path) -> None:
        source = tiny.write_checkpoint(folder / "model", tiny.CONFIGS[name])
        with without_graphs():
            in_process(source, "-o", folder / "out", *QUICK, *FIXED)

    return shared_folder(f"sessions-deep-{name}", make) / "out"


@functools.cache
def recipe_export(recipe: str) -> Path:
    """Graphs of one block of a tiny Wan by another recipe than rounding to nearest."""

    def make(folder: Path) -> None:
        source = tiny.write_checkpoint(folder / "model", tiny.WAN_ONE)
        in_process(source, "-o", folder / "out", "--recipe", recipe, "--target", "graphs", *SIZES)

    return shared_folder(f"sessions-{recipe}", make) / "out"


@functools.cache
def engine_export(sm: str = "8.9") -> Path:
    """A Wan 2.2 pipeline, two transformers with different weights, with TensorRT-RTX engines for one SM."""

    def make(folder: Path) -> None:
        source = folder / "model"
        for seed, name in enumerate(("transformer", "transformer_2")):
            tiny.write_checkpoint(source / name, tiny.WAN_ONE, seed=seed)
        kind = ["diffusers", "WanTransformer3DModel"]
        index = {"_class_name": "WanPipeline", "transformer": kind, "transformer_2": kind}
        (source / "model_index.json").write_text(json.dumps(index))
        in_process(source, "-o", folder / "out", "--recipe", "rtn", "--target", "rtx", "--sm", sm, *RANGES)

    return shared_folder(f"sessions-wan22-{sm}", make) / "out"


@functools.cache
def wide_export() -> Path:
    """A Wan of 34 million quantized weights: large beside what sessions take besides weights."""
    config = {**tiny.WAN, "num_attention_heads": 16, "ffn_dim": 4096, "num_layers": 2}

    def make(folder: Path) -> None:
        source = tiny.write_checkpoint(folder / "model", config)
        in_process(source, "-o", folder / "out", *QUICK, "--latent", "2x8x8", "--text-tokens", "4")

    return shared_folder("sessions-wide", make) / "out"


def copy_of(out: Path, target: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(out, target)
    return target


def quantized_model(artifact: Artifact, component: str, bits: int) -> torch.nn.Module:
    """The quantized PyTorch model as the exporter's own check loads it."""
    tensors: dict[str, Any] = {}
    for name in artifact.weight_files(component):
        if name.endswith(".safetensors"):
            tensors |= {key: (name, info) for key, info in read_header(artifact.root / name).tensors.items()}
    return load_quantized(artifact.plan(component), tensors, artifact.root, bits)


def reference(
    artifact: Artifact, component: str, bits: int, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output in the export's dtype, output in float64) of the quantized model, by PyTorch."""
    model = quantized_model(artifact, component, bits)
    plan = artifact.plan(component)
    set_activation(model, plan.recipe.activation(bits))
    wide = {n: t.double() if t.dtype == plan.dtype else t for n, t in inputs.items()}
    with torch.no_grad():
        same = GraphWrapper(model, plan.family)(dict(inputs))
        exact = GraphWrapper(as_float64(model), plan.family)(wide)
    return same, exact


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    """‖value − exact‖ / ‖exact‖ in float64."""
    return float((value.double() - exact.double()).norm() / exact.double().norm())
