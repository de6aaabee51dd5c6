"""Builders of engines, forked from one process that has imported what each of them would import anew.

An import is most of what the build of a tiny engine takes. A build in another environment of Python, such as one with a
hook or a double of TensorRT, has a process of its own, as every build of a user has.

    python -m tests.support.forked_builders SOCKET
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from dvdquant.export.engines import engine
from tests.support.forked_workers import ForkServer, serve

__all__ = ["fork_builders"]

WORKER = "dvdquant.export.engines.worker"
MODULES = ("onnx", "tensorrt_rtx", WORKER)


class _Forks:
    """As the module ``subprocess``, for builders of engines."""

    def __init__(self) -> None:
        self.server: ForkServer | None = None
        self._found = os.environ.get("PYTHONPATH")

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a builder, which is forked if it would import what this process imports."""
        interpreter, module, *words = command
        if (module, words[0]) == ("-m", WORKER) and os.environ.get("PYTHONPATH") == self._found:
            self.server = self.server or ForkServer(__name__)
            command = [interpreter, *self.server.asks, "0", *words[1:]]
        return subprocess.Popen(command, **options)


@contextlib.contextmanager
def fork_builders() -> Iterator[None]:
    """Let the builds within be forks of one process, which starts with the first of them."""
    forks = _Forks()
    with mock.patch.object(engine, "subprocess", forks):
        try:
            yield
        finally:
            if forks.server is not None:
                forks.server.close()


def work(_descriptors: list[int], words: list[str]) -> int:
    """Build the engine of a request; return the exit code."""
    from dvdquant.export.engines.worker import main

    return main(words)


if __name__ == "__main__":
    serve(sys.argv[1], MODULES, work)
