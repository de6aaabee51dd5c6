"""Values of the command line, checked where they are read.

What no file, model or word can be is refused in the option's name, with what to do instead.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import click

from dvdquant.text import shown

__all__ = ["EXPORT", "LORA", "MODEL", "PATH", "TEXT_FILE", "WORD", "FilePath", "ModelName", "Word"]

LONGEST = 4096  # bytes of a path that Linux takes, with the NUL
LONGEST_WORD = 1024  # characters of a name, a glob or a list of numbers


class _Checked(click.ParamType):  # type: ignore[type-arg]
    """A type whose refusals say the way out."""

    def refuse(
        self, what: str, param: click.Parameter | None, ctx: click.Context | None, *, fix: str, available: str = ""
    ) -> NoReturn:
        """Fail as click does, naming the option."""
        lines = [what, f"  available: {available}" if available else "", f"  fix: {fix}"]
        self.fail("\n".join(filter(None, lines)), param, ctx)

    def check_place(self, text: str, param: click.Parameter | None, ctx: click.Context | None, fix: str) -> None:
        """Refuse what the operating system will not look at: too long, no permission, a link to itself."""
        if len(os.fsencode(text)) >= LONGEST:
            what = f"the path has {len(text)} characters"
            self.refuse(what, param, ctx, available=f"up to {LONGEST - 1} bytes", fix=fix)
        try:
            os.stat(text)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self.refuse(f"{shown(text)}: {error.strerror}", param, ctx, fix=fix)


class FilePath(_Checked):
    """A path as a :class:`Path`; whether anything is there is the command's matter.

    Args:
        standard_stream: Whether ``-`` stands for standard input; else it is refused, for nobody means a file of that name.
        folder: Whether a file in its place is refused.
    """

    name = "path"

    def __init__(self, *, standard_stream: bool = False, folder: bool = False) -> None:
        self.standard_stream, self.folder = standard_stream, folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, see :meth:`click.ParamType.convert`, or fail naming the option and the reason."""
        text = os.fspath(value)
        if not text:
            self.refuse("the path is empty", param, ctx, fix="name a file or a folder; is a shell variable unset?")
        if text == "-":
            if self.standard_stream:
                return Path("-")
            self.refuse("- is no standard stream here", param, ctx, fix="name a file; one called - is ./-")
        if "\0" in text:
            self.refuse("a path cannot hold a NUL byte", param, ctx, fix="name a file or a folder")
        self.check_place(text, param, ctx, "name a place you may use")
        if self.folder:
            there = next((place for place in (Path(text), *Path(text).parents) if place.exists()), None)
            if there is not None and not there.is_dir():
                self.refuse(f"{shown(there)} is no folder", param, ctx, fix="give the folder that dvdq-export wrote")
        return Path(text)


class ModelName(_Checked):
    """A folder or a hub id, as text."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, see :meth:`click.ParamType.convert`, or fail naming the option and the reason."""
        text = str(value)
        if text and "\0" not in text:  # what is empty or holds a NUL gets the error of every other wrong name
            self.check_place(os.path.expanduser(text), param, ctx, "give a local folder, or a hub id such as org/name")
        return text


class Word(_Checked):
    """A short text: a name, a glob, a size."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text, see :meth:`click.ParamType.convert`, or fail naming the option and the reason."""
        text = str(value)
        if not text.strip():
            self.refuse("the value is empty", param, ctx, fix="give one, or leave the option out")
        if len(text) > LONGEST_WORD:
            what = f"the value has {len(text)} characters: {shown(text, 40)}"
            self.refuse(what, param, ctx, available=f"up to {LONGEST_WORD}", fix="give a shorter one")
        if "\0" in text:
            self.refuse(f"the value holds a NUL: {shown(text, 40)}", param, ctx, fix="leave it out")
        return text


class LoraText(Word):
    """A LoRA file with its scale and the transformer it goes to, as text: longer than a word, for it holds a path."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text, see :meth:`click.ParamType.convert`, or fail naming the option and the reason."""
        text = str(value)
        if not text.strip() or "\0" in text:
            self.refuse("it names no file", param, ctx, fix="give FILE, FILE:SCALE, or transformer_2=FILE:SCALE")
        if len(os.fsencode(text)) >= LONGEST:
            what = f"the path has {len(text)} characters"
            self.refuse(what, param, ctx, available=f"up to {LONGEST - 1} bytes", fix="give a shorter one")
        return text


PATH = FilePath()
LORA = LoraText()
TEXT_FILE = FilePath(standard_stream=True)
EXPORT = FilePath(folder=True)
MODEL = ModelName()
WORD = Word()
