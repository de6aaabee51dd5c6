"""Clips of a model with a prompt table.

They take flow matching Euler steps with classifier-free guidance

    v = v_uncond + g · (v_cond − v_uncond)

on latents that are RGB, so that neither text encoder nor VAE is needed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.prompt_table import PromptTable, frames_from_latents
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.cancel import CancelSignal, check_cancelled
from dvdquant.deploy.generation.generator import (
    Denoised,
    Embeddings,
    Frames,
    Generator,
    Runner,
    SessionOptions,
    controller_of,
    executed_original,
    executed_session,
    sampling_defaults,
)
from dvdquant.deploy.generation.original import OriginalRunner, load_original
from dvdquant.deploy.generation.request import (
    GenerateRequest,
    OnStep,
    check_request,
    resolve_size,
)
from dvdquant.deploy.pipelines.schedulers import FILE, FOLDER, open_table_scheduler, rehearse
from dvdquant.deploy.sessions import EngineSession
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.system.devices import resolve_device

__all__ = ["TableGenerator"]


class TableGenerator(Generator):
    """A model with a prompt table: flow matching Euler steps, latents are RGB."""

    def __init__(
        self,
        artifact: Artifact,
        table: PromptTable,
        options: SessionOptions,
        lora: Sequence[LoraSpec] = (),
    ) -> None:
        super().__init__(artifact, options, lora)
        (self.component,) = artifact.components
        self.family = artifact.family(self.component)
        self.table = table
        self._session: EngineSession | None = None
        self._original: nn.Module | None = None
        self._loading = threading.Lock()  # two threads must not open two sessions, one of which nobody closes
        self._tried: set[int] = set()  # numbers of steps that the scheduler has gone through
        self._check_model()

    def check(self, request: GenerateRequest) -> GenerateRequest:
        """See :class:`Generator`; also checks the words."""
        check_request(request, self.artifact)
        self.table.encode(request.prompt)
        if request.negative_prompt is not None:
            self.table.encode(request.negative_prompt)
        size = resolve_size(request, self.artifact.sizes, (1, 1, 1), self.family.patch(), causal=False)
        steps = request.schedule.steps if request.mode == "planned" and request.schedule else request.steps
        default_steps, default_guidance = sampling_defaults(self.artifact, self.table.steps, self.table.guidance_scale)
        steps = steps or default_steps
        self._try_scheduler(steps)
        return dataclasses.replace(
            request,
            steps=steps,
            guidance=default_guidance if request.guidance is None else request.guidance,
            num_frames=size.frames,
            height=size.height,
            width=size.width,
        )

    def _try_scheduler(self, steps: int) -> None:
        """CheckpointError now for a scheduler that would fail once the model is loaded."""
        if steps not in self._tried:
            path = self.table.root / FOLDER / FILE
            rehearse(open_table_scheduler(self.table.root), self.family.name, steps, path)
            self._tried.add(steps)

    def encode_prompt(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> Embeddings:
        """See :class:`Generator`. The words of a branch are rows of the table, [1, slots, text_dim]."""
        check_cancelled(cancel, "the words were looked up")
        branches = {"cond": self.table.encode(request.prompt)}
        if request.guidance != 1:
            branches["uncond"] = self.table.encode(request.negative_prompt)
        return branches

    def denoise(
        self,
        request: GenerateRequest,
        embeddings: Embeddings,
        on_step: OnStep | None = None,
        cancel: CancelSignal | None = None,
    ) -> Denoised:
        """See :class:`Generator`."""
        runner, device, dtype = self._runner(request)
        runner.on_step, runner.cancel = on_step, cancel
        latents = self._denoise(request, embeddings, runner, device, dtype)
        trace = list(runner.trace)
        return Denoised(latents, trace, {self.component: list(trace)}, runner.summary(), _executed(runner))

    def decode(self, request: GenerateRequest, latents: Tensor, cancel: CancelSignal | None = None) -> Frames:
        """See :class:`Generator`. The latents are RGB."""
        del request
        check_cancelled(cancel, "the frames were decoded")
        return frames_from_latents(latents)

    def _load(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> None:
        check_cancelled(cancel, "anything was loaded")
        self._runner(request)

    def close(self) -> None:
        """See :class:`Generator`. A clip that another thread draws ends with EngineError."""
        with self._loading:
            session, self._session, self._original = self._session, None, None
            if session is not None:
                session.close()

    @torch.inference_mode()
    def _denoise(
        self,
        request: GenerateRequest,
        branches: Embeddings,
        runner: Runner,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Latents [1, 3, F, H, W] after all steps. They, the scheduler and the guidance stay in float32 on the CPU."""
        steps, guidance, size = request.steps, request.guidance, (request.num_frames, request.height, request.width)
        assert steps is not None and guidance is not None and None not in size  # noqa: PT018  (filled in by check)
        scheduler = open_table_scheduler(self.table.root)
        scheduler.set_timesteps(steps)
        shape = (1, self.table.latent[0], *(n for n in size if n is not None))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
        runner.begin_request(steps)
        for step, timestep in enumerate(scheduler.timesteps):
            velocities = {}
            for branch, words in branches.items():
                inputs = {
                    "hidden_states": latents.to(device, dtype),
                    "timestep": timestep.reshape(1).to(device, torch.float32),
                    "encoder_hidden_states": words.to(device, dtype),
                }
                velocities[branch] = runner.run(inputs, branch=branch, step=step, steps=steps).float().cpu()
            velocity = velocities["cond"]
            if guidance != 1:
                velocity = velocities["uncond"] + guidance * (velocity - velocities["uncond"])
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    def _runner(self, request: GenerateRequest) -> tuple[Runner, torch.device, torch.dtype]:
        """Return a runner for one request, its device and its dtype. Requests share what is loaded."""
        if request.mode == "16":
            with self._loading:
                if self._original is None:
                    device = resolve_device(self.options.device)
                    # Nothing but the transformer runs here, so a CPU may take the arithmetic it is good at.
                    dtype = torch.float32 if device.type == "cpu" else self.artifact.dtype
                    self._original = load_original(
                        self.artifact,
                        self.table.root,
                        self.component,
                        device,
                        dtype,
                        self.lora,
                        self.beside[self.component],
                    )
                original = OriginalRunner(self._original, self.family)
            return original, original.device, original.dtype
        with self._loading:
            if self._session is None:
                self._session = self.options.open(self.artifact, self.component, self.beside[self.component])
            session = self._session
        runner = StepRunner(session, controller_of(self.artifact, self.component, request))
        return runner, session.device, session.dtype

    def _check_model(self) -> None:
        """CheckpointError unless table and export fit each other; UnsupportedError for inputs a table cannot give."""
        specs = self.family.inputs(self.artifact.sizes)
        names = [spec.name for spec in specs]
        if names != ["hidden_states", "timestep", "encoder_hidden_states"]:
            raise UnsupportedError(
                f"{self.table.root} has a prompt table, but its transformer takes {', '.join(names)}",
                available="models that take hidden_states, timestep and encoder_hidden_states",
            )
        if self.artifact.sizes.batch != 1:
            raise UnsupportedError(
                f"the export has batch {self.artifact.sizes.batch}; clips from a prompt table are made one at a time",
                fix="export again with --batch 1",
            )
        tokens, dimension = len(self.table.order), self.table.embeddings.shape[1]
        wants = specs[2].shape[1:]
        if wants != (tokens, dimension) or specs[0].shape[1] != self.table.latent[0]:
            raise CheckpointError(
                f"{self.table.root} gives text embeddings [{tokens}, {dimension}] and {self.table.latent[0]} channels; "
                f"the export takes {list(wants)} and {specs[0].shape[1]}",
                fix=f"export with --text-tokens {tokens}, or give the model of this export with --pipeline",
            )


def _executed(runner: Runner) -> dict[str, Any]:
    """Return backend, device and dtype of what ran."""
    if isinstance(runner, OriginalRunner):
        return executed_original(runner.device, runner.dtype)
    assert isinstance(runner, StepRunner)
    return executed_session(runner.session)
