"""Damaged weights, graphs and engines: nothing damaged reaches ONNX Runtime, PyTorch or the engine library."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from dvdquant.artifact.layout import MANIFEST
from dvdquant.backends import Backend, load_backend
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import engine_choice, weights
from dvdquant.deploy.sessions.engines import TensorRTSession, load_plugins
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.sessions.weights import WeightFiles
from dvdquant.errors import DvdquantError, EngineError, OutputError
from dvdquant.system.files import hash_file
from tests.support import session_exports as made
from tests.support.engine_double import BF16, HOST, Library
from tests.support.opened_files import watch_opened


class Counted:
    """Stands for a constructor, counts its calls and what it is called with, and stops there."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        raise RuntimeError("reached")


def flip(path: Path, generator: random.Random, others: list[Path]) -> None:
    raw = bytearray(path.read_bytes())
    raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    path.write_bytes(raw)


def cut(path: Path, generator: random.Random, others: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def swap(path: Path, generator: random.Random, others: list[Path]) -> None:
    path.write_bytes(generator.choice(others).read_bytes())


def append(path: Path, generator: random.Random, others: list[Path]) -> None:
    path.write_bytes(path.read_bytes() + generator.randbytes(generator.randrange(1, 99)))


def remove(path: Path, generator: random.Random, others: list[Path]) -> None:
    path.unlink()


def link(path: Path, generator: random.Random, others: list[Path]) -> None:
    """To an intact copy outside of the export, which could be changed after it was checked."""
    copy = path.parent.parent.parent / "outside"
    copy.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(copy)


DAMAGES: list[Callable[[Path, random.Random, list[Path]], None]] = [
    flip,
    flip,
    flip,
    cut,
    cut,
    swap,
    append,
    remove,
    link,
]


def damaged_files(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Damage one file of an export at a time and open a session that reads it; how many opened each backend's door."""
    out = made.copy_of(made.engine_export(), tmp_path / "out")
    names = [n for n in Artifact.open(out).manifest.files if n.startswith(("onnx/transformer", "engines/"))]
    intact = {name: (out / name).read_bytes() for name in names}
    names = [name for name in names if intact[name]]
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    session, load = Counted(), Counted()
    monkeypatch.setattr(engine_choice, "device_sm", lambda device: "8.9")
    monkeypatch.setattr(engine_choice, "load_backend", lambda name: library.backend)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr("dvdquant.deploy.sessions.pytorch.fill_quantized", load)
    generator = random.Random(count)
    artifact = Artifact.open(out)
    damaged: set[str] = set()
    for index in range(count):
        name = names[index % len(names)]
        component = "transformer_2" if "transformer_2" in name else "transformer"
        others = [out / other for other in names if intact[other] != intact[name]]
        generator.choice(DAMAGES)(out / name, generator, others)
        if not (out / name).is_symlink() and (out / name).exists() and (out / name).read_bytes() == intact[name]:
            continue  # swapped with an equal file
        damaged.add(name)
        opens: list[Callable[[], Any]] = []
        if name.startswith("engines/"):
            bits = [4] if name.endswith("_a4.engine") else [8]
            opens.append(lambda c=component, b=bits: TensorRTSession(artifact, c, b, HOST))  # type: ignore[misc]
        else:
            opens.append(lambda c=component: OnnxRuntimeSession(artifact, c))  # type: ignore[misc]
        if name.endswith((".safetensors", ".bin")):
            opens.append(lambda c=component: PyTorchSession(artifact, c))  # type: ignore[misc]
        for opening in opens:
            with pytest.raises(DvdquantError) as caught:
                opening()
            assert Path(name).name in caught.value.what
            assert caught.value.fix
        (out / name).unlink(missing_ok=True)
        (out / name).write_bytes(intact[name])
    assert damaged == set(names)
    reached = {"engine": len(library.deserialized), "onnxruntime": session.calls, "pytorch": load.calls}
    # The doors are the ones that intact files go through.
    for opening in (lambda: OnnxRuntimeSession(artifact), lambda: PyTorchSession(artifact)):
        with pytest.raises((RuntimeError, DvdquantError), match="reached"):
            opening()
    TensorRTSession(artifact, device=HOST).close()
    assert (len(library.deserialized), session.calls, load.calls) == (reached["engine"] + 2, 1, 1)
    return reached


def test_no_damaged_file_reaches_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert damaged_files(120, tmp_path, monkeypatch) == {"engine": 0, "onnxruntime": 0, "pytorch": 0}


@pytest.mark.stress
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_damaged_file_reaches_a_backend_10000(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert damaged_files(10_000, tmp_path, monkeypatch) == {"engine": 0, "onnxruntime": 0, "pytorch": 0}


def test_sessions_share_a_copy_as_long_as_the_file_stays(tmp_path: Path) -> None:
    """One that is changed is not opened again, even if its modification time is put back; what is open goes on."""
    out = made.copy_of(made.family_export("wan"), tmp_path / "out")
    artifact = Artifact.open(out)
    first, second = (WeightFiles(artifact, "transformer") for _ in range(2))
    assert first.copies[0] is second.copies[0]
    path = out / "onnx/transformer.safetensors"
    info = path.stat()
    with path.open("r+b") as file:
        file.seek(info.st_size - 1)
        last = file.read(1)
        file.seek(info.st_size - 1)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert path.stat().st_mtime_ns == info.st_mtime_ns
    with pytest.raises(OutputError, match="was changed"):
        WeightFiles(artifact, "transformer")
    assert bytes(first.region("transformer.safetensors", info.st_size - 1, 1)) == last
    first.close()
    second.close()


def test_a_file_swapped_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between hashing and parsing the header by path: what is mapped and what was parsed must be one file."""
    out = made.copy_of(made.family_export("wan"), tmp_path / "out")
    path = out / "onnx/transformer.safetensors"
    other = made.family_export("wan", "bf16") / "onnx/transformer.safetensors"
    real = weights.read_header

    def swapping(name: Path) -> Any:
        raw = bytearray(other.read_bytes())
        at = raw.index(b'"dtype":"I8"')
        raw[at : at + 12] = b'"dtype":"U8"'
        path.unlink()
        path.write_bytes(raw)
        return real(name)

    monkeypatch.setattr(weights, "read_header", swapping)
    with pytest.raises(OutputError, match="was replaced while it was opened"):
        WeightFiles(Artifact.open(out), "transformer")


def test_regions_outside_of_the_files() -> None:
    """A graph cannot make the session read past the files, or another file."""
    files = WeightFiles(Artifact.open(made.family_export("wan")), "transformer")
    size = files.region("transformer.safetensors", 0, 8).nbytes
    assert size == 8
    for location, offset, length in (
        ("transformer.safetensors", -1, 4),
        ("transformer.safetensors", 0, 1 << 40),
        ("transformer.safetensors", 1 << 40, 1),
        ("transformer.safetensors", 8, -4),
        ("../../etc/passwd", 0, 1),
    ):
        with pytest.raises(OutputError, match="a graph reads bytes"):
            files.region(location, offset, length)
    with pytest.raises(OutputError, match=r"no tensor 'blocks\.9\.weight'"):
        files.tensor("blocks.9.weight")


def test_the_file_is_never_written(tmp_path: Path) -> None:
    """A write through a tensor stays in this process."""
    out = made.copy_of(made.family_export("wan"), tmp_path / "out")
    before = (out / "onnx/transformer.safetensors").read_bytes()
    files = WeightFiles(Artifact.open(out), "transformer")
    tensor = files.tensor("blocks.0.ffn.net.2.weight")
    tensor.zero_()
    assert not tensor.any()
    files.close()
    assert not tensor.any()  # the copy lives as long as the tensor
    assert (out / "onnx/transformer.safetensors").read_bytes() == before
    assert torch.count_nonzero(WeightFiles(Artifact.open(out), "transformer").tensor("blocks.0.ffn.net.2.weight"))


def test_plugin_libraries_are_loaded_once(tmp_path: Path) -> None:
    """On a double of the registry, whose names the real one has."""
    loaded: list[str] = []
    registry = SimpleNamespace(load_library=lambda path: None if "bad" in path else loaded.append(path) or 1)
    assert callable(load_backend("rtx").module.get_plugin_registry().load_library)
    tensorrt = Backend("tensorrt", SimpleNamespace(get_plugin_registry=lambda: registry), "11.4")
    good, bad = tmp_path / "good.so", tmp_path / "bad.so"
    good.touch()
    bad.touch()
    for _ in range(2):
        load_plugins(tensorrt, [good])
    assert loaded == [str(good.resolve())]
    for library, plugin, text in (
        (tensorrt, bad, "bad.so does not load in tensorrt 11.4"),
        (tensorrt, tmp_path / "none.so", "there is no plugin library"),
        (load_backend("rtx"), good, "tensorrt_rtx has no plugins"),
    ):
        with pytest.raises(EngineError) as caught:
            load_plugins(library, [plugin])
        assert text in str(caught.value)
    assert loaded == [str(good.resolve())]


# ------------------------------------------------------------------------------------------- hostile, with right hashes


def rehashed(out: Path, name: str) -> None:
    """Let the manifest vouch for the file as it is: whoever writes the files of an export writes its manifest too."""
    data = json.loads((out / MANIFEST).read_text())
    data["files"][name] = hash_file(out / name)
    (out / MANIFEST).write_text(json.dumps(data))


def _external(tensor: onnx.TensorProto, **where: object) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))


def _stored_weight(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.external_data and t.name.endswith(".weight"))


def _weight_at(**where: object) -> Callable[[onnx.ModelProto, Path], None]:
    """Move a weight: to another file, or another place in the right one."""

    def change(model: onnx.ModelProto, secret: Path) -> None:
        tensor = _stored_weight(model)
        there = {entry.key: entry.value for entry in tensor.external_data}
        _external(tensor, **{**there, **{k: str(v).replace("SECRET", str(secret)) for k, v in where.items()}})

    return change


def _constant(model: onnx.ModelProto, secret: Path) -> None:
    """A Constant node's value: ONNX Runtime and the passes would open it relative to the working folder."""
    tensor = onnx.TensorProto(name="value", dims=[4], data_type=onnx.TensorProto.FLOAT)
    _external(tensor, location="secret.bin", offset=0, length=16)
    model.graph.node.add(op_type="Constant", output=["stray"]).attribute.add(
        name="value", type=onnx.AttributeProto.TENSOR, t=tensor
    )


def _constant_of_a_function(model: onnx.ModelProto, secret: Path) -> None:
    tensor = onnx.TensorProto(name="value", dims=[4], data_type=onnx.TensorProto.FLOAT)
    _external(tensor, location=str(secret), offset=0, length=16)
    model.functions[0].node.add(op_type="Constant", output=["stray"]).attribute.add(
        name="value", type=onnx.AttributeProto.TENSOR, t=tensor
    )


def _initializer_of_a_branch(model: onnx.ModelProto, secret: Path) -> None:
    branch = onnx.GraphProto(name="branch")
    _external(branch.initializer.add(name="w", dims=[4], data_type=onnx.TensorProto.FLOAT), location=str(secret))
    attribute = model.graph.node.add(op_type="If", input=["x"], output=["y"]).attribute.add(name="then_branch")
    attribute.type = onnx.AttributeProto.GRAPH
    attribute.g.CopyFrom(branch)


def _another_shape(model: onnx.ModelProto, secret: Path) -> None:
    tensor = _stored_weight(model)
    tensor.dims[0] *= 1 << 20


GRAPHS: dict[str, Callable[[onnx.ModelProto, Path], None]] = {
    "a weight in the folder above": _weight_at(location="../secret.bin"),
    "a weight by its whole path": _weight_at(location="SECRET"),
    "a weight of a device": _weight_at(location="/dev/zero"),
    "a weight in no file": _weight_at(location=""),
    "a weight of the other transformer": _weight_at(location="transformer_2.safetensors"),
    "a weight in a file of safetensors elsewhere": _weight_at(location="../secret.safetensors"),
    "a weight before the file": _weight_at(offset=-64),
    "a weight behind the file": _weight_at(offset=1 << 50),
    "a weight of huge length": _weight_at(length=1 << 60),
    "a weight of negative length": _weight_at(length=-1),
    "an offset that is no number": _weight_at(offset="0x10"),
    "an offset of 5000 digits": _weight_at(offset="9" * 5000),
    "a weight of another place": _weight_at(offset=0),
    "a weight of another shape": _another_shape,
    "a constant in a file": _constant,
    "a function's constant in a file": _constant_of_a_function,
    "a branch's weight in a file": _initializer_of_a_branch,
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs_cannot_name_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph takes the weights that the export lists, where they lie; no other file is opened, and nothing begun."""
    out = made.copy_of(made.engine_export(), tmp_path / "out")
    for place in (tmp_path / "secret.bin", out / "secret.bin", tmp_path / "secret.safetensors"):
        place.write_bytes(bytes(64))
    monkeypatch.chdir(out)
    path = out / "onnx/transformer_a8.onnx"
    model = onnx.load(path, load_external_data=False)
    GRAPHS[kind](model, tmp_path / "secret.bin")
    path.write_bytes(model.SerializeToString())
    rehashed(out, "onnx/transformer_a8.onnx")
    session = Counted()
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    artifact = Artifact.open(out)
    opened: list[str] = []
    watch_opened(opened)
    try:
        with pytest.raises(DvdquantError) as caught:
            OnnxRuntimeSession(artifact, bits=[8])
    finally:
        watch_opened(None)
    assert not [name for name in opened if "secret" in name or name.startswith("/dev")]
    assert (session.calls, bool(caught.value.fix)) == (0, True)


def _in_place(change: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        change(out / name)
        if (out / name).is_file():
            rehashed(out, name)

    return damage


def _pipe_for(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


WEIGHTS = "onnx/transformer.safetensors"
FILES: dict[str, Callable[[Path], None]] = {
    "weights cut in half": _in_place(lambda p: os.truncate(p, p.stat().st_size // 2), WEIGHTS),
    "weights cut to a header's length": _in_place(lambda p: os.truncate(p, 8), WEIGHTS),
    "weights cut to nothing": _in_place(lambda p: os.truncate(p, 0), WEIGHTS),
    "weights that are no safetensors": _in_place(lambda p: p.write_bytes(b"\xff" * 4096), WEIGHTS),
    "weights with a header of 2^63": _in_place(lambda p: p.write_bytes(b"\xff" * 7 + b"\x7f" + bytes(99)), WEIGHTS),
    "weights that are a pipe": _in_place(_pipe_for, WEIGHTS),
    "weights that are a device": _in_place(_link_to_a_device, WEIGHTS),
    "a graph that is text": _in_place(lambda p: p.write_text("graph"), "onnx/transformer_a8.onnx"),
    "a graph that is empty": _in_place(lambda p: p.write_bytes(b""), "onnx/transformer_a8.onnx"),
    "a graph that is a pipe": _in_place(_pipe_for, "onnx/transformer_a8.onnx"),
    "a config that is a list": _in_place(lambda p: p.write_text("[]"), "config.json"),
    "a config that is deep": _in_place(lambda p: p.write_text("[" * 9999), "config.json"),
    "a config of another kind": _in_place(lambda p: p.write_text('{"_class_name": "os.system"}'), "config.json"),
    "a config of odd numbers": _in_place(
        lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "patch_size": [[], {}, None]})), "config.json"
    ),
    "a config that is a pipe": _in_place(_pipe_for, "config.json"),
    "a config that is a device": _in_place(_link_to_a_device, "config.json"),
    "a config of 5 MB": _in_place(lambda p: p.write_text('{"x": "' + "x" * (5 << 20) + '"}'), "config.json"),
}


@pytest.mark.parametrize("kind", FILES)
def test_hostile_files_are_refused(kind: str, tmp_path: Path) -> None:
    """By an error that names the file: of bad content with its right hash, and of what is no file."""
    out = made.copy_of(made.engine_export(), tmp_path / "out")
    FILES[kind](out)
    with pytest.raises(DvdquantError) as caught:
        OnnxRuntimeSession(Artifact.open(out), bits=[8])
    assert any(name in str(caught.value) for name in ("transformer", "config.json"))
