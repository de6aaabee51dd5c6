"""Which request a call of the transformer belongs to: each has decisions, history and trace of its own.

A pipeline calls its transformer without saying for whom. Two pipelines in two threads may share one transformer, and a
pipeline may run another one in its callback; both would otherwise decide by each other's outputs. So a request is known
by who runs it: the thread, and in it the pipeline whose ``__call__`` is running, else the asyncio task, else nothing more.

Code that calls the transformer by itself may also take turns with another loop in one thread, or run its steps in one
thread after the other (a generator that a web server steps through). Such a call goes to the request that has had the same
text embedding, the very tensor, if it continues that one and not the thread's own. All calls of one step must come from
one thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.errors import UnsupportedError

__all__ = ["Position", "Request", "RequestTable"]

# Requests of callers without a pipeline, of which nobody says when they end: so many are kept to go on with.
MAX_PAUSED = 8


@dataclass
class Position:
    """Where the pipeline's denoising loop is, from what its calls say.

    Args:
        given: the step index it passed. index: the same, or counted here. called: branches of this step.
        ended: the pipeline has said that the request is over. announced: begun by hand, without a call yet.
    """

    given: int | None = None
    timestep: float | None = None
    index: int = -1
    called: list[str] = field(default_factory=list)
    ended: bool = False
    announced: bool = False

    def begins(self, branch: str | None, step: int | None, timestep: float) -> bool:
        """Whether a call is the first of a new request.

        Timesteps fall and steps rise within a request. A request that an exception ended is not reported as ended; if
        it came no further than its first step, the next one begins at the same step and shows by a repeated branch. Later
        in a request the same branch at the same timestep is a step of its own, of a solver that evaluates one twice.
        """
        if self.timestep is None or self.ended:
            return not self.announced
        if timestep > self.timestep or (step is not None and self.given is not None and step < self.given):
            return True
        repeated = (step, timestep) == (self.given, self.timestep) and branch in self.called
        return repeated and (step is not None or self.index == 0)

    def move(self, branch: str | None, step: int | None, timestep: float) -> tuple[str, int]:
        """Go to the step of this call; its branch and index. Calls that name no branch are told apart by their order."""
        if (step, timestep) != (self.given, self.timestep) or branch in self.called:
            self.given, self.timestep, self.called = step, timestep, []
            self.index = self.index + 1 if step is None else step
        self.announced = self.ended = False
        name = f"call {len(self.called)}" if branch is None else branch
        self.called.append(name)
        return name, self.index


@dataclass(eq=False)
class Request:
    """One request: what decides it, and where it is.

    Args:
        generation: which controller of the transformer it was begun with.
        busy: a call of it is running. spent: a later request has taken its runner over.
        texts: by branch, the embeddings it was called with.
    """

    runner: StepRunner
    generation: int
    position: Position = field(default_factory=Position)
    busy: bool = False
    spent: bool = False
    texts: dict[str | None, list[weakref.ref[Tensor]]] = field(default_factory=dict)

    def knows(self, branch: str | None, text: Tensor | None) -> bool:
        """Whether this very tensor was the text embedding of an earlier call of ``branch``."""
        return text is not None and any(known() is text for known in self.texts.get(branch, ()))

    def remember(self, branch: str | None, text: Tensor | None) -> None:
        """Note the text embedding of a call."""
        if text is not None and not self.knows(branch, text):
            alive = [known for known in self.texts.get(branch, ()) if known() is not None]
            self.texts[branch] = [*alive, weakref.ref(text)]

    @property
    def reachable(self) -> bool:
        """Whether one of its embeddings is still there to be given again."""
        return any(known() is not None for texts in self.texts.values() for known in texts)


class _Thread(threading.local):
    """What one thread runs.

    Args:
        owners: pipeline or asyncio task -> its request. plain: the request of calls without either.
        announced: begun by hand and not called yet. last: the one that was begun or called last.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all of it."""
        self.owners: weakref.WeakKeyDictionary[Any, Request] = weakref.WeakKeyDictionary()
        self.plain: Request | None = None
        self.announced: Request | None = None
        self.last: Request | None = None


class RequestTable:
    """The requests that are open on one transformer. Any thread may use it; one request is called by one at a time.

    Args:
        session: the engines, which serve one call at a time. controller: how the coming requests decide.
    """

    def __init__(self, session: EngineSession, controller: StepController) -> None:
        self._session = session
        self._lock = threading.RLock()
        self._generation = 0
        self._thread = _Thread()
        self.use(controller)

    def use(self, controller: StepController) -> None:
        """Decide the coming requests with another controller. Requests that other threads run end as they began."""
        first = Request(StepRunner(self._session, controller), self._generation + 1)
        with self._lock:
            self._generation += 1
            self.controller = controller
            self._paused: list[Request] = []
            self._latest: Request | None = None
        self._thread.clear()
        self._thread.last = first

    @property
    def own(self) -> Request:
        """The request that this thread began or called last; a new one, if it has none."""
        if self._thread.last is None:
            self._thread.last = self._new(None)
        return self._thread.last

    @property
    def latest(self) -> Request:
        """The request that this thread called last; that of any thread, if this one has called none."""
        own = self._thread.last
        uncalled = own is None or (own.position.timestep is None and not own.position.announced)
        return self._latest if uncalled and self._latest is not None else self.own

    def begin(self, steps: int | None) -> None:
        """The next call in this thread starts a new request of ``steps`` steps."""
        request = self._new(self._thread.last)
        request.runner.begin_request(steps)
        request.position = Position(announced=True)
        self._thread.announced = self._thread.last = request

    def end(self) -> None:
        """The request that is running here is over; its trace stays."""
        request = self._of_owner(_owner())
        if request is not None and not request.busy:
            request.position.ended = True
            request.runner.forget_outputs()
            with self._lock:
                if request in self._paused:
                    self._paused.remove(request)

    @contextmanager
    def call(
        self, branch: str | None, step: int | None, steps: int | None, timestep: float, text: Tensor | None
    ) -> Iterator[tuple[StepRunner, str, int]]:
        """Run one call of the transformer in the ``with`` block.

        Args:
            branch, step, steps: as the pipeline names them; None where it does not. timestep: of the call.
            text: its text embedding, as it was given.

        Yields:
            What runs it, and its branch and step.

        Raises:
            UnsupportedError: another call of the same request is running.
        """
        with self._lock:
            request = self._find(branch, step, steps, timestep, text)
            if request.busy:
                raise UnsupportedError(
                    "two calls of one request at once",
                    fix="run the steps of a request one after the other; a second request needs a thread, a task, a pipeline "
                    "or a transformer of its own: DvdqTransformer(transformer.session, controller)",
                )
            request.busy = True
            self._thread.last = self._latest = request
        try:
            request.remember(branch, text)
            name, index = request.position.move(branch, step, timestep)
            yield request.runner, name, index
        finally:
            request.busy = False

    def _find(
        self, branch: str | None, step: int | None, steps: int | None, timestep: float, text: Tensor | None
    ) -> Request:
        """The request of a call, begun if it is a new one."""
        owner = _owner()
        announced, self._thread.announced = self._thread.announced, None
        if announced is not None:
            self._keep(owner, announced)
            return announced
        request = self._of_owner(owner)
        direct = not isinstance(owner, DiffusionPipeline)
        if direct and not (request is not None and request.knows(branch, text)):
            for other in reversed(self._paused):
                if other is not request and other.knows(branch, text) and _continues(other, branch, timestep):
                    self._keep(owner, other)
                    return other
        if request is None or request.position.begins(branch, step, timestep):
            request = self._new(request) if direct else self._again(request)
            request.runner.begin_request(steps)
            self._keep(owner, request)
        return request

    def _of_owner(self, owner: Any) -> Request | None:
        return self._thread.plain if owner is None else self._thread.owners.get(owner)

    def _keep(self, owner: Any, request: Request) -> None:
        if owner is None:
            self._thread.plain = request
        else:
            self._thread.owners[owner] = request
        direct = not isinstance(owner, DiffusionPipeline)
        others = [other for other in self._paused if other is not request and (other.reachable or other.busy)]
        self._paused = [*others, request][-MAX_PAUSED:] if direct else others

    def _new(self, before: Request | None) -> Request:
        """A request that leaves ``before`` as it is, unless nothing can go on with that one."""
        if before is None or before.position.ended or before.position.timestep is None:
            return self._again(before)
        return Request(self._runner(before), self._generation)

    def _again(self, before: Request | None) -> Request:
        """A request in the place of ``before``, with its runner where that is free and has the controller of now."""
        last = self._thread.last
        if before is None and last is not None and last.position.timestep is None:
            before = last  # what ``use`` made, and nobody has called
        if before is None or before.busy or before.spent or before.generation != self._generation:
            return Request(self._runner(before or last), self._generation)
        before.spent = True
        return Request(before.runner, self._generation)

    def _runner(self, before: Request | None) -> StepRunner:
        runner = StepRunner(self._session, self.controller.fresh())
        runner.on_step = before.runner.on_step if before is not None else None
        return runner


def _continues(request: Request, branch: str | None, timestep: float) -> bool:
    """Whether a call that another loop or thread makes goes on with ``request``, and is no start of its own."""
    position = request.position
    if request.busy or position.ended or position.timestep is None or timestep > position.timestep:
        return False
    return timestep < position.timestep or (branch is not None and branch not in position.called)


def _owner() -> Any:
    """The pipeline that is running in this thread, the innermost; else the asyncio task; else None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if isinstance(caller, DiffusionPipeline):
                return caller
        frame = frame.f_back
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
