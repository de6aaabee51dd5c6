"""Clips with guidance: when two are equal, and sessions whose low engine fails in chosen steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.deploy.sessions.base import EngineSession, WrappedSession
from dvdquant.errors import EngineError

__all__ = ["FailingLow", "same"]


def same(one: Any, other: Any) -> None:
    """Clips and decisions are equal; only times may differ."""
    assert np.array_equal(one.frames, other.frames)
    assert torch.equal(one.latents, other.latents)
    kept = [[dataclasses.replace(record, seconds=0.0) for record in clip.trace] for clip in (one, other)]
    assert kept[0] == kept[1]


class FailingLow(WrappedSession):
    """The 4-bit engine fails in chosen calls of a step's first branch, whichever session runs it."""

    def __init__(self, inner: EngineSession, failing: set[float]) -> None:
        super().__init__(inner)
        self.failing = failing

    def run(self, inputs: Any, bits: int) -> Tensor:
        if bits == 4 and round(float(inputs["timestep"].max())) in self.failing:
            raise EngineError("broken here")
        return self.inner.run(inputs, bits)
