"""What a step cache predicts of a step before it is computed: three forecasts, none of which needs data of the model.

x_i and v_i are latent and output of step i, τ_i is its timestep, j is the last computed step and j' the computed step
before it. A forecast gives the error ε_i that skipping step i adds. The cache skips steps while their sum Σ ε since
step j is below its threshold (:mod:`.step_cache`). Norms are L1. With δ-GBS, j and j' are steps of the high engine: what
changes between engines of different bits is quantization noise, too, and outputs of the low engine are not reused.

``forecast`` extrapolates how fast the output changed, with a growth that is at least 1:

    ε_i = r · g · |τ_i − τ_{i−1}|,   r = L1(j) / |τ_j − τ_{j'}|,   g = max(1, r / r')

with r' the rate before r. The growth matters at the end, where a rectified flow's output turns ever faster.

``line`` predicts as ``forecast`` does. It skips more, because a skipped step returns the line through the last two outputs.

``easycache`` (arXiv 2507.02860) takes the change of the output to be in proportion to that of the latent, which is known
before the step is computed:

    ε_i = k · ‖x_i − x_{i−1}‖ / ‖v_j‖,   k = ‖v_j − v_{j'}‖ / ‖x_j − x_{j'}‖

``magcache`` (arXiv 2506.09045) looks at the magnitude of the residual v − x alone:

    ε_i = |1 − Γ_i|,   Γ_i = ‖v_i − x_i‖ / ‖v_j − x_j‖

As published, Γ is a product of ratios that were measured on a clip beforehand. Here it is extrapolated from the computed
steps of the request itself, so that nothing is measured before or kept between requests:

    Γ_i = exp(λ · g · |τ_i − τ_j|),   λ = ln(‖v_j − x_j‖ / ‖v_{j'} − x_{j'}‖) / |τ_j − τ_{j'}|,   g = max(1, |λ| / |λ'|)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FORECASTS",
    "NOT_GROWN",
    "NOT_MOVED",
    "ChangeForecast",
    "EasyForecast",
    "Growth",
    "MagnitudeForecast",
    "Moved",
    "SkipForecast",
    "moved_since",
]


@dataclass(frozen=True)
class Moved:
    """The way that the latent of a step has moved, as means of |difference|; None where there is nothing to compare.

    Args:
        step: The distance from the latent of the step before.
        computed: The distance from the latent of step j.
    """

    step: float | None = None
    computed: float | None = None


@dataclass(frozen=True)
class Growth:
    """The growth of the magnitudes of step j since step j'; None where they are not known.

    Args:
        output: ‖v_j‖ / ‖v_{j'}‖.
        residual: ‖v_j − x_j‖ / ‖v_{j'} − x_{j'}‖.
    """

    output: float | None = None
    residual: float | None = None


NOT_MOVED, NOT_GROWN = Moved(), Growth()


def moved_since(latent: Tensor, last: Tensor | None, computed: Tensor | None) -> Moved:
    """Return how far a latent has moved.

    Both distances are read back in one transfer.

    Args:
        latent: x_i, any shape and floating dtype.
        last: x_{i−1}, or None.
        computed: x_j, or None.

    Returns:
        The distances; None for a tensor that is missing or has another shape.
    """
    import torch  # here, because a request is checked without torch

    wide = torch.promote_types(latent.dtype, torch.float32)
    known = {
        name: (latent.to(wide) - other.to(latent.device, wide)).abs().mean(dtype=torch.float64)
        for name, other in (("step", last), ("computed", computed))
        if other is not None and other.shape == latent.shape
    }
    if not known:
        return Moved()
    return Moved(**dict(zip(known, torch.stack(tuple(known.values())).tolist())))


@dataclass
class SkipForecast(ABC):
    """A prediction of the error of skipping the coming step, for one deciding branch.

    Args:
        timestep: The timestep of the last step, computed or not.
        computed: τ_j, the timestep of the last computed step that may be reused.
        pending: Σ ε of the steps that were skipped since the last computed step.
        skips: The number of these steps.
        spacing: The last distance between two steps that was not 0, in units of timestep.
        barred: Whether a step was computed after step j that may not be reused.
    """

    timestep: float | None = None
    computed: float | None = None
    pending: float = 0.0
    skips: int = 0
    spacing: float = 0.0
    barred: bool = False

    @abstractmethod
    def predict(self, timestep: float, moved: Moved = NOT_MOVED) -> float | None:
        """Return ε of the coming step, or None as long as it is not known.

        Args:
            timestep: The timestep of the coming step.
            moved: How far its latent has moved.
        """

    def alone(self, timestep: float, moved: Moved = NOT_MOVED) -> float | None:
        """Return ε of a step like the coming one, if the step before it were computed; None as long as it is not known.

        Args:
            timestep: The timestep of the coming step.
            moved: How far its latent has moved.
        """
        return self.predict(timestep, moved)

    def skipped(self, timestep: float, moved: Moved = NOT_MOVED) -> float:
        """Note a skipped step and return its ε.

        Args:
            timestep: The timestep of the skipped step.
            moved: How far its latent had moved.
        """
        error = self.predict(timestep, moved) or 0.0
        self._move(timestep)
        self.pending += error
        self.skips += 1
        return error

    def ran(self, timestep: float, change: float | None, moved: Moved = NOT_MOVED, growth: Growth = NOT_GROWN) -> None:
        """Note a computed step that may be reused.

        Args:
            timestep: The timestep of the step.
            change: L1 from the computed step before it that may be reused, or None if there was none.
            moved: How far the latent had moved.
            growth: How the magnitudes grew since that step.
        """
        self._move(timestep)
        # A solver may evaluate one timestep twice. The latent then still moves as far as it did before.
        distance = (abs(timestep - self.computed) if self.computed is not None else 0.0) or self.spacing
        self._learn(distance, change, moved, growth)
        self.computed, self.pending, self.skips, self.barred = timestep, 0.0, 0, False

    def passed(self, timestep: float) -> None:
        """Note a computed step that may not be reused. No step is skipped until one has run that may be.

        Args:
            timestep: The timestep of the step.
        """
        self._move(timestep)
        self.pending, self.skips, self.barred = 0.0, 0, True

    @abstractmethod
    def _learn(self, distance: float, change: float | None, moved: Moved, growth: Growth) -> None:
        """Note what a computed step says of the coming ones.

        Args:
            distance: τ_{j'} − τ_j, or 0 if there was no step j'.
            change: As for :meth:`ran`.
            moved: As for :meth:`ran`.
            growth: As for :meth:`ran`.
        """

    def moves(self, timestep: float) -> float:
        """Return the distance from the last step to a timestep.

        Args:
            timestep: The timestep of the coming step.
        """
        return (abs(timestep - self.timestep) if self.timestep is not None else 0.0) or self.spacing

    def _move(self, timestep: float) -> None:
        self.spacing = self.moves(timestep)
        self.timestep = timestep


@dataclass
class ChangeForecast(SkipForecast):
    """``forecast``: the rate at which the output changed, extrapolated. δ-GBS takes it for L1 of skipped steps, too.

    Args:
        rate: L1 per unit of timestep, or None if it is not known.
        growth: The growth g of the rate, at least 1.
    """

    rate: float | None = None
    growth: float = 1.0

    def predict(self, timestep: float, moved: Moved = NOT_MOVED) -> float | None:
        """Return ε = L̂1 from the last step to ``timestep``, see :meth:`SkipForecast.predict`."""
        return None if self.rate is None else self.rate * self.growth * self.moves(timestep)

    def _learn(self, distance: float, change: float | None, moved: Moved, growth: Growth) -> None:
        if change is None or not distance:
            return
        rate = change / distance
        self.growth = max(1.0, rate / self.rate) if self.rate else 1.0
        self.rate = rate


@dataclass
class EasyForecast(SkipForecast):
    """``easycache``: the output changes in proportion to the latent.

    Args:
        rate: k / ‖v_j‖ in units of the mean |x_i − x_{i−1}|, or None if it is not known.
    """

    rate: float | None = None

    def predict(self, timestep: float, moved: Moved = NOT_MOVED) -> float | None:
        """Return ε = k·‖x_i − x_{i−1}‖ / ‖v_j‖, see :meth:`SkipForecast.predict`."""
        return None if self.rate is None or moved.step is None else self.rate * moved.step

    def _learn(self, distance: float, change: float | None, moved: Moved, growth: Growth) -> None:
        # ‖v_j − v_j'‖ / ‖v_j‖ = L1(j) · ‖v_j'‖ / ‖v_j‖
        known = change is not None and moved.computed and growth.output
        self.rate = change / growth.output / moved.computed if known else None  # type: ignore[operator]


@dataclass
class MagnitudeForecast(SkipForecast):
    """``magcache``: the magnitude of output − latent, extrapolated from the computed steps.

    Args:
        rate: λ, or None if it is not known.
        growth: The growth g of |λ|, at least 1.
        travelled: The distance of the skipped steps since the last computed one, in units of timestep.
    """

    rate: float | None = None
    growth: float = 1.0
    travelled: float = 0.0

    def predict(self, timestep: float, moved: Moved = NOT_MOVED) -> float | None:
        """Return ε = |1 − Γ|, see :meth:`SkipForecast.predict`."""
        return self._error(self.travelled + self.moves(timestep))

    def alone(self, timestep: float, moved: Moved = NOT_MOVED) -> float | None:
        """Return ε without the steps that were skipped before, see :meth:`SkipForecast.alone`."""
        return self._error(self.moves(timestep))

    def _error(self, distance: float) -> float | None:
        """Return |1 − Γ| at a distance from step j."""
        if self.rate is None:
            return None
        power = self.rate * self.growth * distance
        return abs(math.expm1(power)) if power < 700 else math.inf

    def skipped(self, timestep: float, moved: Moved = NOT_MOVED) -> float:
        """Note a skipped step, see :meth:`SkipForecast.skipped`."""
        length = self.moves(timestep)
        error = super().skipped(timestep, moved)
        self.travelled += length
        return error

    def _learn(self, distance: float, change: float | None, moved: Moved, growth: Growth) -> None:
        self.travelled = 0.0
        if not distance or not growth.residual or not math.isfinite(growth.residual):
            self.rate, self.growth = None, 1.0
            return
        rate = math.log(growth.residual) / distance
        self.growth = max(1.0, abs(rate / self.rate)) if self.rate else 1.0
        self.rate = rate


# The forecast of every policy, by its name.
FORECASTS: dict[str, type[SkipForecast]] = {
    "forecast": ChangeForecast,
    "line": ChangeForecast,
    "easycache": EasyForecast,
    "magcache": MagnitudeForecast,
}
