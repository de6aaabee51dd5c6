"""Clips by the model's own diffusers pipeline, with the engines of an export in place of its transformer."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.cancel import CancelSignal, cancel_inside, take_turn
from dvdquant.deploy.generation.check import PipelineChecker
from dvdquant.deploy.generation.executed import executed_original, executed_session
from dvdquant.deploy.generation.generator import (
    Denoised,
    Embeddings,
    Frames,
    Generator,
    controller_of,
)
from dvdquant.deploy.generation.images import Picture, stretch_text
from dvdquant.deploy.generation.original import LOADING, load_original
from dvdquant.deploy.generation.original_calls import recorded_calls
from dvdquant.deploy.generation.pipeline_stages import decode_video, encode_text, frames_of, twin, words_of
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.generation.session_options import SessionOptions
from dvdquant.deploy.generation.text_embeds import save_text_embeds
from dvdquant.deploy.generation.text_encoder import narrow_text, release_memory
from dvdquant.deploy.generation.text_four_bits import check_packed
from dvdquant.deploy.pipelines.schedulers import CONDITIONS, FILE, FOLDER, open_scheduler, rehearse
from dvdquant.deploy.pipelines.transformer import DvdqTransformer, at_step
from dvdquant.deploy.sessions import EngineSession
from dvdquant.deploy.switching.controller import OnStep
from dvdquant.errors import CheckpointError
from dvdquant.model.diffusers_hooks import check_stage_hooks, execution_device
from dvdquant.system.devices import resolve_device

__all__ = ["PipelineGenerator"]

MOST_ENCODED = 256
"""The number of texts that are kept where the text encoder is not; one of Wan takes 4 MB."""


class PipelineGenerator(Generator):
    """The pipeline class named in ``model_index.json``; parts and engines are loaded at the first clip.

    Only classes of diffusers and transformers are loaded, only safetensors, and no code of a model is run.

    Args:
        checker: What the export and its model can make.
        options: How sessions are opened.
        lora: LoRAs that were named for it.

    Attributes:
        components: The transformers, by the names of the pipeline.
        pipes: The pipelines of diffusers that are loaded, by class; they share their parts.
    """

    def __init__(
        self,
        checker: PipelineChecker,
        options: SessionOptions,
        lora: Sequence[LoraSpec] = (),
    ) -> None:
        super().__init__(checker, options, lora)
        self.checker: PipelineChecker = checker
        self.folder = checker.folder
        self._engines: dict[str, DvdqTransformer] = {}
        self._originals: dict[str, nn.Module] = {}
        self.pipes: dict[str, Any] = {}
        self._encoded: dict[Hashable, Embeddings] = {}  # of a text encoder that is not loaded any more
        # diffusers keeps the state of a call in the pipeline, and a VAE keeps the frames before: one clip at a time.
        self._encoding, self._denoising, self._decoding = (threading.RLock() for _ in range(3))
        # A part that comes to the device sends the one before away, so no stage runs beside another.
        if options.offload or options.alternate:
            self._denoising = self._decoding = self._encoding
        self._loading = threading.Lock()

    @property
    def components(self) -> tuple[str, ...]:
        """Return the names of the transformers that the pipeline calls."""
        return self.folder.transformers

    def prompts(self) -> list[str]:
        """See :class:`Generator`."""
        return list(self.checker.text.prompts) if self.checker.text is not None else []

    def notes(self, request: GenerateRequest) -> list[str]:
        """See :class:`Generator`."""
        height, width = request.height or 1, request.width or 1
        found = [stretch_text(picture, height, width) for picture in self.checker.pictures(request).values()]
        if self.options.offload and resolve_device(self.options.device).type == "cpu":
            found.append("--offload saves nothing on a CPU: the parts are in the host's memory anyway")
        return [*super().notes(request), *(words for words in found if words is not None)]

    def _rehearse(self, steps: int, tokens: int, pipeline: str) -> None:
        name, root = self.family.name, self.folder.root
        rehearse(open_scheduler(root, name, pipeline), name, steps, root / FOLDER / FILE, tokens, pipeline)

    # ------------------------------------------------------------------------------------------------------ the stages

    @torch.no_grad()
    def encode_prompt(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> Embeddings:
        """See :class:`Generator`. The tensors are named as the arguments of the pipeline's call.

        Args:
            request: The request of a clip.
            cancel: An event that ends the work soon after it is set, or None.
        """
        if self.checker.text is not None:
            return self.checker.text.of(request)
        if self.options.alternate:
            return self._encode_apart([request], cancel)[0]
        with take_turn(self._encoding, cancel, "the text encoder"):
            pipe = self._parts(request, cancel)
            return self._encode(pipe, request, cancel)

    @torch.no_grad()
    def encode_ahead(self, requests: Sequence[GenerateRequest]) -> None:
        """See :class:`Generator`.

        Args:
            requests: The requests of clips.
        """
        if self.options.alternate and self.checker.text is None:
            self._encode_apart(requests, None)

    def _encode_apart(self, requests: Sequence[GenerateRequest], cancel: CancelSignal | None) -> list[Embeddings]:
        """Encode what is not encoded yet, by a text encoder that has the device to itself and is freed afterwards."""
        wanted = {self._text_key(request): request for request in requests}
        with take_turn(self._encoding, cancel, "the text encoder"):
            new = {key: request for key, request in wanted.items() if key not in self._encoded}
            if new:
                # Room for the text encoder; what the next clip needs is loaded again.
                self.close()
                release_memory(resolve_device(self.options.device))
                pipe = self._open_text(requests[0])
                try:
                    made = {key: self._encode(pipe, request, cancel) for key, request in new.items()}
                finally:
                    del pipe
                    release_memory(resolve_device(self.options.device))
                # The texts of earlier requests go before they take as much memory as an encoder.
                if len(self._encoded) + len(made) > MOST_ENCODED:
                    self._encoded = {key: text for key, text in self._encoded.items() if key in wanted}
                self._encoded.update(made)
            return [self._encoded[key] for key in wanted]

    def _seen(self, request: GenerateRequest) -> Picture | None:
        """Return the image that the text encoder sees, which makes it a part of the text; None where it sees none."""
        return self.checker.pictures(request).get("image") if self.family.image_tokens() else None

    def _text_key(self, request: GenerateRequest) -> Hashable:
        picture = self._seen(request)
        return request.prompt, request.negative_prompt, request.guided, None if picture is None else picture.sha256

    def _open_text(self, request: GenerateRequest) -> Any:
        """Return a pipeline with the text encoders alone."""
        without = [part for part in ("vae", "image_encoder") if part in self.folder.parts]
        parts = dict.fromkeys((*self.components, *without))
        with self._loading:
            return self._open(self.checker.pipeline_of(request), parts, resolve_device(self.options.device))

    def _encode(self, pipe: Any, request: GenerateRequest, cancel: CancelSignal | None) -> Embeddings:
        encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
        picture = self._seen(request)
        image = None if picture is None else picture.image
        with cancel_inside(encoders, cancel):
            return encode_text(pipe, self.family, request, self.artifact.sizes.text_tokens, image)

    @torch.no_grad()
    def save_text_embeds(self, path: Path, requests: Sequence[GenerateRequest]) -> None:
        """Encode the prompts of some requests into a file. Of the model, the text encoders alone are loaded.

        Args:
            path: The file, see :mod:`.text_embeds`.
            requests: The requests, as :meth:`check` returned them; they differ in their prompts alone.

        Raises:
            OutputError: The file cannot be written.
            CheckpointError: A text encoder cannot be loaded.
        """
        pipe = self._open_text(requests[0])
        with self._encoding:
            made = [self._encode(pipe, request, None) for request in requests]
        picture = self._seen(requests[0])
        save_text_embeds(path, self.family, requests, made, None if picture is None else picture.sha256)

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
            pictures = self.checker.pictures(request)
            vae_first = self._vae_until_first_step(transformers.values(), bool(pictures), cancel)
            if request.mode == "16":
                with (
                    recorded_calls(transformers, on_step) as recorders,
                    cancel_inside(transformers.values(), cancel),
                    vae_first,
                ):
                    latents = self._call(pipe, request, embeddings, pictures)
                traces = {name: recorder.trace for name, recorder in recorders.items()}
                summaries = {name: recorder.summary() for name, recorder in recorders.items()}
            else:
                engines = _engines(transformers)
                for engine in engines.values():
                    engine.runner.on_step, engine.cancel = on_step, cancel
                    # Most pipelines keep the number of steps to themselves; the last ones are treated otherwise.
                    engine.begin_request(request.steps)
                try:
                    with vae_first:
                        latents = self._call(pipe, request, embeddings, pictures)
                    traces = {name: list(engine.trace) for name, engine in engines.items()}
                    summaries = {name: engine.runner.summary() for name, engine in engines.items()}
                finally:
                    for engine in engines.values():
                        engine.runner.on_step = engine.cancel = None
            executed = self._executed(request, transformers, pictures)
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
        pipe = self._parts(request, cancel)  # before the turn: whoever loads it may wait for the VAE
        with take_turn(self._decoding, cancel, "the VAE"), cancel_inside([pipe.vae], cancel):
            video = decode_video(pipe, self.family, request, latents, self.artifact.dtype)
            if self.options.offload:
                pipe.maybe_free_model_hooks()
            return frames_of(video)

    def sessions(self) -> dict[str, EngineSession]:
        """See :class:`Generator`."""
        return {name: engine.session for name, engine in self._engines.items()}

    def close(self) -> None:
        """See :class:`Generator`. A clip that another thread draws ends with EngineError."""
        with self._loading:
            engines, self._engines, self._originals, self.pipes = self._engines, {}, {}, {}
            for engine in engines.values():
                engine.close()

    # ------------------------------------------------------------------------------------------------ what is loaded

    def share_parts(self, other: Generator) -> None:
        """See :class:`Generator`. The two take turns with the parts.

        Args:
            other: The other generator. It may go on drawing, and be closed first.
        """
        if not isinstance(other, PipelineGenerator):
            return
        with other._loading:
            if not other.pipes or other.folder != self.folder:
                return
            # A pipeline keeps the state of a call in itself and in its scheduler.
            self.pipes = {name: copy.copy(pipe) for name, pipe in other.pipes.items()}
            for pipe in self.pipes.values():
                pipe.register_modules(scheduler=copy.deepcopy(pipe.scheduler))
            self._encoding, self._decoding = other._encoding, other._decoding
            if self.options.offload:
                self._denoising = other._denoising

    def _load(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> None:
        if self.options.alternate and self.checker.text is None:
            with torch.no_grad():
                self._encode_apart([request], cancel)
        with take_turn(self._denoising, cancel, "anything was loaded"):
            self._loaded(request)

    def _loaded(self, request: GenerateRequest) -> tuple[dict[str, nn.Module], Any]:
        """Return the transformers that a request runs, and the pipeline that holds them."""
        class_name = self.checker.pipeline_of(request)
        self._check_hooks(class_name)
        with self._loading:
            transformers = self._originals_of() if request.mode == "16" else self._engines_of(request)
            return transformers, self._pipeline(class_name, transformers)

    def _parts(self, request: GenerateRequest, cancel: CancelSignal | None) -> Any:
        """Return the pipeline, whichever transformers it holds; it is loaded with those of a request."""
        with self._loading:
            if self.pipes:
                return next(iter(self.pipes.values()))
        self._load(request, cancel)
        return next(iter(self.pipes.values()))

    def _engines_of(self, request: GenerateRequest) -> dict[str, nn.Module]:
        for name in self.components:
            controller = controller_of(self.artifact, name, request, self.options.bits)
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

    def _pipeline(self, class_name: str, transformers: dict[str, nn.Module]) -> Any:
        """Return the pipeline of a class with these transformers; its other parts are loaded once."""
        if class_name not in self.pipes:
            other = next(iter(self.pipes.values()), None)
            self.pipes[class_name] = (
                twin(class_name, other) if other is not None else self._whole(class_name, transformers)
            )
        pipe = self.pipes[class_name]
        pipe.register_modules(**transformers)
        return pipe

    def _whole(self, class_name: str, transformers: dict[str, nn.Module]) -> Any:
        """Return a pipeline around these transformers, with all that it needs to draw."""
        parts: dict[str, nn.Module | None] = dict(transformers)
        if self.checker.text is not None or self.options.alternate:
            parts.update(dict.fromkeys(self.folder.text_parts))
        device: Any = next(iter(transformers.values())).device
        return self._open(class_name, parts, device)

    def _check_hooks(self, class_name: str) -> None:
        """Refuse a diffusers that cannot run the stages of a pipeline apart; the last one runs after all denoising."""
        check_stage_hooks(class_name, latents=self.family.name == "ltx-video")

    def _open(self, class_name: str, parts: Mapping[str, nn.Module | None], device: torch.device) -> Any:
        """Return a pipeline around these parts, None for those that are not needed; the others are loaded from its folder."""
        import diffusers

        self._check_hooks(class_name)
        # Wan's VAE loses detail in bf16; the other pipelines decode in the dtype of their text encoder.
        dtypes = {"default": self.artifact.dtype}
        if self.family.name == "wan":
            dtypes["vae"] = torch.float32
        more: dict[str, Any] = {}
        encoders = [name for name in self.folder.text_parts if name.startswith("text_encoder") and name not in parts]
        if self.options.text_bits != 16 and encoders:
            more["quantization_config"] = narrow_text(encoders, self.options.text_bits)
        try:
            with LOADING:
                pipe = getattr(diffusers, class_name).from_pretrained(
                    self.folder.root, torch_dtype=dtypes, use_safetensors=True, local_files_only=True, **parts, **more
                )
        except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the pipeline {self.folder.root} cannot be loaded: {str(error).strip():.500}",
                fix="download it again, or give another with --pipeline",
            ) from error
        for name in encoders if self.options.text_bits == 4 else ():
            check_packed(getattr(pipe, name))
        pipe.set_progress_bar_config(disable=True)
        if self.options.vae_tiling and getattr(pipe, "vae", None) is not None:
            pipe.vae.enable_tiling()
            pipe.vae.enable_slicing()
        if self.options.offload:
            pipe.enable_model_cpu_offload(device=device)
            return pipe
        return pipe.to(device)

    # --------------------------------------------------------------------------------------------------------- the call

    def _call(
        self, pipe: Any, request: GenerateRequest, embeddings: Embeddings, pictures: Mapping[str, Picture]
    ) -> Tensor:
        """Return the last latents of the pipeline's loop, as its VAE is to get them."""
        steps, two = request.steps or 0, len(self.components) > 1
        last: list[Tensor] = []

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            del pipe, timestep
            last[:] = [tensors["latents"]]
            if two:
                at_step(step + 1, steps)
            return {}

        if two:
            at_step(0, steps)
        try:
            output = self._run(pipe, request, embeddings, pictures, after_step)
        finally:
            at_step(None)
        # This pipeline gives the latents without the image's, which the VAE needs.
        whole = self.family.config.get("image_condition_type") == "latent_concat"
        latents: Tensor = last[0] if whole else output.frames
        return latents

    def _run(
        self,
        pipe: Any,
        request: GenerateRequest,
        embeddings: Embeddings,
        pictures: Mapping[str, Picture],
        after_step: Callable[..., Any],
    ) -> Any:
        """Call the pipeline, without its last stage."""
        return pipe(
            **self._images(pipe, request, pictures),
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            num_frames=request.num_frames,
            height=request.height,
            width=request.width,
            generator=torch.Generator().manual_seed(request.seed),
            max_sequence_length=words_of(self.family, self.artifact.sizes.text_tokens),
            callback_on_step_end=after_step,
            output_type="latent",
            **{name: tensor.to(execution_device(pipe)) for name, tensor in embeddings.items()},
        )

    def _images(self, pipe: Any, request: GenerateRequest, pictures: Mapping[str, Picture]) -> dict[str, Any]:
        """Return the arguments of the call that hold the images."""
        images = {name: picture.image for name, picture in pictures.items()}
        if type(pipe).__name__ != CONDITIONS or not images:
            return images
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

        places = {"image": 0, "last_image": (request.num_frames or 1) - 1}
        return {"conditions": [LTXVideoCondition(image=image, frame_index=places[n]) for n, image in images.items()]}

    @contextlib.contextmanager
    def _vae_until_first_step(
        self, transformers: Iterable[nn.Module], images: bool, cancel: CancelSignal | None
    ) -> Iterator[None]:
        """Keep other clips from the VAE while it encodes this one's images, which is before the first step."""
        with contextlib.ExitStack() as stack:
            if images:
                stack.enter_context(take_turn(self._decoding, cancel, "the image was encoded"))
                for module in transformers:
                    handle = module.register_forward_pre_hook(lambda *_: stack.close())
                    stack.callback(handle.remove)
            yield

    def _executed(
        self, request: GenerateRequest, transformers: dict[str, nn.Module], pictures: Mapping[str, Picture]
    ) -> dict[str, Any]:
        images = {name: picture.to_json() for name, picture in pictures.items()}
        more: dict[str, Any] = {"pipeline": self.checker.pipeline_of(request), **({"images": images} if images else {})}
        if request.mode == "16":
            parameter = next(transformers[self.components[0]].parameters())
            return {**executed_original(parameter.device, parameter.dtype), **more}
        sessions = {name: executed_session(engine.session) for name, engine in _engines(transformers).items()}
        first = sessions[self.components[0]]
        return {**first, **more, "components": sessions if len(sessions) > 1 else {}}


def _engines(transformers: dict[str, nn.Module]) -> dict[str, DvdqTransformer]:
    return {name: module for name, module in transformers.items() if isinstance(module, DvdqTransformer)}
