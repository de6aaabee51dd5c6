"""What an export was asked for, and its resolution into sizes of the transformer's latents."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.model.families import Axis, Family, Sizes
from dvdquant.numerics.dtypes import DTYPES
from dvdquant.recipe import Recipe
from dvdquant.system.devices import resolve_device
from dvdquant.text import shown

__all__ = [
    "TARGETS",
    "ExportOptions",
    "check_text",
    "recorded_model",
    "resolve_sizes",
    "with_table_defaults",
]

TARGETS = ("rtx", "tensorrt", "onnx", "graphs")
MAX_WORKSPACE_GIB = 1024
MAX_SAMPLES = 16


@dataclass(frozen=True)
class ExportOptions:
    """One call of ``dvdq-export``.

    Args:
        model: transformer or pipeline folder, or hub id.
        targets: of ``rtx``, ``tensorrt``, ``onnx``, ``graphs``; graphs with QuantLinear nodes are always written, and with
            ``graphs`` alone nothing else.
        sms: compute capabilities to build engines for, such as "8.9".
        precision: ``auto`` or a precision for the rtx target.
        height, width, num_frames: video sizes in pixels and frames, SIZE or MIN:MAX or MIN:OPT:MAX.
        latent: "FxHxW" in latent units instead.
        workspace_gib: the builder's workspace limit.
        keep_graphs: keep the graphs made for the engines: lowered for rtx, with the plugin for tensorrt.
        device: where inputs are predicted and weights are rotated and quantized: a word that
            :func:`dvdquant.system.devices.resolve_device` knows.
        report: write report.html too. samples: prompts it shows clips of; None is one where a clip costs seconds.
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
    verify: bool = False
    allow_nonfinite: bool = False
    plugins: tuple[Path, ...] = ()
    workspace_gib: float | None = None
    timing_cache: Path | None = None
    optimization_level: int | None = None
    keep_graphs: bool = False
    device: str = "auto"
    report: bool = False
    samples: int | None = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise UnsupportedError(f"unknown target {target!r}", available=TARGETS, fix="pick with --target")
        if self.dtype not in DTYPES:
            raise UnsupportedError(f"unknown dtype {self.dtype!r}", available=DTYPES, fix="pick with --dtype")
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= MAX_WORKSPACE_GIB:
            raise UnsupportedError(
                f"--workspace-gib is {self.workspace_gib:g}", available=f"more than 0, at most {MAX_WORKSPACE_GIB}"
            )
        resolve_device(self.device)  # a device that is not there is refused before any work
        if self.samples is not None and not 0 <= self.samples <= MAX_SAMPLES:
            raise UnsupportedError(f"--samples is {self.samples}", available=f"0 to {MAX_SAMPLES}")
        if self.samples and not self.report:
            raise UnsupportedError("--samples without --report", fix="give --report too: samples are a part of it")
        for plugin in self.plugins:
            if not plugin.is_file():
                raise UnsupportedError(
                    f"there is no plugin library {plugin}", fix="give the path of the built dvdquant plugin library"
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations and of what stays in 16 bit."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """Where inputs are predicted and weights are rotated and quantized."""
        return resolve_device(self.device)

    @property
    def backends(self) -> tuple[str, ...]:
        """Engine builders that are needed."""
        names = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
        return tuple(names[t] for t in self.targets if t in names)


def recorded_model(model: str) -> str:
    """A local folder as an absolute path, for an export to be used from anywhere; a hub id as it is."""
    try:
        folder = os.path.abspath(os.path.expanduser(model))
    except FileNotFoundError:  # relative, and the working directory was deleted: nothing local
        return model
    return folder if os.path.isdir(folder) else model


def check_text(options: ExportOptions) -> None:
    """Refuse options whose bytes are not UTF-8: they would end in the manifest, in file names, or in the hands of libraries
    that take text alone, after all the work.

    Raises:
        UnsupportedError: names the option.
    """
    texts = [("MODEL", recorded_model(options.model)), ("--subfolder", options.subfolder or "")]
    texts += [("--revision", options.revision or ""), ("--timing-cache", str(options.timing_cache or ""))]
    texts += [("--plugin", str(plugin)) for plugin in options.plugins]
    texts += [("--keep or --force", glob) for glob in (*options.recipe.keep, *options.recipe.force)]
    for name, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnsupportedError(
                f"{name} is {shown(text)}, which holds bytes that are not UTF-8", fix="rename it, or use a copy or link"
            ) from error


def with_table_defaults(options: ExportOptions) -> ExportOptions:
    """``options`` with what the prompt table of a model without text encoder decides, where it is not asked for: the text has a
    token for every slot of a prompt, and its clips have one size, in latents.

    Raises:
        CheckpointError: the table cannot be read.
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


def resolve_sizes(family: Family, options: ExportOptions) -> Sizes:
    """Return the latent sizes of an export, checked against the family's patch.

    Raises:
        ShapeError: a size that the VAE or the patch does not divide, both ways of giving sizes at once, or bad syntax.
    """
    tokens = options.text_tokens
    if tokens is None:
        tokens = family.config.get("max_text_seq_length") or family.default_text_tokens
    if tokens < 1 or options.batch < 1:
        raise ShapeError(f"--text-tokens is {tokens} and --batch {options.batch}", fix="give at least 1 for each")
    pixels = (options.num_frames, options.height, options.width)
    if options.latent is not None:
        if any(p is not None for p in pixels):
            raise ShapeError(
                "--latent was given together with --num-frames, --height or --width",
                fix="give the sizes in one unit: --latent FxHxW counts latents, the others pixels and frames",
            )
        axes = _parse_latent(options.latent)
    else:
        axes = _from_pixels(family, pixels)
    frames, height, width = axes
    sizes = Sizes(frames, height, width, int(tokens), options.batch)
    family.check(sizes)
    return sizes


def _parse_latent(text: str) -> list[Axis]:
    parts = text.lower().split("x")
    if len(parts) != 3:
        raise ShapeError(f"--latent is {text!r}", available="FRAMESxHEIGHTxWIDTH in latent units, such as 21x60x104")
    return [Axis.parse(part, f"--latent ({name})") for name, part in zip(("frames", "height", "width"), parts)]


def _from_pixels(family: Family, pixels: tuple[str | None, str | None, str | None]) -> list[Axis]:
    names = ("--num-frames", "--height", "--width")
    given = [
        Axis.parse(text, name) if text is not None else Axis.fixed(default)
        for text, name, default in zip(pixels, names, family.default_video)
    ]
    scales = family.vae_scale
    for axis, name, scale in zip(given[1:], names[1:], scales[1:]):
        for size in (axis.min, axis.opt, axis.max):
            if size % scale:
                below = size // scale * scale
                raise ShapeError(
                    f"{name} is {size}, no multiple of the VAE's {scale}",
                    available=f"{below or scale} or {below + scale}",
                    fix=f"change {name}, or give latent sizes with --latent",
                )
    frames, height, width = given
    for size in (frames.min, frames.opt, frames.max):
        if over := (size - 1) % scales[0]:
            raise ShapeError(
                f"--num-frames is {size}, but the VAE makes one latent of the first frame and one of every {scales[0]} more",
                available=f"{size - over} or {size - over + scales[0]}",
                fix="change --num-frames, or give latent sizes with --latent",
            )
    return [
        frames.map(family.latent_frames),
        height.map(lambda size: size // scales[1]),
        width.map(lambda size: size // scales[2]),
    ]
