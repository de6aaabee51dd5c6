"""The step cache: a denoising step is not computed if its output is predicted to be nearly the last computed one.

A policy says which forecast predicts (:mod:`.forecasts`), below which sum of predicted errors steps are skipped, and
what a skipped step returns. All policies work on the latents and outputs of whole steps, without data of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from dvdquant.deploy.number_checks import is_number, is_whole
from dvdquant.deploy.switching.defaults import CACHE_POLICIES, CachePolicy
from dvdquant.deploy.switching.forecasts import FORECASTS, SkipForecast
from dvdquant.deploy.switching.gbs import Weighting, step_weight
from dvdquant.errors import UnsupportedError
from dvdquant.system.records import brief

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FAMILY_CACHE",
    "POLICIES",
    "Kept",
    "Residual",
    "StepCachePolicy",
    "check_cache_policy",
    "keep",
    "residual_norm",
    "reuse",
]

Residual = Literal["output", "latent", "line"]


@dataclass(frozen=True)
class StepCachePolicy:
    """A policy that says when a step may be skipped, and what is reused.

    The first two steps that a transformer computes of a request and, if the number of steps is known, the last one are
    never skipped.

    Args:
        threshold: The limit for the sum of predicted errors since the last computed step. 0 never skips.
        residual: ``output`` returns the last output again (constant velocity). ``latent`` adds to the step's latent
            what the last computed step had added to its own latent (output − latent). ``line`` goes on along the line
            through the last two computed outputs (constant acceleration), see :func:`reuse`.
        max_skips: The largest number of skipped steps in a row.
        policy: The forecast that predicts the errors: ``forecast``, ``line`` (the same, with other settings in
            :data:`POLICIES`), ``easycache`` or ``magcache``, see :mod:`.forecasts`. Thresholds of
            different policies do not compare.
        warm_up: The share of the steps, at the beginning, that are computed in any case, from 0 to 1. If the number of
            steps is not known, the share is of 50.
        weighting: ``step`` multiplies the sum by how far the step moves the timestep, if the number of steps is known,
            as δ-GBS does (:mod:`.gbs`): the error of a step enters the latent in proportion to the step's length.
            ``none`` takes the sum as it is.

    Raises:
        UnsupportedError: A field is out of range.
    """

    threshold: float
    residual: Residual = "output"
    max_skips: int = 3
    policy: CachePolicy = CACHE_POLICIES[0]
    warm_up: float = 0.0
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        if not (is_number(self.threshold) and self.threshold >= 0 and math.isfinite(self.threshold)):
            raise UnsupportedError(
                f"the step cache's threshold is {brief(self.threshold)}", available="a number from 0 up"
            )
        if self.residual not in get_args(Residual):
            raise UnsupportedError(f"the step cache cannot reuse {self.residual!r:.40}", available=get_args(Residual))
        if not is_whole(self.max_skips) or self.max_skips < 1:
            raise UnsupportedError(
                f"max_skips is {brief(self.max_skips)}",
                available="1 or more",
                fix="leave the cache out to skip no step",
            )
        check_cache_policy(self.policy)
        if not (is_number(self.warm_up) and 0 <= self.warm_up <= 1):
            raise UnsupportedError(f"warm_up is {brief(self.warm_up)}", available="a share of the steps, from 0 to 1")
        if self.weighting not in get_args(Weighting):
            raise UnsupportedError(f"unknown weighting {self.weighting!r:.40}", available=get_args(Weighting))

    @classmethod
    def for_family(
        cls, family: str, threshold: float | None = None, policy: CachePolicy | None = None
    ) -> StepCachePolicy:
        """Return the settings of a policy for a family.

        Args:
            family: The name of the model family.
            threshold: A threshold that replaces the policy's own, or None.
            policy: The name of the policy. The default is the family's (:data:`FAMILY_CACHE`), or the first one.

        Raises:
            UnsupportedError: The threshold is out of range, or the policy is unknown.
        """
        if policy is not None:
            check_cache_policy(policy)
        found = FAMILY_CACHE.get(family, POLICIES[CACHE_POLICIES[0]])
        if policy not in (None, found.policy):
            found = POLICIES[policy]
        return found if threshold is None else replace(found, threshold=threshold)

    def forecast(self) -> SkipForecast:
        """Return a forecast of this policy, for a new request."""
        return FORECASTS[self.policy]()

    @property
    def watches_latents(self) -> bool:
        """Return whether the forecast needs to know how far the latent moves."""
        return self.policy == "easycache"

    @property
    def watches_residual(self) -> bool:
        """Return whether the forecast needs the magnitude of output − latent."""
        return self.policy == "magcache"

    def first_skip(self, steps: int | None) -> int:
        """Return the index of the first step that may be skipped.

        Args:
            steps: The number of steps of the request, or None if it is not known.
        """
        return max(2, round(self.warm_up * (steps or _USUAL_STEPS)))

    def weight(self, moved: float, steps: int | None) -> float:
        """Return what the sum of predicted errors is multiplied by before it is compared with the threshold.

        Args:
            moved: How far the timestep falls in the step.
            steps: The number of steps of the request, or None if it is not known.
        """
        return step_weight(moved, steps) if self.weighting == "step" and steps else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, for a trace."""
        return asdict(self)


def check_cache_policy(policy: Any) -> None:
    """Refuse an unknown policy.

    Args:
        policy: The name of a policy.

    Raises:
        UnsupportedError: No policy has this name.
    """
    if not isinstance(policy, str) or policy not in CACHE_POLICIES:
        raise UnsupportedError(f"unknown step cache policy {brief(policy)}", available=CACHE_POLICIES)


# What a warm-up share refers to if nobody says the number of steps: the usual number of the supported models.
_USUAL_STEPS = 50
# The settings of every policy. Measured on the toy models only: python -m benchmarks.quality caches (docs/quality; on a8,
# loss of PSNR to a8 without a cache, on tiny-wan and with outliers):
#   forecast   .02  54 % of the steps skipped, −.21 dB (64 clips) and −.15 dB (16);  .05  66 %, −.84 dB (64)
#   line       .04  65 %, −.43 and −.59 dB (64)
#   easycache  .02  58 %, +.32 and −.34 dB (16);                                     .03  69 %, −.34 dB (16)
#   magcache   .12  62 %, −.15 and −.76 dB (16);                                     .24  68 %, −.91 dB (16)
# Of 16 clips one decides; only the intervals of forecast .05 and, with outliers, of line leave out 0. All but line return
# the last output: along a rectified flow the velocity changes less than its difference to the latent. The setting of line
# was chosen by --along on recorded clips, where the skipped steps of line .04 leave the error of forecast .02 and are 9 %
# of all steps more.
POLICIES: Mapping[str, StepCachePolicy] = {
    "forecast": StepCachePolicy(0.02),
    "line": StepCachePolicy(0.04, "line", 4, "line", weighting="step"),
    "easycache": StepCachePolicy(0.02, "output", 10, "easycache"),
    "magcache": StepCachePolicy(0.12, "output", 3, "magcache"),
}
# Families that need other settings than those of the first policy.
FAMILY_CACHE: Mapping[str, StepCachePolicy] = {}


# Quantization noise of outputs with fewer bits is larger than what the line corrects.
_LINE_BITS = 8


@dataclass(frozen=True)
class Kept:
    """The output of the last computed step, kept for the steps that are skipped after it.

    Args:
        tensor: v_j, or v_j − x_j for ``latent``.
        residual: How it is reused, see :class:`StepCachePolicy`.
        timestep: The timestep of step j, τ_j.
        bits: The activation bits that step j ran on.
        before: v_{j'} of the computed step before, if the residual is ``line`` and there is a line, or None.
        distance: τ_j − τ_{j'}, or 0 without a line.
        first: Whether step j is the first computed one of the request.
    """

    tensor: Tensor
    residual: Residual
    timestep: float
    bits: int
    before: Tensor | None = None
    distance: float = 0.0
    first: bool = False


def keep(
    output: Tensor, latent: Tensor, residual: Residual, timestep: float, bits: int, last: Kept | None = None
) -> Kept:
    """Return what to keep of a computed step.

    Args:
        output: The output of the step, any shape and floating dtype. It is kept itself unless the residual is ``latent``, so
            nobody may change it.
        latent: The latent that the step was given, with the axes of the output. It may have more channels.
        residual: See :class:`StepCachePolicy`.
        timestep: The timestep of the step.
        bits: The activation bits that it ran on.
        last: What was kept of the computed step before it, or None. There is a line if both steps ran on 8 bits or
            more, at different timesteps: the line amplifies the quantization noise of both outputs. None goes through
            the first output of a request: a branch of guidance may jump behind it, and a line would go on with the jump.
    """
    if residual == "latent":
        return Kept(output - _like(latent, output), residual, timestep, bits)
    if residual == "output":
        return Kept(output, residual, timestep, bits)
    if last is None or last.tensor.shape != output.shape:
        return Kept(output, residual, timestep, bits, first=True)
    if last.first or min(bits, last.bits) < _LINE_BITS:
        return Kept(output, residual, timestep, bits)
    distance = timestep - last.timestep
    return Kept(output, residual, timestep, bits, last.tensor if distance else None, distance)


def reuse(kept: Kept, latent: Tensor, timestep: float) -> Tensor:
    """Return the output of a skipped step, in a new tensor.

    With v_j and v_{j'} the last two computed outputs at the timesteps τ_j and τ_{j'}, the residual ``line`` gives from the
    third computed step on

        v_j + r·(v_j − v_{j'}),   r = min(1, (τ − τ_j) / (τ_j − τ_{j'}))

    The line is followed no farther than it is known. A farther point would amplify the noise of the outputs more.

    Args:
        kept: The result of :func:`keep` for the last computed step.
        latent: The latent of the skipped step, as in :func:`keep`.
        timestep: τ, the timestep of the skipped step.
    """
    if kept.residual == "latent":
        return kept.tensor + _like(latent, kept.tensor)
    if kept.before is None:
        return kept.tensor.clone()
    import torch  # here, because a request is checked without torch

    reach = min(1.0, (timestep - kept.timestep) / kept.distance)
    return torch.lerp(kept.before, kept.tensor, 1.0 + max(0.0, reach))


def residual_norm(output: Tensor, latent: Tensor) -> Tensor:
    """Compute ‖output − latent‖₁ without reading it back.

    Args:
        output: The output of a step, any shape and floating dtype.
        latent: The latent that the step was given, as in :func:`keep`.

    Returns:
        A float64 scalar on the device of ``output``.
    """
    import torch  # here, because a request is checked without torch

    wide = torch.promote_types(output.dtype, torch.float32)
    return (output.to(wide) - _like(latent, output).to(output.device, wide)).abs().sum(dtype=torch.float64)


def _like(latent: Tensor, output: Tensor) -> Tensor:
    """Return the part of the latent that the output is for.

    Image-to-video models append condition channels to the latent.
    """
    return latent[tuple(slice(0, size) for size in output.shape)].to(output.dtype)
