"""The nodes: load an export, set the bits of its steps, add LoRAs, read the trace; words and frames of the toy models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.prompt_table import PROMPTS, PromptTable, frames_from_latents
from dvdquant.deploy.comfyui import places
from dvdquant.deploy.comfyui.sampling import OPTION, Settings, Trace
from dvdquant.deploy.comfyui.trace_text import trace_json, trace_picture, trace_table
from dvdquant.deploy.generation.video import enlarge
from dvdquant.deploy.number_checks import is_number
from dvdquant.deploy.switching.defaults import CACHE_POLICIES, DEFAULT_DELTA, LAST_HIGH, WEIGHTINGS
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.hardware.weights import WEIGHTS, WeightPolicy
from dvdquant.ops.attention.libraries import LIBRARIES
from dvdquant.recipe import ATTENTION
from dvdquant.system.records import brief

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

# Which backends a node offers; the others are by their aliases, as in the commands.
BACKENDS = ("auto", "pytorch", "onnxruntime", "rtx", "tensorrt")
FIRST = "first"  # the first transformer of an export
AS_EXPORTED, FASTEST = "as exported", "fastest"
FUSE = {"auto": None, "yes": True, "no": False}
MODES = ("switch", "a8", "a4", "planned")
Inputs = dict[str, dict[str, Any]]


def _help(kind: str, tooltip: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """Return the declaration of an input with its help text."""
    return kind, {"tooltip": tooltip, **more}


def _choice(names: list[str], tooltip: str) -> tuple[list[str], dict[str, str]]:
    """Return the declaration of an input that takes one of some names."""
    return names or [places.NOTHING], {"tooltip": tooltip}


class LoadExport:
    """Loads an export as a MODEL."""

    CATEGORY = "dvdquant"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    DESCRIPTION = (
        "Loads what dvdq-export wrote as a model that every sampler runs, with 4 or 8 bits chosen at each step."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the inputs of the node."""
        return {
            "required": {
                "export": _choice(places.exports(places.roots()), "A folder in ComfyUI/models/dvdquant."),
                "transformer": _choice(
                    [FIRST, "transformer", "transformer_2"], "Wan 2.2 has two: the second is for low noise."
                ),
                "backend": _choice(
                    list(BACKENDS), "auto: an engine for this GPU, else PyTorch with the kernels, else ONNX Runtime."
                ),
            },
            # Later inputs come last: a saved workflow lists its values in this order, and lacks those that are newer.
            "optional": {
                "compile": _help(
                    "BOOLEAN", "Run in PyTorch, with the blocks compiled: the first step takes a minute more.",
                    default=False,
                ),
                "fuse": _choice(
                    list(FUSE), "Norm, modulation, residual and GELU in the kernels of layers, in PyTorch. auto: with compile."
                ),
                "cuda_graphs": _help(
                    "BOOLEAN", "Repeat short steps of static sizes as CUDA graphs. It helps where launches count.",
                    default=False,
                ),
                "attention": _choice(
                    [AS_EXPORTED, *ATTENTION], "Self-attention of long sequences, in PyTorch. Engines have what they were "
                    "built with."
                ),
                "attention_backend": _choice(
                    [FASTEST, *LIBRARIES, "reference"], "What computes 8-bit attention. fastest: the first that is right and "
                    "faster than 16 bit."
                ),
                "weights": _choice(
                    list(WEIGHTS), "Quantized weights on the GPU. packed: least memory. expanded: 2 to 4 times that. auto: "
                    "packed where it costs a step 2 % at most."
                ),
            },
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, export: str, **_: Any) -> str:
        """Return a text that changes when the export was written anew.

        Args:
            export: The name of the export.
            **_: The other inputs.
        """
        return places.changed(places.find(export, places.roots()))

    def load(
        self,
        export: str,
        transformer: str,
        backend: str,
        compile: bool = False,
        fuse: str = "auto",
        cuda_graphs: bool = False,
        attention: str = AS_EXPORTED,
        attention_backend: str = FASTEST,
        weights: WeightPolicy = "auto",
    ) -> tuple[Any]:
        """Return the MODEL.

        Args:
            export: The name of the export.
            transformer: ``first``, ``transformer`` or ``transformer_2``.
            backend: One of :data:`BACKENDS`.
            compile: Run in PyTorch, with the transformer's blocks compiled.
            fuse: ``auto``, ``yes`` or ``no``: whether what comes before quantized layers is in their kernels.
            cuda_graphs: Repeat steps as CUDA graphs, where launches count.
            attention: ``as exported``, ``16``, ``int8`` or ``fp8`` for self-attention of long sequences in PyTorch.
            attention_backend: ``fastest``, ``reference`` or a library.
            weights: ``auto``, ``packed`` or ``expanded``.

        Raises:
            OutputError: There is no such export.
            UnsupportedError: A value is unknown, or two exclude each other.
        """
        from dvdquant.deploy.comfyui.model import load_model

        root = places.find(export, places.roots())
        if fuse not in FUSE:
            raise UnsupportedError(f"fuse is {brief(fuse)}", available=FUSE, fix="pick one of these")
        model = load_model(
            root,
            "" if transformer == FIRST else transformer,
            backend,
            compile=compile,
            fuse=FUSE[fuse],
            cuda_graphs=cuda_graphs,
            attention=None if attention == AS_EXPORTED else attention,
            attention_backend=None if attention_backend == FASTEST else attention_backend,
            weights=weights,
        )
        return (model,)


class BitSchedule:
    """Sets how the steps get their bits."""

    CATEGORY = "dvdquant"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "set"
    DESCRIPTION = "Sets how each step gets its bits. Without this node: switch with the default δ."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the inputs of the node."""
        steps = {"default": 0, "min": 0, "max": 10000}
        return {
            "required": {
                "model": _help("MODEL", "From Load dvdquant export."),
                "mode": _choice(
                    list(MODES),
                    "switch: by how much the output changes. a8, a4: one width. planned: schedule.json of dvdq-plan.",
                ),
                "delta": _help(
                    "FLOAT", "Of switch. Larger: more steps in 4 bits.",
                    default=DEFAULT_DELTA, min=0.0, max=100.0, step=0.01,
                ),
                "last_high": _help(
                    "INT", "Of switch: so many last steps run in 8 bits.", default=LAST_HIGH, min=0, max=10000
                ),
                "weighting": _choice(
                    list(WEIGHTINGS), "Of switch. step: a change counts by the length of its step. none: as published."
                ),
                "cache": _help(
                    "FLOAT", "0: off. Skips steps whose change is predicted to stay below.",
                    default=0.0, min=0.0, max=10.0, step=0.01,
                ),
            },
            "optional": {
                "total_steps": _help("INT", "Where several samplers share a clip: steps of the whole clip.", **steps),
                "first_step": _help("INT", "Where several samplers share a clip: start_at_step of this one.", **steps),
                # The last one: a saved workflow lists its values in this order.
                "cache_policy": _choice(list(CACHE_POLICIES), "Of cache. What predicts which steps can be skipped."),
            },
        }  # fmt: skip

    def set(
        self,
        model: Any,
        mode: str,
        delta: float,
        last_high: int,
        weighting: str,
        cache: float,
        total_steps: int = 0,
        first_step: int = 0,
        cache_policy: str = CACHE_POLICIES[0],
    ) -> tuple[Any]:
        """Return the MODEL with other settings.

        Args:
            model: A MODEL of :class:`LoadExport`.
            mode: One of :data:`MODES`.
            delta: δ of ``switch``.
            last_high: The number of last steps that run on the engine with more bits.
            weighting: ``step`` or ``none``.
            cache: The threshold of the step cache; 0 is off.
            total_steps: The steps of the whole clip if several samplers share it.
            first_step: The index of this sampler's first step in the whole clip.
            cache_policy: What predicts which steps can be skipped.

        Raises:
            UnsupportedError: A setting is out of its range, or it is no MODEL of Load dvdquant export.
        """
        if not is_number(cache):
            raise UnsupportedError(
                f"cache is {brief(cache)}", available="a number", fix="give 0 to leave the cache off"
            )
        if cache and mode == "planned":
            raise UnsupportedError(
                "a planned schedule says itself which steps are skipped", fix="set cache to 0, or mode to switch"
            )
        changes = {"mode": mode, "delta": delta, "last_high": last_high, "weighting": weighting}
        changes |= {"cache": cache, "cache_policy": cache_policy}
        return (_changed(model, "Bit schedule", **changes, total_steps=total_steps, first_step=first_step),)


class LoraBeside:
    """Adds a LoRA beside the packed weights."""

    CATEGORY = "dvdquant"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "add"
    DESCRIPTION = (
        "Runs a LoRA in 16 bit beside the packed weights: of an export with --lora-rank, or on the backend pytorch."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the inputs of the node."""
        import folder_paths

        return {
            "required": {
                "model": _help("MODEL", "From Load dvdquant export."),
                "lora": _choice(folder_paths.get_filename_list("loras"), "A file in ComfyUI/models/loras."),
                "strength": _help("FLOAT", "1 is as trained.", default=1.0, min=-10.0, max=10.0, step=0.01),
            }
        }

    def add(self, model: Any, lora: str, strength: float) -> tuple[Any]:
        """Return the MODEL with one LoRA more.

        Args:
            model: A MODEL of :class:`LoadExport`.
            lora: The name of the file.
            strength: Its scale; 0 leaves it out.

        Raises:
            UnsupportedError: The strength is no finite number, or there is no such file.
        """
        import folder_paths

        if not is_number(strength):
            raise UnsupportedError(
                f"the strength of the LoRA is {brief(strength)}",
                available="a finite number",
                fix="give 1.0 for the LoRA as it was trained",
            )
        path = folder_paths.get_full_path("loras", lora)
        if path is None:
            raise UnsupportedError(f"there is no LoRA {lora!r:.200}", fix="put the file into ComfyUI/models/loras")
        settings = _settings(model, "LoRA for dvdquant export")
        spec = (LoraSpec(Path(path), float(strength)),) if strength else ()
        return (_changed(model, "LoRA for dvdquant export", loras=(*settings.loras, *spec)),)


class StepTrace:
    """Shows what each step ran on and why."""

    CATEGORY = "dvdquant"
    RETURN_TYPES = ("LATENT", "STRING", "STRING", "IMAGE")
    RETURN_NAMES = ("latent", "table", "json", "picture")
    FUNCTION = "read"
    OUTPUT_NODE = True
    DESCRIPTION = "Bits, reason and time of every step. Put it after the sampler; give it the same model."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the inputs of the node."""
        return {
            "required": {
                "latent": _help("LATENT", "The sampler's output: the trace is read when the sampler is done."),
                "model": _help("MODEL", "The very model that the sampler ran."),
            }
        }

    def read(self, latent: dict[str, Any], model: Any) -> dict[str, Any]:
        """Return the latent, and the trace as a table, as JSON and as a picture.

        Args:
            latent: The sampler's output.
            model: The MODEL that the sampler ran.
        """
        trace: Trace = _settings(model, "Step trace").trace
        table = trace_table(trace)
        picture = torch.from_numpy(trace_picture(trace))[None]
        return {"ui": {"text": [table]}, "result": (latent, table, json.dumps(trace_json(trace)), picture)}


class TableWords:
    """Encodes the words of a model with a prompt table."""

    CATEGORY = "dvdquant/toy models"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "encode"
    DESCRIPTION = "Words of a model with a prompt table (tiny-wan), which needs no text encoder."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the inputs of the node."""
        return {
            "required": {
                "table": _choice(places.tables(places.roots()), "A model folder with prompts.json in models/dvdquant."),
                "words": _help("STRING", "One word for each slot.", default="ring red right large black"),
            }
        }

    def encode(self, table: str, words: str) -> tuple[Any, Any]:
        """Return the conditioning of the words, and that of no words.

        Args:
            table: The name of the model's folder.
            words: The words.
        """
        known = PromptTable.open(places.find(table, places.roots(), PROMPTS))
        return [[known.encode(words), {}]], [[known.encode(None), {}]]


class TableFrames:
    """Shows the latents of a model whose latents are pictures."""

    CATEGORY = "dvdquant/toy models"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "show"
    DESCRIPTION = "The frames of a model whose latents are red, green and blue (tiny-wan), enlarged. It needs no VAE."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the inputs of the node."""
        return {"required": {"latent": _help("LATENT", "Latents with three channels.")}}

    def show(self, latent: dict[str, Any]) -> tuple[torch.Tensor]:
        """Return the frames, [clips · frames, H, W, 3] from 0 to 1.

        Args:
            latent: Latents [B, 3, F, H, W] in [-1, 1].

        Raises:
            ShapeError: They are no real tensor of five axes.
        """
        samples = latent.get("samples") if isinstance(latent, dict) else None
        if not isinstance(samples, torch.Tensor) or samples.ndim != 5 or not samples.numel() or samples.is_complex():
            what = f"{samples.dtype} {list(samples.shape)}" if isinstance(samples, torch.Tensor) else brief(samples)
            raise ShapeError(f"the latents are {what}", available="[batch, 3, frames, height, width]")
        clips = [enlarge(frames_from_latents(clip[None])) for clip in samples]
        return (torch.from_numpy(np.concatenate(clips).astype(np.float32) / 255),)


def _settings(model: Any, node: str) -> Settings:
    """Return the settings of a MODEL.

    Raises:
        UnsupportedError: It is no MODEL of Load dvdquant export.
    """
    settings = getattr(model, "model_options", {}).get("transformer_options", {}).get(OPTION)
    if not isinstance(settings, Settings):
        raise UnsupportedError(
            f"the node {node} got a model that is no export", fix="connect the output of Load dvdquant export"
        )
    return settings


def _changed(model: Any, node: str, **values: Any) -> Any:
    """Return a copy of a MODEL with other settings; the session stays shared."""
    settings = _settings(model, node).changed(**values)
    copy = model.clone()
    copy.model_options["transformer_options"][OPTION] = settings
    return copy


_NODES: dict[str, tuple[type, str]] = {
    "DvdqLoadExport": (LoadExport, "Load dvdquant export"),
    "DvdqBitSchedule": (BitSchedule, "Bit schedule (dvdquant)"),
    "DvdqLora": (LoraBeside, "LoRA for dvdquant export"),
    "DvdqStepTrace": (StepTrace, "Step trace (dvdquant)"),
    "DvdqTableWords": (TableWords, "Words of a prompt table (dvdquant)"),
    "DvdqTableFrames": (TableFrames, "Latents as frames (dvdquant)"),
}
NODE_CLASS_MAPPINGS: dict[str, type] = {name: node for name, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {name: title for name, (_, title) in _NODES.items()}
