"""What the commands share: errors without tracebacks, formats, examples in the help text."""

from __future__ import annotations

import functools
import json
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import click

from dvdquant.errors import DvdquantError

__all__ = ["ExamplesCommand", "amount", "paragraphs", "report_errors", "setup_logging", "table"]

P = ParamSpec("P")
R = TypeVar("R")


class ExamplesCommand(click.Command):
    """A command whose help ends with its examples, printed as they are."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def report_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Print a DvdquantError as what / available / fix and exit 2; Ctrl-C exits 130. Other exceptions are bugs."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        as_json = kwargs.get("log_format") == "json"
        try:
            return function(*args, **kwargs)
        except DvdquantError as error:
            if as_json:
                fields = {
                    "error": type(error).__name__,
                    "what": error.what,
                    "available": error.available,
                    "fix": error.fix,
                }
                print(json.dumps({"event": "error", **fields}), file=sys.stderr)
            else:
                click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; the output folder is as it was", err=True)
            sys.exit(130)

    return run


def setup_logging(verbose: int, log_format: str) -> None:
    """Our own log at WARNING, INFO with -v, DEBUG with -vv; other libraries' warnings only with -vv."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=logging.WARNING if verbose < 2 else level, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("dvdquant").setLevel(level)
    if verbose < 2:
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers", "diffusers"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if log_format == "json":
        logging.getLogger().handlers[0].setFormatter(_JsonLines())


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {"event": "log", "level": record.levelname, "logger": record.name, "text": record.getMessage()}
        )


def runs_on(command: Callable[P, R]) -> Callable[P, R]:
    """The options --backend and --device."""
    backend = click.option(
        "--backend",
        type=click.Choice(["auto", "onnxruntime", "pytorch", "rtx", "tensorrt"]),
        default="auto",
        show_default=True,
        help="auto: an engine for this GPU, else PyTorch with the CUDA kernels, else ONNX Runtime.",
    )
    device = click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where it runs."
    )
    return backend(device(command))


def amount(nbytes: float) -> str:
    """Bytes for people: ``1.4 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def paragraphs(items: Sequence[tuple[str, str]], width: int = 100) -> str:
    """``head: text`` items, wrapped and indented."""
    wrap = functools.partial(textwrap.fill, width=width, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(wrap(f"{head}: {text}") for head, text in items)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """Columns as wide as they need to be; columns numbered in ``right`` are right-aligned."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
