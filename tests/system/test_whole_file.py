"""Files that appear whole or not at all, and what killed writers left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dvdquant.errors import DvdquantError, OutputError, ResourceError
from dvdquant.system import whole_file
from dvdquant.system.files import disk_error
from dvdquant.system.whole_file import (
    UNFINISHED,
    atomic_folder,
    atomic_path,
    check_writable,
    sweep_unfinished,
    write_whole,
)
from tests.support.commands import environment

WRITER = """
import sys, time
from pathlib import Path
from dvdquant.system.whole_file import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print(temporary, flush=True)
    time.sleep(60)
"""


def _writer(target: Path, code: str = WRITER) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_next_writer_sweeps_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    killed, left = _writer(tmp_path / "clip.mp4")
    living, there = _writer(tmp_path / "other.mp4")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    mine = [".clip.abcdefgh.mp4", ".clip.dvdq-notours12345.mp4", "clip.dvdq-0123456789ab.mp4", ".x.dvdq-0123456789ab.d"]
    for name in mine[:3]:
        (tmp_path / name).write_text("mine")
    (tmp_path / mine[3]).mkdir()
    (tmp_path / ".link.dvdq-0123456789ab.mp4").symlink_to(tmp_path / mine[0])
    assert UNFINISHED.fullmatch(left.name)
    write_whole(tmp_path / "clip.json", b"{}")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"clip.json", there.name, *mine, ".link.dvdq-0123456789ab.mp4"}
    os.kill(living.pid, signal.SIGTERM)
    living.wait()
    sweep_unfinished(tmp_path)
    assert not there.exists()


FOLDER_WRITER = """
import sys, time
from pathlib import Path
from dvdquant.system.whole_file import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "half").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_the_next_writer_sweeps_the_folder_that_a_killed_one_left(tmp_path: Path) -> None:
    """And not that of a living one, nor folders that only look like one."""
    killed, left = _writer(tmp_path / "0abc", FOLDER_WRITER)
    living, there = _writer(tmp_path / "1def", FOLDER_WRITER)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert (left / "deep" / "half").is_file()
    mine = tmp_path / ".2.dvdq-0123456789ab.new"
    mine.mkdir()
    with atomic_folder(tmp_path / "2abc") as folder:
        assert not left.exists()
        (folder / "whole").write_text("new")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"2abc", mine.name, there.name, there.name.removesuffix(".new")}
    assert (tmp_path / "2abc" / "whole").read_text() == "new"
    os.kill(living.pid, signal.SIGTERM)
    living.wait()
    sweep_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"2abc", mine.name}


def test_a_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "above" / "folder"

    def fail() -> None:
        with atomic_folder(place) as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(place.parent.iterdir()) == []
    with atomic_folder(place) as folder:
        (folder / "file").write_text("first")
    with atomic_folder(place) as folder:  # another writer was first
        (folder / "file").write_text("second")
    assert [path.read_text() for path in place.iterdir()] == ["first"]
    assert list(place.parent.iterdir()) == [place]
    with pytest.raises(OutputError, match="file"), atomic_folder(place / "file"):
        pass
    assert (place / "file").read_text() == "first"


def test_a_stop_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM raise between two lines, those that make the unfinished file included."""
    target, lines, stop_at = tmp_path / "clip.json", 0, 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != whole_file.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == stop_at:
                raise KeyboardInterrupt
        return trace

    ended, before = False, sys.gettrace()
    while not ended:
        stop_at, lines = stop_at + 1, 0
        target.write_text("old")
        sys.settrace(trace)
        try:
            write_whole(target, b"new")
            ended = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert [path.name for path in tmp_path.iterdir()] == [target.name], f"a stop at line {stop_at} leaves a file"
        assert target.read_text() in ("old", "new")
    assert stop_at > 40


def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    """A rename over /dev/null, or over what a link leads to, would break the machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "pipe", tmp_path / "link", tmp_path):
        for refuse in (check_writable, lambda p: write_whole(p, b"x")):
            with pytest.raises(OutputError, match="no file that could be replaced"):
                refuse(path)
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "name", ["n" * 255, "é" * 127, "a." + "s" * 200, os.fsdecode(b"caf\xe9.mp4"), "a\x1b\n.mp4", "-"]
)
def test_any_name_that_a_file_can_have(name: str, tmp_path: Path) -> None:
    write_whole(tmp_path / name, b"one")
    write_whole(tmp_path / name, b"two")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"two")]


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "unlink", "flock", "stat"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EACCES, errno.EDQUOT])
def test_a_failing_system_call_leaves_the_old_file(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.json"
    target.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    module = "fcntl.flock" if call == "flock" else f"os.{call}"
    with monkeypatch.context() as patch:
        patch.setattr(module, fail)
        try:
            write_whole(target, b"new")
            refused: DvdquantError | None = None
        except DvdquantError as error:
            refused = error
    if call != "unlink":
        assert refused is not None
        assert str(target) in refused.what
        assert refused.fix
        assert target.read_bytes() == b"old"
    sweep_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_disk_errors_say_what_helps() -> None:
    for number, kind, words in (
        (errno.ENOSPC, ResourceError, "free disk space"),
        (errno.EMFILE, ResourceError, "ulimit -n"),
        (errno.EROFS, OutputError, "read-only"),
        (errno.EIO, OutputError, "check it"),
        (errno.ENAMETOOLONG, OutputError, "shorter path"),
        (errno.EACCES, OutputError, "you may write to"),
    ):
        error = disk_error(OSError(number, os.strerror(number)), "a\x1b")
        assert type(error) is kind
        assert words in (error.fix or "")
        assert "\x1b" not in str(error)


def test_a_folder_that_is_missing_is_made_or_named(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b.json")
    with pytest.raises(OutputError, match="there is no folder"):
        check_writable(tmp_path / "a" / "b.json", make_folder=False)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        check_writable(tmp_path / "file" / "b.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with atomic_path(tmp_path / "a" / "b.json") as temporary:
        temporary.write_text("{}")
    assert (tmp_path / "a" / "b.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
