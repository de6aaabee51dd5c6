"""The promise of the whole chain on a tiny Wan: killed or out of disk at any point, an export is old, new, or resumable."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.verify_files import verify_files
from tests.support import tiny_models as tiny
from tests.support.costs import Costs
from tests.support.exporting import REPOSITORY
from tests.support.faults import ERRORS

KILLS = 3
OFFSETS = 3


class Exporter:
    """The forking exporter, and one export at a time in it."""

    def __init__(self, model: Path) -> None:
        self.model = model
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "tests.support.forking_exporter"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
        )

    def run(
        self,
        out: Path,
        recipe: str,
        *,
        resume: bool = False,
        kill_after: float | None = None,
        fault: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """The export's status and error; killed ``kill_after`` seconds into it if it still runs then.

        Args:
            fault: errno, and the number of the writing call that fails with it.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"model": str(self.model), "out": str(out), "recipe": recipe, "resume": resume, "fault": fault}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        pid = json.loads(self.process.stdout.readline())["pid"]
        timer = None
        if kill_after is not None:
            timer = threading.Timer(kill_after, os.kill, (pid, signal.SIGKILL))
            timer.start()
        result: dict[str, Any] = json.loads(self.process.stdout.readline())
        if timer is not None:
            timer.cancel()
        return result


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    server = Exporter(tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE))
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait()


def contents(out: Path) -> dict[str, str]:
    """SHA-256 of weights and graphs, of a folder whose every file matches its manifest."""
    manifest = load_manifest(out)
    verify_files(out, manifest)
    return {name: entry["sha256"] for name, entry in manifest.files.items() if name.startswith("onnx/")}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [KILLS, pytest.param(200, marks=pytest.mark.stress)])
def test_random_kills_then_resume_is_bit_identical(exporter: Exporter, tmp_path: Path, kills: int) -> None:
    reference = tmp_path / "reference"
    assert exporter.run(reference, "w4a4")["status"] == 0  # compiles and traces
    started = time.monotonic()
    assert exporter.run(tmp_path / "second", "w4a4")["status"] == 0
    seconds = time.monotonic() - started
    expected = contents(reference)
    assert contents(tmp_path / "second") == expected

    generator = random.Random(7)
    killed = finished = 0
    out = tmp_path / "out0"
    with Costs("kills of a whole export, each resumed", bounded=False) as costs:
        while killed < kills:
            result = exporter.run(out, "w4a4", resume=True, kill_after=generator.uniform(0, seconds))
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
    assert exporter.run(out, "w4a4", resume=True)["status"] == 0
    assert contents(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("step", [50, pytest.param(1, marks=pytest.mark.stress)])
def test_every_writing_call_of_an_export_failing(exporter: Exporter, tmp_path: Path, step: int) -> None:
    """With one of the errors of disks, by turns: exit 2 and one sentence, and the export of before as it was."""
    out = tmp_path / "out"
    assert exporter.run(out, "w4a4")["status"] == 0
    kept = shutil.copytree(out, tmp_path / "kept")
    before = contents(out)
    tried: list[str] = []
    for at in range(7 % step, 5000, step):
        code = ERRORS[at // step % len(ERRORS)]
        result = exporter.run(out, "rtn", fault=(code, at))
        said = (at, os.strerror(code), result)
        if result["failed"] is None:
            assert result["status"] == 0, said
            break
        tried.append(result["failed"])
        if result["status"] == 0:  # what failed is not needed, such as the exchange, or removes the replaced export
            assert contents(out) != before, said
            shutil.rmtree(out)
            shutil.copytree(kept, out)
        else:
            assert os.waitstatus_to_exitcode(result["status"]) == 2, said
            assert "fix: " in result["error"], said
            assert os.strerror(code) in result["error"], said
            assert contents(out) == before, said
    assert len(tried) > 5
    print(f"{len(tried)} calls failed: {sorted(set(tried))}")


@pytest.mark.slow
@pytest.mark.parametrize("offsets", [OFFSETS, pytest.param(50, marks=pytest.mark.stress)])
def test_disk_full_keeps_the_previous_export(exporter: Exporter, tmp_path: Path, offsets: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a tmpfs here")
    try:
        measured = tmp_path / "measured"
        assert exporter.run(measured, "w4a4")["status"] == 0
        size = sum(entry["bytes"] for entry in load_manifest(measured).files.values())
        out = disk / "out"
        assert exporter.run(out, "rtn")["status"] == 0
        before = contents(out)
        listing = sorted(p.name for p in out.iterdir())
        filler = disk / "filler"
        failed = 0
        for index in range(offsets):
            room = int(size * (index + 0.5) / offsets)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - room)))
            result = exporter.run(out, "w4a4")
            if result["status"] == 0:
                assert index >= offsets // 2
                assert exporter.run(out, "rtn")["status"] == 0
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
        assert exporter.run(out, "w4a4")["status"] == 0
        assert contents(out) != before
    finally:
        subprocess.run(["umount", str(disk)], check=True)
