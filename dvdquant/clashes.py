"""Options that exclude each other: one refusal for commands, requests and pipelines, and the pairs that servers check, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dvdquant.errors import UnsupportedError

__all__ = ["Clash", "refuse_clashes", "session_clashes"]

_ONE_OUT = "leave one of the two out"


@dataclass(frozen=True)
class Clash:
    """Two options that exclude each other.

    Args:
        given: A value that is true where both were given.
        what: What they say against each other, for the error.
        fix: The way to solve it.
    """

    given: object
    what: str
    fix: str = _ONE_OUT


def refuse_clashes(clashes: Iterable[Clash]) -> None:
    """Refuse the first two options that exclude each other.

    Args:
        clashes: The pairs to look at, in the order in which they are refused.

    Raises:
        UnsupportedError: Both of two were given.
    """
    for clash in clashes:
        if clash.given:
            raise UnsupportedError(clash.what, fix=clash.fix)


def session_clashes(options: Mapping[str, Any]) -> list[Clash]:
    """Return the options of sessions that a backend excludes.

    Args:
        options: ``--backend``, ``--compile``, ``--cuda-graphs``, ``--fuse``, ``--attention``, ``--attention-backend``,
            ``--weights`` and ``plugins`` of ``--plugin``, by their names.
    """
    backend, attention, library = options["backend"], options["attention"], options["attention_backend"]
    elsewhere = backend not in ("auto", "pytorch")
    return [
        Clash(options["compile"] and elsewhere, f"--compile runs in PyTorch, so --backend {backend} does not apply"),
        Clash(
            options["cuda_graphs"] and backend == "onnxruntime",
            "ONNX Runtime has none, so --cuda-graphs does not apply",
        ),
        Clash(options["fuse"] and elsewhere, f"--fuse runs in PyTorch, so --backend {backend} does not apply"),
        Clash(
            attention not in (None, "16") and backend == "onnxruntime",
            f"ONNX Runtime computes attention in 16 bit, so --attention {attention} does not apply",
        ),
        Clash(
            library is not None and elsewhere,
            f"--attention-backend runs in PyTorch, so --backend {backend} does not apply",
        ),
        Clash(
            library is not None and attention == "16",
            "--attention-backend computes attention in 8 bits, so --attention 16 does not apply",
        ),
        Clash(
            options["weights"] != "auto" and backend == "rtx",
            f"TensorRT-RTX engines hold their weights as they were built, so --weights {options['weights']} does not apply",
        ),
        Clash(
            options["plugins"] and backend not in ("auto", "tensorrt"),
            f"--plugin is for TensorRT engines, so --backend {backend} does not apply",
        ),
    ]
