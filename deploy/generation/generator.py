"""What every generator of clips shares: its interface, the controller of a request, and what is said of where it ran."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult, OnStep
from dvdquant.deploy.generation.video import default_fps
from dvdquant.deploy.sessions import EngineSession
from dvdquant.deploy.switching.controller import StepController, StepRecord
from dvdquant.deploy.switching.factory import make_controller

__all__ = [
    "Generator",
    "Runner",
    "WrapSession",
    "controller_of",
    "executed_original",
    "executed_session",
    "wrapped",
]

WrapSession = Callable[[EngineSession], EngineSession]


class Runner(Protocol):
    """What StepRunner and OriginalRunner share."""

    trace: list[StepRecord]
    on_step: OnStep | None

    def begin_request(self, steps: int | None = None) -> None:
        """Begin a request of ``steps`` steps; the trace begins anew."""
        ...

    def run(
        self, inputs: dict[str, Tensor], *, branch: str = "cond", step: int | None = None, steps: int | None = None
    ) -> Tensor:
        """Run one call and return the output of the transformer."""
        ...

    def summary(self) -> dict[str, Any]:
        """Return counts, average bits and seconds of the request."""
        ...


class Generator(ABC):
    """A model opened for several clips; a context manager. Engines and weights are loaded once, when first needed."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @abstractmethod
    def check(self, request: GenerateRequest) -> GenerateRequest:
        """Return ``request`` with steps, guidance and size filled in, before anything is loaded.

        Raises:
            DvdquantError: The model or the export cannot make it.
        """

    @abstractmethod
    def prepare(self, request: GenerateRequest) -> None:
        """Load what ``request`` needs, so that a missing engine is found before anything is drawn."""

    @abstractmethod
    def generate(self, request: GenerateRequest, on_step: OnStep | None = None) -> GenerateResult:
        """Draw one clip; ``on_step`` gets the record of every call of the transformer as soon as it has ended."""

    def fps(self, frames: int) -> int:
        """Return the frames per second at which a clip of ``frames`` frames is meant to be seen."""
        return default_fps(frames)

    @abstractmethod
    def close(self) -> None:
        """Free engines and weights."""

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def controller_of(artifact: Artifact, component: str, request: GenerateRequest) -> StepController:
    """Return the controller for one component and one request (mode ``16`` needs none)."""
    rule: dict[str, Any] = {}
    if request.mode == "switch":
        rule = {"delta": request.delta, "last_high": request.last_high, "weighting": request.weighting}
    return make_controller(
        request.mode,
        component=component,
        family=artifact.family(component).name,
        bits=artifact.bits(component),
        schedule=request.schedule,
        cache=request.cache,
        **rule,
    )


def wrapped(session: EngineSession, wrap: WrapSession | None) -> EngineSession:
    """Return the session in its wrapper, or itself without one. If the wrapper fails, the session is closed."""
    if wrap is None:
        return session
    try:
        return wrap(session)
    except BaseException:
        session.close()
        raise


def executed_session(session: EngineSession) -> dict[str, Any]:
    """Return backend, device, dtype and resident bytes of a session, for trace and summary."""
    return {
        "backend": session.backend,
        "device": str(session.device),
        "dtype": str(session.dtype).removeprefix("torch."),
        "activation_bits": list(session.bits),
        "resident_bytes": session.resident_bytes(),
    }


def executed_original(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a trace says of the original checkpoint: backend, device, dtype."""
    name = str(dtype).removeprefix("torch.")
    return {"backend": "pytorch, original checkpoint", "device": str(device), "dtype": name}
