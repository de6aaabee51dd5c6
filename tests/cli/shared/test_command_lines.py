"""The four commands as processes: whatever the command line, the streams, the memory and the signals, they end in words."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dvdquant.artifact.manifest import load_manifest
from dvdquant.cli.shared.process import user_error
from dvdquant.errors import EngineError, ExportError, ResourceError
from dvdquant.export.engines.precision import PRECISIONS
from dvdquant.export.model_card import model_card
from dvdquant.ops.cuda.errors import KernelError
from dvdquant.system.whole_file import UNFINISHED
from dvdquant.text import unsafe
from tests.support import tiny_models as tiny
from tests.support.command_lines import (
    HOSTILE,
    LATIN,
    PROMPT,
    CommandServer,
    base,
    command_lines,
    prepare,
    some_command_lines,
)
from tests.support.commands import SIZES, environment
from tests.support.costs import Costs
from tests.support.exporting import TINY_WAN
from tests.support.running import short_wan_export

NAMES = ("export", "inspect", "plan", "run")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    folder = tmp_path_factory.mktemp("lines")
    prepare(folder, short_wan_export())
    made = CommandServer(folder)
    yield made
    made.close()


def _names(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name != "secret"}


def _sizes(folder: Path, before: set[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in _names(folder) - before}


def _judge(server: CommandServer, lines: list[tuple[str, list[str]]]) -> None:
    """Run every line; one that fails leaves nothing, and none ends in a way no user could act on."""
    before, failed = _names(server.folder), []
    with Costs("command lines", bounded=False) as costs:
        for what, words in lines:
            ended = server.run(*words, plain=True)
            costs.add(ended.seconds, refused=ended.code == 2)
            found = ended.faults()
            new = _names(server.folder) - before
            if new and ended.code:
                found.append(f"left {new}")
            for name in new:
                place = server.folder / name
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            if found:
                failed.append((what, words[-1][:80], found, ended.err[-500:]))
    assert not failed, "\n".join(map(str, failed))
    assert before == _names(server.folder)
    assert Path("/dev/full").is_char_device()


def test_no_command_line_ends_in_a_traceback(server: CommandServer) -> None:
    lines = some_command_lines()
    assert len(lines) >= 45
    assert len({words[-1] for _, words in lines}) >= 20
    _judge(server, lines)


@pytest.mark.stress
def test_no_command_line_of_all_ends_in_a_traceback(server: CommandServer) -> None:
    _judge(server, list(command_lines()))


def test_the_choices_of_the_export_are_those_there_are() -> None:
    """The command writes them down, because what they come from takes seconds to import."""
    from dvdquant.cli import export
    from dvdquant.export.options import BUILD_PLACES

    assert export.PRECISIONS == PRECISIONS
    assert export.BUILD_PLACES == BUILD_PLACES


# ------------------------------------------------------------------------------------------------------------- streams

SAYING = {
    "inspect": ["inspect", "export"],
    "inspect as JSON": ["inspect", "export", "--json"],
    "help": ["run", "--help"],
    "version": ["plan", "--version"],
    "dry run": ["export", *base("export")],
    "dry run as JSON": ["export", *base("export"), "--log-format", "json"],
}


@pytest.mark.parametrize("what", SAYING)
def test_standard_output_that_cannot_be_written(what: str, server: CommandServer) -> None:
    for more in ({"streams": {"1": "/dev/full"}}, {"closed": [1]}):
        ended = server.run(*SAYING[what], **more)
        assert ended.code == 2
        assert ended.faults() == []
        assert "standard output cannot be written" in ended.err
    # Nobody reads: no word, and the exit code that a shell gives a command ended by SIGPIPE.
    ended = server.run(*SAYING[what], streams={"1": "broken"})
    assert (ended.code, ended.err) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("name", NAMES)
def test_standard_error_that_cannot_be_written(name: str, server: CommandServer) -> None:
    for more in ({"streams": {"2": "/dev/full"}}, {"closed": [2]}, {"closed": [0, 1, 2]}, {"streams": {"2": "broken"}}):
        assert server.run(name, "nowhere", "--no-such-option", **more).code == 2
        assert server.run(name, *base(name), "--log-format", "text", "--seed", "x", **more).code == 2


def test_work_goes_on_without_messages(server: CommandServer) -> None:
    """A full disk under the log costs the messages and the exit code 0, not the clip."""
    clip = server.folder / "clip.gif"
    for streams, code in (({"2": "/dev/full"}, 2), ({"2": "broken"}, 0)):
        ended = server.run("run", *base("run"), streams=streams)
        assert ended.code == code
        assert clip.stat().st_size > 1000
        assert "clip" in ended.out
        clip.unlink()
    ended = server.run("run", *base("run"), streams={"1": "/dev/full"})
    assert ended.code == 2
    assert clip.stat().st_size > 1000
    clip.unlink()


def test_a_file_never_gets_the_number_of_a_closed_stream(server: CommandServer) -> None:
    """Else what is printed ends up in the file that got its number."""
    page = server.folder / "page.html"
    assert server.run("inspect", "export", "--html", page, "--check", closed=[0, 1, 2]).code == 2
    assert page.read_text().rstrip().endswith("</html>")
    assert "files match" not in page.read_text()
    page.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_an_ascii_terminal_and_a_deleted_folder(name: str, server: CommandServer) -> None:
    ended = server.run(name, *base(name), gone=True)
    assert ended.code == 2
    assert ended.faults() == []
    assert "working directory" in ended.err
    assert server.run(name, "--help", gone=True).code == 0
    ended = server.run(name, "--help", environment={"PYTHONIOENCODING": "ascii"})
    assert ended.code == 0


# -------------------------------------------------------------------------------------------------- memory, files, disk


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("room", [0, 64 << 20])
def test_too_little_memory(name: str, room: int, server: CommandServer) -> None:
    words = ["inspect", "export", "--html", "page.html"] if name == "inspect" else [name, *base(name)]
    before = _names(server.folder)
    ended = server.run(*words, memory=room)
    assert ended.faults() == [], ended.err
    assert ended.code == 0 or "not enough memory" in ended.err or "cannot be used" in ended.err
    for new in _names(server.folder) - before:
        assert ended.code == 0
        (server.folder / new).unlink()


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B",
        "CUDA out of memory. Tried to allocate 20.00 GiB",
        "std::bad_alloc",
    ],
)
def test_a_library_without_memory(message: str, server: CommandServer) -> None:
    for log_format in ("text", "json"):
        words = ["run", *base("run"), "--log-format", log_format]
        ended = server.run(*words, fault=["dvdquant.deploy.generation.generate", "open_generator", message])
        assert ended.code == 2
        assert "not enough memory" in ended.err
        assert "Traceback" not in ended.err
        if log_format == "json":
            (line,) = map(json.loads, ended.err.splitlines())
            assert (line["event"], line["error"]) == ("error", "ResourceError")


def test_an_error_that_wraps_a_failed_allocation_advises_memory() -> None:
    for kind in (EngineError, ExportError, KernelError):
        for cause in (RuntimeError("std::bad_alloc"), MemoryError(), OSError(12, "Cannot allocate memory")):
            failed = kind(f"onnxruntime failed in a8: {cause}", fix="check the engines")
            failed.__cause__ = cause
            outer = kind(f"step 3: {failed.what}")
            outer.__cause__ = failed
            logged = kind("the engine failed: Cuda Runtime (out of memory)", out_of_memory=True)
            for error in map(user_error, (failed, outer, logged)):
                assert isinstance(error, ResourceError)
                assert "free memory" in (error.fix or "")
        # A name is no reason: the sentence quotes it.
        named = kind("out of memory.onnx cannot be read", fix="name another file")
        named.__cause__ = ValueError("no ONNX file")
        assert user_error(named) is named
    assert user_error(ValueError("a bug")) is None
    assert isinstance(user_error(RecursionError("maximum recursion depth exceeded")), ResourceError)
    assert isinstance(user_error(OSError(12, "Cannot allocate memory")), ResourceError)
    assert isinstance(user_error(OSError(24, "Too many open files", "x")), ResourceError)
    assert "'a\\x1b' cannot" in str(user_error(OSError(5, "Input/output error", "'a\x1b'")))


NO_ROOM = """
import resource
from dvdquant.cli.shared.process import user_error
error = ValueError("field 'target' is required for AnnAssign")
with_room = user_error(error)
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 20),) * 2)
print(with_room, "|", user_error(error))
"""


def test_an_error_of_another_name_while_no_memory_is_left() -> None:
    """Python's compiler says so when an import finds no memory; which allocation fails is chance."""
    line = [sys.executable, "-c", NO_ROOM]
    ended = subprocess.run(line, capture_output=True, text=True, check=True, env=environment())
    with_room, without = ended.stdout.split("|")
    assert with_room.strip() == "None"
    assert "not enough memory: ValueError: field 'target'" in without
    assert "fix: " in without


# ------------------------------------------------------------------------------------------------- as a process of its own

BUG = """
import click
from dvdquant.cli.shared.common import ExamplesCommand
@click.command(cls=ExamplesCommand)
def main():
    raise ValueError("never \\x1b[31m seen \\u202e")
main([])
"""


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("{python} -c {bug}", 1, "never \\x1b[31m seen \\u202e\nthis is a fault of dvdquant"),
        ("{inspect} --help > /dev/full", 2, "standard output cannot be written: No space left on device"),
        ("{inspect} --help >&-", 2, "standard output cannot be written"),
        ("{inspect} --help > /dev/full 2> /dev/full", 2, ""),
        ("{inspect} --help 2>&- >&- <&-", 2, ""),
        ("{inspect} --help 2> /dev/full > /dev/null", 0, ""),
        ("{inspect} nowhere 2>&-", 2, ""),
        ("{inspect} nowhere 2> /dev/full", 2, ""),
        ("set -o pipefail; (sleep 0.5; {inspect} --help) | true", 141, ""),
        ("{inspect} --version | head -1 > /dev/null", 0, ""),
        ("{inspect} --no-$'\\x1b[31m'", 2, "error: No such option '--no-\\x1b[31m'"),
        ("{run} $'\\x1b[31m' --log-format json --steps $'\\x1b[31m'", 2, '"event": "error", "error": "UsageError"'),
        ("PYTHONUNBUFFERED=1 {inspect} --help > /dev/full", 2, "standard output cannot be written: No space left"),
        ("PYTHONUNBUFFERED= {inspect} --help > /dev/full", 2, "standard output cannot be written: No space left"),
        ("PYTHONIOENCODING=ascii {inspect} --help > /dev/null", 0, ""),
        ("LC_ALL=C {inspect} $'\\xff'", 2, "\\xff is not a dvdquant export"),
        ("mkdir gone; cd gone; rmdir ../gone; {inspect} x", 2, "working directory"),
        ("{inspect} x &> /dev/null & kill -TERM $!; wait $!", 143, ""),
    ],
)
def test_the_interpreter_ends_as_the_command_does(line: str, code: int, said: str, tmp_path: Path) -> None:
    """Also what Python itself does after the command: the last flush, and the traceback of a bug."""
    python = shlex.quote(sys.executable)
    parts = {name: f"{python} -m dvdquant.cli.{name}" for name in ("inspect", "run")}
    script = line.replace("{python}", python).replace("{bug}", shlex.quote(BUG))
    for name, part in parts.items():
        script = script.replace(f"{{{name}}}", part)
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=environment(), cwd=tmp_path, check=False)
    err = done.stderr.decode()
    assert done.returncode == code, err
    assert said in err
    assert not {c for c in err if unsafe(c)} - {"\n"}
    assert "Exception ignored" not in err
    assert ("Traceback" in err) == (code == 1)
    assert said or not err


@pytest.mark.parametrize("name", ["inspect", "plan", "run"])
@pytest.mark.parametrize("limit", [["RLIMIT_NOFILE", 4], ["RLIMIT_NOFILE", 10], ["RLIMIT_FSIZE", 4000]])
def test_limits_of_the_system(name: str, limit: list[Any], server: CommandServer) -> None:
    words = [name, *base(name), *{"inspect": ["--html", "page.html"], "plan": ["--plot", "p.png"], "run": []}[name]]
    before = _names(server.folder)
    ended = server.run(*words, limits=[limit])
    assert ended.code == 2
    assert [fault for fault in ended.faults() if fault != "no way out"] == [], ended.err
    new = _names(server.folder) - before
    assert new <= {"schedule.json"}  # small enough, and whole before the picture was drawn
    for made in new:
        json.loads((server.folder / made).read_text())
        (server.folder / made).unlink()


# ------------------------------------------------------------------------------------------------------------- signals


@functools.cache
def _undisturbed(server: CommandServer, name: str) -> tuple[float, dict[str, int]]:
    """How long a command takes that nothing stops, and the sizes of what it leaves; measured once."""
    before = _names(server.folder)
    seconds = server.run(name, *base(name)).seconds
    finished = _sizes(server.folder, before)
    for new in finished:
        (server.folder / new).unlink()
    return seconds, finished


EVERY_STAGE = [
    (signal.SIGTERM, {"run": (0.05, 0.3, 0.6, 0.9), "plan": (0.1, 0.5), "export": (0.3,)}),
    (signal.SIGHUP, {"run": (0.2, 0.5)}),
    (signal.SIGINT, {"run": (0.2, 0.5), "plan": (0.4,)}),
]


@pytest.mark.parametrize(
    ("number", "stages"),
    [
        (signal.SIGTERM, {"run": (0.3, 0.9), "export": (0.3,)}),
        (signal.SIGHUP, {"run": (0.5,)}),
        (signal.SIGINT, {"plan": (0.4,)}),
        *(pytest.param(*case, marks=pytest.mark.stress) for case in EVERY_STAGE),
    ],
)
def test_signals_in_every_stage_leave_nothing(
    number: signal.Signals, stages: dict[str, tuple[float, ...]], server: CommandServer
) -> None:
    before, stopped = _names(server.folder), 0
    for name, shares in stages.items():
        whole, finished = _undisturbed(server, name)
        for share in shares:
            pause = share * whole
            ended = server.run(name, *base(name), signal_after=[int(number), pause])
            # The first run may have been the slowest, and this one be done before its signal: ask sooner.
            while ended.code == 0 and pause > 0.02:
                for new in _names(server.folder) - before:
                    (server.folder / new).unlink()
                pause /= 2
                ended = server.run(name, *base(name), signal_after=[int(number), pause])
            if ended.code != 0:
                stopped += 1
                assert ended.code == 128 + number, ended.err
                assert "Traceback" not in ended.err
                # On a busy machine it may come before there is a handler.
                assert not ended.err or "nothing is half-written" in ended.err
                # Between two of its files the first one may be there, and is whole.
                assert _sizes(server.folder, before).items() <= finished.items()
            for new in _names(server.folder) - before:
                (server.folder / new).unlink()
    assert stopped


def test_a_run_killed_while_it_encodes_is_swept_by_the_next(server: CommandServer) -> None:
    folder = server.folder / "clips"
    folder.mkdir()
    slow = server.folder / "slow-ffmpeg"
    slow.write_text('#!/bin/sh\ncase "$*" in *-encoders*) echo " V....D libx264 x"; exit 0;; esac\nexec sleep 8\n')
    slow.chmod(0o755)
    words = ["run", *base("run")[:-1], "clips/clip.mp4"]
    try:
        stuck = {"environment": {"IMAGEIO_FFMPEG_EXE": str(slow)}}
        ended = server.run(*words, signal_when=[int(signal.SIGKILL), "clips/.*.mp4"], **stuck)
        assert ended.code == 128 + signal.SIGKILL
        (left,) = folder.iterdir()
        assert UNFINISHED.fullmatch(left.name)
        left.unlink()
        ended = server.run(*words, signal_when=[int(signal.SIGTERM), "clips/.*.mp4"], **stuck)
        assert (ended.code, list(folder.iterdir())) == (128 + signal.SIGTERM, [])
        left.write_bytes(b"half a clip")
        assert server.run(*words).code == 0
        assert [path.name for path in folder.iterdir()] == ["clip.mp4"]
    finally:
        shutil.rmtree(folder)
        slow.unlink()


def test_a_stop_is_a_json_line_and_leaves_the_clip_that_was_there(server: CommandServer) -> None:
    clip = server.folder / "clip.gif"
    clip.write_bytes(b"the clip of yesterday")
    before = _names(server.folder)
    many = ["1000" if word == "1" else word for word in base("run")]  # steps, so that it is at work
    for number in (signal.SIGTERM, signal.SIGINT):
        ended = server.run("run", *many, "--log-format", "json", signal_said=[int(number), '"event": "step"'])
        assert ended.code == 128 + number
        assert json.loads(ended.err.splitlines()[-1])["event"] == "stopped"
        assert '"event": "step"' in ended.err  # it was at work
        assert clip.read_bytes() == b"the clip of yesterday"
        assert _names(server.folder) == before
    clip.unlink()


# ------------------------------------------------------------------------------------------------------- hostile names


def _hostile(value: Any) -> Any:
    """Every name of a manifest with what acts on a terminal, markup, and a line break."""
    evil = HOSTILE.replace("\x9b", "\x85\u2028") + "|`<b>\n# x"
    return {**value, "name": value["name"] + evil} if isinstance(value, dict) else value + evil


def test_names_of_a_hostile_export_are_shown_not_sent(server: CommandServer) -> None:
    copy = Path(shutil.copytree(short_wan_export(), server.folder / HOSTILE))
    try:
        data = json.loads((copy / "manifest.json").read_text())
        data["layers"] = [_hostile(entry) for entry in data["layers"]]
        data["kept"] = [_hostile(name) for name in data["kept"]]
        data["source"]["class_name"] = _hostile(data["source"]["class_name"])
        data["source"]["model"] = _hostile(str(TINY_WAN))
        data["tools"] = {_hostile(name): _hostile(version) for name, version in data["tools"].items()}
        data["dvdquant_version"] = _hostile("1")
        (copy / "manifest.json").write_text(json.dumps(data))
        run = ["--prompt", HOSTILE, "--steps", "1", "-o", "clip.gif"]
        for words in (
            ["inspect", HOSTILE],
            ["inspect", HOSTILE, "--layers", "--check", "-vv"],
            ["inspect", HOSTILE, "--json"],
            ["inspect", HOSTILE, "--graph", HOSTILE],
            ["inspect", HOSTILE, "--html", f"{HOSTILE}.html"],
            ["plan", HOSTILE, "--prompt", PROMPT],
            ["run", HOSTILE, *run],
            ["run", HOSTILE, *run, "--log-format", "json"],
            ["run", HOSTILE, "--prompt", PROMPT, "--steps", "1", "-o", "clip.gif"],
            ["export", HOSTILE, "-o", "new"],
            ["export", str(TINY_WAN), "-o", HOSTILE, "--dry-run", HOSTILE],
            ["export", str(TINY_WAN), "-o", "new", "--keep", HOSTILE, "--log-format", "json"],
        ):
            ended = server.run(*words)
            assert ended.faults() == [], (words, ended.err)
            if "--json" in words:
                assert json.loads(ended.out) == data
        page = (server.folder / f"{HOSTILE}.html").read_text()
        assert not {c for c in page if unsafe(c)} - {"\n", "\u202f"}
        (server.folder / f"{HOSTILE}.html").unlink()
        card = model_card(load_manifest(copy))
        assert not {c for c in card if unsafe(c)} - {"\n"}
        assert "<b>" not in "".join(card.split("`")[0::2])
        assert card.count("\n# ") == 1
    finally:
        shutil.rmtree(copy)


def test_a_card_is_markdown_whatever_the_names(server: CommandServer) -> None:
    manifest = load_manifest(short_wan_export())
    evil = "a|b`c\n---\n# d <script>x</script> [e](f) \x1b[31m\u202e"
    engine = {"path": evil, "sm": [evil], "act_bits": 4, "executes": evil}
    graphs = tuple({**graph, "path": evil, "target": evil} for graph in manifest.graphs)
    source = {**manifest.source, "model": evil, "class_name": evil}
    hostile = replace(manifest, graphs=graphs, engines=(engine,), source=source)  # type: ignore[arg-type]
    usual = {"path": "engine", "sm": ["8.9"], "act_bits": 4, "executes": "int8"}
    plain = model_card(replace(manifest, engines=(usual,)))  # type: ignore[arg-type]
    card = model_card(hostile)
    assert len(card.splitlines()) == len(plain.splitlines())
    assert [line.count("|") - line.count("\\|") for line in card.splitlines()] == [
        line.count("|") - line.count("\\|") for line in plain.splitlines()
    ]
    outside = "".join("".join(line.split("`")[0::2]) for line in card.splitlines())
    assert "<script>" not in outside
    assert "[e](f)" not in outside
    assert not {c for c in card if unsafe(c)} - {"\n"}


@pytest.mark.slow
def test_a_model_and_a_folder_with_hostile_names_are_exported(server: CommandServer) -> None:
    """Escapes and bidirectional marks in both names; every byte that comes out is looked at. Names that are no UTF-8 are
    refused before any work."""
    model = server.folder / f"model {HOSTILE}"
    out = server.folder / f"out {HOSTILE}"
    tiny.write_checkpoint(model, tiny.WAN_ONE)
    try:
        for words in ([f"{model}{LATIN}", "-o", out], [model, "-o", f"{out}{LATIN}"]):
            ended = server.run("export", *words, "--target", "graphs", *SIZES)
            assert ended.code == 2, ended.err
            assert ended.faults() == []
        for more in (["-vv"], ["--log-format", "json", "-v"]):
            ended = server.run(
                "export", model, "-o", out, "--recipe", "rtn", "--target", "graphs", *SIZES, *more, limit=120
            )
            assert ended.code == 0, ended.err
            assert ended.faults() == []
        for name in ("README.md", "manifest.json"):
            text = (out / name).read_text(encoding="utf-8")
            assert not {c for c in text if unsafe(c)} - {"\n"}
        assert server.run("inspect", out, "--check").code == 0
    finally:
        shutil.rmtree(model)
        shutil.rmtree(out, ignore_errors=True)
