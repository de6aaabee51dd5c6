"""Classifier-free guidance on two devices: while one session runs a branch, a second session runs the other one.

A denoising step calls the transformer twice, with the same latents and another text, and nothing of the first call goes
into the second. The pair learns in a request's first step which text follows which. From the second step on, the second
branch is begun with the first, on the other session and at the same bits. When the second call comes, its inputs are
compared with those that were begun, value by value; only if all are equal the result is taken. So every output is what
one session would have given, wherever the decisions of the step controller lead: a skipped step begins nothing, and a step
that runs again on the high engine begins its other branch again, too.

With 8-bit attention the second session computes by the library that the first one has chosen: the time of a library decides
there, so that two sessions may choose differently. A branch that it cannot compute so runs on the first session.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.sessions.base import EngineSession, WrappedSession
from dvdquant.errors import ChoiceError, UnsupportedError

__all__ = ["GuidancePair", "paired"]

log = logging.getLogger(__name__)

# What the branches of a step share in every family; their other inputs belong to the text or do not change in a request.
_SHARED = ("hidden_states", "timestep")
Inputs = Mapping[str, Tensor]


@dataclass
class _Begun:
    """A branch that the second session runs.

    Args:
        inputs: Its inputs.
        bits: Its activation bits.
        choice: What the first session has chosen for attention, by which the second computes; None before that, and in 16 bit.
        output: What it gives, on the device of the first session.
    """

    inputs: dict[str, Tensor]
    bits: int
    choice: str | None
    output: Future[Tensor]


class _Loop(threading.local):
    """The state of one thread's loop.

    Attributes:
        before: The inputs of the last call that the first session ran.
        first: The inputs of the branch that steps begin with, but those that the branches share.
        second: The same of the other branch.
        begun: What the second session runs for the next call.
    """

    def __init__(self) -> None:
        self.before: dict[str, Tensor] | None = None
        self.first: dict[str, Tensor] | None = None
        self.second: dict[str, Tensor] = {}
        self.begun: _Begun | None = None


class GuidancePair(WrappedSession):
    """Two sessions of one transformer, of which the second runs the second branch of guidance.

    Threads may share it. Calls that do not come in pairs run on the first session.

    Args:
        inner: The session that every call is for.
        peer: A session of the same export, backend and bits on another device, or on the same one. It is closed with the pair.

    Attributes:
        paired: The number of calls that the second session answered.
        wasted: The number of calls that it ran for nothing.

    Raises:
        UnsupportedError: The sessions are not of one transformer and backend, so their outputs may differ.
    """

    def __init__(self, inner: EngineSession, peer: EngineSession) -> None:
        kinds = [
            (s.artifact.root, s.component, s.backend, s.bits, s.dtype, s.device.type, s.fused, s.attention is None)
            for s in (inner, peer)
        ]
        if kinds[0] != kinds[1] or inner is peer:
            raise UnsupportedError(
                f"outputs of {inner.backend} on {inner.device} and {peer.backend} on {peer.device} may differ",
                fix="use two devices of one kind, with the same backend; or --no-fuse, where one of them alone fuses layers",
            )
        super().__init__(inner)
        self.peer = peer
        self.paired = self.wasted = 0
        self._loop = _Loop()
        self._refused: str | None = None  # a choice that the second session cannot follow
        self._counting = threading.Lock()
        # PyTorch keeps the number of threads by thread, and sums in another order with another number.
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "guidance", initializer=lambda: torch.set_num_threads(threads))

    def run(self, inputs: Inputs, bits: int) -> Tensor:
        """See :class:`EngineSession`."""
        loop, begun = self._loop, self._loop.begun
        loop.begun = None
        if begun is not None:
            if begun.bits == bits and begun.choice == self._choice() and _equal(begun.inputs, inputs):
                try:
                    output = begun.output.result()
                except ChoiceError as error:
                    self._refuse(begun.choice, error)
                else:
                    self._count(paired=1)
                    return output
            # The step runs again, at other bits or with other attention, or the caller does something else: it is not used.
            self._count(wasted=1)
            begun.output.cancel()
        self._learn(loop, inputs)
        if loop.first is not None and not self.closed and _equal(loop.first, inputs):
            loop.begun = self._begin({**{name: inputs[name] for name in _SHARED}, **loop.second}, bits)
        loop.before = dict(inputs)
        return self.inner.run(inputs, bits)

    def _choice(self) -> str | None:
        """Return what the first session has chosen for attention."""
        return None if self.inner.attention is None else self.inner.attention.choice

    def _refuse(self, choice: str | None, error: ChoiceError) -> None:
        """Begin nothing on the second session any more where it cannot follow a choice."""
        if choice is not None and choice != self._refused:
            self._refused = choice
            log.warning("%s: both branches of guidance run on %s: %s", self.component, self.device, error.what)

    def _learn(self, loop: _Loop, inputs: Inputs) -> None:
        """Note the order of the branches where two calls in a row are of one step."""
        before = loop.before
        if before is None or before.keys() != inputs.keys():
            return
        own = {name: value for name, value in inputs.items() if name not in _SHARED}
        if _equal({name: before[name] for name in _SHARED}, inputs) and not _equal(own, before):
            loop.first = {name: before[name].clone() for name in own}
            loop.second = {name: value.clone() for name, value in own.items()}

    def _begin(self, inputs: dict[str, Tensor], bits: int) -> _Begun | None:
        """Begin a call on the second session. The caller may change its tensors meanwhile, so they are copied.

        Returns:
            What was begun, or None if the second session cannot follow the first, or another thread closes the pair.
        """
        choice = self._choice()
        if choice is not None and choice == self._refused:
            return None
        inputs = {name: value.clone() if name in _SHARED else value for name, value in inputs.items()}
        if any(value.is_cuda for value in inputs.values()):
            torch.cuda.current_stream(self.device).synchronize()  # the other thread has a stream of its own

        def run() -> Tensor:
            self.peer.follow_attention(choice)
            output = self.peer.run(inputs, bits).to(self.device)
            if output.is_cuda:
                torch.cuda.current_stream(self.device).synchronize()
            return output

        try:
            return _Begun(inputs, bits, choice, self._pool.submit(run))
        except RuntimeError:  # the pool is shut down
            return None

    def _count(self, paired: int = 0, wasted: int = 0) -> None:
        with self._counting:
            self.paired += paired
            self.wasted += wasted

    def set_loras(self, specs: Sequence[LoraSpec]) -> None:
        """See :meth:`EngineSession.set_loras`; of both sessions, or of none."""
        earlier = self.inner.loras
        super().set_loras(specs)
        try:
            self.peer.set_loras(specs)
        except BaseException:
            super().set_loras(earlier)
            raise
        self._loop = _Loop()

    def _resident_bytes(self) -> dict[str, int]:
        one, other = self.inner.resident_bytes(), self.peer.resident_bytes()
        return {name: one[name] + other[name] for name in one}

    def _close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super()._close()
        self.peer.close()


def paired(session: EngineSession, opener: Callable[[str], EngineSession], device: str) -> GuidancePair:
    """Return a session with a second one on another device.

    Args:
        session: The first session. It is closed where the second cannot be opened.
        opener: Opens the second session on a device.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DvdquantError: The second session cannot be opened, or is of another kind.
    """
    peer: EngineSession | None = None
    try:
        peer = opener(device)
        return GuidancePair(session, peer)
    except BaseException:
        if peer is not None:
            peer.close()
        session.close()
        raise


def _equal(some: Inputs, inputs: Inputs) -> bool:
    """Return whether all of ``some`` have the same values, shapes and dtypes among ``inputs``."""
    return all(
        name in inputs and value.dtype == inputs[name].dtype and torch.equal(value, inputs[name].to(value.device))
        for name, value in some.items()
    )
