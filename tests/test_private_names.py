"""Names that begin with ``_`` are a file's own: tests reach the product by its public ones, and so do its other files.

Functions, classes, methods and constants count, and so does the state of an object (``session._model``).
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
OWNERS = ("self", "cls", "super()", "torch")
"""Whose private names a file of the product may take."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

ALLOWED = {
    # diffusers calls, looks for and sets these by their names; the tests do what diffusers does.
    "tests/deploy/pipelines/test_pipelines_control.py": {"_interrupt", "_reset_stateful_cache"},
    "tests/deploy/pipelines/test_transformer_dropin.py": {"_diffusers_hook"},
    "tests/deploy/pipelines/test_transformer_requests.py": {"_interrupt"},
    # numba's, which is taken away to see that this is noticed.
    "tests/quantize/backends/test_jit.py": {"_cache"},
    # A lock, in whose place another stands that says when a thread waits for it: nothing else shows that one waits.
    "tests/deploy/generation/test_cancel.py": {"_denoising"},
    "tests/deploy/generation/test_threads_and_interrupts.py": {"_loading", "_lock"},
    # The way of an engine's input to the device, without the rest of such a session, which needs a GPU.
    "tests/deploy/sessions/test_shared_memory.py": {"_lora_inputs", "_weight"},
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
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def scripts() -> frozenset[str]:
    return frozenset(p.stem for p in product_files() if p.relative_to(ROOT).parts[0] not in PACKAGES)


def of_objects(tree: ast.Module) -> set[str]:
    """The names that a file gives to what its objects have: methods, fields, and what is stored on ``self``."""
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and root_of(node.value) in ("self", "cls")
        ):
            found.add(node.attr)
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, FUNCTIONS):
                found.add(part.name)
            elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                found |= stored_names(part)
    return found


def stored_names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


@cache
def private_names() -> tuple[frozenset[str], frozenset[str]]:
    """The private names that the product's objects have; these with its private functions and constants."""
    objects, others = set(), set()
    for path in product_files():
        tree = tree_of(path)
        objects |= of_objects(tree)
        for part in tree.body:
            if isinstance(part, FUNCTIONS):
                others.add(part.name)
            elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                others |= {name for name in stored_names(part) if name.isupper()}
    private = frozenset(filter(is_private, objects))
    return private, private | frozenset(filter(is_private, others))


def is_ours(module: str) -> bool:
    first = module.partition(".")[0]
    return first in PACKAGES or first in scripts()


def root_of(node: ast.expr) -> str:
    """The name that an expression of dots begins with, or nothing."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_uses(text: str, objects: frozenset[str], names: frozenset[str]) -> Iterator[str]:
    """The private names of the product that a test file imports, patches, or takes from a module, a class or an object.

    Args:
        text: The source of the file.
        objects: The private names that the product's objects have.
        names: These with its private functions and constants.
    """
    tree = ast.parse(text)
    # 1. What is imported, under which name; what the file defines itself is its own.
    imported, own = set(), of_objects(tree)
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
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if root_of(node.value) in imported or node.attr in objects - own:
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
        "assert worker._part is None",
        "worker._part = 1",
        "next(iter(worker.jobs()))._part",
        "class Double(Worker):\n    def run(self): return self._part",
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
        "class Double:\n    def __init__(self): self._part = 1\nassert Double()._part",
    ):
        assert list(private_uses(line, frozenset({"_part"}), frozenset({"_part", "_TABLE"}))) == [], line


def foreign_uses(tree: ast.Module, objects: frozenset[str]) -> Iterator[str]:
    """The private names of other files' objects that a file of the product takes; those of a base class are a subclass's.

    Args:
        tree: The source of the file.
        objects: The private names that the product's objects have.
    """
    others = objects - of_objects(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in others and ast.unparse(node.value) not in OWNERS:
            yield node.attr


def test_files_of_the_product_take_no_private_name_of_each_other() -> None:
    objects, _ = private_names()
    found: dict[str, set[str]] = {}
    for path in product_files():
        if names := set(foreign_uses(tree_of(path), objects)):
            found[path.relative_to(ROOT).as_posix()] = names
    assert found == {"dvdquant/quantize/backends/jit.py": {"_cache"}}  # numba's


def test_a_private_name_of_another_file_is_found() -> None:
    for line, found in (
        ("layer._table[0]", {"_table"}),
        ("self.inner._table", {"_table"}),
        ("class A(Layer):\n    def f(self): return self._table, super()._table", set()),
        ("class A:\n    def f(self, other):\n        self._table = other._table", set()),
    ):
        assert set(foreign_uses(ast.parse(line), frozenset({"_table"}))) == found, line
