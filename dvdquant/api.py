"""The public functions of dvdquant: export a model, plan its bit schedule, inspect an export.

They do what the commands do, with the same defaults, by the same code. ``import dvdquant`` offers them without importing
PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from dvdquant.deploy.switching.defaults import LAST_HIGH
from dvdquant.errors import RecipeError, UnsupportedError
from dvdquant.hardware.advice import AUTO, choose
from dvdquant.recipe import RECIPES, Attention, Recipe, get_recipe
from dvdquant.system.records import brief
from dvdquant.system.several import one_or_several

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.checkpoint.lora.spec import LoraSpec
    from dvdquant.deploy.planning.planner import Plan
    from dvdquant.export.result import ExportResult
    from dvdquant.system.plugin_file import Plugins
    from dvdquant.system.progress import Progress

__all__ = ["export_model", "inspect_export", "plan_schedule"]


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "auto",
    activations: Literal[4, 8] | None = None,
    modulation: Literal["keep", "a8"] | None = None,
    attention: Attention | None = None,
    keep: str | Sequence[str] = (),
    force: str | Sequence[str] = (),
    gpu: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    sm: str | Sequence[str] | None = None,
    dtype: Literal["bf16", "fp16"] = "bf16",
    height: int | str | None = None,
    width: int | str | None = None,
    num_frames: int | str | None = None,
    latent: str | None = None,
    text_tokens: int | None = None,
    device: str = "auto",
    verify: bool = False,
    resume: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
    lora: str | Path | LoraSpec | Sequence[str | Path | LoraSpec] = (),
    steps: int | None = None,
    guidance: float | None = None,
    **options: Any,
) -> ExportResult:
    """Quantize a video diffusion transformer and write the export, as ``dvdq-export`` does.

    Args:
        model: Hub id, pipeline folder or transformer folder in diffusers format.
        out: Folder of the export. It holds the whole new export afterwards, or after an error what it held before.
        recipe: Name of a recipe, or a recipe of your own. ``auto`` takes what suits the cards, and SM 8.9 where none is named.
        activations: Bits of the activations that are made alone, 4 or 8: one engine, not two. None makes all of the recipe's.
        modulation: ``keep`` (16 bit) or ``a8`` for the blocks' modulation linears. None takes the recipe's.
        attention: ``16``, ``int8`` or ``fp8`` for self-attention of long sequences. None takes the recipe's.
        keep: Globs of layers that stay in 16 bit besides the family's own, one or several.
        force: Globs of layers that are quantized although the family keeps them, one or several.
        gpu: Names of the cards it is for, such as "RTX 4090"; ``auto`` is that of this machine.
        target: ``rtx``, ``tensorrt``, ``onnx`` or ``graphs``, or several of them. None given lets the cards decide.
        sm: Compute capabilities instead of cards, such as "8.9", the default where no card is named.
        dtype: Dtype of activations and of tensors that are not quantized: ``bf16`` or ``fp16``.
        height: Height in pixels, a number or a range such as "480:720". None takes the default of the family.
        width: Width in pixels, as ``height``.
        num_frames: Number of frames, as ``height``.
        latent: The three sizes in latent units instead, as "FxHxW".
        text_tokens: Length of the text embedding in tokens. None takes that of the model.
        device: Device that quantizes the weights: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        verify: Run every graph in ONNX Runtime and judge it against PyTorch in float64.
        resume: Go on from an interrupted export with the same options.
        replace: Let the export take the place of a finished one of another model, another recipe or other sizes.
        progress: Receiver of the progress, and of what was chosen and why. None reports nothing.
        lora: LoRAs to fuse into the weights: FILE, "FILE:SCALE", "transformer_2=FILE:SCALE", or several of them.
        steps: Number of denoising steps that the runtime takes if none is asked for, such as 4 of a distilled LoRA.
        guidance: Guidance scale that the runtime takes if none is asked for, such as 1.
        **options: Further fields of :class:`dvdquant.export.options.ExportOptions`.

    Returns:
        The manifest, the checks of ``verify``, and the time of each stage in seconds.

    Raises:
        DvdquantError: The export failed. The error says what was wrong, what was available and how to fix it. The
            folder is unchanged.
    """
    from dvdquant.checkpoint.lora.spec import parse_loras
    from dvdquant.export.options import ExportOptions
    from dvdquant.planned_export import plan_checked, run_planned
    from dvdquant.system.progress import Progress

    _path("model", model)
    named: dict[str, Any] = {
        "dtype": dtype,
        "latent": latent,
        "text_tokens": text_tokens,
        "device": device,
        "verify": verify,
        "resume": resume,
        "replace": replace,
        "steps": steps,
        "guidance": guidance,
    }
    known = [field.name for field in fields(ExportOptions) if field.name not in ("targets", "sms", *_POSITIONAL)]
    if unknown := sorted(options.keys() - set(known)):
        raise UnsupportedError(f"export_model has no option {unknown[0]}", available=["target", "sm", *known])
    for several in ("plugins", "also_write"):
        if several in options:
            options[several] = _several(several, options[several], may_be_none=True)
    if activations not in (None, 4, 8) or isinstance(activations, bool):
        raise UnsupportedError(
            f"activations have no {brief(activations)} bits",
            available=["4", "8"],
            fix="leave it out, which makes all widths of the recipe",
        )
    own = recipe if isinstance(recipe, Recipe) else None
    name = _recipe_name(recipe) if own is None else own.name
    cards, capabilities = _several("gpu", gpu), _several("sm", sm)
    layouts, precision = options.get("also_write", ()), str(options.get("precision", AUTO))
    choice = choose(
        cards, capabilities, _several("target", target), name, layouts, only=activations, precision=precision
    )
    if own is None:
        base, widths = get_recipe(choice.recipe), choice.activations
    else:
        base, widths = own, () if activations is None else (activations,)
    made = base.with_options(
        keep=_several("keep", keep, may_be_none=True),
        force=_several("force", force, may_be_none=True),
        activations=widths,
        modulation=modulation,
        attention=attention,
    )
    arguments = ExportOptions(
        model=str(model),
        out=_path("out", out),
        recipe=made,
        targets=choice.targets,
        sms=choice.sms,
        height=_size(height),
        width=_size(width),
        num_frames=_size(num_frames),
        lora=parse_loras(lora),
        **_typed(get_type_hints(ExportOptions), {**named, **options}),
    )
    return run_planned(plan_checked(arguments), choice, progress or Progress())


def plan_schedule(
    out: str | Path,
    prompts: str | Sequence[str],
    *,
    average_bits: float | None = None,
    seconds: float | None = None,
    delta: float | None = None,
    seeds: int | Sequence[int] = (0,),
    steps: int | None = None,
    weighting: Literal["step", "none"] = "step",
    last_high: int = LAST_HIGH,
    output: str | Path | None = None,
    revision: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    lora: str | Path | LoraSpec | Sequence[str | Path | LoraSpec] = (),
    plugins: Plugins = (),
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Find the δ of step switching and write its schedule, as ``dvdq-plan`` does.

    At most one of ``average_bits``, ``seconds`` and ``delta`` is given.

    Args:
        out: Folder of an export, or its name on the hub, ``user/name``.
        prompts: Prompts of the clips to record, two to eight. One text is one prompt.
        average_bits: Wanted average of activation bits. It is 6 if no goal is given.
        seconds: Wanted time of the transformer in one clip, in seconds on this machine.
        delta: A δ of your own, which is evaluated.
        seeds: Seeds; each prompt is recorded with each of them. One number is one seed.
        steps: Number of denoising steps. None takes that of the model.
        weighting: ``step`` weighs a change by how far its step moves; ``none`` is the published rule.
        last_high: Number of steps at the end that stay on the engine with more bits.
        output: File of the schedule. None takes ``schedule.json`` in the export, and NAME-schedule.json in the current folder
            for an export of the hub.
        revision: Branch, tag or commit of an export of the hub.
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        lora: LoRAs to run beside the weights: FILE, "FILE:SCALE", "transformer_2=FILE:SCALE", or several of them. Of a LoRA
            that the export has: where it is now, for ``reference``.
        plugins: TensorRT plugin libraries that engines need, one path or several.
        progress: Receiver of the progress. None reports nothing.
        **options: ``reference`` and the further options of :func:`dvdquant.deploy.planning.planner.plan`, such as
            ``pipeline``, ``image``, ``guidance``, ``text_embeds`` and ``offload``.

    Returns:
        The plan: δ, the predictions for it, and the measurements of one real run.

    Raises:
        DvdquantError: The folder or the repository is no export, there is no prompt, more than one goal is given, the
            schedule cannot be written, or a clip cannot be drawn.
    """
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.planning.planner import CLIP, OPENING, Goal, plan
    from dvdquant.deploy.switching.schedule import default_place
    from dvdquant.hub.locate import locate_export
    from dvdquant.system.whole_file import check_writable

    named = signature(plan_schedule).parameters
    more = ("reference", *CLIP, *(name for name in OPENING if name not in named))
    if unknown := sorted(options.keys() - set(more)):
        known = [name for name in named if name != "options"]
        raise UnsupportedError(f"plan_schedule has no option {unknown[0]}", available=[*known, *more])
    given = _path("out", out)
    folder = locate_export(out, revision)
    place = default_place(given, folder) if output is None else _path("output", output)
    artifact = Artifact.open(folder)
    check_writable(place, make_folder=False)  # before minutes of work
    if average_bits is None and seconds is None and delta is None:
        average_bits = 6.0
    found = plan(
        artifact,
        prompts,
        Goal(average_bits, seconds, delta),
        seeds=seeds,
        steps=steps,
        weighting=weighting,
        last_high=last_high,
        backend=backend,
        device=device,
        lora=lora,
        plugins=plugins,
        progress=progress,
        **options,
    )
    found.schedule.save(place)
    return found


def inspect_export(out: str | Path, *, check: bool = False, revision: str | None = None) -> Manifest:
    """Return the manifest of an export: files, graphs, engines and the arithmetic they execute, error of every layer.

    Args:
        out: Folder of an export, which is only read, or its name on the hub, ``user/name``.
        check: Also compare every file with its SHA-256.
        revision: Branch, tag or commit of an export of the hub.

    Raises:
        OutputError: The folder or the repository is no export, a revision is given for a folder, or with ``check`` a file is
            missing or changed.
    """
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.artifact.verify_files import verify_files
    from dvdquant.hub.locate import locate_export

    _path("out", out)
    folder = locate_export(out, revision)
    manifest = load_manifest(folder)
    if check:
        verify_files(folder, manifest)
    return manifest


_POSITIONAL = ("model", "out", "recipe", "height", "width", "num_frames")


def _path(name: str, value: str | Path) -> Path:
    """Return a path of the caller's.

    Raises:
        UnsupportedError: It is neither text nor a path, or is empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise UnsupportedError(f"{name} is {brief(value)}", available="a path, as text or pathlib.Path")
    return Path(value)


def _recipe_name(recipe: Any) -> str:
    if not isinstance(recipe, str):
        raise RecipeError(f"the recipe is {brief(recipe)}", available=RECIPES, fix="give a name or a Recipe")
    return recipe


def _size(value: int | str | None) -> str | None:
    """Return a number of pixels or frames as the text of the command's option."""
    return None if value is None else str(value)


def _several(name: str, value: Any, may_be_none: bool = False) -> tuple[str, ...]:
    """Return one or several texts as a tuple. A number, such as 8.9, stands for its text.

    Raises:
        UnsupportedError: There is none, or one is of another kind.
    """
    if value is None and name in ("gpu", "sm", "target"):  # left open
        return ()
    several = one_or_several(value)
    for each in several:
        if isinstance(each, bool) or not isinstance(each, (str, int, float, os.PathLike)):
            raise UnsupportedError(f"{name} holds {brief(each)}", available="texts")
    if not several and not may_be_none:
        raise UnsupportedError(f"{name} is empty", fix=f"give one or several, or leave {name} out")
    return tuple(str(each) for each in several)


def _typed(hints: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in the types of their fields.

    Raises:
        UnsupportedError: One is of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    values = {}
    for name, value in given.items():
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            words = dict.fromkeys(each["msg"] for each in error.errors(include_url=False, include_input=False)[:3])
            raise UnsupportedError(f"{name} is {brief(value)}", available="; ".join(words)) from None
    return values
