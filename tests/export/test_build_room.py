"""The memory that engines for a device take to build and to use, and what is said where there is too little."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from dvdquant.artifact.manifest import load_manifest
from dvdquant.errors import ResourceError
from dvdquant.export import build_room
from dvdquant.export.build_room import check_builds
from dvdquant.export.engines.report import memory_advice
from dvdquant.export.on_device import plan_on_device
from dvdquant.system.gpu import Gpu
from dvdquant.text import amount
from tests.support.device_build import ORIN, plugin_library
from tests.support.device_build import made as made
from tests.support.device_build import out as out
from tests.support.device_build import tensorrt as tensorrt

GIB = 1 << 30
SMALL_ORIN = dataclasses.replace(ORIN, memory_bytes=int(7.4 * GIB))
CARD = Gpu("RTX", "8.7", int(7.4 * GIB), False)


def sized(manifest: Any, a4: dict[str, float], a8: dict[str, float], **changes: Any) -> Any:
    """The manifest with other sizes of its two engines, in GiB: ``build``, ``held`` and ``work``."""
    names = {"build": "builder_bytes", "held": "held_bytes", "work": "working_bytes"}
    builds = tuple(
        {**entry, "working_bytes": 0, **{names[key]: int(GIB * size) for key, size in sizes.items()}, **changes}
        for entry, sizes in zip(manifest.builds, (a4, a8))
    )
    return dataclasses.replace(manifest, builds=builds)


def memory_error(manifest: Any, gpu: Gpu | None) -> ResourceError:
    with pytest.raises(ResourceError) as caught:
        check_builds(manifest.builds, manifest, gpu)
    return caught.value


def test_too_little_memory_to_build_says_what_fits(out: Path, tmp_path: Path, tensorrt: None, monkeypatch: Any) -> None:
    good = plugin_library(tmp_path / "libdvdquant_plugins.so")
    uneven = sized(load_manifest(out), {"build": 0.5}, {"build": 8})
    monkeypatch.setattr(build_room, "memory_limit", lambda: 4 * GIB)
    with pytest.raises(ResourceError, match=r"estimated to take 9\.0 GiB of memory, 1\.0 GiB of it for CUDA") as caught:
        plan_on_device(out, uneven, ORIN, plugins=[good])
    assert re.fullmatch(r"4\.0 GiB; fits: a4 \(1\.5 GiB to build, [\d.]+ MiB to use\)", str(caught.value.available))
    assert caught.value.fix == "build what fits: dvdq-build … --bits 4"
    assert len(plan_on_device(out, uneven, ORIN, plugins=[good], bits=[4]).builds) == 1


def test_what_fits_the_builder_alone_does_not_fit(out: Path, monkeypatch: Any) -> None:
    """Two engines that an 8 GB Orin could build and never hold: neither is offered."""
    manifest = load_manifest(out)
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)
    error = memory_error(sized(manifest, {"build": 2, "held": 8}, {"build": 2, "held": 8}), SMALL_ORIN)
    assert "estimated to take 8.0 GiB of device memory, 8.0 GiB for weights" in error.what
    assert error.available == (
        "5.4 GiB on Orin, where 2.0 GiB of 7.4 GiB are kept back for CUDA and the system; nothing of this export fits"
    )
    # One can be held and not built, the other built and not held.
    error = memory_error(sized(manifest, {"build": 5.5, "held": 1}, {"build": 1, "held": 8}), SMALL_ORIN)
    assert str(error.available).endswith("nothing of this export fits")
    # One fits both.
    error = memory_error(sized(manifest, {"build": 1, "held": 1, "work": 2}, {"build": 1, "held": 8}), SMALL_ORIN)
    assert str(error.available).endswith("fits: a4 (2.0 GiB to build, 3.0 GiB to use)")
    assert error.fix == "build what fits: dvdq-build … --bits 4"


@pytest.mark.parametrize(
    ("gpu", "a4", "fits"),
    [
        (SMALL_ORIN, {"held": 7.3}, False),
        (SMALL_ORIN, {"held": 5.3}, True),
        (SMALL_ORIN, {"held": 5.3, "work": 0.2}, False),
        (CARD, {"held": 6.3}, True),
        (CARD, {"held": 6.3, "work": 0.2}, False),
        # The builder and CUDA share the memory of an Orin; a card has its own.
        (SMALL_ORIN, {"build": 5.5}, False),
        (CARD, {"build": 5.5}, True),
        (CARD, {"build": 6.5}, False),
        (None, {"build": 5.5, "held": 99}, True),
    ],
)
def test_what_a_device_has_room_for(
    gpu: Gpu | None, a4: dict[str, float], fits: bool, made: Path, monkeypatch: Any
) -> None:
    """Weights, what a call works in and what CUDA and the system keep are counted together."""
    manifest = sized(load_manifest(made), a4, {})
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)
    if fits:
        check_builds(manifest.builds, manifest, gpu)
    else:
        assert "fits: a8 (" in str(memory_error(manifest, gpu).available)


def test_what_to_do_where_nothing_fits(made: Path, monkeypatch: Any) -> None:
    """Every way out is computed from the export, and would fit."""
    manifest = load_manifest(made)
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)

    def fix(each: dict[str, float], gpu: Gpu = SMALL_ORIN, **changes: Any) -> str:
        return str(memory_error(sized(manifest, each, each, **changes), gpu).fix)

    packed = sum(file["bytes"] for name, file in manifest.files.items() if name == "onnx/transformer.safetensors")
    # 1. The same weights, packed, in a session that needs no engine.
    assert fix({"held": 8}) == (
        f"draw without engines: dvdq-run … --backend pytorch holds the weights packed, {amount(packed)}"
    )
    # 2. Smaller clips: 5.4 GiB less the weights are 40.4 % of what a call works in.
    few = {**manifest.files, "onnx/transformer.safetensors": {"bytes": 8 * GIB, "sha256": "0" * 64}}
    manifest = dataclasses.replace(manifest, files=few)
    latents = " × ".join(str(manifest.shapes[axis][1]) for axis in ("frames", "height", "width"))
    said = fix({"held": 1.4, "work": 9.9})
    assert f"at most 40 % of the {latents} latents" in said
    assert "--target tensorrt --sm 8.7 --dry-run" in said
    # 3. A smaller model: 5.4 of 8 GiB.
    layer = {**manifest.layers[0], "features_in": 4096}
    manifest = dataclasses.replace(manifest, layers=({**layer, "features_out": 4096}, {**layer, "features_out": 8192}))
    said = fix({"held": 8, "work": 0.01})
    assert "at most 33.91 million weights (this one has 50.33 million); dvdq-export" in said, "no clip is small enough"
    assert "or for much smaller clips; dvdq-export" in fix({"held": 5.4, "work": 9})
    manifest = dataclasses.replace(manifest, layers=({**layer, "features_out": 2**20},) * 3)
    assert "at most 8.70 billion weights (this one has 12.88 billion)" in fix({"held": 8})
    # 4. The builder alone is too large.
    small = {**few, "onnx/transformer.safetensors": {"bytes": GIB, "sha256": "0" * 64}}
    manifest = dataclasses.replace(manifest, files=small)
    assert fix({"build": 9}) == (
        "end other programs, or draw without engines: dvdq-run … --backend pytorch holds 1.0 GiB of weights"
    )
    assert "needs no GPU to build" in fix({"build": 9}, backend="tensorrt_rtx")
    # An engine of TensorRT-RTX for another card is no matter of this GPU's memory.
    elsewhere = sized(manifest, {"held": 99}, {"held": 99}, backend="tensorrt_rtx", sm=["12.0"])
    check_builds(elsewhere.builds, elsewhere, SMALL_ORIN)


def test_two_transformers_are_held_together(made: Path, monkeypatch: Any) -> None:
    manifest = sized(load_manifest(made), {"held": 3, "work": 1}, {"held": 1})
    second = tuple(
        {**entry, "component": "transformer_2", "engine": f"{entry['engine']}2"} for entry in manifest.builds
    )
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)
    check_builds(manifest.builds, manifest, SMALL_ORIN)
    error = memory_error(dataclasses.replace(manifest, builds=(*manifest.builds, *second)), SMALL_ORIN)
    assert "estimated to take 7.0 GiB of device memory, 6.0 GiB for weights and 1.0 GiB to work in" in error.what
    assert "fits: a8 (" in str(error.available)


def test_the_need_of_tensorrts_builder_is_called_an_estimate() -> None:
    """The factor was measured with TensorRT-RTX."""
    assert "estimate" in memory_advice("tensorrt")
    assert "estimate" not in memory_advice("tensorrt_rtx")
