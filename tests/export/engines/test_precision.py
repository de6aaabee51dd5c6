"""The table of what executes, and Polygraphy on exported graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.export.engines.polygraphy_tools import onnx_summary, rtx_unsupported
from dvdquant.export.engines.precision import RTX_SMS, TENSORRT_SMS, choose_precision, plan_engines, what_executes
from dvdquant.recipe import RECIPES, ActivationSpec
from tests.support import quant_linear_graphs as qg
from tests.support.engine_building import save, unparsable


def test_table_of_precisions() -> None:
    token8, token4, group4 = ActivationSpec(8), ActivationSpec(4), ActivationSpec(4, 128)
    assert {choose_precision("tensorrt_rtx", sm, token8) for sm in RTX_SMS} == {"int8"}
    assert choose_precision("tensorrt_rtx", "8.9", token4) == "int8"
    assert choose_precision("tensorrt_rtx", "12.0", token4) == "nvfp4"
    assert choose_precision("tensorrt_rtx", "8.9", group4) == "int4-weight-only"
    assert choose_precision("tensorrt_rtx", "12.1", group4) == "nvfp4"
    assert choose_precision("tensorrt_rtx", "12.0", token4, "int8") == "int8"
    assert choose_precision("tensorrt", "9.0", token4) == "plugin"


@pytest.mark.parametrize(
    ("backend", "sm", "activation", "override", "message"),
    [
        ("tensorrt_rtx", "9.0", ActivationSpec(8), "auto", r"(?s)SM 9\.0 are not supported.*8\.0, 8\.6, 8\.9"),
        ("tensorrt", "7.5", ActivationSpec(8), "auto", r"(?s)SM 7\.5 are not supported.*10\.3.*11\.0.*12\.1"),
        ("onnx", "8.9", ActivationSpec(8), "auto", "unknown engine backend"),
        ("tensorrt_rtx", "8.9", ActivationSpec(8), "fp8", "unknown precision 'fp8'"),
        ("tensorrt_rtx", "8.9", ActivationSpec(4), "nvfp4", r"nvfp4 cannot run 4-bit .* on SM 8\.9"),
        ("tensorrt_rtx", "12.0", ActivationSpec(8), "nvfp4", "nvfp4 cannot run 8-bit"),
        ("tensorrt_rtx", "8.9", ActivationSpec(8, 64), "int8", "int8 cannot run 8-bit activations, groups of 64"),
        ("tensorrt", "8.9", ActivationSpec(8), "int8", "TensorRT engines run the plugin"),
        ("tensorrt", "8.9", ActivationSpec(6), "auto", "(?s)no 6-bit activations.*available: 4, 8"),
    ],
)
def test_precisions_that_cannot_be(
    backend: str, sm: str, activation: ActivationSpec, override: str, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        choose_precision(backend, sm, activation, override)


def test_plans_share_engines_where_they_can() -> None:
    sms = ["8.0", "12.0", "8.9", "8.0"]
    plans = plan_engines("tensorrt_rtx", sms, RECIPES["w4a4"].activations, recipe=RECIPES["w4a4"])
    assert [(p.act_bits, p.sms, p.precision) for p in plans] == [
        (4, ("8.0", "8.9"), "int8"),
        (4, ("12.0",), "nvfp4"),
        (8, ("8.0", "12.0", "8.9"), "int8"),
    ]
    assert plans[0].folder == "tensorrt_rtx-8.0+8.9"
    plans = plan_engines("tensorrt", ["8.9", "9.0"], [ActivationSpec(8)])
    assert [p.sms for p in plans] == [("8.9",), ("9.0",)]


def test_words() -> None:
    assert what_executes("int8", 4, "8.9") == (
        "INT8 tensor cores; 4-bit weights and 4-bit activation codes each stored in 8 bits, so no faster than a8"
    )
    assert "rounded again to 8 bits" in what_executes("int8", 8, "8.9", RECIPES["w4a8"])
    assert "rounded again" not in what_executes("int8", 8, "8.9", RECIPES["w4a4"])
    assert "4-bit codes (rounded to 4 bits twice)" in what_executes("nvfp4", 4, "12.0")
    assert "original checkpoint" in what_executes("nvfp4", 4, "12.0", from_checkpoint=True)
    assert "no faster than 16 bit" in what_executes("int4-weight-only", 8, "8.0")
    for sm in TENSORRT_SMS:
        words = what_executes("plugin", 4, sm)
        assert ("s4" in words) == sm.startswith("8.")
    with pytest.raises(UnsupportedError):
        what_executes("plugin", 4, "7.5")


def test_polygraphy_summary(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (256, 512, 256), 8, block=64)
    path = save(spec, tmp_path, "int4-weight-only")
    (tmp_path / "weights.safetensors").unlink()
    text = onnx_summary(path)
    assert "x [dtype=float16, shape=(1, 'tokens', 256)]" in text
    assert "Node(s)" in text
    assert "colored" not in text
    assert "DequantizeLinear" in onnx_summary(path, "layers")


def test_polygraphy_verdict(tmp_path: Path) -> None:
    spec = qg.Spec("bf16", (256, 512, 256), 4, block=16)
    assert rtx_unsupported(save(spec, tmp_path, "int8")) == []
    ((operator, node, reason),) = rtx_unsupported(unparsable(tmp_path))
    assert (operator, node) == ("Det", "culprit")
    assert "UNSUPPORTED_NODE" in reason
    with pytest.raises(EngineError, match=r"missing\.onnx cannot be read"):
        rtx_unsupported(tmp_path / "missing.onnx")


def test_polygraphy_on_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(EngineError, match="no ONNX file"):
        onnx_summary(tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        onnx_summary(tmp_path / "missing.onnx")
    with pytest.raises(EngineError):
        rtx_unsupported(tmp_path / "m.onnx")


def test_an_override_applies_to_the_graphs_that_can_run_it() -> None:
    both = [ActivationSpec(4), ActivationSpec(8)]
    plans = plan_engines("tensorrt_rtx", ("12.0",), both, override="nvfp4")
    assert [(p.act_bits, p.precision) for p in plans] == [(4, "nvfp4"), (8, "int8")]
    with pytest.raises(UnsupportedError, match="nvfp4 cannot run 4-bit"):
        plan_engines("tensorrt_rtx", ("8.9",), both, override="nvfp4")
    with pytest.raises(UnsupportedError, match="nvfp4 cannot run 8-bit"):
        plan_engines("tensorrt_rtx", ("12.0",), both[1:], override="nvfp4")
