"""Everything a user can get wrong: exit code 2, the thing and the way out in words, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from dvdquant.cli.export import main as export_main
from dvdquant.cli.inspect import main as inspect_main
from tests import tiny_models as tiny
from tests.exporting import REPOSITORY, state_of

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
SIZES = ["--latent", "2x8x8", "--text-tokens", "4"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("pristine") / "model", tiny.WAN)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(export_main, [str(a) for a in arguments])


def refused(result: Result, *named: str, way_out: bool = True) -> None:
    """Exit code 2, every text in the message, a way out, and no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for text in named:
        assert text in result.output, (text, result.output)
    assert not way_out or any(text in result.output for text in ("Usage:", "available:", "fix:")), result.output


# -------------------------------------------------------------------------------------------------------- bad models


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return edit


def poke(name: str, value: float, index: int = 3) -> Callable[[Path], None]:
    return edit_weights(lambda tensors: tensors[name].view(-1).__setitem__(index, value))


def set_text(name: str, text: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def truncate(folder: Path) -> None:
    path = folder / SINGLE
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1000)


def pickle_only(folder: Path) -> None:
    (folder / SINGLE).unlink()
    torch.save({"a": torch.zeros(2)}, folder / "diffusion_pytorch_model.bin")


def index(change: Callable[[dict[str, str], Path], Any]) -> Callable[[Path], None]:
    """Split the weights in two shards with an index, then damage it."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
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
    "unknown class": (edit_config(lambda c: c.update(_class_name="FluxTransformer2DModel")), ["FluxTransformer2DModel"]),
    "class is no name": (edit_config(lambda c: c.update(_class_name="os.system")), ["os.system"]),
    "class of another family": (edit_config(lambda c: c.update(_class_name="LTXVideoTransformer3DModel")), ["LTXVideo"]),
    "auto_map": (edit_config(lambda c: c.update(auto_map={"AutoModel": "x.Evil"})), ["auto_map"]),
    "code in the folder": (set_text("modeling.py", "print(1)"), ["modeling.py"]),
    "config diffusers refuses": (edit_config(lambda c: c.update(num_attention_heads="many")), ["WanTransformer3DModel"]),
    "config that does not run": (edit_config(lambda c: c.update(patch_size=[1, 2])), ["WanTransformer3DModel"]),
    "config of a larger model": (edit_config(lambda c: c.update(num_layers=3)), ["blocks.2"]),
    "config of a smaller model": (edit_config(lambda c: c.update(num_layers=1)), ["blocks.1", "unexpected"]),
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
    refused(run(model, "-o", out, "--target", "onnx", *SIZES), *named, way_out=name not in SELF_EXPLAINED)
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
        ("FILE", ["is a file", "config.json"]),
        ("", ["no model"]),
        ("a\0b", ["no model"]),
        ("../" * 40 + "etc", ["etc"]),
        ("org/name/extra", ["org/name/extra"]),
        ("x" * 200, ["x" * 200]),
    ],
)
def test_model_argument(argument: str, named: list[str], model: Path, tmp_path: Path) -> None:
    argument = str(model / SINGLE) if argument == "FILE" else argument
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
    refused(run(model, "-o", tmp_path / "out", *arguments), "nothing-here" if "-" in subfolder else "plain folder name")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- bad options

OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "unknown recipe": (["--recipe", "w2a2", *SIZES], ["w2a2", "w4a4"]),
    "unknown target": (["--target", "openvino", *SIZES], ["openvino", "rtx"]),
    "unknown dtype": (["--dtype", "fp8", *SIZES], ["fp8", "bf16"]),
    "unknown SM": (["--sm", "3.5", *SIZES], ["3.5", "8.9"]),
    "SM without a dot": (["--sm", "89", *SIZES], ["89", "8.9"]),
    "SM of the other backend": (["--sm", "9.0", *SIZES], ["9.0", "12.0"]),
    "unknown realization": (["--realize", "int3", *SIZES], ["int3", "nvfp4"]),
    "realization this SM lacks": (["--realize", "nvfp4", *SIZES], ["nvfp4", "8.9", "int8"]),
    "realization this grid lacks": (["--realize", "int8", "--recipe", "w4a4-g64", *SIZES], ["int8", "groups of 64"]),
    "TensorRT without its plugin": (["--target", "tensorrt", *SIZES], ["tensorrt"]),
    "height no multiple of the VAE": (["--height", "479"], ["--height", "479", "472 or 480"]),
    "latent no multiple of the patch": (["--latent", "2x7x8"], ["height", "7", "6 or 8"]),
    "frames the VAE cannot have": (["--num-frames", "80"], ["--num-frames", "80", "77 or 81"]),
    "both units": (["--latent", "2x8x8", "--height", "480"], ["--latent", "--height"]),
    "latent in words": (["--latent", "big"], ["--latent", "big", "FRAMESxHEIGHTxWIDTH"]),
    "range upside down": (["--latent", "2x12:8x8"], ["12:8", "MIN"]),
    "range of four": (["--latent", "2x8:9:10:12x8"], ["8:9:10:12"]),
    "negative size": (["--width", "-8"], ["--width", "-8"]),
    "text tokens 0": (["--latent", "2x8x8", "--text-tokens", "0"], ["--text-tokens", "0"]),
    "batch 0": ([*SIZES, "--batch", "0"], ["--batch", "0"]),
    "text tokens in words": (["--text-tokens", "many"], ["many"]),
    "everything kept": ([*SIZES, "--keep", "*"], ["no layer", "--keep"]),
    "log format": ([*SIZES, "--log-format", "xml"], ["xml", "json"]),
    "optimization level": ([*SIZES, "--optimization-level", "9"], ["9"]),
    "workspace of nothing": ([*SIZES, "--workspace-gib", "0"], ["--workspace-gib", "0"]),
    "negative workspace": ([*SIZES, "--workspace-gib", "-3"], ["--workspace-gib", "-3"]),
    "workspace NaN": ([*SIZES, "--workspace-gib", "nan"], ["--workspace-gib", "nan"]),
    "plugin for rtx that is not there": ([*SIZES, "--plugin", "/nowhere/plugin.so"], ["/nowhere/plugin.so"]),
    "unknown option": ([*SIZES, "--recipee", "w4a4"], ["--recipee"]),
    "sizes beyond the rotary table": (["--latent", "40x8x8", "--target", "onnx"], ["wan", "traced"]),
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
    result = run(pristine, "-o", tmp_path / "out", "--target", "tensorrt", *SIZES)
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


# -------------------------------------------------------------------------------------------------------- bad outputs


def put_file(out: Path) -> Path:
    out.write_text("mine")
    return out


def below_file(out: Path) -> Path:
    out.write_text("mine")
    return out / "deeper" / "export"


def foreign(out: Path) -> Path:
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"\xff\xd8")
    return out


def other_manifest(out: Path) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a web app"}')
    return out


OUTPUTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "a file": (put_file, ["not a folder"]),
    "below a file": (below_file, ["not a folder"]),
    "somebody's files": (foreign, ["holiday.jpg", "not empty"]),
    "somebody's manifest": (other_manifest, ["manifest.json"]),
    "not writable": (lambda out: Path("/proc/nothing/out"), ["/proc"]),
    "name too long": (lambda out: out / ("x" * 300), ["x" * 100]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_bad_output(name: str, pristine: Path, tmp_path: Path) -> None:
    prepare, named = OUTPUTS[name]
    out = prepare(tmp_path / "out")
    before = state_of(tmp_path)
    refused(run(pristine, "-o", out, "--target", "onnx", *SIZES), *named)
    assert state_of(tmp_path) == before


def test_disk_too_small(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Need and free space in the message, before anything is made."""
    real = os.statvfs

    def tiny_disk(path: Any) -> Any:
        info = real(path)
        return SimpleNamespace(f_bavail=100, f_bfree=100, f_frsize=info.f_frsize, f_bsize=info.f_bsize)

    monkeypatch.setattr(os, "statvfs", tiny_disk)
    refused(run(pristine, "-o", tmp_path / "out", *SIZES), "GB", "free", "the export needs")
    assert not (tmp_path / "out").exists()


def test_disk_fills_up_while_writing(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of free space passes and the disk is full all the same: another process was faster."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr("dvdquant.export.pipeline.require_disk", lambda *_: None)
        refused(run(pristine, "-o", small / "out", "--target", "onnx", *SIZES), "no room", str(small))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ------------------------------------------------------------------------------------------ previous exports, inspect


@pytest.fixture(scope="module")
def exported(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    result = run(pristine, "-o", out, "--target", "onnx", *SIZES)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def previous(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "previous"))


@pytest.mark.parametrize("name", ["NaN in the first layer", "truncated weights", "missing tensor", "unknown class"])
def test_previous_export_survives_a_bad_model(name: str, previous: Path, model: Path) -> None:
    MODELS[name][0](model)
    before = state_of(previous)
    refused(run(model, "-o", previous, "--target", "onnx", *SIZES), *MODELS[name][1])
    assert state_of(previous) == before


def test_resume_of_another_export(previous: Path, pristine: Path, tmp_path: Path) -> None:
    """Work begun with other options is not mixed in; the message says which option differs."""
    from dvdquant.transaction import ExportTransaction

    with ExportTransaction(tmp_path / "out", key={"recipe": {"name": "rtn"}}, keep_for_resume=True) as transaction:
        transaction.done("something")
    before = state_of(tmp_path / "out")
    refused(run(pristine, "-o", tmp_path / "out", "--target", "onnx", *SIZES, "--resume"), "--resume", "another one")
    assert state_of(tmp_path / "out") == before


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(inspect_main, [str(a) for a in arguments])


def test_inspect_of_a_good_export(previous: Path) -> None:
    for arguments in ([], ["--check"], ["--layers"], ["--json"], ["--graph", "onnx/transformer_a4.onnx"]):
        result = inspect(previous, *arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        assert "blocks.0" in result.output or "--graph" in arguments


def damage_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        path = out / "manifest.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return damage


MANIFESTS: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "no export": (lambda out: (out / "manifest.json").unlink(), [], ["not a dvdquant export"]),
    "no folder": (shutil.rmtree, [], ["does not exist"]),
    "cut manifest": (lambda out: os.truncate(out / "manifest.json", 500), [], ["not valid JSON"]),
    "field missing": (damage_manifest(lambda m: m.pop("family")), [], ["family", "missing"]),
    "field of another type": (damage_manifest(lambda m: m.update(layers="all")), [], ["layers"]),
    "path that leaves": (
        damage_manifest(lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "bytes": 1}})),
        [],
        ["../x"],
    ),
    "newer format": (damage_manifest(lambda m: m.update(format_version=99)), [], ["99", "newer"]),
    "unknown graph": (lambda out: None, ["--graph", "onnx/other.onnx"], ["other.onnx", "transformer_a4.onnx"]),
    "graph outside": (lambda out: None, ["--graph", "../../etc/passwd"], ["passwd"]),
    "graph is garbage": (
        lambda out: (out / "onnx/transformer_a4.onnx").write_bytes(b"no protobuf"),
        ["--graph", "onnx/transformer_a4.onnx"],
        ["transformer_a4.onnx"],
    ),
    "file missing": (lambda out: (out / "onnx/transformer_a8.onnx").unlink(), ["--check"], ["transformer_a8.onnx"]),
    "file tampered": (
        lambda out: (out / "config.json").write_text((out / "config.json").read_text().replace("2", "3")),
        ["--check"],
        ["config.json", "SHA-256"],
    ),
    "file truncated": (
        lambda out: os.truncate(out / "onnx/transformer.safetensors", 1000),
        ["--check"],
        ["transformer.safetensors", "1000 bytes"],
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_inspect_refuses(name: str, previous: Path) -> None:
    damage, arguments, named = MANIFESTS[name]
    damage(previous)
    before = state_of(previous)
    result = inspect(previous, *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    for text in named:
        assert text in result.output, result.output
    assert state_of(previous) == before


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
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
