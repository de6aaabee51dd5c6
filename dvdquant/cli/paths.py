"""Paths of the command line, checked where they are read: one that no file can have is refused in the option's name."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import click

__all__ = ["PATH", "TEXT_FILE", "FilePath"]

LONGEST = 4096  # bytes of a path that Linux takes, with the NUL


class FilePath(click.ParamType):  # type: ignore[type-arg]
    """A path as a :class:`Path`; whether anything is there, and what, is the command's matter.

    Args:
        standard_stream: whether ``-`` stands for standard input; else it is refused, for nobody means a file of that name.
    """

    name = "path"

    def __init__(self, *, standard_stream: bool = False) -> None:
        self.standard_stream = standard_stream

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, or fail naming the option and the reason."""
        text = os.fspath(value)
        if not text:
            self.fail("the path is empty\n  fix: name a file or a folder; is a shell variable unset?", param, ctx)
        if text == "-":
            if self.standard_stream:
                return Path("-")
            self.fail("- is no standard stream here\n  fix: name a file; one called - is ./-", param, ctx)
        if "\0" in text:
            self.fail("a path cannot hold a NUL byte\n  fix: name a file or a folder", param, ctx)
        if len(os.fsencode(text)) >= LONGEST:
            self.fail(f"the path has {len(text)} characters\n  available: up to {LONGEST - 1} bytes", param, ctx)
        try:
            os.lstat(text)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                shortened = text if len(text) < 200 else text[:199] + "…"
                self.fail(f"{shortened}: {error.strerror}\n  fix: name a place you may use", param, ctx)
        return Path(text)


PATH = FilePath()
TEXT_FILE = FilePath(standard_stream=True)
