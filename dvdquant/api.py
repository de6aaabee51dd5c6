"""The public functions of dvdquant: export a model, plan its bit schedule, inspect an export.

They do the same as the commands, with the same defaults. ``import dvdquant`` offers them without importing PyTorch.
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
        model: Hub id, pipeline folder or transformer folder in diffusers format.
        out: Folder of the export. It holds the whole new export afterwards, or after an error what it held before.
        recipe: Name of a recipe, or a recipe of your own.
        target: ``rtx``, ``tensorrt``, ``onnx`` or ``graphs``, or several of them.
        sm: Compute capabilities to build engines for, such as "8.9".
        dtype: Dtype of activations and of tensors that are not quantized: ``bf16`` or ``fp16``.
        height: Height in pixels, a number or a range such as "480:720". None takes the default of the family.
        width: Width in pixels, as ``height``.
        num_frames: Number of frames, as ``height``.
        latent: The three sizes in latent units instead, as "FxHxW".
        text_tokens: Length of the text embedding in tokens. None takes that of the model.
        device: Device that quantizes the weights: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        verify: Run every graph in ONNX Runtime and judge it against PyTorch in float64.
        resume: Go on from an interrupted export with the same options.
        progress: Receiver of the progress. None reports nothing.
        **options: Further fields of :class:`dvdquant.export.options.ExportOptions`.

    Returns:
        The manifest, the checks of ``verify``, and the time of each stage in seconds.

    Raises:
        DvdquantError: The export failed. The error says what was wrong, what was available and how to fix it. The
            folder is unchanged.
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

    At most one of ``average_bits``, ``seconds`` and ``delta`` is given.

    Args:
        out: Folder of an export.
        prompts: Prompts of the clips to record, two to eight.
        average_bits: Wanted average of activation bits. It is 6 if no goal is given.
        seconds: Wanted time of the transformer in one clip, in seconds on this machine.
        delta: A δ of your own, which is evaluated.
        seeds: Seeds; each prompt is recorded with each of them.
        steps: Number of denoising steps. None takes that of the model.
        weighting: ``step`` weighs a change by how far its step moves; ``none`` is the published rule.
        last_high: Number of steps at the end that stay on the engine with more bits.
        output: File of the schedule. None takes ``schedule.json`` in the export.
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: Receiver of the progress. None reports nothing.
        **options: ``pipeline`` and ``reference`` of :func:`dvdquant.deploy.planning.planner.plan`.

    Returns:
        The plan: δ, the predictions for it, and the measurements of one real run.

    Raises:
        DvdquantError: The folder is no export, more than one goal is given, or a clip cannot be drawn.
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
    """Return the manifest of an export: files, graphs, engines and the arithmetic they execute, error of every layer.

    Args:
        out: Folder of an export. It is only read.
        check: Also compare every file with its SHA-256.

    Raises:
        OutputError: The folder is no export, or with ``check`` a file is missing or changed.
    """
    from dvdquant.artifact.manifest import load_manifest, verify_files

    manifest = load_manifest(out)
    if check:
        verify_files(out, manifest)
    return manifest


def _size(value: int | str | None) -> str | None:
    """Return a number of pixels or frames as the text of the command's option."""
    return None if value is None else str(value)


def _several(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one text or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
