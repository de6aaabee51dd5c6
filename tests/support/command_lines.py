"""Command lines with one thing wrong: every option of all commands but the server × the kinds of bad value it can get."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dvdquant.text import unsafe
from tests.support.exporting import REPOSITORY, TINY_WAN
from tests.support.forked_processes import forked_process
from tests.support.forking_commands import COMMANDS

PROMPT = "ring red right large black"
LATIN = os.fsdecode(b"caf\xe9")
HOSTILE = "a\x1b]0;t\x07\x1b[31m\u202e\u200b\x9b\x7fb"

PATHS = {
    "empty": "",
    "dash": "-",
    "of 5000 characters": "deep/" * 1000,
    "with a long name": "n" * 300,
    "that is not UTF-8": LATIN,
    "that acts on a terminal": HOSTILE,
    "of a folder": "folder",
    "of a text file": "text.txt",
    "of a binary file": "binary",
    "below a file": "text.txt/below",
    "of a device": "/dev/full",
    "of a link to itself": "loop",
    "in a folder without permission": "secret/name",
    "of a pipe": "pipe",
    "with a NUL": "a\0b",
}
NUMBERS = (
    "",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e400",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "1,5",
    " ",
    "1e-320",
    HOSTILE,
    LATIN,
)
WORDS = (
    "",
    " ",
    "-",
    "nothing-like-it",
    "x" * 5000,
    HOSTILE,
    LATIN,
    "../..",
    "a\0b",
    "8x24x24x24",
    "1:2:3:4",
    "*",
    "[",
)
PATH_OPTIONS = {
    "out",
    "plugins",
    "timing_cache",
    "page",
    "prompts",
    "output",
    "plot",
    "check",
    "schedule",
    "gif",
    "strip",
}
PATH_OPTIONS |= {"trace", "pipeline", "model", "graph", "plugin", "wheels", "folder", "source"}
SUFFIXES = {"output": ".mp4", "gif": ".gif", "strip": ".png", "trace": ".json", "page": ".html"}


def prepare(folder: Path, export: Path) -> None:
    """The files that the command lines name."""
    shutil.copytree(export, folder / "export")  # some lines write into it
    (folder / "folder").mkdir()
    (folder / "text.txt").write_text("not what was asked for\n")
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "loop").symlink_to("loop")
    (folder / "secret").mkdir(mode=0)
    os.mkfifo(folder / "pipe")


def base(command: str) -> list[str]:
    """A command line without a fault, that ends soon."""
    model = str(TINY_WAN)
    run = ["export", "--pipeline", model, "--prompt", PROMPT, "--backend", "onnxruntime", "--device", "cpu"]
    return {
        "export": [model, "-o", "new", "--target", "graphs", "--latent", "8x24x24", "--text-tokens", "5", "--dry-run"],
        "inspect": ["export"],
        "plan": [*run, "--steps", "3", "--delta", "0", "-o", "schedule.json"],
        "run": [*run, "--steps", "1", "-o", "clip.gif"],
        "build": ["export", "--dry-run"],
        "bundle": ["export", "-o", "new.tar"],
        "push": ["export", "somebody/export", "--dry-run"],
        "bench": [
            "export",
            "--backend",
            "onnxruntime",
            "--device",
            "cpu",
            "--bits",
            "8",
            "--repeats",
            "1",
            "--warm-up",
            "0",
        ],
        "doctor": [],
    }[command]


def without(words: list[str], parameter: click.Parameter) -> list[str]:
    """``words`` without the option and its value."""
    kept, skip = [], False
    for word in words:
        skip, hide = False, skip
        if word in parameter.opts:
            skip = not getattr(parameter, "is_flag", False)
        elif not hide:
            kept.append(word)
    return kept


def values(parameter: click.Parameter) -> Iterator[tuple[str, str]]:
    """(kind, value) for one option."""
    if parameter.name in PATH_OPTIONS:
        for kind, path in PATHS.items():
            yield f"a path {kind}", path
            # A good suffix brings it past the check of suffixes.
            if parameter.name in SUFFIXES and kind not in ("empty", "dash", "with a NUL", "of a device"):
                yield f"a path {kind}", path + SUFFIXES[parameter.name]
    elif parameter.name == "prompts":
        pass  # test_prompt_file.py
    elif isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType)):
        for number in NUMBERS:
            yield "a number", number
    elif not isinstance(parameter.type, click.types.BoolParamType):
        for word in WORDS:
            yield "a word", word


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """(what is wrong, command and arguments); a NUL can only come from another Python program."""
    for name, command in COMMANDS.items():
        yield f"dvdq-{name} alone", [name]
        yield f"dvdq-{name} with a NUL", [name, *base(name), "\0"]
        for parameter in command.params:
            if getattr(parameter, "is_flag", False) or getattr(parameter, "count", False):
                continue
            option = parameter.opts[-1]
            for kind, value in values(parameter):
                if isinstance(parameter, click.Argument):
                    words = base(name)
                    words[[p.name for p in command.params if isinstance(p, click.Argument)].index(parameter.name)] = (
                        value
                    )
                else:
                    words = [*without(base(name), parameter), option, value]
                yield f"dvdq-{name} {option}: {kind}", [name, *words]


# What a kind of value costs: a whole clip or a whole plan, because it is no fault there.
_COSTLY = {"0", "inf", "1e400", "9" * 30, "9" * 5000, "1e-320", LATIN, HOSTILE}


def some_command_lines() -> list[tuple[str, list[str]]]:
    """A fault of every second option, another kind for each, those left out that only show when a clip is made."""
    groups: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
    for what, words in command_lines():
        value = words[-1]
        whole = words[0] in ("plan", "run", "bench") and (value in _COSTLY or value.endswith(tuple(SUFFIXES.values())))
        waits = what.endswith("--prompts: a path of a pipe")  # a writer is waited for
        if (
            not whole
            and not waits
            and not (words[0] in ("plan", "bench") and what.split(":")[0].endswith(("--plot", "--output")))
        ):
            groups.setdefault((words[0], what.partition(":")[0]), []).append((what, words))
    # Options have much the same kinds, in the same order: by steps of a number without a common divisor all are met.
    return [lines[7 * turn % len(lines)] for turn, lines in enumerate(groups.values()) if turn % 2 == 0]


class CommandServer:
    """The forking process, and one command at a time in it."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self.folder = folder
        self.process = subprocess.Popen(
            forked_process("commands"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )

    def run(self, *words: object, **request: Any) -> Ended:
        """Run ``dvdq-<words[0]>`` in the folder; ``request`` as :func:`tests.support.forking_commands.child` says."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = {"words": [str(word) for word in words], "cwd": str(self.folder), **request}
        print(json.dumps(line), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        texts = [answer[name].encode("latin-1").decode("utf-8", "surrogateescape") for name in ("out", "err")]
        return Ended(answer["code"], *texts, answer["seconds"])

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said; bytes that are no UTF-8 as surrogates."""

    code: int
    out: str
    err: str
    seconds: float

    def faults(self) -> list[str]:
        """What no command line may do, whatever it is."""
        said, found = self.out + self.err, []
        if self.code not in (0, 2):
            found.append(f"exit code {self.code}")
        if "Traceback" in said:
            found.append("a traceback")
        if self.code == 2 and not re.search(r'error: |"event": "error"', self.err):
            found.append("no error")
        if self.code == 2 and not re.search(r'fix: |available: |Usage: |"(fix|available)": "', self.err):
            found.append("no way out")
        if len(self.err) > 20_000:
            found.append(f"{len(self.err)} characters of error")
        if characters := sorted({c for c in said if unsafe(c) and c not in "\n\r"}):
            found.append(f"sends {characters}")
        return found
