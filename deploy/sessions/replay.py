"""Steps of a PyTorch session as CUDA graphs: one launch in place of thousands, where a step is so short that launches count.

A graph repeats what was captured: the same kernels on the same memory. So a step is captured for its bit-width and its shapes,
after one step that ran as usual and settled what is settled once: weights that are prepared, blocks that are compiled, the
attention that is chosen. A step that cannot be captured, or whose repetition gives something else, runs as usual from then on,
and the log says why.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dvdquant.system.capture import Step, capture_step

__all__ = ["MOST_CAPTURES", "MOST_TOKENS", "GraphReplay", "failure_text", "why_not"]

log = logging.getLogger(__name__)

# From here on a step's kernels take so long that their launches are hidden behind them: 60 launches a block take about .3 ms.
MOST_TOKENS = 4000
# Each holds the memory of a step.
MOST_CAPTURES = 4
# The most that a repeated step may differ from one that ran as usual, as a relative L2 distance. Kernels whose sums have no fixed
# order stay far below it; a graph without the step's kernels gives what was in its memory before.
MAX_CHANGE = 0.01
# What a session says where it captures nothing.
RANGED = "the export serves ranges of sizes"
LONG = f"a step has more than {MOST_TOKENS} tokens, whose kernels take longer than their launches"
HOST = "there is no CUDA device"

Key = tuple[Hashable, tuple[tuple[str, torch.Size, torch.dtype], ...]]


@dataclass
class _Capture:
    """A captured step: what it reads, what it writes, and what repeats it."""

    inputs: dict[str, Tensor]
    output: Tensor
    replay: Callable[[], Any]


def why_not(device: torch.device, dynamic: bool, tokens: int) -> str | None:
    """Return in words why a session's steps are not captured, or None where they are.

    Args:
        device: The device of the session.
        dynamic: Whether its sizes have ranges.
        tokens: The tokens of its largest step.
    """
    if device.type != "cuda":
        return HOST
    if dynamic:
        return RANGED
    return LONG if tokens > MOST_TOKENS else None


def failure_text(error: BaseException) -> str:
    """Return the first line of an error, or its class where it says nothing.

    Args:
        error: What a capture raised.
    """
    said = str(error).strip()
    return said.splitlines()[0][:200] if said else type(error).__name__


class GraphReplay:
    """The captured steps of one session.

    Args:
        step: Runs one step on the session's device.
        name: What the log calls the model.
        device: The session's device.

    Attributes:
        failed: Why nothing is captured any more, or None.
    """

    def __init__(self, step: Step, name: str, device: torch.device) -> None:
        self._step, self._name, self._device = step, name, device
        self._captures: OrderedDict[Key, _Capture] = OrderedDict()
        self._seen: set[Key] = set()
        self.failed: str | None = None

    def __call__(self, inputs: dict[str, Tensor], state: Hashable) -> Tensor:
        """Run a step, or repeat the one that was captured for these shapes.

        Args:
            inputs: The inputs of the step, on the device.
            state: What else the step depends on, such as the bit-width that the model is set to.

        Returns:
            The output, in memory that the next step leaves alone.
        """
        key = (state, tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items()))
        if self.failed is not None:
            return self._step(inputs)
        if key not in self._seen:
            self._seen.add(key)
            return self._step(inputs)
        if key not in self._captures and not self._capture(key, inputs):
            return self._step(inputs)
        capture = self._captures[key]
        self._captures.move_to_end(key)
        for name, tensor in inputs.items():
            capture.inputs[name].copy_(tensor)
        capture.replay()
        return capture.output.clone()

    def forget(self) -> None:
        """Drop all captures: the model has changed."""
        self._captures.clear()
        self._seen.clear()

    def _capture(self, key: Key, inputs: dict[str, Tensor]) -> bool:
        """Capture a step, the least recently used one giving way; return whether that worked."""
        while len(self._captures) >= MOST_CAPTURES:
            self._captures.popitem(last=False)
        try:
            self._captures[key] = self._captured(inputs)
        except Exception as error:  # noqa: BLE001 - an error of the step itself comes again when it runs as usual
            self.failed = failure_text(error)
        if self.failed is None:
            log.info("%s: a step is captured as a CUDA graph", self._name)
            return True
        log.warning("%s: steps are not captured as CUDA graphs: %s", self._name, self.failed)
        self._captures.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what the captures held, which PyTorch would keep
        return False

    def _captured(self, inputs: dict[str, Tensor]) -> _Capture:
        """Return a captured step that was tried."""
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        output, replay = capture_step(self._step, held, self._device)
        self._try(held, output, replay)
        return _Capture(held, output, replay)

    def _try(self, inputs: dict[str, Tensor], output: Tensor, replay: Callable[[], Any]) -> None:
        """Repeat a captured step once.

        Raises:
            RuntimeError: It gives something else than the step itself.
        """
        wanted = self._step(inputs).float()
        output.zero_()
        replay()
        change = float((output.float() - wanted).norm())
        # Not "change > …": a NaN is a change too.
        if not change <= MAX_CHANGE * float(wanted.norm()):
            raise RuntimeError("a captured step gives something else when it is repeated")

    @property
    def nbytes(self) -> int:
        """Return the bytes of the inputs and outputs that are held; what is in between is the allocator's."""
        held = (tensor for c in self._captures.values() for tensor in (*c.inputs.values(), c.output))
        return sum(tensor.nbytes for tensor in held)
