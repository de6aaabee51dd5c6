"""What the commands share: errors without tracebacks, formats, examples in the help text."""

from __future__ import annotations

import functools
import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from dvdquant.cli.shared.paths import PATH, WORD
from dvdquant.cli.shared.process import echo, require_folder, run_as_process, user_error
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.weights import WEIGHTS
from dvdquant.system.devices import BACKEND_WORDS
from dvdquant.text import json_text, shown

__all__ = [
    "CUDA_GRAPHS",
    "FUSE",
    "ExamplesCommand",
    "ProcessCommand",
    "echo",
    "loading",
    "paragraphs",
    "runs_on",
    "setup_logging",
    "table",
    "takes_plugins",
]

P = ParamSpec("P")
R = TypeVar("R")


class ProcessCommand(click.Command):
    """A command whose errors are words and an exit code.

    Args:
        *args: The arguments of :class:`click.Command`.
        **kwargs: Those by name; ``context_settings`` are ours.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
        super().__init__(*args, **kwargs)

    def main(self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run as :meth:`click.Command.main` does; a standalone command ends as :mod:`dvdquant.cli.shared.process` says."""
        words = list(sys.argv[1:] if args is None else args)
        call = functools.partial(super().main, words, *more, standalone_mode=False, **extra)
        return sys.exit(run_as_process(call, words)) if standalone_mode else call()

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function, as :meth:`click.Command.invoke` does, in a folder that exists.

        An OSError becomes a DvdquantError before click makes of EPIPE an exit.
        """
        require_folder()
        try:
            return super().invoke(ctx)
        except OSError as error:
            known = user_error(error)
            raise known or error from error


class ExamplesCommand(ProcessCommand):
    """A command whose help ends with its examples, printed as they are.

    Args:
        *args: The arguments of :class:`ProcessCommand`.
        examples: The examples, lines of a terminal.
        **kwargs: The arguments of :class:`ProcessCommand` by name.
    """

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples after the options, where :meth:`click.Command.format_epilog` writes the epilog.

        They have the name that the command was called by.
        """
        if self.examples:
            examples = self.examples.strip()
            if ctx.parent is not None:  # dvdq export, and not dvdq-export
                examples = re.sub(rf"\bdvdq-{re.escape(ctx.info_name or '')}\b", f"dvdq {ctx.info_name}", examples)
            with formatter.section("Examples"):
                for line in examples.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def setup_logging(verbose: int, log_format: str) -> None:
    """Show our own log at WARNING, INFO with -v, DEBUG with -vv; other libraries' warnings only with -vv.

    Args:
        verbose: How often ``-v`` was given.
        log_format: ``text`` or ``json``.
    """
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    root = logging.getLogger()
    root.setLevel(logging.WARNING if verbose < 2 else level)
    ours = next((handler for handler in root.handlers if isinstance(handler, _ToStderr)), None)
    if ours is None:
        ours = _ToStderr()
        root.addHandler(ours)
    ours.setFormatter(_JsonLines() if log_format == "json" else _Lines("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("dvdquant").setLevel(level)
    if verbose < 2:
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers", "diffusers"):
            logging.getLogger(name).setLevel(logging.ERROR)


def loading(what: str, log_format: str = "text", *, module: str = "torch") -> None:
    """Say what is loaded now, which takes seconds: nobody waits in front of a silent screen.

    Args:
        what: What is loaded.
        log_format: ``text``; a program that reads ``json`` needs no first line.
        module: The slow one of its modules; nothing is said where it is there already.
    """
    if log_format == "text" and module not in sys.modules:
        echo(f"loading {what} …", err=True)


class _ToStderr(logging.StreamHandler[Any]):
    """Writes to what ``sys.stderr`` is at that time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Return standard error as it is now."""
        return sys.stderr


class _Lines(logging.Formatter):
    """Messages quote names of files and tensors, which are strangers' words."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), 0, keep="\n")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"event": "log", "level": record.levelname, "logger": record.name, "text": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_text(fields)


CUDA_GRAPHS = "Repeat short steps of static sizes (up to 4000 tokens in PyTorch) as CUDA graphs, each one launch."
FUSE = (
    "Take norm, modulation, residual and GELU before quantized layers into the layers' kernels, in PyTorch.  "
    "[default: with --compile, where the GPU has the kernels]"
)


def runs_on(command: Callable[P, R]) -> Callable[P, R]:
    """Add the options --backend, --device and --weights.

    Args:
        command: The function of the command.
    """
    backend = click.option(
        "--backend",
        type=click.Choice(BACKEND_WORDS),
        default="auto",
        show_default=True,
        help="auto: an engine for this GPU, else PyTorch with the CUDA kernels, else ONNX Runtime.",
    )
    device = click.option(
        "--device", type=WORD, default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where it runs."
    )
    weights = click.option(
        "--weights",
        type=click.Choice(WEIGHTS),
        default="auto",
        show_default=True,
        help="Quantized weights on the GPU: packed, 4 bits each for all engines; expanded, as they are multiplied, which takes "
        "2 to 4 times the memory; auto: packed where that costs a step 2 % at most.",
    )
    return backend(device(weights(command)))


def takes_plugins(command: Callable[P, R]) -> Callable[P, R]:
    """Add the option --plugin; its value is called ``plugins``.

    Args:
        command: The function of the command.
    """
    option = click.option(
        "--plugin",
        "plugins",
        multiple=True,
        type=PATH,
        metavar="LIBRARY",
        help="TensorRT plugin library, which engines with the plugin need. Its code runs: take none that you do not trust.",
    )
    return option(command)


def refuse_besides(why: str, takes: Collection[str], fix: str, available: str | None = None) -> None:
    """Refuse options of the command line that another one leaves without effect. Those of the environment are for all.

    Args:
        why: The option that does, and why: "--check records nothing".
        takes: The names of the parameters that go with it, itself included.
        fix: The way to solve it.
        available: Options that do apply, for the error.

    Raises:
        UnsupportedError: Another option was given; the error names all of them.
    """
    context = click.get_current_context()
    given = [
        parameter.opts[-1]
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
        and parameter.name not in takes
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UnsupportedError(
            f"{why}, so {', '.join(given)} {'does' if len(given) == 1 else 'do'} not apply",
            available=available,
            fix=fix,
        )


def paragraphs(items: Sequence[tuple[str, str]], width: int = 100) -> str:
    """Return ``head: text`` items, wrapped and indented.

    Args:
        items: (head, text) of every paragraph.
        width: Characters of a line.
    """
    wrap = functools.partial(textwrap.fill, width=width, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(wrap(shown(f"{head}: {text}", 0)) for head, text in items)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """Return columns as wide as they need to be, every cell safe to print; those numbered in ``right`` are right-aligned.

    Args:
        header: The heads of the columns.
        rows: Cells of every row, of any type that has a text.
        right: Numbers of columns, from 0.
    """
    cells = [[shown(c, 0) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
