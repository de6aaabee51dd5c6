"""What the manifest of an export records: the plan, what was made of it, the tools and the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dvdquant import __version__
from dvdquant.artifact.entries import BuildEntry, EngineEntry, GraphEntry, LayerEntry, LoraEntry, Verified
from dvdquant.artifact.manifest import Manifest
from dvdquant.export.plan import ExportPlan, shapes_of, source_of
from dvdquant.export.verify.stored import StoredCheck
from dvdquant.system.files import hash_file
from dvdquant.system.versions import installed_versions

__all__ = ["graph_tools", "lora_entries", "recorded_manifest"]


def recorded_manifest(
    plan: ExportPlan,
    tree: Path,
    *,
    layers: tuple[LayerEntry, ...],
    nonfinite: Sequence[str],
    graphs: Sequence[GraphEntry],
    engines: Sequence[EngineEntry],
    later: Sequence[BuildEntry],
    stored: Sequence[StoredCheck],
    previous: Manifest | None,
) -> Manifest:
    """Return the manifest of an export without its files, which the transaction fills in.

    Args:
        plan: The plan of the export.
        tree: The folder of the unfinished export, which holds its ``config.json``.
        layers: The table of weight errors.
        nonfinite: The tensors of this run whose NaN and infinities count as 0.
        graphs: The entries of the graphs.
        engines: The entries of the engines.
        later: The entries of the engines that are left to the machine that they are for.
        stored: The comparisons with the checkpoints, empty where this run did not verify.
        previous: The manifest of the export whose weights and graphs are used, or None.
    """
    kept = [name for model_plan in plan.plans for name in model_plan.kept_linears]
    tools = {**graph_tools(), **installed_versions("onnxruntime-gpu", "onnxruntime")}
    tools["device"] = _device_name(plan.options.torch_device)
    if previous is not None and "device" in previous.tools:
        tools["device"] = previous.tools["device"]  # it made the weights, which are still the same
    return Manifest(
        source=source_of(plan),
        family=plan.plans[0].family.name,
        config_sha256=hash_file(tree / "config.json")["sha256"],
        recipe=plan.options.recipe.to_json(),
        shapes=shapes_of(plan),
        layers=layers,
        kept=tuple(dict.fromkeys(kept)),
        nonfinite=tuple(nonfinite) if previous is None else previous.nonfinite,
        graphs=tuple(graphs),
        engines=tuple(engines),
        components=plan.components,
        tools=tools,
        verified=_verified(stored, graphs, previous),
        lora=lora_entries(plan),
        lora_rank=plan.options.lora_rank,
        sampling=plan.options.sampling,
        builds=tuple(later),
    )


def graph_tools() -> dict[str, str]:
    """Return the versions of the packages that graphs depend on besides dvdquant itself."""
    return installed_versions("torch", "diffusers", "onnx", "onnx-ir", "onnxscript")


def lora_entries(plan: ExportPlan) -> tuple[LoraEntry, ...]:
    """Return the LoRAs that were fused into each transformer.

    Args:
        plan: The plan of the export.
    """
    return tuple(
        LoraEntry(
            component=component,
            path=os.path.abspath(lora.spec.path),
            sha256=lora.sha256,
            scale=float(lora.spec.scale),
            format=lora.format,
            layers=lora.layers,
        )
        for component, checkpoint in zip(plan.components, plan.checkpoints)
        if checkpoint.lora is not None
        for lora in checkpoint.lora.fused
    )


def _verified(
    stored: Sequence[StoredCheck], graphs: Sequence[GraphEntry], previous: Manifest | None
) -> Verified | None:
    """Return the extent of this run's comparisons.

    If this run did not verify, return that of the previous export whose weights and graphs are used, or None.
    """
    if not stored:
        return None if previous is None else previous.verified
    return Verified(
        dvdquant=__version__,
        layers=sum(check.layers for check in stored),
        rows=sum(check.rows for check in stored),
        kept=sum(check.kept for check in stored),
        graphs=[graph["path"] for graph in graphs],
    )


def _device_name(device: torch.device) -> str:
    """Return the name of the device for the manifest, such as "cpu" or "cuda (NVIDIA H100)"."""
    return "cpu" if device.type == "cpu" else f"cuda ({torch.cuda.get_device_name(device)})"
