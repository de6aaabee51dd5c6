"""One request of a transformer, and who makes its calls: a pipeline in a thread or in an asyncio task, or code of its own."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from dvdquant.deploy.pipelines.continuity import Path
from dvdquant.deploy.switching.position import LoopPosition
from dvdquant.deploy.switching.runner import StepRunner

__all__ = ["Caller", "Callers", "Request", "running_pipeline"]


class Caller:
    """A thread, or an asyncio task in it, with its requests.

    Attributes:
        thread: A weak reference to the thread.
        task: A weak reference to the task, or None if there is none.
        pipelines: A mapping from each pipeline that it runs to the pipeline's request.
        plain: The request of calls without a pipeline.
        last: The request that was begun or called last.
        watched: True if the table is told when the task is cancelled.
    """

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self.watched = False
        self.thread = weakref.ref(threading.current_thread())
        self.task = None if task is None else weakref.ref(task)
        self.clear()

    def clear(self) -> None:
        """Forget all requests."""
        self.pipelines: weakref.WeakKeyDictionary[DiffusionPipeline, Request] = weakref.WeakKeyDictionary()
        self.plain: Request | None = None
        self.last: Request | None = None

    def of(self, pipeline: DiffusionPipeline | None) -> Request | None:
        """Return the request of a pipeline, or that of calls without one.

        Args:
            pipeline: The pipeline that is running, or None.
        """
        return self.plain if pipeline is None else self.pipelines.get(pipeline)

    def keep(self, pipeline: DiffusionPipeline | None, request: Request) -> None:
        """Make ``request`` the request of a pipeline, or that of calls without one.

        Args:
            pipeline: The pipeline, or None.
            request: The request.
        """
        if pipeline is None:
            self.plain = request
        else:
            self.pipelines[pipeline] = request


class Callers(threading.local):
    """The callers of one thread.

    Attributes:
        plain: The caller without a task.
        tasks: A mapping from each asyncio task to its caller.
    """

    def __init__(self) -> None:
        self.plain = Caller(None)
        self.tasks: weakref.WeakKeyDictionary[asyncio.Task[Any], Caller] = weakref.WeakKeyDictionary()

    @property
    def caller(self) -> Caller:
        """Return the caller that is running."""
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop runs in this thread
            return self.plain
        if task is None:
            return self.plain
        if task not in self.tasks:
            self.tasks[task] = Caller(task)
        return self.tasks[task]


@dataclass(eq=False)
class Request:
    """One request: the runner that decides its steps, and its position.

    Args:
        runner: The runner of its steps.
        generation: The number of the transformer's controller that it was begun with.
        caller: The caller that began it or called it last.
        steps: The number of steps, if it was begun by hand with one.
        position: The place of its denoising loop.
        ended: True if the pipeline has said that the request is over.
        announced: True if the request was begun by hand and has no call yet.
        busy: True while a call of it is running.
        texts: Weak references to the text embeddings that it was called with, by branch.
        mixed: True if a call of another loop was counted for it.
        path: What its loop has had, if no pipeline runs it.
    """

    runner: StepRunner
    generation: int
    caller: Caller
    steps: int | None = None
    position: LoopPosition = field(default_factory=LoopPosition)
    ended: bool = False
    announced: bool = False
    busy: bool = False
    texts: dict[str | None, list[weakref.ref[Tensor]]] = field(default_factory=dict)
    mixed: bool = False
    path: Path = field(default_factory=Path)

    def begins(self, branch: str | None, step: int | None, timestep: float) -> bool:
        """Return whether a call is the first of a later request.

        Args:
            branch: The branch that the call names, or None.
            step: The step index that the call passes, or None.
            timestep: The timestep of the call.
        """
        if self.position.timestep is None or self.ended:
            return not self.announced
        return self.position.restarts(step, timestep) or self.position.repeats(branch, step, timestep)

    def continues(self, branch: str | None, timestep: float) -> bool:
        """Return whether a call of another caller can be the next one of this request, and not the first of a new one.

        Args:
            branch: The branch that the call names, or None.
            timestep: The timestep of the call.
        """
        now = self.position.timestep
        if self.busy or self.ended or now is None or timestep > now:
            return False
        return timestep < now or (branch is not None and branch not in self.position.called)

    def knows(self, branch: str | None, text: Tensor | None) -> bool:
        """Return whether this very tensor was the text embedding of an earlier call of a branch.

        Args:
            branch: The name of the branch, or None.
            text: The text embedding [B, T, D], or None.
        """
        return text is not None and any(known() is text for known in self.texts.get(branch, ()))

    def knows_another(self, branch: str | None, text: Tensor | None) -> bool:
        """Return whether a branch has had text embeddings that still exist, and this tensor is none of them.

        Args:
            branch: The name of the branch, or None.
            text: The text embedding [B, T, D], or None.
        """
        known = [known() for known in self.texts.get(branch, ())]
        return text is not None and any(one is not None for one in known) and all(one is not text for one in known)

    def remember(self, branch: str | None, text: Tensor | None) -> None:
        """Note the text embedding of a call.

        Args:
            branch: The name of the branch, or None.
            text: The text embedding [B, T, D], or None.
        """
        if text is not None and not self.knows(branch, text):
            alive = [known for known in self.texts.get(branch, ()) if known() is not None]
            self.texts[branch] = [*alive, weakref.ref(text)]

    @property
    def steps_left(self) -> bool:
        """Return whether it was begun by hand with a number of steps that are not all begun."""
        return self.steps is not None and self.position.index + 1 < self.steps

    @property
    def reachable(self) -> bool:
        """Return whether one of its embeddings still exists, so that a caller can give it again."""
        return any(known() is not None for texts in self.texts.values() for known in texts)

    @property
    def fresh(self) -> bool:
        """Return whether the request was neither begun by hand nor called."""
        return self.position.timestep is None and not self.announced


def running_pipeline() -> DiffusionPipeline | None:
    """Return the innermost pipeline that is running in this thread, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if isinstance(caller, DiffusionPipeline):
                return caller
        frame = frame.f_back
    return None
