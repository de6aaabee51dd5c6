"""Clips of a model with a prompt table.

They take flow matching Euler steps with classifier-free guidance

    v = v_uncond + g · (v_cond − v_uncond)

on latents that are RGB, so that neither text encoder nor VAE is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.prompt_table import PromptTable, frames_from_latents
from dvdquant.deploy.cancel import CancelSignal, check_cancelled
from dvdquant.deploy.generation.check import TableChecker
from dvdquant.deploy.generation.executed import executed_original, executed_session
from dvdquant.deploy.generation.generator import (
    Denoised,
    Embeddings,
    Frames,
    Generator,
    Runner,
    controller_of,
)
from dvdquant.deploy.generation.original import load_original
from dvdquant.deploy.generation.original_calls import OriginalRunner
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.generation.session_options import SessionOptions
from dvdquant.deploy.pipelines.schedulers import FILE, FOLDER, open_table_scheduler, rehearse
from dvdquant.deploy.sessions import EngineSession
from dvdquant.deploy.switching.controller import OnStep
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.errors import CheckpointError
from dvdquant.system.devices import resolve_device

__all__ = ["TableGenerator"]


class TableGenerator(Generator):
    """A model with a prompt table: flow matching Euler steps, latents are RGB.

    Args:
        checker: What the export and its model can make.
        table: The prompt table of the model.
        options: How sessions are opened.
        lora: LoRAs that were named for it.
    """

    def __init__(
        self,
        checker: TableChecker,
        table: PromptTable,
        options: SessionOptions,
        lora: Sequence[LoraSpec] = (),
    ) -> None:
        super().__init__(checker, options, lora)
        (self.component,) = self.artifact.components
        self.table = table
        self._session: EngineSession | None = None
        self._original: nn.Module | None = None
        self._loading = threading.Lock()  # two threads must not open two sessions, one of which nobody closes
        self._check_rows()

    def _rehearse(self, steps: int, tokens: int, pipeline: str) -> None:
        del tokens, pipeline
        path = self.table.root / FOLDER / FILE
        rehearse(open_table_scheduler(self.table.root), self.family.name, steps, path)

    def encode_prompt(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> Embeddings:
        """See :class:`Generator`. The words of a branch are rows of the table, [1, slots, text_dim].

        Args:
            request: The request of a clip.
            cancel: An event that ends the work soon after it is set, or None.
        """
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
        """See :class:`Generator`.

        Args:
            request: The request of a clip.
            embeddings: The text as the transformer takes it.
            on_step: A function that gets the record of every call of the transformer, or None.
            cancel: An event that ends the work soon after it is set, or None.
        """
        runner, device, dtype = self._runner(request)
        runner.on_step, runner.cancel = on_step, cancel
        latents = self._denoise(request, embeddings, runner, device, dtype)
        trace = list(runner.trace)
        return Denoised(latents, trace, {self.component: list(trace)}, runner.summary(), _executed(runner))

    def decode(self, request: GenerateRequest, latents: Tensor, cancel: CancelSignal | None = None) -> Frames:
        """See :class:`Generator`. The latents are RGB.

        Args:
            request: The request of a clip.
            latents: The latents of the clip, fp32 [1, 3, F, H, W] from −1 to 1.
            cancel: An event that ends the work soon after it is set, or None.
        """
        del request
        check_cancelled(cancel, "the frames were decoded")
        return frames_from_latents(latents)

    def _load(self, request: GenerateRequest, cancel: CancelSignal | None = None) -> None:
        check_cancelled(cancel, "anything was loaded")
        self._runner(request)

    def sessions(self) -> dict[str, EngineSession]:
        """See :class:`Generator`."""
        session = self._session
        return {} if session is None else {self.component: session}

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
        runner = StepRunner(session, controller_of(self.artifact, self.component, request, self.options.bits))
        return runner, session.device, session.dtype

    def _check_rows(self) -> None:
        """CheckpointError unless the rows of the table fit the export."""
        specs = self.family.inputs(self.artifact.sizes)
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
