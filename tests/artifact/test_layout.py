"""Names of the files of an export: what one function writes, the other ones know again."""

from __future__ import annotations

import pytest

from dvdquant.artifact.layout import engine_path, graph_path, is_engine_of, is_weight_path, weight_paths

COMPONENTS = ("transformer", "transformer_2", "x", "x_a8", "a.b-c", "aXb-c", "x_a8_qdq")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_file_is_of_its_transformer_and_of_no_other(component: str) -> None:
    for bits in (4, 6, 8):
        path = engine_path(component, "tensorrt_rtx", ("8.9", "12.0"), bits)
        assert [c for c in COMPONENTS if is_engine_of(path, c, bits)] == [component]
        assert not is_engine_of(path, component, 14 - bits if bits != 6 else 5)
    for path in [*weight_paths(component, 1), *weight_paths(component, 12)]:
        assert [c for c in COMPONENTS if is_weight_path(path, c)] == [component]


def test_no_two_graphs_have_one_name() -> None:
    named = [graph_path(c, bits, flavour) for c in COMPONENTS for bits in (4, 6, 8) for flavour in ("tensorrt", "onnx")]
    assert len(set(named)) == len(named)


def test_names_are_those_of_exports_that_exist() -> None:
    """They are read by their names, so that these may not change."""
    assert weight_paths("transformer", 2)[1] == "onnx/transformer-00002-of-00002.safetensors"
    assert graph_path("transformer", 8, "onnx") == "onnx/transformer_a8_qdq.onnx"
    assert (
        engine_path("transformer", "tensorrt_rtx", ["8.9", "12.0"], 4) == "engines/rtx-sm89+120/transformer_a4.engine"
    )
    assert not is_engine_of("engines/rtx-sm89/transformer_a8.engine.log", "transformer", 8)
