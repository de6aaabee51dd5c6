"""The requests of a transformer, and the rule that finds the request of a call.

Each request has its own decisions, history and trace. A pipeline calls its transformer without saying for whom. Two
pipelines in two threads may share one transformer, and a pipeline may run another pipeline in its callback. Without
requests, both would decide by each other's outputs. So a request is identified by its owner: the pipeline whose
``__call__`` is running in this thread, else the caller. A caller is an asyncio task, or else a thread.

What a caller asks of its coming requests (``begin_request``, ``on_step``, ``cancel``) follows the context, as a
``contextvars.ContextVar`` does: it holds in this thread or task, in tasks that are made from there, and in
``asyncio.to_thread``. A pool of threads does not get the context. If a request begins there while another thread still
waits with something asked for, nobody can tell whether it was meant. That is refused.

Code that calls the transformer by itself may also take turns with another loop in one thread. Or it may run its steps
in one thread after the other (a generator that a web server steps through). Such a call goes to the request that its
latents come from (see :mod:`.continuity`), whether or not loops share embeddings. Latents that come from no open request
begin a new one. Where it turns out that a call was counted for the wrong loop, both are refused: that may happen to a loop
that starts from a picture of the other one. What is not told apart is a second loop from the very same noise and
embedding that begins right after the first step of the other one. All calls of one step must come from one caller.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from diffusers import DiffusionPipeline
from torch import Tensor

from dvdquant.deploy.cancel import CancelSignal
from dvdquant.deploy.pipelines.continuity import BETTER, ROUNDING, Fit
from dvdquant.deploy.pipelines.request import Caller, Callers, Request, running_pipeline
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.switching.controller import OnStep, StepController
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.errors import UnsupportedError

__all__ = ["RequestTable"]


# Nobody reports the end of a request of a caller without a pipeline. So many of them are kept, to be continued.
MAX_PAUSED = 8


class _Token:
    """A mark in a context. It lives as long as the contexts that have it."""


@dataclass(eq=False)
class _Wish:
    """Something that was asked of the coming requests of a context.

    Args:
        what: The name of what was called or set, for messages.
        caller: The caller that asked.
        pipeline: A weak reference to the pipeline that was running then, or None.
        request: The request that was begun by hand, until it is called.
        on_step: The callback that was set, or None.
        cancel: The event that was set, or None.
        open: True until a call has got it.
        token: A weak reference to the mark in the contexts that it holds in.
    """

    what: str
    caller: Caller
    pipeline: weakref.ref[DiffusionPipeline] | None = None
    request: Request | None = None
    on_step: OnStep | None = None
    cancel: CancelSignal | None = None
    open: bool = True
    token: weakref.ref[_Token] | None = None

    def close(self) -> None:
        """Note that a call has got it, or that none will."""
        self.open, self.request = False, None

    @property
    def lost(self) -> bool:
        """Return whether its contexts have ended, so that no call can get it any more."""
        return self.token is None or self.token() is None


@dataclass(frozen=True)
class _Call:
    """A call of the transformer.

    Args:
        caller: Who makes it.
        pipeline: The pipeline that makes it, or None.
        branch: The branch that it names, or None.
        step: The step index that it passes, or None.
        timestep: Its timestep.
        text: Its text embedding, or None.
        latents: Its latents [B, ...].
    """

    caller: Caller
    pipeline: DiffusionPipeline | None
    branch: str | None
    step: int | None
    timestep: float
    text: Tensor | None
    latents: Tensor


@dataclass(frozen=True)
class Place:
    """The place of a call.

    Args:
        runner: The runner of its request.
        branch: The name of its branch.
        step: The index of its step.
        request: The request, if no pipeline runs it.
    """

    runner: StepRunner
    branch: str
    step: int
    request: Request | None

    def note(self, latents: Tensor, output: Tensor) -> None:
        """Note what the call was given and what it gave, by which the next call of its loop is known.

        Args:
            latents: The latents, as they were given [B, ...].
            output: The transformer's output [B, ...].
        """
        if self.request is not None:
            self.request.path.note(latents, output)


@dataclass(frozen=True)
class _Asked:
    """The wishes of a context for its coming requests.

    Args:
        begun: The wish for a request with a number of steps, or None.
        heard: The wish for a callback and an event, or None.
    """

    begun: _Wish | None = None
    heard: _Wish | None = None


# The mark that each table has in this context. The table keeps what was asked for: a callback may hold the table itself,
# and would never be freed if the context held the callback.
_TOKENS: ContextVar[weakref.WeakKeyDictionary[RequestTable, _Token]] = ContextVar("dvdquant_tokens")


class RequestTable:
    """The requests that are open on one transformer.

    Any thread may use the table. Only one caller at a time may call one request.

    Args:
        session: The engines, which serve one call at a time.
        controller: The rule that decides the coming requests.
    """

    def __init__(self, session: EngineSession, controller: StepController) -> None:
        StepRunner(session, controller)  # refuses a controller that the session cannot serve
        self._session = session
        self._lock = threading.RLock()
        self._generation = 0
        self._thread = Callers()
        self._paused: list[Request] = []
        self._asked: weakref.WeakKeyDictionary[_Token, _Asked] = weakref.WeakKeyDictionary()
        self._wishes: list[_Wish] = []
        self._latest: Request | None = None
        self.controller = controller

    def use(self, controller: StepController) -> None:
        """Decide the coming requests with another controller.

        Requests that other callers run end as they began. What was asked of coming requests still holds.

        Args:
            controller: The rule that decides the coming requests.
        """
        StepRunner(self._session, controller)
        caller = self._thread.caller
        with self._lock:
            self._generation += 1
            self.controller = controller
            self._paused = [request for request in self._paused if request.caller is not caller]
            self._latest = None
        caller.clear()

    @property
    def own(self) -> Request:
        """Return the request that this caller began or called last, or a new one if it has none."""
        caller = self._thread.caller
        if caller.last is None:
            caller.last = self._new(caller)
        return caller.last

    @property
    def latest(self) -> Request:
        """Return the request that this caller called last, or that of any caller if this one has called none."""
        own = self._thread.caller.last
        return self._latest if (own is None or own.fresh) and self._latest is not None else self.own

    @property
    def on_step(self) -> OnStep | None:
        """Return the callback of the requests of this context, or None."""
        heard = self._here().heard
        return None if heard is None else heard.on_step

    @property
    def cancel(self) -> CancelSignal | None:
        """Return the event that cancels the requests of this context, or None."""
        heard = self._here().heard
        return None if heard is None else heard.cancel

    def listen(self, on_step: OnStep | None) -> None:
        """Call ``on_step`` after every call in this context, and of the request that is running here.

        Args:
            on_step: The callback, or None for no callback.
        """
        self._hear("runner.on_step", on_step, self.cancel, on_step is not None)

    def cancel_by(self, cancel: CancelSignal | None) -> None:
        """Stop requests of this context, and the one that is running here, once the event is set.

        Args:
            cancel: The event, or None for no event.
        """
        self._hear("cancel", self.on_step, cancel, cancel is not None)

    def _hear(self, what: str, on_step: OnStep | None, cancel: CancelSignal | None, new: bool) -> None:
        """Ask for a callback and an event, of which one is new."""
        caller = self._thread.caller
        with self._lock:
            before = self._here().heard
            waits = before is not None and before.open and before.caller is caller
            wish = _Wish(
                what, caller, on_step=on_step, cancel=cancel, open=new or (waits and not _silent(on_step, cancel))
            )
            if before is not None and before.caller is caller:
                before.close()  # the new one asks for both
            self._ask(wish, _Asked(self._here().begun, wish))
            if caller.last is not None:
                caller.last.runner.on_step, caller.last.runner.cancel = on_step, cancel

    def begin(self, steps: int | None) -> None:
        """Start a new request with the next call in this context.

        Args:
            steps: The number of steps of the request, or None if it is not known.
        """
        caller, pipeline = self._thread.caller, running_pipeline()
        with self._lock:
            request = self._new(caller)
            request.runner.begin_request(steps)
            request.steps, request.announced = steps, True
            place = None if pipeline is None else weakref.ref(pipeline)
            wish = _Wish("begin_request", caller, place, request)
            self._ask(wish, _Asked(wish, self._here().heard))
            caller.last = request

    def end(self) -> None:
        """End the request that is running here. Its trace stays.

        A request that was begun by hand before this pipeline began is not for a later one: an interrupted pipeline does
        not come to all of its transformers.
        """
        caller, pipeline = self._thread.caller, running_pipeline()
        with self._lock:
            begun = self._here().begun
            if pipeline is not None and begun is not None and begun.request is not None:
                within = begun.pipeline is not None and begun.pipeline() is pipeline
                if not within:
                    begun.request.announced = False
                    begun.close()
            request = caller.of(pipeline)
            if request is not None and not request.busy:
                request.ended = True
                request.runner.forget_outputs()
                request.path.clear()
                if request in self._paused:
                    self._paused.remove(request)

    def forget(self, caller: Caller) -> None:
        """Forget what a caller has asked for.

        Args:
            caller: The caller, which has ended.
        """
        with self._lock:
            for wish in self._wishes:
                if wish.caller is caller:
                    wish.close()

    def forget_outputs(self) -> None:
        """Free the outputs that open requests keep for their next step, when the engines are closed."""
        with self._lock:
            requests = [*self._paused, *([] if self._latest is None else [self._latest])]
            for request in requests:
                if not request.busy:
                    request.runner.forget_outputs()
                    request.path.clear()

    @contextmanager
    def call(
        self,
        branch: str | None,
        step: int | None,
        steps: int | None,
        timestep: float,
        text: Tensor | None,
        latents: Tensor,
    ) -> Iterator[Place]:
        """Run one call of the transformer in the ``with`` block.

        A call that an exception ends counts as not made: it may be made again.

        Args:
            branch: The branch that the pipeline names, or None.
            step: The step index that the pipeline passes, or None.
            steps: The number of steps that the pipeline passes, or None.
            timestep: The timestep of the call.
            text: The text embedding of the call, as it was given, or None.
            latents: The latents of the call, as they were given [B, ...].

        Yields:
            The place of the call: its runner, its branch and the index of its step.

        Raises:
            UnsupportedError: Another call of the same request is running, another thread has begun a request by hand
                that may be this one, or calls of two loops were taken for those of one.
        """
        taken: Request | None = None
        call = _Call(self._thread.caller, running_pipeline(), branch, step, timestep, text, latents)
        try:
            with self._lock:
                request = self._find(call, steps)
                if request.busy:
                    raise UnsupportedError(
                        "two calls of one request at once",
                        fix="run the steps of a request one after the other; a second request needs a thread, a task, "
                        "a pipeline or a transformer of its own: DvdqTransformer(transformer.session, controller)",
                    )
                taken = request
                request.busy = True
                request.caller = call.caller
                call.caller.last = self._latest = request
                heard = self._here().heard
                if heard is not None:
                    request.runner.on_step, request.runner.cancel = heard.on_step, heard.cancel
                    heard.close()
            before = replace(request.position, called=[*request.position.called])
            announced = request.announced
            try:
                request.remember(branch, text)
                name, index = request.position.move(branch, step, timestep)
                request.announced = request.ended = False
                yield Place(request.runner, name, index, request if call.pipeline is None else None)
            except BaseException:
                request.position, request.announced = before, announced
                raise
        finally:
            if taken is not None:
                taken.busy = False

    # ------------------------------------------------------------------------------------------- the request of a call

    def _find(self, call: _Call, steps: int | None) -> Request:
        """Return the request of a call, after beginning it if it is new; ``steps`` is what its pipeline says."""
        caller, pipeline = call.caller, call.pipeline
        # 1. A request that was begun by hand.
        begun = self._here().begun
        if begun is not None and begun.request is not None:
            request = begun.request
            self._refuse_lost(begun=True)
            if request.generation != self._generation:
                request.runner, request.generation = self._new(caller).runner, self._generation
                request.runner.begin_request(request.steps)
            begun.close()
            self._keep(caller, pipeline, request)
            return request
        # 2. Code that calls the transformer by itself: the loop that the latents come from.
        own = caller.of(pipeline)
        if pipeline is None:
            open_one = self._loop(own, call)
            if open_one is not None:
                self._keep(caller, None, open_one)
                return open_one
        # 3. A new request, or the pipeline's own.
        if pipeline is None or own is None or own.begins(call.branch, call.step, call.timestep):
            self._refuse_lost(begun=False)
            own = self._new(caller)
            own.runner.begin_request(steps)
            self._keep(caller, pipeline, own)
        return own

    def _loop(self, own: Request | None, call: _Call) -> Request | None:
        """Return the open request that a call continues, or None if it begins a new one.

        Raises:
            UnsupportedError: The call shows that another loop's call was counted for its request.
        """
        begins = own is None or own.begins(call.branch, call.step, call.timestep)
        mine = None if own is None else own.path.fit(call.latents)
        # 1. What shows that two loops were taken for one.
        if own is not None:
            if own.mixed and not begins:
                _refuse_turns()
            # Another caller has this request now, and has made this call of it.
            again = call.step is None and call.timestep == own.position.timestep
            if own.caller is not call.caller and again and call.branch in own.position.called:
                _refuse_turns(own)
            if mine is not None and not own.mixed and not own.ended and own.path.foreign_last(mine):
                _refuse_turns(own)
        # 2. The caller's own request, if the latents come from it.
        continues = own is not None and not begins and _goes_on(own, mine, call)
        if continues and (mine is None or mine.residual < ROUNDING):
            return own
        # 3. The request of another loop, if they come rather from that one.
        other, fit = self._other(own, call)
        if other is not None and fit is not None:
            if continues and mine is not None and mine.dependent and fit.residual > BETTER * mine.residual:
                return own
            if other.path.foreign_last(fit):
                _refuse_turns(other)
            return other
        return own if continues else None

    def _other(self, own: Request | None, call: _Call) -> tuple[Request | None, Fit | None]:
        """Return the open request of another loop that the latents of a call come from best, and how they fit."""
        best: tuple[Request | None, Fit | None] = (None, None)
        for other in reversed(self._paused):
            if other is own or other.mixed or not other.continues(call.branch, call.timestep):
                continue
            if other.knows_another(call.branch, call.text):
                continue
            fit = other.path.fit(call.latents)
            if fit is None or not fit.dependent or fit.first:
                continue
            if fit.same and call.timestep != other.position.timestep:
                continue  # a loop that goes on has moved
            if best[1] is None or fit.residual < best[1].residual:
                best = other, fit
        return best

    def _keep(self, caller: Caller, pipeline: DiffusionPipeline | None, request: Request) -> None:
        caller.keep(pipeline, request)
        others = [other for other in self._paused if other is not request and (other.reachable or other.busy)]
        self._paused = [*others, request][-MAX_PAUSED:] if pipeline is None else others

    def _new(self, caller: Caller) -> Request:
        runner = StepRunner(self._session, self.controller.fresh())
        heard = self._here().heard
        if heard is not None:
            runner.on_step, runner.cancel = heard.on_step, heard.cancel
        return Request(runner, self._generation, caller)

    # --------------------------------------------------------------------------------- what is asked of coming requests

    def _here(self) -> _Asked:
        """Return what was asked for in this context."""
        tokens = _TOKENS.get(None)
        token = None if tokens is None else tokens.get(self)
        return _Asked() if token is None else self._asked.get(token, _Asked())

    def _ask(self, wish: _Wish, asked: _Asked) -> None:
        """Note what is asked for from here on in this context."""
        token = _Token()
        for one in (asked.begun, asked.heard):
            if one is not None:
                one.token = weakref.ref(token)
        self._asked[token] = asked
        tokens = weakref.WeakKeyDictionary(_TOKENS.get({}))
        tokens[self] = token
        _TOKENS.set(tokens)
        # A caller's later wish replaces the earlier one.
        kept = [one for one in self._wishes if one.open and not (one.caller is wish.caller and one.what == wish.what)]
        self._wishes = [*kept, wish]
        task = None if wish.caller.task is None else wish.caller.task()
        if task is not None and not wish.caller.watched:
            wish.caller.watched = True
            task.add_done_callback(functools.partial(_drop, weakref.ref(self), weakref.ref(wish.caller)))

    def _refuse_lost(self, begun: bool) -> None:
        """Refuse to begin a request while another thread waits for one that may be meant.

        A wish that no call can get any more is refused once, and then forgotten.

        Args:
            begun: True if the request was begun by hand, so that its number of steps is known.

        Raises:
            UnsupportedError: A number of steps or a callback was asked for in another thread, and no call has got it.
        """
        self._wishes = [wish for wish in self._wishes if wish.open]
        here, silent = threading.current_thread(), self._here().heard is None
        for wish in self._wishes:
            wanted = silent if wish.request is None else wish.request.steps is not None and not begun
            thread = wish.caller.thread()
            if not wanted or thread is here:
                continue
            if wish.lost:
                wish.close()
            name = "a thread that has ended" if thread is None else f"thread {thread.name}"
            raise UnsupportedError(
                f"{wish.what} was used in {name}, and a request begins in thread {here.name}: nobody can tell whether this "
                "request is meant",
                fix=f"use {wish.what} in the thread that runs the request, or give it the context: asyncio.to_thread does, "
                "and pool.submit(contextvars.copy_context().run, pipe, ...)",
            )


def _silent(on_step: OnStep | None, cancel: CancelSignal | None) -> bool:
    return on_step is None and cancel is None


def _drop(table: weakref.ref[RequestTable], caller: weakref.ref[Caller], task: asyncio.Task[Any]) -> None:
    """Forget what a task has asked for if the task was cancelled: its request does not come any more."""
    asked, asker = table(), caller()
    if asked is not None and asker is not None and task.cancelled():
        asked.forget(asker)


def _goes_on(own: Request, fit: Fit | None, call: _Call) -> bool:
    """Return whether a call that may be the next one of its caller's request by its timestep is that by its latents."""
    if fit is None or own.steps_left:
        return True
    if fit.same:
        # The same noise with another prompt begins another loop; a loop that changes its prompt has moved.
        moved = call.timestep != own.position.timestep
        return not (moved and own.knows_another(call.branch, call.text))
    return fit.dependent and not fit.first


def _refuse_turns(*mixed: Request) -> NoReturn:
    """Refuse a call that fits more than one loop.

    Args:
        *mixed: The requests for which a call of another loop was counted. They are refused from here on.
    """
    for request in mixed:
        request.mixed = True
    raise UnsupportedError(
        "calls of two loops that take turns were taken for those of one: nothing told the first call of the second loop "
        "from a step of the first",
        fix="call begin_request() before each loop, or give each loop a thread, an asyncio task, or a transformer of its "
        "own: DvdqTransformer(transformer.session, controller)",
    )
