"""GGUF files: values as the format's own package decodes them, and damage of every kind refused by the parser."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvdquant.checkpoint.formats.blocks import BLOCKS, dequantize
from dvdquant.checkpoint.formats.gguf import MAX_VALUES
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError
from tests.support import other_formats as formats
from tests.support import tiny_models as tiny
from tests.support.changed_bytes import mutated
from tests.support.gguf_files import ARCHITECTURE, NUMBERS, meant, random_blocks, stored
from tests.support.mutations import open_mutations


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_decoded_as_by_the_formats_own_package(kind: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    raw = np.frombuffer(random_blocks(kind, 20_000), np.uint8)
    theirs = quants.dequantize(raw.reshape(-1, BLOCKS[kind][1]), constants.GGMLQuantizationType[kind]).reshape(-1)
    ours = dequantize(torch.from_numpy(raw.copy()), kind)
    assert torch.equal(ours, torch.from_numpy(theirs.copy()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    wide = {**formats.WAN, "num_attention_heads": 2, "ffn_dim": 256}
    return {
        "wan": tiny.write_checkpoint(root / "wan", wide),
        "hunyuan": tiny.write_checkpoint(root / "hunyuan", {**formats.HUNYUAN, "num_attention_heads": 2}),
    }


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "F16", "BF16"])
@pytest.mark.parametrize("key", ["wan", "hunyuan"])
def test_gguf_file(tmp_path: Path, folders: dict[str, Path], key: str, kind: str) -> None:
    """Every tensor is what the entries stand for; joined linears are split between blocks."""
    entries = stored(formats.ORIGINAL[key](formats.folder_tensors(folders[key])), kind)
    (tmp_path / "m.gguf").write_bytes(formats.gguf_bytes(entries, ARCHITECTURE))
    same = open_checkpoint(formats.save_single(tmp_path / "same" / "m.safetensors", meant(entries)))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config == same.config
    assert checkpoint.tensors.keys() == same.tensors.keys()
    for name in same.tensors:
        assert torch.equal(checkpoint.read(name), same.read(name)), name
    assert checkpoint.source.layout.startswith("GGUF file")
    assert {"F16": "fp16", "BF16": "bf16"}.get(kind, kind) in checkpoint.source.precision
    assert Checkpoint.components(tmp_path) == ["transformer"]  # in a folder, too


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16", "F32"])
def test_a_file_of_the_formats_own_package(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    """Written by it with values of many types, quantized by it, and decoded by it."""
    package = pytest.importorskip("gguf")
    number = package.GGMLQuantizationType[kind]
    writer = package.GGUFWriter(str(tmp_path / "m.gguf"), "wan")
    writer.add_quantization_version(2)
    writer.add_file_type(7)
    writer.add_array("words", ["a", "b", "ü"])
    writer.add_float32("number", 0.5)
    writer.add_bool("flag", True)
    tensors = formats.folder_tensors(folders["wan"])
    expected = {}
    for (ours, value), theirs in zip(tensors.items(), formats.wan_original(tensors)):
        wide = value.float().contiguous().numpy()
        if value.ndim == 2:
            stored = package.quants.quantize(wide, number)
            writer.add_tensor(theirs, stored, raw_dtype=number)
            expected[ours] = torch.from_numpy(package.quants.dequantize(stored, number).copy())
        else:
            writer.add_tensor(theirs, wide)
            expected[ours] = value.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(checkpoint.read(name).float(), value.reshape(checkpoint.tensors[name].shape)), name


def test_a_tensor_that_was_reshaped(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Rows that no block divides are stored as rows of 256; the file says what they were."""
    entries = stored(formats.wan_original(formats.folder_tensors(folders["wan"])), "F32")
    index, (name, shape, _, _) = next((i, e) for i, e in enumerate(entries) if e[0] == "patch_embedding.weight")
    count = int(np.prod(shape))
    data = random_blocks("Q8_0", count // 32)
    entries[index] = (name, (count // 256, 256), NUMBERS["Q8_0"], data)
    values: dict[str, Any] = {**ARCHITECTURE, f"comfy.gguf.orig_shape.{name}": list(shape)}
    (tmp_path / "m.gguf").write_bytes(formats.gguf_bytes(entries, values))
    read = open_checkpoint(tmp_path / "m.gguf").read("patch_embedding.weight")
    assert read.shape == shape
    assert torch.equal(read.flatten(), dequantize(torch.frombuffer(bytearray(data), dtype=torch.uint8), "Q8_0"))
    for wrong in ([1, 2], [], [*shape, 2], [0] * 5, [-1] * 5):
        (tmp_path / "m.gguf").write_bytes(
            formats.gguf_bytes(entries, {**values, f"comfy.gguf.orig_shape.{name}": wrong})
        )
        with pytest.raises(CheckpointError, match="before, which is not it"):
            open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["Q8_1", "Q3_K", "Q2_K", "IQ4_XS", "MXFP4", "I8"])
def test_types_of_few_bits_are_refused(tmp_path: Path, kind: str) -> None:
    entries = [("blocks.0.self_attn.q.weight", (256, 256), NUMBERS[kind], bytes(32))]
    (tmp_path / "m.gguf").write_bytes(formats.gguf_bytes(entries, ARCHITECTURE))
    with pytest.raises(CheckpointError, match="1 of its 1 tensors") as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert kind in caught.value.what
    assert "Q8_0" in str(caught.value.available)
    assert "Q6_K" in str(caught.value.fix)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0"])
def test_types_of_4_and_5_bits_are_taken_on_request(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    """An export refuses them, says the option, and with it has a warning in its manifest and the option in its command."""
    from dvdquant.deploy.artifact import Artifact
    from tests.support.commands import in_process, refused, run
    from tests.support.traces import without_graphs

    entries = stored(formats.ORIGINAL["wan"](formats.folder_tensors(folders["wan"])), kind)
    path = tmp_path / "m.gguf"
    path.write_bytes(formats.gguf_bytes(entries, ARCHITECTURE))
    arguments = (path, "-o", tmp_path / "out", "--target", "graphs", "--latent", "2x8x8", "--text-tokens", 4)
    refused(run(*arguments, "--recipe", "weights-only"), kind, "--allow-low-bits", "Q8_0")
    assert not (tmp_path / "out").exists()
    with without_graphs():
        said = in_process(*arguments, "--recipe", "weights-only", "--allow-low-bits")
    assert "warning" in said
    artifact = Artifact.open(tmp_path / "out")
    assert any(note.startswith(f"warning: {kind}") for note in artifact.manifest.source["notes"])
    assert "--allow-low-bits" in artifact.rebuild_command()


ONE = [("a", (2, 32), NUMBERS["Q8_0"], bytes(68)), ("b", (3,), NUMBERS["F32"], bytes(12))]


def _file(values: Any = ARCHITECTURE, entries: Any = ONE, **options: Any) -> bytes:
    return formats.gguf_bytes(entries, values, **options)


def _patched(at: int, data: bytes) -> bytes:
    whole = _file()
    return whole[:at] + data + whole[at + len(data) :]


def _entry_field(name: bytes, skip: int, data: bytes) -> bytes:
    """The file with bytes after the name of an entry replaced."""
    whole = _file()
    at = whole.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + skip
    return whole[:at] + data + whole[at + len(data) :]


DAMAGE: dict[str, tuple[bytes, str]] = {
    "no header": (b"GGUF", "cut short"),
    "version 1": (_patched(4, struct.pack("<I", 1)), "version is 0x1"),
    "big-endian": (_patched(4, struct.pack(">I", 3)), "little-endian"),
    "many tensors": (_patched(8, struct.pack("<Q", 1 << 60)), "tensors and"),
    "many values": (_patched(16, struct.pack("<Q", 1 << 40)), "tensors and"),
    "more tensors than there are": (_patched(8, struct.pack("<Q", 1000)), ""),
    "a key of a terabyte": (_patched(24, struct.pack("<Q", 1 << 40)), "a text of"),
    "a key that is no UTF-8": (_patched(32, b"\xff\xfe"), "utf-8"),
    "a value of an unknown type": (
        _patched(32 + len("general.architecture"), struct.pack("<I", 77)),
        "unknown type 77",
    ),
    "an alignment of 7": (_file({"general.alignment": 7}), "general.alignment"),
    "an alignment of a gigabyte": (_file({"general.alignment": 1 << 30}), "general.alignment"),
    "an alignment in words": (_file({"general.alignment": "32"}), "general.alignment"),
    "one of several files": (_file({"split.count": 3}), "one part of a model"),
    "a name twice": (_file(entries=[ONE[1], ONE[1]]), "appears twice"),
    "a key twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (formats.gguf_text("k") + formats.gguf_value(1)),
        "the key 'k' appears twice",
    ),
    "nine axes": (_entry_field(b"b", 0, struct.pack("<I", 9)), "axes"),
    "an axis of nothing": (_entry_field(b"b", 4, struct.pack("<Q", 0)), "has the shape"),
    "an axis of an exabyte": (_entry_field(b"b", 4, struct.pack("<Q", 1 << 60)), "has the shape"),
    "a longer axis": (_entry_field(b"b", 4, struct.pack("<Q", 30)), "cut short"),
    "an unknown type": (_entry_field(b"b", 12, struct.pack("<I", 4)), "unknown type"),
    "an overlap": (_entry_field(b"b", 16, struct.pack("<Q", 64)), "overlaps|hole"),
    "a hole": (_entry_field(b"b", 16, struct.pack("<Q", 128)), "hole"),
    "an offset beyond the file": (_entry_field(b"b", 16, struct.pack("<Q", 1 << 63)), "hole"),
    "no whole blocks": (_file(entries=[("a", (2, 31), NUMBERS["Q8_0"], bytes(68))]), "no whole blocks"),
    "cut in the data": (_file()[:-40], "cut short"),
    "bytes at the end": (_file() + bytes(64), "after the last tensor"),
    "arrays in arrays": (
        _file({}, [])[:16]
        + struct.pack("<Q", 1)
        + formats.gguf_text("k")
        + struct.pack("<I", 9)
        + 3 * struct.pack("<IQ", 9, 1)
        + bytes(64),
        "arrays within arrays",
    ),
    "an array of many values": (
        _file({}, [])[:16]
        + struct.pack("<Q", 1)
        + formats.gguf_text("k")
        + struct.pack("<I", 9)
        + struct.pack("<IQ", 0, MAX_VALUES + 1),
        "an array of",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(tmp_path: Path, case: str) -> None:
    data, said = DAMAGE[case]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"(?i){said}") as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert caught.value.fix


def test_names_are_safe_to_print(tmp_path: Path) -> None:
    entries = [("\x1b[31m\u202eevil", (3,), NUMBERS["Q4_K"], bytes(12))]
    (tmp_path / "m.gguf").write_bytes(_file(entries=entries))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- fuzzing


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.stress)])
def test_mutations(folders: dict[str, Path], count: int) -> None:
    """Every mutation is read or refused, in little memory."""
    tensors = formats.wan_original(formats.folder_tensors(folders["wan"]))
    small = {name: value for name, value in tensors.items() if not name.startswith("blocks.1.")}
    data = formats.gguf_bytes(stored(small, "Q8_0"), {**ARCHITECTURE, "general.alignment": 32, "a": [1, 2, 3]})
    head = data.index(b"head.head.weight") + 60
    good = open_mutations("GGUF files", "m.gguf", count, count, lambda rng: mutated(data, head, rng))
    assert good < count
