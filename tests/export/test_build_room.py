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


def amounts(text: object) -> list[str]:
    """The sizes that a text names, in their order."""
    return re.findall(r"[\d.]+ [KMG]iB", str(text))


def offered(error: ResourceError) -> list[str]:
    """The widths that an error says there is room for."""
    return re.findall(r"\ba\d+\b", str(error.available))


def assert_offers_bits(error: ResourceError, bits: int) -> None:
    """The way out is a command that builds this width alone."""
    assert re.findall(r"dvdq-\w+|--bits \d+", str(error.fix)) == ["dvdq-build", f"--bits {bits}"]


def test_too_little_memory_to_build_says_what_fits(out: Path, tmp_path: Path, tensorrt: None, monkeypatch: Any) -> None:
    good = plugin_library(tmp_path / "libdvdquant_plugins.so")
    uneven = sized(load_manifest(out), {"build": 0.5}, {"build": 8})
    monkeypatch.setattr(build_room, "memory_limit", lambda: 4 * GIB)
    with pytest.raises(ResourceError) as caught:
        plan_on_device(out, uneven, ORIN, plugins=[good])
    error = caught.value
    assert "a8" in error.what
    assert amounts(error.what) == ["9.0 GiB", "1.0 GiB"], "the need, and what of it is for CUDA"
    limit, build, use = amounts(error.available)
    assert (limit, build, use.endswith("MiB")) == ("4.0 GiB", "1.5 GiB", True)
    assert offered(error) == ["a4"]
    assert_offers_bits(error, 4)
    assert len(plan_on_device(out, uneven, ORIN, plugins=[good], bits=[4]).builds) == 1


def test_what_fits_the_builder_alone_does_not_fit(out: Path, monkeypatch: Any) -> None:
    """Two engines that an 8 GB Orin could build and never hold: neither is offered."""
    manifest = load_manifest(out)
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)
    error = memory_error(sized(manifest, {"build": 2, "held": 8}, {"build": 2, "held": 8}), SMALL_ORIN)
    assert amounts(error.what) == ["8.0 GiB", "8.0 GiB"], "the need, and what of it is weights"
    assert amounts(error.available) == ["5.4 GiB", "2.0 GiB", "7.4 GiB"], "room, what is kept back, the whole memory"
    assert "Orin" in str(error.available)
    assert "nothing" in str(error.available)
    assert offered(error) == []
    # One can be held and not built, the other built and not held.
    error = memory_error(sized(manifest, {"build": 5.5, "held": 1}, {"build": 1, "held": 8}), SMALL_ORIN)
    assert "nothing" in str(error.available)
    assert offered(error) == []
    # One fits both.
    error = memory_error(sized(manifest, {"build": 1, "held": 1, "work": 2}, {"build": 1, "held": 8}), SMALL_ORIN)
    assert offered(error) == ["a4"]
    assert amounts(error.available)[-2:] == ["2.0 GiB", "3.0 GiB"], "to build, and to use"
    assert_offers_bits(error, 4)


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
        assert offered(memory_error(manifest, gpu)) == ["a8"]


def test_what_to_do_where_nothing_fits(made: Path, monkeypatch: Any) -> None:
    """Every way out is computed from the export, and would fit."""
    manifest = load_manifest(made)
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)

    def fix(each: dict[str, float], gpu: Gpu = SMALL_ORIN, **changes: Any) -> str:
        return str(memory_error(sized(manifest, each, each, **changes), gpu).fix)

    packed = sum(file["bytes"] for name, file in manifest.files.items() if name == "onnx/transformer.safetensors")
    # 1. The same weights, packed, in a session that needs no engine.
    said = fix({"held": 8})
    assert re.findall(r"dvdq-\w+|--backend \w+", said) == ["dvdq-run", "--backend pytorch"]
    assert amounts(said) == [amount(packed)]
    # 2. Smaller clips: 5.4 GiB less the weights are 40.4 % of what a call works in.
    few = {**manifest.files, "onnx/transformer.safetensors": {"bytes": 8 * GIB, "sha256": "0" * 64}}
    manifest = dataclasses.replace(manifest, files=few)
    latents = " × ".join(str(manifest.shapes[axis][1]) for axis in ("frames", "height", "width"))
    said = fix({"held": 1.4, "work": 9.9})
    assert "40 %" in said
    assert latents in said
    assert "dvdq-export" in said
    assert "--target tensorrt --sm 8.7 --dry-run" in said
    # 3. A smaller model: 5.4 of 8 GiB.
    layer = {**manifest.layers[0], "features_in": 4096}
    manifest = dataclasses.replace(manifest, layers=({**layer, "features_out": 4096}, {**layer, "features_out": 8192}))
    said = fix({"held": 8, "work": 0.01})
    assert re.findall(r"[\d.]+ [mb]illion", said) == ["33.91 million", "50.33 million"], "what fits, and what this has"
    assert "dvdq-export" in said
    assert "clips" not in said, "no clip is small enough"
    assert "smaller clips" in fix({"held": 5.4, "work": 9})
    manifest = dataclasses.replace(manifest, layers=({**layer, "features_out": 2**20},) * 3)
    assert re.findall(r"[\d.]+ [mb]illion", fix({"held": 8})) == ["8.70 billion", "12.88 billion"]
    # 4. The builder alone is too large.
    small = {**few, "onnx/transformer.safetensors": {"bytes": GIB, "sha256": "0" * 64}}
    manifest = dataclasses.replace(manifest, files=small)
    said = fix({"build": 9})
    assert "end other programs" in said
    assert re.findall(r"dvdq-\w+|--backend \w+", said) == ["dvdq-run", "--backend pytorch"]
    assert amounts(said) == ["1.0 GiB"]
    assert "needs no GPU" in fix({"build": 9}, backend="tensorrt_rtx")
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
    assert amounts(error.what) == ["7.0 GiB", "6.0 GiB", "1.0 GiB"], "the need, weights, and what a call works in"
    assert offered(error) == ["a8"]


def test_the_need_of_tensorrts_builder_is_called_an_estimate() -> None:
    """The factor was measured with TensorRT-RTX."""
    assert "estimate" in memory_advice("tensorrt")
    assert "estimate" not in memory_advice("tensorrt_rtx")
