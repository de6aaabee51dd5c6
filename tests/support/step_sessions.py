"""A small real session, and ways for it to fail at chosen calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.errors import EngineError

TIMESTEPS = [1000.0 - 19.5 * i for i in range(50)]


def throw(error: Exception) -> Callable[[Tensor], Tensor]:
    """A fault that raises."""

    def fault(output: Tensor) -> Tensor:
        raise error

    return fault


def poison(value: float) -> Callable[[Tensor], Tensor]:
    """A fault that spoils one value of the real output."""

    def fault(output: Tensor) -> Tensor:
        output = output.clone()
        output.view(-1)[output.numel() // 3] = value
        return output

    return fault


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "exception": throw(EngineError("the engine stopped")),
    "NaN": poison(math.nan),
    "infinity": poison(-math.inf),
    "out of memory": throw(torch.OutOfMemoryError("tried to allocate 2 GiB")),
    "host out of memory": throw(MemoryError()),
}


class FaultySession(OnnxRuntimeSession):
    """The real one, whose outputs at some timesteps and bits meet a fault; logs every call."""

    def __init__(self, out: Path) -> None:
        super().__init__(Artifact.open(out), threads=1)
        self.faults: dict[tuple[float, int], Callable[[Tensor], Tensor]] = {}
        self.calls: list[tuple[float, int]] = []

    def run(self, inputs: Mapping[str, Tensor], bits: int) -> Tensor:
        """As the real session, then the fault."""
        self.calls.append((float(inputs["timestep"]), bits))
        output = super().run(inputs, bits)
        return self.faults.get(self.calls[-1], lambda tensor: tensor)(output)


def inputs_at(session: OnnxRuntimeSession, step: int, seed: int = 0, drift: float = 0.02) -> dict[str, Tensor]:
    """Inputs that drift from step to step, as those of a sampler do."""
    inputs = session.family.sample(session.sizes, session.dtype, seed)
    noise = session.family.sample(session.sizes, session.dtype, seed + 1)["hidden_states"]
    inputs["hidden_states"] = inputs["hidden_states"] + drift * step * noise
    inputs["timestep"] = torch.tensor([TIMESTEPS[step]])
    return inputs


def walk(session: OnnxRuntimeSession, steps: int, seed: int = 0) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(step, inputs) of a request."""
    for step in range(steps):
        yield step, inputs_at(session, step, seed)
