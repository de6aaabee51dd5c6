"""Calls of the original transformer, recorded as the calls of engines are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.deploy.cancel import CancelSignal, cancel_inside, check_cancelled
from dvdquant.deploy.switching.controller import OnStep, StepRecord
from dvdquant.deploy.switching.gbs import relative_change
from dvdquant.deploy.switching.position import LoopPosition
from dvdquant.errors import EngineError
from dvdquant.model.families import Family
from dvdquant.system.devices import wait_for
from dvdquant.system.threads import one_thread

__all__ = ["CallRecorder", "OriginalRunner", "recorded_calls"]

ORIGINAL_BITS = 16


class CallRecorder:
    """A :class:`StepRecord` for every call of a transformer; L1 of adjacent outputs for each branch."""

    def __init__(self) -> None:
        self.trace: list[StepRecord] = []
        self.on_step: OnStep | None = None
        self.cancel: CancelSignal | None = None
        self._last: dict[str, Tensor] = {}

    def begin_request(self, steps: int | None = None) -> None:
        """Forget the last clip.

        Args:
            steps: The number of steps, or None if it is not known.
        """
        del steps
        self.trace, self._last = [], {}

    def record(self, output: Tensor, *, step: int, branch: str, timestep: float, seconds: float) -> None:
        """Note one call.

        Args:
            output: The output of the transformer.
            step: The index of the step.
            branch: The branch of the guidance.
            timestep: The timestep of the call.
            seconds: The seconds that the call took.

        Raises:
            EngineError: The output is not finite.
        """
        if not bool(torch.isfinite(output).all()):
            raise EngineError(
                f"the original checkpoint gave NaN or infinities at step {step} ({branch})",
                fix="draw it in another dtype or at another size: the model itself breaks there, without quantization",
            )
        last = self._last.get(branch)
        change = None if last is None or last.shape != output.shape else relative_change(output, last)
        self._last[branch] = output
        self.trace.append(
            StepRecord(
                step=step,
                branch=branch,
                timestep=timestep,
                bits=ORIGINAL_BITS,
                reason="original checkpoint",
                change=change,
                accumulated=0.0,
                seconds=seconds,
                retried=False,
            )
        )
        if self.on_step is not None:
            self.on_step(self.trace[-1])

    def summary(self) -> dict[str, Any]:
        """Return the part of a StepRunner's summary that the original has."""
        return {
            "steps": len({record.step for record in self.trace}),
            "average_bits": float(ORIGINAL_BITS),
            "retries": 0,
            "seconds": sum(record.seconds for record in self.trace),
        }


class OriginalRunner(CallRecorder):
    """The original transformer behind the part of StepRunner's interface that a generation needs.

    Args:
        model: The transformer of diffusers.
        family: Its family.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model, self.family = model, family
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @torch.inference_mode()
    def run(
        self, inputs: Mapping[str, Tensor], *, branch: str = "cond", step: int | None = None, steps: int | None = None
    ) -> Tensor:
        """Return the transformer's output at the graph's inputs by name, given on the model's device and in its dtype.

        Args:
            inputs: The inputs of the graph by name.
            branch: The branch of the guidance: ``cond`` or ``uncond``.
            step: The index of the step, or None.
            steps: The number of steps of the clip, or None.
        """
        del steps
        check_cancelled(self.cancel, "a call of the transformer")
        started = time.perf_counter()
        # The models with a prompt table are too small to gain from threads.
        threads = one_thread() if self.device.type == "cpu" else contextlib.nullcontext()
        with threads, cancel_inside([self.model], self.cancel):
            output: Tensor = self.model(**self.family.forward_kwargs(inputs), return_dict=False)[0]
        wait_for(self.device)
        seconds = time.perf_counter() - started
        timestep = float(inputs["timestep"].flatten()[0])
        self.record(output, step=step or 0, branch=branch, timestep=timestep, seconds=seconds)
        return output


@contextlib.contextmanager
def recorded_calls(transformers: dict[str, nn.Module], on_step: OnStep | None) -> Iterator[dict[str, CallRecorder]]:
    """Record every call of the original transformers while the block runs.

    Args:
        transformers: The transformers by name.
        on_step: A function that gets the record of every call, or None.
    """
    recorders = {name: CallRecorder() for name in transformers}
    for recorder in recorders.values():
        recorder.on_step = on_step
    hooks = _CallHooks()
    handles = []
    for name, module in transformers.items():
        handles.append(module.register_forward_pre_hook(hooks.before, with_kwargs=True))
        handles.append(module.register_forward_hook(hooks.after(recorders[name]), with_kwargs=True))
    try:
        yield recorders
    finally:
        for handle in handles:
            handle.remove()


class _CallHooks:
    """The place of the loop, for the hooks of the original transformers. Branches are told apart by their order."""

    def __init__(self) -> None:
        self.position = LoopPosition()
        self.started = 0.0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the step of a call that begins."""
        del module, args
        timestep = float(kwargs["timestep"].max())
        if not self.position.at(None, timestep):
            self.position.enter(None, timestep)
        self.position.name(None)
        self.started = time.perf_counter()

    def after(self, recorder: CallRecorder) -> Callable[..., None]:
        """Return a hook that records a call that ended."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            del module, args
            sample, position = output[0], self.position
            wait_for(sample.device)
            seconds = time.perf_counter() - self.started
            both = kwargs["hidden_states"].shape[0] > 1
            branch = "cond_uncond" if both else "cond" if len(position.called) == 1 else "uncond"
            timestep = position.timestep or 0.0
            recorder.record(sample, step=position.index, branch=branch, timestep=timestep, seconds=seconds)

        return hook
