"""LoRA files from strangers: whatever they hold, they are fused or refused, and what they claim costs no memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dvdquant.checkpoint.lora.fuse import with_loras
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError, DvdquantError
from tests.support import tiny_models as tiny
from tests.support.checkpoint_folders import raw_safetensors
from tests.support.costs import Costs

Q = "diffusion_model.blocks.0.self_attn.q"
RANK = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = {**tiny.WAN, "num_layers": 1}
    return open_checkpoint(tiny.write_checkpoint(tmp_path_factory.mktemp("model"), config))


def content() -> dict[str, torch.Tensor]:
    """One part of every kind."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{Q}.lora_down.weight": torch.randn(RANK, 128, generator=generator),
        f"{Q}.lora_up.weight": torch.randn(128, RANK, generator=generator),
        f"{Q}.alpha": torch.tensor(1.0),
        f"{Q}.diff_b": torch.randn(128, generator=generator),
        "diffusion_model.blocks.0.norm3.diff": torch.randn(128, generator=generator).to(torch.bfloat16),
        "diffusion_model.blocks.0.diff_m": torch.randn(1, 6, 128, generator=generator).to(torch.float16),
        "diffusion_model.patch_embedding.diff": torch.randn(128, 4, 1, 2, 2, generator=generator),
    }


def save(path: Path) -> Path:
    settings = {"r": RANK, "lora_alpha": 4.0, "alpha_pattern": {"to_q": 1.0}, "peft_type": "LORA"}
    save_file(content(), path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    return path


def fuse_all(model: Checkpoint, path: Path, scale: float = 1.0) -> Checkpoint:
    """Open a LoRA and read every tensor that it changes."""
    fused = with_loras(model, [LoraSpec(path, scale)])
    assert fused.lora is not None
    for name in fused.lora.terms:
        value = fused.read(name)
        assert value.dtype == torch.float32
        assert tuple(value.shape) == model.tensors[name].shape
        assert bool(value.isfinite().all())
    fused.fingerprint()
    return fused


# ------------------------------------------------------------------------------------------------------------- mutations


def _header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _again(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _bytes(rng: random.Random, raw: bytes) -> bytes:
    """Some bytes of the header or of the values are others."""
    changed = bytearray(raw)
    tokens = [b'"', b"{", b"[", b"\xff", b"null", b"1e999", b"9" * 30, b"-1", bytes([rng.randrange(256)])]
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) if rng.random() < 0.3 else 1200)
        changed[place : place + rng.randint(0, 6)] = rng.choice(tokens)
    return bytes(changed)


def _keys(rng: random.Random, raw: bytes) -> bytes:
    """A key has another layer, part, prefix or adapter."""
    header, data = _header(raw)
    old = rng.choice([key for key in header if key != "__metadata__"])
    parts = [
        ".lora_A.weight",
        ".lora_B.x.weight",
        ".alpha",
        ".diff",
        ".diff_b",
        ".diff_m",
        ".lora_up.bias",
        ".dora_scale",
        "",
    ]
    layers = [
        "blocks.0.attn1.to_k",
        "blocks.0.ffn.0",
        "lora_unet_blocks_0_ffn_2",
        "head.head",
        "transformer_7.proj_out",
        "",
        "a" * 9000,
    ]
    layers += [
        "blocks.0.norm2",
        "head",
        "scale_shift_table",
        "patch_embedding",
        "\u202e\x1b[2J",
        "condition_embedder.time_proj",
    ]
    new = rng.choice(["", "transformer.", "base_model.model.", "lora_unet_"]) + rng.choice(layers) + rng.choice(parts)
    return _again({new if key == old else key: value for key, value in header.items()}, data)


def _shapes(rng: random.Random, raw: bytes) -> bytes:
    """A tensor has another shape or dtype of the same bytes, or claims other bytes."""
    header, data = _header(raw)
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    if rng.random() < 0.2:
        entry["data_offsets"] = [rng.choice([0, 4, 1 << 40]), rng.choice([0, 1024, 1 << 41])]
        return _again(header, data)
    size = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1, "I64": 8}
    dtype = rng.choice(list(size))
    elements = (entry["data_offsets"][1] - entry["data_offsets"][0]) // size[dtype]
    shape: list[int] = []
    while elements > 1 and len(shape) < 5 and rng.random() < 0.8:
        divisor = rng.choice([n for n in (1, 2, 3, 4, 6, 16, 64, 128, elements) if elements % n == 0])
        shape.append(divisor)
        elements //= divisor
    entry["dtype"], entry["shape"] = dtype, [*shape, elements]
    rng.shuffle(entry["shape"])
    return _again(header, data)


def _settings(rng: random.Random, raw: bytes) -> bytes:
    """A field of the metadata is another value."""
    header, data = _header(raw)
    values = [
        None,
        -1,
        0,
        1e308,
        "x",
        [],
        {},
        {"to_q": "x"},
        {"a" * 2000: 1.0},
        True,
        {"(": 1.0},
        1 << 70,
        float("nan"),
    ]
    settings = json.loads(header["__metadata__"]["lora_adapter_metadata"])
    settings[rng.choice(["r", "lora_alpha", "alpha_pattern", "peft_type", "use_dora", "use_rslora", "x"])] = rng.choice(
        values
    )
    text = json.dumps(settings) if rng.random() < 0.9 else rng.choice(["", "[", "[" * 3000, "\x00", "1"])
    header["__metadata__"]["lora_adapter_metadata"] = text
    return _again(header, data)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.stress)])
def test_mutated_files(count: int, model: Checkpoint, tmp_path: Path) -> None:
    rng, path = random.Random(29), tmp_path / "lora.safetensors"
    good = save(path).read_bytes()
    fuse_all(model, path)
    kinds: list[Callable[[random.Random, bytes], bytes]] = [_bytes, _keys, _shapes, _settings]
    opened = dict.fromkeys(kinds, 0)
    refused = dict.fromkeys(kinds, 0)
    said = ""
    with Costs("LoRA files") as costs:
        for _ in range(count):
            kind = rng.choice(kinds)
            raw = kind(rng, good)
            if rng.random() < 0.2:
                raw = _bytes(rng, raw)
            path.write_bytes(raw)
            try:
                with costs.case():
                    fuse_all(model, path, rng.choice([1.0, 0.0, -2.5, 1e30, 1e-40]))
                opened[kind] += 1
            except DvdquantError as error:
                refused[kind] += 1
                said = str(error)
            assert len(said) < 5000
            assert "\x1b" not in said
    assert all(opened.values()), opened
    assert all(refused.values()), refused


# --------------------------------------------------------------------------------------------------------- what it costs


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("down", [[1 << 24, 128], [2, 1 << 31], [1 << 20, 1 << 12]])
def test_claims_cost_no_memory(down: list[int], model: Checkpoint, tmp_path: Path) -> None:
    """A file of holes claims hundreds of gigabytes; it is refused by its header."""
    path, up = tmp_path / "lora.safetensors", [128, down[0]]
    sizes = [4 * down[0] * down[1], 4 * up[0] * up[1]]
    header = {
        f"{Q}.lora_down.weight": {"dtype": "F32", "shape": down, "data_offsets": [0, sizes[0]]},
        f"{Q}.lora_up.weight": {"dtype": "F32", "shape": up, "data_offsets": [sizes[0], sum(sizes)]},
    }
    raw = _again(header, b"")
    try:
        with path.open("wb") as file:
            file.write(raw)
            file.truncate(len(raw) + sum(sizes))
    except OSError as error:
        pytest.skip(f"no file of {sum(sizes)} bytes with holes here: {error}")
    before = _peak()
    with pytest.raises(CheckpointError, match=r"lora\.safetensors"):
        with_loras(model, [LoraSpec(path)])
    assert _peak() - before < 64 << 20


def test_more_tensors_than_any_lora_has(model: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    header = {f"x{i}.diff": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_001)}
    path.write_bytes(raw_safetensors(header))
    with pytest.raises(CheckpointError, match="50001 tensors"):
        with_loras(model, [LoraSpec(path)])


# ----------------------------------------------------------------------------------------------------- what is no such file


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it-ran",)


PLACES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (lambda path: None, ("there is no LoRA file", "other.txt", "hf download")),
    "a folder": (lambda path: path.mkdir(), ("is a folder", "fix")),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(_Runs())), ("a pickle", "weights_only=True")),
    "a zip pickle": (lambda path: torch.save({"a": torch.ones(2)}, path), ("zip", "weights_only=True")),
    "gguf": (lambda path: path.write_bytes(b"GGUF" + bytes(200)), ("GGUF", "safetensors")),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>" + " " * 50), ("web page", "download")),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        ("Git LFS", "lfs pull"),
    ),
    "empty": (lambda path: path.touch(), ("cut short",)),
    "a pipe": (os.mkfifo, ("not a regular file",)),
    "a device": (lambda path: path.symlink_to("/dev/zero"), ("not a regular file",)),
    "a link to itself": (lambda path: path.symlink_to(path), ("lora.safetensors",)),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_of_weights(
    name: str, model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = PLACES[name]
    (tmp_path / "other.txt").touch()
    make(tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError) as error:
        with_loras(model, [LoraSpec(tmp_path / "lora.safetensors")])
    for words in (*said, "lora.safetensors"):
        assert words in str(error.value), error.value
    assert error.value.fix
    assert not os.path.exists("it-ran")


def test_a_link_of_a_hub_cache(model: Checkpoint, tmp_path: Path) -> None:
    """The user's own link is followed: the hub keeps files under their hashes."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save(blobs / "0123")
    (snapshot / "lora.safetensors").symlink_to("../../blobs/0123")
    fuse_all(model, snapshot / "lora.safetensors")


@pytest.mark.parametrize("change", ["written", "replaced", "gone"])
def test_a_file_that_changes_while_it_is_read(change: str, model: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "lora.safetensors")
    fused = with_loras(model, [LoraSpec(path)])
    if change == "written":
        path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    elif change == "replaced":
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        other.replace(path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"changed since|no LoRA file"):
        fused.read("blocks.0.attn1.to_q.weight")
