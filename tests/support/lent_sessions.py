"""Sessions that the tests of a module borrow: to open one of tiny-wan takes longer than to draw a short clip with it.

For tests of what a generator, a plan or a command does with a session. What opening does is tested where nothing is lent.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation import session_options
from dvdquant.deploy.pipelines import transformer
from dvdquant.deploy.sessions import EngineSession, open_session
from dvdquant.deploy.sessions.base import WrappedSession

__all__ = ["lend_sessions"]


class _Lent(WrappedSession):
    """A session that is given back when it is closed."""

    def __init__(self, inner: EngineSession, give_back: Callable[[], None]) -> None:
        super().__init__(inner)
        self._give_back = give_back

    def _close(self) -> None:
        if self.inner.loras:
            self.inner.set_loras(())
        self._give_back()


@contextlib.contextmanager
def lend_sessions() -> Iterator[None]:
    """Let generators and pipelines borrow their ONNX Runtime sessions; two that are open at the same time are two."""
    free: defaultdict[Any, list[EngineSession]] = defaultdict(list)

    def lent(artifact: Artifact, component: str = "transformer", **options: Any) -> EngineSession:
        if options.get("backend") != "onnxruntime" or options.get("device", "auto").replace("auto", "cpu") != "cpu":
            return open_session(artifact, component, **options)
        # A file that somebody has changed is another export.
        files = sorted((str(path), path.stat().st_mtime_ns) for path in artifact.root.rglob("*"))
        there = free[repr((files, component, sorted(options.items())))]
        session = there.pop() if there else open_session(artifact, component, **options)
        return _Lent(session, lambda: there.append(session))

    with contextlib.ExitStack() as stack:
        for module in (session_options, transformer):
            stack.enter_context(mock.patch.object(module, "open_session", lent))
        yield
    for sessions in free.values():
        for session in sessions:
            session.close()
