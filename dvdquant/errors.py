"""Errors that a user can cause; each says what was wrong, what was available and how to fix it.

The commands print such an error without a traceback and exit with code 2. Any other exception that escapes is a bug and
keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

from dvdquant.text import shown

__all__ = [
    "Cancelled",
    "CheckpointError",
    "ChoiceError",
    "DvdquantError",
    "EngineError",
    "ExportError",
    "OutputError",
    "RecipeError",
    "ResourceError",
    "ShapeError",
    "UnsupportedError",
]


class DvdquantError(Exception):
    """A failure that the user can act on. Its text is safe to print whatever names and values it holds.

    Args:
        what: The problem, with the name of the thing (a path, a tensor, an option and its value).
        available: The alternatives that exist, as text or as the list of accepted values.
        fix: The way to solve it, as an instruction. Where none is given, it is to take what is available, or
            :attr:`remedy`.
        out_of_memory: An allocation failed, as a library said in a log. Where a library raised an error, raise this one
            from it instead: :func:`dvdquant.system.out_of_memory.is_out_of_memory` asks the cause.

    Attributes:
        remedy: What helps against most errors of the class.
        has_own_fix: The error was raised with a fix of its own.
    """

    remedy = "run it again with -v, which says more"

    def __init__(
        self,
        what: str,
        *,
        available: str | Iterable[str] | None = None,
        fix: str | None = None,
        out_of_memory: bool = False,
    ) -> None:
        if available is not None and not isinstance(available, str):
            available = ", ".join(str(item) for item in available) or "nothing"
        self.what = _safe(what)
        self.available = None if available is None else _safe(available)
        self.has_own_fix = fix is not None
        self.out_of_memory = out_of_memory
        general = self.remedy if available is None else "give what is available"
        self.fix = _safe(fix or general) or None
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.available:
            lines.append(f"  available: {self.available}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def _safe(text: str) -> str:
    """Return the text without characters that act on a terminal; line breaks stay."""
    return shown(text, 0, keep="\n")


class CheckpointError(DvdquantError):
    """The model folder, a shard, a header or a tensor in it cannot be used."""

    remedy = "download or copy the model again, or give another file of it"


class ShapeError(DvdquantError, ValueError):
    """A tensor or an option has a shape or a size that does not fit."""

    remedy = "give it in the shape or the size that the text names"


class RecipeError(DvdquantError, ValueError):
    """A recipe is unknown, or its parts contradict each other."""

    remedy = "correct that field, or export again with a named recipe"


class UnsupportedError(DvdquantError):
    """dvdquant does not handle a model family, architecture, SM or backend."""

    remedy = "leave that option out; --help lists what there is"


class OutputError(DvdquantError):
    """The output folder cannot be written, is in use, or does not hold a valid export."""

    remedy = "name another place, or export again into an empty folder"


class ResourceError(DvdquantError):
    """There is not enough disk or memory for the task."""

    remedy = "free some, or ask for less"


class ExportError(DvdquantError):
    """torch.export, an ONNX pass or ONNX Runtime failed on a valid checkpoint."""

    remedy = "export again with -v; dvdq doctor shows the versions of the libraries for a report"


class EngineError(DvdquantError):
    """TensorRT or TensorRT-RTX refused a graph, or is not installed."""

    remedy = "try --backend pytorch or onnxruntime; dvdq doctor shows what this machine has"


class ChoiceError(EngineError):
    """A session cannot compute as another session has chosen to, so that its outputs would differ."""


class Cancelled(DvdquantError):
    """Whoever asked for a clip does not want it any more. Nothing failed."""

    remedy = ""
