"""Generate clips with an export: text (or words of a prompt table) in, frames and the trace of every step out.

Two kinds of model. One with a prompt table beside its transformer (examples/tiny-wan) is denoised by
:mod:`dvdquant.deploy.generation.from_table`. Every other model runs in its own diffusers pipeline
(:mod:`dvdquant.deploy.generation.in_pipeline`), with the engines in place of its transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.cancel import CancelSignal
from dvdquant.deploy.generation.check import TableChecker, open_checker
from dvdquant.deploy.generation.from_table import TableGenerator
from dvdquant.deploy.generation.generator import Generator, SessionOptions, WrapSession
from dvdquant.deploy.generation.in_pipeline import PipelineGenerator
from dvdquant.deploy.generation.limits import Limits
from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult, OnStep

__all__ = ["Generator", "GenerateRequest", "GenerateResult", "generate", "open_generator"]


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
    plugins: Sequence[Path] = (),
    limits: Limits | None = None,
) -> Generator:
    """Return the generator for the model of ``artifact``.

    Engines and weights are loaded at the first clip that needs them.

    Args:
        artifact: the export.
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        pipeline: folder or hub id of the model, if it is no longer where the export was made from.
        compile: run the quantized transformer in PyTorch, with its blocks compiled.
        attention: ``16``, ``int8`` or ``fp8`` instead of the recipe's attention, in PyTorch sessions.
        attention_backend: the library that computes it instead of the first of the ladder that fits.
        plugins: TensorRT plugin libraries that the export's engines need; their code runs.
        wrap_session: applied to every session as soon as it is open, to watch or replace what it runs.
        lora: where the export's LoRAs are now, for mode ``16``, if they no longer lie where they were; others run beside
            the quantized weights (:meth:`EngineSession.set_loras`).
        limits: what a server makes at most, besides what the export can make.

    Raises:
        CheckpointError: the model's folder, or a part of the pipeline, is missing. UnsupportedError: no pipeline class.
    """
    checker = open_checker(artifact, pipeline=pipeline, limits=limits)
    options = SessionOptions(backend, device, wrap_session, compile, attention, attention_backend, plugins)
    if isinstance(checker, TableChecker):
        return TableGenerator(checker, PromptTable.open(checker.words.root), options, lora)
    return PipelineGenerator(checker, options, lora)
