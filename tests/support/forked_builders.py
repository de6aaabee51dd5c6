"""Builders of engines as forks: an import is most of what the build of a tiny engine takes.

A build in another environment of Python, such as one with a hook or a double of TensorRT, has a process of its own, as every
build of a user has.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import Any
from unittest import mock

from dvdquant.export.engines import engine
from tests.support.forked_processes import forked_process

__all__ = ["fork_builders"]

_BUILDER = ["-m", "dvdquant.export.engines.worker"]


class _Forks:
    """As the module ``subprocess``, for builders of engines."""

    def __init__(self) -> None:
        self._found = os.environ.get("PYTHONPATH")

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a builder, which is forked if it would import what this process imports."""
        interpreter, *words = command
        if words[:2] == _BUILDER and os.environ.get("PYTHONPATH") == self._found:
            command = [interpreter, *forked_process("builder")[1:], *words[2:]]
        return subprocess.Popen(command, **options)


@contextlib.contextmanager
def fork_builders() -> Iterator[None]:
    """Let the builds within be forks."""
    with mock.patch.object(engine, "subprocess", _Forks()):
        yield
