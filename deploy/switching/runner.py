"""The execution of steps on the engine that the controller chooses, with recovery from a failing low engine."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvdquant.deploy.cancel import CancelSignal, check_cancelled
from dvdquant.deploy.switching.controller import (
    PUBLISHED_COST,
    Decision,
    OnStep,
    StepController,
    StepRecord,
    relative_cost,
)
from dvdquant.deploy.switching.forecasts import Growth, Moved, moved_since
from dvdquant.deploy.switching.gbs import change_from_sums, change_sums
from dvdquant.deploy.switching.position import LoopPosition
from dvdquant.deploy.switching.schedule import average_bits
from dvdquant.deploy.switching.step_cache import Kept, Residual, keep, residual_norm, reuse
from dvdquant.errors import DvdquantError, EngineError, UnsupportedError
from dvdquant.system.out_of_memory import ran_out_of_memory

if TYPE_CHECKING:
    from dvdquant.deploy.sessions.base import EngineSession

__all__ = ["LATENT", "TIMESTEP", "StepRunner"]

# The names of these inputs in the graphs of all families.
LATENT, TIMESTEP = "hidden_states", "timestep"


@dataclass(frozen=True)
class _Norms:
    """L1 norms of an output F_t, of one slice or added up over the slices of a branch.

    Args:
        change: ‖F_t − F_{t−1}‖₁, 0 without an output before it.
        before: ‖F_{t−1}‖₁, 0 without one.
        now: ‖F_t‖₁.
        reused_change: ‖F_t − F_j‖₁ with F_j the last output before it that may be reused.
        reused_before: ‖F_j‖₁.
        residual_before: ‖F_j − latent‖₁ of step j, 0 unless the step cache watches it.
        residual: ‖F_t − latent‖₁, 0 unless the step cache watches it.
    """

    change: float = 0.0
    before: float = 0.0
    now: float = 0.0
    reused_change: float = 0.0
    reused_before: float = 0.0
    residual_before: float = 0.0
    residual: float = 0.0

    def __add__(self, other: _Norms) -> _Norms:
        return _Norms(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))


@dataclass
class _Part:
    """The last computed output of one slice of one branch.

    Args:
        output: A copy of the output.
        shape: The shape of the latent.
        step: The last step that the slice took part in, computed or reused.
        reused: A copy of the last output that may be reused: ``output`` itself, an earlier one, or None.
        kept: What a skipped step reuses of that one, see :func:`.step_cache.keep`.
        residual: ‖reused − latent‖₁, if the step cache watches it.
    """

    output: Tensor
    shape: tuple[int, ...]
    step: int
    reused: Tensor | None = None
    kept: Kept | None = None
    residual: float = 0.0

    @property
    def reusable(self) -> bool:
        """Return whether the last computed output may be reused."""
        return self.reused is self.output


@dataclass
class _Trail:
    """The latents of one branch that a step cache compares the next one with.

    Args:
        last: The latent of the last step, or None before the first one.
        computed: The latent of the last computed step that may be reused, or None.
    """

    last: Tensor | None = None
    computed: Tensor | None = None


@dataclass
class _Step:
    """The step in progress: decisions by branch, and the results of its calls.

    Args:
        index: The index of the step, from 0.
        timestep: The timestep of the step.
        decisions: The decision by branch, or under "" if the branches share one.
        calls: The number of calls so far, by full branch name.
        norms: The norms over all slices that were computed in this step and have an output before it, by branch.
        ran: The bits that really ran, by branch. None if an output was reused.
        latents: The latent of the whole branch, by branch, if the step cache watches it.
        moved: How far it has moved, by branch.
        failed: The reason why the low engine is not asked again in this step, or None.
    """

    index: int
    timestep: float
    decisions: dict[str, Decision] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    norms: dict[str, _Norms] = field(default_factory=dict)
    ran: dict[str, int | None] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, Moved] = field(default_factory=dict)
    failed: str | None = None


def _ratio(new: float, old: float) -> float | None:
    """Return new / old, or None if there is none."""
    return new / old if old > 0.0 else None


class _Failure(Exception):
    """A failed attempt that gave no usable output. The message says why in a few words."""


class StepRunner:
    """A runner of one request at a time through one session.

    A step begins when ``step`` changes or, if it is not given, when the timestep changes. A request begins with
    :meth:`begin_request`, when the timestep rises or ``step`` falls, or when a branch's latent changes shape. Branch
    names are free; the part before a slash is the branch ("cond_uncond/0" and "cond_uncond/1" are slices of one batched
    call, and decide as the whole call would).

    An output is checked before it is returned. Its L1 norm, which is finite exactly if every value is, and the sums of
    L1(t) come from one reduction on the device and one transfer of three numbers. The check therefore waits for the
    engine at each call. Its additional cost is in ``summary()["controller_seconds"]``.

    A step of the low engine fails if it raises EngineError, runs out of memory, or gives NaN or infinities. It runs
    again on the high engine, and so do the step's other branches; for δ-GBS it is a high step. Such a failure on the
    high engine raises EngineError. No failed output ever enters the history.

    Args:
        session: The session that runs the engines.
        controller: The rule that chooses the engine of each step.

    Attributes:
        trace: The record of every call of the request, in order.
        on_step: A callback that gets the record of every call as soon as it has ended, or None.
        cancel: The event of the request, or None. Once it is set, no further call is made: :meth:`run` raises Cancelled.

    Raises:
        UnsupportedError: The session lacks an engine that the controller may ask for.
    """

    def __init__(self, session: EngineSession, controller: StepController) -> None:
        if missing := sorted(set(controller.engines) - set(session.bits)):
            raise UnsupportedError(
                f"the session has no engine with {missing[0]}-bit activations, which mode {controller.mode} may ask for",
                available=[f"{b} bits" for b in session.bits],
                fix="open the session with these bits, export them, or set the controller's low= and high=",
            )
        self.session, self.controller = session, controller
        self.trace: list[StepRecord] = []
        self.on_step: OnStep | None = None
        self.cancel: CancelSignal | None = None
        self.controller_seconds = 0.0
        self._parts: dict[tuple[str, int], _Part] = {}
        self._trails: dict[str, _Trail] = {}
        self._position = LoopPosition()
        self._step: _Step | None = None
        self._running = threading.Lock()

    def begin_request(self, steps: int | None = None) -> None:
        """Forget history and trace, for a new request.

        Args:
            steps: The number of steps of the request, or None. If it is known, the last step is never skipped.
        """
        self.controller.reset(steps)
        self.trace = []
        self.controller_seconds = 0.0
        self.forget_outputs()
        self._position = LoopPosition()
        self._step = None

    def forget_outputs(self) -> None:
        """Free the outputs and latents that are kept for the next step, when a request is over.

        The trace stays.
        """
        self._parts.clear()
        self._trails.clear()

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        branch: str = "cond",
        step: int | None = None,
        steps: int | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Return the transformer's output for ``inputs``, computed or reused.

        Args:
            inputs: Graph inputs by name.
            branch: The name of the branch that this call of the step is for.
            step: The index of the step from 0, if the caller knows it.
            steps: The number of steps of the request, if the caller knows it.
            latents: The latents of all slices, if the call is for one slice of a branch. A step is decided as a whole.

        Raises:
            EngineError: The high engine failed or gave NaN or infinities. The error names step and branch.
            UnsupportedError: A schedule or a callback asks for what is not there, or another call is running.
            ShapeError: The inputs are outside the exported profile.
            Cancelled: The event :attr:`cancel` is set.
        """
        if not self._running.acquire(blocking=False):
            raise UnsupportedError(
                "two calls of one StepRunner at once",
                fix="make a StepRunner with a controller of its own for every request; they may share the session",
            )
        try:
            check_cancelled(self.cancel, "a call of the transformer")
            return self._run(inputs, branch, step, steps, inputs[LATENT] if latents is None else latents)
        finally:
            self._running.release()

    def _run(
        self, inputs: Mapping[str, Tensor], branch: str, step: int | None, steps: int | None, latents: Tensor
    ) -> Tensor:
        started = time.perf_counter()
        current = self._enter(inputs, branch, step, steps)
        name = branch.partition("/")[0]
        key = (branch, current.calls.get(branch, 0))
        self._watch(current, name, latents)
        decision = self._decide(current, name)
        decision = self._possible(current, key, decision)
        self.controller_seconds += time.perf_counter() - started
        return self._execute(inputs, current, name, key, decision)

    # ---------------------------------------------------------------------------------------------- steps and decisions

    def _enter(self, inputs: Mapping[str, Tensor], branch: str, step: int | None, steps: int | None) -> _Step:
        """Return the step that this call belongs to, after beginning it if it is new."""
        timestep, current = float(inputs[TIMESTEP].max()), self._step
        if current is None:
            if steps is not None and steps != self.controller.steps:
                self.controller.reset(steps)
        elif self._position.restarts(step, timestep) or self._has_other_shape(current, inputs, branch):
            self.begin_request(steps)
        elif self._position.at(step, timestep):
            return current
        else:
            self._finish(current)
        self._step = _Step(self._position.enter(step, timestep), timestep)
        return self._step

    def _has_other_shape(self, current: _Step, inputs: Mapping[str, Tensor], branch: str) -> bool:
        """Return whether the latent has another shape than in the last call of this branch."""
        part = self._parts.get((branch, current.calls.get(branch, 0))) or self._parts.get((branch, 0))
        return part is not None and part.shape != tuple(inputs[LATENT].shape)

    def _watch(self, current: _Step, name: str, latents: Tensor) -> None:
        """Note how far the latent of a branch has moved, at its first call in the step, if the step cache watches it."""
        cache = self.controller.cache
        if cache is None or not cache.watches_latents or name in current.latents:
            return
        trail = self._trails.get(name, _Trail())
        current.moved[name] = moved_since(latents, trail.last, trail.computed)
        # A copy: a sampler may change its latent in place.
        current.latents[name] = latents.detach().clone()

    def _decide(self, current: _Step, name: str) -> Decision:
        slot = name if self.controller.branch_policy == "separate" else ""
        if slot not in current.decisions:
            moved = current.moved.get(name, Moved())
            decision = self.controller.decide(name, current.index, current.timestep, moved)
            if decision.bits is not None and decision.bits not in self.session.bits:
                raise UnsupportedError(
                    f"step {current.index}: {decision.reason} asks for {decision.bits}-bit activations",
                    available=[f"{b} bits" for b in self.session.bits],
                )
            current.decisions[slot] = decision
        return current.decisions[slot]

    def _possible(self, current: _Step, key: tuple[str, int], decision: Decision) -> Decision:
        """Return the decision, or one for the high engine if this call cannot follow it."""
        if current.failed and decision.bits not in (None, self.controller.high):
            reason = f"{current.failed} in another call of this step"
            return Decision(self.controller.high, reason, decision.accumulated)
        part = self._parts.get(key)
        if decision.bits is None and (part is None or not part.reusable or part.step < current.index - 1):
            return Decision(self.controller.high, f"no output to reuse; {decision.reason}", decision.accumulated)
        return decision

    def _finish(self, current: _Step) -> None:
        """Tell the controller the result of the step."""
        for name, bits in current.ran.items():
            norms = current.norms.get(name)
            change, growth, reused_change = None, Growth(), None
            if norms is not None and bits is not None:
                change = change_from_sums(norms.change, norms.before)
                reused_change = change_from_sums(norms.reused_change, norms.reused_before)
                growth = Growth(_ratio(norms.now, norms.reused_before), _ratio(norms.residual, norms.residual_before))
            moved = current.moved.get(name, Moved())
            self.controller.ran(name, current.index, current.timestep, bits, change, moved, growth, reused_change)
            if (latent := current.latents.get(name)) is not None:
                trail = self._trails.setdefault(name, _Trail())
                trail.last = latent
                if bits is not None and bits >= self.controller.reused_bits:
                    trail.computed = latent

    # -------------------------------------------------------------------------------------------------------- execution

    def _execute(
        self, inputs: Mapping[str, Tensor], current: _Step, name: str, key: tuple[str, int], decision: Decision
    ) -> Tensor:
        # 1. The decided engine; after a failure of the low engine, the high one.
        started, before = time.perf_counter(), self.controller_seconds
        bits, reason, retried = decision.bits, decision.reason, False
        try:
            output, norms = self._attempt(inputs, current, key, bits)
        except _Failure as failure:
            if bits in (None, self.controller.high):
                raise self._error(current, key[0], bits, failure) from failure.__cause__
            current.failed = f"retry after {failure} on the {bits}-bit engine"
            bits, retried, reason = self.controller.high, True, f"{current.failed} ({reason})"
            if inputs[LATENT].is_cuda:
                torch.cuda.empty_cache()
            check_cancelled(self.cancel, "a failed step ran again")
            try:
                output, norms = self._attempt(inputs, current, key, bits)
            except _Failure as again:
                raise self._error(current, key[0], bits, again) from again.__cause__
        # 2. History and trace.
        seconds = time.perf_counter() - started - (self.controller_seconds - before)
        change = self._remember(inputs, current, name, key, bits, output, norms)
        record = StepRecord(
            current.index, key[0], current.timestep, bits, reason, change, decision.accumulated, seconds, retried
        )
        self.trace.append(record)
        if self.on_step is not None:
            self.on_step(record)
        return output

    def _attempt(
        self, inputs: Mapping[str, Tensor], current: _Step, key: tuple[str, int], bits: int | None
    ) -> tuple[Tensor, _Norms]:
        """Compute or reuse one output, and check it.

        Returns:
            The output and its norms.

        Raises:
            _Failure: There is no output, or it is not finite.
        """
        part = self._parts.get(key)
        try:
            if bits is None:
                assert part is not None
                assert part.kept is not None
                output = reuse(part.kept, inputs[LATENT], current.timestep)
            else:
                output = self.session.run(inputs, bits)
            if output.is_cuda:
                # Only for the clock: the engine's seconds must not contain the reduction that follows.
                torch.cuda.current_stream(output.device).synchronize()
            started = time.perf_counter()
            # One transfer for all norms; those of the output that may be reused only where it is not the last one.
            last = part if part is not None and part.output.shape == output.shape else None
            reused = None if last is None or last.reusable else last.reused
            wanted = change_sums(output, None if last is None else last.output)
            if reused is not None:
                wanted = torch.cat((wanted, change_sums(output, reused)[:2]))
            if bits is not None and self._watches_residual:
                wanted = torch.cat((wanted, residual_norm(output, inputs[LATENT])[None]))
            change, before, now, *more = wanted.tolist()
            reused_change, reused_before = (more.pop(0), more.pop(0)) if reused is not None else (change, before)
        except (EngineError, MemoryError, torch.OutOfMemoryError) as error:
            raise _Failure("running out of memory" if ran_out_of_memory(error) else "EngineError") from error
        self.controller_seconds += time.perf_counter() - started
        # One NaN or infinity in the output makes its norm one.
        if not math.isfinite(now):
            raise _Failure("NaN" if math.isnan(now) else "infinity")
        known = part.residual if part is not None else 0.0
        return output, _Norms(change, before, now, reused_change, reused_before, known, *more)

    @property
    def _watches_residual(self) -> bool:
        return self.controller.cache is not None and self.controller.cache.watches_residual

    @property
    def _residual(self) -> Residual:
        return self.controller.cache.residual if self.controller.cache is not None else "output"

    def _remember(
        self,
        inputs: Mapping[str, Tensor],
        current: _Step,
        name: str,
        key: tuple[str, int],
        bits: int | None,
        output: Tensor,
        norms: _Norms,
    ) -> float | None:
        """Keep what the next step needs, and return L1 of this output, or None."""
        started = time.perf_counter()
        change = None
        current.calls[key[0]] = key[1] + 1
        if bits is None:
            self._parts[key].step = current.index
            current.ran.setdefault(name, None)
        else:
            # The output is copied: the caller may change it in place, and an engine may write its next output there.
            copy, latent = output.detach().clone(), inputs[LATENT]
            before = self._parts.get(key)
            part = self._parts[key] = _Part(copy, tuple(latent.shape), current.index)
            if bits >= self.controller.reused_bits:
                last = before.kept if before is not None else None
                part.reused, part.residual = copy, norms.residual
                part.kept = keep(copy, latent, self._residual, current.timestep, bits, last)
            elif before is not None:
                part.reused, part.kept, part.residual = before.reused, before.kept, before.residual
            high = bits == self.controller.high or current.ran.get(name) == self.controller.high
            current.ran[name] = self.controller.high if high else bits
            if before is not None and before.output.shape == output.shape:
                change = change_from_sums(norms.change, norms.before)
                current.norms[name] = current.norms.get(name, _Norms()) + norms
        self.controller_seconds += time.perf_counter() - started
        return change

    def _error(self, current: _Step, branch: str, bits: int | None, failure: _Failure) -> EngineError:
        cause = failure.__cause__
        what = f"step {current.index}, branch {branch}: "
        if cause is None:
            what += f"the output holds {failure}" + (f" on the {bits}-bit engine" if bits else ", reused")
        else:
            what += f"{failure} on the {bits}-bit engine: {cause.what if isinstance(cause, DvdquantError) else cause}"
        earlier = f"; before, on the low engine: {current.failed}" if current.failed else ""
        if isinstance(cause, DvdquantError) and cause.has_own_fix and cause.fix:
            fix = cause.fix  # the session knows the reason best; a closed session, for example, has no damaged file
        elif cause is not None and ran_out_of_memory(cause):
            fix = "use a smaller size or free device memory"
        else:
            fix = "check the engines with dvdq-inspect OUT --check"
        return EngineError(what + earlier, fix=fix)

    # ---------------------------------------------------------------------------------------------------------- summary

    def summary(self, cost: Mapping[int, float] | None = None) -> dict[str, Any]:
        """Return the figures of the request so far, as JSON values.

        Args:
            cost: The relative cost of a call by activation bits. Without it the relative cost rests on the published
                ratio, which is an assumption about another model and machine. The measured seconds per call are always
                reported beside it, for each engine that ran.
        """
        records, controller = self.trace, self.controller
        computed = [r for r in records if r.bits is not None]
        counts = {b: sum(r.bits == b for r in records) for b in sorted(self.session.bits)}
        times = {b: [r.seconds for r in computed if r.bits == b and not r.retried] for b in counts}
        table = {**PUBLISHED_COST, **(cost or {})}
        known = all(b in table for b in {r.bits for r in computed} | {controller.low, controller.high})
        return {
            "mode": controller.mode,
            "delta": controller.delta if controller.delta is not None and controller.delta < float("inf") else None,
            "steps": len({r.step for r in records}),
            "calls": len(records),
            "average_bits": average_bits([r.bits for r in computed]) if computed else None,
            "calls_at": {str(b): n for b, n in counts.items()},
            "skipped": len(records) - len(computed),
            "cache": None if controller.cache is None else controller.cache.to_json(),
            "retries": sum(r.retried for r in records),
            "seconds": sum(r.seconds for r in records),
            "seconds_per_call": {str(b): sum(t) / len(t) for b, t in times.items() if t},
            "controller_seconds": self.controller_seconds,
            "relative_cost": relative_cost(records, controller.high, controller.low, table) if known else None,
            "cost_basis": "given" if cost else "assumed: published latencies, 1.75 (8 bit) and 2.12 (4 bit)",
        }
