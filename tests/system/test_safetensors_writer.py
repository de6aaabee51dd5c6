"""The streaming writer: what it writes, how it resumes, and a disk that runs full."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors
import torch
from safetensors.torch import load_file

from dvdquant.errors import DvdquantError, OutputError, ResourceError
from dvdquant.system.safetensors_reader import DTYPES, read_header
from dvdquant.system.safetensors_writer import ALIGNMENT, StreamingWriter
from tests.support.children import in_child

PLAN = [
    ("a", "F32", (3,)),
    ("b", "U8", (1,)),
    ("c", "I8", (64, 5)),
    ("d", "BF16", ()),
    ("e", "F16", (0, 4)),
    ("f", "U8", (64,)),
]


def _values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtypes = {code: getattr(torch, name) for code, (_, name) in DTYPES.items()}
    return {n: torch.randint(0, 100, s, generator=generator).to(dtypes[d]) for n, d, s in PLAN}


def _write(path: Path, names: list[str] | None = None) -> None:
    with StreamingWriter(path, PLAN, {"made": "here"}) as writer:
        values = _values()
        for name in names or values:
            writer.write(name, values[name])
        writer.finish()


def test_stock_library_loads_what_was_written_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    _write(path, ["f", "d", "a", "e", "c", "b"])
    loaded = load_file(path)
    for name, value in _values().items():
        assert torch.equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype
    assert all(name.startswith("__pad.") for name in loaded.keys() - _values().keys())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"made": "here"}
    assert path.stat().st_mode & 0o777 == 0o644
    _write(tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("extra", range(0, 70, 7))
def test_every_tensor_is_aligned_whatever_the_header_length(tmp_path: Path, extra: int) -> None:
    plan = [("n" * (1 + extra), "U8", (1,)), *PLAN]
    writer = StreamingWriter(tmp_path / "x", plan)
    writer.close()
    infos = read_header(tmp_path / "x").tensors
    assert [name for name in infos if not name.startswith("__pad.")] == [name for name, _, _ in plan]
    for name, _, _ in plan:
        assert infos[name].offset % ALIGNMENT == 0
        assert infos[name] == writer.tensors[name]


def test_offsets_serve_as_onnx_external_data(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    _write(path)
    infos = read_header(path).tensors
    proto = onnx.TensorProto(name="c", data_type=onnx.TensorProto.INT8, dims=[64, 5], data_location=1)
    for key, value in (("location", path.name), ("offset", infos["c"].offset), ("length", infos["c"].nbytes)):
        proto.external_data.add(key=key, value=str(value))
    assert onnx.numpy_helper.to_array(proto, str(tmp_path)).tolist() == _values()["c"].tolist()


def test_finish_returns_the_hash_and_refuses_gaps(tmp_path: Path) -> None:
    import hashlib

    with StreamingWriter(tmp_path / "x", PLAN) as writer:
        writer.write("a", _values()["a"])
        with pytest.raises(OutputError, match="lacks 5 of 6"):
            writer.finish()
        for name in "bcdef":
            writer.write(name, _values()[name])
        done = writer.finish()
    raw = (tmp_path / "x").read_bytes()
    assert done == {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}


def test_strided_tensors_are_written_in_logical_order(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).t()
    with StreamingWriter(tmp_path / "x", [("x", torch.float32, (4, 3))]) as writer:
        writer.write("x", value)
        writer.finish()
    assert torch.equal(load_file(tmp_path / "x")["x"], value)


@pytest.mark.parametrize("plan", [[("a", "F32", (1,))] * 2, [("__pad.0", "U8", (1,))], [("__metadata__", "U8", (1,))]])
def test_names_taken_or_reserved(tmp_path: Path, plan: list[tuple[str, str, tuple[int, ...]]]) -> None:
    with pytest.raises(ValueError, match="taken twice or reserved"):
        StreamingWriter(tmp_path / "x", plan)


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    with StreamingWriter(tmp_path / "x", PLAN) as writer:
        for name, value in (("a", torch.zeros(4)), ("a", torch.zeros(3).double()), ("z", torch.zeros(3))):
            with pytest.raises(ValueError, match=r"planned F32 \[3\]|not in the plan"):
                writer.write(name, value)
        writer.write("a", torch.zeros(3))
        with pytest.raises(ValueError, match="written already"):
            writer.write("a", torch.zeros(3))


def test_resume_after_every_number_of_tensors_is_bit_identical(tmp_path: Path) -> None:
    _write(tmp_path / "whole")
    values = _values()
    for count in range(len(PLAN) + 1):
        path, crc = tmp_path / f"r{count}", {}
        with StreamingWriter(path, PLAN, {"made": "here"}) as writer:
            for name in list(values)[:count]:
                crc[name] = writer.write(name, values[name])
            writer.sync()
        for done in (crc, set(crc)):
            with StreamingWriter.resume(path, PLAN, done, {"made": "here"}) as writer:
                assert writer.written == set(crc)
                for name in values.keys() - writer.written:
                    writer.write(name, values[name])
                writer.finish()
            assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_resume_notices_tensors_that_did_not_reach_the_disk(tmp_path: Path) -> None:
    path, values = tmp_path / "x", _values()
    with StreamingWriter(path, PLAN) as writer:
        crc = {name: writer.write(name, value) for name, value in values.items()}
        lost = writer.tensors["c"]
    with path.open("r+b") as file:
        file.seek(lost.offset)
        file.write(bytes(lost.nbytes))
    with StreamingWriter.resume(path, PLAN, crc) as writer:
        assert writer.written == set(values) - {"c"}


def test_resume_of_another_plan_or_of_nothing(tmp_path: Path) -> None:
    _write(tmp_path / "x")
    for path, plan in ((tmp_path / "x", PLAN[:-1]), (tmp_path / "absent", PLAN)):
        with pytest.raises(OutputError):
            StreamingWriter.resume(path, plan, ())


# ---------------------------------------------------------------------------------------------------------- disk full


def test_disk_full_at_200_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pwrite runs out of space after ``budget`` bytes, having written what fitted, as the kernel does."""
    real, values = os.pwrite, _values()
    _write(tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    left = 0

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(fd, memoryview(data)[:left], offset)
        left -= count
        return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    messages = []
    for budget in [*range(0, size, max(1, size // 200)), size]:
        left = budget
        try:
            with StreamingWriter(tmp_path / "x", PLAN, {"made": "here"}) as writer:
                for name, value in values.items():
                    writer.write(name, value)
                writer.finish()
            assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
        except ResourceError as error:
            messages.append(error.what)
    assert len(messages) > 150
    assert all("no room left" in what and str(tmp_path / "x") in what for what in messages)


def test_a_real_file_size_limit_is_seen_before_any_work(tmp_path: Path) -> None:
    """The size is reserved at once: with the kernel's own limit the constructor fails, not a write hours later."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            StreamingWriter(tmp_path / "x", [("x", "U8", (2 << 20,))])
        except ResourceError:
            return
        os._exit(3)

    assert in_child(work) == 0


def test_unwritable_places_are_output_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "x", tmp_path):
        with pytest.raises(DvdquantError) as caught:
            StreamingWriter(path, PLAN)
        assert isinstance(caught.value, OutputError)
