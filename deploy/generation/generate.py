"""Generate clips with an export: text (or words of a prompt table) in, frames and the trace of every step out.

Two kinds of model. One with a prompt table beside its transformer (examples/tiny-wan) is denoised by
:mod:`dvdquant.deploy.generation.from_table`. Every other model runs in its own diffusers pipeline
(:mod:`dvdquant.deploy.generation.in_pipeline`), with the engines in place of its transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dvdquant.checkpoint.formats.files import given_file
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.cancel import CancelSignal
from dvdquant.deploy.generation.from_table import TableGenerator
from dvdquant.deploy.generation.generator import Generator, SessionOptions, WrapSession
from dvdquant.deploy.generation.in_pipeline import PipelineGenerator
from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult, OnStep
from dvdquant.errors import CheckpointError
from dvdquant.text import shown

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
    """Draw one clip of ``artifact``. With a ``generator`` from :func:`open_generator`, what it has loaded is used again."""
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
        wrap_session: applied to every session as soon as it is open, to watch or replace what it runs.
        lora: where the export's LoRAs are now, for mode ``16``, if they no longer lie where they were; others run beside
            the quantized weights (:meth:`EngineSession.set_loras`).

    Raises:
        CheckpointError: the model's folder, or a part of the pipeline, is missing. UnsupportedError: no pipeline class.
    """
    source = str(pipeline or artifact.manifest.source["model"])
    options = SessionOptions(backend, device, wrap_session, compile, attention, attention_backend)
    if pipeline is None and given_file(source) is not None:
        raise CheckpointError(
            f"the export was made from the single file {shown(source)}, which has no text encoder, VAE and scheduler",
            available=f"{artifact.manifest.source['class_name']} of family {artifact.manifest.family}",
            fix="give the diffusers pipeline of the same model with --pipeline FOLDER or a hub id; its transformer is not used",
        )
    if PromptTable.is_at(source):
        return TableGenerator(artifact, PromptTable.open(source), options, lora)
    return PipelineGenerator(artifact, source, options, lora)
