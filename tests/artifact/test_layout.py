"""Names of the files of an export: what one function writes, the other ones know again."""

from __future__ import annotations

import pytest

from dvdquant.artifact.layout import engine_path, graph_path, is_of, is_weight_path, weight_paths


@pytest.mark.parametrize("component", ["transformer", "transformer_2", "x", "x_a8", "a.b-c", "x_a8_qdq"])
def test_a_file_is_of_its_transformer_and_of_no_other(component: str) -> None:
    others = {"transformer", "transformer_2", "x", "x_a8", "a.b-c", "aXb-c", "x_a8_qdq"} - {component}
    for bits in (4, 6, 8):
        paths = [graph_path(component, bits, flavour) for flavour in ("tensorrt", "onnx")]
        paths.append(engine_path(component, "tensorrt_rtx", ("8.9", "12.0"), bits))
        for path in paths:
            assert is_of(path, component)
            assert is_of(path, component, bits)
            assert not is_of(path, component, 14 - bits if bits != 6 else 5)
        assert not [other for other in others if is_of(paths[0], other) or is_of(paths[2], other)]
    for path in [*weight_paths(component, 1), *weight_paths(component, 12)]:
        assert is_weight_path(path, component)
        assert not [other for other in others if is_weight_path(path, other)]


def test_names_are_those_of_exports_that_exist() -> None:
    """They are read by their names, so that these may not change."""
    assert weight_paths("transformer", 2)[1] == "onnx/transformer-00002-of-00002.safetensors"
    assert graph_path("transformer", 8, "onnx") == "onnx/transformer_a8_qdq.onnx"
    assert (
        engine_path("transformer", "tensorrt_rtx", ["8.9", "12.0"], 4) == "engines/rtx-sm89+120/transformer_a4.engine"
    )
    assert not is_of("onnx/transformer_a8.onnx.data", "transformer")
