"""The options of an export, checked without PyTorch, so that a mistake in them is said at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dvdquant.artifact.entries import MAX_GUIDANCE, MAX_STEPS, Sampling
from dvdquant.artifact.manifest import MAX_LORA_RANK
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.errors import UnsupportedError
from dvdquant.recipe import RECIPES, Recipe
from dvdquant.system.devices import check_device_word, resolve_device
from dvdquant.text import shown

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALSO_WRITE",
    "BUILD_PLACES",
    "DTYPE_NAMES",
    "TARGETS",
    "ExportOptions",
    "check_text",
    "recorded_model",
    "with_table_defaults",
]

DTYPE_NAMES = ("bf16", "fp16")  # the keys of dvdquant.numerics.dtypes.DTYPES, which imports PyTorch
TARGETS = ("rtx", "tensorrt", "onnx", "graphs")
BUILD_PLACES = ("auto", "here", "device")
ALSO_WRITE = ("comfy", "comfy-a8")
_TAKE_COMFY = "take --also-write comfy"
# Layouts that somebody may ask for -> why they are not written, and what to do.
_NOT_WRITTEN = {
    "modelopt": (
        "what ModelOpt writes of video transformers, and servers read, is FP8 or NVFP4 of weights that are not rotated, "
        "and no recipe has these grids",
        "quantize MODEL with ModelOpt itself",
    ),
    "sglang": (
        "SGLang has no 4-bit integer layout of its own for video transformers; it reads the one of ComfyUI",
        _TAKE_COMFY,
    ),
}
MAX_WORKSPACE_GIB = 1024
MAX_SAMPLES = 16


@dataclass(frozen=True)
class ExportOptions:
    """The options of one call of ``dvdq-export``.

    Args:
        model: The folder of a transformer, a pipeline or the model's authors, a single file, or a hub id.
        out: The folder for the export.
        recipe: The recipe.
        dtype: ``bf16`` or ``fp16``, the dtype of activations and of what stays in 16 bit.
        targets: Any of ``rtx``, ``tensorrt``, ``onnx``, ``graphs``. Graphs with QuantLinear nodes are always written;
            with ``graphs`` alone nothing else is.
        sms: The compute capabilities to build engines for, such as "8.9".
        precision: ``auto`` or a precision (``int8``, ``int4-weight-only``, ``nvfp4``), for the rtx target.
        height: The height of the video in pixels: SIZE, MIN:MAX or MIN:OPT:MAX. None means the family's default.
        width: The width of the video in pixels, in the same form.
        num_frames: The number of frames of the video, in the same form.
        latent: "FxHxW" in latent units, instead of the three sizes above; each of the three parts has their form.
        text_tokens: The length of the text embedding in tokens; None means the prompt table's, or the family's.
        batch: The batch size of the graphs.
        subfolder: The folder of the transformer inside ``model``; None means all transformers of a pipeline.
        revision: The branch, tag or commit of a hub id.
        resume: Go on from an interrupted export with the same options.
        replace: Let the export take the place of a finished one of another model, another recipe or other sizes.
        verify: Compare what is stored with the checkpoint, and run and judge every graph.
        allow_nonfinite: Accept NaN and infinities in weights, store them as 0, and record the names of their tensors.
        allow_low_bits: Take GGUF weights of 4 and 5 bits, with a warning in the manifest.
        plugins: The plugin libraries of the TensorRT target.
        build: Where engines are built: ``here``, or on the ``device`` that they are for, by ``dvdq-build``, which needs
            no engine builder here. ``auto`` leaves TensorRT's to the device unless a plugin library is given.
        workspace_gib: The builder's workspace limit in GiB; None means the builder's own.
        timing_cache: A TensorRT timing cache to read and update.
        optimization_level: The builder's effort, 0 to 5 (TensorRT); None means the builder's own.
        fuse: Let the plugin of the TensorRT target compute residual, norm and modulation, or GELU, with the layer behind them.
        version_compatible: Build TensorRT engines that the lean runtime of the same release runs, too. They may be slower.
        keep_graphs: Keep the graphs made for the engines: lowered ones for rtx, those with plugin nodes for tensorrt.
        device: The device where inputs are predicted and weights are rotated and quantized: a word that
            :func:`dvdquant.system.devices.resolve_device` knows.
        lora: The LoRAs that are fused into the weights.
        lora_rank: The rank of the branch that every graph and engine gets beside each quantized layer, for LoRAs that are
            loaded at run time; 0 means none.
        steps: The number of denoising steps that is recorded as the runtime's default; None means the model's own.
        guidance: The guidance scale that is recorded as the runtime's default; None means the model's own.
        transformer_2: The file or folder of the second transformer, if it does not lie in ``model``.
        config: The config.json of a model that has none.
        also_write: The layouts of others that the same weights are written in: ``comfy`` (ComfyUI's ConvRot W4A4), or
            ``comfy-a8`` (the same weights with 8-bit activations).
        pipeline: The folder or hub id of the diffusers pipeline that the runtime takes text encoder, VAE and scheduler from,
            where MODEL has none. It is recorded alone.
        report: Write report.html too.
        samples: The number of prompts, 0 to 16, that the report shows clips of. None means one if the model has a
            prompt table, and else none.

    Raises:
        UnsupportedError: A target, dtype or number is not one of those above, the device is not there, a plugin library
            is missing, ``samples`` is given without ``report``, or a layout has another grid than the recipe.
    """

    model: str
    out: Path
    recipe: Recipe
    dtype: str = "bf16"
    targets: tuple[str, ...] = ("rtx",)
    sms: tuple[str, ...] = ("8.9",)
    precision: str = "auto"
    height: str | None = None
    width: str | None = None
    num_frames: str | None = None
    latent: str | None = None
    text_tokens: int | None = None
    batch: int = 1
    subfolder: str | None = None
    revision: str | None = None
    resume: bool = False
    replace: bool = False
    verify: bool = False
    allow_nonfinite: bool = False
    allow_low_bits: bool = False
    plugins: tuple[Path, ...] = ()
    build: str = "auto"
    workspace_gib: float | None = None
    timing_cache: Path | None = None
    optimization_level: int | None = None
    fuse: bool = False
    version_compatible: bool = False
    keep_graphs: bool = False
    device: str = "auto"
    report: bool = False
    samples: int | None = None
    lora: tuple[LoraSpec, ...] = ()
    lora_rank: int = 0
    steps: int | None = None
    guidance: float | None = None
    transformer_2: str | None = None
    config: Path | None = None
    pipeline: str | None = None
    also_write: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise UnsupportedError(f"unknown target {target!r}", available=TARGETS, fix="pick with --target")
        if self.dtype not in DTYPE_NAMES:
            raise UnsupportedError(f"unknown dtype {self.dtype!r}", available=DTYPE_NAMES, fix="pick with --dtype")
        if self.build not in BUILD_PLACES:
            raise UnsupportedError(f"unknown place to build {self.build!r}", available=BUILD_PLACES)
        if self.fuse and "tensorrt" not in self.targets:
            raise UnsupportedError(
                f"--fuse is for engines with the plugin, and --target is {', '.join(self.targets)}",
                available="tensorrt; TensorRT-RTX and other runtimes fuse such operations themselves",
                fix="leave --fuse out, or take --target tensorrt",
            )
        if self.version_compatible and "tensorrt" not in self.targets:
            raise UnsupportedError(
                f"--version-compatible is for TensorRT engines, and --target is {', '.join(self.targets)}",
                available="tensorrt; an engine of TensorRT-RTX loads in its own release alone",
                fix="leave --version-compatible out, or take --target tensorrt",
            )
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= MAX_WORKSPACE_GIB:
            raise UnsupportedError(
                f"--workspace-gib is {self.workspace_gib:g}", available=f"more than 0, at most {MAX_WORKSPACE_GIB}"
            )
        check_device_word(self.device)  # whether it is there is asked when PyTorch is loaded
        if self.samples is not None and not 0 <= self.samples <= MAX_SAMPLES:
            raise UnsupportedError(f"--samples is {self.samples}", available=f"0 to {MAX_SAMPLES}")
        if self.samples and not self.report:
            raise UnsupportedError("--samples without --report", fix="give --report too: samples are a part of it")
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise UnsupportedError(f"--steps is {self.steps}", available=f"1 to {MAX_STEPS}")
        if self.guidance is not None and not 0 <= self.guidance <= MAX_GUIDANCE:
            raise UnsupportedError(
                f"--guidance is {self.guidance:g}",
                available=f"0 to {MAX_GUIDANCE}; 1 is no guidance, as distilled models want",
            )
        if not 0 <= self.lora_rank <= MAX_LORA_RANK:
            raise UnsupportedError(
                f"--lora-rank is {self.lora_rank}",
                available=f"1 to {MAX_LORA_RANK}, at least the rank of the LoRA, or of all that run at once together; 0 is none",
            )
        for layout in self.also_write:
            _check_layout(layout, self.recipe)
        for plugin in self.plugins:
            if not plugin.is_file():
                raise UnsupportedError(
                    f"there is no plugin library {plugin}", fix="give the path of the built dvdquant plugin library"
                )
        self._check_builder_options()

    def _check_builder_options(self) -> None:
        """Refuse options of engine builders that none runs with here.

        Raises:
            UnsupportedError: One was given.
        """
        targets = f"--target is {', '.join(self.targets)}"
        if self.plugins and "tensorrt" not in self.targets:
            raise UnsupportedError(
                f"--plugin is for TensorRT engines, and {targets}",
                available="tensorrt",
                fix="leave --plugin out, or take --target tensorrt",
            )
        if self.plugins and self.build == "device":
            raise UnsupportedError(
                "--plugin builds TensorRT engines here, and --build device leaves them to dvdq-build on the device",
                fix="leave one of the two out; dvdq-build takes --plugin, too",
            )
        for option, given in (
            ("--workspace-gib", self.workspace_gib),
            ("--timing-cache", self.timing_cache),
            ("--optimization-level", self.optimization_level),
        ):
            if given is not None and not self.backends:
                raise UnsupportedError(
                    f"{option} is for engines, and {targets}",
                    available="rtx, tensorrt",
                    fix=f"leave {option} out, or take one of these targets",
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype of activations and of what stays in 16 bit."""
        from dvdquant.numerics.dtypes import DTYPES

        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """Return the device where inputs are predicted and weights are rotated and quantized."""
        return resolve_device(self.device)

    @property
    def sampling(self) -> Sampling | None:
        """Return what the manifest records for the runtime; None where nothing was given."""
        found: Sampling = {}
        if self.steps is not None:
            found["steps"] = self.steps
        if self.guidance is not None:
            found["guidance"] = float(self.guidance)
        return found or None

    @property
    def backends(self) -> tuple[str, ...]:
        """Return the names of the engine builders that the targets need."""
        names = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
        return tuple(names[t] for t in self.targets if t in names)

    def builds_elsewhere(self, backend: str) -> bool:
        """Return whether the engines of a backend are left to the machine that they are for.

        Args:
            backend: ``tensorrt_rtx`` or ``tensorrt``.
        """
        return self.build == "device" or (self.build == "auto" and backend == "tensorrt" and not self.plugins)


def _check_layout(layout: str, recipe: Recipe) -> None:
    """Refuse a layout that nobody reads, or whose grid the recipe does not have: its codes would have to be made anew.

    Raises:
        UnsupportedError: It is one of these.
    """
    if layout not in ALSO_WRITE:
        why, fix = _NOT_WRITTEN.get(layout.lower(), ("", _TAKE_COMFY))
        what = f"--also-write {layout!r:.60}: {why}" if why else f"unknown layout {layout!r:.60}"
        raise UnsupportedError(what, available=ALSO_WRITE, fix=fix)
    if recipe.rotation == "regular":
        return
    weight = recipe.weight
    found = [f"rotation {recipe.rotation}"]
    found += [f"weight groups of {weight.group_size}"] * bool(weight.group_size)
    found += [f"zero-point {weight.zero_point}"] * (weight.zero_point != "symmetric")
    found += ["smoothed channels"] * recipe.smooth + ["shifted means"] * recipe.shift
    raise UnsupportedError(
        f"--also-write {layout}: recipe {shown(recipe.name)} is on another grid than ConvRot ({', '.join(found)})",
        available=[name for name, each in RECIPES.items() if each.rotation == "regular"],
        fix="take --recipe convrot, or leave --also-write out",
    )


def recorded_model(model: str) -> str:
    """Return the model argument in the form that the manifest records.

    A local folder or file becomes an absolute path, so that the export can be used from anywhere. A hub id stays as it is.

    Args:
        model: The folder or the hub id, as it was given.
    """
    try:
        folder = os.path.abspath(os.path.expanduser(model))
    except FileNotFoundError:  # relative, and the working directory was deleted: nothing local
        return model
    return folder if os.path.exists(folder) else model


def check_text(options: ExportOptions) -> None:
    """Refuse options whose bytes are not UTF-8.

    They would end up in the manifest, in file names, or in libraries that take text alone, after all the work.

    Args:
        options: The options of the export.

    Raises:
        UnsupportedError: An option holds such bytes; the error names it.
    """
    texts = [("MODEL", recorded_model(options.model)), ("--subfolder", options.subfolder or "")]
    texts += [("--revision", options.revision or ""), ("--timing-cache", str(options.timing_cache or ""))]
    texts += [("--pipeline", recorded_model(options.pipeline or ""))]
    texts += [("--transformer-2", recorded_model(options.transformer_2 or "")), ("--config", str(options.config or ""))]
    texts += [("--plugin", str(plugin)) for plugin in options.plugins]
    texts += [("--lora", str(lora.path)) for lora in options.lora]
    texts += [("--keep or --force", glob) for glob in (*options.recipe.keep, *options.recipe.force)]
    for name, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnsupportedError(
                f"{name} is {shown(text)}, which holds bytes that are not UTF-8", fix="rename it, or use a copy or link"
            ) from error


def with_table_defaults(options: ExportOptions) -> ExportOptions:
    """Return the options, completed from the prompt table of a model without text encoder.

    The table decides what the options leave open: the text has a token for every slot of a prompt, and the clips have
    one size, in latents.

    Args:
        options: The options of the export. They are returned as they are if the model has no prompt table.

    Raises:
        CheckpointError: The table cannot be read.
    """
    from dvdquant.checkpoint.prompt_table import PromptTable

    sized = any(v is not None for v in (options.latent, options.num_frames, options.height, options.width))
    if (options.text_tokens is not None and sized) or not PromptTable.is_at(options.model):
        return options
    table = PromptTable.open(options.model)
    return replace(
        options,
        text_tokens=len(table.order) if options.text_tokens is None else options.text_tokens,
        latent=options.latent if sized else "x".join(map(str, table.latent[1:])),
    )
