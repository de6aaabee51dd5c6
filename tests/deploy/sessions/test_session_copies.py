"""What runs is what was hashed: weight files that are changed, cut or replaced while and after a session opens them."""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import onnxruntime
from dvdquant.deploy.sessions import private_copy as copies
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.deploy.sessions.private_copy import private_copy
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.sessions.weights import WeightFiles
from dvdquant.errors import OutputError, ResourceError
from dvdquant.system.files import hash_file
from tests.support import session_exports as made
from tests.support.children import in_child
from tests.support.weight_files import watch_weight_files

NAME = "onnx/transformer.safetensors"
WHERE = ["memory", "disk"]


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Copies in sealed memory, and in unnamed files as where memory has no room."""
    if request.param == "disk":
        monkeypatch.setattr(copies, "memory_limit", lambda: 0)
        (tmp_path / "temporary").mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        monkeypatch.setattr("tempfile.tempdir", None)
    kind: str = request.param
    return kind


def overwrite(path: Path) -> None:
    """In place, every byte of the tensors' half of the file."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\x55" * (size - size // 2))


def store_through_a_map(path: Path) -> None:
    """Which shows in the times late or, as they are put back, never."""
    info = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[info.st_size // 2 :] = b"\x55" * (info.st_size - info.st_size // 2)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def cut(path: Path) -> None:
    """To nothing: whoever maps the file ends with SIGBUS."""
    os.truncate(path, 0)


def replace(path: Path) -> None:
    """By another file of the same size."""
    other = path.with_name("other")
    other.write_bytes(b"\x55" * path.stat().st_size)
    os.replace(other, path)


def remove(path: Path) -> None:
    path.unlink()


def punch(path: Path) -> None:
    """A hole over all of it, by Linux's fallocate; the size stays."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    keep_size, punch_hole = 1, 2
    with path.open("r+b") as file:
        size = ctypes.c_long(path.stat().st_size)
        assert libc.fallocate(file.fileno(), keep_size | punch_hole, ctypes.c_long(0), size) == 0


CHANGES: list[Callable[[Path], None]] = [overwrite, store_through_a_map, cut, replace, remove, punch]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_opening_does_not_run(
    change: Callable[[Path], None], where: str, tmp_path: Path
) -> None:
    """Every byte is as it was, and a second opening finds the change."""
    out = made.copy_of(made.family_export("wan"), tmp_path / "out")
    artifact = Artifact.open(out)
    files = WeightFiles(artifact, "transformer")
    assert {copy.in_memory for copy in files.copies} == {where == "memory"}
    digest = artifact.manifest.files[NAME]["sha256"]
    change(out / NAME)
    raw = files.region("transformer.safetensors", 0, artifact.manifest.files[NAME]["bytes"])
    assert hashlib.sha256(raw.tobytes()).hexdigest() == digest
    files.close()
    del files, raw
    gc.collect()
    with pytest.raises(OutputError, match=r"transformer\.safetensors does not match its manifest"):
        WeightFiles(artifact, "transformer")
    if where == "disk":
        assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("kind", [OnnxRuntimeSession, PyTorchSession])
def test_a_session_goes_on_as_it_was(kind: Any, tmp_path: Path) -> None:
    """Its outputs are those from before, to the bit, after every byte on the disk was overwritten and the files were cut."""
    out = made.copy_of(made.family_export("wan"), tmp_path / "out")
    artifact = Artifact.open(out)
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    with kind(artifact) as session:
        before = [session.run(inputs, bits) for bits in (4, 8)]
        paths = [path for path in (out / "onnx").iterdir() if path.stat().st_size]
        for path in paths:
            store_through_a_map(path)
        assert all(torch.equal(session.run(inputs, bits), y) for bits, y in zip((4, 8), before))
        for path in paths:
            cut(path)
        assert all(torch.equal(session.run(inputs, bits), y) for bits, y in zip((4, 8), before))


def test_a_file_cut_short_does_not_end_the_process(tmp_path: Path) -> None:
    out = made.copy_of(made.family_export("wan"), tmp_path / "out")
    artifact = Artifact.open(out)
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)

    def cut_while_open() -> None:
        torch.set_num_threads(1)  # threads of this process do not live in a forked one
        session = OnnxRuntimeSession(artifact, bits=[8], threads=1)
        os.truncate(out / NAME, 0)
        session.run(inputs, 8)

    assert in_child(cut_while_open) == 0


def a_file(tmp_path: Path, size: int = 10_000_000) -> tuple[Path, Any]:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 10) * (size >> 10))
    return path, hash_file(path)


def test_nothing_can_write_to_a_copy_in_memory(tmp_path: Path) -> None:
    """Not by this process either: the kernel refuses writes, changes of size, shared maps and the breaking of the seals."""
    path, entry = a_file(tmp_path)
    copy = private_copy(tmp_path, path.name, entry, in_memory=True)
    assert copy.in_memory
    with pytest.raises(PermissionError):
        os.pwrite(copy.fileno(), b"x", 0)
    for size in (0, copy.size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(copy.fileno(), size)
    with pytest.raises(PermissionError):
        mmap.mmap(copy.fileno(), copy.size)
    assert copy.map()[:] == path.read_bytes()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_change_while_it_is_copied(in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two blocks: what was read before and after must be the file that the manifest has."""
    path, entry = a_file(tmp_path)
    read = os.preadv
    for change in (overwrite, store_through_a_map, cut):
        calls: list[int] = []

        def changing(fd: int, buffers: Any, offset: int, change: Any = change, calls: list[int] = calls) -> int:
            calls.append(offset)
            if len(calls) == 2:
                change(path)
            return read(fd, buffers, offset)

        whole = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(copies.os, "preadv", changing)
            with pytest.raises(OutputError, match=r"it ends after \d+ bytes|was changed"):
                private_copy(tmp_path, path.name, entry, in_memory)
        path.write_bytes(whole)


def test_copies_end_with_their_holders(tmp_path: Path) -> None:
    """The descriptor and the memory: nothing piles up over many sessions."""
    path, entry = a_file(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        one, two = (private_copy(tmp_path, path.name, entry, in_memory=True) for _ in range(2))
        assert one is two
        view = memoryview(one.map())
        del one, two
        assert bytes(view[:9]) == path.read_bytes()[:9]  # a map outlives the copy
        del view
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_seal_is_tried_again_while_the_kernel_moves_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, entry = a_file(tmp_path)
    busy, real = [True, True], copies.fcntl.fcntl

    def fcntl(fd: int, command: int, argument: int = 0) -> int:
        if command == copies.fcntl.F_ADD_SEALS and busy:
            busy.pop()
            raise OSError(16, "Device or resource busy")
        return real(fd, command, argument)

    monkeypatch.setattr(copies, "SEAL_PAUSE", 0.0)
    monkeypatch.setattr(copies.fcntl, "fcntl", fcntl)
    copy = private_copy(tmp_path, path.name, entry, in_memory=True)
    assert not busy
    assert copy.map()[:] == path.read_bytes()
    busy.extend([True] * 1000)  # and not for ever
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    with pytest.raises(OutputError, match="cannot be read"):
        private_copy(tmp_path, other.name, entry, in_memory=True)


def test_what_has_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, entry = a_file(tmp_path)
    monkeypatch.setattr(copies, "memory_limit", lambda: 1 << 20)
    assert not copies.fits_in_memory(entry["bytes"])
    assert copies.fits_in_memory(1 << 19)

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies.os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"it takes [\d.]+ MiB(?s:.*)TMPDIR"):
        private_copy(tmp_path, path.name, entry, in_memory=True)
    # Without a room in memory alone, the disk takes it; without such memory, too.
    monkeypatch.undo()
    reserve = os.posix_fallocate

    def full_in_memory(fd: int, offset: int, size: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
            full(fd, offset, size)
        reserve(fd, offset, size)

    def missing(name: str, flags: int) -> int:
        raise OSError(38, "Function not implemented")

    for name, fails in (("posix_fallocate", full_in_memory), ("memfd_create", missing)):
        with monkeypatch.context() as patch:
            patch.setattr(copies.os, name, fails)
            copy = private_copy(tmp_path, path.name, entry, in_memory=True)
        assert not copy.in_memory, name
        assert copy.map()[:] == path.read_bytes()
        del copy  # the next one would share it


def test_a_forked_child_opens_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the parent copies a file while another forks."""
    path, entry = a_file(tmp_path)
    copying, forked, read = threading.Event(), threading.Event(), os.preadv

    def waiting(fd: int, buffers: Any, offset: int) -> int:
        copying.set()
        assert forked.wait(60)
        return read(fd, buffers, offset)

    monkeypatch.setattr(copies.os, "preadv", waiting)
    thread = threading.Thread(target=private_copy, args=(tmp_path, path.name, entry, True))
    thread.start()
    assert copying.wait(60)

    def opens() -> None:
        signal.alarm(60)
        os.preadv = read
        assert private_copy(tmp_path, path.name, entry, in_memory=True).map()[:1]

    status = in_child(opens)
    forked.set()
    thread.join(60)
    assert status == 0


def test_files_that_are_no_regular_ones(tmp_path: Path) -> None:
    """A pipe, a device, a folder, a loop of links: refused at once, whatever size the manifest gives."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe", "folder", "loop", "zero", "sparse"):
        with pytest.raises(OutputError, match=name):
            private_copy(tmp_path, name, {"sha256": "0" * 64, "bytes": 7}, in_memory=True)


def test_the_constants_of_a_session_keep_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """``expanded`` gives the packed copy back; ONNX Runtime goes on reading the constants."""
    out = made.family_export("wan")
    artifact = Artifact.open(out)
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    opened = watch_weight_files(monkeypatch, onnxruntime)
    with OnnxRuntimeSession(artifact) as packed, OnnxRuntimeSession(artifact, weights="expanded") as expanded:
        assert [files.nbytes > 0 for files in opened] == [True, False]
        gc.collect()
        first = expanded.run(inputs, 8)
        assert torch.equal(first, expanded.run(inputs, 8))
        assert made.relative(first, packed.run(inputs, 8)) < 0.05


def test_an_empty_file_that_is_not_empty(tmp_path: Path) -> None:
    """Nothing is mapped of it, and it is looked at all the same."""
    artifact: Any = SimpleNamespace(
        weight_files=lambda component: ("onnx/x.constants.bin",),
        manifest=SimpleNamespace(files={"onnx/x.constants.bin": {"sha256": hashlib.sha256().hexdigest(), "bytes": 0}}),
        root=tmp_path,
    )
    artifact.read = lambda name: Artifact.read(artifact, name)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/x.constants.bin").write_bytes(b"")
    assert WeightFiles(artifact, "x").nbytes == 0
    (tmp_path / "onnx/x.constants.bin").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"x\.constants\.bin"):
        WeightFiles(artifact, "x")
