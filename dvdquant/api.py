"""The public functions of dvdquant: export a model, plan its bit schedule, inspect what an export holds.

They do what the commands do, with the same defaults. ``import dvdquant`` offers them without importing PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dvdquant.deploy.switching.defaults import LAST_HIGH
from dvdquant.recipe import Recipe, get_recipe

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.deploy.planning.planner import Plan
    from dvdquant.export.pipeline import ExportResult
    from dvdquant.system.progress import Progress

__all__ = ["export_model", "inspect_export", "plan_schedule"]


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "w4a4",
    target: str | Sequence[str] = "rtx",
    sm: str | Sequence[str] = "8.9",
    dtype: Literal["bf16", "fp16"] = "bf16",
    height: int | str | None = None,
    width: int | str | None = None,
    num_frames: int | str | None = None,
    latent: str | None = None,
    text_tokens: int | None = None,
    device: str = "auto",
    verify: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ExportResult:
    """Quantize a video diffusion transformer and write the export, as ``dvdq-export`` does.

    Args:
        model: hub id, pipeline or transformer folder in diffusers format, folder of the model's authors, or single file.
        out: folder of the export. It holds the whole new export or what it held before.
        recipe: name of a recipe, or a recipe of your own.
        target: ``rtx``, ``tensorrt``, ``onnx`` or ``graphs``, or several of them.
        sm: compute capabilities to build engines for, such as "8.9".
        dtype: of activations and of what is not quantized.
        height: pixels, a number or a range such as "480:720"; default: the family's.
        width: pixels, as ``height``.
        num_frames: frames, as ``height``.
        latent: the three sizes in latent units instead, "FxHxW".
        text_tokens: length of the text embedding; default: the model's.
        device: where weights are quantized: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        verify: run every graph in ONNX Runtime and judge it against PyTorch in float64.
        resume: go on from an interrupted export with the same options.
        progress: where progress goes; default: nowhere.
        **options: further fields of :class:`dvdquant.export.options.ExportOptions`.

    Returns:
        The manifest, the checks of ``verify``, and seconds per stage.

    Raises:
        DvdquantError: what was wrong, what was available and how to fix it; the folder is as it was.
    """
    from dvdquant.deploy.report.page import add_report
    from dvdquant.export.options import ExportOptions
    from dvdquant.export.pipeline import plan_export, run_export
    from dvdquant.system.progress import Progress

    arguments = ExportOptions(
        model=str(model),
        out=Path(out),
        recipe=get_recipe(recipe) if isinstance(recipe, str) else recipe,
        targets=_several(target),
        sms=_several(sm),
        dtype=dtype,
        latent=latent,
        text_tokens=text_tokens,
        device=device,
        verify=verify,
        resume=resume,
        height=_size(height),
        width=_size(width),
        num_frames=_size(num_frames),
        **options,
    )
    return run_export(plan_export(arguments), progress or Progress(), add_report)


def plan_schedule(
    out: str | Path,
    prompts: Sequence[str],
    *,
    average_bits: float | None = None,
    seconds: float | None = None,
    delta: float | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    weighting: Literal["step", "none"] = "step",
    last_high: int = LAST_HIGH,
    output: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Find the δ of step switching and write its schedule, as ``dvdq-plan`` does.

    Args:
        out: folder of an export.
        prompts: clips to record, two to eight.
        average_bits: wanted average of activation bits; 6 where no goal is given.
        seconds: wanted time of the transformer in one clip, on this machine.
        delta: a δ of your own, to be evaluated.
        seeds: each prompt is recorded with each.
        steps: denoising steps; default: the model's.
        weighting: ``step`` counts a change by how far its step moves; ``none`` is the published rule.
        last_high: steps at the end that stay on the high engine.
        output: file of the schedule; default: ``schedule.json`` in the export.
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: where progress goes; default: nowhere.
        **options: ``pipeline`` and ``reference`` of :func:`dvdquant.deploy.planning.planner.plan`.

    Returns:
        δ, what it predicts and what one real run measured.

    Raises:
        DvdquantError: the folder is no export, more than one goal is given, or a clip cannot be drawn.
    """
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.planning.planner import Goal, plan

    if average_bits is None and seconds is None and delta is None:
        average_bits = 6.0
    found = plan(
        Artifact.open(out),
        list(prompts),
        Goal(average_bits, seconds, delta),
        seeds=seeds,
        steps=steps,
        weighting=weighting,
        last_high=last_high,
        backend=backend,
        device=device,
        progress=progress,
        **options,
    )
    found.schedule.save(Path(output) if output is not None else Path(out) / "schedule.json")
    return found


def inspect_export(out: str | Path, *, check: bool = False) -> Manifest:
    """Return the manifest of an export: files, graphs, engines and what they execute, error of every layer.

    Args:
        out: folder of an export. It is only read.
        check: compare every file with its SHA-256, too.

    Raises:
        OutputError: the folder is no export, or with ``check`` a file is missing or changed.
    """
    from dvdquant.artifact.manifest import load_manifest, verify_files

    manifest = load_manifest(out)
    if check:
        verify_files(out, manifest)
    return manifest


def _size(value: int | str | None) -> str | None:
    return None if value is None else str(value)


def _several(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
