"""One run of a ComfyUI sampler: what its nodes asked for, the bits of its steps, and their trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.comfyui.calls import BranchNames, step_of
from dvdquant.deploy.number_checks import is_whole
from dvdquant.deploy.pipelines.adapters import Adapter
from dvdquant.deploy.switching.controller import StepRecord
from dvdquant.deploy.switching.defaults import CACHE_POLICIES, DEFAULT_DELTA, LAST_HIGH, WEIGHTINGS, CachePolicy
from dvdquant.deploy.switching.factory import make_controller
from dvdquant.deploy.switching.gbs import Weighting
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.deploy.switching.schedule import Schedule
from dvdquant.errors import UnsupportedError
from dvdquant.system.records import brief

if TYPE_CHECKING:
    from dvdquant.deploy.sessions import EngineSession

__all__ = ["OPTION", "SamplingRun", "Settings", "Trace"]

OPTION = "dvdquant"  # the key of the settings in ComfyUI's transformer_options
SCHEDULE = "schedule.json"  # where dvdq-plan writes a schedule


@dataclass
class Trace:
    """The calls of the last sampling run of one MODEL, and the facts about it.

    Args:
        records: The record of every call, in order.
        facts: Names and numbers of the run, as JSON values.
    """

    records: list[StepRecord] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def begin(self, facts: dict[str, Any]) -> None:
        """Forget the run before.

        Args:
            facts: The facts about the new run.
        """
        self.records, self.facts = [], facts


@dataclass(frozen=True)
class Settings:
    """The settings that the nodes of a workflow asked for. They travel in ComfyUI's transformer_options.

    Args:
        mode: ``switch``, ``planned`` (the export's schedule.json), or ``a`` with the bits of one engine, such as ``a8``.
        delta: δ of ``switch``.
        last_high: The number of last steps of ``switch`` that run on the engine with more bits.
        weighting: ``step`` weighs a change by how far its step moves; ``none`` is the published rule.
        cache: The threshold below which a step is skipped; 0 skips none.
        cache_policy: What predicts which steps can be skipped.
        total_steps: The number of steps of the whole clip if several samplers share it, or 0.
        first_step: The index of this sampler's first step in the whole clip.
        loras: LoRAs that run beside the weights.
        trace: Where the calls are noted.
    """

    mode: str = "switch"
    delta: float = DEFAULT_DELTA
    last_high: int = LAST_HIGH
    weighting: Weighting = WEIGHTINGS[0]
    cache: float = 0.0
    cache_policy: CachePolicy = CACHE_POLICIES[0]
    total_steps: int = 0
    first_step: int = 0
    loras: tuple[LoraSpec, ...] = ()
    trace: Trace = field(default_factory=Trace, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this object: ComfyUI copies the options of a MODEL for every node, and the trace must stay the same."""
        return self

    def changed(self, **values: Any) -> Self:
        """Return settings with other values and a trace of their own.

        Args:
            **values: New values of fields.
        """
        return dataclasses.replace(self, trace=Trace(), **values)


class SamplingRun:
    """One run of a ComfyUI sampler through a session.

    Args:
        session: The open session.
        adapter: The conversion of arguments to graph inputs.
        settings: What the nodes asked for.
        sigmas: The noise levels of the sampler, falling, one more than it has steps.

    Raises:
        UnsupportedError: The settings contradict the export or the sampler.
        OutputError: ``planned`` was asked for, and the export has no schedule, or one of another model.
    """

    def __init__(self, session: EngineSession, adapter: Adapter, settings: Settings, sigmas: Sequence[float]) -> None:
        self.settings, self.sigmas = settings, [float(sigma) for sigma in sigmas]
        self._adapter, self._names = adapter, BranchNames()
        own = max(1, len(self.sigmas) - 1)
        self.first, self.steps = _place(settings, own)
        switches = settings.mode == "switch"
        schedule = None
        if settings.mode == "planned":
            artifact = session.artifact
            schedule = Schedule.load(artifact.root / SCHEDULE, artifact.manifest, self.steps)
        controller = make_controller(
            settings.mode,
            component=session.component,
            family=session.family.name,
            bits=session.bits,
            delta=settings.delta if switches else None,
            schedule=schedule,
            cache=settings.cache or None,
            cache_policy=settings.cache_policy if settings.cache else None,
            # A sampler that stops at noise leaves the last steps to another one.
            last_high=(settings.last_high if self._ends else 0) if switches else None,
            weighting=settings.weighting if switches else None,
        )
        self.runner = StepRunner(session, controller)
        self.runner.begin_request(self.steps)
        controller.lead("cond", self.first)
        settings.trace.begin(
            {
                "export": session.artifact.root.name,
                "component": session.component,
                "backend": session.backend,
                "device": str(session.device),
                "mode": settings.mode,
                "delta": settings.delta if switches else None,
                "cache": None if controller.cache is None else controller.cache.to_json(),
                "steps": own,
                "first_step": self.first,
                "total_steps": self.steps,
            }
        )
        self.runner.on_step = settings.trace.records.append

    @property
    def _ends(self) -> bool:
        """Return whether this sampler takes the last step of the clip."""
        own = len(self.sigmas) - 1
        if self.settings.total_steps:
            return self.first + own >= self.steps
        return not self.sigmas or self.sigmas[-1] <= 0

    def call(self, arguments: dict[str, Any], sigma: float, indices: Sequence[int], ids: Sequence[Any]) -> Tensor:
        """Run one call of the model, with all conditions that ComfyUI put into its batch.

        Args:
            arguments: The arguments of the family's diffusers class for the whole batch.
            sigma: The noise level of the call.
            indices: The index of each condition in the batch.
            ids: An id for each of them.

        Returns:
            The output for the whole batch, in the order of the batch.
        """
        inputs = self._adapter.inputs(arguments)
        rows = inputs["hidden_states"].shape[0]
        step = self.first + step_of(self.sigmas, sigma)
        outputs: dict[int, Tensor] = {}  # by the first row; the parts come in an order of their own
        for part in self._names.parts(rows, indices, ids):
            chosen = {
                name: value[part.start * each : part.stop * each] if (each := value.shape[0] // rows) else value
                for name, value in inputs.items()
            }
            outputs[part.start] = self._adapter.run(self.runner, chosen, part.branch, step, self.steps)
        return torch.cat([outputs[start] for start in sorted(outputs)])


def _place(settings: Settings, own: int) -> tuple[int, int]:
    """Return the index of the sampler's first step, and the number of steps of the whole clip.

    Raises:
        UnsupportedError: The sampler's steps do not lie within the clip's.
    """
    for name in ("total_steps", "first_step"):
        if not is_whole(value := getattr(settings, name)) or value < 0:
            raise UnsupportedError(
                f"{name} is {brief(value)}",
                available="a number of steps, from 0",
                fix="give 0 where the sampler begins with the first step and ends with the last",
            )
    if not settings.total_steps:
        if settings.first_step:
            raise UnsupportedError(
                f"first_step is {settings.first_step}, and total_steps is 0",
                fix="give total_steps of the whole clip as well, or set first_step to 0",
            )
        return 0, own
    if settings.first_step + own > settings.total_steps:
        raise UnsupportedError(
            f"the sampler takes {own} steps from step {settings.first_step}, and total_steps is {settings.total_steps}",
            available=f"up to {settings.total_steps - settings.first_step} steps from there",
            fix="give the numbers of KSampler (Advanced): total_steps is its steps, first_step its start_at_step",
        )
    return settings.first_step, settings.total_steps
