"""Clips by the model's own diffusers pipeline, with the engines of an export in place of its transformer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.cancel import CancelSignal, cancel_inside, take_turn
from dvdquant.deploy.generation.check import PipelineChecker
from dvdquant.deploy.generation.generator import (
    Denoised,
    Embeddings,
    Frames,
    Generator,
    SessionOptions,
    controller_of,
    executed_original,
    executed_session,
)
from dvdquant.deploy.generation.original import LOADING, CallRecorder, load_original, synchronize
from dvdquant.deploy.generation.pipeline_stages import decode_video, encode_text, frames_of
from dvdquant.deploy.generation.request import (
    GenerateRequest,
    OnStep,
)
from dvdquant.deploy.pipelines.schedulers import FILE, FOLDER, open_scheduler, rehearse
from dvdquant.deploy.pipelines.transformer import DvdqTransformer
from dvdquant.deploy.switching.position import LoopPosition
from dvdquant.errors import CheckpointError
from dvdquant.system.devices import resolve_device

__all__ = ["PipelineGenerator"]


class PipelineGenerator(Generator):
    """The pipeline class named in ``model_index.json``; parts and engines are loaded at the first clip.

    Only classes of diffusers and transformers are loaded, only safetensors, and no code of a model is run.
    """

    def __init__(
        self,
        checker: PipelineChecker,
        options: SessionOptions,
        lora: Sequence[LoraSpec] = (),
    ) -> None:
        super().__init__(checker, options, lora)
        self.folder = checker.folder
        self._engines: dict[str, DvdqTransformer] = {}
        self._originals: dict[str, nn.Module] = {}
        self._pipe: Any = None
        # diffusers keeps the state of a call in the pipeline, and a VAE keeps the frames before: one clip at a time.
        self._encoding, self._denoising, self._decoding = (threading.Lock() for _ in range(3))
        self._loading = threading.Lock()

    @property
    def components(self) -> tuple[str, ...]:
        """The transformers the pipeline calls."""
        return self.folder.transformers

    def _rehearse(self, steps: int, tokens: int) -> None:
        name, root = self.family.name, self.folder.root
        rehearse(open_scheduler(root, name), name, steps, root / FOLDER / FILE, tokens)

    # ------------------------------------------------------------------------------------------------------ the stages

    @torch.no_grad()
    def encode_prompt(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> Embeddings:
        """See :class:`Generator`. The tensors are named as the arguments of the pipeline's call.

        Args:
            request: The request of a clip.
            cancel: An event that ends the work soon after it is set, or None.
        """
        with take_turn(self._encoding, cancel, "the text encoder"):
            pipe = self._parts(request, cancel)
            encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
            with cancel_inside(encoders, cancel):
                return encode_text(pipe, self.family, request, self.artifact.sizes.text_tokens)

    def denoise(
        self,
        request: GenerateRequest,
        embeddings: Embeddings,
        on_step: OnStep | None = None,
        cancel: CancelSignal | None = None,
    ) -> Denoised:
        """See :class:`Generator`.

        Args:
            request: The request of a clip.
            embeddings: The text as the transformer takes it.
            on_step: A function that gets the record of every call of the transformer, or None.
            cancel: An event that ends the work soon after it is set, or None.
        """
        with take_turn(self._denoising, cancel, "the first step"):
            transformers, pipe = self._loaded(request)
            if request.mode == "16":
                with (
                    _recorded(transformers, on_step) as recorders,
                    cancel_inside(transformers.values(), cancel),
                ):
                    latents = self._call(pipe, request, embeddings)
                traces = {name: recorder.trace for name, recorder in recorders.items()}
                summaries = {name: recorder.summary() for name, recorder in recorders.items()}
            else:
                engines = _engines(transformers)
                for engine in engines.values():
                    engine.runner.on_step, engine.cancel = on_step, cancel
                    # Most pipelines keep the number of steps to themselves; the last ones are treated otherwise.
                    engine.begin_request(request.steps)
                try:
                    latents = self._call(pipe, request, embeddings)
                    traces = {name: list(engine.trace) for name, engine in engines.items()}
                    summaries = {name: engine.runner.summary() for name, engine in engines.items()}
                finally:
                    for engine in engines.values():
                        engine.runner.on_step = engine.cancel = None
            executed = self._executed(request, transformers)
        trace = sorted((record for records in traces.values() for record in records), key=lambda record: record.step)
        summary = summaries["transformer"] if len(summaries) == 1 else {"components": summaries}
        return Denoised(latents, trace, traces, summary, executed)

    @torch.no_grad()
    def decode(self, request: GenerateRequest, latents: Tensor, cancel: CancelSignal | None = None) -> Frames:
        """See :class:`Generator`.

        Args:
            request: The request of a clip.
            latents: The latents of the clip.
            cancel: An event that ends the work soon after it is set, or None.
        """
        with take_turn(self._decoding, cancel, "the VAE"):
            pipe = self._parts(request, cancel)
            with cancel_inside([pipe.vae], cancel):
                video = decode_video(pipe, self.family, request, latents, self.artifact.dtype)
                return frames_of(video)

    def close(self) -> None:
        """See :class:`Generator`. A clip that another thread draws ends with EngineError."""
        with self._loading:
            engines, self._engines, self._originals, self._pipe = self._engines, {}, {}, None
            for engine in engines.values():
                engine.close()

    # ------------------------------------------------------------------------------------------------ what is loaded

    def _load(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> None:
        with take_turn(self._denoising, cancel, "anything was loaded"):
            self._loaded(request)

    def _loaded(self, request: GenerateRequest) -> tuple[dict[str, nn.Module], Any]:
        """Return the transformers that a request runs, and the pipeline that holds them."""
        with self._loading:
            transformers = self._originals_of() if request.mode == "16" else self._engines_of(request)
            return transformers, self._pipeline(transformers)

    def _parts(self, request: GenerateRequest, cancel: CancelSignal | None) -> Any:
        """Return the pipeline, whichever transformers it holds; it is loaded with those of a request."""
        with self._loading:
            if self._pipe is not None:
                return self._pipe
        self._load(request, cancel)
        return self._pipe

    def _engines_of(self, request: GenerateRequest) -> dict[str, nn.Module]:
        for name in self.components:
            controller = controller_of(self.artifact, name, request)
            if name in self._engines:
                self._engines[name].use(controller)
                continue
            session = self.options.open(self.artifact, name, self.beside[name])
            try:
                self._engines[name] = DvdqTransformer(session, controller)
            except BaseException:
                session.close()
                raise
        return {name: self._engines[name] for name in self.components}

    def _originals_of(self) -> dict[str, nn.Module]:
        for name in self.components:
            if name not in self._originals:
                device = resolve_device(self.options.device)
                # The pipeline's other parts give it tensors of the export's dtype.
                dtype = self.artifact.dtype
                self._originals[name] = load_original(
                    self.artifact, self.folder.root, name, device, dtype, self.lora, self.beside[name]
                )
        return self._originals

    def _pipeline(self, transformers: dict[str, nn.Module]) -> Any:
        """Return the pipeline with these transformers; its other parts are loaded once."""
        if self._pipe is not None:
            self._pipe.register_modules(**transformers)
            return self._pipe
        import diffusers

        # Wan's VAE loses detail in bf16; the other pipelines decode in the dtype of their text encoder.
        dtypes = {"default": self.artifact.dtype}
        if self.family.name == "wan":
            dtypes["vae"] = torch.float32
        try:
            with LOADING:
                pipe = getattr(diffusers, self.folder.class_name).from_pretrained(
                    self.folder.root, torch_dtype=dtypes, use_safetensors=True, local_files_only=True, **transformers
                )
        except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the pipeline {self.folder.root} cannot be loaded: {str(error).strip():.500}",
                fix="download it again, or give another with --pipeline",
            ) from error
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe.to(next(iter(transformers.values())).device)
        return self._pipe

    # --------------------------------------------------------------------------------------------------------- the call

    def _call(self, pipe: Any, request: GenerateRequest, embeddings: Embeddings) -> Tensor:
        """Return the last latents of the pipeline's loop, as it leaves them."""
        output = pipe(
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            num_frames=request.num_frames,
            height=request.height,
            width=request.width,
            generator=torch.Generator().manual_seed(request.seed),
            max_sequence_length=self.artifact.sizes.text_tokens,
            output_type="latent",
            **{name: tensor.to(pipe._execution_device) for name, tensor in embeddings.items()},
        )
        latents: Tensor = output.frames
        return latents

    def _executed(self, request: GenerateRequest, transformers: dict[str, nn.Module]) -> dict[str, Any]:
        if request.mode == "16":
            parameter = next(transformers[self.components[0]].parameters())
            return executed_original(parameter.device, parameter.dtype)
        sessions = {name: executed_session(engine.session) for name, engine in _engines(transformers).items()}
        first = sessions[self.components[0]]
        return {**first, "pipeline": self.folder.class_name, "components": sessions if len(sessions) > 1 else {}}


def _engines(transformers: dict[str, nn.Module]) -> dict[str, DvdqTransformer]:
    return {name: module for name, module in transformers.items() if isinstance(module, DvdqTransformer)}


@contextlib.contextmanager
def _recorded(transformers: dict[str, nn.Module], on_step: OnStep | None) -> Iterator[dict[str, CallRecorder]]:
    """Record every call of the original transformers while the block runs."""
    recorders = {name: CallRecorder() for name in transformers}
    for recorder in recorders.values():
        recorder.on_step = on_step
    watch = _Watch()
    handles = []
    for name, module in transformers.items():
        handles.append(module.register_forward_pre_hook(watch.before, with_kwargs=True))
        handles.append(module.register_forward_hook(watch.after(recorders[name]), with_kwargs=True))
    try:
        yield recorders
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """The place of the loop, for the hooks of the original transformers. Branches are told apart by their order."""

    def __init__(self) -> None:
        self.position = LoopPosition()
        self.started = 0.0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the step of a call that begins."""
        del module, args
        timestep = float(kwargs["timestep"].max())
        if not self.position.at(None, timestep):
            self.position.enter(None, timestep)
        self.position.name(None)
        self.started = time.perf_counter()

    def after(self, recorder: CallRecorder) -> Callable[..., None]:
        """Return a hook that records a call that ended."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            del module, args
            sample, position = output[0], self.position
            synchronize(sample.device)
            seconds = time.perf_counter() - self.started
            both = kwargs["hidden_states"].shape[0] > 1
            branch = "cond_uncond" if both else "cond" if len(position.called) == 1 else "uncond"
            timestep = position.timestep or 0.0
            recorder.record(sample, step=position.index, branch=branch, timestep=timestep, seconds=seconds)

        return hook
