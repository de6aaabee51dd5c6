"""Tests reach the product by its public names: functions, classes, methods and constants that begin with ``_`` are its own.

The state of an object (``session._model``) is not counted: it is data, which a test looks at where nothing public shows it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dvdquant", "export", "deploy", "benchmarks")
"""Packages of ours. Scripts of the other rooms are modules by their file names."""
SCRIPT_ROOMS = ("kernels", "plugins", "docs/scripts")
PATCHES = ("setattr", "delattr", "getattr", "hasattr", "object", "patch")
"""Calls that take a name as text: Python's own, pytest's monkeypatch, mock.patch and mock.patch.object."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

ALLOWED = {
    # diffusers calls and looks for these by their names; the tests do what diffusers does.
    "tests/deploy/pipelines/test_pipelines_control.py": {"_reset_stateful_cache"},
    "tests/deploy/pipelines/test_transformer_dropin.py": {"_diffusers_hook"},
    # State of an object, which is not counted, under the name of a private function elsewhere.
    "tests/deploy/generation/test_threads_and_interrupts.py": {"_lock"},
    "tests/deploy/sessions/test_session_engines.py": {"_library"},
    # The way of an engine's input to the device, without the rest of such a session, which needs a GPU.
    "tests/deploy/sessions/test_shared_memory.py": {"_weight"},
    # Which module holds a public name is the package's own business; the import graph has to know it all the same.
    "tests/test_import_graph.py": {"_HOMES"},
}


def is_private(name: str) -> bool:
    """Whether a name is private to its module or class; ``__version__`` and ``_`` alone are not."""
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


@cache
def product_files() -> tuple[Path, ...]:
    rooms = (*PACKAGES, *SCRIPT_ROOMS)
    return tuple(p for room in rooms for p in (ROOT / room).rglob("*.py"))  # which follows no links


@cache
def scripts() -> frozenset[str]:
    return frozenset(p.stem for p in product_files() if p.relative_to(ROOT).parts[0] not in PACKAGES)


@cache
def private_names() -> tuple[frozenset[str], frozenset[str]]:
    """The product's private methods; these with its private functions and constants."""
    methods, others = set(), set()
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text())):
            for part in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else ():
                if isinstance(part, FUNCTIONS):
                    (methods if isinstance(node, ast.ClassDef) else others).add(part.name)
                elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                    stored = [n for n in ast.walk(part) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                    others |= {name.id for name in stored if name.id.isupper()}
    private = frozenset(filter(is_private, methods))
    return private, private | frozenset(filter(is_private, others))


def is_ours(module: str) -> bool:
    first = module.partition(".")[0]
    return first in PACKAGES or first in scripts()


def root_of(node: ast.expr) -> str:
    """The name that an expression of dots begins with, or nothing."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_uses(text: str, methods: frozenset[str], names: frozenset[str]) -> Iterator[str]:
    """The private names of the product that a test file imports, reads from a module or class, patches, or calls.

    Args:
        text: The source of the file.
        methods: The names of the product's private methods.
        names: The names of its private methods, functions and constants.
    """
    tree = ast.parse(text)
    # 1. What is imported, under which name; methods that the file defines itself are its own.
    imported, own = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            imported |= {alias.asname or alias.name for alias in node.names}
            yield from filter(is_private, (alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            imported |= {(a.asname or a.name).partition(".")[0] for a in node.names if is_ours(a.name)}
        elif isinstance(node, FUNCTIONS):
            own.add(node.name)
    # 2. What is taken from it.
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root_of(node.value) in imported:
            yield node.attr
        elif isinstance(node, ast.Call):
            called = node.func
            named = getattr(called, "attr", getattr(called, "id", ""))
            texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if named in PATCHES and texts:
                place, _, name = texts[0].rpartition(".")
                of_ours = is_ours(place) if place else node.args and root_of(node.args[0]) in imported
                if is_private(name) and (of_ours or name in names - own):
                    yield name
            if isinstance(called, ast.Attribute) and called.attr in methods - own and root_of(called.value) != "self":
                yield called.attr


def test_tests_use_no_private_name_of_the_product() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if names := set(private_uses(path.read_text(), *private_names())):
            found[path.relative_to(ROOT).as_posix()] = names
    assert found == ALLOWED, "make it public with its arguments documented, or test what shows outside"


@pytest.mark.parametrize(
    "line",
    [
        "from dvdquant.quantize.layer import _part",
        "from check_ops import _part",
        "from dvdquant.quantize import layer\nlayer._part(1)",
        "import dvdquant.quantize.layer as layer\nlayer._part = 2",
        "import dvdquant\ndvdquant.quantize.layer._part",
        "from dvdquant.quantize import layer\nmonkeypatch.setattr(layer, '_part', 1)",
        "monkeypatch.setattr('dvdquant.quantize.layer._part', 1)",
        "from dvdquant.quantize.layer import Layer\nmock.patch.object(Layer, '_part')",
        "worker._part(job)",
        "monkeypatch.setattr(session, '_part', slow)",
        "mock.patch('dvdquant.quantize.layer._part')",
    ],
)
def test_a_private_name_is_found(line: str) -> None:
    assert set(private_uses(line, frozenset({"_part"}), frozenset({"_part", "_TABLE"}))) == {"_part"}


def test_a_private_constant_of_a_script_is_found() -> None:
    """Where what it is taken from is no import, as of a fixture."""
    line = "script = load_script('simulate')\nmonkeypatch.setattr(script, '_TABLE', 1)"
    assert set(private_uses(line, frozenset(), frozenset({"_TABLE"}))) == {"_TABLE"}


def test_what_is_public_or_of_others_is_not() -> None:
    for line in (
        "from dvdquant.quantize.layer import part\npart.__name__",
        "import torch\ntorch._dynamo.reset()",
        "from torch import nn\nmonkeypatch.delattr(nn.Module, '_part_of_torch')",
        "assert session._model is None",
        "def _part(): ...\nself._part()\nobject()._part()",
    ):
        assert list(private_uses(line, frozenset({"_part"}), frozenset({"_part", "_TABLE"}))) == [], line
