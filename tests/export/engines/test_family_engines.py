"""TensorRT-RTX takes the graphs of every family: both bit-widths, every SM, through the whole pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvdquant.export.engines.precision import RTX_SMS
from dvdquant.export.options import ExportOptions
from dvdquant.export.pipeline import run_export
from dvdquant.export.plan import plan_export
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support.tiny_models import CONFIGS, write_checkpoint


# Tests of the pipeline build Wan's engines, and with a profile.
@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "cogvideox-2b" else [pytest.mark.stress]) for name in CONFIGS],
)
def test_engines_of_every_family(family: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {**CONFIGS[family], "num_layers": 1})
    options = ExportOptions(
        str(model), tmp_path / "out", get_recipe("w4a4"), sms=RTX_SMS, latent="3x8x8", text_tokens=12
    )
    result = run_export(plan_export(options), Progress("quiet"))
    served = {(sm, engine["act_bits"]) for engine in result.manifest.engines for sm in engine["sm"]}
    assert served == {(sm, bits) for sm in RTX_SMS for bits in (4, 8)}
    layers = len(result.manifest.layers)
    for build, engine in zip(result.builds, result.manifest.engines, strict=True):
        assert (options.out / engine["path"]).stat().st_size == build["bytes"]
        listed = {"int8": "Int8", "nvfp4": "FP4E2M1"}[engine["precision"]]
        # The builder's own listing: every quantized layer multiplies in the type the manifest names.
        assert build["products"][listed] == layers


@pytest.mark.stress
@pytest.mark.parametrize("family", ["wan", "hunyuan-video", "cogvideox", "ltx-video"])
def test_ranges_of_every_family(family: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS[family])
    options = ExportOptions(
        str(model), tmp_path / "out", get_recipe("w4a8"), sms=("8.9",), latent="2:4x4:8:12x6:10", text_tokens=12
    )
    result = run_export(plan_export(options), Progress("quiet"))
    (engine,) = result.manifest.engines
    assert engine["shapes"]["height"] == [4, 8, 12]
