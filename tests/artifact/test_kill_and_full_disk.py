"""The promise of the whole chain on a tiny Wan: killed or out of disk at any point, an export is old, new, or resumable."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.verify_files import verify_files
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process
from tests.support.costs import Costs
from tests.support.faults import ERRORS
from tests.support.forked_processes import forked_process

KILLS = 3
OFFSETS = 3


class Exporter:
    """The forking exporter, and one export at a time in it.

    Args:
        models: The folder of the models, which have one graph and different weights.
    """

    def __init__(self, models: Path) -> None:
        self.models = models
        command = forked_process("exporter")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        out: Path,
        model: str = "first",
        *,
        sms: Sequence[str] = (),
        resume: bool = False,
        kill_after: float | None = None,
        kill_when: Callable[[], bool] | None = None,
        fault: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """The export's status, peak of memory and error.

        Args:
            out: Where it goes.
            model: One of the two models.
            sms: Build engines for them.
            resume: Go on from finished work.
            kill_after: It is killed after so many seconds, if it still runs then.
            kill_when: It is killed with what it started as soon as this is true, if it still runs then.
            fault: errno, and the number of the writing call that fails with it.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        source = str(self.models / model)
        request = {"model": source, "out": str(out), "sms": list(sms), "resume": resume, "fault": fault}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        pid = json.loads(self.process.stdout.readline())["pid"]
        timer = None
        if kill_after is not None:
            timer = threading.Timer(kill_after, os.kill, (pid, signal.SIGKILL))
            timer.start()
        while kill_when is not None and _is_alive(pid):
            if kill_when():
                _kill_group(pid)
                break
            time.sleep(0.002)
        result: dict[str, Any] = json.loads(self.process.stdout.readline())
        if timer is not None:
            timer.cancel()
        return result


def _kill_group(group: int) -> None:
    """SIGKILL a process that leads its group, and the group; return when none of them holds a file any more.

    A builder that is being started at that moment has the lock of the export open until it has died, too.
    """
    os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(_is_alive_in(group, pid) for pid in psutil.pids()):
        assert time.monotonic() < deadline, "a process that was killed goes on"
        time.sleep(0.002)


def _is_alive_in(group: int, pid: int) -> bool:
    """Return whether a process is in a group and has not ended."""
    try:
        return os.getpgid(pid) == group and _is_alive(pid)
    except ProcessLookupError:
        return False


def _is_alive(pid: int) -> bool:
    """Return whether a process has not ended; one that waits to be collected has closed its files."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    models = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        tiny.write_checkpoint(models / name, tiny.WAN_ONE, seed=seed)
    server = Exporter(models)
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="module")
def whole(exporter: Exporter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the first model that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert exporter.run(out)["status"] == 0  # compiles and traces
    return out


def contents(out: Path) -> dict[str, str]:
    """SHA-256 of weights and graphs, of a folder whose every file matches its manifest."""
    manifest = load_manifest(out)
    verify_files(out, manifest)
    return {name: entry["sha256"] for name, entry in manifest.files.items() if name.startswith("onnx/")}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [KILLS, pytest.param(200, marks=pytest.mark.stress)])
def test_random_kills_then_resume_is_bit_identical(exporter: Exporter, whole: Path, tmp_path: Path, kills: int) -> None:
    started = time.monotonic()
    assert exporter.run(tmp_path / "second")["status"] == 0
    seconds = time.monotonic() - started
    expected = contents(whole)
    assert contents(tmp_path / "second") == expected

    generator = random.Random(7)
    killed = finished = 0
    out = tmp_path / "out0"
    with Costs("kills of a whole export, each resumed", bounded=False) as costs:
        while killed < kills:
            result = exporter.run(out, resume=True, kill_after=generator.uniform(0, seconds))
            if result["status"] == signal.SIGKILL:
                killed += 1
                costs.add(0.0)
                if (out / "manifest.json").exists():  # killed after the commit, or in it
                    assert contents(out) == expected
                continue
            assert result["status"] == 0, result["error"]
            assert contents(out) == expected
            assert not [p for p in out.iterdir() if p.name.startswith(".tmp-")]
            finished += 1
            out = tmp_path / f"out{finished}"
    assert exporter.run(out, resume=True)["status"] == 0
    assert contents(out) == expected


def journal_lines(out: Path, marker: str) -> int:
    return sum(p.read_text(errors="replace").count(marker) for p in out.glob(".tmp-*/journal.jsonl"))


STAGES: dict[str, Callable[[Path], bool]] = {
    "quantize": lambda out: journal_lines(out, ":layer:") >= 5,
    "engines": lambda out: any(out.glob(".tmp-*/tree/engines/*/.dvdq-build-*")),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["engines", pytest.param("quantize", marks=pytest.mark.stress)])
def test_resume_after_a_kill(stage: str, exporter: Exporter, whole: Path, tmp_path: Path) -> None:
    """Bit-identical weights and graphs, and the finished layers are not quantized again; without --resume, nothing is left."""
    out, sms = tmp_path / "killed", ["8.9"]  # two engines, so that there is time to kill it in the first
    killed = exporter.run(out, sms=sms, kill_when=lambda: STAGES[stage](out))
    assert killed["status"] == signal.SIGKILL, "the export ended before it could be killed"
    assert not (out / "manifest.json").exists()
    assert journal_lines(out, ":layer:")
    (weights,) = out.glob(".tmp-*/tree/onnx/transformer.safetensors")
    inode = weights.stat().st_ino
    begun_anew = Path(shutil.copytree(out, tmp_path / "again"))
    expected = contents(whole)
    resumed = exporter.run(out, sms=sms, resume=True)
    assert resumed["status"] == 0, resumed["error"]
    graphs = {"onnx/transformer.safetensors", "onnx/transformer_a4.onnx", "onnx/transformer_a8.onnx"}
    found = contents(out)
    assert found.keys() >= graphs
    assert found == {name: expected[name] for name in found}
    assert (out / "onnx/transformer.safetensors").stat().st_ino == inode
    manifest = load_manifest(out)
    assert len(manifest.engines) == 2
    assert manifest.layers == load_manifest(whole).layers
    assert exporter.run(begun_anew)["status"] == 0
    assert contents(begun_anew) == expected
    for folder in (out, begun_anew):
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_memory_is_near_what_the_dry_run_says(exporter: Exporter, tmp_path: Path) -> None:
    """Loose factors only: the estimates are measured in benchmarks."""
    model, out = exporter.models / "first", tmp_path / "out"
    text = in_process(model, "-o", out, "--target", "onnx", *SIZES, "--dry-run", "--log-format", "json")
    peak = exporter.run(out)["peak_bytes"]
    assert 0.5 * peak <= json.loads(text)["estimate"]["peak_bytes"] <= 3 * peak


@pytest.mark.slow
@pytest.mark.parametrize("step", [50, pytest.param(1, marks=pytest.mark.stress)])
def test_every_writing_call_of_an_export_failing(exporter: Exporter, whole: Path, tmp_path: Path, step: int) -> None:
    """With one of the errors of disks, by turns: exit 2 and one sentence, and the export of before as it was."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = contents(out)
    tried: list[str] = []
    for at in range(7 % step, 5000, step):
        code = ERRORS[at // step % len(ERRORS)]
        result = exporter.run(out, "second", fault=(code, at))
        said = (at, os.strerror(code), result)
        if result["failed"] is None:
            assert result["status"] == 0, said
            break
        tried.append(result["failed"])
        if result["status"] == 0:  # what failed is not needed, such as the exchange, or removes the replaced export
            assert contents(out) != before, said
            shutil.rmtree(out)
            shutil.copytree(whole, out)
        else:
            assert os.waitstatus_to_exitcode(result["status"]) == 2, said
            assert "fix: " in result["error"], said
            assert os.strerror(code) in result["error"], said
            assert contents(out) == before, said
    assert len(tried) > 5
    print(f"{len(tried)} calls failed: {sorted(set(tried))}")


@pytest.mark.slow
@pytest.mark.parametrize("offsets", [OFFSETS, pytest.param(50, marks=pytest.mark.stress)])
def test_disk_full_keeps_the_previous_export(exporter: Exporter, whole: Path, tmp_path: Path, offsets: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a tmpfs here")
    try:
        size = sum(entry["bytes"] for entry in load_manifest(whole).files.values())
        out = disk / "out"
        assert exporter.run(out, "second")["status"] == 0
        before = contents(out)
        listing = sorted(p.name for p in out.iterdir())
        filler = disk / "filler"
        failed = 0
        for index in range(offsets):
            room = int(size * (index + 0.5) / offsets)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - room)))
            result = exporter.run(out)
            if result["status"] == 0:
                assert index >= offsets // 2
                assert exporter.run(out, "second")["status"] == 0
            else:
                failed += 1
                assert os.waitstatus_to_exitcode(result["status"]) == 2
                assert "no room left" in result["error"] or "are free" in result["error"], result["error"]
                assert contents(out) == before
                work = [p for p in out.iterdir() if p.name.startswith(".tmp-")]
                assert sorted(p.name for p in out.iterdir() if p not in work) == listing
                for folder in work:  # kept for --resume; the next run would sweep it and have more room than meant
                    shutil.rmtree(folder)
            filler.unlink()
        assert failed >= offsets // 2
        assert exporter.run(out)["status"] == 0
        assert contents(out) != before
    finally:
        subprocess.run(["umount", str(disk)], check=True)
