"""Weights are in memory once, whatever the number of bit-widths: by address, and as the kernel counts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from onnxruntime import IOBinding

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import onnxruntime
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from tests.support import session_exports as made
from tests.support.commands import environment
from tests.support.weight_files import watch_weight_files


def test_bit_widths_share_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both graphs are bound to the same addresses, which lie in the one copy of the file."""
    artifact = Artifact.open(made.family_export("wan"))
    opened = watch_weight_files(monkeypatch, onnxruntime)
    bound: list[tuple[str, int]] = []
    bind = IOBinding.bind_input

    def note(binding: Any, name: str, *place: Any) -> None:
        bound.append((name, place[-1]))
        bind(binding, name, *place)

    with monkeypatch.context() as patched:
        patched.setattr(IOBinding, "bind_input", note)
        both = OnnxRuntimeSession(artifact)
    with both, OnnxRuntimeSession(artifact, bits=[4]) as one:
        files = opened[0]
        assert both.resident_bytes() == one.resident_bytes()
        whole = sum(artifact.manifest.files[name]["bytes"] for name in artifact.weight_files("transformer"))
        stored = sum(info.nbytes for _, info in files.tensors.values())
        assert stored * 0.9 < both.resident_bytes()["weights"] <= whole
        name = "blocks.0.ffn.net.2.weight"
        assert [address for each, address in bound if each == name] == [files.tensor(name).data_ptr()] * 2
    with PyTorchSession(artifact) as pytorch:
        weights = pytorch.resident_bytes()["weights"]
        assert abs(weights - stored) < 0.1 * stored


MEASURE = """
import json, sys
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.deploy.sessions.pytorch import PyTorchSession

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Anonymous:"))

def mapped(name):
    # Rss and anonymous bytes (copied on write) of every map of that name, by /proc.
    found, inside = {"Rss:": 0, "Anonymous:": 0, "maps": 0}, False
    with open("/proc/self/smaps") as file:
        for line in file:
            words = line.split()
            if "-" in words[0]:
                inside = line.rstrip().endswith(name)
                found["maps"] += inside
            elif inside and words[0] in found:
                found[words[0]] += int(words[1]) << 10
    return found

NAME = "/memfd:dvdq:transformer.safetensors (deleted)"
def measure(root, form):
    artifact = Artifact.open(root)
    file = str((artifact.root / "onnx/transformer.safetensors").resolve())
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    def open_one(bits):
        if form == "pytorch":
            return PyTorchSession(artifact, bits=bits)
        return OnnxRuntimeSession(artifact, bits=bits, weights=form, threads=1)
    start = anonymous()
    one = open_one((4,)); first = anonymous() - start
    both = open_one((4, 8)); second = anonymous() - start - first
    one.close(); del one
    for bits in (4, 8):
        both.run(inputs, bits)
    found = {"one": first, "both": second, "map": mapped(NAME), "file": mapped(file), "said": both.resident_bytes()}
    both.close(); del both
    found["left"] = mapped(NAME)
    return found
narrow, wide, *forms = sys.argv[1:]
results = {}
for form in forms:
    measure(narrow, form)  # pays for what stays: ONNX Runtime itself, and free memory that the next one takes
    results[form] = measure(wide, form)
print(json.dumps(results))
"""


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps, which Linux has")
def test_memory_of_a_wide_model() -> None:
    """Measured, not booked: a session has the weights once, for one bit-width or both; nothing writes to the copy there is, and
    nothing is mapped of the file itself.

    What a session takes besides its weights are its graphs: less than one packed copy here, so that a copy too many shows.
    """
    narrow, out = made.family_export("wan"), made.wide_export()
    artifact = Artifact.open(out)
    stored = artifact.manifest.files["onnx/transformer.safetensors"]["bytes"]
    codes = sum(e["features_in"] * e["features_out"] for e in artifact.manifest.layers) // 2
    measured = {}
    for forms in (("packed", "pytorch"), ("expanded",)):
        command = [sys.executable, "-c", MEASURE, str(narrow), str(out), *forms]
        # Whatever is large is mapped, so that the system has it back when it is freed. glibc would raise the threshold
        # to 32 MiB by itself, and then keep what a load freed: 0 to 100 MB here, by where it lay.
        malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        settings = {**environment(), **malloc, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
        assert done.returncode == 0, done.stderr
        measured |= json.loads(done.stdout)
    for form in ("packed", "pytorch"):
        found = measured[form]
        # One map of the copy, resident once, never copied on write, and gone with the session.
        assert found["map"]["maps"] == 1
        assert 0.9 * stored < found["map"]["Rss:"] <= stored + os.sysconf("SC_PAGE_SIZE")
        assert found["map"]["Anonymous:"] == 0
        assert found["file"]["maps"] == found["left"]["maps"] == 0
        assert codes < found["said"]["weights"] <= stored * 1.01
        # Besides the copy, which is no anonymous memory, there is no other one, in a session of either kind.
        assert found["one"] < codes
        assert found["both"] < codes
    # The packed copy is gone: the matrices are all that is left of it.
    found = measured["expanded"]
    assert found["map"]["maps"] == 0
    # The same figures see the fp32 matrices, which a session of both bit-widths has once; and no packed copy beside them.
    assert found["said"]["weights"] > 8 * codes
    assert 8 * codes < found["both"] < found["said"]["weights"] + codes
