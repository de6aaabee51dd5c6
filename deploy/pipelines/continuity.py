"""The latents of a loop, and whether those of a call come from them.

A denoising loop makes the latents of a step out of earlier ones and out of the transformer's outputs. A solver adds them
up, with any weights, and perhaps adds fresh noise. So the latents of the next call are a weighted sum of what the loop has
had, but for rounding and fresh noise. Those of another loop began as other noise: no weights make more of them than
chance does. This tells loops apart without a word from them.

The share that no weights explain is a least-squares residual over one sample of the batch, thinned out to ``MOST`` values.
Values that do not move (the frame that an image-to-video pipeline holds) say nothing and are left out.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BETTER", "ROUNDING", "Fit", "Path"]

MOST = 1 << 16
# Solvers of diffusers look back three steps at most.
STATES = 4
OUTPUTS = 4
# What rounding of latents and outputs to bf16 leaves unexplained is below 2⁻⁸ of each; fresh noise is far more.
ROUNDING = 0.05
# A step that is ten times less explained than the one around it was not made by the same loop.
FOREIGN = 10.0
# Another loop explains the latents of a call better than the caller's own if it leaves less than this of what that leaves.
# Of unrelated latents k vectors leave √(1 − k/n) of n values: 0.9998 at most where n is 2¹⁶ and k is 12 to 20.
BETTER = 0.98
# Of unrelated latents one in e²⁰ = 5e8 is taken for a loop's, where that needs less than this share of their square.
RARE, LITTLE = 20.0, 0.01

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Fit:
    """The fit of a call's latents to those that a loop has had.

    Args:
        residual: The share of their norm that no weighted sum of the loop's latents and outputs explains, 0 to 1.
        dependent: True if more is explained than chance explains of unrelated latents.
        without_last: The residual without the loop's last step, or None if there is only one.
        same: True if they are the latents of the last step.
        first: True if they are the latents of the loop's first step, and the loop has moved since.
    """

    residual: float
    dependent: bool
    without_last: float | None = None
    same: bool = False
    first: bool = False


@dataclass
class _State:
    """One step: its latents [n], and its outputs, each [n]."""

    latents: Values
    outputs: list[Values]


@dataclass
class Path:
    """The last steps of a loop, and how well the newest of them followed from those before.

    Args:
        shape: The shape of the transformer's output, or None before the first call.
        states: The last steps, the newest at the end.
        start: The latents of the first step, or None.
        entry: The residual of the last step's latents when they came, or None for the first step.
        asked: The latents that were compared with these steps last, and how they fit; None where a step came since.
    """

    shape: tuple[int, ...] | None = None
    states: list[_State] = field(default_factory=list)
    start: Values | None = None
    entry: float | None = None
    asked: tuple[Values, Fit] | None = None

    def clear(self) -> None:
        """Forget everything."""
        self.shape, self.states, self.start, self.entry, self.asked = None, [], None, None, None

    def note(self, latents: Tensor, output: Tensor) -> None:
        """Note one call.

        Args:
            latents: [B, ...], as given to the transformer; conditions may follow the latents on one axis.
            output: [B, ...], what the transformer returned.
        """
        if self.shape is not None and self.shape != tuple(output.shape):
            self.clear()
        self.shape = tuple(output.shape)
        values = self._values(latents)
        if values is None:  # of a layout that outputs do not have
            self.clear()
            return
        # With guidance in one batch, the halves of the batch belong to one sample.
        outputs = [_thinned(output[index]) for index in sorted({0, len(output) // 2})]
        asked, self.asked = self.asked, None
        if self.states and np.array_equal(self.states[-1].latents, values):
            self.states[-1].outputs = [*self.states[-1].outputs, *outputs][-OUTPUTS:]
            return
        if self.start is None:
            self.start = values
        else:
            # Mostly the call was looked for by these latents just now.
            known = asked[1] if asked is not None and np.array_equal(asked[0], values) else None
            self.entry = (known or self._fit(values)).residual
        self.states = [*self.states, _State(values, outputs)][-STATES:]

    def fit(self, latents: Tensor) -> Fit | None:
        """Return how the latents of a call fit, or None if nothing is known to compare them with.

        Args:
            latents: [B, ...], as given to the transformer.
        """
        if not self.states:
            return None
        values = self._values(latents)
        if values is None or len(values) != len(self.states[-1].latents):
            return Fit(1.0, dependent=False)
        fit = self._fit(values)
        self.asked = values, fit
        return fit

    def foreign_last(self, fit: Fit) -> bool:
        """Return whether the call behind ``fit`` shows that the last step was made by another loop.

        What a step brings in that the loop did not have (fresh noise) stays in the latents that follow. Here they
        follow from the steps before the last one, and the last one did not.

        Args:
            fit: How the call fits.
        """
        if self.entry is None or fit.without_last is None or fit.same:
            return False
        return fit.without_last < ROUNDING and self.entry > FOREIGN * max(fit.without_last, 1e-3)

    def _values(self, latents: Tensor) -> Values | None:
        """Return the first sample of the latents, without the conditions that follow them, or None."""
        assert self.shape is not None
        sample, shape = latents[0], self.shape[1:]
        if sample.ndim != len(shape) or any(have < wanted for have, wanted in zip(sample.shape, shape)):
            return None
        for axis, size in enumerate(shape):
            sample = sample.narrow(axis, 0, size)
        return _thinned(sample)

    def _fit(self, values: Values) -> Fit:
        last = self.states[-1].latents
        moving = np.flatnonzero(values != last)
        if not len(moving):
            return Fit(0.0, dependent=True, same=True)
        assert self.start is not None
        first = np.array_equal(values, self.start)
        wanted = values[moving].astype(np.float64)
        vectors = [[state.latents, *state.outputs] for state in self.states]
        basis = np.stack([vector[moving] for vector in itertools.chain(*vectors)]).astype(np.float64)
        newest, count = len(vectors[-1]), len(basis)
        residual = _residual(basis, wanted)
        last_only, without = residual, None
        if count > newest:
            last_only, without = _residual(basis[-newest:], wanted), _residual(basis[:-newest], wanted)
        return Fit(residual, 1.0 - last_only**2 > _chance(newest, len(wanted)), without, first=first)


def _chance(vectors: int, values: int) -> float:
    """Return the share of the square of n values that k unrelated vectors are not expected to explain.

    They explain a χ² of k degrees of n equal parts. It exceeds k + 2√(kx) + 2x with a probability below e⁻ˣ. Latents of a
    clip have tens of thousands of values, of which that is nothing, and a step explains far more of the next one: 6 % is
    the least of ten solvers of diffusers, where fresh noise replaces the rest. Of a few hundred values it would be all
    that a noisy step has, and four standard deviations have to do: three vectors exceed them in one of 200 cases.
    """
    rare = vectors + 2 * math.sqrt(vectors * RARE) + 2 * RARE
    usual = vectors + 4 * math.sqrt(2 * vectors)
    return max(usual / values, min(rare / values, LITTLE))


def _thinned(sample: Tensor) -> Values:
    flat = sample.detach().reshape(-1)
    step = -(-flat.numel() // MOST)
    found: Values = flat[::step].to("cpu", torch.float32).numpy().copy()
    return found


def _residual(basis: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Return the share of the norm of ``wanted`` [n] that no weighted sum of the vectors [k, n] explains."""
    products, size = basis @ basis.T, float(np.linalg.norm(wanted))
    norms = np.sqrt(products.diagonal())
    if not size or not np.isfinite(size) or not np.isfinite(norms).all():
        return 0.0  # nothing can be told from zeros; what is not finite, the runner refuses
    scale = np.where(norms > 0, norms, 1.0)
    weights = np.linalg.lstsq(products / np.outer(scale, scale), basis @ wanted / scale, rcond=1e-12)[0]
    return min(1.0, float(np.linalg.norm(wanted - (weights / scale) @ basis)) / size)
