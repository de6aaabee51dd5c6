"""The interface of every generator of clips, and the controller of a request."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dvdquant.artifact.manifest import load_manifest
from dvdquant.checkpoint.lora.fuse import components_of
from dvdquant.checkpoint.lora.recorded import split_given
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.cancel import CancelSignal, check_cancelled
from dvdquant.deploy.generation.admission import Admission
from dvdquant.deploy.generation.check import BATCHED, RequestChecker
from dvdquant.deploy.generation.request import DISTILLED, GenerateRequest, GenerateResult
from dvdquant.deploy.generation.session_options import SessionOptions
from dvdquant.deploy.sessions import EngineSession, best_backend, full_name
from dvdquant.deploy.sessions.lora_needs import read_beside, without_place
from dvdquant.deploy.sessions.weight_form import claimed_bytes
from dvdquant.deploy.switching.controller import OnStep, StepController, StepRecord
from dvdquant.deploy.switching.factory import make_controller
from dvdquant.errors import UnsupportedError
from dvdquant.system.device_memory import device_memory
from dvdquant.system.devices import resolve_device

__all__ = [
    "Denoised",
    "Embeddings",
    "Frames",
    "Generator",
    "Runner",
    "controller_of",
]

# The text of a clip as the transformer takes it: a tensor by the name of the pipeline's argument.
Embeddings = Mapping[str, Tensor]
Frames = np.ndarray[Any, np.dtype[np.uint8]]


class Runner(Protocol):
    """The interface that StepRunner and OriginalRunner share."""

    trace: list[StepRecord]
    on_step: OnStep | None
    cancel: CancelSignal | None

    def begin_request(self, steps: int | None = None) -> None:
        """Begin a request of ``steps`` steps; the trace begins anew.

        Args:
            steps: The number of steps, or None if it is not known.
        """
        ...

    def run(
        self, inputs: dict[str, Tensor], *, branch: str = "cond", step: int | None = None, steps: int | None = None
    ) -> Tensor:
        """Run one call and return the output of the transformer.

        Args:
            inputs: The inputs of the graph by name.
            branch: The branch of the guidance: ``cond`` or ``uncond``.
            step: The index of the step, or None.
            steps: The number of steps of the clip, or None.
        """
        ...

    def summary(self) -> dict[str, Any]:
        """Return counts, average bits and seconds of the request."""
        ...


@dataclass
class Denoised:
    """The result of the denoising loop of one clip.

    Args:
        latents: The last latents, in the model's own layout, dtype and on its device.
        trace: A record for every call of the transformers, in the order of the steps.
        components: The records by transformer.
        summary: Counts, average bits and seconds.
        executed: Backend, device and dtype of what ran.
    """

    latents: Tensor
    trace: list[StepRecord]
    components: dict[str, list[StepRecord]]
    summary: dict[str, Any]
    executed: dict[str, Any]


class Generator(ABC):
    """A model opened for several clips; a context manager. Engines and weights are loaded once, when first needed.

    :meth:`generate` is made of three stages, :meth:`encode_prompt`, :meth:`denoise` and :meth:`decode`. They may be
    called apart, also by generators in different processes, and several threads may be in different stages. A request
    that a stage is given has passed :meth:`check`.

    Args:
        checker: What the export and its model can make.
        options: How sessions are opened.
        lora: LoRAs that were named for it: those of the export, or others that run beside the weights.

    Attributes:
        options: How sessions are opened here.
        given_options: How they were to be opened; the backend may differ.
        loras: The changes of those that run beside the weights, by transformer.

    Raises:
        CheckpointError: A file is no LoRA of this model.
    """

    def __init__(self, checker: RequestChecker, options: SessionOptions, lora: Sequence[LoraSpec] = ()) -> None:
        artifact = checker.artifact
        self.checker, self.artifact, self.family = checker, artifact, checker.family
        self.options, self.given_options, self.given_lora = options, options, tuple(lora)
        self.admission = Admission(checker, vae_tiling=options.vae_tiling)
        self._tried: set[tuple[int, int, str]] = set()  # steps, tokens and pipeline that the scheduler has gone through
        self.lora, beside = split_given(artifact.manifest.lora, lora)
        self.beside = components_of(beside, artifact.components)
        self.loras = read_beside(artifact, self.beside)
        self._moved = self._move_for_loras()

    def _move_for_loras(self) -> str | None:
        """Take PyTorch where the backend is free and the best one has no place for the LoRAs; return so in words."""
        options = self.options
        if full_name(options.backend) != "auto" or options.in_pytorch:
            return None
        for component, loras in self.loras.items():
            name, _ = best_backend(self.artifact, component, options.bits, resolve_device(options.device))
            reason = None if name == "pytorch" else without_place(self.artifact, component, loras)
            if reason is not None:
                self.options = dataclasses.replace(options, backend="pytorch")
                return f"{reason}; so PyTorch runs it, and not {name}"
        return None

    def check(self, request: GenerateRequest) -> GenerateRequest:
        """Return ``request`` with steps, guidance and size filled in, before anything is loaded.

        Args:
            request: What is asked for.

        Raises:
            ShapeError: A number is out of range, or a prompt is refused, see :class:`.check.RequestChecker`.
            UnsupportedError: The export has no graph for the mode, or fields contradict each other.
            CheckpointError: The model's scheduler cannot make so many steps.
        """
        filled = self.checker.check(request)
        if self.options.cfg_parallel is not None:
            self._check_branches(filled)
        assert filled.steps is not None
        tried = filled.steps, self.checker.tokens_of(filled), self.checker.pipeline_of(filled)
        if tried not in self._tried:
            # A scheduler that would fail once the model is loaded fails now.
            self._rehearse(*tried)
            self._tried.add(tried)
        return filled

    def _check_branches(self, request: GenerateRequest) -> None:
        """UnsupportedError where there is no second branch for the second device."""
        name, batch = self.family.name, self.artifact.sizes.batch
        if name in DISTILLED:
            reason = f"{name} is distilled: its guidance is an input of the transformer"
        elif not request.guided:
            reason = f"with a guidance of {request.guidance} there is one"
        elif request.mode == "16":
            reason = "mode '16' runs the original checkpoint on one device"
        elif batch > 1 and name in BATCHED:
            reason = f"{name} runs both in one call of this export's batch of {batch}"
        else:
            return
        raise UnsupportedError(
            f"--cfg-parallel runs two branches of guidance on two devices, and {reason}", fix="leave --cfg-parallel out"
        )

    @abstractmethod
    def sessions(self) -> dict[str, EngineSession]:
        """Return the sessions that are open, by transformer; before the first clip or warm-up there is none."""

    @abstractmethod
    def _rehearse(self, steps: int, tokens: int, pipeline: str) -> None:
        """Go through the steps of the model's scheduler. CheckpointError if it cannot make them."""

    @abstractmethod
    def encode_prompt(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> Embeddings:
        """Return the text of a request as the transformer takes it.

        Args:
            request: The request, as :meth:`check` returned it.
            cancel: An event with ``is_set()``, such as ``threading.Event``, or None.

        Raises:
            Cancelled: The event is set.
        """

    @abstractmethod
    def denoise(
        self,
        request: GenerateRequest,
        embeddings: Embeddings,
        on_step: OnStep | None = None,
        cancel: CancelSignal | None = None,
    ) -> Denoised:
        """Run the denoising loop of a request.

        Args:
            request: The request, as :meth:`check` returned it.
            embeddings: The result of :meth:`encode_prompt`.
            on_step: A callback that gets the record of every call of the transformer as soon as it has ended.
            cancel: An event, or None. Once it is set, no further call of the transformer is made.

        Raises:
            EngineError: An engine failed.
            Cancelled: The event is set.
        """

    @abstractmethod
    def decode(self, request: GenerateRequest, latents: Tensor, cancel: CancelSignal | None = None) -> Frames:
        """Return the pictures of the last latents, uint8 [F, H, W, 3].

        Args:
            request: The request, as :meth:`check` returned it.
            latents: The latents of :meth:`denoise`, fp32 in the model's own layout, on any device.
            cancel: An event, or None.

        Raises:
            EngineError: The VAE gave NaN or infinities.
            Cancelled: The event is set.
        """

    def generate(
        self, request: GenerateRequest, on_step: OnStep | None = None, cancel: CancelSignal | None = None
    ) -> GenerateResult:
        """Draw one clip.

        Args:
            request: What is asked for.
            on_step: A callback that gets the record of every call of the transformer as soon as it has ended.
            cancel: An event with ``is_set()``, such as ``threading.Event``, or None. Once it is set, the clip ends within
                one call of the transformer, or one layer of text encoder or VAE. The generator goes on serving others.

        Raises:
            Cancelled: The event is set.
            DvdquantError: The model or the export cannot make the clip, or an engine failed.
        """
        request = self.check(request)
        check_cancelled(cancel, "anything was loaded")
        self._load(request, cancel)
        started = time.perf_counter()
        with self._measured(request):
            embeddings = self.encode_prompt(request, cancel)
            check_cancelled(cancel, "the first step")
            done = self.denoise(request, embeddings, on_step, cancel)
            check_cancelled(cancel, "the frames were decoded")
            frames = self.decode(request, done.latents, cancel)
        seconds = time.perf_counter() - started
        return GenerateResult(
            request,
            frames,
            done.latents.detach().float().cpu(),
            done.trace,
            done.summary,
            done.executed,
            seconds,
            done.components,
        )

    def prepare(self, request: GenerateRequest) -> None:
        """Load what ``request`` needs, so that a missing engine is found before anything is drawn.

        Args:
            request: The request.

        Raises:
            DvdquantError: The model or the export cannot make it, or something cannot be loaded.
        """
        self._load(self.check(request))

    def warm_up(self, request: GenerateRequest | None = None) -> dict[str, float]:
        """Draw a short clip with each engine, so that the first real one finds everything loaded, prepared and compiled.

        Args:
            request: The size and prompt to warm up with. The default is what the export was tuned for.

        Returns:
            The seconds by mode (``a4``, ``a8``), loading included.

        Raises:
            DvdquantError: See :meth:`generate`.
        """
        base = request or self.checker.example_request()
        # Of two transformers the second one takes over late in the schedule.
        steps = 1 if len(self.artifact.components) == 1 else 4
        seconds = {}
        for bits in self.options.bits or self.artifact.bits(self.artifact.components[0]):
            started = time.perf_counter()
            mode = f"a{bits}"
            self.generate(
                dataclasses.replace(
                    base, mode=mode, steps=steps, delta=None, cache=None, cache_policy=None, schedule=None
                )
            )
            seconds[mode] = time.perf_counter() - started
        return seconds

    def admit(self, request: GenerateRequest) -> GenerateRequest:
        """Return ``request`` filled in, if the memory that it takes beside the weights is free on the generator's device.

        Args:
            request: What is asked for.

        Raises:
            ShapeError: The request is wrong, or never fits the device.
            ResourceError: It does not fit what is free now.
            DvdquantError: See :meth:`check`.
        """
        request = self.check(request)
        device = resolve_device(self.options.device)
        free, total = device_memory(device)
        # What open sessions make in their first passes looks free until then.
        self.admission.check(request, max(0, free - claimed_bytes(device)), total)
        return request

    @contextlib.contextmanager
    def _measured(self, request: GenerateRequest) -> Iterator[None]:
        """Note the memory of a clip on a GPU. Of two clips at once, each is noted with what both took."""
        device = resolve_device(self.options.device)
        if device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield
        self.admission.note(request, torch.cuda.max_memory_allocated(device) - before)

    def is_stale(self) -> bool:
        """Return whether the export's folder holds another export than the one that was opened.

        Raises:
            OutputError: The folder holds no valid export now.
        """
        return load_manifest(self.artifact.root) != self.artifact.manifest

    def share_parts(self, other: Generator) -> None:  # noqa: B027  (a prompt table has none)
        """Use text encoder and VAE that another generator of the same pipeline has loaded.

        Args:
            other: The other generator.
        """

    @abstractmethod
    def _load(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> None:
        """Load what a checked request needs."""

    def prompts(self) -> list[str]:
        """Return the prompts that a file of text embeddings holds."""
        return []

    def encode_ahead(self, requests: Sequence[GenerateRequest]) -> None:  # noqa: B027  (most have nothing to do)
        """Encode the text of several requests now, where the text encoder makes room for the transformer afterwards.

        Args:
            requests: The requests, as :meth:`check` returned them.
        """

    def save_text_embeds(self, path: Path, requests: Sequence[GenerateRequest]) -> None:
        """Write what the text encoder makes of some requests' prompts, see :mod:`.text_embeds`.

        Args:
            path: The file.
            requests: The requests, as :meth:`check` returned them.

        Raises:
            UnsupportedError: The model has no text encoder.
        """
        del path, requests
        raise UnsupportedError("a model with a prompt table has no text encoder", fix="leave --save-text-embeds out")

    def notes(self, request: GenerateRequest) -> list[str]:
        """Return what a user should know of a checked request before it is drawn.

        Args:
            request: The request, as :meth:`check` returned it.
        """
        return [self._moved] if self._moved is not None and request.mode != "16" else []

    def fps(self, frames: int) -> int:
        """Return the frames per second at which a clip of ``frames`` frames is meant to be seen.

        Args:
            frames: The number of frames of a clip.
        """
        return self.checker.fps(frames)

    @abstractmethod
    def close(self) -> None:
        """Free engines and weights."""

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def controller_of(
    artifact: Artifact, component: str, request: GenerateRequest, bits: tuple[int, ...] | None = None
) -> StepController:
    """Return the controller for one component and one request (mode ``16`` needs none).

    Args:
        artifact: The opened export.
        component: The name of the transformer.
        request: The request of a clip.
        bits: The activation bits that are loaded; None means all of the export's.
    """
    rule: dict[str, Any] = {}
    if request.mode == "switch":
        rule = {"delta": request.delta, "last_high": request.last_high, "weighting": request.weighting}
    return make_controller(
        request.mode,
        component=component,
        family=artifact.family(component).name,
        bits=bits or artifact.bits(component),
        schedule=request.schedule,
        cache=request.cache,
        cache_policy=request.cache_policy,
        **rule,
    )
