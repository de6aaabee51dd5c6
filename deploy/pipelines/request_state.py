"""The requests of a transformer, and the rule that finds the request of a call.

Each request has its own decisions, history and trace. A pipeline calls its transformer without saying for whom. Two
pipelines in two threads may share one transformer, and a pipeline may run another pipeline in its callback. Without
requests, both would decide by each other's outputs. So a request is identified by its owner: the thread, and in the
thread the pipeline whose ``__call__`` is running, else the asyncio task, else nothing more.

Code that calls the transformer by itself may also take turns with another loop in one thread. Or it may run its steps
in one thread after the other (a generator that a web server steps through). Such a call goes to the request that has
had the same text embedding (the very same tensor), if the call continues that request and not the thread's own. All
calls of one step must come from one thread.
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

# Nobody reports the end of a request of a caller without a pipeline. So many of them are kept, to be continued.
MAX_PAUSED = 8


@dataclass
class Position:
    """The place of the pipeline's denoising loop, as far as its calls show it.

    Args:
        given: The step index that the pipeline passed, or None.
        timestep: The timestep of the step, or None before the first call.
        index: The index of the step: the given one, or one that is counted here.
        called: The branches of this step that were called.
        ended: True if the pipeline has said that the request is over.
        announced: True if the request was begun by hand and has no call yet.
    """

    given: int | None = None
    timestep: float | None = None
    index: int = -1
    called: list[str] = field(default_factory=list)
    ended: bool = False
    announced: bool = False

    def begins(self, branch: str | None, step: int | None, timestep: float) -> bool:
        """Return whether a call is the first of a new request.

        Timesteps fall and steps rise within a request. A request that an exception ended is not reported as ended. If
        it did not get beyond its first step, the next request begins at the same step, and a repeated branch shows
        this. Later in a request, the same branch at the same timestep is a step of its own, of a solver that evaluates
        one timestep twice.

        Args:
            branch: The branch that the call names, or None.
            step: The step index that the call passes, or None.
            timestep: The timestep of the call.
        """
        if self.timestep is None or self.ended:
            return not self.announced
        if timestep > self.timestep or (step is not None and self.given is not None and step < self.given):
            return True
        repeated = (step, timestep) == (self.given, self.timestep) and branch in self.called
        return repeated and (step is not None or self.index == 0)

    def move(self, branch: str | None, step: int | None, timestep: float) -> tuple[str, int]:
        """Go to the step of a call.

        Calls that name no branch are told apart by their order.

        Args:
            branch: The branch that the call names, or None.
            step: The step index that the call passes, or None.
            timestep: The timestep of the call.

        Returns:
            The branch and the index of the step.
        """
        if (step, timestep) != (self.given, self.timestep) or branch in self.called:
            self.given, self.timestep, self.called = step, timestep, []
            self.index = self.index + 1 if step is None else step
        self.announced = self.ended = False
        name = f"call {len(self.called)}" if branch is None else branch
        self.called.append(name)
        return name, self.index


@dataclass(eq=False)
class Request:
    """One request: the runner that decides its steps, and its position.

    Args:
        runner: The runner of its steps.
        generation: The number of the transformer's controller that it was begun with.
        position: The place of its denoising loop.
        busy: True while a call of it is running.
        spent: True if a later request has taken over its runner.
        texts: Weak references to the text embeddings that it was called with, by branch.
    """

    runner: StepRunner
    generation: int
    position: Position = field(default_factory=Position)
    busy: bool = False
    spent: bool = False
    texts: dict[str | None, list[weakref.ref[Tensor]]] = field(default_factory=dict)

    def knows(self, branch: str | None, text: Tensor | None) -> bool:
        """Return whether this very tensor was the text embedding of an earlier call of a branch.

        Args:
            branch: The name of the branch, or None.
            text: The text embedding, or None.
        """
        return text is not None and any(known() is text for known in self.texts.get(branch, ()))

    def remember(self, branch: str | None, text: Tensor | None) -> None:
        """Note the text embedding of a call.

        Args:
            branch: The name of the branch, or None.
            text: The text embedding, or None.
        """
        if text is not None and not self.knows(branch, text):
            alive = [known for known in self.texts.get(branch, ()) if known() is not None]
            self.texts[branch] = [*alive, weakref.ref(text)]

    @property
    def reachable(self) -> bool:
        """Return whether one of its embeddings still exists, so that a caller can give it again."""
        return any(known() is not None for texts in self.texts.values() for known in texts)


class _Thread(threading.local):
    """The requests of one thread.

    Attributes:
        owners: A mapping from a pipeline or an asyncio task to its request.
        plain: The request of calls without a pipeline or a task.
        announced: The request that was begun by hand and not called yet.
        last: The request that was begun or called last.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all requests of the thread."""
        self.owners: weakref.WeakKeyDictionary[Any, Request] = weakref.WeakKeyDictionary()
        self.plain: Request | None = None
        self.announced: Request | None = None
        self.last: Request | None = None


class RequestTable:
    """The requests that are open on one transformer.

    Any thread may use the table. Only one caller at a time may call one request.

    Args:
        session: The engines, which serve one call at a time.
        controller: The rule that decides the coming requests.
    """

    def __init__(self, session: EngineSession, controller: StepController) -> None:
        self._session = session
        self._lock = threading.RLock()
        self._generation = 0
        self._thread = _Thread()
        self.use(controller)

    def use(self, controller: StepController) -> None:
        """Decide the coming requests with another controller.

        Requests that other threads run end as they began.

        Args:
            controller: The rule that decides the coming requests.
        """
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
        """Return the request that this thread began or called last, or a new one if it has none."""
        if self._thread.last is None:
            self._thread.last = self._new(None)
        return self._thread.last

    @property
    def latest(self) -> Request:
        """Return the request that this thread called last, or that of any thread if this one has called none."""
        own = self._thread.last
        uncalled = own is None or (own.position.timestep is None and not own.position.announced)
        return self._latest if uncalled and self._latest is not None else self.own

    def begin(self, steps: int | None) -> None:
        """Start a new request with the next call in this thread.

        Args:
            steps: The number of steps of the request, or None if it is not known.
        """
        request = self._new(self._thread.last)
        request.runner.begin_request(steps)
        request.position = Position(announced=True)
        self._thread.announced = self._thread.last = request

    def end(self) -> None:
        """End the request that is running in this thread. Its trace stays."""
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
            branch: The branch that the pipeline names, or None.
            step: The step index that the pipeline passes, or None.
            steps: The number of steps that the pipeline passes, or None.
            timestep: The timestep of the call.
            text: The text embedding of the call, as it was given, or None.

        Yields:
            The runner of the call, its branch, and the index of its step.

        Raises:
            UnsupportedError: Another call of the same request is running.
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
        """Return the request of a call, after beginning it if it is new."""
        owner = _owner()
        # 1. A request that was begun by hand.
        announced, self._thread.announced = self._thread.announced, None
        if announced is not None:
            self._keep(owner, announced)
            return announced
        # 2. A request of another loop or thread that has had this text embedding.
        request = self._of_owner(owner)
        direct = not isinstance(owner, DiffusionPipeline)
        if direct and not (request is not None and request.knows(branch, text)):
            for other in reversed(self._paused):
                if other is not request and other.knows(branch, text) and _continues(other, branch, timestep):
                    self._keep(owner, other)
                    return other
        # 3. The owner's own request, or a new one.
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
        """Return a new request that leaves ``before`` as it is, unless ``before`` cannot be continued any more."""
        if before is None or before.position.ended or before.position.timestep is None:
            return self._again(before)
        return Request(self._runner(before), self._generation)

    def _again(self, before: Request | None) -> Request:
        """Return a new request in the place of ``before``.

        It takes over the runner of ``before`` if that runner is free and has the current controller.
        """
        last = self._thread.last
        if before is None and last is not None and last.position.timestep is None:
            before = last  # the request that ``use`` made, which nobody has called yet
        if before is None or before.busy or before.spent or before.generation != self._generation:
            return Request(self._runner(before or last), self._generation)
        before.spent = True
        return Request(before.runner, self._generation)

    def _runner(self, before: Request | None) -> StepRunner:
        runner = StepRunner(self._session, self.controller.fresh())
        runner.on_step = before.runner.on_step if before is not None else None
        return runner


def _continues(request: Request, branch: str | None, timestep: float) -> bool:
    """Return whether a call that another loop or thread makes continues ``request``, and does not start a new one."""
    position = request.position
    if request.busy or position.ended or position.timestep is None or timestep > position.timestep:
        return False
    return timestep < position.timestep or (branch is not None and branch not in position.called)


def _owner() -> Any:
    """Return the innermost pipeline that is running in this thread, else the asyncio task, else None."""
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
