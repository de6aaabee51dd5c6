"""The choice of the engine for each denoising step: δ-GBS, a fixed engine, a plan, or the caller's own rule.

The controller also decides when a step is skipped.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from dvdquant.deploy.number_checks import is_number, is_whole
from dvdquant.deploy.switching.defaults import LAST_HIGH, WEIGHTINGS
from dvdquant.deploy.switching.forecasts import NOT_GROWN, NOT_MOVED, ChangeForecast, Growth, Moved, SkipForecast
from dvdquant.deploy.switching.gbs import BitSwitch, Weighting, step_weight
from dvdquant.deploy.switching.schedule import Schedule
from dvdquant.deploy.switching.step_cache import StepCachePolicy
from dvdquant.errors import UnsupportedError
from dvdquant.system.records import brief

__all__ = [
    "PUBLISHED_COST",
    "BranchPolicy",
    "Decision",
    "Mode",
    "OnStep",
    "StepController",
    "StepInfo",
    "StepRecord",
    "relative_cost",
]

Mode = Literal["switch", "fixed", "planned", "callback"]
BranchPolicy = Literal["shared", "separate"]
# An assumption, not a measurement: the latencies published for HunyuanVideo are 1.75 (W4A8) and 2.12 (W4A4) times
# below the latency of 16 bit.
PUBLISHED_COST: Mapping[int, float] = {8: 1.0, 4: 1.75 / 2.12}


@dataclass(frozen=True)
class Decision:
    """The decision for one step, and the reason for it.

    Args:
        bits: The activation bits that the step runs on. None reuses the last output.
        reason: The reason in words.
        accumulated: The sum that is compared with δ, or None if there was nothing to compare.
    """

    bits: int | None
    reason: str
    accumulated: float | None = None


@dataclass(frozen=True)
class StepInfo:
    """The facts that a callback decides from.

    Args:
        step: The index of the step, from 0.
        steps: The number of steps of the request, or None if it is not known.
        timestep: The timestep of the step.
        branch: The name of the branch that decides, such as "cond".
        changes: L1 of every step computed so far.
        accumulated: The sum of L1 since the last high step, with the predictions of skipped steps.
        can_skip: True if there is an output to reuse.
    """

    step: int
    steps: int | None
    timestep: float
    branch: str
    changes: tuple[float, ...]
    accumulated: float
    can_skip: bool


@dataclass
class StepRecord:
    """One call of the transformer: what ran and why.

    Args:
        step: The index of the step, from 0.
        branch: The name of the branch. A slash and the number of the slice follow it if the batch was split.
        timestep: The timestep of the step.
        bits: The activation bits that the output was finally computed with. None if an earlier output was reused.
        reason: The reason in words.
        change: L1 of this output against the last computed output of the same branch. None for the first output, and
            for a reused one.
        accumulated: The sum that was compared with δ at the decision, or None.
        seconds: The seconds that the engine took, including failed attempts.
        retried: True if the low engine failed and the high engine ran.
    """

    step: int
    branch: str
    timestep: float
    bits: int | None
    reason: str
    change: float | None
    accumulated: float | None
    seconds: float
    retried: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the record as a dict of JSON values.

        An infinite change (from an all-zero output) becomes null.
        """
        data = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


OnStep = Callable[[StepRecord], None]
"""What gets the record of every call of a transformer as soon as it has ended."""


@dataclass
class _History:
    """The history of one deciding branch.

    Args:
        rule: The δ-GBS rule with its sum.
        forecast: The prediction of L1 that stands in the sum of δ-GBS for skipped steps.
        skips: The forecast of the step cache. It is the same one for the policy that predicts L1.
        changes: L1 of every computed step, without weights.
        step: The last step that this branch took part in, or -1.
        computed: Step and timestep of the last computed step, or None.
    """

    rule: BitSwitch
    forecast: ChangeForecast = field(default_factory=ChangeForecast)
    skips: SkipForecast | None = None
    changes: list[float] = field(default_factory=list)
    step: int = -1
    computed: tuple[int, float] | None = None


class StepController:
    """A rule that decides each step, with the sums that it decides from.

    It serves one request at a time; call :meth:`reset` between requests.

    Args:
        mode: ``switch`` is δ-GBS. ``fixed`` runs ``bits`` in every step. ``planned`` follows ``schedule``. ``callback``
            asks ``callback(StepInfo)`` for bits, None (skip) or a :class:`Decision`.
        delta: δ of the switch mode, from 0 to infinity.
        low: Activation bits of the low engine.
        high: Activation bits of the high engine.
        bits: Activation bits of the fixed mode. The default is ``high``.
        schedule: A :class:`Schedule`, or the bits of each step (None skips the step).
        callback: The rule of the callback mode.
        cache: A policy to skip steps too, in the switch and fixed modes. In the switch mode, only outputs of the high
            engine are reused, and a step of which the next one may be skipped runs on the high engine, whatever the sum
            says: quantization noise that stands for several steps adds up.
        branch_policy: With classifier-free guidance, a step calls the transformer for several branches. ``shared``
            decides once a step, from the history of the branch that is called first: guidance subtracts the branches
            from each other, and their errors cancel best if both come from the same engine. ``separate`` gives every
            branch its own history.
        last_high: In the switch mode, the number of steps at the end that run on the high engine, whatever the sum
            says. It applies only if the number of steps is known. The default is
            :data:`dvdquant.deploy.switching.defaults.LAST_HIGH`; the published rule has 0. In the fixed mode, the
            number of steps at the end that the cache does not skip; the last step is always computed.
        weighting: In the switch mode, ``step`` (the default) multiplies the change of a step by how far the step moves
            the timestep, if the number of steps is known. ``none`` is the published rule. See ``gbs.py``.

    Raises:
        UnsupportedError: An argument is missing, out of range, or has no meaning in this mode.
    """

    def __init__(
        self,
        mode: Mode = "switch",
        *,
        delta: float | None = None,
        low: int = 4,
        high: int = 8,
        bits: int | None = None,
        schedule: Schedule | Sequence[int | None] | None = None,
        callback: Callable[[StepInfo], int | Decision | None] | None = None,
        cache: StepCachePolicy | None = None,
        branch_policy: BranchPolicy = "shared",
        last_high: int | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        # 1. The mode and what it needs.
        needed: dict[str, Any] = {"switch": delta, "fixed": 0, "planned": schedule, "callback": callback}
        if mode not in needed:
            raise UnsupportedError(f"unknown mode {mode!r:.40}", available=get_args(Mode))
        if needed[mode] is None:
            option = {"switch": "delta", "planned": "schedule", "callback": "callback"}[mode]
            raise UnsupportedError(
                f"mode {mode} needs {option}", fix=f"give {option}=…, or another mode; dvdq-plan finds δ and schedules"
            )
        # 2. Defaults.
        if last_high is None:
            last_high = LAST_HIGH if mode == "switch" else 0
        if weighting is None:
            weighting = WEIGHTINGS[0] if mode == "switch" else "none"
        # 3. Kinds and ranges.
        if delta is not None and not (is_number(delta) and delta >= 0):
            raise UnsupportedError(f"δ is {brief(delta)}", available="a number from 0 (all high) to infinity (all low)")
        for name, width in (("low", low), ("high", high), ("bits", high if bits is None else bits)):
            if not is_whole(width):
                raise UnsupportedError(f"{name} is {brief(width)}", available="activation bits, such as 4 or 8")
        if callback is not None and not callable(callback):
            raise UnsupportedError(f"the callback is {brief(callback)}", available="a function of a StepInfo")
        if cache is not None and not isinstance(cache, StepCachePolicy):
            raise UnsupportedError(f"the cache is {brief(cache)}", available="a StepCachePolicy")
        planned = schedule.bits if isinstance(schedule, Schedule) else schedule
        if planned is not None:
            listed = isinstance(planned, Sequence) and not isinstance(planned, (str, bytes)) and len(planned) > 0
            if not listed or not all(width is None or is_whole(width) for width in planned):
                raise UnsupportedError(
                    f"the schedule is {brief(planned)}",
                    available="a Schedule, or the bits of each step: [8, 8, 4, None, 8]",
                )
        if branch_policy not in get_args(BranchPolicy):
            raise UnsupportedError(f"unknown branch policy {branch_policy!r:.40}", available=get_args(BranchPolicy))
        if weighting not in get_args(Weighting):
            raise UnsupportedError(f"unknown weighting {weighting!r:.40}", available=get_args(Weighting))
        if not is_whole(last_high) or last_high < 0:
            raise UnsupportedError(f"last_high is {brief(last_high)}", available="a number of steps, from 0")
        if not low <= high:
            raise UnsupportedError(f"low is {low} bits and high {high}", fix="exchange them")
        if cache is not None and mode in ("planned", "callback"):
            raise UnsupportedError(
                f"mode {mode} says itself which steps are skipped", fix="leave the cache out, or use mode switch"
            )
        # 4. The rule, and the state of a request.
        self.mode, self.branch_policy, self.cache = mode, branch_policy, cache
        self.delta, self.low, self.high = delta, low, high
        self.bits = high if bits is None else bits
        self.callback, self.last_high, self.weighting = callback, last_high, weighting
        self.schedule = tuple(planned or ())
        self.steps: int | None = None
        self._histories: dict[str, _History] = {}
        self._decider: str | None = None

    @property
    def engines(self) -> tuple[int, ...]:
        """Return the bits that this controller may ask for, in ascending order.

        The bits of a callback are not known before it is asked.
        """
        used = {"switch": {self.low}, "fixed": {self.bits}, "planned": {b for b in self.schedule if b is not None}}
        return tuple(sorted(used.get(self.mode, set()) | {self.high}))

    @property
    def reused_bits(self) -> int:
        """Return the activation bits from which on an output may be reused for skipped steps."""
        return self.high if self.mode == "switch" and self.cache is not None else 0

    def fresh(self) -> Self:
        """Return another controller with the same rule and no history, for another request."""
        twin = copy.copy(self)
        twin.steps, twin._histories, twin._decider = None, {}, None
        return twin

    def reset(self, steps: int | None = None) -> None:
        """Forget every history, for a new request.

        Args:
            steps: The number of steps of the new request, or None if it is not known.

        Raises:
            UnsupportedError: The schedule is for another number of steps.
        """
        if self.mode == "planned" and steps is not None and steps != len(self.schedule):
            raise UnsupportedError(
                f"the schedule has {len(self.schedule)} steps and the request {steps}",
                fix=f"generate with {len(self.schedule)} steps, or plan again with dvdq-plan --steps {steps}",
            )
        self.steps = steps
        self._histories.clear()
        self._decider = None

    def lead(self, branch: str, step: int = 0) -> None:
        """Let a branch decide from a step on, though another one may be called before it.

        Args:
            branch: The branch. It decides as long as it takes part in every step.
            step: The index of the first step.
        """
        self._history(branch).step = step - 1
        self._decider = branch

    def decide(self, branch: str, step: int, timestep: float, moved: Moved = NOT_MOVED) -> Decision:
        """Return the decision for a step.

        Call it at the first call of a step (with ``separate``: at the first call of each branch in the step).

        Args:
            branch: The branch that is called. Under ``shared`` the history is that of the branch that decided the step
                before, as long as that branch took part in that step.
            step: The index of the step, from 0.
            timestep: The timestep of the step.
            moved: How far the branch's latent has moved, for a step cache that watches it.

        Raises:
            UnsupportedError: The step is beyond the schedule, or a callback skips a step without an output to reuse.
        """
        history = self._history(self._deciding(branch, step))
        if self.mode == "switch":
            return (
                self._skip(history, step, timestep, moved)
                or self._serve(history, step, timestep, moved)
                or self._switch(history, step, timestep)
            )
        if self.mode == "fixed":
            return self._skip(history, step, timestep, moved) or Decision(
                self.bits, "fixed", self._sum(history, step, timestep)
            )
        if self.mode == "planned":
            return self._planned(history, step, timestep)
        return self._asked(history, step, timestep)

    def ran(
        self,
        branch: str,
        step: int,
        timestep: float,
        bits: int | None,
        change: float | None,
        moved: Moved = NOT_MOVED,
        growth: Growth = NOT_GROWN,
        reused_change: float | None = None,
    ) -> None:
        """Note the result of a branch's step, once per branch and step.

        Args:
            branch: The branch that was called.
            step: The index of the step, from 0.
            timestep: The timestep of the step.
            bits: The bits that the step really ran on, after retries. None if an output was reused.
            change: L1 of the output, over all slices of a split batch together. None if there was no output before it,
                or if an output was reused.
            moved: How far the branch's latent had moved, for a step cache that watches it.
            growth: How the magnitudes grew since the last output that may be reused, for a step cache that watches them.
            reused_change: L1 from the last output that may be reused, if that is not the last computed one; else None.
        """
        history = self._history(branch)
        history.step = step
        forecasts: list[SkipForecast] = [history.forecast]
        if history.skips is not None and history.skips is not history.forecast:
            forecasts.append(history.skips)
        if bits is None:
            for forecast in forecasts:
                forecast.skipped(timestep, moved)
            return
        history.rule.ran(bits)
        for forecast in forecasts:
            if bits >= self.reused_bits:
                forecast.ran(timestep, change if reused_change is None else reused_change, moved, growth)
            else:
                forecast.passed(timestep)
        if change is not None:
            history.rule.observe(change * self._weight(history, step, timestep))
            history.changes.append(change)
        history.computed = (step, timestep)

    def _weight(self, history: _History, step: int, timestep: float) -> float:
        """Return the weight of the change between the last computed step and this one.

        If several steps lie between them, the weight is that of their mean length.
        """
        if self.weighting == "none" or not self.steps or history.computed is None:
            return 1.0
        before, began = history.computed
        return step_weight((began - timestep) / max(1, step - before), self.steps)

    def _pending(self, history: _History, step: int, timestep: float) -> float:
        """Return the predicted change of the steps that were skipped since the last computed step, with its weight."""
        pending = history.forecast.pending
        return pending * self._weight(history, step, timestep) if pending else 0.0

    def _sum(self, history: _History, step: int, timestep: float) -> float:
        return history.rule.accumulated + self._pending(history, step, timestep)

    def _history(self, branch: str) -> _History:
        if branch not in self._histories:
            delta = 0.0 if self.delta is None else self.delta
            history = _History(BitSwitch(delta, self.low, self.high))
            if self.cache is not None:
                forecast = self.cache.forecast()
                history.skips = history.forecast if isinstance(forecast, ChangeForecast) else forecast
            self._histories[branch] = history
        return self._histories[branch]

    def _deciding(self, branch: str, step: int) -> str:
        if self.branch_policy == "separate":
            return branch
        # A branch that is no longer called (guidance was switched off half-way) cannot decide any more.
        if self._decider is None or self._history(self._decider).step < step - 1:
            self._decider = branch
        return self._decider

    def _switch(self, history: _History, step: int, timestep: float) -> Decision:
        if not history.rule.known:
            return Decision(self.high, "no history", None)
        total = self._sum(history, step, timestep)
        if self.steps is not None and step >= self.steps - self.last_high:
            return Decision(self.high, f"one of the last {self.last_high} steps", total)
        bits = history.rule.decide(self._pending(history, step, timestep))
        reason = f"change {total:.4g} {'<' if total < history.rule.delta else '≥'} {history.rule.delta:.4g}"
        return Decision(bits, reason, total)

    def _skip(self, history: _History, step: int, timestep: float, moved: Moved) -> Decision | None:
        """Return a decision to skip the step, or None if the cache does not allow it here."""
        cache, forecast = self.cache, history.skips
        if cache is None or forecast is None or forecast.barred or forecast.skips >= cache.max_skips:
            return None
        error = forecast.predict(timestep, moved)
        if error is None or not self._skippable(cache, step):
            return None
        total = (forecast.pending + error) * cache.weight(forecast.moves(timestep), self.steps)
        if not total < cache.threshold:
            return None
        what = "change" if isinstance(forecast, ChangeForecast) else f"error ({cache.policy})"
        reason = f"cache: predicted {what} {total:.4g} < {cache.threshold:.4g}, skip {forecast.skips + 1} in a row"
        return Decision(None, reason, self._sum(history, step, timestep))

    def _serve(self, history: _History, step: int, timestep: float, moved: Moved) -> Decision | None:
        """Return a decision for the high engine where the output will probably be reused, or None.

        The next step is taken to be as long as this one and to change as much.
        """
        cache, forecast = self.cache, history.skips
        if cache is None or forecast is None or not self._skippable(cache, step + 1):
            return None
        error = forecast.alone(timestep, moved)
        if error is None or not error * cache.weight(forecast.moves(timestep), self.steps) < cache.threshold:
            return None
        return Decision(self.high, "cache: the next step may reuse it", self._sum(history, step, timestep))

    def _skippable(self, cache: StepCachePolicy, step: int) -> bool:
        """Return whether the place of a step among the steps of the request lets the cache skip it."""
        ends = self.steps is not None and step >= self.steps - max(1, self.last_high)
        return step >= cache.first_skip(self.steps) and not ends

    def _planned(self, history: _History, step: int, timestep: float) -> Decision:
        if step >= len(self.schedule):
            raise UnsupportedError(
                f"step {step} is beyond the schedule's {len(self.schedule)} steps",
                fix="generate with as many steps as were planned, or plan again with dvdq-plan --steps",
            )
        bits, total = self.schedule[step], self._sum(history, step, timestep)
        if bits is None and not _has_output(history):
            return Decision(self.high, "planned skip, but there is no output to reuse", total)
        return Decision(bits, "planned", total)

    def _asked(self, history: _History, step: int, timestep: float) -> Decision:
        assert self.callback is not None
        branch = self._decider or next(name for name, h in self._histories.items() if h is history)
        can_skip, changes = _has_output(history), tuple(history.changes)
        info = StepInfo(step, self.steps, timestep, branch, changes, self._sum(history, step, timestep), can_skip)
        answer = self.callback(info)
        decision = answer if isinstance(answer, Decision) else Decision(answer, "callback", info.accumulated)
        if decision.bits is None and not can_skip:
            raise UnsupportedError(
                f"the callback skips step {step}, but no step of branch {branch} was computed before it",
                fix="skip only where StepInfo.can_skip is true",
            )
        return decision


def _has_output(history: _History) -> bool:
    return history.forecast.computed is not None


def relative_cost(records: Sequence[StepRecord], high: int, low: int, cost: Mapping[int, float]) -> float:
    """Return the cost of the calls relative to running all of them on the high engine: Σ cost / (calls · cost[high]).

    A reused output costs nothing. A retried step costs both engines.

    Args:
        records: The calls of a request.
        high: Activation bits of the high engine.
        low: Activation bits of the low engine.
        cost: The relative cost of a call, by activation bits.
    """
    total = sum(0.0 if r.bits is None else cost[r.bits] + (cost[low] if r.retried else 0.0) for r in records)
    return total / (len(records) * cost[high]) if records else 0.0
