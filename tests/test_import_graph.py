"""Who imports whom: no circles, no arrows between export and deploy, none from the core to either.

The symbolic links dvdquant/export and dvdquant/deploy are resolved, and imports inside functions count.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

import dvdquant
from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
ROOMS = load_script(ROOT / "docs" / "scripts" / "rooms.py")
Nodes = Callable[[ast.AST], Iterator[ast.AST]]
# The public face, the commands and what both call stand above all rooms.
TOP = ("dvdquant", "dvdquant.api", "dvdquant.planned_export", "dvdquant.__main__", "dvdquant.cli")


@functools.cache
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


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below this one that run: all but the body of ``if TYPE_CHECKING``."""
    if ROOMS.for_types_only(node):
        assert isinstance(node, ast.If)
        yield from node.orelse
    else:
        yield from ast.iter_child_nodes(node)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that may run."""
    for child in _children(tree):
        yield child
        yield from _nodes(child)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imported_names(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that one node imports: modules, and names in modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dvdquant":
        yield f"dvdquant.{node.attr}"


def _module_of(name: str, modules: Collection[str]) -> str:
    """The longest module that the dotted name begins with, or "". A public name is looked for in its home."""
    package, _, public = name.partition(".")
    if package == "dvdquant" and public in dvdquant._HOMES:
        name = dvdquant._HOMES[public]
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _imports(
    name: str, is_package: bool, tree: ast.Module, modules: Collection[str], nodes: Nodes = _nodes
) -> set[str]:
    """Modules that this one imports anywhere in its code. What the public face imports for others is theirs."""
    package = name if is_package else name.rpartition(".")[0]
    found = {_module_of(each, modules) for node in nodes(tree) for each in _imported_names(node, package)}
    return found - {"", name}


def _named_in_strings(name: str, tree: ast.Module, modules: Collection[str]) -> set[str]:
    """Modules that this one names in a string, as it does for a process that runs them (``python -m``)."""
    strings = {node.value for node in _nodes(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return (strings & set(modules)) - {name}


def _graph(nodes: Nodes) -> dict[str, set[str]]:
    files = _modules()
    return {name: _imports(name, path.name == "__init__.py", _tree(path), files, nodes) for name, path in files.items()}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> the modules it imports, anywhere in its code."""
    return _graph(_nodes)


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


def test_no_circle_of_types() -> None:
    """Imports for types count too, but those of the public face, which names what stands above it."""
    assert _circles(_graph(ast.walk) | {"dvdquant": set()}) == []


def test_no_circle_of_rooms() -> None:
    """Not even between folders, as the drawing in docs/walk.md takes them."""
    graph = ROOMS.imports()
    assert len(graph) > 20
    assert _circles(graph) == []


def _between_folders(graph: dict[str, set[str]], packages: Collection[str]) -> dict[str, set[str]]:
    """The graph with each folder that holds no other as one room; a file beside folders is a room of its own."""
    outer = {name.rpartition(".")[0] for name in packages}

    def room(name: str) -> str:
        folder = name if name in packages else name.rpartition(".")[0]
        return name if folder in outer else folder

    found: dict[str, set[str]] = {}
    for name, targets in graph.items():
        found.setdefault(room(name), set()).update({room(target) for target in targets} - {room(name)})
    return found


def test_no_circle_of_inner_rooms(graph: dict[str, set[str]]) -> None:
    """Nor between the folders within a room, such as those of the server."""
    packages = {name for name, path in _modules().items() if path.name == "__init__.py"}
    found = _between_folders(graph, packages)
    assert {"dvdquant.cli.run", "dvdquant.deploy.serve.server", "dvdquant.deploy.serve.store"} <= found.keys()
    assert "dvdquant.deploy.serve.store.files" not in found
    assert _circles(found) == []


def test_a_circle_of_inner_rooms_would_be_found() -> None:
    """Two folders whose files make no circle: a.b.one -> a.c.two, a.c.three -> a.b.four."""
    graph: dict[str, set[str]] = {name: set() for name in ("a", "a.b", "a.c", "a.c.two", "a.b.four")}
    graph |= {"a.b.one": {"a.c.two"}, "a.c.three": {"a.b.four"}}
    assert _circles(graph) == []
    assert _circles(_between_folders(graph, {"a", "a.b", "a.c"})) == [["a.b", "a.c"]]


def test_a_circle_would_be_found() -> None:
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


ALLOWED = {"core": {"core"}, "export": {"core", "export"}, "deploy": {"core", "deploy"}}


def _arrows_back(name: str, targets: set[str]) -> list[str]:
    """The package itself may be imported from anywhere: for its version, and its public names count as their homes."""
    return [
        f"{name} -> {target}"
        for target in sorted(targets - {"dvdquant"})
        if _room(name) != "top" and _room(target) not in ALLOWED[_room(name)]
    ]


def test_arrows_go_one_way(graph: dict[str, set[str]]) -> None:
    modules = _modules()
    strings = {name: _named_in_strings(name, _tree(path), modules) for name, path in modules.items()}
    assert "dvdquant.deploy.serve.workers.worker_process" in strings["dvdquant.deploy.serve.workers.supervisor"]
    assert [arrow for name, targets in graph.items() for arrow in _arrows_back(name, targets | strings[name])] == []


CORE, RUN = "dvdquant.recipe", "dvdquant.deploy.sessions"


@pytest.mark.parametrize(
    ("code", "target"),
    [
        (f"import {RUN}", RUN),
        (f"def f():\n    from {RUN}.base import EngineSession", f"{RUN}.base"),
        (f"if TYPE_CHECKING:\n    pass\nelse:\n    import {RUN}", RUN),
        (f"if not TYPE_CHECKING:\n    import {RUN}", RUN),
        (f"if not typing.TYPE_CHECKING:\n    import {RUN}", RUN),
        ("from dvdquant import DvdqTransformer", "dvdquant.deploy.pipelines.transformer"),
        ("from dvdquant import export_model", "dvdquant.api"),
        ("import dvdquant\ndvdquant.plan_schedule", "dvdquant.api"),
        (f"from {RUN} import open_session\nfrom {RUN}.base import EngineSession", RUN),
        (f"from {RUN} import base, open_session", RUN),
        (f"from {RUN} import base", f"{RUN}.base"),
        ("def f():\n    from .deploy.sessions import open_session", RUN),
        (f"importlib.import_module('{RUN}.onnxruntime')", f"{RUN}.onnxruntime"),
        (f"COMMAND = (sys.executable, '-m', '{RUN}.engine_process')", f"{RUN}.engine_process"),
    ],
)
def test_an_arrow_back_would_be_found(code: str, target: str) -> None:
    tree, modules = ast.parse(code), _modules()
    assert target in modules
    found = _imports(CORE, False, tree, modules) | _named_in_strings(CORE, tree, modules)
    assert f"{CORE} -> {target}" in _arrows_back(CORE, found)


def test_what_is_no_arrow_back() -> None:
    code = f"from dvdquant import __version__\nfrom dvdquant.text import amount\nif TYPE_CHECKING:\n    import {RUN}"
    found = _imports(CORE, False, ast.parse(code), _modules())
    assert found == {"dvdquant", "dvdquant.text"}
    assert _arrows_back(CORE, found) == []


def _from_checkout(tree: ast.Module) -> set[str]:
    """Folders of the checkout and scripts of the kernels that code imports, which an installed package lacks."""
    names = {each.partition(".")[0] for node in _nodes(tree) for each in _imported_names(node, "")}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"dvdquant"}
    return names & (folders | {path.stem for path in (ROOT / "kernels").rglob("*.py")})


@pytest.mark.parametrize(
    "code",
    [
        "from tests.support import costs",
        "import benchmarks.quality",
        "def f():\n    from deploy import sessions",
        "import check_cases",
    ],
)
def test_an_import_from_the_checkout_would_be_found(code: str) -> None:
    assert _from_checkout(ast.parse(code))


def test_the_package_imports_nothing_of_the_checkout() -> None:
    assert {name: found for name, path in _modules().items() if (found := _from_checkout(_tree(path)))} == {}


def _of_test_files(path: str, tree: ast.Module) -> set[str]:
    """What a test or a helper of tests imports from a test file: helpers have a place of their own, tests/support."""
    package = path.rpartition("/")[0].replace("/", ".")
    names = {each for node in ast.walk(tree) for each in _imported_names(node, package)}
    return {name for name in names if re.match(r"tests\.(?!support\b)", name)}


@pytest.mark.parametrize(
    "code",
    [
        "from tests.deploy.switching.test_gbs import CHANGES",
        "def f():\n    import tests.deploy.switching.test_gbs",
        "from tests.deploy import test_gbs",
        "from tests import test_readme",
        "def f():\n    from .test_gbs import CHANGES",
        "import_module('tests.deploy.switching.test_gbs')",
    ],
)
def test_an_import_from_a_test_file_would_be_found(code: str) -> None:
    assert _of_test_files("tests/deploy/switching/test_controller.py", ast.parse(code))
    assert not _of_test_files("tests/deploy/switching/test_controller.py", ast.parse("from tests.support import costs"))


def test_no_test_imports_from_another() -> None:
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "tests").rglob("*.py")}
    assert len(files) > 200
    assert {name: found for name, path in files.items() if (found := _of_test_files(name, _tree(path)))} == {}


def _rooms_of(folder: str, within: str = "") -> set[str]:
    """The folders below one that hold Python files besides ``__init__.py``, as paths from ``within``."""
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    return {path.parent.relative_to(ROOT / within).as_posix() for path in files}


def test_tests_stand_in_rooms_of_the_house() -> None:
    """A folder of tests has the path of a room of the package, or of a folder beside it; and every room has tests."""
    # rglob follows no link, so the rooms of export and deploy come from the folders that the links lead to.
    rooms = (_rooms_of("dvdquant", "dvdquant") | _rooms_of("export") | _rooms_of("deploy")) - {"."}
    tests = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")} - {"."}
    assert len(rooms) > 30
    assert {room for room in tests - rooms if not (ROOT / room).is_dir()} == set(), "no such room"
    assert rooms - tests == set(), "a room without tests"


def _run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when its module is imported: those of functions do not."""
    for child in _children(tree):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
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
