"""``dvdq-inspect --check`` and ``dvdq-export --verify`` on exports whose hashes are right and whose files do not fit together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from dvdquant.artifact.folder import Folder
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.export.passes.lowering import store as lower_store
from dvdquant.system.files import hash_file
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process, refused, run

A4, A8, QDQ = "onnx/transformer_a4.onnx", "onnx/transformer_a8.onnx", "onnx/transformer_a4_qdq.onnx"
CONSTANTS = "onnx/transformer.constants.bin"
VICTIM, OTHER = (f"blocks.0.attn{number}.to_out.0" for number in (2, 1))  # of one shape


@pytest.fixture(scope="module", autouse=True)
def small_constants() -> Iterator[None]:
    """Rotary tables of a toy go into a file of their own, as those of a video do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lower_store, "INLINE_BYTES", 1024)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE)


def arguments(model: Path, out: Path) -> list[object]:
    return [model, "-o", out, "--target", "onnx", "--recipe", "rtn", *SIZES]


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "wan"
    in_process(*arguments(model, out))
    assert (out / CONSTANTS).stat().st_size
    return out


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


def check(out: Path) -> Result:
    return CliRunner().invoke(inspect_main, [str(out), "--check"])


def rehash(out: Path, edit: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Make the manifest vouch for the files as they are now."""
    path = out / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    for name in data["files"]:
        data["files"][name] = hash_file(out / name)
    path.write_text(json.dumps(data))
    verify_files(out, load_manifest(out))


def external(tensor: onnx.TensorProto, **fields: str) -> None:
    for item in tensor.external_data:
        item.value = fields.get(item.key, item.value)


def initializer(graph: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = [t for t in graph.graph.initializer if t.name == name]
    return found


def elsewhere(location: str) -> Callable[[onnx.ModelProto], None]:
    return lambda graph: external(initializer(graph, f"{VICTIM}.weight"), location=location)


def other_place(graph: onnx.ModelProto) -> None:
    there = {e.key: e.value for e in initializer(graph, f"{OTHER}.weight").external_data}
    external(initializer(graph, f"{VICTIM}.weight"), offset=there["offset"])


def beyond_the_end(graph: onnx.ModelProto) -> None:
    external(initializer(graph, f"{VICTIM}.weight"), offset=str(1 << 40))


def of_its_own(graph: onnx.ModelProto) -> None:
    tensor = initializer(graph, f"{VICTIM}.bias")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = bytes(4 * tensor.dims[0])


def other_layer(graph: onnx.ModelProto) -> None:
    (node,) = [n for n in graph.graph.node if f"{VICTIM}.weight" in n.input]
    node.input[1] = f"{OTHER}.weight"


def without_layer(graph: onnx.ModelProto) -> None:
    (node,) = [n for n in graph.graph.node if f"{VICTIM}.weight" in n.input]
    node.op_type, node.domain = "Identity", ""
    del node.input[1:]
    del node.attribute[:]


def constant_inside(graph: onnx.ModelProto) -> None:
    """External data in an attribute, which no initializer shows."""
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "../config.json"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    graph.graph.node.append(onnx.helper.make_node("Constant", [], ["hidden"], value=tensor))


def sparse_inside(graph: onnx.ModelProto) -> None:
    """External data of a sparse tensor in an attribute."""
    constant_inside(graph)
    hidden = graph.graph.node.pop().attribute[0].t
    node = graph.graph.node.add(op_type="Constant", output=["hidden"])
    attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(hidden)
    attribute.sparse_tensor.dims.append(8)


def one_number(graph: onnx.ModelProto) -> None:
    tensor = next(t for t in graph.graph.initializer if t.raw_data and t.data_type == onnx.TensorProto.FLOAT)
    tensor.raw_data = bytes(len(tensor.raw_data))


FAULTS: dict[str, tuple[str, Callable[[onnx.ModelProto], None], str]] = {
    "weights of another file": (A4, elsewhere("mine.safetensors"), "mine.safetensors"),
    "weights of another folder": (A4, elsewhere("../../mine"), "../../mine"),
    "weights of a listed file": (A4, elsewhere("transformer_a8.onnx"), "transformer_a8.onnx|beyond the end|another place"),
    "another tensor's bytes": (A8, other_place, f"{VICTIM}.weight"),
    "another tensor's bytes in QDQ": (QDQ, other_place, f"{VICTIM}.weight"),
    "beyond the end": (A4, beyond_the_end, "beyond the end"),
    "weights of its own": (A4, of_its_own, f"{VICTIM}.bias"),
    "another layer's weight": (A4, other_layer, "QuantLinear reads"),
    "a layer left out": (A4, without_layer, f"does not use {VICTIM}.weight"),
    "external data in an attribute": (A8, constant_inside, "hidden"),
    "external data of a sparse tensor in an attribute": (A8, sparse_inside, "hidden"),
    "another constant in one of the graphs": (A8, one_number, "differ in more than the activation bits"),
}  # fmt: skip


def test_an_export_as_it_was_written(out: Path) -> None:
    result = check(out)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "match the manifest" in result.output
    assert "fit together" in result.output


@pytest.mark.parametrize("fault", FAULTS)
def test_graphs_that_read_other_weights(fault: str, out: Path) -> None:
    path, edit, named = FAULTS[fault]
    graph = onnx.load(out / path, load_external_data=False)
    edit(graph)
    (out / path).write_bytes(graph.SerializeToString())
    rehash(out)
    result = check(out)
    refused(result, path)
    assert any(text in result.output for text in named.split("|")), result.output


@pytest.mark.parametrize("name", ["engines/rtx-sm89/mine.engine", "onnx/mine.onnx", "engines/.hidden", "onnx/deep/x"])
@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_a_file_that_is_not_listed(name: str, link: bool, out: Path) -> None:
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if link:
        path.symlink_to(out / A4)
    else:
        path.write_bytes(b"x")
    refused(check(out), name)


def test_what_lies_beside_is_said(out: Path) -> None:
    (out / "clip\x1b[2J.mp4").write_bytes(b"x")
    (out / "clips").symlink_to("/")
    result = check(out)
    assert result.exit_code == 0, result.output
    assert "not of the export: clip\\x1b[2J.mp4, clips" in result.output


@pytest.mark.parametrize("right", [True, False])
def test_an_engine_of_another_graph(right: bool, out: Path) -> None:
    path = "engines/rtx-sm89/transformer_a4.engine"
    (out / path).parent.mkdir(parents=True)
    (out / path).write_bytes(b"an engine")

    def add(manifest: dict[str, Any]) -> None:
        manifest["files"][path] = None
        entry = {
            "path": path, "backend": "tensorrt_rtx", "sm": ["8.9"], "act_bits": 4, "precision": "int8",
            "executes": "int8", "onnx_sha256": manifest["files"][A4 if right else A8]["sha256"],
            "versions": {"tensorrt_rtx": "1.7.1"}, "shapes": manifest["shapes"],
        }  # fmt: skip
        manifest["engines"] = [entry]

    rehash(out, add)
    result = check(out)
    if right:
        assert result.exit_code == 0, result.output
    else:
        refused(result, path, "built from another", A4)


# ------------------------------------------------------------------------------------------------------------ by --verify


def test_verify_finds_a_changed_constant(out: Path, model: Path) -> None:
    """A rotary table: no weight, and in a graph of a real size nothing that runs here would show it."""
    data = bytearray((out / CONSTANTS).read_bytes())
    data[len(data) // 2] ^= 1
    (out / CONSTANTS).write_bytes(data)
    rehash(out)
    assert check(out).exit_code == 0
    refused(run(*arguments(model, out), "--verify"), CONSTANTS)


def test_verify_finds_a_changed_node(out: Path, model: Path) -> None:
    """The same in both graphs."""
    for path in (A4, A8):
        graph = onnx.load(out / path, load_external_data=False)
        one_number(graph)
        (out / path).write_bytes(graph.SerializeToString())
    rehash(out)
    refused(run(*arguments(model, out), "--verify"), A4)


def test_verify_finds_a_graph_that_reads_elsewhere(out: Path, model: Path) -> None:
    graph = onnx.load(out / A4, load_external_data=False)
    other_place(graph)
    (out / A4).write_bytes(graph.SerializeToString())
    rehash(out)
    refused(run(*arguments(model, out), "--verify"), A4, VICTIM)


@pytest.mark.parametrize("place", ["", "onnx", "engines"])
def test_folders_in_each_other_without_end(out: Path, place: str) -> None:
    """Deeper than Python calls itself: who looks for unlisted files says so in words."""
    (out / place).mkdir(exist_ok=True)
    folder = os.open(out / place, os.O_RDONLY)
    for _ in range(1300):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    assert CliRunner().invoke(inspect_main, [str(out)]).exit_code == 0
    refused(check(out), str(out), "more than 64 folders in each other")
    with Folder.open(out.parent) as parent:
        parent.remove(out.name)  # which shutil.rmtree of Python 3.11 cannot
