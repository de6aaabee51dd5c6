"""The pass for known sizes of tensors with axes that vary."""

from __future__ import annotations

import numpy as np
import pytest

from dvdquant.export.passes.static_sizes import static_sizes
from tests.support.small_graphs import ops, parse, random, run


def graph(index: str, attributes: str = "", result: str = "int64[1]", source: str = "float[N,4,6]") -> str:
    return f"""g ({source} x) => ({result} y)
        {{ i = Constant <value = {index}> () s = Shape {attributes} (x) y = Gather <axis = 0> (s, i) }}"""


@pytest.mark.parametrize(
    ("index", "attributes", "result", "want"),
    [
        ("int64[1] {2}", "", "int64[1]", [6]),
        ("int64[1] {-1}", "", "int64[1]", [6]),
        ("int64[2] {1, 2}", "", "int64[2]", [4, 6]),
        ("int64 {1}", "", "int64", 4),
        ("int64[1] {0}", "<start = 1>", "int64[1]", [4]),
        ("int64[1] {1}", "<start = -2>", "int64[1]", [6]),
        ("int64[1] {0}", "<start = 1, end = 2>", "int64[1]", [4]),
    ],
)
def test_a_known_size_is_a_constant(index: str, attributes: str, result: str, want: object) -> None:
    text = graph(index, attributes, result)
    feeds = {"x": random(3, 4, 6)}
    before = run(parse(text), feeds)[0]
    model = parse(text)
    assert static_sizes(model)
    assert "Gather" not in ops(model)
    after = run(model, feeds)[0]
    assert after.dtype == before.dtype
    assert np.array_equal(after, before)
    assert np.array_equal(after, np.array(want))
    assert not static_sizes(model)


@pytest.mark.parametrize(
    "text",
    [
        graph("int64[1] {0}"),  # varies
        graph("int64[2] {0, 1}", result="int64[2]"),  # one of two varies
        graph("int64[1] {0}", "<end = 1>"),
        graph("int64[1] {2}", source="float[N,4,C]"),
    ],
)
def test_a_size_that_varies_stays(text: str) -> None:
    model = parse(text)
    assert not static_sizes(model)
    assert "Gather" in ops(model)


def test_a_gather_from_values_stays() -> None:
    model = parse(
        """g (int64[3] x) => (int64[1] y) { i = Constant <value = int64[1] {2}> () y = Gather <axis = 0> (x, i) }"""
    )
    assert not static_sizes(model)
