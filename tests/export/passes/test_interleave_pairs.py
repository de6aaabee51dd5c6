"""The rotary pass, case by case."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from dvdquant.export.passes.interleave_pairs import interleave_pairs
from tests.support.small_graphs import ops, parse, random, run


def pairs_model(between: str = "", after: str = "", even: str = "0, 2, 4", odd: str = "1, 3, 5") -> ir.Model:
    """What tracing makes of ``out = empty; out[..., 0::2] = a; out[..., 1::2] = b`` for out [2, 5, 6]."""
    tail = after or "y = Transpose <perm = [2, 1, 0]> (full)"
    indices = [f"Constant <value = int64[3,1] {{{i}}}> ()" for i in (even, odd)]
    inner = "first" if not between else "between"
    return parse(
        f"""g (float[2,5,3] a, float[2,5,3] b, float[6,5,2] base) => (float[2,5,6] y)
        {{ evens = {indices[0]} odds = {indices[1]}
          at = Transpose <perm = [2, 1, 0]> (a) bt = Transpose <perm = [2, 1, 0]> (b)
          first = ScatterND(base, evens, at) {between} full = ScatterND({inner}, odds, bt) {tail} }}"""
    )


@pytest.mark.parametrize(
    "between",
    [
        "",
        "between = Identity(first)",
        "t = Transpose <perm = [2, 1, 0]> (first) between = Transpose <perm = [2, 1, 0]> (t)",
        "t = Transpose <perm = [1, 2, 0]> (first) between = Transpose <perm = [2, 0, 1]> (t)",
    ],
)
def test_interleave_pairs_1_and_2(between: str) -> None:
    model = pairs_model(between)
    feeds = {"a": random(2, 5, 3), "b": random(2, 5, 3, seed=1), "base": random(6, 5, 2, seed=2)}
    want = run(pairs_model(between), feeds)[0]
    assert interleave_pairs(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert "ScatterND" not in ops(model)
    got = run(model, feeds)[0]
    assert np.array_equal(got, want)
    assert np.array_equal(got[..., 0::2], feeds["a"])
    assert np.array_equal(got[..., 1::2], feeds["b"])
    # Case 2: the permutation there and the one back cancel.
    assert "Transpose" not in ops(model)
    assert not interleave_pairs(model)


def test_interleave_pairs_2_composes_another_transpose() -> None:
    after = "u = Transpose <perm = [1, 2, 0]> (full) y = Transpose <perm = [1, 0, 2]> (u)"
    model = pairs_model(after=after)
    feeds = {"a": random(2, 5, 3), "b": random(2, 5, 3, seed=1), "base": random(6, 5, 2, seed=2)}
    want = run(pairs_model(after=after), feeds)[0]
    assert interleave_pairs(model)
    assert np.array_equal(run(model, feeds)[0], want)


@pytest.mark.parametrize(
    "options",
    [
        {"even": "0, 1, 2", "odd": "3, 4, 5"},
        {"even": "1, 3, 5", "odd": "0, 2, 4"},
        {"between": "between = Transpose <perm = [0, 1, 2]> (other)"},
        {"between": "between = Neg(first)"},
    ],
)
def test_interleave_pairs_3_left_alone(options: dict[str, Any]) -> None:
    if "other" in options.get("between", ""):
        options = {"between": "other = Exp(first) " + options["between"]}
    model = pairs_model(**options)
    before = ops(model)
    assert not interleave_pairs(model)
    assert ops(model) == before
