"""Everything a user can get wrong: exit code 2, the thing and the way out in words, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny_models as tiny
from tests.support.checkpoint_folders import SHARD1, SHARD2
from tests.support.commands import (
    SINGLE,
    SIZES,
    edit_config,
    edit_weights,
    environment,
    poke,
    refused,
    run,
    set_text,
    truncate,
)
from tests.support.exporting import REPOSITORY, state_of
from tests.support.traces import without_graphs

INDEX = f"{SINGLE}.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("pristine") / "model", tiny.WAN)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def pickle_only(folder: Path) -> None:
    (folder / SINGLE).unlink()
    torch.save({"a": torch.zeros(2)}, folder / "diffusion_pytorch_model.bin")


def index(change: Callable[[dict[str, str], Path], Any]) -> Callable[[Path], None]:
    """Split the weights in two shards with an index, then damage it."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        names = [SHARD1, SHARD2]
        mapping = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
        for shard in names:
            save_file({n: t for n, t in tensors.items() if mapping[n] == shard}, folder / shard)
        change(mapping, folder)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))

    return edit


def link_outside(folder: Path) -> None:
    shutil.move(folder / SINGLE, folder.parent / "elsewhere.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "elsewhere.safetensors")


# The message itself says all there is to say about a broken index.
SELF_EXPLAINED = {
    "config is a list",
    "shard not there",
    "shard without the tensor",
    "tensor not in the index",
    "index without a map",
}
QKV = "blocks.0.attn1.to_q.weight"
LAST = "blocks.1.ffn.net.2.bias"
MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "diffusers"]),
    "config is not JSON": (set_text("config.json", "{oops"), ["config.json"]),
    "config is a list": (set_text("config.json", "[1, 2]"), ["config.json", "list"]),
    "config is binary": (set_text("config.json", b"\xff\xfe\x00"), ["config.json"]),
    "config with a key twice": (set_text("config.json", '{"_class_name": "a", "_class_name": "b"}'), ["_class_name"]),
    "config nested too deep": (set_text("config.json", '{"a":' * 5000 + "1" + "}" * 5000), ["config.json"]),
    "unknown class": (
        edit_config(lambda c: c.update(_class_name="FluxTransformer2DModel")),
        ["FluxTransformer2DModel"],
    ),
    "class is no name": (edit_config(lambda c: c.update(_class_name="os.system")), ["os.system"]),
    "class of another family": (
        edit_config(lambda c: c.update(_class_name="LTXVideoTransformer3DModel")),
        ["LTXVideo"],
    ),
    "auto_map": (edit_config(lambda c: c.update(auto_map={"AutoModel": "x.Evil"})), ["auto_map"]),
    "code in the folder": (set_text("modeling.py", "print(1)"), ["modeling.py"]),
    "config diffusers refuses": (
        edit_config(lambda c: c.update(num_attention_heads="many")),
        ["WanTransformer3DModel"],
    ),
    "config that does not run": (edit_config(lambda c: c.update(patch_size=[1, 2])), ["WanTransformer3DModel"]),
    "config of a larger model": (edit_config(lambda c: c.update(num_layers=3)), ["blocks.2"]),
    "config of a smaller model": (edit_config(lambda c: c.update(num_layers=1)), ["blocks.1", "unexpected"]),
    "more blocks than any model": (edit_config(lambda c: c.update(num_layers=10**6)), ["num_layers", "1000"]),
    "a table that fills the memory": (edit_config(lambda c: c.update(rope_max_seq_len=2**40)), ["rope_max_seq_len"]),
    "a patch of terabytes": (edit_config(lambda c: c.update(patch_size=[1, 2, 2**40])), ["patch_size"]),
    "odd channels": (edit_config(lambda c: c.update(ffn_dim=255)), ["255"]),
    "pickled weights": (pickle_only, ["diffusion_pytorch_model.bin", "pickled"]),
    "no weights": (lambda f: (f / SINGLE).unlink(), ["no weights"]),
    "truncated weights": (truncate, [SINGLE, "cut short"]),
    "empty weights": (set_text(SINGLE, b""), [SINGLE]),
    "weights are HTML": (set_text(SINGLE, b"<!DOCTYPE html><html>"), [SINGLE]),
    "missing tensor": (edit_weights(lambda t: t.pop(QKV)), [QKV, "missing"]),
    "extra tensor": (edit_weights(lambda t: t.update(extra=torch.zeros(2))), ["extra", "unexpected"]),
    "wrong shape": (edit_weights(lambda t: t.update({QKV: t[QKV][:64].clone()})), [QKV, "[64, 128]"]),
    "transposed weight": (
        edit_weights(lambda t: t.update({"proj_out.weight": t["proj_out.weight"].T.contiguous()})),
        ["proj_out.weight"],
    ),
    "integer weight": (edit_weights(lambda t: t.update({QKV: t[QKV].to(torch.int8)})), [QKV, "I8"]),
    "NaN in the first layer": (poke(QKV, float("nan")), [QKV, "--allow-nonfinite"]),
    "Inf in a kept layer": (poke("proj_out.weight", float("inf")), ["proj_out.weight", "--allow-nonfinite"]),
    "-Inf in the last bias": (poke(LAST, float("-inf")), [LAST, "--allow-nonfinite"]),
    "shard outside the folder": (index(lambda m, f: m.update({QKV: "../../etc/passwd"})), ["passwd", QKV]),
    "absolute shard": (index(lambda m, f: m.update({QKV: "/etc/hosts.safetensors"})), ["/etc/hosts"]),
    "shard not there": (index(lambda m, f: m.update({QKV: "other.safetensors"})), ["other.safetensors"]),
    "shard without the tensor": (
        index(lambda m, f: m.update({QKV: next(v for v in m.values() if v != m[QKV])})),
        [QKV],
    ),
    "tensor not in the index": (index(lambda m, f: m.pop(QKV)), [QKV]),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), ["weight_map"]),
    "link that leaves the folder": (link_outside, ["link", SINGLE]),
    "pipe as weights": (
        lambda f: ((f / SINGLE).unlink(), os.mkfifo(f / SINGLE)),
        [SINGLE],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_model(name: str, model: Path, tmp_path: Path) -> None:
    damage, named = MODELS[name]
    damage(model)
    before = {p.name for p in model.iterdir()}
    out = tmp_path / "deep" / "out"
    # What is wrong with weights is found beside the trace, which would take longer than all else.
    with without_graphs():
        done = run(model, "-o", out, "--target", "onnx", *SIZES)
    refused(done, *named, way_out=name not in SELF_EXPLAINED)
    assert not (tmp_path / "deep").exists()
    assert {p.name for p in model.iterdir()} == before


def test_second_transformer_is_checked_before_the_first_is_exported(model: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(model, pipeline / "transformer")
    shutil.copytree(model, pipeline / "transformer_2")
    edit_weights(lambda t: t.pop(QKV))(pipeline / "transformer_2")
    refused(run(pipeline, "-o", tmp_path / "out", "--target", "onnx", *SIZES), "transformer_2", QKV)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("/nowhere/at/all", ["/nowhere/at/all", "holds"]),
        ("FILE", ["config.json", "not a usable safetensors file"]),
        ("", ["no model"]),
        ("a\0b", ["no model"]),
        ("../" * 40 + "etc", ["etc"]),
        ("org/name/extra", ["org/name/extra"]),
        ("x" * 200, ["x" * 200]),
    ],
)
def test_model_argument(argument: str, named: list[str], model: Path, tmp_path: Path) -> None:
    argument = str(model / "config.json") if argument == "FILE" else argument
    refused(run(argument, "-o", tmp_path / "out"), *named)
    assert not (tmp_path / "out").exists()


def test_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused(run("nobody/no-such-model", "-o", "out"), "nobody/no-such-model", "connect")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("subfolder", ["../model", "/etc", "a/../..", "nothing-here", ""])
def test_subfolder(subfolder: str, model: Path, tmp_path: Path) -> None:
    arguments = ["--subfolder", subfolder] if subfolder else ["--subfolder", "."]
    named = ["nothing-here", "fix: give a folder"] if "-" in subfolder else ["plain folder name"]
    refused(run(model, "-o", tmp_path / "out", *arguments), *named)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- bad options

OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "unknown recipe": (["--recipe", "w2a2", *SIZES], ["w2a2", "w4a4"]),
    "unknown target": (["--target", "openvino", *SIZES], ["openvino", "rtx"]),
    "unknown dtype": (["--dtype", "fp8", *SIZES], ["fp8", "bf16"]),
    "unknown SM": (["--sm", "3.5", *SIZES], ["3.5", "8.9"]),
    "unknown SM, and no engine to build": (["--sm", "9.9", "--target", "graphs", *SIZES], ["'9.9'", "8.9", "12.1"]),
    "revision of a folder": (["--revision", "main", *SIZES], ["--revision 'main'", "local folder"]),
    "no SM at all": (["--sm", "rtx4090", *SIZES], ["rtx4090", "8.9", "--gpu"]),
    "SM of the other backend": (["--sm", "9.0", "--target", "rtx", *SIZES], ["9.0", "--target graphs"]),
    "SMs of two targets": (["--sm", "9.0", "--sm", "89", *SIZES], ["9.0", "--target graphs"]),
    "a card that is not in the table": (["--gpu", "RTX 4099", *SIZES], ["RTX 4099", "RTX 4090", "--sm"]),
    "a card that is too old": (["--gpu", "Tesla T4", *SIZES], ["T4", "7.5", "bf16", "fix: "]),
    "unknown precision": (["--precision", "int3", *SIZES], ["int3", "nvfp4"]),
    "precision this SM lacks": (["--precision", "nvfp4", *SIZES], ["nvfp4", "8.9", "int8"]),
    "TensorRT built here, without its plugin": (
        ["--target", "tensorrt", "--build", "here", *SIZES],
        ["tensorrt"],
    ),
    "height no multiple of the VAE": (["--height", "479"], ["--height", "479", "464 or 480"]),
    "latent no multiple of the patch": (["--latent", "2x7x8"], ["height", "7", "6 or 8"]),
    "frames the VAE cannot have": (["--num-frames", "80"], ["--num-frames", "80", "77 or 81"]),
    "both units": (["--latent", "2x8x8", "--height", "480"], ["--latent", "--height"]),
    "latent in words": (["--latent", "big"], ["--latent", "big", "FRAMESxHEIGHTxWIDTH"]),
    "range upside down": (["--latent", "2x12:8x8"], ["--latent (height)", "12:8", "MIN"]),
    "range of four": (["--latent", "2x8:9:10:12x8"], ["8:9:10:12"]),
    "negative size": (["--width", "-8"], ["--width", "-8"]),
    "text tokens 0": (["--latent", "2x8x8", "--text-tokens", "0"], ["--text-tokens", "0"]),
    "batch 0": ([*SIZES, "--batch", "0"], ["--batch", "0"]),
    "text tokens in words": (["--text-tokens", "many"], ["many"]),
    "everything kept": ([*SIZES, "--keep", "*"], ["no layer", "--keep"]),
    "keep that matches nothing": ([*SIZES, "--keep", "blokcs.0.*"], ["--keep", "blokcs.0.*", "blocks.0."]),
    "force that matches nothing": ([*SIZES, "--force", "head"], ["--force", "head"]),
    "kept and forced": (
        [*SIZES, "--keep", "blocks.0.*", "--force", "*.to_q"],
        ["--keep", "--force", "blocks.0.attn1.to_q"],
    ),
    "log format": ([*SIZES, "--log-format", "xml"], ["xml", "json"]),
    "optimization level": ([*SIZES, "--optimization-level", "9"], ["9"]),
    "workspace of nothing": ([*SIZES, "--workspace-gib", "0"], ["--workspace-gib", "0"]),
    "negative workspace": ([*SIZES, "--workspace-gib", "-3"], ["--workspace-gib", "-3"]),
    "workspace NaN": ([*SIZES, "--workspace-gib", "nan"], ["--workspace-gib", "nan"]),
    "plugin for rtx that is not there": ([*SIZES, "--plugin", "/nowhere/plugin.so"], ["/nowhere/plugin.so"]),
    "plugin for rtx": ([*SIZES, "--plugin", __file__], ["--plugin is for TensorRT engines, and --target is rtx"]),
    "plugin for the device": (
        [*SIZES, "--target", "tensorrt", "--plugin", __file__, "--build", "device"],
        ["--plugin builds TensorRT engines here, and --build device leaves them to dvdq-build"],
    ),
    "workspace without engines": (
        [*SIZES, "--target", "graphs", "--workspace-gib", "1"],
        ["--workspace-gib is for engines, and --target is graphs"],
    ),
    "unknown option": ([*SIZES, "--recipee", "w4a4"], ["--recipee"]),
    "sizes beyond the rotary table": (["--latent", "40x8x8", "--dry-run"], ["frames is 40", "up to 32"]),
    "a range beyond the rotary table": (["--latent", "2x8x8:16:66", "--dry-run"], ["width is 66", "up to 64"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(name: str, pristine: Path, tmp_path: Path) -> None:
    arguments, named = OPTIONS[name]
    before = state_of(pristine)
    refused(run(pristine, "-o", tmp_path / "deep" / "out", *arguments), *named)
    assert not (tmp_path / "deep").exists()
    assert state_of(pristine) == before


def test_tensorrt_without_tensorrt_says_how_to_get_it(pristine: Path, tmp_path: Path) -> None:
    try:
        import tensorrt  # noqa: F401
    except (ImportError, RuntimeError):
        pass
    else:
        pytest.skip("TensorRT is installed here")
    result = run(pristine, "-o", tmp_path / "out", "--target", "tensorrt", "--build", "here", *SIZES)
    refused(result, "tensorrt cannot be imported", "pip install 'dvdquant[tensorrt]'", "rtx target")
    assert not (tmp_path / "out").exists()


def test_missing_arguments() -> None:
    assert run().exit_code == 2
    assert run("model").exit_code == 2


def test_errors_as_json(pristine: Path, tmp_path: Path) -> None:
    result = run(pristine, "-o", tmp_path / "out", "--sm", "3.5", *SIZES, "--log-format", "json")
    assert result.exit_code == 2
    (line,) = [json.loads(line) for line in result.stderr.splitlines()]
    assert line["event"] == "error"
    assert line["error"] == "UnsupportedError"
    assert "3.5" in line["what"]
    assert "8.9" in line["available"]
    assert line["fix"]


# --------------------------------------------------------------------------------------------- as a separate process


@pytest.mark.parametrize(
    ("module", "arguments", "named"),
    [
        ("export", ["/nowhere", "-o", "out"], "/nowhere"),
        ("export", [str(REPOSITORY / "tests"), "-o", "out"], "config.json"),
        ("inspect", ["nothing"], "not a dvdquant export"),
    ],
)
def test_as_a_command(module: str, arguments: list[str], named: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"dvdquant.cli.{module}", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
