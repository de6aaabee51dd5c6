"""Graphs of a few kilobytes whose functions unfold to millions of nodes, or without end: refused before anything unfolds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

from dvdquant.cli.inspect import main as inspect_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.errors import EngineError
from dvdquant.onnx.function_depth import MAX_CALLS, MAX_NODES, check_functions
from tests.support import session_exports as made
from tests.support.commands import rehash

OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid("evil", 1)]
GRAPHS = ("onnx/transformer_a4.onnx", "onnx/transformer_a8.onnx")


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """A function that calls others one after the other."""
    names = ["a", *(f"t{i}" for i in range(len(calls) - 1)), "b"]
    nodes = [helper.make_node(c, [x], [y], domain="evil") for c, x, y in zip(calls, names, names[1:])]
    return helper.make_function(
        "evil", name, ["a"], ["b"], nodes or [helper.make_node("Identity", ["a"], ["b"])], OPSETS
    )


def in_a_row(count: int, width: int = 1) -> list[onnx.FunctionProto]:
    """Functions that each call the next one ``width`` times."""
    return [function(f"F{i}", *[f"F{i + 1}"] * width) for i in range(count - 1)] + [function(f"F{count - 1}")]


def in_a_branch(call: str) -> onnx.FunctionProto:
    """A function that calls another one inside the branches of an If, each in an If of its own."""
    node = helper.make_node(call, ["a"], ["y0"], domain="evil")
    for level in range(1, 15):
        branches = [helper.make_graph([node], f"g{level}", [], [onnx.ValueInfoProto(name=node.output[0])])] * 2
        node = helper.make_node("If", ["a"], [f"y{level}"], then_branch=branches[0], else_branch=branches[1])
        if level > 2:  # two branches double the size of the message
            node.attribute.pop()
    return helper.make_function("evil", "F0", ["a"], [node.output[0]], [node], OPSETS)


def called(functions: list[onnx.FunctionProto], times: int = 1) -> onnx.ModelProto:
    nodes = [helper.make_node("F0", [f"x{i}"], [f"x{i + 1}"], domain="evil") for i in range(times)]
    graph = helper.make_graph(nodes, "g", [], [])
    return helper.make_model(graph, functions=functions, opset_imports=OPSETS)


HOSTILE: dict[str, tuple[list[onnx.FunctionProto], str]] = {
    "itself": ([function("F0", "F0")], "F0' calls itself"),
    "a ring": ([function("F0", "F1"), function("F1", "F2"), function("F2", "F1")], "calls itself, or one that does"),
    "in a branch": ([in_a_branch("F0")], "F0' calls itself"),
    "too deep": (in_a_row(MAX_CALLS + 1), "more than 32 functions"),
    "much too deep": (in_a_row(5000), "more than 32 functions"),  # ONNX Runtime ends the process
    "doubled": (in_a_row(22, 2), "more than 2000000 nodes"),  # gigabytes and minutes
    "tenfold, and deep": (in_a_row(30, 10), "more than 2000000 nodes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_functions_that_unfold_without_end_are_refused(name: str) -> None:
    functions, said = HOSTILE[name]
    with pytest.raises(ValueError, match=said):
        check_functions(called(functions))


def test_functions_within_the_bounds_pass() -> None:
    check_functions(called(in_a_row(MAX_CALLS)))
    check_functions(called(in_a_row(18, 2), times=3))  # 2¹⁸ − 1 calls and as many bodies, three times
    check_functions(called([function("F0", "F1"), function("F1"), *[function(f"G{i}", "F1") for i in range(9)]]))
    widest = 1
    while 2 * (2 ** (widest + 1) - 1) < MAX_NODES:
        widest += 1
    check_functions(called(in_a_row(widest, 2)))


@pytest.mark.parametrize("name", ["much too deep", "doubled"])
def test_an_export_with_such_a_graph_is_refused(name: str, tmp_path: Path) -> None:
    """Its manifest vouches for it, as a stranger's does."""
    out = made.copy_of(made.family_export("wan"), tmp_path / "out")
    for path in GRAPHS:
        _edit(out / path, lambda model: model.functions.extend(HOSTILE[name][0]))
    rehash(out, *GRAPHS)
    artifact = Artifact.open(out)
    with pytest.raises(EngineError, match=HOSTILE[name][1]):
        OnnxRuntimeSession(artifact)
    for arguments in (["--check"], ["--graph", GRAPHS[0]]):
        result = CliRunner().invoke(inspect_main, [str(out), *arguments])
        assert result.exit_code == 2, result.output
        assert HOSTILE[name][1] in result.output


def _edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph and have its first output come from the function F0."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    model.opset_import.append(OPSETS[1])
    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == last else name for name in node.output]
    model.graph.node.append(helper.make_node("F0", ["before"], [last], domain="evil"))
    path.write_bytes(model.SerializeToString())
