"""Who imports whom: no circles, no arrows between export and deploy, none from the core to either.

The symbolic links dvdquant/export and dvdquant/deploy are resolved, and imports inside functions count.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
# The public face, the commands and what both call stand above all rooms.
TOP = ("dvdquant", "dvdquant.api", "dvdquant.exporting", "dvdquant.__main__", "dvdquant.cli")


def _modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package as it is imported."""
    found = {}
    for folder, prefix in (("dvdquant", "dvdquant"), ("export", "dvdquant.export"), ("deploy", "dvdquant.deploy")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if any((ROOT / folder / part).is_symlink() for part in (relative, *relative.parents)):
                continue
            parts = [prefix, *relative.with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING``, which never run."""
    for child in ast.iter_child_nodes(tree):
        if _is_type_checking(child):
            continue
        yield child
        yield from _nodes(child)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets = set()
    for node in _nodes(_tree(path)):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            targets |= {f"{base}.{alias.name}" for alias in node.names}
            targets.add(base)
    # The longest known module of each target; a package's own __init__ only where nothing below it is meant.
    found = set()
    for target in targets:
        while target and target not in modules:
            target = target.rpartition(".")[0]
        if target and target != name:
            found.add(target)
    return {t for t in found if not any(other.startswith(t + ".") for other in found)}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> the modules it imports, anywhere in its code."""
    modules = _modules()
    return {name: _imports(name, path, modules) for name, path in modules.items()}


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == node:
                    break
            if len(component) > 1:
                circles.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return circles


def _room(name: str) -> str:
    if name.startswith(("dvdquant.export", "dvdquant.deploy")):
        return name.split(".")[1]
    return "top" if name in TOP or name.startswith("dvdquant.cli.") else "core"


def test_no_circle(graph: dict[str, set[str]]) -> None:
    assert _circles(graph) == []


def test_no_circle_of_rooms() -> None:
    """Not even between folders, as the drawing in docs/walk.md takes them."""
    graph = load_script(ROOT / "docs" / "scripts" / "rooms.py").imports()
    assert len(graph) > 20
    assert _circles(graph) == []


def test_a_circle_would_be_found() -> None:
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_arrows_go_one_way(graph: dict[str, set[str]]) -> None:
    allowed = {"core": {"core"}, "export": {"core", "export"}, "deploy": {"core", "deploy"}}
    back = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if _room(name) != "top" and _room(target) not in allowed[_room(name)] and target != "dvdquant"
    ]
    assert back == []


def _run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when its module is imported: those of functions do not."""
    for child in ast.iter_child_nodes(tree):
        if _is_type_checking(child) or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from _run_at_import(child)


def _brings(tree: ast.Module, library: str) -> bool:
    names = set()
    for node in _run_at_import(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return library in names


def test_no_module_brings_onnxruntime() -> None:
    """It is imported where it runs a graph: who draws with engines or with PyTorch does not wait for it."""
    at_import = "class A:\n    try:\n        import onnxruntime.capi\n    finally:\n        pass\n"
    assert _brings(ast.parse(at_import), "onnxruntime")
    assert not _brings(ast.parse("def f():\n    import onnxruntime\n"), "onnxruntime")
    assert [name for name, path in _modules().items() if _brings(_tree(path), "onnxruntime")] == []
