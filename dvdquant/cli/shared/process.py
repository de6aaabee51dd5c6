"""A command as a process: its streams, its signals, and errors in words instead of tracebacks.

Exit codes: 0 done; 2 an error the user can act on, also of the command line or of a stream; 130, 143, 129 stopped by Ctrl-C,
SIGTERM, SIGHUP; 141 nobody reads what it writes. Other exceptions are bugs: exit code 1, with their traceback.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, TextIO

import click

from dvdquant.errors import DvdquantError, EngineError, ExportError, OutputError, ResourceError
from dvdquant.ops.cuda.errors import KernelError
from dvdquant.system.files import disk_error
from dvdquant.system.garbage import collect_less_often
from dvdquant.system.out_of_memory import is_out_of_memory, says_no_memory
from dvdquant.text import json_text, shown

__all__ = ["ReaderGone", "Stopped", "echo", "require_folder", "run_as_process", "user_error"]

_MEMORY_FIX = (
    "free memory (of the GPU, where it is CUDA's), raise the limit (ulimit -v, the container's), or ask for less"
)
_BAR = re.compile(r"(\n|\x1b\[A)*")  # how tqdm moves between its bars


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where the program is so that every ``finally`` runs.

    Args:
        signum: The number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class ReaderGone(Exception):
    """The reader of standard output has closed it, as ``head`` does."""


# ------------------------------------------------------------------------------------------------------------- streams


class _Stream:
    """A text stream to which only text that is safe for a terminal goes, whoever prints."""

    def __init__(self, inner: TextIO) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _send(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if text:  # without a buffer, writing nothing to a full device is an error
            self.inner.write(self.safe(text))
        return len(text)

    def safe(self, text: str) -> str:
        """Escape what acts on a terminal."""
        return shown(text, 0, keep="\n\t")

    def writelines(self, lines: Sequence[str]) -> None:
        """Write several lines, each made safe."""
        for line in lines:
            self.write(line)

    def write(self, text: str) -> int:
        """Write a text, made safe; return its length."""
        return self._send(text)


class _Results(_Stream):
    """Standard output: what cannot be written there is an error, now and at every later write, for some callers pass over it."""

    def __init__(self, inner: TextIO) -> None:
        super().__init__(inner)
        self.failure: Exception | None = None

    @property
    def encoding(self) -> str:
        """Return UTF-8 where the locale is ASCII, too: what it lacks is escaped, and click need not put a writer of its own."""
        name: str = self.inner.encoding
        return "utf-8" if name.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968") else name

    def write(self, text: str) -> int:
        """Write a text, made safe; OutputError or ReaderGone where that fails."""
        with self._failures():
            return self._send(text)

    def flush(self) -> None:
        """Flush the stream; OutputError or ReaderGone where that fails."""
        with self._failures():
            self.inner.flush()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except OSError as error:
            _discard(self.inner)
            self.failure = OutputError(
                f"standard output cannot be written: {error.strerror or error}",
                fix="give it a place that can be written, or > /dev/null; the files this command wrote are whole",
            )
            if isinstance(error, BrokenPipeError):
                self.failure = ReaderGone()
            raise self.failure from error


class _Messages(_Stream):
    """Standard error: hours of work do not end because a message cannot be written. ``lost`` says that one was not."""

    def __init__(self, inner: TextIO) -> None:
        super().__init__(inner)
        self.lost = False

    def safe(self, text: str) -> str:
        """Pass what a bar writes: it begins with a carriage return, and moves the cursor in writes of its own."""
        if _BAR.fullmatch(text):
            return text
        return "\r" * text.startswith("\r") + super().safe(text.removeprefix("\r"))

    def write(self, text: str) -> int:
        """Write a text, made safe; note where that fails."""
        with self._failures():
            self._send(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; note where that fails."""
        with self._failures():
            self.inner.flush()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Closed, or nobody reads: that was somebody's decision. A full disk was not.
            self.lost = self.lost or error.errno not in (errno.EBADF, errno.EPIPE)
            _discard(self.inner)


def _discard(stream: TextIO) -> None:
    """Let what is still in the buffer of a standard stream go nowhere, so that the interpreter's last flush succeeds."""
    if stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()


def _occupy_closed_descriptors() -> None:
    """Open the closed ones of descriptors 0, 1 and 2, in the direction that fails.

    Otherwise the next file would get the number, and whatever is printed.
    """
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


@contextlib.contextmanager
def _safe_streams() -> Iterator[_Messages]:
    _occupy_closed_descriptors()
    before = (sys.stdout, sys.stderr)
    inner = [stream or open(n, "w", closefd=False) for n, stream in enumerate(before, 1)]  # noqa: SIM115
    for stream in inner:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # "δ" in an ASCII locale
    results, messages = _Results(inner[0]), _Messages(inner[1])
    sys.stdout, sys.stderr = results, messages
    try:
        yield messages
    finally:
        sys.stdout, sys.stderr = before


def echo(text: str, err: bool = False) -> None:
    """Print ``text`` and a line break, with whatever it quotes made safe for a terminal; stderr with ``err``.

    Args:
        text: What to print.
        err: Print to stderr.
    """
    stream = sys.stderr if err else sys.stdout
    click.echo(shown(text, 0, keep="\n"), file=stream)


# ------------------------------------------------------------------------------------------------------------- signals


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does, unless somebody (nohup) wants them ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [signal.SIGTERM, signal.SIGHUP]
    taken = [number for number in names if signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, _: FrameType | None) -> None:
        for each in taken:  # a closed terminal sends it twice, and the second must not end the tidying up
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


# -------------------------------------------------------------------------------------------------------------- errors


def user_error(error: BaseException) -> DvdquantError | None:
    """Return the error to show for ``error`` where the cause is not a bug: memory, a file, the disk; else None.

    Args:
        error: What ended the command.
    """
    if isinstance(error, (EngineError, ExportError, KernelError)) and is_out_of_memory(error):
        return ResourceError(error.what, fix=_MEMORY_FIX)  # whatever it advised: engine and kernels are not to blame
    if isinstance(error, DvdquantError):
        return error
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return _no_memory(text)
    if isinstance(error, (RuntimeError, ImportError, OSError)) or "onnxruntime" in type(error).__module__:
        if isinstance(error, RecursionError):
            return ResourceError(
                "something is nested too deep to be read", fix="check the files that were given: one of them is hostile"
            )
        if says_no_memory(text):
            return _no_memory(text)
    if isinstance(error, OSError):
        return _system_error(error)
    if isinstance(error, Exception) and not _memory_is_left():
        return _no_memory(f"{type(error).__name__}: {text}")
    return None


def _memory_is_left() -> bool:
    """Return whether the process can still map 32 MiB.

    Not every library says that memory is short: Python's own compiler answers an import with "ValueError: field 'target' is
    required for AnnAssign" then.
    """
    try:
        mmap.mmap(-1, 32 << 20).close()
    except (OSError, MemoryError):
        return False
    return True


def _system_error(error: OSError) -> DvdquantError:
    """Return the error for one of the operating system that nobody expected: of a read or a write, which is not known here."""
    path = "a file" if error.filename is None else error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EROFS):
        return disk_error(error, path)
    return OutputError(f"{path} cannot be used: {error.strerror or error}", fix="check that place, or name another")


def _no_memory(text: str) -> ResourceError:
    said = shown(" ".join(text.split())) or "an allocation failed"
    return ResourceError(f"there is not enough memory: {said}", fix=_MEMORY_FIX)


def require_folder() -> None:
    """Refuse to run where the working directory was deleted: libraries and relative paths need one.

    Raises:
        OutputError: There is none.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise OutputError(
            f"the working directory cannot be used: {error.strerror or error}", fix="cd to a folder that exists"
        ) from error


def run_as_process(call: Callable[[], Any], words: Sequence[str]) -> int:
    """Return the exit code of ``call``, a click command outside its standalone mode, its errors printed.

    Args:
        call: Runs the command and returns what it returns.
        words: The command line; with ``--log-format json`` errors are JSON lines.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_bug
    collect_less_often()
    with _safe_streams() as messages, _signals():
        code = _outcome(call, _Reporter(_wants_json(words)))
        if code == 0:
            code = _outcome(sys.stdout.flush, _Reporter(_wants_json(words)))
        messages.flush()
        return 2 if messages.lost and code == 0 else code


class _Reporter:
    """Prints how a command ended."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def failed(self, error: DvdquantError) -> int:
        """Print what, available and fix."""
        if self.as_json:
            fields = {"error": type(error).__name__, "what": error.what, "available": error.available, "fix": error.fix}
            self._line({"event": "error", **fields})
        else:
            echo(f"error: {error}", err=True)
        return 2

    def misused(self, error: click.ClickException) -> int:
        """Print how the command is used, and what was wrong."""
        context = getattr(error, "ctx", None)
        if self.as_json:
            fix = f"{'the command' if context is None else context.command_path} --help lists the options"
            self._line({"event": "error", "error": "UsageError", "what": error.format_message(), "fix": fix})
            return 2
        if context is not None:
            echo(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n", err=True)
        echo(f"error: {error.format_message()}", err=True)
        return 2

    def stopped(self, number: int) -> int:
        """Print that Ctrl-C or a signal ended the command."""
        how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        text = f"{how}; nothing is half-written"
        if self.as_json:
            self._line({"event": "stopped", "signal": signal.Signals(number).name, "text": text})
        else:
            echo(text, err=True)
        return 128 + number

    def _line(self, fields: dict[str, Any]) -> None:
        print(json_text({"time": round(time.time(), 3), **fields}), file=sys.stderr, flush=True)


def _outcome(call: Callable[[], Any], report: _Reporter) -> int:
    try:
        code = call()
    except click.ClickException as error:
        return report.misused(error)
    except click.Abort as error:  # what click makes of KeyboardInterrupt, and of an EOFError, which is a bug
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None  # with its traceback, as every other bug
        return report.stopped(getattr(error.__cause__, "signum", signal.SIGINT))
    except KeyboardInterrupt as error:
        return report.stopped(getattr(error, "signum", signal.SIGINT))
    except ReaderGone:
        return 128 + signal.SIGPIPE
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        if known is not error:
            logging.getLogger("dvdquant").debug("where it happened", exc_info=error)
        # What the frames hold is let go: after a failed allocation, printing needs some of it.
        error.__traceback__ = None
        error.__context__ = None
    else:
        return code if isinstance(code, int) else 0
    return report.failed(known)


def _wants_json(words: Sequence[str]) -> bool:
    pairs = zip(words, [*words[1:], ""])
    return any(word == "--log-format=json" or (word, after) == ("--log-format", "json") for word, after in pairs)


def _print_bug(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print a traceback, escaped: it quotes names of files and tensors, too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        text = "".join(traceback.format_exception(kind, error, where))
        sys.stderr.write(
            shown(text, 0, keep="\n\t") + "this is a fault of dvdquant: please report it with the lines above\n"
        )
        sys.stderr.flush()
