"""The step cache: a denoising step is not computed if its output is predicted to be nearly the last computed one.

The prediction needs no data of the model. It multiplies the rate at which the output changed, measured between computed
steps, by the distance to the next timestep,

    L̂1(i) = r · g · |τ_i − τ_{i−1}|,   r = L1(j) / |τ_j − τ_{j'}|,   g = max(1, r / r')

with j, j' the last two computed steps, τ the timesteps and r' the rate before r. The growth g matters at the end, where
a rectified flow's output turns ever faster. Step i is skipped while Σ L̂1 since the last computed step is below the
threshold. L1 between engines of different bits also contains quantization noise. It makes the prediction larger and the
cache more careful.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dvdquant.deploy.kinds import is_number, is_whole
from dvdquant.errors import UnsupportedError
from dvdquant.system.records import brief

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FAMILY_CACHE", "ChangeForecast", "Residual", "StepCachePolicy", "keep_residual", "reuse"]

Residual = Literal["output", "latent"]


@dataclass(frozen=True)
class StepCachePolicy:
    """A policy that says when a step may be skipped, and what is reused.

    Args:
        threshold: The limit for the predicted relative change since the last computed step. 0 never skips.
        residual: ``output`` returns the last output again (constant velocity). ``latent`` adds to the step's latent
            what the last computed step had added to its own latent (output − latent).
        max_skips: The largest number of skipped steps in a row.

    Raises:
        UnsupportedError: A field is out of range.
    """

    threshold: float
    residual: Residual = "output"
    max_skips: int = 3

    def __post_init__(self) -> None:
        if not (is_number(self.threshold) and self.threshold >= 0 and math.isfinite(self.threshold)):
            raise UnsupportedError(
                f"the step cache's threshold is {brief(self.threshold)}", available="a number from 0 up"
            )
        if self.residual not in ("output", "latent"):
            raise UnsupportedError(f"the step cache cannot reuse {self.residual!r:.40}", available=("output", "latent"))
        if not is_whole(self.max_skips) or self.max_skips < 1:
            raise UnsupportedError(
                f"max_skips is {brief(self.max_skips)}",
                available="1 or more",
                fix="leave the cache out to skip no step",
            )

    @classmethod
    def for_family(cls, family: str, threshold: float | None = None) -> StepCachePolicy:
        """Return the family's policy (:data:`FAMILY_CACHE`, or the default).

        Args:
            family: The name of the model family.
            threshold: A threshold that replaces the policy's own, or None.
        """
        policy = FAMILY_CACHE.get(family, _DEFAULT)
        return policy if threshold is None else cls(threshold, policy.residual, policy.max_skips)


# Measured on tiny-wan only: python benchmarks/switching/measure.py OUT --study cache --clips 4 (50 steps; PSNR to the
# fp32 model, mean of four clips; the table is in benchmarks/switching/README.md). All on a8, 29.60 dB without a cache:
#   threshold .01  no step skipped
#   threshold .02  24 of 50 skipped; reusing the output 29.68 dB, output − latent 29.71
#   threshold .05  33 of 50 skipped; reusing the output 29.74 dB, output − latent 29.51
# So the default is .02, which loses no quality (+.21 dB on 32 clips), and "output", which is better where more steps
# are skipped.
# With a 4-bit engine in the switch, the same threshold skips almost nothing (1 of 50): L1 then has quantization noise.
_DEFAULT = StepCachePolicy(threshold=0.02)
# Families that need another policy than the default. Only Wan was measured, and the default rests on it.
FAMILY_CACHE: Mapping[str, StepCachePolicy] = {}


@dataclass
class ChangeForecast:
    """A prediction of L1 of the coming step from L1 of the computed steps, for one deciding branch.

    Args:
        timestep: The timestep of the last step, computed or not.
        computed: The timestep of the last computed step.
        rate: L1 per unit of timestep, or None if it is not known.
        growth: The growth g of the rate, at least 1.
        pending: Σ L̂1 of the steps that were skipped since the last computed step.
        skips: The number of these steps.
        spacing: The last distance between two steps that was not 0, in units of timestep.
    """

    timestep: float | None = None
    computed: float | None = None
    rate: float | None = None
    growth: float = 1.0
    pending: float = 0.0
    skips: int = 0
    spacing: float = 0.0

    def predict(self, timestep: float) -> float | None:
        """Return L̂1 from the last step to ``timestep``, or None as long as no rate is known.

        Args:
            timestep: The timestep of the coming step.
        """
        if self.rate is None or self.timestep is None:
            return None
        # A solver may evaluate one timestep twice. The latent then still moves as far as it did before.
        return self.rate * self.growth * (abs(timestep - self.timestep) or self.spacing)

    def skipped(self, timestep: float) -> float:
        """Note a skipped step and return its L̂1, which stands for L1 until the next computed step measures it.

        Args:
            timestep: The timestep of the skipped step.
        """
        change = self.predict(timestep) or 0.0
        self._move(timestep)
        self.pending += change
        self.skips += 1
        return change

    def ran(self, timestep: float, change: float | None) -> None:
        """Note a computed step.

        Args:
            timestep: The timestep of the step.
            change: L1 from the computed step before it, or None if there was none.
        """
        self._move(timestep)
        distance = abs(timestep - self.computed) if self.computed is not None else 0.0
        if change is not None and (distance or self.spacing):
            rate = change / (distance or self.spacing)
            self.growth = max(1.0, rate / self.rate) if self.rate else 1.0
            self.rate = rate
        self.computed, self.pending, self.skips = timestep, 0.0, 0

    def _move(self, timestep: float) -> None:
        if self.timestep is not None:
            self.spacing = abs(timestep - self.timestep) or self.spacing
        self.timestep = timestep


def keep_residual(output: Tensor, latent: Tensor, residual: Residual) -> Tensor:
    """Return the tensor to keep of a computed step.

    Args:
        output: The output of the step.
        latent: The latent that the step was given. It may have more channels than the output.
        residual: ``output`` or ``latent``, see :class:`StepCachePolicy`.

    Returns:
        A copy of the output, or output − latent in the output's dtype.
    """
    return output.clone() if residual == "output" else output - _like(latent, output)


def reuse(kept: Tensor, latent: Tensor, residual: Residual) -> Tensor:
    """Return the output of a skipped step.

    Args:
        kept: The result of :func:`keep_residual` for the last computed step.
        latent: The latent of the skipped step.
        residual: ``output`` or ``latent``, see :class:`StepCachePolicy`.
    """
    return kept.clone() if residual == "output" else kept + _like(latent, kept)


def _like(latent: Tensor, output: Tensor) -> Tensor:
    """Return the part of the latent that the output is for.

    Image-to-video models append condition channels to the latent.
    """
    return latent[tuple(slice(0, size) for size in output.shape)].to(output.dtype)
