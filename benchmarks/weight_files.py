"""Measure the cost of opening the weights of an export: seconds, and memory as the kernel counts it.

    python benchmarks/weight_files.py --gib 2

writes a weight file of random bytes, opens it as a session does (twice, then in a forked child), and removes it. The page
cache is warm, so that the disk is not measured. With ``--disk`` the private copies are files, as on a machine whose
memory has no room.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dvdquant.deploy.sessions import weights
from dvdquant.deploy.sessions.weights import WeightFiles
from dvdquant.system.files import hash_file
from dvdquant.system.safetensors_writer import StreamingWriter

NAME = "onnx/transformer.safetensors"
TENSORS = 64


def kernel_kilobytes(*names: str) -> dict[str, int]:
    """Return fields of /proc/self/smaps_rollup and /proc/self/status, in KiB.

    Args:
        *names: The names of the fields.
    """
    text = Path("/proc/self/smaps_rollup").read_text() + Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) for name in names}


def report(what: str, seconds: float) -> None:
    """Print one line: time, resident memory and its parts.

    Args:
        what: The step that has just ended.
        seconds: The time that it took.
    """
    found = kernel_kilobytes("Pss", "Anonymous", "RssShmem", "RssFile")
    parts = "  ".join(f"{name} {value / 2**20:.2f}" for name, value in found.items())
    print(f"{what:28} {seconds:6.2f} s   GiB: {parts}", flush=True)


def touch(files: WeightFiles, nbytes: int) -> int:
    """Read a byte of every page, and return their sum.

    Args:
        files: The opened weight files.
        nbytes: The size of the weight file.
    """
    return int(files.region("transformer.safetensors", 0, nbytes)[:: os.sysconf("SC_PAGE_SIZE")].sum())


def main() -> None:
    """Measure, print and clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--disk", action="store_true")
    options = parser.parse_args()
    if options.disk:
        mock.patch.object(weights, "fits_in_memory", return_value=False).start()
    # 1. Write a weight file.
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        path = Path(folder) / NAME
        path.parent.mkdir()
        rows = int(options.gib * 2**30 / TENSORS)
        block = torch.randint(-128, 128, (rows,), dtype=torch.int8)
        with StreamingWriter(path, [(f"t{i}", torch.int8, (rows,)) for i in range(TENSORS)]) as writer:
            for i in range(TENSORS):
                writer.write(f"t{i}", block)
            writer.finish()
        entry = hash_file(path)  # and the page cache is warm
        artifact: Any = SimpleNamespace(
            root=Path(folder), manifest=SimpleNamespace(files={NAME: entry}), weight_files=lambda component: (NAME,)
        )
        report("before", 0.0)
        start = time.perf_counter()
        first = WeightFiles(artifact, "transformer")
        report("opened", time.perf_counter() - start)
        start = time.perf_counter()
        total = touch(first, entry["bytes"])
        report("every page read", time.perf_counter() - start)
        start = time.perf_counter()
        second = WeightFiles(artifact, "transformer")
        report("opened beside it", time.perf_counter() - start)
        child = os.fork()
        if child == 0:
            start = time.perf_counter()
            assert touch(first, entry["bytes"]) == total
            report("in a forked child", time.perf_counter() - start)
            os._exit(0)
        os.waitpid(child, 0)
        first.close()
        second.close()
        del first, second
        report("closed", 0.0)
        start = time.perf_counter()
        WeightFiles(artifact, "transformer").close()
        report("opened and closed again", time.perf_counter() - start)
    print(f"peak resident {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
