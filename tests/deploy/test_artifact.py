"""An export opened for running: what it holds, what it lacks, the command that makes the rest, and damaged folders."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.artifact.layout import MANIFEST
from dvdquant.cli.export import main as export_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import DvdquantError, EngineError, OutputError, UnsupportedError
from dvdquant.model.families import Axis
from dvdquant.recipe import RECIPES
from tests.support import session_exports as made


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return Artifact.open(made.engine_export())


def test_two_transformers(artifact: Artifact) -> None:
    assert artifact.components == ("transformer", "transformer_2")
    assert artifact.sizes.frames == Axis(2, 3, 4)
    assert artifact.dtype == torch.bfloat16
    assert artifact.recipe == RECIPES["rtn"]
    for component in artifact.components:
        assert artifact.bits(component) == (4, 8)
        assert artifact.config(component)["_class_name"] == "WanTransformer3DModel"
        assert artifact.family(component).name == "wan"
        assert artifact.graph(component, 4) == f"onnx/{component}_a4.onnx"
        (engine,) = artifact.engines(component, "rtx", 8)
        assert engine["path"] == f"engines/rtx-sm89/{component}_a8.engine"
        assert artifact.engines(component, "tensorrt", 8) == ()
        files = artifact.weight_files(component)
        assert files[0] == f"onnx/{component}.safetensors"
        assert all(Path(name).name.startswith(f"{component}.") for name in files)
        assert [spec.name for spec in artifact.plan(component).layers][:1] == ["blocks.0.attn1.to_q+to_k+to_v"]


def test_defaults_of_diffusers_fill_the_config(tmp_path: Path) -> None:
    """A config.json may leave out what diffusers has defaults for."""
    artifact = Artifact.open(made.weights_export("cogvideox"))
    config = artifact.family().config
    assert "patch_size_t" not in artifact.config()
    assert config["patch_size_t"] is None
    assert config["patch_size"] == artifact.config()["patch_size"]


def test_sharded_weights(artifact: Artifact) -> None:
    """The files of one transformer, not of the other, in order."""
    names = [f"onnx/transformer-{i:05d}-of-00002.safetensors" for i in (2, 1)]
    others = [
        "onnx/transformer_2.safetensors",
        "onnx/transformer_2-00001-of-00001.safetensors",
        "onnx/transformer_a4.onnx",
    ]
    entry = next(iter(artifact.manifest.files.values()))
    manifest = dataclasses.replace(artifact.manifest, files=dict.fromkeys([*names, *others], entry))
    assert Artifact(artifact.root, manifest, artifact.configs).weight_files("transformer") == tuple(sorted(names))


def test_what_is_not_there(artifact: Artifact) -> None:
    with pytest.raises(EngineError, match=r"no graph of transformer with 6-bit(?s:.*)available: 4 bits, 8 bits"):
        artifact.graph("transformer", 6)
    with pytest.raises(OutputError, match=r"no component 'vae'\n  available: transformer, transformer_2"):
        artifact.family("vae")
    with pytest.raises(UnsupportedError, match="unknown engine backend 'openvino'"):
        artifact.engines("transformer", "openvino", 4)
    with pytest.raises(OutputError, match="does not list"):
        artifact.read("engines/rtx-sm89/foreign.engine")


def options_of(command: str) -> dict[str, Any]:
    """What the exporter's own parser makes of a command line."""
    words = shlex.split(command)
    assert words[0] == "dvdq-export"
    return export_main.make_context("dvdq-export", words[1:]).params


def test_rebuild_command_is_one_the_exporter_takes(artifact: Artifact) -> None:
    options = options_of(artifact.rebuild_command(sm="12.0"))
    assert options["model"] == artifact.manifest.source["model"]
    assert options["out"] == artifact.root
    assert (options["recipe"], options["sms"], options["targets"]) == ("rtn", ("12.0",), ("rtx",))
    assert (options["latent"], options["text_tokens"], options["batch"]) == ("2:3:4x4:8:12x6:8:10", 12, 1)
    assert options["dtype"] == "bf16"
    assert options_of(artifact.rebuild_command())["sms"] == ("8.9",)
    assert options_of(artifact.rebuild_command(target="tensorrt", sm="9.0"))["plugins"] == (Path("PLUGIN_LIBRARY"),)
    wider = options_of(artifact.rebuild_command(options=["--height", "32:128"]))
    assert (wider["height"], wider["latent"]) == ("32:128", None)


def test_rebuild_command_keeps_what_the_export_was(artifact: Artifact) -> None:
    """Globs, modulation, batch, accepted NaNs and a single transformer of a pipeline come back as options."""
    chosen = {"keep": ["blocks.0.*"], "force": ["proj out"], "modulation": "a8", "attention": "int8"}
    eight = [each for each in artifact.manifest.recipe["activations"] if each["bits"] == 8]
    recipe = {**artifact.manifest.recipe, **chosen, "activations": eight}
    manifest = dataclasses.replace(
        artifact.manifest,
        recipe=recipe,
        components=("transformer_2",),
        shapes={**artifact.manifest.shapes, "batch": 2},
        nonfinite=("proj_out.weight",),
        source={**artifact.manifest.source, "few_bits": ["Q4_K"]},
        graphs=(*artifact.manifest.graphs, {"path": "onnx/x_qdq.onnx", "target": "onnx", "act_bits": 4}),
        engines=(),
    )
    options = options_of(Artifact(artifact.root, manifest, artifact.configs).rebuild_command())
    assert (options["keep"], options["force"], options["modulation"]) == (("blocks.0.*",), ("proj out",), "a8")
    assert options["attention"] == "int8"
    assert options["activations"] == "8"
    assert options["allow_low_bits"]
    assert (options["batch"], options["subfolder"], options["allow_nonfinite"]) == (2, "transformer_2", True)
    assert options["targets"] == ("onnx",)


# -------------------------------------------------------------------------------------------------- no export, damaged


def edited(out: Path, edit: Any) -> Path:
    data = json.loads((out / MANIFEST).read_text())
    edit(data)
    (out / MANIFEST).write_text(json.dumps(data))
    return out


DAMAGES: dict[str, tuple[Any, str]] = {
    "no manifest": (lambda out: (out / MANIFEST).unlink(), "is not a dvdquant export"),
    "config changed": (lambda out: (out / "config.json").write_text('{"_class_name": "X"}'), "instead of"),
    "config missing": (lambda out: (out / "transformer_2.config.json").unlink(), "does not match its manifest"),
    "no sizes": (lambda out: edited(out, lambda d: d["shapes"].pop("frames")), "manifest field shapes"),
    "text for a size": (lambda out: edited(out, lambda d: d["shapes"].update(frames=["1", 2, 3])), "field shapes"),
    "sizes upside down": (lambda out: edited(out, lambda d: d["shapes"].update(frames=[3, 2, 1])), "field shapes"),
    "unknown dtype": (
        lambda out: edited(out, lambda d: d["shapes"].update(dtype="fp64")),
        "available: 'bf16' or 'fp16'",
    ),
    "no component": (lambda out: edited(out, lambda d: d.update(components=[])), "field components is []"),
    "component without a config": (
        lambda out: edited(out, lambda d: d["components"].append("transformer_3")),
        "does not list 'transformer_3.config.json'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_folders(kind: str, tmp_path: Path) -> None:
    damage, text = DAMAGES[kind]
    out = made.copy_of(made.engine_export(), tmp_path / "out")
    damage(out)
    with pytest.raises(DvdquantError) as caught:
        Artifact.open(out)
    assert text in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is not a dvdquant export(?s:.*)does not exist"):
        Artifact.open(tmp_path / "nothing")


def test_other_rules_than_the_exporters_are_noticed(artifact: Artifact) -> None:
    """A manifest whose layers this version would not choose: sessions that need the layers refuse it."""
    layers = [dict(entry) for entry in artifact.manifest.layers]
    layers[3]["rotation_block"] *= 4
    manifest = dataclasses.replace(artifact.manifest, layers=tuple(layers))
    other = Artifact(artifact.root, manifest, artifact.configs)
    with pytest.raises(EngineError, match=r"quantized other layers(?s:.*)export again: dvdq-export"):
        other.plan()
    other.plan("transformer_2")
