"""The defaults of a diffusers pipeline's call, read from the installed source: importing the class takes seconds."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from pathlib import Path
from typing import Any

__all__ = ["call_defaults", "pipeline_sources"]


@functools.cache
def call_defaults(class_name: str) -> dict[str, Any]:
    """Return the defaults of the arguments of a pipeline's call that are plain values.

    Args:
        class_name: The name of a pipeline class of the installed diffusers.
    """
    for path in pipeline_sources():
        text = path.read_text(encoding="utf-8")
        if f"class {class_name}(" in text and (found := _read(text, class_name)) is not None:
            return found
    import diffusers  # the class is written in a way that is not understood here

    parameters = inspect.signature(getattr(diffusers, class_name).__call__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def pipeline_sources() -> list[Path]:
    """Return the files of the installed diffusers that define pipelines, without importing it."""
    spec = importlib.util.find_spec("diffusers")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return sorted(path for place in places for path in place.glob("pipelines/*/pipeline_*.py"))


def _read(text: str, class_name: str) -> dict[str, Any] | None:
    """Return the literal defaults of ``__call__`` of a class in a source, or None if it has none."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__call__":
                    return _literals(part.args)
    return None


def _literals(arguments: ast.arguments) -> dict[str, Any]:
    named = [*arguments.posonlyargs, *arguments.args]
    pairs: list[tuple[ast.arg, ast.expr | None]] = list(
        zip(named[len(named) - len(arguments.defaults) :], arguments.defaults)
    )
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults))
    found: dict[str, Any] = {}
    for argument, default in pairs:
        try:
            found[argument.arg] = ast.literal_eval(default) if default is not None else None
        except ValueError:
            continue  # a name or a call; the defaults that are asked for are numbers
    return found
