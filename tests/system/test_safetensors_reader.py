"""The header parser against damaged and hostile bytes, and the reader of single tensors."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dvdquant.errors import CheckpointError
from dvdquant.system.safetensors_reader import DTYPES, read_header, read_tensor
from dvdquant.system.safetensors_writer import StreamingWriter
from tests.support.checkpoint_folders import entry, raw_safetensors, tensors
from tests.support.costs import Costs
from tests.support.folders import memory_folder

DATA = bytes(range(24))


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield Path(folder)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors(6), path, metadata={"format": "pt"})
    return path


# ------------------------------------------------------------------------------------------------------------ reading


def test_reads_what_the_stock_library_wrote(sample: Path) -> None:
    header = read_header(sample)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == sample.stat().st_size
    stock = load_file(sample)
    assert header.tensors.keys() == stock.keys()
    for name, info in header.tensors.items():
        ours = read_tensor(sample, info)
        assert ours.dtype == stock[name].dtype
        assert ours.shape == stock[name].shape
        assert torch.equal(ours, stock[name])


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_round_trips_bit_for_bit(tmp_path: Path, code: str) -> None:
    size, name = DTYPES[code]
    dtype = getattr(torch, name)
    raw = torch.randint(0, 2 if code == "BOOL" else 256, (7 * 3 * size,), dtype=torch.uint8)
    value = raw.view(dtype).reshape(7, 3)
    with StreamingWriter(tmp_path / "x.safetensors", [("x", dtype, (7, 3))]) as writer:
        writer.write("x", value)
        writer.finish()
    info = read_header(tmp_path / "x.safetensors").tensors["x"]
    back = read_tensor(tmp_path / "x.safetensors", info)
    assert (info.dtype, back.dtype, tuple(back.shape)) == (code, dtype, (7, 3))
    assert torch.equal(back.reshape(-1).view(torch.uint8), raw)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"].reshape(-1).view(torch.uint8), raw)


def test_empty_tensors_and_an_empty_file_of_tensors(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 4), "scalar": torch.tensor(3.0)}, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors").tensors
    assert read_tensor(tmp_path / "x.safetensors", infos["none"]).shape == (0, 4)
    assert read_tensor(tmp_path / "x.safetensors", infos["scalar"]).item() == 3.0
    (tmp_path / "empty").write_bytes(raw_safetensors(b"{}"))
    assert read_header(tmp_path / "empty").tensors == {}


def test_cut_at_every_header_byte_and_1000_times_in_the_data(sample: Path, memory: Path) -> None:
    whole = sample.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    by_offset = sorted(read_header(sample).tensors.values(), key=lambda info: info.offset)
    cut = memory / "cut.safetensors"
    places = random.Random(7).choices(range(start, len(whole)), k=1000)
    for place in [*range(start), *places]:
        cut.write_bytes(whole[:place])
        with pytest.raises(CheckpointError) as caught:
            read_header(cut)
        assert str(cut) in caught.value.what
        assert "cut short" in caught.value.what
        if place >= start:
            first = next(info for info in by_offset if info.offset + info.nbytes > place)
            assert repr(first.name) in caught.value.what


BIG = (1 << 63) - 1
BAD_HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "length above the cap": struct.pack("<Q", 100_000_001) + b"{}",
    "length of all ones": b"\xff" * 8 + b"{}",
    "negative as signed": struct.pack("<q", -1) + b"{}",
    "not JSON": raw_safetensors(b"PK\x03\x04 this is a zip"),
    "pickle": b"\x80\x04\x95" + b"\x00" * 200,
    "list": raw_safetensors(b"[]"),
    "number": raw_safetensors(b"7"),
    "leading space": raw_safetensors(b" {}"),
    "byte order mark": raw_safetensors(b"\xef\xbb\xbf{}"),
    "not UTF-8": raw_safetensors(b'{"\xff\xfe":{}}'),
    "UTF-16": raw_safetensors('{"x":{}}'.encode("utf-16")),
    "lone surrogate": raw_safetensors(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", DATA),
    "two values": raw_safetensors(b"{}{}"),
    "trailing comma": raw_safetensors(b'{"a":1,}'),
    "deep list": raw_safetensors(b"[" * 50_000 + b"]" * 50_000),
    "deep object": raw_safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "depth 5": raw_safetensors(b'{"a":{"shape":[[[1]]]}}'),
    "NaN": raw_safetensors(b'{"a":NaN}'),
    "float overflow": raw_safetensors(b'{"a":1e999}'),
    "int of 5000 digits": raw_safetensors(b'{"a":' + b"9" * 5000 + b"}"),
    "many items": raw_safetensors(b'{"a":[' + b"[]," * 2_100_000 + b"[]]}"),
    "duplicate tensor": raw_safetensors(
        b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}", DATA
    ),
    "duplicate field": raw_safetensors(b'{"x":{"dtype":"F32","dtype":"F32","shape":[6],"data_offsets":[0,24]}}', DATA),
    "entry is a list": raw_safetensors({"x": [1]}, DATA),
    "entry is null": raw_safetensors({"x": None}, DATA),
    "field missing": raw_safetensors({"x": {"dtype": "F32", "shape": [6]}}, DATA),
    "field too many": raw_safetensors({"x": {**entry(), "extra": 1}}, DATA),
    "unknown dtype": raw_safetensors({"x": entry("F31")}, DATA),
    "dtype is a list": raw_safetensors({"x": {**entry(), "dtype": ["F32"]}}, DATA),
    "shape too small": raw_safetensors({"x": entry(shape=(2, 2))}, DATA),
    "shape negative": raw_safetensors({"x": entry(shape=(-2, -3))}, DATA),
    "shape of booleans": raw_safetensors({"x": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"\x00"),
    "shape of floats": raw_safetensors({"x": entry(shape=(2.0, 3.0))}, DATA),
    "shape is a string": raw_safetensors({"x": {**entry(), "shape": "23"}}, DATA),
    "shape overflows": raw_safetensors({"x": entry(shape=(1 << 61, 1 << 61, 8))}, DATA),
    "shape wraps to its size": raw_safetensors({"x": entry("U8", shape=(1 << 32, 1 << 32), offsets=(0, 0))}),
    "65 dimensions": raw_safetensors({"x": entry(shape=(1,) * 64 + (6,))}, DATA),
    "offsets reversed": raw_safetensors({"x": entry(offsets=(24, 0))}, DATA),
    "offsets negative": raw_safetensors({"x": entry(offsets=(-24, 0))}, DATA),
    "offsets of three": raw_safetensors({"x": entry(offsets=(0, 24, 24))}, DATA),
    "offset is huge": raw_safetensors({"x": entry("U8", shape=(BIG,), offsets=(0, BIG))}, DATA),
    "beyond the end": raw_safetensors({"x": entry(shape=(7,), offsets=(0, 28))}, DATA),
    "overlap": raw_safetensors({"x": entry(), "y": entry("U8", (4,), (20, 24))}, DATA),
    "same bytes twice": raw_safetensors({"x": entry(), "y": entry()}, DATA),
    "hole": raw_safetensors({"x": entry("U8", (4,), (0, 4)), "y": entry("U8", (4,), (20, 24))}, DATA),
    "hole at the start": raw_safetensors({"x": entry("U8", (20,), (4, 24))}, DATA),
    "bytes after the end": raw_safetensors({"x": entry()}, DATA + b"!"),
    "metadata of numbers": raw_safetensors({"__metadata__": {"a": 1}, "x": entry()}, DATA),
    "metadata is a list": raw_safetensors({"__metadata__": ["a"], "x": entry()}, DATA),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_refuses(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_HEADERS[case])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in caught.value.what
    str(caught.value).encode()  # printable: no lone surrogate reaches a terminal or a log
    assert len(caught.value.what) < 1500
    if case in ("hole", "overlap"):
        assert case in caught.value.what
        assert "'y'" in caught.value.what


def test_the_base_of_the_bad_headers_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(raw_safetensors({"x": entry()}, DATA))
    info = read_header(path).tensors["x"]
    assert read_tensor(path, info).shape == (2, 3)


def test_refuses_folders_pipes_and_devices_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(path)


def test_terminal_escapes_in_names_are_shown_not_sent(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw_safetensors({"\x1b[2Jred": entry("F31")}, DATA))
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x")
    assert "\x1b" not in str(caught.value)
    assert "x1b[2Jred" in str(caught.value)


@pytest.mark.parametrize("count", [4000, pytest.param(100_000, marks=pytest.mark.stress)])
def test_random_mutations_never_crash(sample: Path, memory: Path, count: int) -> None:
    whole, rng, path = sample.read_bytes(), random.Random(11), memory / "fuzz"
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    tokens = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"9" * 30, b"1e400", b"null", b"\\u", b"\x00", b"\xff"]
    with Costs("headers of safetensors") as costs:
        for _ in range(count):
            raw = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                place, what = rng.randrange(start), rng.random()
                if what < 0.4:
                    raw[place] = rng.randrange(256)
                elif what < 0.7:
                    raw[place : place + rng.randint(0, 3)] = rng.choice(tokens)
                elif what < 0.85:
                    del raw[place : place + rng.randint(1, 20)]
                else:
                    other = rng.randrange(start)
                    raw[place:place] = raw[other : other + rng.randint(1, 60)]
            path.write_bytes(raw)
            try:
                with costs.case():
                    header = read_header(path)
            except CheckpointError:
                continue
            for info in header.tensors.values():  # whatever passes can be read, and lies inside the file
                assert read_tensor(path, info).nbytes == info.nbytes
    assert costs.refused > 0.85 * count


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.sampled_from(["x", "y", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "I64", "Q4"]) | JSON_VALUES,
                "shape": st.lists(st.integers(-2, 6), max_size=3) | JSON_VALUES,
                "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)).map(list) | JSON_VALUES,
            }
        )
        | JSON_VALUES,
    ),
    data=st.binary(max_size=48),
)
def test_generated_headers_never_crash(memory: Path, header: dict[str, Any], data: bytes) -> None:
    path = memory / "x"
    path.write_bytes(raw_safetensors(json.dumps(header).encode(), data))
    try:
        infos = read_header(path).tensors
    except CheckpointError:
        return
    assert sum(info.nbytes for info in infos.values()) == len(data)


def test_nothing_the_stock_library_refuses_is_accepted(memory: Path) -> None:
    """Ours is the stricter of the two."""
    rng, path = random.Random(3), memory / "x"
    base = {"x": entry(), "y": entry("U8", (4,), (24, 28))}
    accepted = 0
    for _ in range(1500):
        text = bytearray(json.dumps(base).encode())
        text[rng.randrange(len(text))] = rng.choice(b'0123456789"{}[],: aFU')
        path.write_bytes(raw_safetensors(bytes(text), DATA + b"abcd"))
        try:
            read_header(path)
        except CheckpointError:
            continue
        accepted += 1
        with safetensors.safe_open(path, "pt") as file:
            assert set(file.keys())
    assert accepted > 20


def test_a_file_cut_after_its_header_was_read(sample: Path) -> None:
    infos = read_header(sample).tensors
    os.truncate(sample, sample.stat().st_size - 3)
    last = max(infos.values(), key=lambda info: info.offset)
    with pytest.raises(CheckpointError, match="ends 3 bytes early") as caught:
        read_tensor(sample, last)
    assert repr(last.name) in caught.value.what


def test_bool_bytes_must_be_bool(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw_safetensors({"x": entry("BOOL", (3,), (0, 3))}, b"\x00\x01\x02"))
    info = read_header(tmp_path / "x").tensors["x"]
    with pytest.raises(CheckpointError, match="neither 0 nor 1"):
        read_tensor(tmp_path / "x", info)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_reading_keeps_no_memory(tmp_path: Path) -> None:
    """Resident memory grows by one tensor at most, and falls back: 8 tensors of 32 MB, read one after another."""
    size = 32 << 20
    with StreamingWriter(tmp_path / "big", [(f"t{i}", "U8", (size,)) for i in range(8)]) as writer:
        for i in range(8):
            writer.write(f"t{i}", torch.full((size,), i, dtype=torch.uint8))
        writer.finish()
    infos = read_header(tmp_path / "big").tensors
    before, peak = _resident(), 0
    for info in infos.values():
        tensor = read_tensor(tmp_path / "big", info)
        assert tensor[-1] == int(info.name[1:])
        peak = max(peak, _resident() - before)
        del tensor
    assert peak < 2 * size
    assert _resident() - before < size
