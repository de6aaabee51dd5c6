"""Generate clips with an export: text (or words of a prompt table) in, frames and the trace of every step out.

Two kinds of model. One with a prompt table beside its transformer (examples/tiny-wan) is denoised by
:mod:`dvdquant.deploy.generation.from_table`. Every other model runs in its own diffusers pipeline
(:mod:`dvdquant.deploy.generation.in_pipeline`), with the engines in place of its transformer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.cancel import CancelSignal
from dvdquant.deploy.generation.check import PipelineChecker, TableChecker, open_checker
from dvdquant.deploy.generation.from_table import TableGenerator
from dvdquant.deploy.generation.generator import Generator
from dvdquant.deploy.generation.limits import Limits
from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult
from dvdquant.deploy.generation.session_options import SessionOptions, WrapSession
from dvdquant.deploy.generation.text_encoder import check_text_bits
from dvdquant.deploy.switching.controller import OnStep
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.weights import WeightPolicy
from dvdquant.system.plugin_file import Plugins, plugin_paths

__all__ = [
    "GenerateRequest",
    "GenerateResult",
    "Generator",
    "generate",
    "open_generator",
    "reload_generator",
    "with_changed_options",
]


def generate(
    artifact: Artifact,
    request: GenerateRequest,
    *,
    generator: Generator | None = None,
    pipeline: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    on_step: OnStep | None = None,
    cancel: CancelSignal | None = None,
) -> GenerateResult:
    """Draw one clip of ``artifact``. With a ``generator`` from :func:`open_generator`, what it has loaded is used again.

    Args:
        artifact: The opened export.
        request: The request of a clip.
        generator: An open generator, which keeps what it has loaded; None opens one for this clip.
        pipeline: The pipeline that the export belongs to; None means the one that the manifest names.
        backend: The backend of the sessions, or ``auto``.
        device: The device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        on_step: A function that gets the record of every call of the transformer, or None.
        cancel: An event that ends the work soon after it is set, or None.
    """
    if generator is not None:
        return generator.generate(request, on_step, cancel)
    with open_generator(artifact, pipeline=pipeline, backend=backend, device=device) as opened:
        return opened.generate(request, on_step, cancel)


def open_generator(
    artifact: Artifact,
    *,
    pipeline: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    wrap_session: WrapSession | None = None,
    lora: Sequence[LoraSpec] = (),
    compile: bool = False,
    attention: str | None = None,
    attention_backend: str | None = None,
    plugins: Plugins = (),
    limits: Limits | None = None,
    cfg_parallel: str | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
    text_embeds: str | Path | None = None,
    alternate: bool = False,
    text_encoder_bits: int = 16,
    bits: Sequence[int] | None = None,
    weights: WeightPolicy = "auto",
    fuse: bool | None = None,
    cuda_graphs: bool = False,
) -> Generator:
    """Return the generator for the model of ``artifact``.

    Engines and weights are loaded at the first clip that needs them.

    Args:
        artifact: The export.
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        pipeline: Folder or hub id of the model, if it is no longer where the export was made from.
        compile: Run the quantized transformer in PyTorch, with its blocks compiled.
        attention: ``16``, ``int8`` or ``fp8`` instead of the recipe's attention, in PyTorch sessions.
        attention_backend: The library that computes it instead of the first of the ladder that fits.
        plugins: TensorRT plugin libraries that the export's engines need, one path or several; their code runs.
        wrap_session: A function that is applied to every session as soon as it is open, to watch or replace what it runs.
        lora: The files of the export's LoRAs, for mode ``16``, if they no longer lie where they were. Others run beside
            the quantized weights (:meth:`EngineSession.set_loras`).
        cfg_parallel: A second device for the second branch of guidance, see :class:`.guidance_pair.GuidancePair`.
        limits: The most that a server makes, besides what the export can make.
        offload: Keep text encoder and VAE in the host's memory, and move each to the device while it runs.
        vae_tiling: Decode in tiles, one after the other: less memory, and seams that are blended.
        text_embeds: A file of text embeddings (:mod:`.text_embeds`); then no text encoder is loaded.
        alternate: Load the text encoder first, and free it before the transformer is loaded.
        text_encoder_bits: The bits of the text encoder's weights: 16, 4, or 8 with torchao.
        bits: The activation bits to load; the default is all of the export's. A step that fails is not repeated on bits that
            are not loaded.
        weights: ``auto``, ``packed`` or ``expanded``: how sessions hold quantized weights (:func:`.sessions.open_session`).
        fuse: Run in PyTorch with what comes before quantized layers in their kernels; by default where ``compile`` is on.
        cuda_graphs: Repeat steps as CUDA graphs, where launches count (:func:`.sessions.open_session`).

    Raises:
        CheckpointError: The model's folder, or a part of the pipeline, is missing.
        UnsupportedError: The pipeline class, torchao or a plugin library is not there.
    """
    check_text_bits(text_encoder_bits)
    checker = open_checker(artifact, pipeline=pipeline, limits=limits, text_embeds=text_embeds)
    options = SessionOptions(
        backend,
        device,
        wrap_session,
        compile,
        attention,
        attention_backend,
        plugin_paths(plugins),
        cfg_parallel=cfg_parallel,
        offload=offload,
        vae_tiling=vae_tiling,
        alternate=alternate,
        text_bits=text_encoder_bits,
        bits=None if bits is None else tuple(bits),
        weights=weights,
        fuse=fuse,
        cuda_graphs=cuda_graphs,
    )
    return _open(checker, options, lora)


def with_changed_options(generator: Generator, **changes: Any) -> Generator:
    """Return a generator of the same model and export with other options; call it before anything is loaded.

    Args:
        generator: A generator of :func:`open_generator`.
        changes: Fields of :class:`.session_options.SessionOptions`.

    Raises:
        UnsupportedError: The model has no such part, or torchao is missing.
    """
    options = dataclasses.replace(generator.given_options, **changes)
    check_text_bits(options.text_bits)
    checker: Any = generator.checker
    return _open(checker, options, generator.given_lora)


def reload_generator(old: Generator) -> Generator:
    """Return a generator of what the export's folder holds now, opened as ``old`` was, with its engines loaded.

    The old one is closed last: if the new export cannot be used, or both do not fit into memory, it goes on serving. Text
    encoder and VAE are not loaded again. Call it between clips: one that another thread draws with the old generator ends
    with EngineError.

    Args:
        old: A generator of :func:`open_generator`. It is closed on success only.

    Raises:
        DvdquantError: The new export, or a part of it, cannot be used; ``old`` is as it was.
    """
    artifact = Artifact.open(old.artifact.root)
    new = _open(
        open_checker(
            artifact,
            pipeline=old.checker.given,
            limits=old.checker.limits,
            text_embeds=old.checker.text_embeds if isinstance(old.checker, PipelineChecker) else None,
        ),
        old.given_options,
        old.given_lora,
    )
    try:
        new.share_parts(old)
        high = f"a{artifact.bits(artifact.components[0])[-1]}"
        new.prepare(dataclasses.replace(new.checker.example_request(), mode=high))
    except BaseException:
        new.close()
        raise
    old.close()
    return new


def _open(checker: TableChecker | PipelineChecker, options: SessionOptions, lora: Sequence[LoraSpec]) -> Generator:
    options.check_for(checker.artifact.recipe)
    if isinstance(checker, TableChecker):
        given = {
            "--offload": options.offload,
            "--vae-tiling": options.vae_tiling,
            "--alternate": options.alternate,
            "--text-encoder-bits": options.text_bits != 16,
        }
        if any(given.values()):
            raise UnsupportedError(
                "a model with a prompt table has neither text encoder nor VAE",
                fix=f"leave {next(name for name, there in given.items() if there)} out",
            )
        return TableGenerator(checker, PromptTable.open(checker.words.root), options, lora)
    # It imports diffusers, which takes as long as everything else together, and which a prompt table does without.
    from dvdquant.deploy.generation.in_pipeline import PipelineGenerator

    return PipelineGenerator(checker, options, lora)
